# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: interconnect
short_description: Address and interface of each host for the traffic between engines
version_added: 0.1.0
description:
  - Chooses, from what M(baremetal.vllm.interconnect_probe) saw on each host, the network that all hosts of a service share.
    The fastest one wins, then one of physical interfaces, then that of the default route. What the user set is taken and
    checked.
  - Bridges and virtual pairs of container engines are never chosen, as every host has the same ones.
positional: looks, wishes
options:
  _input:
    description: Services over several hosts, each with C(service) (its name) and C(hosts) (names of its hosts).
    type: list
    elements: dict
    required: true
  looks:
    description: For each host, the result of M(baremetal.vllm.interconnect_probe) with C(action=look).
    type: dict
    required: true
  wishes:
    description: For each host, C(interface), C(address) and C(network) as the user set them, empty for a choice.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Choose
  ansible.builtin.set_fact:
    network: "{{ spans | baremetal.vllm.interconnect(looks, {'gpu1': {'interface': 'eth1'}, 'gpu2': {'interface': 'eth1'}}) }}"
"""

RETURN = r"""
_value:
  description:
    - For each service C(hosts), with C(address), C(interface), C(prefix), C(mtu) and C(speed_mbps) of each host and its
      C(ephemeral) ports; and C(problems), one line each.
  type: dict
"""

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

# Interfaces that container and VM engines make: they exist on every host with addresses of their own.
LOCAL = re.compile(r"docker|br-|veth|virbr|cni|flannel|cali|lxc|podman|tun|tap")


def _candidates(look: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each address of a host with what is known of its interface."""
    found = []
    for interface in look["interfaces"]:
        for place in interface["addresses"]:
            network = ipaddress.ip_interface(f"{place['address']}/{place['prefix']}").network
            found.append(
                {
                    "address": place["address"],
                    "interface": interface["name"],
                    "prefix": place["prefix"],
                    "network": str(network),
                    "mtu": interface["mtu"],
                    "speed_mbps": interface["speed_mbps"],
                    "physical": interface["physical"],
                    "default": interface["default"],
                    "ephemeral": look["ephemeral"],
                }
            )
    return found


def _wished(host: str, look: Mapping[str, Any], wish: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """(what the host has of what the user asked for, the problem when it has nothing)."""
    every = _candidates(look)
    seen = ", ".join(f"{item['interface']} {item['address']}" for item in every) or "no address at all"
    interface, address, network = (wish.get(key) or "" for key in ("interface", "address", "network"))
    if interface:
        names = [item["name"] for item in look["interfaces"]]
        if interface not in names:
            return [], f"{host} has no interface {interface} that is up: it has {', '.join(names) or 'none'}"
        every = [item for item in every if item["interface"] == interface]
        if not every:
            return [], f"{host}: interface {interface} has no address: give it one, or name another interface"
    if network:
        try:
            wanted = ipaddress.ip_network(network)
        except ValueError:
            return [], f"vllm_interconnect_network is {network!r}: give a network such as 10.0.0.0/24"
        every = [item for item in every if ipaddress.ip_address(item["address"]) in wanted]
        if not every:
            return [], f"{host} has no address in {network}: it has {seen}"
    if address:
        every = [item for item in every if item["address"] == address]
        if not every:
            return [], f"{host} does not have the address {address}: it has {seen}"
    if not (interface or network or address):
        every = [item for item in every if not LOCAL.match(item["interface"])]
        if not every:
            return [], f"{host} has no address that other hosts can reach: it has {seen}"
    return every, ""


def _common(choices: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The best network that every host is part of; without one, each host's address of the default route."""
    shared = set.intersection(*({item["network"] for item in items} for items in choices.values()))

    def rank(network: str) -> tuple[Any, ...]:
        items = [next(item for item in items if item["network"] == network) for items in choices.values()]
        return (
            min(item["speed_mbps"] or 0 for item in items),
            all(item["physical"] for item in items),
            all(item["default"] for item in items),
            ":" not in network,
            network,
        )

    if shared:
        best = max(shared, key=rank)
        return {host: next(item for item in items if item["network"] == best) for host, items in choices.items()}
    return {host: next((item for item in items if item["default"]), items[0]) for host, items in choices.items()}


def interconnect(
    spans: list[dict[str, Any]], looks: Mapping[str, Mapping[str, Any]], wishes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    return {span["service"]: _choose({host: looks[host] for host in span["hosts"]}, wishes) for span in spans}


def _choose(looks: Mapping[str, Mapping[str, Any]], wishes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    problems = []
    choices = {}
    for host, look in looks.items():
        items, problem = _wished(host, look, wishes.get(host) or {})
        if problem:
            problems.append(problem)
        else:
            choices[host] = items
    if problems:
        return {"hosts": {}, "problems": problems}
    hosts = _common(choices)
    owners: dict[str, list[str]] = {}
    for host, item in hosts.items():
        owners.setdefault(item["address"], []).append(host)
    for address, names in owners.items():
        if len(names) > 1:
            problems.append(f"{' and '.join(names)} have the same address {address}: give each host one of its own")
        elif ipaddress.ip_address(address).is_loopback:
            problems.append(f"{names[0]} has only {address}, which no other host can reach")
    mtus = {item["mtu"] for item in hosts.values()}
    if len(mtus) > 1:
        said = ", ".join(f"{host} {item['interface']} {item['mtu']}" for host, item in hosts.items())
        problems.append(f"the MTU differs ({said}): large packets would vanish; set the same one on all hosts")
    return {"hosts": hosts, "problems": problems}


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"interconnect": interconnect}
