#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: nvidia_driver_info
short_description: What the role nvidia_driver has to know of driver, kernel and GPUs of a host, in one task
version_added: 0.1.0
description:
  - GPUs, the driver on disk, in DKMS and loaded, kernels with their compiler and headers, what uses the GPUs, and what is in the
    way of an installation. Never changes or loads anything.
options:
  kernel:
    description: Release that modules are built for, empty for the running one.
    type: str
    default: ""
  module:
    description: Name of the module's tree in DKMS.
    type: str
    default: nvidia
  foreign:
    description: Regular expression of the names of packages that bring a driver.
    type: str
    default: ^$
  units:
    description: Units whose state is wanted.
    type: list
    elements: str
    default: []
  folders:
    description: MiB that each folder needs.
    type: dict
    default: {}
  generations:
    description: First and last number of the devices of each generation, by its name.
    type: dict
    default: {}
  wish:
    description: What is asked for, which comes back as it is.
    type: dict
    default: {}
  smi_timeout:
    description: Seconds to wait for nvidia-smi, which hangs when a GPU is in trouble.
    type: int
    default: 60
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
  - baremetal.vllm.attributes.look
"""

EXAMPLES = r"""
- name: Look at the driver
  baremetal.vllm.nvidia_driver_info:
    foreign: ^nvidia-driver
    folders: {/usr: 1500}
  register: driver
"""

RETURN = r"""
alternate:
  description: Whether something else than the installer says that it owns the driver.
  returned: success
  type: bool
broken_dkms:
  description: Versions whose tree in DKMS leads to no source.
  returned: success
  type: list
  elements: str
compiler:
  description: C(text), C(command), C(path) and C(source) of the compiler that built the kernel.
  returned: success
  type: dict
dkms:
  description: C(module), C(version), C(kernel) and C(state) of what C(dkms status) prints.
  returned: success
  type: list
  elements: dict
files:
  description: SHA-256 of each of O(files), empty where it is missing.
  returned: success
  type: dict
foreign:
  description: Packages whose names match O(foreign), those that could not be set up included.
  returned: success
  type: list
  elements: str
generations:
  description: Numbers of the devices in RV(gpus) that belong to each of O(generations).
  returned: success
  type: dict
gpus:
  description: C(address), C(device_id) and C(driver) of each display controller of NVIDIA.
  returned: success
  type: list
  elements: dict
headers:
  description: Whether the kernel's headers are there.
  returned: success
  type: bool
held:
  description: Packages that updates leave alone.
  returned: success
  type: list
  elements: str
kernel:
  description: Release that modules are built for.
  returned: success
  type: str
loaded:
  description: C(version) and C(flavour) of the driver that runs, empty where none does.
  returned: success
  type: dict
module:
  description: C(version), C(flavour), C(path) and C(signer) of the module on disk for RV(kernel).
  returned: success
  type: dict
modules:
  description: How often each loaded module of the driver is in use.
  returned: success
  type: dict
next_headers:
  description: Whether the headers of RV(next_kernel) are there.
  returned: success
  type: bool
next_kernel:
  description: Release that the next boot takes.
  returned: success
  type: str
next_module:
  description: The module on disk for RV(next_kernel), where that is another than RV(kernel).
  returned: success
  type: dict
noexec:
  description: Those of O(folders) where nothing can be run.
  returned: success
  type: list
  elements: str
nvswitches:
  description: Number of NVSwitches, or of the devices by which those of NVLink 5 are managed.
  returned: success
  type: int
package_lists:
  description: Whether packages can be looked up already.
  returned: success
  type: bool
packages:
  description: Version of each of O(packages), of each kernel package and of each that O(foreign) matches, where it is installed.
  returned: success
  type: dict
  sample: {dkms: 3.0.10-8+deb12u1}
runfile_version:
  description: Version that an installer noted.
  returned: success
  type: str
running_kernel:
  description: Release of the kernel that runs.
  returned: success
  type: str
secure_boot:
  description: Whether only signed modules are let in.
  returned: success
  type: bool
short:
  description: One line for each of O(folders) that has less room than it needs.
  returned: success
  type: list
  elements: str
signing_key:
  description: C(key) and C(certificate) that DKMS signs with, and whether the firmware knows it (C(enrolled)).
  returned: success
  type: dict
smi:
  description: C(version) and number of C(gpus) that nvidia-smi tells, or its C(error).
  returned: success
  type: dict
unfinished:
  description: Those of RV(foreign) whose installation was begun and not ended.
  returned: success
  type: list
  elements: str
uninstaller:
  description: Path of nvidia-uninstall, empty where there is none.
  returned: success
  type: str
