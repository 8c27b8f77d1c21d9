# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts from facts and from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import (
    gpu_row,
    hosts_from_text,
    natural,
    parse_host,
    parse_hosts,
    with_gpus_to_come,
)

A10 = {"index": 0, "uuid": "GPU-1", "name": "NVIDIA A10", "memory_total_mib": 23028, "compute_capability": "8.6"}


def host(**changes: Any) -> dict[str, Any]:
    return {"name": "gpu1", "gpus": [A10, {**A10, "index": 1}], **changes}


FACTS = sorted((Path(__file__).parents[2] / "modules/captures").glob("*_gpu_facts.json"))


@pytest.mark.parametrize("capture", FACTS, ids=lambda path: path.name)
def test_the_facts_of_a_real_host_are_read_whole(capture: Path) -> None:
    """What gpu_facts said through Ansible (tests/device/gpu_facts.sh)."""
    facts = json.loads(capture.read_text())
    parsed = parse_host({"name": "gpu1", **facts}, "hosts[0]")
    assert [(gpu.name, gpu.memory_total_mib) for gpu in parsed.gpus] == [
        (gpu["name"], gpu["memory_total_mib"]) for gpu in facts["gpus"]
    ]
    assert parsed.driver_version == facts["driver_version"]


def test_the_facts_of_two_h200() -> None:
    (capture,) = (path for path in FACTS if path.name.startswith("h200_x2"))
    parsed = parse_host({"name": "gpu1", **json.loads(capture.read_text())}, "hosts[0]")
    assert [(gpu.memory_total_mib, gpu.capability) for gpu in parsed.gpus] == [(143771, (9, 0))] * 2
    assert parsed.link([0, 1]) == "nvlink"


def test_the_facts_of_a_host_are_taken_as_they_are() -> None:
    parsed = parse_host(
        {
            "name": "gpu1",
            "device": "cuda",
            "driver_version": "580.159.04",
            "gpus": [{**A10, "memory_used_mib": 5, "mig": False, "pci_bus_id": "x"}, {**A10, "index": 1}],
            "links": [["X", "NV4"], ["NV4", "X"]],
            "p2p": [["X", "OK"], ["OK", "X"]],
            "pci": [],
            "problem": "",
            "cpu": {"cores": 8, "memory_total_mib": 64000, "memory_available_mib": 60000},
        },
        "hosts[0]",
    )
    assert parsed.link([0, 1]) == "nvlink"
    assert parsed.gpus[0].memory_used_mib == 5
    assert (parsed.memory_total_mib, parsed.memory_available_mib) == (64000, 60000)
    assert parsed.notes == ()


@pytest.mark.parametrize(
    ("links", "p2p", "link"),
    [
        ([["X", "NV18"], ["NV18", "X"]], [["X", "OK"], ["OK", "X"]], "nvlink"),
        ([["X", "PIX"], ["PIX", "X"]], [["X", "OK"], ["OK", "X"]], "p2p"),
        ([["X", "SYS"], ["SYS", "X"]], [["X", "CNS"], ["CNS", "X"]], "pcie"),
        (None, [["X", "NS"], ["NS", "X"]], "pcie"),
        (None, None, "p2p"),  # the catalog's word for an A10
    ],
)
def test_links(links: Any, p2p: Any, link: str) -> None:
    assert parse_host(host(links=links, p2p=p2p), "hosts[0]").link([0, 1]) == link


def test_links_that_the_catalog_answers_are_said_to_be_so() -> None:
    assert "taken from the catalog" in parse_host(host(), "hosts[0]").notes[0]


def test_mig_slices_are_places_of_their_own() -> None:
    cut = {
        **A10,
        "mig": True,
        "mig_devices": [
            {"uuid": "MIG-1", "profile": "1g.10gb", "memory_total_mib": 9728},
            {"uuid": "MIG-2", "profile": "1g.10gb", "memory_total_mib": 9728},
        ],
    }
    parsed = parse_host({"name": "gpu1", "gpus": [cut]}, "hosts[0]")
    assert [(gpu.uuid, gpu.memory_total_mib, gpu.mig) for gpu in parsed.gpus] == [
        ("MIG-1", 9728, True),
        ("MIG-2", 9728, True),
    ]


