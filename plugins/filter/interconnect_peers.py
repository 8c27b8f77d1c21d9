# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: interconnect_peers
short_description: The ways that one host has to measure
version_added: 0.1.0
description:
  - Puts together the peers for M(baremetal.vllm.interconnect_probe). Each pair of hosts measures its bandwidth once, so that
    streams do not share a wire for nothing.
positional: host, ports
options:
  _input:
    description: What P(baremetal.vllm.interconnect#filter) chose.
    type: dict
    required: true
  host:
    description: Name of the host that measures.
    type: str
    required: true
  ports:
    description: For each host, the RV(baremetal.vllm.interconnect_probe#module:ports) that it serves on.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Measure
  baremetal.vllm.interconnect_probe:
    action: measure
    token: "{{ run_token }}"
    peers: "{{ network | baremetal.vllm.interconnect_peers(inventory_hostname, ports) }}"
"""

RETURN = r"""
_value:
  description: One entry for each other host.
  type: list
  elements: dict
"""

from collections.abc import Mapping
from typing import Any


def interconnect_peers(
    network: Mapping[str, Any], host: str, ports: Mapping[str, Mapping[str, int]]
) -> list[dict[str, Any]]:
    peers: dict[tuple[str, str], dict[str, Any]] = {}
    for service in network.values():
        names = list(service["hosts"])
        own = service["hosts"].get(host)
        for name, place in service["hosts"].items() if own else ():
            if name != host:
                peers[name, place["address"]] = {
                    "name": name,
                    "address": place["address"],
                    "port": ports[name][place["address"]],
                    "source": own["address"],
                    "mtu": own["mtu"],
                    "bandwidth": names.index(name) > names.index(host),
                }
    return list(peers.values())


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"interconnect_peers": interconnect_peers}
