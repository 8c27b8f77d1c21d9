# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter plan_running."""

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_running
short_description: Plan services, and keep what runs where it still holds
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - As P(baremetal.vllm.vllm_plan#filter). A service whose entry and whose hosts are as they were when it was started is
    planned with the numbers that it runs with, so that memory which is a little more or less free than then restarts
    nothing. If that does not fit any more, all is planned anew.
positional: hosts, records
options:
  _input:
    description: The services, as P(baremetal.vllm.plan_inputs#filter) gives them.
    type: list
    elements: dict
    required: true
  hosts:
    description: The hosts.
    type: list
    elements: dict
    required: true
  records:
    description: Contents of the files C(plan.json) that the role keeps beside each service, by their path, for each host.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Plan
  ansible.builtin.set_fact:
    plan: "{{ inputs.services | baremetal.vllm.plan_running(inputs.hosts, [probe.files]) }}"
"""

RETURN = r"""
_value:
  description:
    - The plan. Each service that fits has a C(record) to keep, with C(name), C(asked) (a fingerprint), C(pins) and
      C(planned) (what its memory should hold), over several hosts C(block) (which ports it has), and C(kept), whether its
      numbers are those that were given.
  type: dict
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError

# Decisions of a plan that depend on what is free at the moment.
PINS = (
    "port", "engine_version", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "enable_expert_parallel", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
    "enforce_eager",
)  # fmt: skip
CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"
# What others may take more than when a server was started: it holds its own memory already.
TOLERANCE_MIB = 256
PLANNED = ("weights_gib", "kv_cache_gib", "kv_cache_tokens", "max_concurrency")


def fingerprint(service: Mapping[str, Any], hosts: list[dict[str, Any]]) -> str:
    """What a plan was made for: the entry, and the hardware of the hosts that it may run on."""
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.service import KEYS

    named = service.get("hosts")
    named = [named] if isinstance(named, str) else named
    hardware = [
        [host["name"], host.get("device"), sorted([gpu.get("uuid"), gpu["memory_total_mib"]] for gpu in host["gpus"])]
        for host in hosts
        if not named or host["name"] in named
    ]
    asked = {key: service[key] for key in KEYS if key in service}
    return hashlib.sha256(json.dumps([asked, hardware], sort_keys=True, default=str).encode()).hexdigest()


def record_of(row: Mapping[str, Any], asked: str) -> dict[str, Any] | None:
    """What to keep of a planned service; None where its servers differ from each other."""
    instances = row["instances"]
    pins = [{key: item[key] for key in PINS if item.get(key) is not None} for item in instances]
    if not instances or any(other != pins[0] for other in pins[1:]):
        return None
    kept = {**pins[0], "hosts": sorted(row["hosts"])}
    places = {tuple(indices) for indices in row["gpus"].values() if indices}
    if len(places) == 1 and all(len(item["hosts"]) == 1 for item in instances):
        kept["gpus"] = list(places.pop())
    if CPU_CACHE in row["env"]:
        kept["env"] = {CPU_CACHE: row["env"][CPU_CACHE]}
    planned = {key: row["memory"][key] for key in PLANNED}
    return {"name": row["name"], "asked": asked, "pins": kept, "planned": planned}


def read_records(records: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Records by the name of their service. One that cannot be read, or that hosts disagree about, is none."""
    found: dict[str, dict[str, Any]] = {}
    doubtful = set()
    for files in records:
        for path, text in files.items():
            if not path.endswith("/plan.json"):
                continue
            try:
                record = json.loads(text)
                name, complete = record["name"], {"asked", "pins", "planned"} <= set(record)
            except (ValueError, KeyError, TypeError):
                continue
            if not complete or found.setdefault(name, record) != record:
                doubtful.add(name)
    return {name: record for name, record in found.items() if name not in doubtful}


def _pinned(service: dict[str, Any], pins: Mapping[str, Any]) -> dict[str, Any]:
    return {**service, **pins, "env": {**pins.get("env", {}), **(service.get("env") or {})}}


def _at_their_ports(services: list[dict[str, Any]], known: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Clients know the port that a service has: without one in its entry it stays there, whatever else changes."""
    taken = {service.get("port") for service in services}
    found = []
    for service in services:
        port = known.get(service["name"], {}).get("pins", {}).get("port")
        if service.get("port") is None and port and port not in taken:
            taken.add(port)
            service = {**service, "port": port}
        found.append(service)
    return found


def _with_tolerance(host: dict[str, Any]) -> dict[str, Any]:
    gpus = [
        {**gpu, "memory_used_mib": max(0, (gpu.get("memory_used_mib") or 0) - TOLERANCE_MIB)} for gpu in host["gpus"]
    ]
    return {**host, "gpus": gpus}


def plan_running(
    services: list[dict[str, Any]], hosts: list[dict[str, Any]], records: list[dict[str, str]] | None = None
) -> dict[str, Any]:
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.multi_host import blocks
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

    try:
        asked = {service["name"]: fingerprint(service, hosts) for service in services}
        known = read_records(records or [])
        services = _at_their_ports(services, known)
        kept = {name: record for name, record in known.items() if asked.get(name) == record["asked"]}
        plan = None
        if kept:
            pinned = [
                _pinned(service, kept[service["name"]]["pins"]) if service["name"] in kept else service
                for service in services
            ]
            plan = make_plan(pinned, [_with_tolerance(host) for host in hosts])
        if plan is None or not plan["fits"]:
            anew = make_plan(services, hosts)
            if plan is None or anew["fits"]:
                plan, kept = anew, {}
    except PlanError as error:
        raise AnsibleFilterError(f"plan_running: {error}") from error
    for row in plan["services"]:
        name = row["name"]
        row["kept"] = name in kept
        row["record"] = kept.get(name) or (record_of(row, asked[name]) if row["instances"] else None)
    # Ports stay even where all else is planned anew: other services of the same hosts have theirs beside them.
    for name, number in blocks(plan["services"], {name: record.get("block") for name, record in known.items()}).items():
        row = next(row for row in plan["services"] if row["name"] == name)
        row["record"] = {**(row["record"] or {}), "block": number}
    return plan


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"plan_running": plan_running}
