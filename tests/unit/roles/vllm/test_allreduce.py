# SPDX-License-Identifier: GPL-3.0-or-later
"""Which pairs of hosts are tried when all together cannot compute a sum, and how hosts meet before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[4] / "roles/vllm/files"))
import baremetal_allreduce


@pytest.mark.parametrize("world", range(3, 20))
def test_rounds(world: int) -> None:
    rounds = baremetal_allreduce.rounds(world)
    for round_ in rounds:
        ranks = [rank for pair in round_ for rank in pair]
        assert len(ranks) == len(set(ranks)), "a host cannot be in two sums at once"
    pairs = [pair for round_ in rounds for pair in round_]
    assert {rank for pair in pairs for rank in pair} == set(range(world))
    if world <= 4:
        assert sorted(pairs) == list(combinations(range(world), 2))
    assert all(first < second for first, second in pairs)


def test_a_hang_is_named_within_a_minute() -> None:
    """For up to four hosts and more: the sum of all, then every round, with what it takes to end a process that hangs."""
    for world in (3, 4, 20):
        parts = [baremetal_allreduce.ALL_PART] + [baremetal_allreduce.PAIR_PART] * len(
            baremetal_allreduce.rounds(world)
        )
        assert sum(60 * part + baremetal_allreduce.KILL_S for part in parts) <= 60


# Stands in for PyTorch: a store in a folder (rank 0 has to be there first), and a sum that takes SUM_S seconds.
TORCH = """
import os, time
from pathlib import Path
FOLDER = Path(os.environ["STORE"])
time.sleep(float(os.environ.get("LOAD_S", "0")))
float32 = None
def device(*_): return None
class full:
    def __init__(self, shape, value, device): self.value = value
    def __getitem__(self, _): return self
    def item(self): return self.value
"""
DISTRIBUTED = """
import os, time
from datetime import timedelta
from torch import FOLDER
SUM_S = float(os.environ.get("SUM_S", "0"))
class TCPStore:
    def __init__(self, host, port, world, is_master, timeout, wait_for_workers=True):
        if is_master: (FOLDER / "there").touch()
        self._until(lambda: (FOLDER / "there").exists(), timeout)
    def _until(self, holds, timeout):
        end = time.monotonic() + timeout.total_seconds()
        while not holds():
            if time.monotonic() > end: raise RuntimeError("wait timeout")
            time.sleep(0.05)
    def set(self, key, value): (FOLDER / key).touch()
    def check(self, keys): return all((FOLDER / key).exists() for key in keys)
    def wait(self, keys, timeout): self._until(lambda: self.check(keys), timeout)
def init_process_group(backend, init_method=None, timeout=None, world_size=-1, rank=-1, store=None):
    global world
    world = world_size
    store = store or TCPStore("", 0, world, rank == 0, timeout)
    store.set("in%d" % rank, "")
    store.wait(["in%d" % other for other in range(world)], timeout)
def all_reduce(data):
    time.sleep(SUM_S)
    data.value = world * (world + 1) / 2
barrier = destroy_process_group = lambda: None
"""


def sums(folder: Path, *delays: float | None, timeout: int = 8, **environment: str) -> list[dict[str, Any]]:
    """What each host said; it is started so many seconds later than the first, or never."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(TORCH)
    (folder / "torch" / "distributed.py").write_text(DISTRIBUTED)
    (folder / "store").mkdir()
    env = {**os.environ, "PYTHONPATH": str(folder), "STORE": str(folder / "store"), **environment}
    command = [sys.executable, str(baremetal_allreduce.__file__), "--port", "29733", "--backend", "gloo"]
    for rank in range(len(delays)):
        command += ["--peer", f"gpu{rank + 1}=10.0.0.{rank + 1}"]
    began, started = time.monotonic(), []
    for rank, delay in sorted(enumerate(delays), key=lambda pair: pair[1] or 0):
        if delay is not None:
            time.sleep(max(0.0, began + delay - time.monotonic()))
            words = [*command, "--timeout", str(timeout), "--rank", str(rank)]
            started.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    return [json.loads(process.communicate(timeout=60)[0]) for process in started]


def test_who_comes_late_takes_no_time_from_the_sum_standin(tmp_path: Path) -> None:
    first, second = sums(tmp_path, 0, 5)
    assert (first["problems"], first["whole"]) == (second["problems"], second["whole"]) == ([], "")
    assert {"ms", "mbps"} <= set(first)


def test_who_does_not_come_is_named_standin(tmp_path: Path) -> None:
    first, second = sums(tmp_path, 0, 0, None)
    line = "gpu3 did not come to gpu1 (10.0.0.1 port 29733) within 8 s: a firewall closes that port, or its library loads too slowly"
    assert first["problems"] == [line]
    assert second["problems"] == []


def test_a_sum_that_hangs_is_named_by_its_pair_standin(tmp_path: Path) -> None:
    first, second = sums(tmp_path, 0, 0, SUM_S="99")
    assert first["problems"] == [
        "gpu1 and gpu2 cannot compute together (gloo over their interconnect): no sum within 2 s"
    ]
    assert second["problems"] == []


def test_what_cannot_load_the_library_says_why_standin(tmp_path: Path) -> None:
    (said,) = sums(tmp_path, 0, None, LOAD_S="no number")
    (line,) = said["problems"]
    assert line.startswith(
        "gpu1 cannot begin a sum at gpu1 (10.0.0.1 port 29733): ValueError: could not convert string"
    )
