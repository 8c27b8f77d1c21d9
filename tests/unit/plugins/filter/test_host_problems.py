# SPDX-License-Identifier: GPL-3.0-or-later
"""host_problems: each problem has its line, its limit and its way out; a good host has none."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.host_problems import host_problems

KERNEL = "6.8.0-60-generic"
GPU = {
    "state": "no_driver",
    "problem": "cannot run nvidia-smi",
    "gpus_unusable": [],
    "gpus_lost": [],
    "kernel": {"running": KERNEL, "next": "6.8.0-65-generic"},
}
SETTINGS = {"accept": [], "free_mib": {"/boot": 150, "/var": 1024}, "clock_tolerance_s": 300}


def probe(**changes: Any) -> dict[str, Any]:
    package = f"linux-headers-{KERNEL}"
    good = {
        "addresses": [{"url": "http://archive.ubuntu.com/ubuntu/", "of": "apt", "reason": ""}],
        "clock_offset_s": -1.5,
        "free_mib": {"/boot": 400, "/var": 9000},
        "headers": {KERNEL: {"package": package, "state": "available", "detail": ""}},
    }
    return {**good, **changes}


def headers(state: str, detail: str = "", kernel: str = KERNEL) -> dict[str, Any]:
    return {"headers": {kernel: {"package": f"linux-headers-{kernel}", "state": state, "detail": detail}}}


def test_a_good_host_has_none() -> None:
    assert host_problems(probe(), GPU, SETTINGS) == []
    assert host_problems(probe(clock_offset_s=None, free_mib={}, headers={}, addresses=[]), GPU, SETTINGS) == []


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"clock_offset_s": 4000.2}, "clock", ["4000 s ahead of", "300 s are tolerated", "timedatectl set-ntp true"]),
        ({"clock_offset_s": -301.0}, "clock", ["301 s behind"]),
        (
            {"free_mib": {"/boot": 12, "/var": 9000}},
            "disk",
            ["/boot has 12 MiB free and 150 are needed", "remove kernels"],
        ),
        ({"free_mib": {"/boot": 400, "/var": 5}}, "disk", ["/var has 5 MiB free and 1024 are needed", "make room"]),
        (
            headers("missing"),
            "headers",
            [f"linux-headers-{KERNEL}", "the running kernel", "upgrade the kernel and reboot"],
        ),
        (
            headers("gone", "http://m/x.deb", "6.8.0-65-generic"),
            "headers",
            ["the next kernel", "no longer has it (http://m/x.deb)", "update the lists"],
        ),
        (
            {"addresses": [{"url": "http://m/", "of": "apt", "reason": "its name cannot be resolved"}]},
            "network",
            ["http://m/ (a package source of apt)", "/etc/resolv.conf", "baremetal_https_proxy"],
        ),
        (
            {"addresses": [{"url": "https://m/", "of": "", "reason": "no answer"}]},
            "network",
            ["https://m/ cannot", "firewall"],
        ),
    ],
)
def test_each_problem_has_its_way_out(changes: dict[str, Any], kind: str, said: list[str]) -> None:
    (line,) = host_problems(probe(**changes), GPU, SETTINGS)
    assert all(part in line for part in said), line
    assert line.endswith(f"[{kind}]")
    assert host_problems(probe(**changes), GPU, {**SETTINGS, "accept": [kind]}) == []


@pytest.mark.parametrize("state", ["present", "available", "unknown"])
def test_headers_that_may_be_had_are_no_problem(state: str) -> None:
    assert host_problems(probe(**headers(state)), GPU, SETTINGS) == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"state": "ok"}, 0),
        ({"state": "ok", "problem": "topo failed"}, 0),  # the planner has the catalog
        ({"state": "no_driver", "problem": "cannot run nvidia-smi"}, 0),  # the role nvidia_driver brings it
        ({"state": "mismatch", "problem": "module 535, library 580"}, 0),  # and puts this right
        ({"state": "hung", "problem": "no answer within 30 s"}, 1),
        ({"state": "ok", "gpus_lost": ["0000:03:00.0", "0000:04:00.0"]}, 2),
        ({"state": "ok", "gpus_unusable": [{"index": 1, "name": "NVIDIA A10", "reason": "no memory.total"}]}, 1),
    ],
)
def test_gpus_in_trouble(changes: dict[str, Any], lines: int) -> None:
    found = host_problems(probe(), {**GPU, "problem": "", **changes}, SETTINGS)
    assert len(found) == lines
    assert all(line.endswith("[gpu]") for line in found)


def test_all_at_once() -> None:
    bad = probe(clock_offset_s=999, free_mib={"/boot": 1, "/var": 1}, **headers("missing"))
    assert len(host_problems(bad, GPU, SETTINGS)) == 4
