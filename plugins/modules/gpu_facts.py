#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: gpu_facts
short_description: Facts about the NVIDIA GPUs of a host, with or without a driver
version_added: 0.1.0
description:
  - Looks at PCI sysfs for NVIDIA GPUs and NVSwitches, at the kernel modules that are loaded, on disk and in DKMS, and, where
    a driver answers, asks C(nvidia-smi) for what only the driver knows. Needs nothing but the host's own Python.
  - Never changes anything. Run as root to see who uses the GPUs; another user sees his own processes only.
options:
  nvidia_smi:
    description: The C(nvidia-smi) to ask; looked up in E(PATH) unless it is a path.
    type: str
    default: nvidia-smi
  timeout:
    description: Seconds to wait for one answer of C(nvidia-smi), which hangs when a driver or a GPU is in trouble.
    type: int
    default: 30
  own_paths:
    description:
      - Folders of servers that are being managed. Memory of processes that work below one of them, on GPUs and in RAM, is
        not counted as used, so that a running service can be planned again.
    type: list
    elements: path
    default: []
  root:
    description: Where the host's file system is. Another root serves to replay a captured host.
    type: path
    default: /
  catalog:
    description:
      - What is known of GPUs by their PCI device id, C(devices) and, by ranges of ids, C(architectures). The collection's
        own catalog when it is left out.
    type: dict
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
attributes:
  facts:
    description: Returns an RV(ansible_facts) dictionary.
    support: full
"""

EXAMPLES = r"""
- name: Know the GPUs
  baremetal.vllm.gpu_facts:
    own_paths: [/var/lib/vllm]

- name: Show what will be served on
  ansible.builtin.debug:
    msg: "{{ ansible_facts['gpu'].device }}, {{ ansible_facts['gpu'].gpus | length }} GPUs"
"""

RETURN = r"""
ansible_facts:
  description: One fact, C(gpu).
  returned: always
  type: dict
  contains:
    gpu:
      description: What the host has.
      type: dict
      contains:
        device:
          description: V(cuda) when a driver answers for at least one usable GPU, else V(cpu).
          type: str
          sample: cuda
        driver_version:
          description: Version of the driver that answered, none without one.
          type: str
          sample: 580.159.04
        state:
          description:
            - V(ok), V(no_gpu), V(no_driver) (no C(nvidia-smi), or it finds no module), V(mismatch) (module and libraries
              of two versions), V(hung) (no answer in time) or V(failed).
          type: str
          sample: ok
        problem:
          description: What is wrong with driver or GPUs, and what to do, empty otherwise.
          type: str
        gpus:
          description:
            - One entry a usable GPU, in the order of C(nvidia-smi), which is the order of the PCI bus.
            - C(index), C(uuid), C(name), C(memory_total_mib), C(memory_used_mib) (by others than O(own_paths)),
              C(memory_reserved_mib), C(compute_capability), C(pci_bus_id), C(mig) and C(mig_devices), each slice with
              C(index), C(uuid), C(profile), C(memory_total_mib) and C(memory_used_mib). Of compute instances that share a GPU
              instance, and so its memory, the first is listed. What the driver does not tell is none.
          type: list
          elements: dict
        gpus_unusable:
          description: GPUs that the driver lists without what is needed to use them, C(index), C(name) and C(reason).
          type: list
          elements: dict
        gpus_lost:
          description: PCI addresses of GPUs that the driver holds and does not list, as after a fall off the bus.
          type: list
          elements: str
        links:
          description: C(links[i][j]) is how GPU i reaches GPU j as C(nvidia-smi topo -m) names it, such as V(NV18), V(PHB) or V(SYS).
          type: list
          elements: list
        p2p:
          description: C(p2p[i][j]) is the state of peer-to-peer reads, V(OK) where they work.
          type: list
          elements: list
        processes:
          description:
            - Who has a GPU open, C(pid), C(user), C(command), C(unit) (systemd unit or container), C(memory_used_mib), the
              C(gpus) as uuids, and whether it works below O(own_paths) (C(own)).
          type: list
          elements: dict
        pci:
          description:
            - NVIDIA GPUs on the PCI bus, with C(address), C(device_id), the bound C(driver) and its C(module), and, where the
              catalog has it, C(name), C(architecture), C(compute_capability), C(memory_total_mib), C(kernel_module) (which
              modules can drive it), C(last_driver_branch) and C(nvlink). They are seen without any driver, too.
          type: list
          elements: dict
        nvswitches:
          description: PCI addresses of NVSwitches, or of the devices by which those of NVLink 5 are managed.
          type: list
          elements: str
        nouveau:
          description: C(loaded), which of nouveau, nova_core and nova_drm are, and C(bound), PCI addresses that they hold.
          type: dict
        module:
          description:
            - The NVIDIA kernel module. C(loaded) with C(version) and C(flavour) (V(open) or V(proprietary)), or none;
              C(on_disk), one entry a kernel with C(kernel), C(version), C(flavour), C(path); C(dkms), with C(name), C(version),
              C(kernel) and C(state); C(dkms_problem); and C(packaged), whether a package of the distribution owns the driver.
          type: dict
        kernel:
          description: C(running), C(installed) and C(next), the one that the next boot starts as far as can be told.
          type: dict
        secure_boot:
          description:
            - C(enabled), none where it cannot be told; C(key), the public key that DKMS signs with here; and C(enrolled),
              whether the firmware trusts it.
          type: dict
        virtual:
          description: V(bare), V(vm) or V(container).
          type: str
        cpu:
          description:
            - Cores this process may use and memory, C(cores), C(memory_total_mib), C(memory_available_mib) and
              C(memory_own_mib), that part of the available memory which O(own_paths) hold now.
          type: dict
