# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: missing_services
short_description: Which services should answer on a host and do not lie there
version_added: 0.1.0
description:
  - Judges by what lies on the hosts, so that it needs neither a plan nor facts.
  - A service that names its hosts answers on each of them, or on the first one where they work for one server together. One
    that names none answers somewhere; that is judged only where all hosts of the inventory are looked at.
positional: host, found, inventory
options:
  _input:
    description: C(vllm_services) of the host.
    type: list
    elements: dict
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
  found:
    description:
      - For each host that was looked at, names of services in C(answering) (it has their C(endpoint.json)), C(configured) (it
        has their C(plan.json)) and C(spanning) (several hosts work for it).
    type: dict
    required: true
  inventory:
    description: Names of all hosts, in the order of the inventory.
    type: list
    elements: str
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Name what is missing here
  ansible.builtin.debug:
    msg: "{{ vllm_services | baremetal.vllm.missing_services(inventory_hostname, found, groups['all']) }}"
  vars:
    found: {gpu1: {answering: [chat], configured: [chat], spanning: []}}
"""

RETURN = r"""
_value:
  description: Names of the services that are missing on the host.
  type: list
  elements: str
"""

from typing import Any


def missing_services(
    services: list[dict[str, Any]], host: str, found: dict[str, dict[str, list[str]]], inventory: list[str]
) -> list[str]:
    missing = []
    for service in services:
        name, named = service["name"], service.get("hosts")
        named = [named] if isinstance(named, str) else named

        def has(other: str, what: str, name: str = name) -> bool:
            return name in found.get(other, {}).get(what, [])

        possible = [other for other in inventory if not named or other in named]
        answering = [other for other in possible if has(other, "answering")]
        expected = {other for other in possible if has(other, "configured") and not has(other, "spanning")}
        # Several hosts that work for one server have the first one answer; so has one that was never configured.
        if named:
            alone = not answering or any(has(other, "spanning") for other in possible)
            expected.update(possible[:1] if alone else possible)
        elif not answering and not expected and set(inventory) <= set(found):
            expected.update(possible[:1])
        if host in expected and not has(host, "answering"):
            missing.append(name)
    return missing


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"missing_services": missing_services}
