# The commands of README.md and CONTRIBUTING.md. Everything that is made lies in .venv, .cache and .quickstart.
SHELL := /bin/bash
MODEL ?=
PORT ?=
quickstart_vars := $(if $(MODEL),-e quickstart_model='$(MODEL)') $(if $(PORT),-e quickstart_port='$(PORT)')

.PHONY: help quickstart quickstart-down test lint unit quality integration molecule soak docker-here test-vm test-dkms test-driver test-serving test-cluster

help: ## List the targets
	@grep -hE '^[a-z -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z -]+):.*## /  make \1\t/' | expand -t 44

quickstart: ## Serve a model on this machine (MODEL=owner/name or /folder, PORT=8000)
	@scripts/controller.sh requirements.txt
	@.venv/bin/ansible-playbook site.yml -i inventories/quickstart $(quickstart_vars)

quickstart-down: ## Stop what quickstart started (its files stay)
	@scripts/controller.sh requirements.txt
	@.venv/bin/ansible-playbook playbooks/teardown.yml -i inventories/quickstart $(quickstart_vars)

test: ## Everything that needs no GPU (STAGES="lint unit quality molecule integration vm"; all but vm unless named)
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/python tests/run.py $(STAGES)

lint unit quality integration: ## One stage of test
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/python tests/run.py $@

molecule: ## Container scenarios (SCENARIOS="docker docker_refusals")
	@scripts/controller.sh requirements-dev.txt
	@molecule/run.sh $(SCENARIOS)

soak: ## 240 random faults and kills while models are fetched (FAULTS=1000 SEED=7)
	@scripts/controller.sh requirements-dev.txt
	@BAREMETAL_SOAK_FAULTS=$(or $(FAULTS),240) BAREMETAL_SOAK_SEED=$(or $(SEED),1) .venv/bin/pytest -q -s tests/integration/test_model_soak.py

test-vm: ## A real kernel in QEMU: nouveau, initramfs, DKMS, reboots (as root, with mmdebstrap, grub-pc-bin and qemu-system-x86)
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/python tests/run.py vm

test-driver: ## Driver changed, rolled back, removed and by packages, CUDA toolkits, on stand-ins (half an hour on two cores)
	@scripts/controller.sh requirements-dev.txt
	@BAREMETAL_TEST_DRIVER_CHANGES=1 molecule/run.sh nvidia_driver_changes_standin nvidia_packages_standin cuda_toolkit_standin

test-dkms: ## NVIDIA's own source built by the driver's role (Debian non-free; 5 to 10 minutes)
	@scripts/controller.sh requirements-dev.txt
	@molecule/run.sh nvidia_source

test-serving: ## Real vLLM in containers, real parsers of five releases, Dify (as root; about an hour on two cores)
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/pytest -v tests/serving

test-cluster: ## Ray and vLLM over several containers through reboots, cuts and changes (as root, with Docker Engine; an hour)
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/pytest -s tests/cluster

docker-here: ## Install and start Docker Engine on this machine through the role docker
	@scripts/controller.sh requirements-dev.txt
	@.venv/bin/ansible-playbook -i localhost, tests/integration/docker_here.yml
