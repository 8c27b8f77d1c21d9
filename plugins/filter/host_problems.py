# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: host_problems
short_description: What stands in the way of changing a host, each with its way out
version_added: 0.1.0
description:
  - Judges what M(baremetal.vllm.preflight_probe) and M(baremetal.vllm.gpu_facts) saw.
positional: gpu, settings
options:
  _input:
    description: Result of M(baremetal.vllm.preflight_probe).
    type: dict
    required: true
  gpu:
    description: The fact C(gpu) of M(baremetal.vllm.gpu_facts).
    type: dict
    required: true
  settings:
    description:
      - C(accept) (kinds of problems that are accepted), C(free_mib) (path to MiB that must be free) and C(clock_tolerance_s).
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Judge the host
  ansible.builtin.set_fact:
    problems: "{{ probe | baremetal.vllm.host_problems(ansible_facts['gpu'], settings) }}"
"""

RETURN = r"""
_value:
  description: One line a problem.
  type: list
  elements: str
"""

from collections.abc import Iterator
from typing import Any


def _clock(probe: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    offset, limit = probe["clock_offset_s"], float(settings["clock_tolerance_s"])
    if offset is not None and abs(offset) > limit:
        yield (
            f"the clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the controller's, and {limit:.0f} s are "
            "tolerated, as TLS and package lists go by it: set it right (timedatectl set-ntp true), or the controller's"
        )


def _disk(probe: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    for path, need in settings["free_mib"].items():
        free = probe["free_mib"].get(path)
        if free is not None and free < int(need):
            hint = "remove kernels that are no longer needed" if path == "/boot" else "make room"
            yield f"{path} has {free} MiB free and {need} are needed: {hint}"


def _headers(probe: dict[str, Any], gpu: dict[str, Any]) -> Iterator[str]:
    ways = {
        "missing": "no package source has it: upgrade the kernel and reboot, or enable the source that it came from",
        "gone": "the lists name it, but the mirror no longer has it ({detail}): update the lists, upgrade the kernel and reboot",
    }
    for kernel, row in probe["headers"].items():
        if row["state"] in ways:
            which = "running" if kernel == gpu["kernel"]["running"] else "next"
            yield (
                f"the driver is built with {row['package']}, the headers of the {which} kernel, and "
                + ways[row["state"]].format(**row)
            )


def _network(probe: dict[str, Any]) -> Iterator[str]:
    for row in probe["addresses"]:
        if row["reason"]:
            where = f" (a package source of {row['of']})" if row["of"] else ""
            way = "look at /etc/resolv.conf" if "resolved" in row["reason"] else "look at firewall and routes"
            yield (
                f"{row['url']}{where} cannot be reached: {row['reason']}; {way}, or set a proxy (baremetal_https_proxy) or a mirror"
            )


def _gpu(gpu: dict[str, Any]) -> Iterator[str]:
    # Without a driver, or with two versions of it, nothing is wrong that the role nvidia_driver does not put right.
    if gpu["state"] == "hung":
        yield gpu["problem"]
    for one in gpu["gpus_unusable"]:
        yield f"GPU {one['index']} ({one['name']}) cannot be used: {one['reason']}; reset or replace it, or reboot"
    for address in gpu["gpus_lost"]:
        yield (
            f"the driver does not list the GPU {address}, although it holds it: look for 'NVRM: Xid' in the kernel log (79 is a "
            "fall off the bus), then power the host off and on, or replace the GPU"
        )


def host_problems(probe: dict[str, Any], gpu: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    found = {
        "clock": _clock(probe, settings),
        "disk": _disk(probe, settings),
        "gpu": _gpu(gpu),
        "headers": _headers(probe, gpu),
        "network": _network(probe),
    }
    return [f"{line} [{kind}]" for kind, lines in found.items() if kind not in settings["accept"] for line in lines]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"host_problems": host_problems}