"""

import csv
import glob
import os
import pwd
import re
import xml.etree.ElementTree
from subprocess import TimeoutExpired

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import (
    PATHS,
    execute,
    names_of,
    signed_modules_only,
)

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"  # PCI base class: display controllers, both "VGA" and "3D"
NVSWITCH_CLASS = "0x0680"  # a bridge of another kind
OPEN_MODULES = ("nouveau", "nova_core", "nova_drm")
# Modules by the names that runfile, Ubuntu and RPM packages (nvidia) and Debian's packages (the others) give them.
MODULE_NAMES = ("nvidia", "nvidia-current", "nvidia-current-open")
# Driver packages of a distribution leave it for NVIDIA's installer to see.
PACKAGED_MARKS = ("usr/lib/nvidia/alternate-install-present", "usr/lib/nvidia/alternate-install-available")
# Public halves of the keys that DKMS signs with: Debian and Ubuntu with shim, and DKMS's own.
SIGNING_KEYS = ("var/lib/shim-signed/mok/MOK.der", "var/lib/dkms/mok.pub")
VERSION = r"\d{3,4}(?:\.\d+){1,3}"


def mib(value):
    return int(value[: -len(" MiB")] if value.endswith(" MiB") else value)


def enabled(value):
    return value == "Enabled"


# name in nvidia-smi --query-gpu -> our name; the function converts what it prints
QUERY = [
    ("index", "index", int),
    ("uuid", "uuid", str),
    ("name", "name", str),
    ("memory.total", "memory_total_mib", mib),
    ("memory.used", "memory_used_mib", mib),
    ("memory.reserved", "memory_reserved_mib", mib),
    ("compute_cap", "compute_capability", str),
    ("pci.bus_id", "pci_bus_id", str),
    ("mig.mode.current", "mig", enabled),
    ("driver_version", "driver_version", str),
]
# Without these no engine can be put on a GPU.
NEEDED = ("index", "uuid", "memory_total_mib", "compute_capability")
# Exit status for a warning about a GPU that works all the same (NVIDIA's page of nvidia-smi, "Return value").
INFOROM_CORRUPTED = 14
NO_DRIVER = 9
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class SmiError(Exception):
    """nvidia-smi gave no answer; the text says why and state what kind of trouble it is."""

    def __init__(self, text, state="failed"):
        Exception.__init__(self, text)
        self.state = state


def output_of(command, timeout):
    """(exit status, standard output and error). Raises OSError and TimeoutExpired."""
    return execute(command, timeout, path=os.environ.get("PATH", "") + ":" + PATHS)


def smi(command, arguments, timeout):
    """Output of one nvidia-smi call. Raises SmiError on a missing program, a hang and an error exit."""
    try:
        status, output = output_of([command] + arguments, timeout)
    except OSError as error:
        raise SmiError("cannot run %s: %s" % (command, error.strerror), "no_driver")
    except TimeoutExpired:
        raise SmiError("%s did not answer within %d s" % (command, timeout), "hung")
    if status == INFOROM_CORRUPTED:
        return "".join(line for line in output.splitlines(True) if not line.startswith("WARNING:"))
    if status != 0:
        text = " ".join(output.split()) or "no output"
        state = "no_driver" if status == NO_DRIVER else "mismatch" if "version mismatch" in text else "failed"
        raise SmiError("%s failed (exit status %d): %s" % (command, status, text), state)
    return output


def query_gpus(command, timeout):
    """(list of GPU dicts, problems). A field that this nvidia-smi does not know is left out, as if it said [N/A]."""
    fields = list(QUERY)
    while True:
        query = "--query-gpu=" + ",".join(field[0] for field in fields)
        try:
            return parse_gpus(smi(command, [query, "--format=csv,noheader,nounits"], timeout), fields)
        except SmiError as error:
            unknown = re.search(r'Field "([^"]+)" is not a valid field', str(error))
            if not unknown or unknown.group(1) not in [field[0] for field in fields] or len(fields) == 1:
                raise
            fields = [field for field in fields if field[0] != unknown.group(1)]


def parse_gpus(text, fields):
    """(list of GPU dicts, problems) from `nvidia-smi --query-gpu --format=csv,noheader,nounits`.

    What is told as [N/A], [Not Supported], [Unknown Error] or the like is None: the driver could not tell.
    """
    gpus, problems = [], []
    for row in csv.reader(text.strip().splitlines(), skipinitialspace=True):
        if len(row) != len(fields):
            problems.append("nvidia-smi printed a line that is no GPU: %s" % ",".join(row))
            continue
        gpu = dict((name, None) for dummy, name, dummy in QUERY)
        for (field, name, convert), value in zip(fields, row):
            value = value.strip()
            if re.match(r"\[.*\]$|N/A$", value):
                continue
            try:
                gpu[name] = convert(value)
            except ValueError:
                problems.append("nvidia-smi reports %s of GPU %s as %r" % (field, row[0], value))
        gpu["mig"] = bool(gpu["mig"])
        gpus.append(gpu)
    return gpus, problems


def usable(gpus, pci):
    """Splits GPUs into those that can be used and [{index, name, reason}] of the others."""
    known = dict((bus_id(device["address"]), device) for device in pci)
    good, bad = [], []
    for gpu in gpus:
        device = known.get(bus_id(gpu["pci_bus_id"] or ""), {})
        for name in ("compute_capability", "name"):  # an old driver does not tell the former
            gpu[name] = gpu[name] or device.get(name)
        missing = [field for field, name, dummy in QUERY if name in NEEDED and gpu[name] is None]
        if missing:
            reason = "the driver does not tell its %s" % ", ".join(missing)
            bad.append({"index": gpu["index"], "name": gpu["name"], "reason": reason})
        else:
            good.append(gpu)
    return good, bad


def bus_id(address):
    """0000:00:06.0 for any way to write it: nvidia-smi has a domain of eight digits and upper case letters."""
    match = re.match(r"(?:0*([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])$", address.lower())
    return "%s:%s" % (match.group(1) or "0000", match.group(2)) if match else address


def parse_matrix(text, indices):
    """The cells of an nvidia-smi topology table, which carries ANSI codes and extra columns, for the GPUs of these indices."""
    columns, rows = [], {}
    for line in ANSI.sub("", text).splitlines():
        cells = line.split()
        numbers = [int(cell[3:]) for cell in cells if re.match(r"GPU\d+$", cell)]
        if cells and len(numbers) > 1 and not columns:
            columns = numbers  # the heading; "GPU NUMA ID" among it is no GPU0
        elif len(numbers) == 1 and columns and re.match(r"GPU\d+$", cells[0]) and len(cells) > len(columns):
            rows[numbers[0]] = dict(zip(columns, cells[1:]))
    try:
        return [[rows[i][j] for j in indices] for i in indices]
    except KeyError:
        return []


def mig_devices(command, timeout):
    """Slices by bus id of their GPU, with `gpu_instance` for matching processes, and the processes on them."""
    tree = xml.etree.ElementTree.fromstring(smi(command, ["-q", "-x"], timeout))  # noqa: S314 - no stranger writes it
    named = {}  # (GPU's uuid, index of the slice) -> (profile, uuid), which only -L tells
    uuid = None
    for line in smi(command, ["-L"], timeout).splitlines():
        found = re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line)
        uuid = found.group(1) if found else uuid
        found = re.match(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (\S+)\)", line)
        if found:
            named[(uuid, found.group(2))] = (found.group(1), found.group(3))
    slices, processes = {}, []
    for gpu in tree.iter("gpu"):
        parent = (gpu.findtext("uuid") or "").strip()
        found = []
        for device in gpu.iter("mig_device"):
            index = (device.findtext("index") or "").strip()
            profile, slice_uuid = named.get((parent, index), ("", ""))
            instance = (device.findtext("gpu_instance_id") or "").strip()
            if instance in [one["gpu_instance"] for one in found]:
                continue  # memory that is counted already
            try:
                total = mib(device.findtext("fb_memory_usage/total").strip())
            except (AttributeError, ValueError):
                continue  # memory that is not told
            try:
                used = mib(device.findtext("fb_memory_usage/used").strip())
            except (AttributeError, ValueError):
                used = None
            found.append(
                {
                    "index": int(index),
                    "uuid": slice_uuid,
                    "profile": profile,
                    "memory_total_mib": total,
                    "memory_used_mib": used,
                    "gpu_instance": instance,
                }
            )
        slices[parent] = found
        for process in gpu.iter("process_info"):
            processes.append(
                [parent]
                + [(process.findtext(name) or "").strip() for name in ("pid", "used_memory", "gpu_instance_id")]
            )
    return slices, processes


def compute_apps(text):
    """[gpu uuid, pid, used memory, instance] rows of `--query-compute-apps=gpu_uuid,pid,used_memory`."""
    rows = csv.reader(text.strip().splitlines(), skipinitialspace=True)
    return [[row[0], row[1].strip(), row[2].strip(), ""] for row in rows if len(row) == 3]


def own_processes(own_paths, root="/"):
    """Process ids, as text, of processes that work below own_paths."""
    found, names = set(), {name for path in own_paths for name in names_of(path)}
    for link in glob.glob(os.path.join(root, "proc/[0-9]*/cwd")) if names else []:
        try:
            folder = os.readlink(link)
        except OSError:
            continue  # it has gone, or is another user's
        if any(folder == path or folder.startswith(path.rstrip("/") + "/") for path in names):
            found.add(link.split("/")[-2])
    return found


def device_users(root):
    """Process ids, as text, of processes that have a device file of the driver open. Other users' are seen by root alone."""
    found = set()
    for link in glob.glob(os.path.join(root, "proc/[0-9]*/fd/*")):
        try:
            if os.readlink(link).startswith("/dev/nvidia"):
                found.add(link.split("/")[-3])
        except OSError:
            continue
    return found


