#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: nginx_unit
short_description: Start, reload or restart an nginx under systemd, and prove that it took its settings
version_added: 0.1.0
description:
  - A reload that nginx refuses ends as one that it takes, as it is a signal. nginx then serves what it had, on the addresses that it had.
  - So this waits until the service listens on the planned addresses and on no others, and after a reload until its workers are
    new ones. Where that does not come, it fails with what nginx said.
options:
  unit:
    description: Name of the unit. Its main process is nginx.
    type: str
    required: true
  bind:
    description: Address, or name of one, that it listens on.
    type: str
    required: true
  ports:
    description: Ports that it listens on.
    type: list
    elements: int
    required: true
  state:
    description:
      - V(started) starts it where it does not listen as planned.
      - V(reloaded) and V(restarted) always do so. One that does not run is started.
    type: str
    choices: [started, reloaded, restarted]
    default: started
  settings:
    description: Files that its workers have read at their start. One that was written since has still to be taken.
    type: list
    elements: path
    default: []
  timeout:
    description: Seconds to wait when systemd has done its part.
    type: int
    default: 30
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Looks at the service only, and says whether anything would be done.
    support: full
"""

EXAMPLES = r"""
- name: Have the proxy take its settings
  baremetal.vllm.nginx_unit:
    unit: vllm-proxy
    bind: 127.0.0.1
    ports: [8443]
    state: reloaded
"""

RETURN = r"""
listening:
  description: Addresses that the service listens on.
  returned: success
  type: list
  elements: str
  sample: ["0.0.0.0:8443"]
outdated:
  description: Those of O(settings) that were written after its workers had started, as by a run that ended before it told nginx.
  returned: success
  type: list
  elements: str
rebind:
  description:
    - Whether it listens on a planned port at another address. nginx opens the new address before it leaves the old one, and where
      one of the two is all addresses, the system refuses that. It takes a restart.
  returned: success
  type: bool
serving:
  description: Whether it listens on the planned addresses, on no others, and none of its settings is outdated.
  returned: success
  type: bool
"""

import glob
import os
import re
import socket
import struct
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import listening_sockets, read

COMMANDS = {"started": "start", "reloaded": "reload-or-restart", "restarted": "restart"}
SEVERE = re.compile(r"\[(?:emerg|alert|crit|error)\] .*")


def planned(bind, ports):
    """Pairs of address and port."""
    found = socket.getaddrinfo(bind, None, 0, socket.SOCK_STREAM)
    return {(one[4][0], port) for one in found for port in ports}


def address(text):
    """An address as /proc/net/tcp and tcp6 write it: words of 32 bits, each in the order of the machine."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack("=%dI" % len(words), *words))


def listening(pid):
    """Pairs of address and port that a process listens on."""
    inodes = set()
    for link in glob.glob("/proc/%d/fd/*" % pid):
        try:
            match = re.match(r"socket:\[(\d+)\]$", os.readlink(link))
        except OSError:
            continue  # closed by now
        if match:
            inodes.add(match.group(1))
    return {(address(text), port) for text, port, inode in listening_sockets(pid) if inode in inodes}


def workers(pid):
    """Ids of its workers that take requests, so of none that only finishes what it has begun."""
    found = set()
    for path in glob.glob("/proc/[0-9]*/stat"):
        # Behind the name, which may hold anything, come the state and the parent.
        if read(path).rpartition(")")[2].split()[1:2] == [str(pid)]:
            child = path.split("/")[2]
            title = read("/proc/%s/cmdline" % child)
            if title.startswith("nginx: worker process") and "shutting down" not in title:
                found.add(int(child))
    return found


def started(pid):
    """Time at which a process has started, in seconds since 1970."""
    ticks = int(read("/proc/%d/stat" % pid).rpartition(")")[2].split()[19])
    return time.time() - float(read("/proc/uptime").split()[0]) + ticks / float(os.sysconf("SC_CLK_TCK"))


def outdated(pid, paths):
    """Files written after the last worker had started. A second is more than these clocks are apart; what is of the future comes of a
    clock that was set back, and says nothing."""
    try:
        since = max(started(worker) for worker in workers(pid))
    except (ValueError, IndexError):  # none is there, or it has gone
        return []
    return [path for path in paths if os.path.exists(path) and since + 1 < os.path.getmtime(path) < time.time()]


def told(addresses):
    return sorted("%s:%d" % ("[%s]" % name if ":" in name else name, port) for name, port in addresses)


class Unit:
    def __init__(self, module):
        self.module, self.name = module, module.params["unit"]
        self.systemctl = module.get_bin_path("systemctl", required=True)

    def pid(self):
        output = self.module.run_command([self.systemctl, "show", "--property=MainPID", "--value", self.name])[1]
        return int(output.strip() or 0)

    def held(self):
        pid = self.pid()
        return listening(pid) if pid else set()

    def order(self, command, wanted):
        """Gives systemd the command, and returns when nginx has taken its settings."""
        pid, start = self.pid(), time.time()
        before = workers(pid) if pid and command == "reload-or-restart" else set()
        code, dummy, error = self.module.run_command([self.systemctl, command, self.name])
        # A restart itself takes as long as the streams that are under way, or as the unit leaves them.
        until = time.time() + self.module.params["timeout"]
        while not code:
            pid = self.pid()
            now = workers(pid) if pid else set()
            if now and not now & before and listening(pid) == wanted:
                return
            if time.time() > until:
                break
            time.sleep(0.1)
        self.module.fail_json(
            msg="%s did not take its settings at systemctl %s. It listens on %s, and should on %s. %s"
            % (
                self.name,
                command,
                ", ".join(told(self.held())) or "nothing",
                ", ".join(told(wanted)),
                self.said(start) or error.strip() or "Its journal says nothing",
            )
        )

    def said(self, since):
        """What nginx has written since then: where it failed, or the last lines."""
        journal = self.module.get_bin_path("journalctl", required=True)
        command = [journal, "--unit", self.name, "--since", "@%d" % since, "--output=cat", "--no-pager"]
        lines = self.module.run_command(command)[1].splitlines()
        severe = []
        for match in filter(None, map(SEVERE.search, lines)):
            # Without its process, so that five attempts are one line.
            line = re.sub(r"\d+#\d+: ", "", match.group())
            if line not in severe:
                severe.append(line)
        return "nginx says: " + "; ".join(severe[:5] or lines[-5:]) if lines else ""


def main():
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "bind": {"type": "str", "required": True},
            "ports": {"type": "list", "elements": "int", "required": True},
            "state": {"type": "str", "choices": ["started", "reloaded", "restarted"], "default": "started"},
            "settings": {"type": "list", "elements": "path", "default": []},
            "timeout": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        wanted = planned(params["bind"], params["ports"])
    except socket.gaierror as error:
        module.fail_json(msg="bind is %r, which is no address: %s" % (params["bind"], error.strerror))
    unit = Unit(module)
    held, pid = unit.held(), unit.pid()
    behind = outdated(pid, params["settings"]) if pid else []
    changed = params["state"] != "started" or held != wanted
    if changed and not module.check_mode:
        unit.order(COMMANDS[params["state"]], wanted)
        held, behind = wanted, []
    module.exit_json(
        changed=changed,
        listening=told(held),
        outdated=behind,
        rebind=bool({port for dummy, port in held - wanted} & {port for dummy, port in wanted - held}),
        serving=held == wanted and not behind,
    )


if __name__ == "__main__":
    main()
