# SPDX-License-Identifier: GPL-3.0-or-later
"""interconnect_firewall with stand-ins for ufw and firewall-cmd, which take and show rules as the real ones do.

The real ones: tests/cluster/test_firewalls.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import interconnect_firewall

STANDIN = """#!/usr/bin/env python3
import json, sys
path, args = {path!r}, sys.argv[1:]
state = json.load(open(path))
def end(code, text=""):
    json.dump(state, open(path, "w"))
    print(text, file=sys.stderr if code else sys.stdout)
    sys.exit(code)
"""
UFW = """
rules = state["rules"]
if args == ["status"]:
    end(0, "Status: " + ("active" if state["active"] else "inactive"))
if args == ["show", "added"]:
    end(0, "Added user rules (see 'ufw status' for running firewall):\\n" + "\\n".join(rules))
if args[0] == "allow" and args[-2] == "comment" and args[1] == "from" and args[3:6] == ["to", "any", "port"]:
    assert len(args[6].replace(":", ",").split(",")) <= 15, "ERROR: Bad port"
    rules.append("ufw %s comment '%s'" % (" ".join(args[:-2]), args[-1]))
    end(0, "Rule added")
if args[:2] == ["--force", "delete"]:
    found = [rule for rule in rules if rule.split(" comment ")[0] == "ufw " + " ".join(args[2:])]
    rules.remove(found[0]) if found else end(1, "Could not delete non-existent rule")
    end(0, "Rule deleted")
end(1, "ERROR: Invalid syntax")
"""
FIREWALLD = """
if args == ["--state"]:
    end(0 if state["active"] else 252, "running" if state["active"] else "not running")
if not state["active"]:
    end(252, "FirewallD is not running")
if args == ["--get-default-zone"]:
    end(0, "public")
if args[0].startswith("--get-zone-of-interface="):
    end(*((0, "trusted") if args[0].endswith("=eth1") else (2, "no zone")))
kind = "permanent" if args[0] == "--permanent" else "runtime"
args = [word for word in args if word != "--permanent"]
zones = state[kind]
if args == ["--list-all-zones"]:
    end(0, "\\n".join("%s (active)\\n  target: default\\n  rich rules: \\n%s" % (zone, "".join("\\t%s\\n" % rule for rule in rules))
                      for zone, rules in zones.items()))
zone = args[0].partition("--zone=")[2]
what, rule = args[1].split("-rich-rule=", 1)
zones[zone].append(rule) if what == "--add" else zones[zone].remove(rule)
end(0, "success")
"""
PORTS = ["6379", "6380", "6381", "10002-10201", "10202-10401", "32768-60999"]
OWN = ["ufw allow 22/tcp", "ufw deny from 10.0.0.9 to any port 22 proto tcp comment 'mine'"]
MINE = 'rule family="ipv4" source address="10.0.0.9" drop'


class Managers:
    def __init__(self, folder: Path, run: Callable[..., dict[str, Any]]) -> None:
        self.folder, self.run = folder, run
        (folder / "bin").mkdir()
        self.put("ufw", {"active": True, "rules": [*OWN]})
        zones = {"public": [MINE], "trusted": []}
        self.put("firewall-cmd", {"active": True, "permanent": zones, "runtime": {**zones, "public": [MINE]}})

    def put(self, name: str, state: dict[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(state))
        program = self.folder / "bin" / name
        program.write_text(STANDIN.format(path=str(self.folder / name)) + {"ufw": UFW}.get(name, FIREWALLD))
        program.chmod(0o755)

    def state(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.folder / name).read_text()))

    def set(self, manager: str, *addresses: str, check: bool = False, ports: list[str] = PORTS) -> dict[str, Any]:
        words = {"manager": manager, "addresses": list(addresses), "ports": ports, "interfaces": ["eth0", "eth1"]}
        return self.run(interconnect_firewall, check, **words)


@pytest.fixture
def managers(run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Managers:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return Managers(tmp_path, run_module)


def test_ufw(managers: Managers) -> None:
    line = "ufw allow from %s to any port 6379:6381,10002:10401,32768:60999 proto tcp comment 'baremetal.vllm'"
    before = managers.state("ufw")
    result = managers.set("ufw", "10.0.0.2", check=True)
    assert result["changed"] and result["diff"] == {"before": "", "after": line % "10.0.0.2" + "\n"}
    assert managers.state("ufw") == before
    assert managers.set("ufw", "10.0.0.2", "fd00::3")["changed"]
    assert managers.state("ufw")["rules"] == [*OWN, line % "10.0.0.2", line % "fd00::3"]
    assert not managers.set("ufw", "10.0.0.2", "fd00::3")["changed"]
    assert managers.set("ufw", "fd00::3")["changed"]
    assert managers.state("ufw")["rules"] == [*OWN, line % "fd00::3"]
    assert managers.set("none")["changed"]
    assert managers.state("ufw") == before


def test_more_ranges_than_one_rule_of_ufw_takes(managers: Managers) -> None:
    ports = [f"{first}-{first + 3}" for first in range(1000, 10000, 1000)]
    assert len(managers.set("ufw", "10.0.0.2", ports=ports)["rules"]) == 2
    assert not managers.set("ufw", "10.0.0.2", ports=ports)["changed"]


def test_firewalld(managers: Managers) -> None:
    before = managers.state("firewall-cmd")
    result = managers.set("firewalld", "10.0.0.2", check=True)
    assert result["changed"] and managers.state("firewall-cmd") == before
    assert managers.set("firewalld", "10.0.0.2", "fd00::3")["changed"]
    after = managers.state("firewall-cmd")
    rule = 'rule priority="-29600" family="%s" source address="%s" port port="%s" protocol="tcp" accept'
    wanted = [
        rule % (family, address, ports)
        for family, address in (("ipv4", "10.0.0.2"), ("ipv6", "fd00::3"))
        for ports in ("6379-6381", "10002-10401", "32768-60999")
    ]
    for kind in ("permanent", "runtime"):
        assert after[kind] == {"public": [MINE, *wanted], "trusted": wanted}
    assert not managers.set("firewalld", "10.0.0.2", "fd00::3")["changed"]
    assert managers.set("firewalld", "fd00::3")["changed"]
    assert managers.set("none")["changed"]
    assert managers.state("firewall-cmd") == before


def test_the_other_manager_gets_its_rules_back(managers: Managers) -> None:
    managers.set("ufw", "10.0.0.2")
    managers.set("firewalld", "10.0.0.2")
    assert managers.state("ufw")["rules"] == OWN
    assert "-29600" in str(managers.state("firewall-cmd"))


def test_a_manager_that_does_not_run(managers: Managers) -> None:
    for manager, name in (("ufw", "ufw"), ("firewalld", "firewall-cmd")):
        managers.put(name, {**managers.state(name), "active": False})
        assert managers.set(manager, "10.0.0.2")["msg"].startswith(f"the firewall manager {manager} is not active: ")
    assert not managers.set("none")["changed"]
    for manager, name in (("ufw", "ufw"), ("firewalld", "firewall-cmd")):
        (managers.folder / "bin" / name).unlink()
        text = managers.set(manager, "10.0.0.2")["msg"]
        assert "is not on the host: " in text and "or choose another one with vllm_interconnect_firewall" in text


def test_a_port_that_is_none(managers: Managers) -> None:
    message = "ports has 80:90: give a port, or a range such as 10002-10201"
    assert managers.set("ufw", "10.0.0.2", ports=["80", "80:90"])["msg"] == message