def test_a_gpu_in_mig_mode_without_slices_is_no_place() -> None:
    parsed = parse_host(host(gpus=[{**A10, "mig": True}, {**A10, "index": 1, "mig": False}]), "hosts[0]")
    assert [gpu.index for gpu in parsed.gpus] == [1]
    assert "MIG mode without a slice" in parsed.notes[0]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, r"hosts\[0\]\.name is ''"),
        ({"gpus": "4"}, r"hosts\[gpu1\]\.gpus is '4'; give a list"),
        ({"gpus": []}, "give at least one GPU, or cpu.memory_total_mib"),
        (
            {"gpus": [{**A10, "memory_total_mib": 0}]},
            r"gpus\[0\]\.memory_total_mib is 0; give a whole number of at least 1",
        ),
        ({"gpus": [{**A10, "memory_total_mib": -5}]}, "memory_total_mib is -5"),
        ({"gpus": [{**A10, "memory_total_mib": None}]}, "memory_total_mib is None; every GPU needs it"),
        ({"gpus": [{**A10, "memory_used_mib": 30000}]}, "memory_used_mib is 30000; it cannot be more"),
        ({"gpus": [{**A10, "compute_capability": "[N/A]"}]}, r"compute_capability is '\[N/A\]'"),
        ({"gpus": [A10, A10]}, "two GPUs of one host cannot have the same index"),
        ({"gpus": [3]}, "give a mapping"),
        ({"links": [["X"]]}, "give one row for each of the 2 GPUs"),
        ({"links": [["X"], ["X"]]}, "give one column for each of the 2 GPUs"),
        ({"driver_version": "new"}, "driver_version is 'new'"),
        ({"cpu": {"memory_total_mib": -1}}, "memory_total_mib is -1"),
    ],
)
def test_bad_facts_are_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        parse_host(host(**changes), "hosts[0]")


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([], "give at least one host"),
        ({}, "give a list"),
        ("gpu1", "give a list"),
        ([host(), host()], "two hosts have this name"),
    ],
)
def test_bad_lists_of_hosts_are_refused(hosts: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        parse_hosts(hosts)


def test_hosts_come_in_the_order_of_their_numbers() -> None:
    names = [parsed.name for parsed in parse_hosts([host(name=f"gpu{number}") for number in (10, 2, 1)])]
    assert names == ["gpu1", "gpu2", "gpu10"]
    assert natural("a2b") < natural("a10b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4x A10", [["NVIDIA A10"] * 4]),
        ("A10", [["NVIDIA A10"]]),
        (" 2 x a100-80g ", [["NVIDIA A100-SXM4-80GB"] * 2]),
        ("3x(2x V100-PCIE-16GB)", [["Tesla V100-PCIE-16GB"] * 2] * 3),
        ("2x(1x L4), 1x(4x A10)", [["NVIDIA L4"], ["NVIDIA L4"], ["NVIDIA A10"] * 4]),
        ("1x H100 + 2x L4", [["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA L4"]]),
        ("2x Tesla V100-16GB no-p2p", [["Tesla V100-PCIE-16GB"] * 2]),
    ],
)
def test_hosts_that_do_not_exist_yet(text: str, expected: list[list[str]]) -> None:
    hosts = hosts_from_text(text)
    assert [[gpu["name"] for gpu in host["gpus"]] for host in hosts] == expected
    assert [parsed.name for parsed in parse_hosts(hosts)] == [f"host{number + 1}" for number in range(len(expected))]


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("2x H100", "nvlink"),
        ("2x A10", "p2p"),
        ("2x A10 no-p2p", "pcie"),
        ("2x A40 nvlink", "nvlink"),
        ("2x A40", "p2p"),
    ],
)
def test_their_links_are_the_catalogs_or_what_is_said(text: str, link: str) -> None:
    assert parse_hosts(hosts_from_text(text))[0].link([0, 1]) == link


@pytest.mark.parametrize("text", ["", "  ", None, 4, "4x", "0x A10", "4x A11", "3x(", "3x()", "0x(2x A10)", "2x A10,"])
def test_other_text_is_refused_with_the_syntax_or_the_gpus(text: Any) -> None:
    with pytest.raises(PlanError, match="plan_gpus is "):
        hosts_from_text(text)


def test_cards_of_one_name_are_told_apart_by_memory() -> None:
    name = "NVIDIA GeForce RTX 2080 Ti"
    assert (gpu_row(name, 11264) or {})["name"] == "RTX-2080-Ti"
    assert (gpu_row(name, 22528) or {})["name"] == "RTX-2080-Ti-22GB"
    assert gpu_row("NVIDIA Nothing") is None


V100 = {
    "address": "0000:01:00.0",
    "name": "Tesla V100-PCIE-32GB",
    "memory_total_mib": 32768,
    "compute_capability": "7.0",
    "kernel_module": "proprietary",
}


@pytest.mark.parametrize("state", ["no_driver", "mismatch"])
def test_gpus_are_planned_before_their_driver_is_there(state: str) -> None:
    facts = {"gpus": [], "pci": [V100, V100], "state": state, "driver_version": None, "device": "cpu", "cpu": {}}
    host = parse_host({**with_gpus_to_come(facts), "name": "h"}, "h")
    assert [(gpu.index, gpu.capability, gpu.memory_total_mib) for gpu in host.gpus] == [
        (0, (7, 0), 32768),
        (1, (7, 0), 32768),
    ]
    assert host.driver_version is None


@pytest.mark.parametrize(
    "facts",
    [
        {"gpus": [], "pci": [], "state": "no_gpu"},
        {"gpus": [], "pci": [V100], "state": "hung"},  # it has a driver, and something is wrong
        {"gpus": [], "pci": [V100, {**V100, "memory_total_mib": None}], "state": "no_driver"},
        {"gpus": [{"index": 0}], "pci": [V100], "state": "ok"},
    ],
)
def test_other_hosts_are_planned_as_they_are(facts: dict[str, Any]) -> None:
    assert with_gpus_to_come(facts) == facts


def test_a_host_is_planned_with_the_driver_that_it_will_have() -> None:
    bare = {"gpus": [], "pci": [V100], "state": "no_driver", "driver_version": None}
    assert with_gpus_to_come(bare, "580.159.04")["driver_version"] == "580.159.04"
    old = {"gpus": [A10], "pci": [], "state": "ok", "driver_version": "535.261.03"}
    assert with_gpus_to_come(old, "580.159.04") == {**old, "driver_version": "580.159.04"}
    assert with_gpus_to_come(old) == old
