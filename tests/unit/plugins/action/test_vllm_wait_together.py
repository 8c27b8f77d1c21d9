# SPDX-License-Identifier: GPL-3.0-or-later
"""Several waits of one host, with answers as the module gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.action import vllm_wait

READY = {"starting": False, "seconds": 9.0, "measured": {"kv_cache_tokens": 1}}


def starts(stage: str, limit: int) -> dict[str, Any]:
    return {"starting": True, "stage": stage, "seconds": 3.0, "limit": limit, "begun": {"stage": stage, "limit": limit}}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(vllm_wait.display, "display", lines.append)
    return lines


def wait(*answers: tuple[str, dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what came of each server, with what the module was called); answers: in the order of the calls."""
    action = object.__new__(vllm_wait.ActionModule)
    left: Iterator[tuple[str, dict[str, Any]]] = iter(answers)
    calls: list[dict[str, Any]] = []

    def module(arguments: dict[str, Any], task_vars: object) -> dict[str, Any]:
        name, answer = next(left)
        assert arguments["url"] == name
        calls.append({**arguments, "begun": dict(arguments.get("begun", {}))})
        return answer

    action.wait = module
    names = dict.fromkeys(name for name, _ in answers)
    found = action.wait_for_all({name: {"url": name} for name in names}, {"inventory_hostname": "gpu1"})
    assert next(left, None) is None
    return found, calls


def test_each_is_looked_at_in_turn_and_none_waits_for_another(shown: list[str]) -> None:
    failed = {"failed": True, "msg": "vLLM has ended"}
    found, calls = wait(
        ("chat", starts("loading weights", 900)),
        ("embed", starts("loading weights", 600)),
        ("rank", failed),
        ("chat", starts("compiling", 1500)),
        ("embed", READY),
        ("chat", starts("compiling", 1500)),
        ("chat", READY),
    )
    assert found == {"chat": READY, "embed": READY, "rank": failed}
    # The last one that is left is not asked again and again.
    assert [call["slice"] for call in calls] == [3, 3, 3, 3, 3, 60, 60]
    # Weights come from one disk: all may take as long as one after another, and one that is left no longer than by itself.
    assert [call["begun"].get("limit") for call in calls[3:]] == [1500, 1500, 909, 909]
    assert shown == [
        "  [gpu1] chat: loading weights (3 of at most 900 s)",
        "  [gpu1] embed: loading weights (3 of at most 600 s)",
        "  [gpu1] chat: compiling (3 of at most 1500 s)",
    ]


def test_a_stage_that_goes_on_is_shown_again(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 60))
    monkeypatch.setattr(vllm_wait.time, "monotonic", lambda: next(clock))
    wait(("chat", starts("compiling", 600)), ("chat", starts("compiling", 600)), ("chat", READY))
    assert shown == [
        "  [gpu1] chat: compiling (3 of at most 600 s)",
        "  [gpu1] chat: still compiling (3 of at most 600 s)",
    ]
