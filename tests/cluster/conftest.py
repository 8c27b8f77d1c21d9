# SPDX-License-Identifier: GPL-3.0-or-later
"""Three hosts with a real vLLM for the CPU, which the tests of executor mp and of the preflight share."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import KEEP, ROOT, Fleet, docker, engine

sys.path.insert(0, str(ROOT / "plugins" / "module_utils"))
import random_llama

RAY_PYTHON = "/opt/ray/venvs/2.60.0/bin/python"
# Finds engines of executor mp (`pgrep -f`), and not their keepers, whose arguments end with the same words.
MP_ENGINE = "^[^ ]*python[^ ]* /opt/vllm/lib/baremetal_vllm_main.py"
PROMPTS = ["hello", "the quick brown fox", "one two three", "a harbor in the north", "zephyr and yarrow"]
ASK = """
import json, sys, urllib.request as r
key = open("/etc/vllm/chat/api_key").read().strip()
model = json.load(open("/etc/vllm/chat/endpoint.json"))["model"]
opener = r.build_opener(r.ProxyHandler({}))
found = []
for prompt in json.load(sys.stdin):
    body = {"model": model, "prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    request = r.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(),
                        {"Content-Type": "application/json", "Authorization": "Bearer " + key})
    found.append(json.loads(opener.open(request, timeout=120).read())["choices"][0]["text"])
print(json.dumps(found))
"""


class Site:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.one_host: list[str] = []

    def service(self, hosts: int, **more: Any) -> dict[str, Any]:
        return {
            "name": "chat",
            "model": "/opt/models/six",
            "hosts": self.fleet.names[:hosts],
            "tensor_parallel_size": hosts,  # with pipeline stages, vLLM 0.32.0 for CPUs fails at the first request
            "dtype": "float32",  # so that the same weights give the same text however they are spread
            "max_model_len": 512,
            "max_num_seqs": 4,
            "env": {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            **({"executor": "mp"} if hosts > 1 else {}),
            **more,
        }

    def play(
        self, hosts: int, *words: str, fail: bool = False, playbook: str = "site.yml", **more: Any
    ) -> tuple[str, dict[str, int]]:
        return self.fleet.play(
            ROOT / playbook,
            self.fleet.names,
            *words,
            fail=fail,
            vllm_existing_python="/opt/engine/bin/python",
            vllm_interconnect_network=f"10.{self.fleet.number}.1.0/24",
            vllm_verify_client="never",
            vllm_api_key="",
            vllm_services=[self.service(hosts)],
            # The tests may share their machine with others: what an engine does in seconds then takes minutes.
            **{"vllm_interconnect_timeout": 300, "vllm_start_timeout": 1200, **more},
        )

    def answers(self) -> list[str]:
        done = subprocess.run(
            ["docker", "exec", "-i", self.fleet.names[0], "python3", "-c", ASK],
            input=json.dumps(PROMPTS),
            capture_output=True,
            text=True,
            check=True,
        )
        return list(json.loads(done.stdout))

    def healthy(self) -> bool:
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/health', timeout=5).status)"
        return self.fleet.sh(self.fleet.names[0], f'python3 -c "{code}"', check=False).endswith("200")

    def traffic(self, seconds: int, after: int) -> subprocess.Popen[str]:
        head = self.fleet.names[0]
        docker("cp", str(ROOT / "tests/benchmarks/lost_requests.py"), f"{head}:/root/")
        model = json.loads(self.fleet.sh(head, "cat /etc/vllm/chat/endpoint.json"))["model"]
        words = ["http://127.0.0.1:8000/v1", "/etc/vllm/chat/api_key", model, str(seconds), str(after)]
        return subprocess.Popen(
            ["docker", "exec", head, "python3", "/root/lost_requests.py", *words], stdout=subprocess.PIPE, text=True
        )


def six(models: Path) -> None:
    """A model with six heads and layers, so that TP can be 2 and 3, and PP as well."""
    six = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6}
    random_llama.CONFIG.update(six, num_hidden_layers=6)
    if not random_llama.current(str(models / "six"), 0):
        random_llama.write(str(models / "six"), 0)


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    models = ROOT / ".cache" / "cluster" / "models"
    six(models)
    mounts = ["--volume", f"{engine()}:/opt/engine:ro", "--volume", f"{models}:/opt/models:ro"]
    with Fleet("mptest", 84, 3, mounts) as fleet:
        for host in fleet.names:
            fleet.sh(
                host,
                "test -e /usr/lib/x86_64-linux-gnu/libnuma.so.1 || (apt-get -qq update && apt-get -qq install libnuma1)",
            )
        yield Site(fleet)


@pytest.fixture(scope="session")
def ray_fleet() -> Iterator[Fleet]:
    """Four hosts for a Ray cluster, and a fifth that has no part in it. Ray is installed once, by the role, and kept."""
    folder = ROOT / ".cache" / "cluster"
    standin, models, venvs = folder / "standin", folder / "models", folder / "ray"
    six(models)
    write_standin(standin)
    venvs.mkdir(exist_ok=True)
    mounts = ["--volume", f"{standin}:/opt/standin:ro", "--volume", f"{models}:/opt/models:ro"]
    with Fleet("raytest", 83, 5, [*mounts, "--volume", f"{venvs}:/opt/ray/venvs"]) as fleet:
        for word in () if KEEP and list(venvs.glob("*/.baremetal-complete.json")) else ("main", "teardown"):
            fleet.play(ROOT / "tests/cluster/ray.yml", fleet.names[:1], entry_point=word, ray_cluster_num_cpus=2)
        yield fleet


def write_standin(folder: Path) -> None:
    """A folder with stand-ins for nvidia-smi, which shows two H200, and for an environment with vLLM and the real Ray."""
    tests = ROOT / "tests"
    shutil.copytree(tests / "fakes" / "vllm_standin", folder / "site", dirs_exist_ok=True)  # the folder may be mounted
    for place, version in (("site", "0.25.1"), ("next", "0.26.0")):
        metadata = folder / place / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True, parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    shutil.copy(tests / "fakes" / "nvidia_smi.py", folder)
    captures = tests / "unit" / "plugins" / "modules" / "captures"
    header, *rows = csv.reader((captures / "h200_x2_query.csv").read_text().splitlines(), skipinitialspace=True)
    gpus = [dict(zip([field.split()[0] for field in header], row, strict=True)) for row in rows]
    topo = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\t0-31\t0\nGPU1\tNV18\t X \t0-31\t0\n"
    scene = {"gpus": gpus, "topo": {"-m": topo, "-p2p r": (captures / "h200_x2_p2p_r.txt").read_text()}}
    (folder / "scene.json").write_text(json.dumps(scene))
    for name, line in (
        ("python", f'PYTHONPATH="$PYTHONPATH:/opt/standin/site" exec {RAY_PYTHON} "$@"'),
        # The next release of the stand-in for vLLM.
        ("python-next", f'PYTHONPATH="$PYTHONPATH:/opt/standin/next:/opt/standin/site" exec {RAY_PYTHON} "$@"'),
        ("nvidia-smi", 'NVIDIA_SMI_SCENE=/opt/standin/scene.json exec python3 /opt/standin/nvidia_smi.py "$@"'),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
