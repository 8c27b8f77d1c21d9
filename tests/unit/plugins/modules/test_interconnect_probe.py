# SPDX-License-Identifier: GPL-3.0-or-later
"""interconnect_probe against itself on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import interconnect_probe

Run = Callable[..., dict[str, Any]]
HERE, THERE = "127.0.0.1", "127.0.0.2"


def measure(run_module: Run, token: str = "word", **peer: Any) -> dict[str, Any]:
    whole = {"name": "b", "address": THERE, "source": HERE, "mtu": 1500, "bandwidth": True, **peer}
    (way,) = run_module(interconnect_probe, action="measure", token=token, timeout=2, peers=[whole])["ways"]
    return dict(way)


def serve(run_module: Run) -> int:
    answer = run_module(interconnect_probe, action="serve", token="word", name="b", addresses=[THERE], seconds=20)
    return int(answer["ports"][THERE])


def test_looks_at_interfaces(run_module: Run) -> None:
    found = run_module(interconnect_probe, action="look")
    assert found["time"] > 1.7e9
    first, last = (int(number) for number in found["ephemeral"].split("-"))
    with socket.socket() as sock:
        sock.bind((HERE, 0))
        assert first <= sock.getsockname()[1] <= last
    assert all(interface["mtu"] > 0 and interface["name"] != "lo" for interface in found["interfaces"])
    own = [place["address"] for interface in found["interfaces"] for place in interface["addresses"]]
    for address in own:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
            sock.bind((address, 0))  # it is this machine's


IN_A_NAMESPACE = """
set -e
ip address add 10.1.1.3/24 dev lo
ip address add 10.1.2.3/16 dev lo
ip address add 10.1.2.4/32 dev lo
ip address add 192.0.2.1/30 dev lo label lo:1
ip address add 198.51.100.1 peer 198.51.100.9/29 dev lo
ip link set lo up
exec "$@"
"""


def test_each_address_has_its_own_prefix() -> None:
    """An interface may have several, and an alias of it; 10.1.2.3/16 was taken for /24, as the first one is."""
    look = "import json; from ansible_collections.baremetal.vllm.plugins.modules import interconnect_probe as probe; "
    look += "print(json.dumps(probe.ipv4_addresses()))"
    answer = subprocess.run(
        ["unshare", "--net", "sh", "-c", IN_A_NAMESPACE, "sh", sys.executable, "-c", look],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "unshare" in answer.stderr or "ip: not found" in answer.stderr:
        pytest.skip("no network namespaces here: needs root and iproute2")
    assert answer.returncode == 0, answer.stderr
    found = {place["address"]: place["prefix"] for place in json.loads(answer.stdout)["lo"]}
    del found["127.0.0.1"]
    assert found == {"10.1.1.3": 24, "10.1.2.3": 16, "10.1.2.4": 32, "192.0.2.1": 30, "198.51.100.1": 29}


def test_measures_a_way(run_module: Run) -> None:
    way = measure(run_module, port=serve(run_module))
    assert way["problem"] == ""
    assert way["mbps"] > 10 and 0 < way["rtt_us"] < 1e6 and abs(way["clock_offset_s"]) < 1
    assert way["whole_mtu"] is True


def test_names_what_is_wrong(run_module: Run) -> None:
    port = serve(run_module)
    assert "b answers there: two hosts have this address" in measure(run_module, port=port, name="c")["problem"]
    assert "closed" in measure(run_module, port=port, token="another")["problem"]
    with socket.socket() as free:
        free.bind((THERE, 0))
        assert "refused" in measure(run_module, port=free.getsockname()[1])["problem"]
    with socket.socket() as silent:
        silent.bind((THERE, 0))
        silent.listen(1)
        assert "no answer within the time limit" in measure(run_module, port=silent.getsockname()[1])["problem"]


def test_serves_on_ports_that_a_firewall_lets_through(run_module: Run) -> None:
    words = {"action": "serve", "token": "word", "name": "b", "addresses": [THERE], "seconds": 10}
    with socket.socket() as taken:
        taken.bind((THERE, 0))
        high = taken.getsockname()[1]
        found = run_module(interconnect_probe, **words, ports=[high - 50, high])["ports"][THERE]
        assert high - 50 <= found < high
        assert measure(run_module, port=found)["problem"] == ""
        answer = run_module(interconnect_probe, **words, ports=[high, high])
    assert answer["failed"] and answer["msg"].startswith("cannot listen on 127.0.0.2: no port is free")


def test_an_address_that_the_host_does_not_have(run_module: Run) -> None:
    answer = run_module(interconnect_probe, action="serve", token="word", name="b", addresses=["203.0.113.9"])
    assert answer["failed"]
    assert answer["msg"].startswith("cannot listen on 203.0.113.9: ")


@pytest.mark.parametrize("passes, whole", [(9000, True), (1000, False), (0, None)])
def test_a_path_of_a_smaller_mtu_is_told_from_closed_udp(passes: int, whole: bool | None) -> None:
    """`passes`: the largest packet that the way carries."""

    def echo() -> None:
        mark = interconnect_probe.proof("word", "datagram").encode()
        with contextlib.suppress(OSError):  # closed
            while True:
                data, place = there.recvfrom(65536)
                if len(data) <= passes:
                    there.sendto(mark + b"%d" % len(data), place)

    with socket.socket(type=socket.SOCK_DGRAM) as there, socket.socket(type=socket.SOCK_DGRAM) as here:
        there.bind((THERE, 0))
        here.bind((HERE, 0))
        threading.Thread(target=echo, daemon=True).start()
        assert interconnect_probe.whole(here, *there.getsockname(), "word", 1500) is whole
