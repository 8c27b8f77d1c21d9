# SPDX-License-Identifier: GPL-3.0-or-later
"""What is wrong between hosts is said in one line, before anything is started. Each fault is a real one."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from conftest import Site

ONE, TWO, THREE = "mptest1", "mptest2", "mptest3"


@contextlib.contextmanager
def fault(site: Site, host: str, begin: str, end: str) -> Iterator[None]:
    site.fleet.sh(host, begin)
    try:
        yield
    finally:
        site.fleet.sh(host, end)


def nic(site: Site, host: str) -> str:
    return site.fleet.sh(host, f"ip -o -4 addr | awk '/{site.fleet.address(host)}/ {{print $2}}'")


def said(site: Site, *words: str, hosts: int = 3, **variables: Any) -> str:
    output, _ = site.play(hosts, *words, fail=True, **variables)
    assert "RUNNING HANDLER" not in output
    for host in site.fleet.names:
        assert site.fleet.sh(host, "ls /etc/systemd/system/vllm-* 2>/dev/null", check=False) == "", (
            "something was started"
        )
    return " ".join(output.split())


def test_an_interface_that_does_not_exist(site: Site) -> None:
    text = said(site, "--tags", "preflight", each={TWO: {"vllm_interconnect_interface": "ib0"}})
    assert f"{TWO} has no interface ib0 that is up: it has eth0, eth1" in text


def test_a_host_that_is_not_in_the_network(site: Site) -> None:
    site.fleet.cut(THREE)
    try:
        text = said(site, "--tags", "preflight")
    finally:
        site.fleet.mend(THREE)
    assert f"{THREE} has no address in 10.84.1.0/24: it has eth0 10.84.0.13" in text


def test_two_hosts_with_one_address(site: Site) -> None:
    name, own, other = nic(site, THREE), site.fleet.address(THREE), site.fleet.address(TWO)
    change = "ip addr del {}/24 dev {} && ip addr add {}/24 dev {}"
    with fault(site, THREE, change.format(own, name, other, name), change.format(other, name, own, name)):
        text = said(site, "--tags", "preflight")
    assert f"{TWO} and {THREE} have the same address {other}: give each host one of its own" in text


def test_interfaces_of_different_mtu(site: Site) -> None:
    name = nic(site, TWO)
    with fault(site, TWO, f"ip link set {name} mtu 1400", f"ip link set {name} mtu 1500"):
        text = said(site, "--tags", "preflight")
    assert re.search(rf"the MTU differs \({ONE} \w+ 1500, {TWO} \w+ 1400, {THREE} \w+ 1500\): large packets", text)


def measured(
    site: Site, begin: Callable[[str], str], end: Callable[[str], str], hosts: tuple[str, ...] = (TWO,), **more: Any
) -> str:
    with contextlib.ExitStack() as stack:
        for host in hosts:
            name = nic(site, host)
            stack.enter_context(fault(site, host, begin(name), end(name)))
        return said(site, "--tags", "preflight", **more)


def test_what_measuring_finds(site: Site) -> None:
    """Four faults at once, each between another pair of hosts or of another kind: each gets its own line."""
    peer = site.fleet.address(THREE)
    # What host two sends to three goes to nobody: silence, as a firewall that drops.
    lost = f"ip neigh replace {peer} lladdr 02:00:00:00:00:99 dev {nic(site, TWO)} nud permanent"
    preload = (
        "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 FAKETIME=+45s FAKETIME_DONT_FAKE_MONOTONIC=1"
    )
    late = f"printf '#!/bin/sh\\n{preload} exec /usr/bin/python3 \"$@\"\\n' >/usr/local/bin/late; chmod +x /usr/local/bin/late"
    site.fleet.sh(
        ONE,
        f"test -e /usr/lib/x86_64-linux-gnu/faketime || (apt-get -qq update && apt-get -qq install libfaketime); {late}",
    )
    began = time.monotonic()
    with fault(site, TWO, lost, f"ip neigh del {peer} dev {nic(site, TWO)}"):
        text = said(
            site, "--tags", "preflight", each={ONE: {"ansible_python_interpreter": "/usr/local/bin/late"}},
            vllm_interconnect_min_mbps=10**7, vllm_interconnect_max_rtt_ms=0.0001,
        )  # fmt: skip
    assert time.monotonic() - began < 120
    silence = "no answer within the time limit: a firewall or a wrong route drops it"
    assert f"{TWO} cannot reach {THREE} at {peer}: {silence}" in text
    assert f"the clocks of {ONE} and {TWO} are 45 s apart (limit 5): let both follow one time server" in text
    assert re.search(rf"{ONE} sends \d+ Mb/s to {TWO} \(limit 1e\+07\): check cable, switch", text)
    assert re.search(rf"\d+\.\d ms from {ONE} to {TWO} and back \(limit 0.0001\)", text)


def test_packets_that_do_not_arrive_whole(site: Site) -> None:
    """Jumbo frames on the hosts, and a switch (here: the other end of the wire) without."""
    change = "ip link set {} mtu {}".format
    text = measured(site, lambda name: change(name, 9000), lambda name: change(name, 1500), (ONE, TWO, THREE))
    assert f"packets of the interface's own MTU do not arrive from {ONE} at {TWO}: a switch or tunnel" in text


def test_other_software_on_one_host(site: Site) -> None:
    site.fleet.sh(
        TWO,
        "mkdir -p /opt/other/site/torch-9.9.9.dist-info && cd /opt/other && "
        "printf 'Metadata-Version: 2.1\\nName: torch\\nVersion: 9.9.9\\n' >site/torch-9.9.9.dist-info/METADATA && "
        "printf '#!/bin/sh\\nPYTHONPATH=/opt/other/site exec /opt/engine/bin/python \"$@\"\\n' >python && chmod 755 python",
    )
    text = said(site, hosts=2, each={TWO: {"vllm_existing_python": "/opt/other/python"}})
    assert re.search(rf"service chat: torch is \S+ on {ONE} and 9.9.9 on {TWO}: install the same on both", text)


def test_engines_that_cannot_compute_together_are_named_within_a_minute(site: Site) -> None:
    """The network lets the measurement through and drops what the engines' library sends: as a firewall for ports does."""
    drop = (
        "command -v nft >/dev/null || (apt-get -qq update && apt-get -qq install nftables); "
        "nft 'table inet test { chain input { type filter hook input priority 0; tcp dport 29602 drop; }; }'"
    )
    with fault(site, ONE, drop, "nft delete table inet test"):
        began = time.monotonic()
        text = said(site, hosts=2, vllm_interconnect_timeout=20)
        seconds = time.monotonic() - began
    assert re.search(rf"{ONE}.*{TWO}", text)
    assert "29602" in text or "cannot" in text, text[-1500:]
    print({"figure": "hang of the all-reduce named", "seconds of the run": round(seconds, 1)})
