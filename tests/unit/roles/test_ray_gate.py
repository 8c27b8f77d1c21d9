# SPDX-License-Identifier: GPL-3.0-or-later
"""What the gate before vLLM says of a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import socket
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
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2)], EXPECTED) == ([], [], [])


def test_a_node_that_rebooted_is_here_and_its_former_self_is_not(gate: ModuleType) -> None:
    nodes = [node("10.0.0.2", 2, alive=False), node("10.0.0.1", 2), node("10.0.0.2", 2)]
    assert gate.judge(nodes, EXPECTED) == ([], [], [])


def test_a_node_that_is_missing_is_waited_for(gate: ModuleType) -> None:
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2, alive=False)], EXPECTED) == (
        ["gpu2 (10.0.0.2)"],
        [],
        [],
    )


def test_what_can_never_be(gate: ModuleType) -> None:
    _, _, never = gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 0)], EXPECTED)
    assert never == ["gpu2 (10.0.0.2) gives Ray 0 GPUs and the plan places 2 there"]


def test_a_node_that_left_the_plan(gate: ModuleType) -> None:
    missing, strangers, never = gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2), node("10.0.0.9", 1)], EXPECTED)
    assert (missing, never) == ([], [])
    assert strangers[0].startswith("10.0.0.9 is in the cluster with 1 GPUs and not in the plan")
    # A node without GPUs may be there: nothing is placed on it.
    assert gate.judge([node("10.0.0.1", 2), node("10.0.0.2", 2), node("10.0.0.9", 0)], EXPECTED) == ([], [], [])


def test_who_holds_the_gpus(gate: ModuleType) -> None:
    table = {
        "aa" * 16: {"state": "REMOVED", "bundles": {0: {"GPU": 2.0}}},
        "bb" * 16: {"state": "CREATED", "bundles": {0: {"GPU": 1.0}, 1: {"GPU": 1.0, "CPU": 1.0}}},
        "cc" * 16: {"state": "CREATED", "bundles": {0: {"CPU": 1.0}}},
    }
    assert gate.holders(table) == "placement group bbbbbbbbbbbb (CREATED) with 2 GPUs"
    assert gate.holders({}) == "no placement group, so tasks or actors of another program"


# A cluster that answers at the third call of init, and what it has at each later look.
RAY = """
import itertools
calls, looks = itertools.count(1), itertools.count()
shutdown = lambda: None
def init(**_):
    if next(calls) < FIRST:
        raise ConnectionError("nobody listens there\\nand more")
def nodes():
    seen = SEEN[min(next(looks), len(SEEN) - 1)]
    return [{"NodeManagerAddress": "10.0.0.%d" % number, "Alive": True, "Resources": {"GPU": float(gpus)}} for number, gpus in seen]
def available_resources():
    return {"GPU": float(FREE.pop(0) if len(FREE) > 1 else FREE[0])}
"""


def opened(
    folder: Path, seen: list[list[tuple[int, int]]], *words: str, first: int = 1, free: tuple[int, ...] = (4,)
) -> tuple[int, str]:
    """Status and output of the gate before a stand-in of Ray."""
    (folder / "ray.py").write_text(f"FIRST, SEEN, FREE = {first}, {seen}, {list(free)}\n{RAY}")
    command = [sys.executable, str(FILE), "--node", "gpu1=10.0.0.1=2", *words]
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if first:  # without a first call that is answered, nobody listens at all
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        environment = {**os.environ, "PYTHONPATH": str(folder), "RAY_ADDRESS": address}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, (done.stdout + done.stderr).replace(address, "10.0.0.1:6379")


@pytest.mark.parametrize("python", [sys.executable, "python3"])
def test_a_server_is_started_by_its_path_and_as_in_containers_by_its_name_standin(tmp_path: Path, python: str) -> None:
    done = opened(tmp_path, [[(1, 2)]], "--", python, "-c", "print('a server')")
    assert done == (0, "placement: 1 node with 2 GPUs are here\na server\n")


def test_before_a_server_what_is_missing_is_waited_for_standin(tmp_path: Path) -> None:
    """A cluster that is not there yet, a node that is off, one that was taken out and came back: each is said once."""
    seen = [[], [], [(1, 2), (9, 2)], [(1, 2), (9, 2)], [(1, 2)]]
    status, text = opened(tmp_path, seen, "--", "echo", "a server", first=3)
    assert status == 0
    said = [
        "placement: waiting for the Ray cluster at 10.0.0.1:6379: nobody listens there",
        "placement: waiting for gpu1 (10.0.0.1)",
        "placement: waiting, since 10.0.0.9 is in the cluster with 2 GPUs and not in the plan",
        "placement: 1 node with 2 GPUs are here",
        "a server",
    ]
    assert all(line.startswith(begin) for line, begin in zip(text.splitlines(), said, strict=True)), text


def test_a_look_waits_until_a_host_that_was_switched_off_is_found_dead_standin(tmp_path: Path) -> None:
    """It was taken out of the inventory while it was off, and site.yml runs before Ray has seen it."""
    status, text = opened(tmp_path, [[(1, 2), (9, 2)], [(1, 2), (9, 2)], [(1, 2)]], "--wait", "30", first=1)
    assert status == 0, text
    assert text.splitlines()[0].startswith("placement: waiting, since 10.0.0.9 is in the cluster with 2 GPUs")


def test_a_node_that_is_found_dead_while_gpus_come_free_is_waited_for_standin(tmp_path: Path) -> None:
    """Ray takes half a minute to see that a host is cut off; until then the node looks alive, and its GPUs are held."""
    both, one = [(1, 2), (2, 2)], [(1, 2)]
    words = ("--node", "gpu2=10.0.0.2=2", "--", "echo", "a server")
    status, text = opened(tmp_path, [both, both, one, one, both], *words, free=(2, 2, 4))
    assert (status, text) == (
        0,
        "placement: waiting for gpu2 (10.0.0.2)\nplacement: 2 nodes with 4 GPUs are here\na server\n",
    )


def test_a_placement_that_can_never_be_met_ends_at_once_standin(tmp_path: Path) -> None:
    status, text = opened(tmp_path, [[(1, 1)]], "--", "echo", "a server")
    assert (status, text) == (
        78,
        "PlacementError: this placement can never be met: gpu1 (10.0.0.1) gives Ray 1 GPUs and the plan places 2 there\n",
    )


@pytest.mark.parametrize(
    "seen, first, status, line",
    [
        ([[]], 1, 75, "PlacementError: not in the cluster after 1 s: gpu1 (10.0.0.1)"),
        ([[]], 99, 75, "PlacementError: no Ray cluster at 10.0.0.1:6379 after 1 s: nobody listens there"),
        ([[]], 0, 75, "PlacementError: no Ray cluster at 10.0.0.1:6379 after 1 s: [Errno 111] Connection refused"),
        (
            [[(1, 2), (9, 2)]],
            1,
            78,
            "PlacementError: this placement can never be met: 10.0.0.9 is in the cluster with 2 GPUs and not in the plan",
        ),
    ],
)
def test_a_look_has_a_limit_standin(
    tmp_path: Path, seen: list[list[tuple[int, int]]], first: int, status: int, line: str
) -> None:
    """As site.yml asks: nobody waits there for a node that somebody has to stop."""
    found, text = opened(tmp_path, seen, "--wait", "1", first=first)
    assert found == status
    assert text.splitlines()[-1].startswith(line)