def describe_process(pid, root):
    folder = os.path.join(root, "proc", pid)
    try:
        user = pwd.getpwuid(os.stat(folder).st_uid).pw_name
    except KeyError:
        user = str(os.stat(folder).st_uid)
    except OSError:
        user = ""
    # .../docker-ID.scope, .../docker/ID, .../libpod-ID.scope; else the unit that the path ends with
    groups = read(folder + "/cgroup")
    container = re.search(r"(docker|libpod|crio|cri-containerd|kubepods)\S*?[-/:]([0-9a-f]{12})[0-9a-f]{52}", groups)
    unit = re.search(r"/([^/\n]+\.service)(?:/|$)", groups, re.M)
    name = "%s %s" % container.groups() if container else unit.group(1) if unit else ""
    return {
        "pid": int(pid),
        "user": user,
        # Arguments may hold secrets: only the program is told.
        "command": os.path.basename(read(folder + "/cmdline").split("\0")[0]) or read(folder + "/comm"),
        "unit": name,
        "memory_used_mib": 0,
        "gpus": [],
    }


def gpu_processes(rows, users, own, root):
    """One entry a process that computes on a GPU or has one open."""
    found = {}
    for row in rows:
        uuid, pid, used = row[:3]
        entry = found.setdefault(pid, describe_process(pid, root))
        if uuid not in entry["gpus"]:
            entry["gpus"].append(uuid)
        entry["memory_used_mib"] += number(used)
    for pid in users:
        found.setdefault(pid, describe_process(pid, root))
    for pid, entry in found.items():
        entry["own"] = pid in own
    return sorted(found.values(), key=lambda entry: entry["pid"])


