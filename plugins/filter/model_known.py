# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: model_known
short_description: What other hosts know better about the models of a host
version_added: 0.1.0
description:
  - Finds the models that this host cannot ask the hub about, and those for which another host means another commit. A host
    that has the model already is believed first, then the first of the list, so that all hosts mean the same.
positional: readings
options:
  _input:
    description: The RV(ignore:models) that M(baremetal.vllm.model_info) returned on this host.
    type: dict
    required: true
  readings:
    description: The same of all hosts, in the order of the inventory.
    type: list
    elements: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: See whether to read again
  ansible.builtin.debug:
    msg: "{{ read.models | baremetal.vllm.model_known([other.models]) }}"
"""

RETURN = r"""
_value:
  description: O(ignore:known) for M(baremetal.vllm.model_info), empty if there is nothing to read again.
  type: dict
"""

from typing import Any

SAME = ("model", "source", "revision")


def model_known(own: dict[str, Any], readings: list[dict[str, Any]]) -> dict[str, Any]:
    known = {}
    for name, mine in own.items():
        if not mine.get("commit") and not mine["unreachable"]:
            continue
        told = [other[name] for other in readings if name in other and other[name]["commit"]]
        told = [other for other in told if all(other.get(key) == mine.get(key) for key in SAME)]
        best = next((other for other in told if other["present"]), next(iter(told), None))
        if best and best["commit"] != mine["commit"]:
            known[name] = {key: best[key] for key in ("commit", "files", "config")}
    return known


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"model_known": model_known}
