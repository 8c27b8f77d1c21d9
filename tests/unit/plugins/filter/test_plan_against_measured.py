# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.plan_against_measured import plan_against_measured


@pytest.mark.parametrize(
    ("seen", "line"),
    [
        ({}, "the engine's log holds no figures"),
        (
            {
                "planned": {"kv_cache_tokens": 1000},
                "measured": {"kv_cache_tokens": 1010, "engines": 2},
                "seconds": 74.4,
            },
            "KV cache 1010 tokens, planned 1000 (+1.0 %); each of 2 replicas; started in 74 s",
        ),
        (
            {
                "planned": {"kv_cache_tokens": 1000, "weights_gib": 10.0},
                "measured": {"kv_cache_tokens": 890, "weights_gib": 8.0},
            },
            "KV cache 890 tokens, planned 1000 (-11.0 %: BELOW PLAN, see which other processes hold memory of the GPUs, and which "
            "extra_args take some); weights 8.0 GiB, planned 10.0 (-20.0 %)",
        ),
        (
            {"planned": {"kv_cache_tokens": 1000}, "measured": {"kv_cache_tokens": 900}},
            "KV cache 900 tokens, planned 1000 (-10.0 %)",
        ),
        ({"planned": {"kv_cache_tokens": 0}, "measured": {"weights_gib": 1.06}}, "weights 1.06 GiB"),
    ],
)
def test_the_line(seen: dict[str, Any], line: str) -> None:
    assert plan_against_measured(seen) == line
