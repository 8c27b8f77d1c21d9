# SPDX-License-Identifier: GPL-3.0-or-later
"""What the gate before vLLM says of a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[3] / "roles/ray_cluster/files/baremetal_ray_gate.py"
EXPECTED = [("gpu1", "10.0.0.1", 2), ("gpu2", "10.0.0.2", 2)]


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("baremetal_ray_gate", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def node(address: str, gpus: int, alive: bool = True) -> dict[str, Any]:
    """As `ray.nodes()` has it: a node without GPUs does not name them."""
    return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"GPU": float(gpus)} if gpus else {"CPU": 8.0}}


def test_a_cluster_as_planned(gate: ModuleType) -> None:
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2)], EXPECTED) == ([], [])


def test_a_node_that_rebooted_is_here_and_its_former_self_is_not(gate: ModuleType) -> None:
    nodes = [node("10.0.0.2", 2, alive=False), node("10.0.0.1", 2), node("10.0.0.2", 2)]
    assert gate.judge(nodes, EXPECTED) == ([], [])


def test_a_node_that_is_missing_is_waited_for(gate: ModuleType) -> None:
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2, alive=False)], EXPECTED) == (["gpu2 (10.0.0.2)"], [])


def test_what_can_never_be(gate: ModuleType) -> None:
    _, never = gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 0), node("10.0.0.9", 1)], EXPECTED)
    assert never[0] == "gpu2 (10.0.0.2) gives Ray 0 GPUs and the plan places 2 there"
    assert never[1].startswith("10.0.0.9 is in the cluster with 1 GPUs and not in the plan")
    # A node without GPUs may be there: nothing is placed on it.
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2), node("10.0.0.9", 0)], EXPECTED) == ([], [])


def test_who_holds_the_gpus(gate: ModuleType) -> None:
    table = {
        "aa" * 16: {"state": "REMOVED", "bundles": {0: {"GPU": 2.0}}},
        "bb" * 16: {"state": "CREATED", "bundles": {0: {"GPU": 1.0}, 1: {"GPU": 1.0, "CPU": 1.0}}},
        "cc" * 16: {"state": "CREATED", "bundles": {0: {"CPU": 1.0}}},
    }
    assert gate.holders(table) == "placement group bbbbbbbbbbbb (CREATED) with 2 GPUs"
    assert gate.holders({}) == "no placement group, so tasks or actors of another program"


RAY = """
init = shutdown = lambda **_: None
nodes = lambda: [{"NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"GPU": 2.0}}]
available_resources = lambda: {"GPU": 2.0}
"""


@pytest.mark.parametrize("python", [sys.executable, "python3"])
def test_a_server_is_started_by_its_path_and_as_in_containers_by_its_name_standin(tmp_path: Path, python: str) -> None:
    (tmp_path / "ray.py").write_text(RAY)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "RAY_ADDRESS": "10.0.0.1:6379"}
    words = [sys.executable, str(FILE), "--node", "gpu1=10.0.0.1=2", "--", python, "-c", "print('a server')"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "placement: 1 nodes with 2 GPUs are here\na server\n", done.stderr
