# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: interconnect_sums
short_description: What is wrong with the sum that hosts computed together
version_added: 0.1.0
description:
  - Judges what C(baremetal_allreduce.py) of the role C(vllm) printed on each host of a service.
options:
  _input:
    description: For each host, the registered result of the command.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Judge
  ansible.builtin.assert:
    that: results | baremetal.vllm.interconnect_sums | length == 0
"""

RETURN = r"""
_value:
  description: One line for each host or pair that something is wrong with; where no pair shows it, one line for all of them.
  type: list
  elements: str
"""

import json
from collections.abc import Mapping
from typing import Any


def interconnect_sums(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    problems, whole = [], []
    for host, result in results.items():
        # Libraries print lines of their own before it.
        lines = (result.get("stdout") or "").strip().splitlines()
        try:
            said = json.loads(lines[-1])
            problems += said["problems"]
            whole += [said["whole"]] if said["whole"] else []
        except (IndexError, ValueError, KeyError, TypeError):
            told = [*lines, *(result.get("stderr") or "").strip().splitlines(), str(result.get("msg") or "")]
            reason = next((line for line in reversed(told) if line.strip()), "it printed nothing")
            problems.append(f"{host}: the sum between hosts ended without an answer: {reason.strip()[:300]}")
    return list(dict.fromkeys(problems)) or whole[:1]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"interconnect_sums": interconnect_sums}