units:
  description: C(exists), C(active) and C(enabled) of each of O(units).
  returned: success
  type: dict
users:
  description: C(pid), C(command), C(unit) and C(container) of each process that holds a GPU. A container's unit is that of its name.
  returned: success
  type: list
  elements: dict
userspace:
  description: Version of the libraries.
  returned: success
  type: str
x_servers:
  description: Process ids of display servers.
  returned: success
  type: list
  elements: int
wish:
  description: O(wish).
  returned: success
  type: dict
"""

import glob
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import (
    held,
    link,
    loaded_driver,
    nvidia_devices,
    nvlink_switches,
    output,
    package_lists,
    package_states,
    read,
    run,
    sha256,
    signed_modules_only,
    which,
)

MODULES = "/sys/module"
PROC = "/proc"
NVSWITCH = "/proc/driver/nvidia-nvswitch/devices"
# Names of the module: everybody's, and those of Debian's packages.
NAMES = ("nvidia", "nvidia-current", "nvidia-current-open")
KERNELS = "/lib/modules"
BOOT = "/boot"
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
INSTALLER_LOG = "/var/lib/nvidia/log"
ALTERNATE = "/usr/lib/nvidia/alternate-install-present"
CONTAINER = r"(?:docker[-/]|cri-containerd-|libpod-)([0-9a-f]{64})"
# States of packages of which nothing but settings is left.
GONE = ("not-installed", "config-files")
KERNEL_PACKAGES = re.compile(r"linux-(headers|image)-|kernel(-core|-devel(-matched)?|-modules(-core|-extra)?)?$")
# One key a distribution: the pair that its dkms signs with.
KEYS = (
    ("/var/lib/shim-signed/mok/MOK.priv", "/var/lib/shim-signed/mok/MOK.der"),
    ("/var/lib/dkms/mok.key", "/var/lib/dkms/mok.pub"),
)


def loaded():
    """Version and flavour of the module that runs, {} where none does."""
    version, flavour = loaded_driver()
    if not version:
        version = read(os.path.join(MODULES, "nvidia/version")).strip()
        return {"version": version, "flavour": ""} if version else {}
    return {"version": version, "flavour": flavour}


def on_disk(kernel):
    """Version, flavour and path of the module built for a kernel, {} where there is none."""
    fields = {}
    for name in NAMES:
        for line in output("modinfo", "-k", kernel, name).splitlines():
            key, _colon, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        if fields.get("version"):
            break
    if not fields.get("version"):
        return {}
    return {
        "version": fields["version"],
        "flavour": "open" if "GPL" in fields.get("license", "") else "proprietary",
        "path": fields.get("filename", ""),
        "signer": fields.get("signer", ""),
    }


def dkms_rows(text, module):
    """[{version, kernel, state}] of what dkms status prints; both its old and its new separator of name and version."""
    rows = []
    for line in text.splitlines():
        found = re.match(r"(\S+?)(?:/|, )([^,:\s]+)(?:, ([^,]+), [^:]+)?: (\S+)", line.strip())
        if found and found.group(1) in (module, "nvidia-open") + NAMES:
            rows.append(
                {
                    "module": found.group(1),
                    "version": found.group(2),
                    "kernel": found.group(3) or "",
                    "state": found.group(4),
                }
            )
    return rows


def broken_dkms(module):
    """Versions whose tree is left below /var/lib/dkms without the source it points to: they break `dkms status`."""
    return sorted(
        os.path.basename(os.path.dirname(path))
        for path in glob.glob("/var/lib/dkms/%s/*/source" % module)
        if os.path.islink(path) and not os.path.exists(os.path.join(path, "dkms.conf"))
    )


def userspace():
    """Version of the libraries, by the file that libnvidia-ml.so.1 leads to."""
    for folder in LIBRARIES:
        found = re.match(r"libnvidia-ml\.so\.(\d+\.\d+(?:\.\d+)?)$", link(os.path.join(folder, "libnvidia-ml.so.1")))
        if found:
            return found.group(1)
    return ""


def smi(timeout):
    """What nvidia-smi says of the driver: {version, gpus, error}. A hang is an answer, too."""
    if not which("nvidia-smi"):
        return {"version": "", "gpus": 0, "error": "nvidia-smi is not there"}
    status, text = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", timeout=timeout)
    versions = re.findall(r"^\s*(\d+\.\d+(?:\.\d+)?)\s*$", text, re.M)
    if status in (0, 14) and versions:
        return {"version": versions[0], "gpus": len(versions), "error": ""}
    error = "no answer within %d seconds" % timeout if status is None else text.strip() or "exit status %d" % status
    return {"version": "", "gpus": 0, "error": " ".join(error.split())}


def compiler(kernel):
    """The compiler that built a kernel, by its own configuration: {text, command, path, source}."""
    for path in (
        "%s/%s/build/.config" % (KERNELS, kernel),
        "%s/config-%s" % (BOOT, kernel),
        "%s/%s/config" % (KERNELS, kernel),
    ):
        # Kernels before 5.8, such as that of EL 8, have it in a comment.
        found = re.search(r'^(?:CONFIG_CC_VERSION_TEXT="|# Compiler: )([^"\n]*)', read(path), re.M)
        if found:
            text = found.group(1)
            command = text.split(" ")[0]
            return {"text": text, "command": command, "path": which(command), "source": path}
    return {"text": "", "command": "", "path": "", "source": ""}


def headers(kernel):
    return os.path.exists("%s/%s/build/Makefile" % (KERNELS, kernel))


def version_key(text):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|[^\d.\-_]+", text)]


def next_kernel(running):
    """Release that the next boot takes: what grubby says, else the newest image in /boot."""
    default = output("grubby", "--default-kernel").strip() if which("grubby") else ""
    if default:
        return re.sub(r"^.*/vmlinuz-", "", default)
    releases = [os.path.basename(path)[len("vmlinuz-") :] for path in glob.glob(BOOT + "/vmlinuz-*")]
    releases = [name for name in releases if os.path.isdir(os.path.join(KERNELS, name))]
    return max(releases, key=version_key) if releases else running


def signing_key():
    """The key pair that dkms signs with, and whether the firmware knows it: {key, certificate, enrolled}."""
    for key, certificate in KEYS:
        if os.path.exists(key) and os.path.exists(certificate):
            text = run("mokutil", "--test-key", certificate)[1]
            return {"key": key, "certificate": certificate, "enrolled": "already enrolled" in text}
    return {"key": "", "certificate": "", "enrolled": False}


def groups(pid):
    """Paths of a process's control groups."""
    return [line.rpartition(":")[2] for line in read("%s/%s/cgroup" % (PROC, pid)).splitlines()]


