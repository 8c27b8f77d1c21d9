# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: ray_cluster_problems
short_description: Where the hosts of a Ray cluster do not agree
version_added: 0.1.0
description:
  - Compares what the inventory says of each host of a cluster, before anything is changed.
positional: hosts
options:
  _input:
    description:
      - For each host of the run C(head), C(hosts), C(version), C(ports) and C(folder) (of the cluster's sessions), or nothing
        for one that is not part of a cluster.
    type: dict
    required: true
  hosts:
    description: Hosts of the cluster.
    type: list
    elements: str
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Compare
  ansible.builtin.assert:
    that: says | baremetal.vllm.ray_cluster_problems(ray_cluster_hosts) | length == 0
"""

RETURN = r"""
_value:
  description: One line each; empty when all is well.
  type: list
  elements: str
"""

from collections.abc import Mapping
from typing import Any

# Ray puts sockets below it, whose address has 107 bytes (man 7 unix): session_<date>_<time>_<number>_<pid>/sockets/...
FOLDER_MAX = 36


def _groups(said: Mapping[str, Any]) -> dict[str, list[str]]:
    """Value, as text -> hosts that say it."""
    groups: dict[str, list[str]] = {}
    for host, value in said.items():
        groups.setdefault(str(value), []).append(host)
    return groups


def _port_problems(ports: Mapping[str, Any]) -> list[str]:
    try:
        numbers = {name: int(port) for name, port in ports.items()}
    except (TypeError, ValueError):
        return [f"ray_cluster_ports is {dict(ports)}: give numbers"]
    problems = [
        f"ray_cluster_ports.{name} is {port}: give a port from 1024 to 65535"
        for name, port in numbers.items()
        if not 1024 <= port <= 65535
    ]
    low, high = numbers.pop("min_worker"), numbers.pop("max_worker")
    if high - low < 20:
        problems.append(
            f"ray_cluster_ports has {max(0, high - low + 1)} ports for workers ({low} to {high}): give 20 or more"
        )
    for name, port in numbers.items():
        same = [other for other, taken in numbers.items() if taken == port and other < name]
        if same or low <= port <= high:
            problems.append(f"ray_cluster_ports.{name} is {port}, as {same[0] if same else 'a port of the workers'} is")
    return problems


def ray_cluster_problems(says: Mapping[str, Mapping[str, Any]], hosts: list[str]) -> list[str]:
    missing = [host for host in hosts if not says.get(host)]
    if missing:
        return [
            f"ray_cluster_hosts names {host}, which is not in this run: run without --limit, or leave it out"
            for host in missing
        ]
    problems = []
    if len(set(hosts)) != len(hosts):
        problems.append(f"ray_cluster_hosts names a host twice: {', '.join(hosts)}")
    for key, what in (("head", "two heads"), ("version", "different releases of Ray"), ("ports", "different ports"),
                      ("hosts", "different lists of hosts")):  # fmt: skip
        groups = _groups({host: says[host][key] for host in hosts})
        if len(groups) > 1:
            told = "; ".join(f"{', '.join(names)}: {value}" for value, names in groups.items())
            problems.append(f"{what} in one cluster ({told}): set ray_cluster_{key} once, for all its hosts")
    first = says[hosts[0]]
    if first["head"] not in hosts:
        problems.append(f"ray_cluster_head is {first['head']}, which is none of the hosts: {', '.join(hosts)}")
    for host in hosts:
        if len(str(says[host]["folder"])) > FOLDER_MAX:
            problems.append(
                f"{host}: {says[host]['folder']} has more than {FOLDER_MAX} characters, too many for Ray's sockets: set a "
                "shorter ray_cluster_state_dir or ray_cluster_name"
            )
    return problems + _port_problems(first["ports"])


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"ray_cluster_problems": ray_cluster_problems}
