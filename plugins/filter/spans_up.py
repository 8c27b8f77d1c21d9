# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: spans_up
short_description: Services over several hosts whose part on this host runs
version_added: 0.1.0
description:
  - With executor C(mp) a keeper and its engine have to run, with C(ray) a Ray node. The host that serves the API has to listen
    for clients, too - a server does so when all of its engines are ready, and one that hangs does not.
positional: probe
options:
  _input:
    description: The services of a host, as P(baremetal.vllm.host_services#filter) returned them.
    type: list
    elements: dict
    required: true
  probe:
    description: What M(baremetal.vllm.host_probe) saw there, with C(pids) and C(listeners).
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Show what runs
  ansible.builtin.debug:
    msg: "{{ services | baremetal.vllm.spans_up(probe) }}"
"""

RETURN = r"""
_value:
  description: Names of services.
  type: list
  elements: str
"""

from collections.abc import Mapping
from typing import Any


def _up(service: Mapping[str, Any], pids: Mapping[str, int], listeners: Mapping[str, Any]) -> bool:
    span, folder = service["span"], service["state_dir"]
    if span["executor"] == "ray":
        part = str(span["ports"]["node_manager"]) in listeners
    else:
        part = all(pids.get(f"{folder}/{name}.pid") for name in ("keeper", "engine"))
    # Also at a port that it is to leave: its engines hold their GPUs.
    return part and (service["headless"] or folder in [listener.get("cwd") for listener in listeners.values()])


def spans_up(services: list[dict[str, Any]], probe: Mapping[str, Any]) -> list[str]:
    spanning = [service for service in services if service["span"]]
    return [service["name"] for service in spanning if _up(service, probe["pids"], probe["listeners"])]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"spans_up": spans_up}
