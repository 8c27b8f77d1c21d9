# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/awx/configure.yml against a stand-in for AWX's API, which takes what AWX takes and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from support import ROOT, run

from ansible_collections.baremetal.vllm.tests.fakes.openai_server import as_json
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer, Handler, Server

TOKEN = "token-of-awx-0123456789"
FIELDS = {
    "name", "description", "job_type", "project", "inventory", "playbook", "survey_enabled", "ask_limit_on_launch",
    "ask_credential_on_launch", "ask_diff_mode_on_launch",
}  # fmt: skip
QUESTION = {"question_name", "question_description", "variable", "type", "required", "default", "min", "max", "choices"}


class Awx(Server):
    def __init__(self) -> None:
        super().__init__()
        self.templates: dict[int, dict[str, Any]] = {}
        self.surveys: dict[int, dict[str, Any]] = {}

    def respond(self, request: Handler) -> Answer:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return as_json({"detail": "Authentication credentials were not provided."}, 401)
        url = urlsplit(request.path)
        name = parse_qs(url.query).get("name", [""])[0]
        body = json.loads(request.content) if request.content else {}
        if match := re.fullmatch(r"/api/v2/(projects|inventories)/", url.path):
            known = {"projects": "ours", "inventories": "gpu"}[match[1]]
            results = [{"id": 7, "name": known}] if name == known else []
            return as_json({"count": len(results), "results": results})
        if match := re.fullmatch(r"/api/v2/job_templates/(\d+)/survey_spec/", url.path):
            if request.command == "GET":
                return as_json(self.surveys.get(int(match[1]), {}))
            for question in body["spec"]:
                if question["type"] not in ("text", "multiplechoice", "integer") or not set(question) >= QUESTION:
                    return as_json({"error": f"survey question {question}"}, 400)
                if question["type"] == "multiplechoice" and question["default"] not in ["", *question["choices"]]:
                    return as_json({"error": "Default choice must be answered from the choices listed."}, 400)
            self.surveys[int(match[1])] = body
            return as_json({})
        if url.path == "/api/v2/job_templates/" and request.command == "GET":
            results = [template for template in self.templates.values() if template["name"] == name]
            return as_json({"count": len(results), "results": results})
        match = re.fullmatch(r"/api/v2/job_templates/(?:(\d+)/)?", url.path)
        if not match or set(body) - FIELDS:
            return as_json({"detail": "Not found or unknown fields"}, 404 if not match else 400)
        number = int(match[1]) if match[1] else len(self.templates) + 1
        self.templates[number] = {**self.templates.get(number, {"verbosity": 0}), **body, "id": number}
        return as_json(self.templates[number], 200 if match[1] else 201)


@pytest.fixture
def awx(monkeypatch: pytest.MonkeyPatch) -> Iterator[Awx]:
    monkeypatch.setattr(Handler, "do_PATCH", Handler._handle, raising=False)
    with Awx() as server:
        yield server


def configure(awx: Awx, *arguments: str, project: str = "ours") -> str:
    command = ["ansible-playbook", "-i", "localhost,", "playbooks/awx/configure.yml", "-e", f"awx_project={project}"]
    settings = {"CONTROLLER_HOST": awx.url, "CONTROLLER_OAUTH_TOKEN": TOKEN, "ANSIBLE_NOCOLOR": "1"}
    done = run([*command, "-e", "awx_inventory=gpu", *arguments], ROOT, **settings)
    assert TOKEN not in done.stdout
    print(done.stdout)
    return done.stdout


def test_standin_made_changed_and_left_alone(awx: Awx) -> None:
    assert "failed=0" in configure(awx)
    names = {template["name"]: template for template in awx.templates.values()}
    assert set(names) == {f"vLLM: {name}" for name in ("plan", "site", "verify", "bench", "teardown")}
    assert all((ROOT / template["playbook"]).exists() for template in names.values())
    assert "changed=0" in configure(awx)
    awx.templates[1]["playbook"] = "old.yml"
    awx.surveys[2]["spec"] = []
    assert "changed=2" in configure(awx)
    assert "changed=0" in configure(awx)


def test_bad_input(awx: Awx) -> None:
    assert "AWX has 0 projects of the name none: give the name of one" in " ".join(
        configure(awx, project="none").split()
    )
    assert awx.templates == {}


def test_surveys_set_variables_that_something_reads() -> None:
    templates = yaml.safe_load((ROOT / "playbooks/awx/job_templates.yml").read_text())["awx_job_templates"]
    sources = [path for pattern in ("playbooks/*.yml", "roles/*/defaults/main.yml") for path in ROOT.glob(pattern)]
    text = "\n".join(path.read_text() for path in sources)
    for template in templates:
        for question in template["survey"]:
            assert re.search(rf"\b{question['variable']}\b", text), question["variable"]
