# SPDX-License-Identifier: GPL-3.0-or-later
"""Which pairs of hosts are tried when all together cannot compute a sum."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

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
