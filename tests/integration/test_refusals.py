# SPDX-License-Identifier: GPL-3.0-or-later
"""Bad input of the quickstart: one line that says what is wrong and how to go on, and nothing half-made is left."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def refuse(tmp_path: Path, *arguments: str, inventory: str = "inventories/quickstart", **environment: str) -> str:
    """Output of a run that must fail, with line breaks of the callback undone. Checks that nothing is left."""
    data = tmp_path / "quickstart"
    result = subprocess.run(
        [str(ROOT / ".venv/bin/ansible-playbook"), "site.yml", "-i", inventory, *arguments],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", "QUICKSTART_DIR": str(data), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stdout
    assert not data.exists(), sorted(data.rglob("*"))
    return " ".join(result.stdout.split())


def extra(**variables: object) -> tuple[str, str]:
    return "-e", json.dumps(variables)


def test_port_taken(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        output = refuse(tmp_path, *extra(quickstart_port=port))
    assert f"port {port} of service quickstart is taken by" in output
    assert f"(pid {os.getpid()}): stop it, or give the service another port" in output


def builds(**changes: Any) -> dict[str, Any]:
    """The role's own table of builds, with some fields changed in each."""
    table: dict[str, Any] = yaml.safe_load((ROOT / "roles/vllm/vars/main.yml").read_text())["__vllm_builds"]
    return {device: {**row, **changes} for device, row in table.items()}


def test_too_little_disk(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(quickstart_port=1, __vllm_builds=builds(disk_mib=10**9)))
    assert "MiB free and vLLM needs 1000000000: make room or set vllm_root to a larger disk" in output


def test_no_python_that_vllm_supports(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(quickstart_port=1, __vllm_builds=builds(python=["3.98", "3.99"])))
    assert "vLLM needs Python 3.98 to 3.99 and the host has" in output
    assert "install one and give its path as vllm_python" in output


def test_model_folder_that_does_not_exist(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(quickstart_model="/srv/there/is/none"))
    assert "no model in /srv/there/is/none: No such file or directory" in output
    assert "give the folder that holds config.json and the weights" in output


def test_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(quickstart_model="acme/none"), HF_ENDPOINT="http://127.0.0.1:9")
    assert "cannot reach the hub http://127.0.0.1:9 for model acme/none" in output
    assert "give model_hub_endpoint of a mirror, or the path of a local folder" in output


def test_inventory_without_hosts(tmp_path: Path) -> None:
    empty = tmp_path / "gpu_hosts"
    empty.write_text("[gpu_hosts]\n")
    assert "the inventory has no hosts: give one with -i" in refuse(tmp_path, inventory=str(empty))


@pytest.mark.parametrize(
    ("services", "message"),
    [
        ("chat", "vllm_services is chat: give a list of services"),
        ([], "vllm_services is empty: give a list of services"),
        ([{"name": "a b", "model": "random-llama", "source": "generated"}], "vllm_services[0].name is 'a b'"),
        ([{"name": "chat"}], "service chat has no model: give owner/name or the path of a folder"),
        ([{"name": "chat", "model": "no-slash"}], "model no-slash is no name for source huggingface"),
        (
            [{"name": "chat", "model": "random-llama", "source": "generated", "max_model_len": 4096}],
            "max_model_len 4096 is more than the model's own 2048",
        ),
        (
            [{"name": "chat", "model": "random-llama", "source": "generated", "engine_version": "9.9"}],
            "no such vLLM release is known",
        ),
        ([{"name": "chat", "model": "random-llama", "source": "generated", "extra_args": ["--no-such"]}], "--no-such"),
    ],
)
def test_services_that_are_none(tmp_path: Path, services: object, message: str) -> None:
    assert message in refuse(tmp_path, *extra(vllm_services=services))


def test_unsupported_distribution(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(__preflight_supported={"Plan9": ["4"]}))
    assert "is not supported (Plan9 4 are): set preflight_allow_untested_distribution to go on all the same" in output


def test_addresses_that_do_not_answer(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(preflight_urls=["http://127.0.0.1:9/"], preflight_free_mib={"/boot": 10**9}))
    assert "http://127.0.0.1:9/ cannot be reached: Connection refused" in output
    assert "/boot has" not in output  # nothing has to be installed here
    output = refuse(tmp_path, *extra(preflight_installation=True, preflight_free_mib={"/boot": 10**9}))
    assert "/boot has" in output
    assert "and 1000000000 are needed: remove kernels" in output


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    output = refuse(tmp_path, *extra(quickstart_model="/srv/there/is/none", __preflight_supported={"Plan9": ["4"]}))
    assert "is not supported" in output
    assert "no model in /srv/there/is/none" in output
