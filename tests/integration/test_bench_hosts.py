# SPDX-License-Identifier: GPL-3.0-or-later
"""playbooks/bench.yml on hosts of which not all serve: in check mode, in which nothing is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(folder: Path, served: dict[str, list[str]], *arguments: str) -> tuple[int, str]:
    """(exit status, output) with all hosts on this machine, each with a folder of its own for what it serves."""
    for host, names in served.items():
        for name in names:
            told = {"service": name, "base_url": "http://127.0.0.1:9/v1", "api_key_file": "/k", "model": "m"}
            path = folder / host / name / "endpoint.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({**told, "task": "generate", "gpus": [], "python": ["python3"]}))
    variables = {
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
        "vllm_services": [{"name": "chat", "model": "m"}, {"name": "embed", "model": "m"}],
        "vllm_config_dir": f"{folder}/{{{{ inventory_hostname }}}}",
    }
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": {host: {} for host in served}, "vars": variables}}))
    done = subprocess.run(
        [
            ROOT / ".venv/bin/ansible-playbook",
            "playbooks/bench.yml",
            "-i",
            folder / "hosts.json",
            "--check",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, " ".join(done.stdout.split())


def test_a_host_that_serves_none_is_passed_over(tmp_path: Path) -> None:
    """Such as the second one of a service over two hosts."""
    code, said = bench(tmp_path, {"one": ["chat"], "two": [], "three": ["embed"]})
    assert code == 0, said
    assert "Measure chat" in said and "Measure embed" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-e", '{"bench_services": ["chat", "other"]}'], "one, two serve no other: run site.yml first"),
        (["-l", "two"], "two serve no chat, embed: run site.yml first"),
    ],
)
def test_what_nobody_serves_is_said(tmp_path: Path, arguments: list[str], words: str) -> None:
    code, said = bench(tmp_path, {"one": ["chat"], "two": []}, *arguments)
    assert code != 0 and words in said, said
