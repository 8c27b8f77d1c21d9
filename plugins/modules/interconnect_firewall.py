#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: interconnect_firewall
short_description: Let the hosts of a cluster in through the firewall manager of a host
version_added: 0.1.0
description:
  - Adds rules to ufw or firewalld that let some addresses reach some TCP ports, and takes away those of an earlier run. All other
    rules are left alone, and nothing is reloaded, so that rules which were only made for now stay, too.
  - Its rules are known by their comment (ufw) or by their priority (firewalld).
  - It opens and does not close. What closes the ports to all others is a table of nftables that the role C(vllm) writes.
options:
  manager:
    description:
      - The manager whose rules let the addresses in. Rules of an earlier run in the other one are taken away.
      - V(none) takes away the rules in both.
    type: str
    choices: [none, ufw, firewalld]
    required: true
  addresses:
    description: Addresses that are let in.
    type: list
    elements: str
    default: []
  ports:
    description: Ports, and ranges such as V(10002-10201).
    type: list
    elements: str
    default: []
  interfaces:
    description: With firewalld, the rules are those of the zones of these interfaces.
    type: list
    elements: str
    default: []
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether rules would change, and that the manager is not there.
    support: full
  diff_mode:
    description: Shows the rules.
    support: full
"""

EXAMPLES = r"""
- name: Let the other hosts in
  baremetal.vllm.interconnect_firewall:
    manager: ufw
    addresses: [10.0.0.11, 10.0.0.12]
    ports: [6379-6387, 10002-10201, 32768-60999]
"""

RETURN = r"""
current:
  description: The rules were there already, and no others of this module.
  returned: success
  type: bool
rules:
  description: The rules of this module, as the manager shows them.
  returned: success
  type: list
  elements: str
"""

import re

from ansible.module_utils.basic import AnsibleModule

MARK = "baremetal.vllm"  # the comment of ufw's rules
PRIORITY = -29600  # of firewalld's rules: the first port of executor mp
MULTIPORT = 7  # ranges in one rule of ufw: iptables takes 15 ports, and a range counts twice
WAY_OUT = {
    "ufw": "let ssh in and switch it on (ufw allow ssh; ufw enable)",
    "firewalld": "install and start it (systemctl enable --now firewalld)",
}


def ranges(ports):
    """Sorted pairs of the first and last port of each range, joined where they touch."""
    found = []
    for first, last in sorted([int(number) for number in (port.split("-") * 2)[:2]] for port in ports):
        if found and first <= found[-1][1] + 1:
            found[-1][1] = max(last, found[-1][1])
        else:
            found.append([first, last])
    return found


class Manager:
    """One firewall manager of the host: what it is asked, and the rules in it that are this module's."""

    program = ""

    def __init__(self, module):
        self.module = module
        self.path = module.get_bin_path(self.program)

    def call(self, *words, **options):
        """Output of the manager. A refusal ends the module, unless C(check) is false."""
        code, output, errors = self.module.run_command([self.path] + list(words), environ_update={"LC_ALL": "C"})
        if code != 0 and options.get("check", True):
            said = (errors.strip() or output.strip()).replace("\n", " ")
            self.module.fail_json(msg="%s %s: %s" % (self.program, " ".join(words), said))
        return output


class Ufw(Manager):
    """Rules are lines of C(ufw show added), which are commands."""

    program = "ufw"

    def active(self):
        return "Status: active" in self.call("status")

    def wanted(self, addresses, ports, dummy):
        joined = ["%d" % first if first == last else "%d:%d" % (first, last) for first, last in ranges(ports)]
        parts = [joined[start : start + MULTIPORT] for start in range(0, len(joined), MULTIPORT)]
        form = "ufw allow from %s to any port %s proto tcp comment '%s'"
        return [form % (address, ",".join(part), MARK) for address in addresses for part in parts]

    def found(self):
        return [line for line in self.call("show", "added").splitlines() if line.endswith("comment '%s'" % MARK)]

    def add(self, rule):
        self.call(*[word.strip("'") for word in rule.split()[1:]])

    def remove(self, rule):
        self.call("--force", "delete", *rule.split(" comment ")[0].split()[1:])


