# The commands of README.md and CONTRIBUTING.md. Everything that is made lies in .venv, .cache and .quickstart.
SHELL := /bin/bash
MODEL ?=
PORT ?=
quickstart_vars := $(if $(MODEL),-e quickstart_model='$(MODEL)') $(if $(PORT),-e quickstart_port='$(PORT)')

.PHONY: help quickstart quickstart-down plan test lint unit molecule

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

quickstart: ## Serve a model on this machine (MODEL=owner/name or /folder, PORT=8000)
	@scripts/controller.sh requirements.txt
	@.venv/bin/ansible-playbook site.yml -i inventories/quickstart $(quickstart_vars)

quickstart-down: ## Stop what quickstart started (its files stay)
	@scripts/controller.sh requirements.txt
	@.venv/bin/ansible-playbook playbooks/teardown.yml -i inventories/quickstart $(quickstart_vars)
