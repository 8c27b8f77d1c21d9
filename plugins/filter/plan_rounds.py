# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter plan_rounds."""

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_rounds
short_description: Say in which order services go to their new plan, so that one finds the memory that another one gives up
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Compares the share of each GPU that a service is planned with, or of the host's memory for a server on the CPU, with the one that its
    record says.
  - The order is one for all hosts, as a service over several hosts starts on all of them at once.
positional: records
options:
  _input:
    description: The plan, as P(baremetal.vllm.plan_running#filter) gives it.
    type: dict
    required: true
  records:
    description: Contents of the files C(plan.json) that the role keeps beside each service, by their path, for each host.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Plan
  ansible.builtin.set_fact:
    plan: "{{ inputs.services | baremetal.vllm.plan_running(inputs.hosts) | baremetal.vllm.plan_rounds([probe.files]) }}"
"""

RETURN = r"""
_value:
  description: The plan. Each service has C(round); all of one round are changed before any of the next.
  type: dict
"""

from collections.abc import Mapping
from typing import Any

from ansible_collections.baremetal.vllm.plugins.filter.plan_running import CPU_CACHE, read_records

Shares = dict[tuple[str, Any], float]


def _number(value: Any) -> float:
    """Of what a user has written into env, too."""
    try:
        return float(value or 0)
    except ValueError:
        return 0


def _shares(how: Mapping[str, Any], gpus: Mapping[str, list[Any]]) -> Shares:
    """(host, GPU) -> its share; of a server on the CPU (host, nothing) -> GiB of its cache."""
    share, cache = _number(how.get("gpu_memory_utilization")), _number((how.get("env") or {}).get(CPU_CACHE))
    found: Shares = {}
    for host in how["hosts"]:
        if gpus.get(host):
            found.update({(host, gpu): share for gpu in gpus[host]})
        else:
            found[host, None] = cache
    return found


def _more(one: Shares, other: Shares) -> set[tuple[str, Any]]:
    return {place for place, share in one.items() if share > other.get(place, 0) + 1e-6}


def plan_rounds(plan: dict[str, Any], records: list[dict[str, str]]) -> dict[str, Any]:
    known = read_records(records)
    frees, takes = {}, {}
    for row in plan["services"]:
        name, before = row["name"], {}
        after = _shares(row, row["gpus"]) if row["instances"] else {}
        if pins := known.get(name, {}).get("pins"):
            # The GPUs of a service over several hosts are not in its record: those that it is to have.
            gpus = {host: pins.get("gpus") or row["gpus"].get(host, []) for host in pins["hosts"]}
            before = _shares(pins, gpus)
        frees[name], takes[name] = _more(before, after), _more(after, before)
    left = [row["name"] for row in plan["services"]]
    rounds: dict[str, int] = {}
    while left:
        # Where services wait for each other in a circle, one has to begin.
        ready = [
            name for name in left if not any(frees[other] & takes[name] for other in left if other != name)
        ] or left[:1]
        number = len(set(rounds.values()))
        rounds.update(dict.fromkeys(ready, number))
        left = [name for name in left if name not in ready]
    return {**plan, "services": [{**row, "round": rounds[row["name"]]} for row in plan["services"]]}


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"plan_rounds": plan_rounds}
