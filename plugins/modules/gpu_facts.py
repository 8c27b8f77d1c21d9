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
  - Looks at PCI sysfs for NVIDIA display controllers and, where a driver answers, asks C(nvidia-smi) for what only the
    driver knows. Needs nothing but the host's own Python.
  - Never changes anything.
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
  sysfs:
    description: Where sysfs is mounted. Another root serves to replay a captured host.
    type: path
    default: /sys
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
attributes:
  check_mode:
    description: Runs the same in check mode, as it only reads.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
  facts:
    description: Returns an RV(ansible_facts) dictionary.
    support: full
  platform:
    description: Target platforms.
    platforms: posix
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
          description: V(cuda) when a driver answers for at least one GPU, else V(cpu).
          type: str
          sample: cuda
        driver_version:
          description: Version of the driver that answered, none without one.
          type: str
          sample: 580.159.04
        gpus:
          description:
            - One entry a GPU, in the order of C(nvidia-smi), which is the order of the PCI bus.
            - C(index), C(uuid), C(name), C(memory_total_mib), C(memory_used_mib) (by others than
              O(own_paths)), C(compute_capability), C(pci_bus_id) and C(mig).
          type: list
          elements: dict
        links:
          description: C(links[i][j]) is how GPU i reaches GPU j as C(nvidia-smi topo -m) names it, such as V(NV18), V(PHB) or V(SYS).
          type: list
          elements: list
        p2p:
          description: C(p2p[i][j]) is the state of peer-to-peer reads, V(OK) where they work.
          type: list
          elements: list
        pci:
          description:
            - NVIDIA display controllers on the PCI bus, with C(address), C(device_id) and the bound kernel C(driver). They
              are seen without any driver, too.
          type: list
          elements: dict
        cpu:
          description: Cores this process may use and memory, C(cores), C(memory_total_mib) and C(memory_available_mib).
          type: dict
        problem:
          description: Why the driver did not answer although a GPU is there, empty otherwise.
          type: str
"""

import csv
import glob
import os
import re
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired

from ansible.module_utils.basic import AnsibleModule

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"  # PCI base class: display controllers, both "VGA" and "3D"
# name in nvidia-smi --query-gpu -> our name; the type converts what it prints
QUERY = [
    ("index", "index", int),
    ("uuid", "uuid", str),
    ("name", "name", str),
    ("memory.total", "memory_total_mib", int),
    ("memory.used", "memory_used_mib", int),
    ("compute_cap", "compute_capability", str),
    ("pci.bus_id", "pci_bus_id", str),
    ("mig.mode.current", "mig", lambda value: value == "Enabled"),
    ("driver_version", "driver_version", str),
]
# Exit status for a warning about a GPU that works all the same (NVIDIA's page of nvidia-smi, "Return value").
INFOROM_CORRUPTED = 14
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class SmiError(Exception):
    """nvidia-smi gave no answer; the text says why."""


def smi(command, arguments, timeout):
    """Output of one nvidia-smi call. Raises SmiError on a missing program, a hang and an error exit."""
    try:
        # run_command has no time limit, and nvidia-smi may hang for ever.
        # pylint: disable-next=ansible-bad-function
        process = Popen([command] + arguments, stdout=PIPE, stderr=STDOUT, universal_newlines=True)
    except OSError as error:
        raise SmiError("cannot run %s: %s" % (command, error.strerror))
    try:
        output, dummy = process.communicate(timeout=timeout)
    except TimeoutExpired:
        # Not waited for: a process stuck in the driver does not die before the driver lets go of it.
        process.kill()
        raise SmiError("%s did not answer within %d s" % (command, timeout))
    if process.returncode == INFOROM_CORRUPTED:
        return "".join(line for line in output.splitlines(True) if not line.startswith("WARNING:"))
    if process.returncode != 0:
        text = " ".join(output.split()) or "no output"
        raise SmiError("%s failed (exit status %d): %s" % (command, process.returncode, text))
    return output


def parse_gpus(text):
    """List of GPU dicts from `nvidia-smi --query-gpu --format=csv,noheader,nounits`."""
    gpus = []
    for row in csv.reader(text.strip().splitlines(), skipinitialspace=True):
        if len(row) != len(QUERY):
            raise SmiError("nvidia-smi printed a line that is no GPU: %s" % ",".join(row))
        gpu = {}
        for (field, name, convert), value in zip(QUERY, row):
            try:
                gpu[name] = convert(value.strip())
            except ValueError:
                raise SmiError("nvidia-smi reports %s of GPU %s as %r" % (field, row[0], value))
        gpus.append(gpu)
    return gpus


def own_processes(own_paths):
    """Process ids, as text, of processes that work below own_paths."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/cwd") if own_paths else []:
        try:
            folder = os.readlink(link)
        except OSError:
            continue  # it has gone, or is another user's
        if any(folder == path or folder.startswith(path.rstrip("/") + "/") for path in own_paths):
            found.add(link.split("/")[2])
    return found