@lru_cache(maxsize=None)
def unit_of_container(container):
    """The unit that keeps a container up, which is named like it, empty where none does.

    Such a unit starts a stopped container anew, and with --rm there is none left to start afterwards.
    """
    name = output("docker", "inspect", "-f", "{{.Name}}", container).strip().lstrip("/")
    unit = name + ".service"
    return unit if name and run("systemctl", "is-active", "--quiet", unit)[0] == 0 else ""


def owner(pid):
    """What started a process, by its control group: {unit, container}."""
    # This host may be a container itself: what is above it is not its own.
    above = [found.group(0) for found in (re.match(r".*" + CONTAINER, path) for path in groups("self")) if found]
    for path in groups(pid):
        for folder in above:
            if path.startswith(folder):
                path = path[len(folder) :]
        container = re.search(CONTAINER, path)
        if container:
            identity = container.group(1)[:12]
            return {"unit": unit_of_container(identity), "container": identity}
        unit = re.findall(r"/([^/]+\.service)", path)
        if unit and not unit[-1].startswith(("user@", "ssh", "sshd")):
            return {"unit": unit[-1], "container": ""}
    return {"unit": "", "container": ""}


def users():
    """Processes that hold a GPU's device file or its modules' libraries open."""
    found = {}
    for path in glob.glob(PROC + "/[0-9]*/fd/*"):
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if re.match(r"/dev/(nvidia(\d|ctl|-uvm|-modeset|-caps|-nvswitch)|dri/card)", target):
            if target.startswith("/dev/dri/") and not os.path.isdir(os.path.join(MODULES, "nvidia_drm")):
                continue
            found.setdefault(int(path.split("/")[2]), target)
    rows = []
    for pid in sorted(found):
        command = read("%s/%d/cmdline" % (PROC, pid)).replace("\0", " ").strip()
        rows.append(dict(owner(pid), pid=pid, command=command[:120] or read("%s/%d/comm" % (PROC, pid)).strip()))
    return rows


def x_servers():
    """Display servers by their lock files, as the installer looks for them."""
    found = []
    for path in sorted(glob.glob("/tmp/.X[0-7]-lock")):  # noqa: S108 - read, not made
        pid = read(path).strip()
        if pid.isdigit() and os.path.isdir(os.path.join(PROC, pid)):
            found.append(int(pid))
    return found


