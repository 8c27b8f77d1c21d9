# SPDX-License-Identifier: GPL-3.0-or-later
"""Services over two hosts in containers: a Docker Engine on each host, the real vLLM for the CPU, a real Ray.

The tests run in the order in which they stand. With executor ray, vLLM refuses CPUs: there a stand-in for it is in the image
of the real one, which gets the real Ray from wheels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PROMPTS, Site, six, write_standin
from fleet import ROOT, Fleet, docker, until

PLANNED = "vllm/vllm-openai-cpu:v0.32.0-x86_64"
PLANNED_GPU = "vllm/vllm-openai:v0.25.1"
LOCAL = "baremetal-test/vllm-cpu:0.32.0"
STANDIN = "baremetal-test/vllm-standin:0.25.1"
RAY = "2.60.0"
CACHE = ROOT / ".cache" / "cluster"


def told(**figures: Any) -> None:
    print(json.dumps(figures))


def wheels() -> Path:
    """Ray and what it needs, as a site without a package index would bring it."""
    folder = CACHE / "wheels"
    if not list(folder.glob(f"ray-{RAY}-*")):
        subprocess.run(
            ["/usr/bin/python3", "-m", "pip", "download", "--quiet", "--dest", folder, f"ray=={RAY}"], check=True
        )
    return folder


class Boxes(Site):
    """Site of conftest.py with runtime container."""

    def __init__(self, fleet: Fleet, archive: Path) -> None:
        super().__init__(fleet)
        self.archive = {"reference": LOCAL, "archive": f"/srv/images/{archive.name}"}

    def settings(self, **more: Any) -> dict[str, Any]:
        limit = int(self.fleet.sh(self.fleet.names[0], "ulimit -Hn"))
        return {
            "vllm_runtime": "container",
            "vllm_images": {PLANNED: self.archive},
            "vllm_existing_python": "",
            "vllm_container_nofile": limit,
            "vllm_container_shm_size": "256m",
            "docker_nofile": limit,
            **more,
        }

    def play(
        self, hosts: int, *words: str, fail: bool = False, playbook: str = "site.yml", **more: Any
    ) -> tuple[str, dict[str, int]]:
        return super().play(hosts, *words, fail=fail, playbook=playbook, **self.settings(**more))

    def containers(self, host: str) -> dict[str, str]:
        """Name -> id of the containers that run on a host."""
        rows = self.fleet.sh(host, "docker ps --no-trunc --format '{{.Names}} {{.ID}}'").splitlines()
        return dict(row.split() for row in rows)  # type: ignore[misc]


@pytest.fixture(scope="module")
def boxes() -> Iterator[Boxes]:
    script = ROOT / "molecule/images/vllm-cpu.sh"
    archive = Path(
        subprocess.run([script], check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    ).resolve()
    models, standin = CACHE / "models", CACHE / "standin"
    six(models)
    write_standin(standin)
    mounts = ["--volume", "/var/lib/docker", "--volume", "/var/lib/containerd"]
    for source, target in (
        (archive.parent, "/srv/images"),
        (models, "/opt/models"),
        (standin, "/opt/standin"),
        (wheels(), "/srv/wheels"),
    ):
        mounts += ["--volume", f"{source}:{target}:ro"]
    with Fleet("boxtest", 85, 2, mounts) as fleet:
        yield Boxes(fleet, archive)


def test_one_host(boxes: Boxes) -> None:
    boxes.play(1)
    boxes.one_host = boxes.answers()
    assert len(set(boxes.one_host)) == len(PROMPTS)


def test_mp_over_two_hosts_says_the_same(boxes: Boxes) -> None:
    started = time.monotonic()
    boxes.play(2)
    told(figure="mp in containers: site.yml with the change", seconds=round(time.monotonic() - started, 1))
    assert boxes.answers() == boxes.one_host
    for host in boxes.fleet.names:
        assert list(boxes.containers(host)) == ["vllm-chat"]
        command = boxes.fleet.sh(host, "docker exec vllm-chat ps -eo args 2>/dev/null || ps -eo args")
        assert "baremetal_vllm_main.py serve" in command and "--nnodes 2" in command
    before = [boxes.containers(host) for host in boxes.fleet.names]
    output, changed = boxes.play(2, "--diff")
    assert set(changed.values()) == {0}, output
    assert before == [boxes.containers(host) for host in boxes.fleet.names]
