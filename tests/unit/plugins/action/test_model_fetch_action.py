# SPDX-License-Identifier: GPL-3.0-or-later
"""What people see while a model comes."""

from __future__ import annotations

from ansible_collections.baremetal.vllm.plugins.action.model_fetch import ActionModule, line, seconds

GIB = 1024**3


def test_lines() -> None:
    progress = {"state": "fetching", "done_bytes": 3 * GIB // 2, "total_bytes": 6 * GIB}
    assert line("gpu1 a/b", progress, None) == "gpu1 a/b: fetching 25 %, 1.50 of 6.00 GiB"
    assert line("gpu1 a/b", progress, 100 * 1024**2) == (
        "gpu1 a/b: fetching 25 %, 1.50 of 6.00 GiB, 100.0 MiB/s, 46 s left"
    )
    assert line("x", progress, 0).endswith("nothing comes at the moment")
    assert (
        line("x", {"state": "starting", "done_bytes": 0, "total_bytes": 0}, None)
        == "x: starting 100 %, 0.00 of 0.00 GiB"
    )


def test_seconds() -> None:
    assert [seconds(number) for number in (0.4, 59, 60, 3599, 3600, 90000)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 00 min",
        "25 h 00 min",
    ]


def test_summary() -> None:
    progress = {"hub_bytes": GIB, "peer_bytes": 2 * GIB, "notes": ["x was fetched again"]}
    assert ActionModule._summary(progress, 61) == (
        "1.00 GiB from the hub, 2.00 GiB from neighbours in 1 min 01 s; x was fetched again"
    )