def number(value):
    """MiB, 0 where the driver does not tell."""
    try:
        return mib(value)
    except ValueError:
        return 0


def forget_own(gpus, rows, own):
    """Takes what own processes hold off the memory in use."""
    for gpu in gpus:
        for uuid, pid, used, instance in rows:
            if pid not in own or uuid != gpu["uuid"]:
                continue
            for part in [gpu] + [one for one in gpu["mig_devices"] if instance and one["gpu_instance"] == instance]:
                if part["memory_used_mib"] is not None:
                    part["memory_used_mib"] = max(0, part["memory_used_mib"] - number(used))


def held_in_ram(processes, root="/"):
    """MiB of memory that comes free when these processes end; shared pages are divided among those that share them.

    Pages of files are left out: the kernel counts them as available anyway.
    """
    total = 0
    for pid in processes:
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", read(os.path.join(root, "proc", pid, "smaps_rollup")), re.M))
        if "Pss_Anon" in sizes:
            total += int(sizes["Pss_Anon"]) + int(sizes.get("Pss_Shmem", 0))
        else:  # kernels before 5.4
            total += int(sizes.get("Pss", 0))
    return total // 1024


def read(path):
    try:
        with open(path, "rb") as handle:
            return handle.read().decode("utf-8", "replace").strip()
    except (IOError, OSError):
        return ""


