# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: interconnect_problems
short_description: What is wrong with measured ways between hosts
version_added: 0.1.0
description:
  - Judges what M(baremetal.vllm.interconnect_probe) measured on each host. One line for each pair of hosts and cause.
positional: limits
options:
  _input:
    description: For each host, the RV(baremetal.vllm.interconnect_probe#module:ways) that it measured.
    type: dict
    required: true
  limits:
    description:
      - C(clock_s), seconds by which clocks may differ; C(mbps), the least that one TCP stream must carry; C(rtt_ms), the
        longest way there and back.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Judge
  ansible.builtin.set_fact:
    problems: "{{ ways | baremetal.vllm.interconnect_problems({'clock_s': 5, 'mbps': 500, 'rtt_ms': 5}) }}"
"""

RETURN = r"""
_value:
  description: One line each; empty when all is well.
  type: list
  elements: str
"""

from collections.abc import Mapping
from typing import Any


def interconnect_problems(ways: Mapping[str, list[Mapping[str, Any]]], limits: Mapping[str, float]) -> list[str]:
    """What is wrong with measured ways, one line for each pair and cause. ``limits``: clock_s, mbps, rtt_ms."""
    # ansible-core before 2.19 makes text of a template's number.
    limits = {name: float(limit) for name, limit in limits.items()}
    found: dict[tuple[str, str, str], str] = {}
    for host, measured in ways.items():
        for way in measured:
            pair = tuple(sorted((host, way["name"])))

            def add(kind: str, text: str, pair: tuple[str, ...] = pair) -> None:
                found.setdefault((pair[0], pair[1], kind), text)

            if way["problem"]:
                found[host, way["name"], "reach"] = (
                    f"{host} cannot reach {way['name']} at {way['address']}: {way['problem']}"
                )
                continue
            if abs(way["clock_offset_s"]) > limits["clock_s"]:
                add(
                    "clock",
                    f"the clocks of {host} and {way['name']} are {abs(way['clock_offset_s']):.0f} s apart (limit "
                    f"{limits['clock_s']:g}): let both follow one time server",
                )
            if way["whole_mtu"] is False:
                add(
                    "mtu",
                    f"packets of the interface's own MTU do not arrive from {host} at {way['name']}: a switch or tunnel "
                    "between them has a smaller one; lower the MTU of both, or raise that one",
                )
            if way["mbps"] is not None and way["mbps"] < limits["mbps"]:
                add(
                    "speed",
                    f"{host} sends {way['mbps']} Mb/s to {way['name']} (limit {limits['mbps']:g}): check cable, switch "
                    "and interface, or lower vllm_interconnect_min_mbps",
                )
            if way["rtt_us"] > limits["rtt_ms"] * 1000:
                add(
                    "latency",
                    f"{way['rtt_us'] / 1000:.1f} ms from {host} to {way['name']} and back (limit {limits['rtt_ms']:g}): "
                    "engines wait that long several times for each token",
                )
    return list(found.values())


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"interconnect_problems": interconnect_problems}
