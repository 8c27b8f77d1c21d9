# SPDX-License-Identifier: GPL-3.0-or-later
"""Real firewall managers: ufw on one host, firewalld on another. A member of a cluster gets in, a stranger does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fleet import ROOT, Fleet, docker, until

PLAY = ROOT / "tests/cluster/firewall.yml"
LISTEN = """
import socketserver, threading
for port in (6380, 10100, 5555):
    threading.Thread(target=socketserver.TCPServer(("", port), socketserver.BaseRequestHandler).serve_forever).start()
"""
REACH = """
import socket, sys
for port in (22, 5555, 6380, 10100):
    try:
        socket.create_connection((sys.argv[1], port), 1)
        print(port)
    except OSError:
        pass
"""
BEGIN = {
    # What the owner of each host has set: SSH from everywhere, a port of their own for everybody.
    "ufw": "apt-get -qq install -y --no-install-recommends ufw && ufw allow 22/tcp && ufw allow 5555/tcp && ufw --force enable",
    "firewalld": "apt-get -qq install -y --no-install-recommends firewalld netbase && systemctl start firewalld"
    " && firewall-cmd --permanent --add-port=5555/tcp && firewall-cmd --add-port=5555/tcp && firewall-cmd --add-port=5556/udp",
}
SHOW = {
    "ufw": "ufw show added",
    "firewalld": "firewall-cmd --list-all-zones; firewall-cmd --permanent --list-all-zones",
}


class Hosts:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.host = dict(zip(BEGIN, fleet.names, strict=False))
        self.member, self.stranger = fleet.names[2:]

    def play(self, manager: str, *words: str, change: str = "", fail: bool = False, **more: Any) -> tuple[str, int]:
        host = self.host[manager]
        variables = {"addresses": [self.fleet.address(self.member)], "interfaces": ["eth1"], **more}
        output, changed = self.fleet.play(PLAY, [host], *words, fail=fail, manager=change or manager, **variables)
        return output, changed.get(host, 0)

    def reached(self, manager: str, source: str) -> list[int]:
        address = self.fleet.address(self.host[manager])
        return [int(port) for port in docker("exec", "-i", source, "python3", "-", address, text=REACH).split()]

    def rules(self, manager: str) -> str:
        return self.fleet.sh(self.host[manager], SHOW[manager])


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Fleet("walltest", 86, 4) as fleet:
        found = Hosts(fleet)
        for manager, host in found.host.items():
            script = f"export DEBIAN_FRONTEND=noninteractive; (apt-get -qq update && {BEGIN[manager]}) >/tmp/out 2>&1 </dev/null"
            fleet.sh(host, f"{script} || {{ cat /tmp/out; exit 1; }}")
            docker("exec", "--detach", host, "python3", "-c", LISTEN)
        yield found


@pytest.mark.parametrize("manager", list(BEGIN))
def test_members_come_in_and_nothing_else_changes(hosts: Hosts, manager: str) -> None:
    until(lambda: hosts.reached(manager, hosts.stranger) == [22, 5555], 20, "the owner's own rules")
    assert hosts.reached(manager, hosts.member) == [22, 5555]
    owner = hosts.rules(manager)

    output, changed = hosts.play(manager, "--check", "--diff")
    member = hosts.fleet.address(hosts.member)
    line = {"ufw": f"+ufw allow from {member} to any port 6379:6380,", "firewalld": "+permanent public: "}
    assert changed == 1 and line[manager] in output
    assert hosts.rules(manager) == owner, "check mode changes nothing"

    assert hosts.play(manager)[1] == 1
    assert hosts.reached(manager, hosts.member) == [22, 5555, 6380, 10100]
    assert hosts.reached(manager, hosts.stranger) == [22, 5555]
    assert hosts.play(manager)[1] == 0

    # Another member in its place; the one before is a stranger now.
    assert hosts.play(manager, addresses=[hosts.fleet.address(hosts.stranger)])[1] == 1
    assert hosts.reached(manager, hosts.stranger) == [22, 5555, 6380, 10100]
    assert hosts.reached(manager, hosts.member) == [22, 5555]

    assert hosts.play(manager, change="none")[1] == 1
    assert hosts.rules(manager) == owner, "what the owner had set is as it was, also what was set for now only"
    assert hosts.reached(manager, hosts.stranger) == [22, 5555]
    assert hosts.play(manager, change="none")[1] == 0


@pytest.mark.parametrize("manager", list(BEGIN))
def test_rules_outlive_a_boot(hosts: Hosts, manager: str) -> None:
    hosts.play(manager)
    hosts.fleet.sh(hosts.host[manager], f"systemctl restart {manager}")
    docker("exec", "--detach", hosts.host[manager], "python3", "-c", LISTEN)
    until(lambda: hosts.reached(manager, hosts.member) == [22, 5555, 6380, 10100], 20, "the rules")
    assert hosts.reached(manager, hosts.stranger) == [22, 5555]
    assert hosts.play(manager)[1] == 0


def test_a_manager_that_is_not_there_is_refused(hosts: Hosts) -> None:
    output, _ = hosts.play("ufw", change="firewalld", fail=True)
    assert "the firewall manager firewalld is not on the host: install and start it" in " ".join(output.split())
    hosts.fleet.sh(hosts.host["ufw"], "ufw --force disable")
    output, _ = hosts.play("ufw", fail=True)
    assert "the firewall manager ufw is not active: let ssh in and switch it on" in " ".join(output.split())