def from_catalog(device_id, catalog):
    """What is known of a GPU by its PCI device id."""
    known = {"name": "", "architecture": "", "kernel_module": "", "last_driver_branch": None}
    known.update({"compute_capability": None, "memory_total_mib": None, "nvlink": None})
    try:
        code = int(device_id, 16)
    except ValueError:
        return known
    for row in catalog.get("architectures") or []:
        if any(int(low, 16) <= code <= int(high, 16) for low, high in row["pci"]):
            known.update(
                architecture=row["name"], kernel_module=row["module"], last_driver_branch=row.get("last_driver_branch")
            )
    known.update((catalog.get("devices") or {}).get(device_id, {}))
    return known


def pci_devices(root, catalog):
    """(GPUs, addresses of NVSwitches)."""
    gpus, switches = [], []
    for folder in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))):
        if read(folder + "/vendor") != NVIDIA_VENDOR:
            continue
        kind, address = read(folder + "/class"), os.path.basename(folder)
        if kind.startswith(NVSWITCH_CLASS):
            switches.append(address)
        if not kind.startswith(DISPLAY_CLASS):
            continue
        device_id, driver = read(folder + "/device")[2:], os.path.join(folder, "driver")
        gpus.append(
            dict(
                from_catalog(device_id, catalog),
                address=address,
                device_id=device_id,
                driver=link_name(driver),
                # A driver may be named otherwise than its module (NovaCore of nova_core); one that is built in has none.
                module=link_name(driver + "/module"),
            )
        )
    # Those of NVLink 5 are not on the bus; the network devices that manage them say so in their vital product data.
    for path in sorted(glob.glob(os.path.join(root, "sys/class/infiniband/*/device/vpd"))) if gpus else []:
        if "SW_MNG" in read(path):
            switches.append(os.path.basename(os.path.realpath(os.path.dirname(path))))
    return gpus, switches


