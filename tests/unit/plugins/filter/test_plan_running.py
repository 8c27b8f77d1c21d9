# SPDX-License-Identifier: GPL-3.0-or-later
"""A plan that runs is kept while it holds: over every deployment of inventories/."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.filter.plan_running import plan_running
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text

INVENTORIES = sorted(path.parent for path in (Path(__file__).parents[4] / "inventories").glob("*/hosts.yml"))


def deployment(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    everything = yaml.safe_load((folder / "hosts.yml").read_text())["all"]
    hosts = []
    for name, variables in everything["hosts"].items():
        known = {**everything.get("vars", {}), **(variables or {})}
        if "plan_host_gpus" not in known:
            pytest.skip("planned from the facts of its host")
        described = hosts_from_text(known["plan_host_gpus"])[0]
        hosts.append({**described, "name": name, "driver_version": known.get("plan_host_driver")})
    return yaml.safe_load((folder / "group_vars" / "all.yml").read_text())["vllm_services"], hosts


def records(plan: dict[str, Any]) -> list[dict[str, str]]:
    return [{f"/etc/vllm/{row['name']}/plan.json": json.dumps(row["record"]) for row in plan["services"]}]


def busier(hosts: list[dict[str, Any]], mib: int) -> list[dict[str, Any]]:
    changed = copy.deepcopy(hosts)
    for host in changed:
        for gpu in host["gpus"]:
            gpu["memory_used_mib"] = (gpu.get("memory_used_mib") or 0) + mib
    return changed


def run_with(plan: dict[str, Any]) -> list[Any]:
    return [[row["args"], row["env"], row["gpus"], row["image"]] for row in plan["services"]]


@pytest.mark.parametrize("folder", INVENTORIES, ids=lambda path: path.name)
def test_a_little_less_free_memory_changes_nothing(folder: Path) -> None:
    services, hosts = deployment(folder)
    first = plan_running(services, hosts)
    assert first["fits"] and not any(row["kept"] for row in first["services"])
    for mib in (0, 40, 150):
        again = plan_running(services, busier(hosts, mib), records(first))
        assert again["fits"] and all(row["kept"] for row in again["services"])
        assert run_with(again) == run_with(first)
        assert records(again) == records(first)


A10 = next(path for path in INVENTORIES if path.name.endswith("4xa10"))


def test_what_does_not_hold_any_more_is_planned_anew() -> None:
    services, hosts = deployment(A10)
    first = plan_running(services, hosts)
    again = plan_running(services, busier(hosts, 540), records(first))
    assert again["fits"] and not any(row["kept"] for row in again["services"])
    assert run_with(again) != run_with(first)


def test_a_changed_entry_is_planned_around_the_others() -> None:
    services, hosts = deployment(A10)
    first = plan_running(services, hosts)
    changed = [{**services[0], "max_model_len": 16384}, *services[1:]]
    again = plan_running(changed, hosts, records(first))
    assert [row["kept"] for row in again["services"]] == [False, True, True]
    assert run_with(again)[1:] == run_with(first)[1:]


def test_another_gpu_is_a_reason_to_plan_anew() -> None:
    services, hosts = deployment(A10)
    first = plan_running(services, hosts)
    exchanged = copy.deepcopy(hosts)
    exchanged[0]["gpus"][0]["uuid"] = "GPU-new"
    assert not any(row["kept"] for row in plan_running(services, exchanged, records(first))["services"])


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"name": "chat"}'])
def test_records_that_cannot_be_read_are_none(text: str) -> None:
    services, hosts = deployment(A10)
    plan = plan_running(services, hosts, [{"/etc/vllm/chat/plan.json": text, "/etc/vllm/chat/endpoint.json": "{}"}])
    assert plan["fits"] and not any(row["kept"] for row in plan["services"])


def test_hosts_that_disagree_have_no_record() -> None:
    services, hosts = deployment(A10)
    (record,) = records(plan_running(services, hosts))
    other = {path: text.replace("8000", "8009") for path, text in record.items()}
    kept = {row["name"]: row["kept"] for row in plan_running(services, hosts, [record, other])["services"]}
    assert kept["chat"] is False


def test_no_secret_is_in_a_record() -> None:
    services, hosts = deployment(A10)
    plan = plan_running([{**service, "api_key": "sk-secret"} for service in services], hosts)
    assert records(plan) == records(plan_running(services, hosts)), "a key is no part of the plan"


def test_ports_that_clients_know_stay_whatever_else_changes() -> None:
    services, hosts = deployment(A10)
    services = [{key: value for key, value in service.items() if key != "port"} for service in services]
    first = plan_running(services, hosts)
    ports = {row["name"]: row["port"] for row in first["services"]}
    for others in (services[::-1], services[1:], [{**one, "max_num_seqs": 8} for one in services[::-1]]):
        again = plan_running(others, busier(hosts, 540), records(first))
        assert {row["name"]: row["port"] for row in again["services"]} == {
            one["name"]: ports[one["name"]] for one in others
        }
    given = [{**services[0], "port": ports[services[1]["name"]]}, *services[1:]]
    again = plan_running(given, hosts, records(first))
    assert again["fits"] and len({row["port"] for row in again["services"]}) == len(services)
