# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.plan_rounds import plan_rounds

CACHE = "VLLM_CPU_KVCACHE_SPACE"


def row(name: str, share: float, gpus: dict[str, list[int]], cache: str = "") -> dict[str, Any]:
    env = {CACHE: cache} if cache else {}
    return {
        "name": name,
        "hosts": sorted(gpus),
        "gpus": gpus,
        "gpu_memory_utilization": share,
        "env": env,
        "instances": [{}],
    }


def record(name: str, share: float, gpus: list[int] | None, *hosts: str, cache: str = "") -> dict[str, Any]:
    pins: dict[str, Any] = {"hosts": list(hosts), "gpu_memory_utilization": share}
    pins |= ({} if gpus is None else {"gpus": gpus}) | ({"env": {CACHE: cache}} if cache else {})
    return {"name": name, "asked": "", "planned": {}, "pins": pins}


def rounds(rows: list[dict[str, Any]], *records: dict[str, Any]) -> dict[str, int]:
    files = [{f"/etc/vllm/{one['name']}/plan.json": json.dumps(one) for one in records}]
    return {one["name"]: one["round"] for one in plan_rounds({"services": rows}, files)["services"]}


ONE, TWO = {"h": [0]}, {"h": [1]}


@pytest.mark.parametrize(
    ("rows", "records", "expected"),
    [
        ([row("a", 0.6, ONE), row("b", 0.3, ONE)], [], {"a": 0, "b": 0}),
        (
            [row("grows", 0.6, ONE), row("shrinks", 0.3, ONE), row("stays", 0.9, TWO)],
            [record("grows", 0.3, [0], "h"), record("shrinks", 0.6, [0], "h"), record("stays", 0.9, [1], "h")],
            {"grows": 1, "shrinks": 0, "stays": 0},
        ),
        (  # on GPUs of their own
            [row("grows", 0.6, ONE), row("shrinks", 0.3, TWO)],
            [record("grows", 0.3, [0], "h"), record("shrinks", 0.6, [1], "h")],
            {"grows": 0, "shrinks": 0},
        ),
        (
            [row("new", 0.3, ONE), row("shrinks", 0.3, ONE)],
            [record("shrinks", 0.6, [0], "h")],
            {"new": 1, "shrinks": 0},
        ),
        (  # moves to the GPU of the one that shrinks, and leaves room for the one that grows
            [row("grows", 0.9, ONE), row("moves", 0.5, TWO), row("shrinks", 0.4, TWO)],
            [record("grows", 0.4, [0], "h"), record("moves", 0.5, [0], "h"), record("shrinks", 0.9, [1], "h")],
            {"grows": 2, "moves": 1, "shrinks": 0},
        ),
        (  # each waits for the other
            [row("a", 0.9, TWO), row("b", 0.9, ONE)],
            [record("a", 0.9, [0], "h"), record("b", 0.9, [1], "h")],
            {"a": 0, "b": 1},
        ),
        (  # over several hosts, whose GPUs are not recorded
            [row("grows", 0.6, ONE), row("wide", 0.3, {"h": [0], "i": [0]})],
            [record("grows", 0.3, [0], "h"), record("wide", 0.6, None, "h", "i")],
            {"grows": 1, "wide": 0},
        ),
        (  # on the CPU
            [row("grows", 0.0, {"h": []}, "8"), row("shrinks", 0.0, {"h": []}, "2")],
            [record("grows", 0.0, None, "h", cache="2"), record("shrinks", 0.0, None, "h", cache="8")],
            {"grows": 1, "shrinks": 0},
        ),
    ],
    ids=["new", "one gpu", "two gpus", "beside a new one", "chain", "circle", "hosts", "cpu"],
)
def test_what_gives_memory_up_comes_first(
    rows: list[dict[str, Any]], records: list[dict[str, Any]], expected: dict[str, int]
) -> None:
    assert rounds(rows, *records) == expected


def test_a_service_without_a_place_waits_for_nobody() -> None:
    rows = [{"name": "a", "hosts": [], "gpus": {}, "instances": []}, row("b", 0.3, ONE)]
    assert rounds(rows, record("b", 0.6, [0], "h")) == {"a": 0, "b": 0}


def test_a_size_that_is_none_is_for_the_server_to_refuse() -> None:
    rows = [row("a", 0.0, {"h": []}, "much"), row("b", 0.0, {"h": []}, "2")]
    assert rounds(rows, record("b", 0.0, None, "h", cache="8")) == {"a": 0, "b": 0}
