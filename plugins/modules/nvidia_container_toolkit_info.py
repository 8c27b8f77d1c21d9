#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: nvidia_container_toolkit_info
short_description: What the role nvidia_container_toolkit has to know of GPUs in containers on a host, in one task
version_added: 0.1.0
description:
  - GPUs and the driver, CDI specifications and the driver they were made for, packages, and Docker's part. Never changes anything.
options:
  note:
    description: File that says what a container was last seen to work with.
    type: path
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
  - baremetal.vllm.attributes.look
"""

EXAMPLES = r"""
- name: Look at the toolkit
  baremetal.vllm.nvidia_container_toolkit_info:
    packages: [nvidia-container-toolkit]
    note: /var/lib/baremetal/nvidia_container_toolkit.accepted
  register: toolkit
"""

RETURN = r"""
accepted:
  description: Content of O(note).
  returned: success
  type: str
daemon_json:
  description: C(runtimes) and C(features) of Docker's settings.
  returned: success
  type: dict
docker:
  description: Version of Docker Engine, empty without one.
  returned: success
  type: str
driver:
  description: Version of the loaded driver, empty without one.
  returned: success
  type: str
files:
  description: SHA-256 of each of O(files), empty where it is missing.
  returned: success
  type: dict
foreign_sources:
  description: Package sources of somebody else's making that name the toolkit's repository.
  returned: success
  type: list
  elements: str
gpus:
  description: Number of NVIDIA's display controllers, without those that are given to virtual machines.
  returned: success
  type: int
held:
  description: Those of O(packages) that updates leave alone.
  returned: success
  type: list
  elements: str
packages:
  description: Version of each of O(packages) that is installed.
  returned: success
  type: dict
  sample: {nvidia-container-toolkit: 1.20.0-1}
refresh:
  description: Whether the toolkit's own unit keeps a specification up to date.
  returned: success
  type: bool
specs:
  description: The C(driver) that each CDI specification of NVIDIA's GPUs was made for, and whether its MIG C(slices) are those here.
  returned: success
  type: dict
"""

import glob
import re

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import (
    daemon_json,
    foreign_sources,
    held,
    loaded_driver,
    nvidia_devices,
    output,
    packages,
    read,
    sha256,
)

SPECS = ("/etc/cdi", "/var/run/cdi")
CAPABILITIES = "/proc/driver/nvidia/capabilities/gpu*/mig"
OWN = "baremetal-nvidia-container-toolkit"


def spec_version(text):
    """The driver that a CDI specification was made for: the version of the libcuda that it mounts."""
    found = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", text)
    return found.group(1) if found else ""


def slices():
    """Device files of the MIG slices that there are: of their GPU instances, and of the compute instances in those."""
    found = [set(), set()]
    for kind, pattern in enumerate(("/gi*/access", "/gi*/ci*/access")):
        for path in glob.glob(CAPABILITIES + pattern):
            minor = re.search(r"DeviceFileMinor: (\d+)", read(path))
            found[kind].update(["/dev/nvidia-caps/nvidia-cap" + minor.group(1)] if minor else [])
    return found


def of_these_slices(text):
    """Whether a specification has every compute instance that there is, and no device file of one that has gone."""
    instances, computes = slices()
    named = set(re.findall(r"/dev/nvidia-caps/nvidia-cap\d+", text))
    return computes <= named <= instances | computes


def specs():
    """{file: {driver, slices}} of the CDI specifications that name NVIDIA's GPUs."""
    found = {}
    for folder in SPECS:
        for path in sorted(glob.glob(folder + "/*")):
            text = read(path) if path.endswith((".yaml", ".json")) else ""
            if re.search(r"""kind["']?:\s*["']?nvidia\.com/gpu["']?""", text):
                found[path] = {"driver": spec_version(text), "slices": of_these_slices(text)}
    return found


def look(asked):
    docker = re.search(r"version ([0-9][0-9.]*)", output("dockerd", "--version"))
    options = daemon_json()["options"]  # the role docker says where it is wrong
    installed = packages()
    return {
        # One that is given to a virtual machine is nothing that containers see.
        "gpus": len([gpu for gpu in nvidia_devices()[0] if not gpu["driver"].endswith("vfio-pci")]),
        "driver": loaded_driver()[0],
        "specs": specs(),
        "refresh": "enabled" in output("systemctl", "is-enabled", "nvidia-cdi-refresh.path"),
        "packages": {name: installed[name] for name in asked["packages"] if name in installed},
        "held": [name for name in held() if name in asked["packages"]],
        # dnf has no quarrel with two of them.
        "foreign_sources": [path for path in foreign_sources("/libnvidia-container", OWN) if "/apt/" in path],
        "docker": docker.group(1) if docker else "",
        "daemon_json": {key: options[key] for key in ("runtimes", "features") if isinstance(options.get(key), dict)},
        "accepted": read(asked["note"]).strip(),
        "files": {path: sha256(path) for path in asked["files"]},
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "note": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **look(module.params))


if __name__ == "__main__":
    main()
