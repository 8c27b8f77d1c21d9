#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: selinux_nginx
short_description: Have SELinux let nginx listen on some ports and connect to servers
version_added: 0.1.0
description:
  - Gives ports that belong to no other service the type C(http_port_t), and notes which, so that they are taken back when they
    are no longer asked for. A port that has the type already is left alone, then too.
  - Switches on the boolean C(httpd_can_network_connect), for good. It stays on, since other servers of the host may need it by then.
  - Does nothing where SELinux is off or not there.
options:
  ports:
    description: TCP ports that nginx is to listen on.
    type: list
    elements: int
    default: []
  connect:
    description: Whether nginx has to connect to servers.
    type: bool
    default: false
  take_back:
    description: Whether ports that are no longer asked for are taken back. Not before nginx has left them.
    type: bool
    default: true
  record:
    description: File that holds which ports were added here. It goes with the last of them.
    type: path
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says what would be done, and which ports cannot be had.
    support: full
"""

EXAMPLES = r"""
- name: Let the proxy listen and connect
  baremetal.vllm.selinux_nginx:
    ports: [8443, 8444]
    connect: true
    record: /etc/vllm-proxy/selinux_ports
"""

RETURN = r"""
problems:
  description:
    - One line for each port that belongs to another service, with the way out, where SELinux is enforcing. A failure but in check mode.
  returned: success
  type: list
  elements: str
semanage:
  description: Whether C(semanage) is there. Without it the ports are not looked at.
  returned: success
  type: bool
todo:
  description: Commands that were run, or would be. The name of the program alone where it has to be there first.
  returned: success
  type: list
  elements: str
  sample: [semanage port -a -t http_port_t -p tcp 8444]
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule

TYPE = "http_port_t"
# What nginx (the domain httpd_t) may listen on.
ALLOWED = (TYPE, "http_cache_port_t")
# What ports have that belong to no service.
FREE = ("port_t", "unreserved_port_t", "reserved_port_t", "hi_reserved_port_t", "ephemeral_port_t")
BOOLEAN = "httpd_can_network_connect"


class Selinux:
    def __init__(self, module):
        self.module = module

    def run(self, *command, **options):
        program = self.module.get_bin_path(command[0], required=True)
        return self.module.run_command([program] + list(command[1:]), **options)

    def mode(self):
        """As getenforce says it."""
        if not self.module.get_bin_path("getenforce"):
            return "Disabled"
        return self.run("getenforce")[1].strip()

    def may_connect(self):
        # Not only where it says on: a policy without the boolean has none to set.
        return "--> off" not in self.run("getsebool", BOOLEAN)[1]

    def ports(self, *local):
        """Rows of (first port, last port, type) for TCP, as semanage lists them: its own first, or with -C only these."""
        found = []
        for line in self.run("semanage", "port", "-l", "-n", *local, check_rc=True)[1].splitlines():
            cells = line.split(None, 2)
            if len(cells) == 3 and cells[1] == "tcp":
                for text in cells[2].split(","):
                    first, dummy, last = text.strip().partition("-")
                    found.append((int(first), int(last or first), cells[0]))
        return found


def owner(port, local, policy):
    """The row that decides what type a port has: what was set on this host, then the narrowest one of the policy."""
    for rows in (local, policy):
        about = [row for row in rows if row[0] <= port <= row[1]]
        if about:
            return min(about, key=lambda row: row[1] - row[0])
    return (port, port, "port_t")


def recorded(path):
    try:
        with open(path) as handle:
            return json.load(handle)
    except (IOError, OSError):
        return []


def keep(path, ports):
    if ports:
        with open(path, "w") as handle:
            json.dump(sorted(ports), handle)
    elif os.path.exists(path):
        os.remove(path)


def main():
    module = AnsibleModule(
        argument_spec={
            "ports": {"type": "list", "elements": "int", "default": []},
            "connect": {"type": "bool", "default": False},
            "take_back": {"type": "bool", "default": True},
            "record": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    params, selinux = module.params, Selinux(module)
    mode = selinux.mode()
    if mode not in ("Enforcing", "Permissive"):
        module.exit_json(changed=False, problems=[], semanage=False, todo=[])
    wanted, own = set(params["ports"]), set(recorded(params["record"]))
    gone = own - wanted if params["take_back"] else set()
    add, remove, problems, todo = [], [], [], []
    if params["connect"] and not selinux.may_connect():
        todo.append(["setsebool", "-P", BOOLEAN, "on"])
    semanage = bool(module.get_bin_path("semanage"))
    if semanage:
        local, policy = selinux.ports("-C"), selinux.ports()
        for port in sorted(wanted):
            first, last, kind = owner(port, local, policy)
            if kind in FREE:
                add.append(port)
            elif kind not in ALLOWED and mode == "Enforcing":
                problems.append(
                    "SELinux keeps port %d of the proxy for %s, and nginx from it: take another proxy_port, or give it to nginx with "
                    "semanage port %s -t %s -p tcp %d" % (port, kind, "-m" if first == last else "-a", TYPE, port)
                )
        remove = [port for port in sorted(gone) if (port, port, TYPE) in local]
        todo += [["semanage", "port", "-a", "-t", TYPE, "-p", "tcp", str(port)] for port in add]
        todo += [["semanage", "port", "-d", "-p", "tcp", str(port)] for port in remove]
    elif wanted:
        todo.append(["semanage"])
    elif own:
        module.warn("semanage is not there any more: SELinux goes on to let nginx listen on %s" % sorted(own))
    if not module.check_mode:
        if problems:
            module.fail_json(msg="\n".join(problems))
        if ["semanage"] in todo:
            module.fail_json(msg="semanage is not there: install policycoreutils-python-utils")
        # Noted first: a run that is cut off leaves none that nobody takes back.
        if add:
            keep(params["record"], own | set(add))
        for command in todo:
            selinux.run(*command, check_rc=True)
        if semanage and gone:
            keep(params["record"], (own - gone) | set(add))
    module.exit_json(
        changed=bool(todo), problems=problems, semanage=semanage, todo=[" ".join(command) for command in todo]
    )


if __name__ == "__main__":
    main()