def link_name(path):
    return os.path.basename(os.path.realpath(path)) if os.path.exists(path) else None


def natural(name):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]


def kernel_facts(root):
    folders = glob.glob(os.path.join(root, "lib/modules/*/modules.dep"))
    installed = sorted((folder.split("/")[-2] for folder in folders), key=natural)
    following = ""
    if root == "/":
        try:  # what the boot loader of the RHEL family says
            status, output = output_of(["grubby", "--default-kernel"], 20)
            following = output.strip().rsplit("/vmlinuz-", 1)[-1] if status == 0 and "/vmlinuz-" in output else ""
        except (OSError, TimeoutExpired):
            pass
    bootable = [name.split("/vmlinuz-")[-1] for name in glob.glob(os.path.join(root, "boot/vmlinuz-*"))]
    bootable = sorted((name for name in bootable if "rescue" not in name), key=natural)
    running = read(os.path.join(root, "proc/sys/kernel/osrelease"))
    return {
        "running": running,
        "installed": installed,
        # GRUB starts the newest one unless told otherwise; a container has none.
        "next": following or (bootable[-1] if bootable else running),
    }


def flavour_of(text):
    return "open" if re.search(r"Open Kernel Module|Dual MIT/GPL", text) else "proprietary"


def module_on_disk(kernel, root):
    """The NVIDIA module that modprobe would load under this kernel, or None."""
    for name in MODULE_NAMES:
        try:
            status, text = output_of(["modinfo"] + ([] if root == "/" else ["-b", root]) + ["-k", kernel, name], 20)
        except (OSError, TimeoutExpired):
            return None
        fields = dict(re.findall(r"^(\w+):\s+(\S.*)$", text, re.M)) if status == 0 else {}
        if "version" in fields:
            flavour = flavour_of(fields.get("license", ""))
            return {
                "kernel": kernel,
                "version": fields["version"],
                "flavour": flavour,
                "path": fields.get("filename", ""),
            }
    return None


def dkms_facts(root):
    """(rows of `dkms status` for NVIDIA's module, what it complains about)."""
    if not glob.glob(os.path.join(root, "var/lib/dkms/nvidia*")):
        return [], ""
    try:
        dummy, text = output_of(
            ["dkms", "status"] + ([] if root == "/" else ["--dkmstree", os.path.join(root, "var/lib/dkms")]), 60
        )
    except OSError as error:
        return [], "cannot run dkms: %s" % error.strerror
    except TimeoutExpired:
        return [], "dkms status did not answer within 60 s"
    rows, problems = [], []
    for line in text.splitlines():
        # DKMS 3: nvidia/580.65.06, 6.1.0-13-amd64, x86_64: installed; DKMS 2: nvidia, 580.65.06, 5.15.0, x86_64: installed
        match = re.match(r"(nvidia[^/,:]*)(?:/|, )([^,:]+)(?:, ([^,]+), [^:]+)?: (\w+)(.*)", line)
        if match:
            name, version, kernel, state, rest = match.groups()
            rows.append({"name": name, "version": version, "kernel": kernel, "state": state})
            problems += [line] if "WARNING" in rest else []
        elif re.search(r"nvidia", line) or line.startswith("Error"):
            problems.append(line)
    return rows, "; ".join(problems)