def modules():
    """{loaded module of the driver: how often it is in use}."""
    found = {}
    for name in ("nvidia", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia_peermem", "nvidia_fs", "gdrdrv"):
        path = os.path.join(MODULES, name)
        if os.path.isdir(path):
            count = read(os.path.join(path, "refcnt")).strip()
            found[name] = int(count) if count.lstrip("-").isdigit() else 0
    return found


def units(names):
    """{unit: {active, enabled, exists}} by one call to systemd."""
    found = {}
    text = output("systemctl", "show", "-p", "Id,LoadState,ActiveState,UnitFileState", *names) if names else ""
    for block in text.split("\n\n"):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        if fields.get("Id"):
            found[fields["Id"]] = {
                "exists": fields.get("LoadState") == "loaded",
                "active": fields.get("ActiveState") == "active",
                # One without [Install], as Ubuntu has them, cannot be enabled: something else starts it.
                "enabled": fields.get("UnitFileState") in ("enabled", "static"),
            }
    return found


def short_of_space(folders):
    """One line for each folder, there or to be made, that has less room than it needs."""
    lines = []
    for path, needed in sorted(folders.items()):
        state = os.statvfs(existing(path))
        free = state.f_bavail * state.f_frsize // 1048576
        if free < needed:
            lines.append("%s has %d MiB free of %d needed" % (path, free, needed))
    return lines


def existing(path):
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def of_generations(gpus, ranges):
    """Numbers of the GPUs' devices that lie within the (first, last) of each generation."""
    numbers = [int(gpu["device_id"] or "0", 16) for gpu in gpus]
    return {
        name: [number for number in numbers if any(first <= number <= last for first, last in pairs)]
        for name, pairs in ranges.items()
    }


def look(asked):
    # dkms is a script of many programs and takes as long as all the rest. What uses GPUs is not to be asked beside nvidia-smi.
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(output, "dkms", "status")
        found = look_meanwhile(asked)
        found["dkms"] = dkms_rows(status.result(), asked["module"])
    return found


def look_meanwhile(asked):
    running = output("uname", "-r").strip()
    kernel = asked["kernel"] or running
    following = next_kernel(running)
    gpus, switches = nvidia_devices()
    states = package_states()
    installed = {name: version for name, (version, state) in states.items() if state == "installed"}
    foreign = sorted(name for name in states if re.match(asked["foreign"], name) and states[name][1] not in GONE)
    return {
        "running_kernel": running,
        "kernel": kernel,
        "next_kernel": following,
        "gpus": gpus,
        "generations": of_generations(gpus, asked["generations"]),
        "nvswitches": len(switches) or len(glob.glob(NVSWITCH + "/*")) or len(nvlink_switches() if gpus else []),
        "loaded": loaded(),
        "modules": modules(),
        "module": on_disk(kernel),
        "next_module": on_disk(following) if following != kernel else {},
        "broken_dkms": broken_dkms(asked["module"]),
        "userspace": userspace(),
        "smi": smi(asked["smi_timeout"]) if gpus else {"version": "", "gpus": 0, "error": "there is no GPU"},
        "uninstaller": which("nvidia-uninstall"),
        "runfile_version": (read(INSTALLER_LOG).splitlines() or [""])[0].strip(),
        "alternate": os.path.exists(ALTERNATE),
        "foreign": foreign,
        "unfinished": [name for name in foreign if name not in installed],
        "compiler": compiler(kernel),
        "headers": headers(kernel),
        "next_headers": headers(following),
        "secure_boot": bool(signed_modules_only()),
        "signing_key": signing_key(),
        "users": users(),
        "x_servers": x_servers(),
        "packages": {
            name: version
            for name, version in installed.items()
            if name in asked["packages"] or KERNEL_PACKAGES.match(name) or name in foreign
        },
        "held": held(),
        "units": units(asked["units"]),
        "files": {path: sha256(path) for path in asked["files"]},
        "short": short_of_space(asked["folders"]),
        "noexec": [path for path in asked["folders"] if os.statvfs(existing(path)).f_flag & os.ST_NOEXEC],
        "package_lists": package_lists(),
        "wish": asked["wish"],
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "kernel": {"type": "str", "default": ""},
            "module": {"type": "str", "default": "nvidia"},
            "foreign": {"type": "str", "default": "^$"},
            "units": {"type": "list", "elements": "str", "default": []},
            "folders": {"type": "dict", "default": {}},
            "generations": {"type": "dict", "default": {}},
            "wish": {"type": "dict", "default": {}},
            "smi_timeout": {"type": "int", "default": 60},
            "packages": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **look(module.params))


if __name__ == "__main__":
    main()
