#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: nvidia_driver_release
short_description: Stop what uses the GPUs and unload the modules of the driver
version_added: 0.1.0
description:
  - Stops units, containers and processes, and removes the modules from the kernel as far as they are free then.
options:
  users:
    description: What uses the GPUs, as M(baremetal.vllm.nvidia_driver_info) tells it.
    type: list
    elements: dict
    default: []
  units:
    description: Daemons of the driver itself, which are stopped in any case.
    type: list
    elements: str
    default: []
  stop:
    description: Consent to stop O(users).
    type: bool
    default: false
  seconds:
    description: How long a process may take to end before it is killed.
    type: int
    default: 30
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Does nothing in check mode.
    support: full
"""

EXAMPLES = r"""
- name: Free the GPUs
  baremetal.vllm.nvidia_driver_release:
    users: "{{ driver.users }}"
    units: [nvidia-persistenced.service]
    stop: true
  register: released
"""

RETURN = r"""
loaded:
  description: Modules that are still loaded.
  returned: success
  type: list
  elements: str
problems:
  description: One line for each unit, container or process that could not be stopped.
  returned: success
  type: list
  elements: str
stopped:
  description: C(kind) (unit, container or process) and C(name) of what was stopped.
  returned: success
  type: list
  elements: dict
"""

import os
import signal
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import run

MODULES = "/sys/module"
PROC = "/proc"
# In the order in which they let go of each other.
ORDER = ("nv_peer_mem", "nvidia_fs", "gdrdrv", "nvidia_peermem", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia")


def alive(pid):
    """Whether a process is still there and no zombie."""
    try:
        with open("%s/%d/stat" % (PROC, pid), encoding="utf-8") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def end(pid, seconds):
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, sign)
        except OSError:
            return
        until = time.time() + seconds
        while alive(pid) and time.time() < until:
            time.sleep(0.2)
        if not alive(pid):
            return


def release(asked):
    stopped, problems = [], []
    wanted = [("unit", name) for name in asked["units"]]
    if asked["stop"]:
        for user in asked["users"]:
            kind = "unit" if user["unit"] else "container" if user["container"] else "process"
            wanted.append((kind, user["unit"] or user["container"] or user["pid"]))
    for kind, name in dict.fromkeys(wanted):
        if kind == "unit":
            if run("systemctl", "is-active", "--quiet", name)[0] != 0:
                continue
            status, text = run("systemctl", "stop", name, timeout=300)
        elif kind == "container":
            status, text = run("docker", "stop", name, timeout=300)
        else:
            end(name, asked["seconds"])
            status, text = int(alive(name)), "it does not end"
        if status == 0:
            stopped.append({"kind": kind, "name": name})
        else:
            problems.append("%s %s: %s" % (kind, name, text.strip()))
    for name in ORDER:
        if os.path.isdir(os.path.join(MODULES, name)):
            run("rmmod", name)
    left = [name for name in ORDER if os.path.isdir(os.path.join(MODULES, name))]
    return {"stopped": stopped, "problems": problems, "loaded": left}


def main():
    module = AnsibleModule(
        argument_spec={
            "users": {"type": "list", "elements": "dict", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
            "stop": {"type": "bool", "default": False},
            "seconds": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, stopped=[], problems=[], loaded=[])
    result = release(module.params)
    module.exit_json(changed=bool(result["stopped"]), **result)


if __name__ == "__main__":
    main()
