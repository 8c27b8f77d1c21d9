# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter plan_against_measured."""

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_against_measured
short_description: One line with what was planned for an engine and what it measured
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Compares weights and KV cache of a plan with what M(baremetal.vllm.vllm_wait) read from the engine's log. A KV cache that
    holds clearly fewer tokens than planned (by more than 10%) is marked, with where to look.
options:
  _input:
    description: The file C(measured.json) that the role keeps beside each service, with C(planned), C(measured) and C(seconds).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show both
  ansible.builtin.debug:
    msg: "{{ lookup('ansible.builtin.file', 'measured.json') | from_json | baremetal.vllm.plan_against_measured }}"
"""

RETURN = r"""
_value:
  description: The line.
  type: str
  sample: KV cache 845104 tokens, planned 838000 (+0.8 %); weights 14.25 GiB, planned 14.19 (+0.4 %); started in 74 s
"""

from collections.abc import Mapping
from typing import Any

# Key, words, unit.
ROWS = (
    ("kv_cache_tokens", "KV cache", "tokens"),
    ("weights_gib", "weights", "GiB"),
    ("kv_cache_gib", "KV cache", "GiB"),
)
# A KV cache that is smaller than planned by more than this (percent) holds fewer requests than the plan promised.
CLEARLY = 10
BELOW = ": BELOW PLAN, see which other processes hold memory of the GPUs, and which extra_args take some"


def plan_against_measured(seen: Mapping[str, Any]) -> str:
    planned, measured = seen.get("planned") or {}, seen.get("measured") or {}
    parts = []
    for key, words, unit in ROWS:
        if key not in measured:
            continue
        part = f"{words} {measured[key]} {unit}"
        if planned.get(key):
            percent = round((measured[key] / planned[key] - 1) * 100, 1)
            below = BELOW if key == "kv_cache_tokens" and percent < -CLEARLY else ""
            part += f", planned {planned[key]} ({percent:+.1f} %{below})"
        parts.append(part)
    if measured.get("engines", 1) > 1:
        parts.append(f"each of {measured['engines']} replicas")
    if seen.get("seconds"):
        parts.append(f"started in {seen['seconds']:.0f} s")
    return "; ".join(parts) or "the engine's log holds no figures"


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"plan_against_measured": plan_against_measured}
