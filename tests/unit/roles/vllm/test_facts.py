# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose memory of GPUs is to be planned again: the role's own look at a host, with a stand-in for nvidia-smi."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, checked

CAPTURE = ROOT / "tests/unit/plugins/modules/captures/h200_x2_query.csv"


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """busy(*folders) -> environment in which each of two GPUs is full of a process that works in the folder of its turn."""
    workers: list[subprocess.Popen[bytes]] = []

    def busy(*folders: Path) -> dict[str, str]:
        header, *rows = csv.reader(CAPTURE.read_text().splitlines(), skipinitialspace=True)
        gpus = [dict(zip([field.split()[0] for field in header], row, strict=True)) for row in rows]
        apps = []
        for gpu, folder in zip(gpus, folders, strict=True):
            folder.mkdir(parents=True)
            workers.append(subprocess.Popen(["sleep", "600"], cwd=folder))
            gpu["memory.used"] = "140000 MiB"
            apps.append({"gpu_uuid": gpu["uuid"], "pid": str(workers[-1].pid), "used_memory": "139000 MiB"})
        (tmp_path / "scene.json").write_text(json.dumps({"gpus": gpus, "apps": apps, "topo": {}}))
        smi = tmp_path / "bin/nvidia-smi"
        smi.parent.mkdir()
        smi.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fakes/nvidia_smi.py "$@"\n')
        smi.chmod(0o755)
        return {"PATH": f"{smi.parent}:{os.environ['PATH']}", "NVIDIA_SMI_SCENE": str(tmp_path / "scene.json")}

    yield busy
    for worker in workers:
        worker.kill()
        worker.wait()


def play(*arguments: str | Path) -> str:
    command = ["ansible-playbook", "-i", "localhost,", *arguments]
    return checked(command, ROOT, ANSIBLE_NOCOLOR="1", ANSIBLE_PYTHON_INTERPRETER=sys.executable)


def test_engines_of_own_ray_nodes_count_as_free(tmp_path: Path, busy: Callable[..., dict[str, str]]) -> None:
    """Ray's workers inherit the folder of their node. A cluster that the role has not made is somebody else's."""
    record = tmp_path / "config/chat/vllm/ray_non_carry_over_env_vars.json"
    record.parent.mkdir(parents=True)
    record.write_text("[]")
    plays = {
        "hosts": "localhost", "connection": "local", "gather_facts": False,
        "environment": busy(tmp_path / "ray/chat", tmp_path / "ray/theirs"),
        "vars": {
            "vllm_config_dir": str(tmp_path / "config"), "vllm_state_dir": str(tmp_path / "state"),
            "ray_cluster_state_dir": str(tmp_path / "ray"),
        },
        "tasks": [
            {"ansible.builtin.include_role": {"name": "baremetal.vllm.vllm", "tasks_from": "facts"}},
            {"ansible.builtin.debug": {"msg": "used: {{ ansible_facts['gpu'].gpus | map(attribute='memory_used_mib') | join(' ') }}"}},
        ],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps([plays]))
    output = play(tmp_path / "play.yml")
    assert "used: 1000 140000" in output, output


def test_a_plan_beside_what_it_has_started(
    tmp_path: Path, busy: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """playbooks/plan.yml, where all memory is held by servers of this collection."""
    for name, value in busy(tmp_path / "state/chat", tmp_path / "state/other").items():
        monkeypatch.setenv(name, value)
    given = {
        "vllm_services": [{"name": "chat", "model": "Qwen/Qwen2.5-7B-Instruct", "max_model_len": 8192}],
        "vllm_config_dir": str(tmp_path / "config"), "vllm_state_dir": str(tmp_path / "state"),
    }  # fmt: skip
    (tmp_path / "given.json").write_text(json.dumps(given))
    output = play("playbooks/plan.yml", "--connection", "local", "-e", f"@{tmp_path}/given.json")
    assert "Qwen2.5-7B-Instruct" in output and "failed=0" in output, output


def test_the_folder_of_ray_nodes(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> None:
    """The role vllm does not see the defaults of the role ray_cluster, and says the same."""
    own = render("{{ __vllm_ray_state_dir }}", **role_vars("vllm", "main"))
    assert own == role_vars("ray_cluster")["ray_cluster_state_dir"]