def module_facts(root, kernels):
    text = read(os.path.join(root, "proc/driver/nvidia/version")).partition("\n")[0]
    version = re.search(VERSION, text)
    loaded = None
    if version:
        loaded = {"version": version.group(0), "flavour": flavour_of(text)}
    elif os.path.isdir(os.path.join(root, "sys/module/nvidia")):
        loaded = {"version": read(os.path.join(root, "sys/module/nvidia/version")) or None, "flavour": None}
    rows, problem = dkms_facts(root)
    return {
        "loaded": loaded,
        "on_disk": [found for found in (module_on_disk(kernel, root) for kernel in kernels) if found],
        "dkms": rows,
        "dkms_problem": problem,
        "packaged": any(os.path.exists(os.path.join(root, mark)) for mark in PACKAGED_MARKS),
    }


def secure_boot(root):
    facts = {"enabled": signed_modules_only(root), "key": "", "enrolled": None}
    for path in SIGNING_KEYS:
        if os.path.exists(os.path.join(root, path)):
            facts["key"] = "/" + path
            break
    if facts["enabled"] and facts["key"]:
        try:
            dummy, text = output_of(["mokutil", "--test-key", os.path.join(root, facts["key"][1:])], 20)
            facts["enrolled"] = "is already enrolled" in text
        except (OSError, TimeoutExpired):
            pass
    return facts


def virtual(root):
    if any(
        os.path.exists(os.path.join(root, path))
        for path in ("run/.containerenv", ".dockerenv", "run/systemd/container")
    ):
        return "container"
    if os.path.exists(os.path.join(root, "sys/hypervisor/type")):
        return "vm"
    product = read(os.path.join(root, "sys/class/dmi/id/product_name")) + read(
        os.path.join(root, "sys/class/dmi/id/sys_vendor")
    )
    if re.search(r"^flags\s*:.*\bhypervisor\b", read(os.path.join(root, "proc/cpuinfo")), re.M) or re.search(
        r"KVM|QEMU|VMware|Virtual Machine|VirtualBox|Amazon EC2|Google Compute", product
    ):
        return "vm"
    return "bare"


def cpu_facts(processes, root):
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", read(os.path.join(root, "proc/meminfo")), re.M))
    total, held = int(memory.get("MemTotal", 0)) // 1024, held_in_ram(processes, root)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_total_mib": total,
        "memory_available_mib": min(total, int(memory.get("MemAvailable", 0)) // 1024 + held),
        "memory_own_mib": held,
    }


def advice(state, module):
    """What to do about a driver that does not answer."""
    if state == "mismatch":
        loaded = module["loaded"] and module["loaded"]["version"]
        return ": the loaded module is %s; reboot, or stop what uses the GPUs and load the module anew" % (
            loaded or "another"
        )
    if state == "hung":
        return ": look for 'NVRM: Xid' in the kernel log; a GPU in this state mostly needs a reboot"
    return ""


def lost_gpus(pci, gpus):
    """Addresses on the bus that the driver should have told of and did not."""
    seen = [bus_id(gpu["pci_bus_id"] or "") for gpu in gpus]
    return [gpu["address"] for gpu in pci if gpu["driver"] == "nvidia" and bus_id(gpu["address"]) not in seen]


