# SPDX-License-Identifier: GPL-3.0-or-later
"""The inventories of real deployments through Ansible itself: variables, roles' arguments, plan and preflight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT, run

NAMES = sorted(
    path.parent.name for path in ROOT.glob("inventories/*/hosts.yml") if "plan_host_gpus" in path.read_text()
)


def play(name: str, *arguments: str) -> tuple[int, str]:
    here = [
        "-e",
        "ansible_connection=local",
        "-e",
        "ansible_become=false",
        "-e",
        "ansible_python_interpreter=/usr/bin/python3",
    ]
    command = [
        ROOT / ".venv/bin/ansible-playbook",
        "tests/integration/inventory_roles.yml",
        "-i",
        ROOT / "inventories" / name,
    ]
    done = run(
        [*command, *here, *arguments], ROOT, ANSIBLE_COLLECTIONS_PATH=str(ROOT / "collections"), ANSIBLE_NOCOLOR="1"
    )
    return done.returncode, done.stdout


def hosts(name: str) -> str:
    command = [ROOT / ".venv/bin/ansible", "all", "-i", ROOT / "inventories" / name, "--list-hosts"]
    return json.dumps(run(command, ROOT).stdout.split()[2:])


@pytest.mark.parametrize("name", NAMES)
def test_the_roles_take_it(name: str, tmp_path: Path) -> None:
    code, output = play(name, "-e", f"seen={tmp_path}")
    assert code == 0, output[-4000:]
    for path in tmp_path.glob("*.json"):
        seen = json.loads(path.read_text())
        assert seen["plan"]["fits"] and seen["plan"]["problems"] == []
        runtime = "venv" if name.startswith("v100") else "container"  # its README.md says why
        assert {row["runtime"] for row in seen["plan"]["services"]} == {runtime}
        # What it finds is about this machine; a broken role would fail in other words.
        own_code = [row["name"] for row in seen["plan"]["services"] if "--trust-remote-code" in row["args"]]
        told = [
            problem.split()[1] for problem in seen["problems"] if "trust_remote_code and no pinned revision" in problem
        ]
        assert told == own_code, seen["problems"]
        assert seen["reason"] in ("", "\n".join(seen["problems"])), seen
    assert len(list(tmp_path.glob("*.json"))) == len(json.loads(hosts(name)))


def test_code_of_a_model_that_is_pinned_is_taken(tmp_path: Path) -> None:
    entry = {
        "name": "own",
        "model": "stepfun-ai/Step3-VL-10B",
        "trust_remote_code": True,
        "revision": "0" * 40,
        "max_model_len": 4096,
    }
    variables = json.dumps({"seen": str(tmp_path), "vllm_services": [entry]})
    assert play("step3-vl-10b-4x22g", "-e", variables)[0] == 0
    (seen,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert "--trust-remote-code" in seen["plan"]["services"][0]["args"]
    assert not [problem for problem in seen["problems"] if "trust_remote_code" in problem]


def test_a_value_that_a_role_does_not_take_is_refused() -> None:
    code, output = play(NAMES[0], "-e", "vllm_runtime=docker")
    assert code != 0
    assert "value of vllm_runtime must be one of: container, venv, got: docker" in " ".join(output.split())
