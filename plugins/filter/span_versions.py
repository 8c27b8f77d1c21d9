# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: span_versions
short_description: Where the software of hosts that work for one service differs
version_added: 0.1.0
description:
  - Compares Python, vLLM, PyTorch and Ray of the hosts of a service. Engines of different releases fail late and say little;
    Ray refuses nodes of another release of Ray or of Python.
positional: answers, images, answered
options:
  _input:
    description: Services over several hosts, each with C(service) (its name), C(executor) and C(hosts).
    type: list
    elements: dict
    required: true
  answers:
    description: For each host, the registered result of the command that printed the versions as JSON.
    type: dict
    required: true
  images:
    description: For each host, the registered result of the command that printed the layers of its images as JSON.
    type: dict
    default: {}
  answered:
    description: Whether a host that printed nothing is a fault. In check mode its software is perhaps not there yet.
    type: bool
    default: false
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Compare
  ansible.builtin.assert:
    that: spans | baremetal.vllm.span_versions(answers) | length == 0
"""

RETURN = r"""
_value:
  description: One line for each host and package that differs from the first host's.
  type: list
  elements: str
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def _said(result: Mapping[str, Any], service: str) -> dict[str, str] | None:
    """What a host answered for a service; None where its Python did not run (in check mode it is perhaps not there yet)."""
    for item in result.get("results", ()):
        try:
            said: dict[str, str] = json.loads(item.get("stdout") or "{}")
        except ValueError:
            continue
        if said.pop("service", None) == service:
            return said
    return None


def _comparable(executor: str, package: str, version: str) -> str:
    """Ray compares Python to the last digit; for the others the minor release decides."""
    return ".".join(version.split(".")[:2]) if package == "python" and executor != "ray" else version


def _image(result: Mapping[str, Any], service: str) -> dict[str, str]:
    """A short name for what the image of a service is; nothing for one that is not there or no container."""
    said: Any = _said(result, service) or {}
    layers = said.get("image")
    return {"image": hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:12]} if layers else {}


def _silence(result: Mapping[str, Any]) -> str:
    """Why a host gave no answer: the last line that its command left."""
    silent = [item for item in result.get("results", ()) if not item.get("skipped") and not item.get("stdout")]
    lines = [line for item in silent for key in ("msg", "stderr") for line in str(item.get(key) or "").splitlines()]
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def span_versions(
    spans: list[dict[str, Any]],
    answers: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, Mapping[str, Any]] | None = None,
    answered: bool = False,
) -> list[str]:
    problems = []
    for span in spans:
        head = span["hosts"][0]
        said = {host: _said(answers[host], span["service"]) for host in span["hosts"]}
        for host, found in said.items():
            if found is not None:
                found.update(_image((images or {}).get(host, {}), span["service"]))
        problems += [
            f"service {span['service']}: Python of {host} does not say which software it has: {_silence(answers[host])}"
            for host, found in said.items()
            if answered and found is None
        ]
        first = said[head]
        if first is None:
            continue
        if span["executor"] == "ray" and "ray" not in first:
            problems.append(
                f"{head}: the environment of service {span['service']} has no Ray: take executor mp, or leave "
                "vllm_existing_python empty so that one with Ray is made"
            )
        for host in span["hosts"][1:]:
            for package in sorted({*first, *(said[host] or first)}):
                here, there = first.get(package, "missing"), (said[host] or first).get(package, "missing")
                if _comparable(span["executor"], package, here) != _comparable(span["executor"], package, there):
                    problems.append(
                        f"service {span['service']}: {package} is {here} on {head} and {there} on {host}: install the "
                        "same on both"
                    )
    return problems


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"span_versions": span_versions}