class Firewalld(Manager):
    """Rules are C(ZONE: RICH RULE), or C(permanent ZONE: RICH RULE)."""

    program = "firewall-cmd"

    def active(self):
        return self.call("--state", check=False).strip() == "running"

    def wanted(self, addresses, ports, interfaces):
        zones = {self.call("--get-zone-of-interface=" + name, check=False).strip() for name in interfaces} or {""}
        default = self.call("--get-default-zone").strip()
        rules = []
        for zone in sorted({zone or default for zone in zones}):
            for address in addresses:
                for first, last in ranges(ports):
                    rule = 'rule priority="%d" family="%s" source address="%s" port port="%s" protocol="tcp" accept' % (
                        PRIORITY,
                        "ipv6" if ":" in address else "ipv4",
                        address,
                        first if first == last else "%d-%d" % (first, last),
                    )
                    rules += ["%s: %s" % (zone, rule), "permanent %s: %s" % (zone, rule)]
        return rules

    def found(self):
        rules = []
        for prefix, words in (("", []), ("permanent ", ["--permanent"])):
            zone = ""
            for line in self.call(*(words + ["--list-all-zones"])).splitlines():
                if line and not line[0].isspace():
                    zone = line.split()[0]
                elif line.strip().startswith('rule priority="%d"' % PRIORITY):
                    rules.append("%s%s: %s" % (prefix, zone, line.strip()))
        return rules

    def change(self, rule, what):
        place, dummy, text = rule.partition(": ")
        words = place.split()
        self.call(*(["--permanent"] * (len(words) - 1) + ["--zone=" + words[-1], "--%s-rich-rule=%s" % (what, text)]))

    def add(self, rule):
        self.change(rule, "add")

    def remove(self, rule):
        self.change(rule, "remove")


def main():
    module = AnsibleModule(
        argument_spec={
            "manager": {"type": "str", "choices": ["none", "ufw", "firewalld"], "required": True},
            "addresses": {"type": "list", "elements": "str", "default": []},
            "ports": {"type": "list", "elements": "str", "default": []},
            "interfaces": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    params, before, after = module.params, [], []
    wrong = [port for port in params["ports"] if not re.match(r"\d{1,5}(-\d{1,5})?\Z", port)]
    if wrong:
        module.fail_json(msg="ports has %s: give a port, or a range such as 10002-10201" % ", ".join(wrong))
    changes = []
    for name, manager in (("ufw", Ufw(module)), ("firewalld", Firewalld(module))):
        chosen = name == params["manager"]
        active = bool(manager.path) and manager.active()
        if chosen and not active:
            module.fail_json(
                msg="the firewall manager %s is %s: %s, or choose another one with vllm_interconnect_firewall"
                % (name, "not active" if manager.path else "not on the host", WAY_OUT[name])
            )
        # ufw shows and changes its rules while it is off, firewalld does not.
        if not manager.path or not (active or name == "ufw"):
            continue
        found = manager.found()
        wanted = manager.wanted(params["addresses"], params["ports"], params["interfaces"]) if chosen else []
        changes += [(manager.add, rule) for rule in wanted if rule not in found]
        changes += [(manager.remove, rule) for rule in found if rule not in wanted]
        before, after = before + found, after + wanted
    if not module.check_mode:
        for change, rule in changes:
            change(rule)
    texts = ["".join("%s\n" % rule for rule in sorted(rules)) for rules in (before, after)]
    module.exit_json(
        changed=bool(changes), current=not changes, rules=after, diff={"before": texts[0], "after": texts[1]}
    )


if __name__ == "__main__":
    main()