def held_on_gpus(text, processes):
    """MiB by GPU uuid that the processes hold, from `--query-compute-apps=gpu_uuid,pid,used_memory`."""
    held = {}
    for row in csv.reader(text.strip().splitlines(), skipinitialspace=True):
        try:
            uuid, pid, used = row[0], row[1].strip(), int(row[2])
        except (IndexError, ValueError):
            continue  # no process, or memory that the driver does not tell
        if pid in processes:
            held[uuid] = held.get(uuid, 0) + used
    return held


def held_in_ram(processes):
    """MiB of memory that only these processes hold; shared pages are divided among those that share them."""
    sizes = [re.search(r"^Pss:\s+(\d+) kB", read("/proc/%s/smaps_rollup" % pid), re.M) for pid in processes]
    return sum(int(size.group(1)) for size in sizes if size) // 1024


def parse_matrix(text, count):
    """The count x count cells of an nvidia-smi topology table, which carries ANSI codes and extra columns."""
    rows = {}
    for line in ANSI.sub("", text).splitlines():
        cells = line.split()
        if len(cells) > count and re.match(r"GPU\d+$", cells[0]) and not re.match(r"GPU\d+$", cells[1]):
            rows[int(cells[0][3:])] = cells[1 : count + 1]
    return [rows[index] for index in range(count)] if sorted(rows) == list(range(count)) else []


def read(path):
    try:
        with open(path) as handle:
            return handle.read().strip()
    except (IOError, OSError):
        return ""


def pci_gpus(sysfs):
    found = []
    for folder in sorted(glob.glob(os.path.join(sysfs, "bus/pci/devices/*"))):
        if read(folder + "/vendor") != NVIDIA_VENDOR or not read(folder + "/class").startswith(DISPLAY_CLASS):
            continue
        driver = os.path.join(folder, "driver")
        found.append(
            {
                "address": os.path.basename(folder),
                "device_id": read(folder + "/device")[2:],
                "driver": os.path.basename(os.path.realpath(driver)) if os.path.exists(driver) else None,
            }
        )
    return found


def cpu_facts(processes):
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo"), re.M))
    total = int(memory.get("MemTotal", 0)) // 1024
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_total_mib": total,
        "memory_available_mib": min(total, int(memory.get("MemAvailable", 0)) // 1024 + held_in_ram(processes)),
    }


def collect(nvidia_smi, timeout, sysfs, own_paths=()):
    processes = own_processes(own_paths)
    facts = {
        "device": "cpu",
        "driver_version": None,
        "gpus": [],
        "links": [],
        "p2p": [],
        "pci": pci_gpus(sysfs),
        "cpu": cpu_facts(processes),
        "problem": "",
    }
    try:
        query = "--query-gpu=" + ",".join(field for field, dummy, dummy in QUERY)
        gpus = parse_gpus(smi(nvidia_smi, [query, "--format=csv,noheader,nounits"], timeout))
        if gpus:
            facts["driver_version"] = gpus[0]["driver_version"]
            for gpu in gpus:
                del gpu["driver_version"]
            facts["gpus"] = gpus
            facts["device"] = "cuda"
        if gpus and processes:
            apps = ["--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits"]
            held = held_on_gpus(smi(nvidia_smi, apps, timeout), processes)
            for gpu in gpus:
                gpu["memory_used_mib"] = max(0, gpu["memory_used_mib"] - held.get(gpu["uuid"], 0))
        if len(gpus) > 1:
            facts["links"] = parse_matrix(smi(nvidia_smi, ["topo", "-m"], timeout), len(gpus))
            facts["p2p"] = parse_matrix(smi(nvidia_smi, ["topo", "-p2p", "r"], timeout), len(gpus))
    except SmiError as error:
        # Without a GPU on the bus, a missing nvidia-smi is no problem but the plain answer "cpu".
        if facts["pci"] or facts["gpus"]:
            facts["problem"] = str(error)
    return facts


def main():
    module = AnsibleModule(
        argument_spec={
            "nvidia_smi": {"type": "str", "default": "nvidia-smi"},
            "timeout": {"type": "int", "default": 30},
            "own_paths": {"type": "list", "elements": "path", "default": []},
            "sysfs": {"type": "path", "default": "/sys"},
        },
        supports_check_mode=True,
    )
    if module.params["timeout"] < 1:
        module.fail_json(msg="timeout is %d: give at least 1 second" % module.params["timeout"])
    params = module.params
    facts = collect(params["nvidia_smi"], params["timeout"], params["sysfs"], params["own_paths"])
    module.exit_json(changed=False, ansible_facts={"gpu": facts})


if __name__ == "__main__":
    main()