def ask_driver(facts, nvidia_smi, timeout, own, users, root):
    """Fills in what only the driver knows. Raises SmiError; what was learnt before that stays."""
    gpus, problems = query_gpus(nvidia_smi, timeout)
    facts["problem"] = "; ".join(problems)
    facts["gpus_lost"] = [] if problems else lost_gpus(facts["pci"], gpus)
    gpus, facts["gpus_unusable"] = usable(gpus, facts["pci"])
    facts["driver_version"] = next((gpu["driver_version"] for gpu in gpus if gpu["driver_version"]), None)
    for gpu in gpus:
        del gpu["driver_version"]
        gpu["mig_devices"] = []
    facts["gpus"] = gpus
    facts["device"] = "cuda" if gpus else "cpu"
    bad = ["GPU %s (%s): %s" % (gpu["index"], gpu["name"], gpu["reason"]) for gpu in facts["gpus_unusable"]]
    if facts["gpus_lost"]:
        lost = ", ".join(facts["gpus_lost"])
        bad.append("on the PCI bus but not in nvidia-smi: %s; look for 'NVRM' in the kernel log" % lost)
    facts["problem"] = "; ".join(problems + bad)
    facts["state"] = "ok" if gpus else "failed"
    rows = []
    if any(gpu["mig"] for gpu in gpus):
        slices, rows = mig_devices(nvidia_smi, timeout)
        for gpu in gpus:
            gpu["mig_devices"] = slices.get(gpu["uuid"], []) if gpu["mig"] else []
    elif gpus:
        apps = ["--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
        rows = compute_apps(smi(nvidia_smi, apps, timeout))
    forget_own(gpus, rows, own)
    for part in (part for gpu in gpus for part in gpu["mig_devices"]):
        del part["gpu_instance"]
    facts["processes"] = gpu_processes(rows, users, own, root)
    if len(gpus) > 1:
        indices = [gpu["index"] for gpu in gpus]
        facts["links"] = parse_matrix(smi(nvidia_smi, ["topo", "-m"], timeout), indices)
        facts["p2p"] = parse_matrix(smi(nvidia_smi, ["topo", "-p2p", "r"], timeout), indices)


def collect(nvidia_smi, timeout, root="/", own_paths=(), catalog=None):
    own, users = own_processes(own_paths, root), device_users(root)
    pci, switches = pci_devices(root, catalog or {})
    kernel = kernel_facts(root)
    loaded = [name for name in OPEN_MODULES if os.path.isdir(os.path.join(root, "sys/module", name))]
    facts = {
        "device": "cpu",
        "driver_version": None,
        "state": "no_gpu",
        "problem": "",
        "gpus": [],
        "gpus_unusable": [],
        "gpus_lost": [],
        "links": [],
        "p2p": [],
        "processes": gpu_processes([], users, own, root),
        "pci": pci,
        "nvswitches": switches,
        # A driver without a module is built into the kernel under its own name.
        "nouveau": {
            "loaded": loaded,
            "bound": [gpu["address"] for gpu in pci if (gpu["module"] or gpu["driver"]) in OPEN_MODULES],
        },
        "module": module_facts(root, kernel["installed"] or [kernel["running"]]),
        "kernel": kernel,
        "secure_boot": secure_boot(root),
        "virtual": virtual(root),
        "cpu": cpu_facts(own, root),
    }
    try:
        ask_driver(facts, nvidia_smi, timeout, own, users, root)
    except SmiError as error:
        # Without a GPU on the bus, a missing nvidia-smi is no problem but the plain answer "cpu".
        if facts["pci"] or facts["gpus"]:
            if not facts["gpus"]:
                facts["state"] = error.state
            text = str(error) + advice(error.state, facts["module"])
            facts["problem"] = "; ".join(part for part in (facts["problem"], text) if part)
    return facts


def main():
    module = AnsibleModule(
        argument_spec={
            "nvidia_smi": {"type": "str", "default": "nvidia-smi"},
            "timeout": {"type": "int", "default": 30},
            "own_paths": {"type": "list", "elements": "path", "default": []},
            "root": {"type": "path", "default": "/"},
            "catalog": {"type": "dict"},
        },
        supports_check_mode=True,
    )
    if module.params["timeout"] < 1:
        module.fail_json(msg="timeout is %d: give at least 1 second" % module.params["timeout"])
    params = module.params
    facts = collect(params["nvidia_smi"], params["timeout"], params["root"], params["own_paths"], params["catalog"])
    module.exit_json(changed=False, ansible_facts={"gpu": facts})


if __name__ == "__main__":
    main()
