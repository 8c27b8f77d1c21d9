# SPDX-License-Identifier: GPL-3.0-or-later
"""Which network hosts use for one service, and what is said of one that does not do."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.interconnect import interconnect
from ansible_collections.baremetal.vllm.plugins.filter.interconnect_peers import interconnect_peers
from ansible_collections.baremetal.vllm.plugins.filter.interconnect_problems import interconnect_problems
from ansible_collections.baremetal.vllm.plugins.filter.interconnect_sums import interconnect_sums
from ansible_collections.baremetal.vllm.plugins.filter.ray_cluster_problems import ray_cluster_problems
from ansible_collections.baremetal.vllm.plugins.filter.span_versions import span_versions
from ansible_collections.baremetal.vllm.plugins.filter.spans_open import spans_open
from ansible_collections.baremetal.vllm.plugins.filter.spans_up import spans_up

SPANS = [{"service": "chat", "hosts": ["a", "b"], "executor": "mp"}]


def nic(name: str, *addresses: str, speed: int | None = None, default: bool = False, mtu: int = 1500) -> dict[str, Any]:
    places = [dict(zip(("address", "prefix"), text.split("/"), strict=True)) for text in addresses]
    return {
        "name": name,
        "addresses": [{**place, "prefix": int(place["prefix"])} for place in places],
        "mtu": mtu,
        "speed_mbps": speed,
        "physical": True,
        "default": default,
    }


def looks(*hosts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: {"interfaces": nics, "ephemeral": "32768-60999"} for name, nics in zip("abc", hosts, strict=False)}


TWO = looks(
    [nic("eth0", "192.168.0.1/24", speed=1000, default=True), nic("eth1", "10.0.0.1/24", speed=10000), nic("docker0", "172.17.0.1/16")],
    [nic("ens3", "192.168.0.2/24", speed=1000, default=True), nic("ens4", "10.0.0.2/24", speed=10000), nic("docker0", "172.17.0.1/16")],
)  # fmt: skip


def choose(seen: dict[str, Any], **wishes: dict[str, str]) -> dict[str, Any]:
    return interconnect(SPANS, seen, wishes)["chat"]


def test_the_fastest_network_that_all_share() -> None:
    hosts = choose(TWO)["hosts"]
    assert [(host["address"], host["interface"]) for host in hosts.values()] == [
        ("10.0.0.1", "eth1"),
        ("10.0.0.2", "ens4"),
    ]


def test_a_wish_is_taken() -> None:
    wish = {"network": "192.168.0.0/24"}
    assert [host["address"] for host in choose(TWO, a=wish, b=wish)["hosts"].values()] == ["192.168.0.1", "192.168.0.2"]
    assert choose(TWO, a={"interface": "eth0"})["hosts"]["b"]["address"] == "192.168.0.2"


def test_routed_networks_use_the_default_route() -> None:
    seen = looks([nic("eth0", "10.1.0.1/24", default=True)], [nic("eth0", "10.2.0.1/24", default=True)])
    assert [host["address"] for host in choose(seen)["hosts"].values()] == ["10.1.0.1", "10.2.0.1"]


def test_one_host_or_many_is_the_same_inventory() -> None:
    many = [{"service": "chat", "hosts": ["a", "b", "c"]}]
    seen = looks(*([nic("eth0", f"10.0.0.{number}/24", default=True)] for number in (1, 2, 3)))
    assert len(interconnect(many, seen, {})["chat"]["hosts"]) == 3


@pytest.mark.parametrize(
    "seen, wishes, problem",
    [
        (TWO, {"a": {"interface": "eth9"}}, "a has no interface eth9 that is up: it has eth0, eth1, docker0"),
        (TWO, {"b": {"network": "10.9.0.0/16"}}, "b has no address in 10.9.0.0/16: it has ens3 192.168.0.2"),
        (TWO, {"b": {"network": "ten"}}, "vllm_interconnect_network is 'ten': give a network such as 10.0.0.0/24"),
        (TWO, {"a": {"address": "10.0.0.7"}}, "a does not have the address 10.0.0.7: it has eth0 192.168.0.1"),
        (
            looks([nic("eth0", "10.0.0.1/24")], [nic("eth0", "10.0.0.1/24")]),
            {},
            "a and b have the same address 10.0.0.1: give each host one of its own",
        ),
        (
            looks([nic("eth0", "10.0.0.1/24", mtu=9000)], [nic("eth0", "10.0.0.2/24")]),
            {},
            "the MTU differs (a eth0 9000, b eth0 1500): large packets would vanish",
        ),
        (looks([nic("docker0", "172.17.0.1/16")], [nic("eth0", "10.0.0.2/24")]), {}, "a has no address that other hosts can reach"),
    ],
)  # fmt: skip
def test_what_does_not_do_is_said_in_one_line(seen: dict[str, Any], wishes: dict[str, Any], problem: str) -> None:
    problems = choose(seen, **wishes)["problems"]
    assert len(problems) == 1
    assert problems[0].startswith(problem)


GOOD = {
    "name": "b",
    "address": "10.0.0.2",
    "problem": "",
    "rtt_us": 200,
    "mbps": 9000,
    "clock_offset_s": 0.01,
    "whole_mtu": True,
}
LIMITS = {"clock_s": 5.0, "mbps": 500.0, "rtt_ms": 5.0}


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"problem": "Connection refused"}, "a cannot reach b at 10.0.0.2: Connection refused"),
        ({"clock_offset_s": -61.0}, "the clocks of a and b are 61 s apart (limit 5)"),
        ({"whole_mtu": False}, "packets of the interface's own MTU do not arrive from a at b"),
        ({"mbps": 93}, "a sends 93 Mb/s to b (limit 500)"),
        ({"rtt_us": 20000}, "20.0 ms from a to b and back (limit 5)"),
    ],
)
def test_a_bad_way_is_named_once(change: dict[str, Any], problem: str) -> None:
    back = {**GOOD, "name": "a", "mbps": None}
    both = {key: value for key, value in change.items() if key != "problem" and key != "mbps"}
    found = interconnect_problems({"a": [{**GOOD, **change}], "b": [{**back, **both}]}, LIMITS)
    assert len(found) == 1
    assert found[0].startswith(problem)
    as_text = {name: str(limit) for name, limit in LIMITS.items()}
    assert interconnect_problems({"a": [{**GOOD, **change}], "b": [{**back, **both}]}, as_text) == found
    assert interconnect_problems({"a": [GOOD], "b": [back]}, LIMITS) == []
    closed = {"whole_mtu": None}  # a firewall may let TCP in alone, as engines need no more
    assert interconnect_problems({"a": [{**GOOD, **closed}], "b": [{**back, **closed}]}, LIMITS) == []


def test_each_pair_measures_its_bandwidth_once() -> None:
    network = interconnect(SPANS, TWO, {})
    ports = {"a": {"10.0.0.1": 1}, "b": {"10.0.0.2": 2}}
    (peer,) = interconnect_peers(network, "a", ports)
    assert peer == {"name": "b", "address": "10.0.0.2", "port": 2, "source": "10.0.0.1", "mtu": 1500, "bandwidth": True}
    assert interconnect_peers(network, "b", ports)[0]["bandwidth"] is False


def said(python: str = "3.11.2", **more: str) -> dict[str, Any]:
    words = {"service": "chat", "python": python, "vllm": "0.25.1", **more}
    return {"results": [{"stdout": str(words).replace("'", '"')}]}


@pytest.mark.parametrize(
    "executor, first, second, problems",
    [
        ("mp", said(), said("3.11.9"), []),
        ("ray", said(ray="2.60.0"), said("3.11.9", ray="2.60.0"), ["python is 3.11.2 on a and 3.11.9 on b"]),
        ("ray", said(ray="2.60.0"), said(ray="2.59.0"), ["ray is 2.60.0 on a and 2.59.0 on b"]),
        ("ray", said(), said(), ["the environment of service chat has no Ray"]),
        ("mp", said(), said(vllm="0.24.0"), ["vllm is 0.25.1 on a and 0.24.0 on b"]),
        ("mp", said(), said("3.12.1", vllm="0.24.0"), ["python is", "vllm is"]),
        ("mp", {"results": [{"msg": "not there yet"}]}, {"results": [{"msg": "not there yet"}]}, []),
    ],
)
def test_software_must_be_the_same(executor: str, first: Any, second: Any, problems: list[str]) -> None:
    found = span_versions([{**SPANS[0], "executor": executor}], {"a": first, "b": second})
    assert len(found) == len(problems)
    assert all(part in line for part, line in zip(problems, found, strict=True)), found


def test_images_must_be_the_same() -> None:
    def image(*layers: str) -> dict[str, Any]:
        return {"results": [{"stdout": json.dumps({"service": "chat", "image": list(layers)})}]}

    answers = {"a": said(), "b": said()}
    assert span_versions(SPANS, answers, {"a": image("sha256:1", "sha256:2"), "b": image("sha256:1", "sha256:2")}) == []
    (found,) = span_versions(SPANS, answers, {"a": image("sha256:1"), "b": image("sha256:1", "sha256:2")})
    assert found.startswith("service chat: image is ") and found.endswith(" on b: install the same on both")
    assert span_versions(SPANS, answers, {"a": {"skipped": True}, "b": {"skipped": True}}) == []


@pytest.mark.parametrize(
    "silent, reason",
    [
        (
            {"stdout": "", "rc": 1, "stderr": "Traceback\nImportError: libfoo.so is missing\n"},
            "ImportError: libfoo.so is missing",
        ),
        ({"msg": "[Errno 2] No such file or directory: b'/opt/x/bin/python'"}, "[Errno 2] No such file or directory"),
        ({}, "it printed nothing"),
    ],
)
def test_a_host_that_does_not_answer_is_named_outside_of_check_mode(silent: dict[str, Any], reason: str) -> None:
    answers = {"a": said(), "b": {"results": [{"skipped": True}, silent]}}
    (found,) = span_versions(SPANS, answers, {}, True)
    assert found.startswith(f"service chat: Python of b does not say which software it has: {reason}")
    assert span_versions(SPANS, answers) == []
    assert len(span_versions(SPANS, {"a": answers["b"], "b": said()}, {}, True)) == 1


def test_what_one_host_does_not_name_is_open() -> None:
    other = {"service": "embed", "hosts": ["b", "c"], "executor": "ray"}
    said_by = {"a": ["chat"], "b": ["chat", "embed"], "c": []}
    assert spans_open([*SPANS, other], said_by) == [other]
    assert spans_open([*SPANS, other], {**said_by, "c": ["embed"]}) == []


def part(executor: str, **fields: Any) -> dict[str, Any]:
    span = {"executor": executor, "ports": {"node_manager": 6380}}
    return {"name": executor, "state_dir": f"/s/{executor}", "span": span, "headless": False, "port": 8000, **fields}


def test_what_runs_on_a_host_is_told_for_each_service() -> None:
    mp, ray = part("mp"), part("ray", port=8001)
    here = {"cwd": "/s/mp"}
    probe = {
        "pids": {"/s/mp/keeper.pid": 12, "/s/mp/engine.pid": 13},
        "listeners": {"8000": here, "6380": {"cwd": "/"}, "8001": {"cwd": "/s/ray"}},
    }
    assert spans_up([mp, ray, {"name": "alone", "span": None}], probe) == ["mp", "ray"]
    # A server that hangs, or that somebody else's listens for, is not up; nor is an engine without its keeper.
    assert spans_up([mp, ray], {**probe, "listeners": {"8000": here, "6380": {}}}) == ["mp"]
    assert spans_up([mp], {**probe, "listeners": {"8000": {"cwd": "/elsewhere"}}}) == []
    assert spans_up([mp], {**probe, "pids": {"/s/mp/keeper.pid": 0, "/s/mp/engine.pid": 13}}) == []
    assert spans_up([{**mp, "port": 8009}], probe) == ["mp"], "where it listens before its port changes"
    # The other hosts have no server that could listen.
    assert spans_up([{**mp, "headless": True}, {**ray, "headless": True}], {**probe, "listeners": {"6380": {}}}) == [
        "mp",
        "ray",
    ]


def test_sums_that_went_well_or_badly() -> None:
    def done(**fields: Any) -> dict[str, Any]:
        return {"stdout": "NCCL version 2.28\n" + json.dumps({"problems": [], "whole": "", **fields})}

    assert interconnect_sums({"a": done(ms=1), "b": done(ms=1)}) == []
    assert interconnect_sums(
        {"a": done(problems=["a and b"], whole="3"), "b": done(problems=["a and b"], whole="3")}
    ) == ["a and b"]
    assert interconnect_sums({"a": done(whole="3 hosts cannot"), "b": done(whole="no")}) == ["3 hosts cannot"]


@pytest.mark.parametrize(
    "result, reason",
    [
        (
            {"stdout": "", "stderr": "Traceback\nModuleNotFoundError: No module named 'torch'\n"},
            "ModuleNotFoundError: No module named 'torch'",
        ),
        ({"failed": True, "msg": "could not find job"}, "could not find job"),
        ({"stdout": "Killed"}, "Killed"),
        ({}, "it printed nothing"),
    ],
)
def test_a_sum_that_printed_nothing_is_one_line(result: dict[str, Any], reason: str) -> None:
    assert interconnect_sums({"a": result}) == [f"a: the sum between hosts ended without an answer: {reason}"]


PORTS = {"gcs": 6379, "node_manager": 6380, "min_worker": 10002, "max_worker": 10201}
SAYS = {"head": "a", "hosts": ["a", "b"], "version": "2.60.0", "ports": PORTS, "folder": "/var/lib/ray/default"}


@pytest.mark.parametrize(
    "second, problem",
    [
        ({"head": "b"}, "two heads in one cluster (a: a; b: b): set ray_cluster_head once"),
        ({"version": "2.59.0"}, "different releases of Ray in one cluster (a: 2.60.0; b: 2.59.0)"),
        ({"ports": {**PORTS, "gcs": 7000}}, "different ports in one cluster"),
        ({"folder": "/var/lib/" + "long/" * 8}, "b: /var/lib/"),
        (None, "ray_cluster_hosts names b, which is not in this run"),
    ],
)
def test_hosts_of_a_ray_cluster_must_agree(second: dict[str, Any] | None, problem: str) -> None:
    says = {"a": SAYS} if second is None else {"a": SAYS, "b": {**SAYS, **second}}
    (found,) = ray_cluster_problems(says, ["a", "b"])
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "ports, problem",
    [
        ({"gcs": 6380}, "ray_cluster_ports.node_manager is 6380, as gcs is"),
        ({"gcs": 10010}, "ray_cluster_ports.gcs is 10010, as a port of the workers is"),
        ({"max_worker": 10005}, "ray_cluster_ports has 4 ports for workers (10002 to 10005): give 20 or more"),
        ({"gcs": 80}, "ray_cluster_ports.gcs is 80: give a port from 1024 to 65535"),
        ({"gcs": "x"}, "ray_cluster_ports is"),
    ],
)
def test_ports_of_a_ray_cluster(ports: dict[str, Any], problem: str) -> None:
    says = {**SAYS, "ports": {**PORTS, **ports}}
    (found,) = ray_cluster_problems({"a": says, "b": says}, ["a", "b"])
    assert found.startswith(problem)
    assert ray_cluster_problems({"a": SAYS, "b": SAYS}, ["a", "b"]) == []
