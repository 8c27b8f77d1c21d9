# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: model_transfers
short_description: Which models go to which hosts, and from whom each host takes them
version_added: 0.1.0
description:
  - Hosts that need a model stand in a line and each takes it from the one before it while that one gets it itself, so that
    all have it after little more than the time for one. The first takes it from the hub, or from hosts that have it
    already; with several of those there are several lines.
  - Each host knows all that stand before it, the nearest first, and goes on to the next when one fails.
positional: share, verify, controller
options:
  _input:
    description:
      - The hosts, each with C(name), C(address), C(port) and C(models), what is to be on it as P(baremetal.vllm.models_here#filter)
        says. On C(port) a host hands the first model on; each further one has the next port.
    type: list
    elements: dict
    required: true
  share:
    description: Whether hosts hand models on.
    type: bool
    default: true
  verify:
    description: Whether hosts that have a model take part to look at it.
    type: bool
    default: false
  controller:
    description: What the options of a host are, for the controller. It fetches what no host has, and stands first in the line.
    type: dict
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Show them
  ansible.builtin.debug:
    msg: "{{ [{'name': 'a', 'address': '10.0.0.1', 'port': 18670, 'models': model_infos.values()}] | baremetal.vllm.model_transfers }}"
"""

RETURN = r"""
_value:
  description:
    - One entry a model and commit, C(model), C(shared) and C(hosts). That is host -> C(model) (what M(baremetal.vllm.model_info)
      said there), C(upstreams), C(downstream) and C(port). Hosts that have nothing to do are left out.
  type: list
  elements: dict
"""

from typing import Any


def _routes(hosts: list[dict[str, Any]], number: int, share: bool) -> dict[str, dict[str, Any]]:
    """hosts: name, address, port, model; number: of the model. Host -> upstreams, downstreams, port."""
    having = [host for host in hosts if host["model"]["present"]]
    needing = [host for host in hosts if not host["model"]["present"]]
    # A host that has the files and lacks a link only needs no neighbour.
    if share and needing:
        lines = [[host] for host in having[: len(needing)]] or [[]]
        for index, host in enumerate(needing):
            lines[index % len(lines)].append(host)
    else:
        lines = [[host] for host in needing]
    routes: dict[str, dict[str, Any]] = {}
    for line in lines:
        for place, host in enumerate(line):
            before = [] if host["model"]["present"] else reversed(line[:place])
            last = place + 1 == len(line)
            routes[host["name"]] = {
                "upstreams": [{"host": other["address"], "port": int(other["port"]) + number} for other in before],
                "downstream": None if last else line[place + 1]["name"],
                "port": None if last else int(host["port"]) + number,
            }
    return routes


def model_transfers(
    hosts: list[dict[str, Any]], share: bool = True, verify: bool = False, controller: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for host in [controller, *hosts] if controller else hosts:
        for model in host["models"]:
            if model["commit"] and not model["problem"]:
                key = (model["model"], model["source"], model["revision"], model["commit"])
                found.setdefault(key, {})[host["name"]] = {**host, "model": model}
    if controller:
        for which, there in list(found.items()):
            others = [host["model"] for name, host in there.items() if name != controller["name"]]
            if not others:
                del found[which]
            elif any(model["present"] for model in others):
                there.pop(controller["name"], None)
    transfers: list[dict[str, Any]] = []
    for wanted in sorted(found):
        there = found[wanted]
        routes = _routes(list(there.values()), len(transfers), share)
        if verify:
            for name in there:
                routes.setdefault(name, {"upstreams": [], "downstream": None, "port": None})
        if routes:
            transfers.append(
                {
                    "model": wanted[0],
                    "shared": any(route["port"] for route in routes.values()),
                    "hosts": {name: {"model": there[name]["model"], **route} for name, route in routes.items()},
                }
            )
    return transfers


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"model_transfers": model_transfers}
