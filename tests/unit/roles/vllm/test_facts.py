# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose memory of GPUs is to be planned again: the role's own look at a host, with a stand-in for nvidia-smi."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT, checked

CAPTURE = ROOT / "tests/unit/plugins/modules/captures/h200_x2_query.csv"


def test_engines_of_own_ray_nodes_count_as_free(tmp_path: Path) -> None:
    """Ray's workers inherit the folder of their node. A cluster that the role has not made is somebody else's."""
    header, *rows = csv.reader(CAPTURE.read_text().splitlines(), skipinitialspace=True)
    gpus = [dict(zip([field.split()[0] for field in header], row, strict=True)) for row in rows]
    record = tmp_path / "config/chat/vllm/ray_non_carry_over_env_vars.json"
    record.parent.mkdir(parents=True)
    record.write_text("[]")
    apps, workers = [], []
    for gpu, name in zip(gpus, ("chat", "theirs"), strict=True):
        (tmp_path / "ray" / name).mkdir(parents=True)
        workers.append(subprocess.Popen(["sleep", "600"], cwd=tmp_path / "ray" / name))
        gpu["memory.used"] = "100000 MiB"
        apps.append({"gpu_uuid": gpu["uuid"], "pid": str(workers[-1].pid), "used_memory": "90000 MiB"})
    (tmp_path / "scene.json").write_text(json.dumps({"gpus": gpus, "apps": apps, "topo": {}}))
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/fakes/nvidia_smi.py "$@"\n')
    smi.chmod(0o755)
    play = {
        "hosts": "localhost", "connection": "local", "gather_facts": False,
        "environment": {"PATH": f"{smi.parent}:{os.environ['PATH']}", "NVIDIA_SMI_SCENE": str(tmp_path / "scene.json")},
        "vars": {
            "vllm_config_dir": str(tmp_path / "config"), "vllm_state_dir": str(tmp_path / "state"),
            "ray_cluster_state_dir": str(tmp_path / "ray"),
        },
        "tasks": [
            {"ansible.builtin.include_role": {"name": "baremetal.vllm.vllm", "tasks_from": "facts"}},
            {"ansible.builtin.debug": {"msg": "used: {{ ansible_facts['gpu'].gpus | map(attribute='memory_used_mib') | join(' ') }}"}},
        ],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    try:
        command = ["ansible-playbook", "-i", "localhost,", tmp_path / "play.yml"]
        output = checked(command, ROOT, ANSIBLE_NOCOLOR="1", ANSIBLE_PYTHON_INTERPRETER=sys.executable)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert "used: 10000 100000" in output, output


def test_the_folder_of_ray_nodes(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> None:
    """The role vllm does not see the defaults of the role ray_cluster, and says the same."""
    own = render("{{ __vllm_ray_state_dir }}", **role_vars("vllm", "main"))
    assert own == role_vars("ray_cluster")["ray_cluster_state_dir"]
