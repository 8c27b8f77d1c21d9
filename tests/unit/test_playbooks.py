# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks that would end well with nothing done: they say why instead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run

CHAT = {"name": "chat", "model": "Qwen/Qwen2.5-7B-Instruct"}


def play(folder: Path, playbook: str, *arguments: str, **hosts: dict[str, Any]) -> tuple[str, int]:
    """(output in one line, status), with hosts that are this machine and have what is said of each."""
    common = {
        "ansible_connection": "local", "ansible_python_interpreter": sys.executable, "ansible_become": False,
        "plan_host_gpus": "1x H100", "vllm_config_dir": str(folder), "proxy_config_dir": str(folder),
    }  # fmt: skip
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts, "vars": common}}))
    command = ["ansible-playbook", "-i", folder / "hosts.json", ROOT / "playbooks" / playbook, *arguments]
    done = run(command, ROOT, ANSIBLE_NOCOLOR="1")
    return " ".join(done.stdout.split()), done.returncode


@pytest.mark.parametrize("playbook", ["verify.yml", "bench.yml"])
def test_without_services(tmp_path: Path, playbook: str) -> None:
    output, status = play(tmp_path, playbook, one={"vllm_service": [CHAT]}, two={"vllm_services": []})
    assert status != 0 and "no host of this run has vllm_services" in output


@pytest.mark.parametrize("arguments", [(), ("--tags", "verify")])
def test_the_proof_is_not_left_out(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    output, status = play(tmp_path, "verify.yml", *arguments, one={"vllm_services": [CHAT]})
    assert status != 0 and "chat should answer on one and has no endpoint.json" in output


def test_dify_with_nothing_deployed(tmp_path: Path) -> None:
    output, status = play(
        tmp_path, "dify.yml", "-e", f"dify_output={tmp_path}/dify.json", one={"vllm_services": [CHAT]}
    )
    assert status != 0 and "run site.yml with this inventory first" in output
    assert not (tmp_path / "dify.json").exists()


def test_a_plan_that_a_limit_leaves_out(tmp_path: Path) -> None:
    hosts = {name: {"vllm_services": [CHAT]} for name in ("one", "two")}
    output, status = play(tmp_path, "plan.yml", "--limit", "one", **hosts)
    assert status != 0 and "which --limit one leaves out: give --limit one,localhost" in output
    output, status = play(tmp_path, "plan.yml", "--limit", "one,localhost", **hosts)
    assert status != 0 and "limited to one, and service chat may run on any host and would be planned anew" in output
    services = [{**CHAT, "hosts": ["one"]}, {**CHAT, "name": "second", "hosts": ["two"]}]
    hosts = {name: {"vllm_services": services} for name in ("one", "two")}
    output, status = play(tmp_path, "plan.yml", "--limit", "one,localhost", **hosts)
    assert status == 0 and "Everything fits" in output and "chat" in output and "second" not in output, output[-3000:]
    output, status = play(tmp_path, "plan.yml", **hosts)
    assert status == 0 and "second" in output, output[-3000:]
    hosts |= {"three": {"vllm_services": services}}
    output, status = play(tmp_path, "plan.yml", "--limit", "three,localhost", **hosts)
    assert status != 0 and "no service of vllm_services has its hosts within --limit three,localhost" in output, output[
        -3000:
    ]


def test_a_plan_of_two_lists(tmp_path: Path) -> None:
    embed = {"name": "embed", "model": "BAAI/bge-m3"}
    output, status = play(tmp_path, "plan.yml", one={"vllm_services": [CHAT]}, two={"vllm_services": [embed]})
    assert status != 0 and "hosts have different lists of vllm_services (chat; embed): one list holds for all" in output


def test_the_plan_of_the_quickstart(tmp_path: Path) -> None:
    command = ["ansible-playbook", "-i", ROOT / "inventories/quickstart", ROOT / "playbooks/plan.yml"]
    done = run(command, ROOT, ANSIBLE_NOCOLOR="1", QUICKSTART_DIR=str(tmp_path / "quickstart"))
    assert done.returncode == 0 and "Everything fits" in done.stdout, done.stdout[-3000:]
    assert not (tmp_path / "quickstart").exists()
