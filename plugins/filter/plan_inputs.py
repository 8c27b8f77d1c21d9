# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_inputs
short_description: What a plan needs, put together from the services of an inventory and the facts of its hosts
version_added: 0.1.0
description:
  - Joins RV(vllm_services) with what M(baremetal.vllm.model_info) read of their models and
    M(baremetal.vllm.gpu_facts) of the hosts, in the form that P(baremetal.vllm.vllm_plan#filter) takes. What the user wrote wins.
  - A service whose model no host can read is left out; the preflight reports it.
positional: hosts, gpu, models, runtime, all_hosts, drivers
options:
  _input:
    description: RV(vllm_services).
    type: list
    elements: dict
    required: true
  hosts:
    description: Names of the hosts.
    type: list
    elements: str
    required: true
  gpu:
    description: For each host, the fact C(gpu).
    type: list
    elements: dict
    required: true
  models:
    description: For each host, the RV(ignore:models) that M(baremetal.vllm.model_info) returned.
    type: list
    elements: dict
    required: true
  runtime:
    description: Runtime of services that name none.
    type: str
    default: venv
  all_hosts:
    description:
      - Names of all hosts of the inventory. Where O(hosts) are only some of them, a service that names no hosts is
        refused, as it would be planned onto the hosts that happen to be there, and one of other hosts is left out.
    type: list
    elements: str
  unread:
    description: Keeps services whose model no host can read, for a plan by the catalog of models alone.
    type: bool
    default: false
  drivers:
    description: For each of O(hosts) the NVIDIA driver that it is going to have, empty where it keeps what it has.
    type: list
    elements: str
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Plan
  ansible.builtin.set_fact:
    plan: "{{ inputs.services | baremetal.vllm.vllm_plan(inputs.hosts) }}"
  vars:
    inputs: "{{ vllm_services | baremetal.vllm.plan_inputs(ansible_play_hosts, gpu, models) }}"
"""

RETURN = r"""
_value:
  description: C(services) and C(hosts).
  type: dict
"""

import re
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

# A name becomes part of unit names, folders and shell words.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
BYTES_PER_GIB = 1024**3
# Names whose unit (vllm-NAME), log or folder is another part's of the collection.
TAKEN = {
    "interconnect-firewall": "the interconnect's firewall",
    "interconnect.nft": "the interconnect's firewall",
    "proxy": "the reverse proxy",
    "supervisord": "the supervisor",
}
STAND_BY = "-standby"
# No part of a plan, which is kept as a fact and shown.
SECRET = ("api_key",)


def check_names(services: Any) -> None:
    """Raises AnsibleFilterError for services without a usable name of their own."""
    if not isinstance(services, list) or not all(isinstance(service, Mapping) for service in services):
        raise AnsibleFilterError(f"vllm_services is {services!r}: give a list of services, each with name and model")
    names = [service.get("name") for service in services]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise AnsibleFilterError(
                f"vllm_services[{number}].name is {name!r}: give up to 63 letters, digits, '_', '.' and '-', a letter or "
                "digit first"
            )
        taken = "the server that stands by for another" if name.endswith(STAND_BY) else TAKEN.get(name)
        if taken:
            raise AnsibleFilterError(
                f"vllm_services[{number}].name is {name}: {taken} has a unit, log or folder of this name; give another one"
            )
        if names.index(name) != number:
            raise AnsibleFilterError(
                f"vllm_services[{number}].name is {name}, as of another service: names must differ"
            )


def _is_here(service: Mapping[str, Any], hosts: list[str]) -> bool:
    """Whether a service belongs to a run limited to some hosts. Raises AnsibleFilterError when that cannot be told."""
    named = service.get("hosts")
    named = [named] if isinstance(named, str) else named
    missing = [host for host in named or [] if host not in hosts]
    if named and len(missing) == len(named):
        return False
    if not named or missing:
        raise AnsibleFilterError(
            f"this run is limited to {', '.join(hosts)}, and service {service['name']} "
            + (f"needs {', '.join(missing)}, too" if missing else "may run on any host and would be planned anew")
            + ": run without --limit, or give the service `hosts` that are all in the run"
        )
    return True


def plan_inputs(
    services: list[dict[str, Any]],
    hosts: list[str],
    gpu: list[dict[str, Any]],
    models: list[dict[str, Any]],
    runtime: str = "venv",
    all_hosts: list[str] | None = None,
    drivers: list[str] | None = None,
    unread: bool = False,
) -> dict[str, Any]:
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import with_gpus_to_come

    check_names(services)
    limited = all_hosts is not None and set(all_hosts) != set(hosts)
    planned = []
    for service in services:
        if limited and not _is_here(service, hosts):
            continue
        readings = [found[service["name"]] for found in models if service["name"] in found]
        info = next((reading for reading in readings if not reading["problem"]), None)
        if info is None and not unread:
            continue
        read: dict[str, Any] = {"runtime": runtime}
        if info is not None:
            name = info["model"].rstrip("/").rsplit("/", 1)[-1] if info["source"] in ("path", "http") else info["model"]
            read |= {"config": info["config"], "model_path": info["path"], "served_model_name": name}
            if info["weights_bytes"]:
                read["weights_gib"] = info["weights_bytes"] / BYTES_PER_GIB
        planned.append({**read, **{key: value for key, value in service.items() if key not in SECRET}})
    to_be = drivers or [""] * len(hosts)
    seen = [
        {**with_gpus_to_come(facts, driver), "name": host}
        for host, facts, driver in zip(hosts, gpu, to_be, strict=True)
    ]
    return {"services": planned, "hosts": seen}


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"plan_inputs": plan_inputs}
