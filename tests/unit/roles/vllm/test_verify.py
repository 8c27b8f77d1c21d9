# SPDX-License-Identifier: GPL-3.0-or-later
"""verify.yml of the role on hosts where services should answer and do not lie."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run

PLAY = [{
    "hosts": "all", "gather_facts": False,
    "tasks": [{"ansible.builtin.include_role": {"name": "baremetal.vllm.vllm", "tasks_from": "verify"}}],
}]  # fmt: skip


def verify(folder: Path, *arguments: str) -> tuple[str, int]:
    """(output in one line, status) of two hosts, this machine under two names."""
    hosts = {name: {"vllm_config_dir": str(folder / name)} for name in ("one", "two")}
    common: dict[str, Any] = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "vllm_verify_client": "never",
        "vllm_services": [{"name": "chat", "model": "m"}, {"name": "embed", "model": "m", "hosts": ["two"]}],
    }  # fmt: skip
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    (folder / "play.yml").write_text(json.dumps(PLAY))
    command = ["ansible-playbook", "-i", folder / "hosts.json", folder / "play.yml", *arguments]
    done = run(command, ROOT, ANSIBLE_NOCOLOR="1")
    return " ".join(done.stdout.split()), done.returncode


def test_where_nothing_was_deployed_nothing_is_verified(tmp_path: Path) -> None:
    output, status = verify(tmp_path)
    assert status != 0
    assert "chat should answer on one and has no endpoint.json" in output, output[-3000:]
    assert "embed should answer on two and has no endpoint.json" in output


def test_a_first_start_that_failed_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "two/embed").mkdir(parents=True)
    (tmp_path / "two/embed/plan.json").write_text("{}")
    output, status = verify(tmp_path, "--limit", "two")
    assert status != 0 and "embed should answer on two" in output, output[-3000:]


@pytest.mark.parametrize("arguments", [("--limit", "one"), ("--check",)])
def test_what_may_be_elsewhere_or_is_still_to_come_is_not_missed(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    output, status = verify(tmp_path, *arguments)
    assert status == 0, output[-3000:]
