# SPDX-License-Identifier: GPL-3.0-or-later
"""Services over two hosts in containers: a Docker Engine on each host, the real vLLM for the CPU, a real Ray.

The tests run in the order in which they stand. With executor ray, vLLM refuses CPUs: there a stand-in for it is in the image
of the real one, which gets the real Ray from wheels.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MP_ENGINE, PROMPTS, Site, six, write_standin
from fleet import ROOT, Fleet, docker, until

PLANNED = "vllm/vllm-openai-cpu:v0.32.0-x86_64"
PLANNED_GPU = "vllm/vllm-openai:v0.25.1"
LOCAL = "baremetal-test/vllm-cpu:0.32.0"
STANDIN = "baremetal-test/vllm-standin:0.25.1"
RAY = "2.60.0"
# The stand-in for vLLM comes before the real one on the path of the image's Python.
MAKE_STANDIN = f"""
docker run --name standin --volume /opt/standin/site:/src:ro --entrypoint sh {LOCAL} -c '
  cp -r /src /opt/standin
  echo "import sys; sys.path.insert(0, \\"/opt/standin\\")" >$(echo /opt/venv/lib/python*/site-packages)/standin.pth'
docker commit standin {STANDIN}; docker rm standin;
"""
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

    def play(
        self, hosts: int, *words: str, fail: bool = False, playbook: str = "site.yml", **more: Any
    ) -> tuple[str, dict[str, int]]:
        limit = int(self.fleet.sh(self.fleet.names[0], "ulimit -Hn"))
        settings = {
            "vllm_runtime": "container",
            "vllm_images": {PLANNED: self.archive},
            "vllm_container_nofile": limit,
            "vllm_container_shm_size": "256m",
            "docker_nofile": limit,
            "vllm_interconnect_network": f"10.{self.fleet.number}.1.0/24",
            "vllm_interconnect_timeout": 300,  # the tests may share their machine with others
            "vllm_start_timeout": 1200,
            "vllm_verify_client": "never",
            "vllm_api_key": "",
            "vllm_services": [self.service(hosts)],
        }
        names = self.fleet.names
        return self.fleet.play(ROOT / playbook, names, *words, fail=fail, **{**settings, **more})

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
    models = CACHE / "models"
    six(models)
    mounts = ["--volume", "/var/lib/docker", "--volume", "/var/lib/containerd"]
    for source, target in (
        (archive.parent, "/srv/images"),
        (models, "/opt/models"),
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


def test_a_rank_that_dies_and_a_host_that_reboots(boxes: Boxes) -> None:
    one, two = boxes.fleet.names
    first = boxes.containers(one)
    boxes.fleet.sh(two, "docker kill vllm-chat")
    until(lambda: not boxes.healthy(), 60, "the end of all engines")
    started = time.monotonic()
    until(boxes.healthy, 400)
    told(figure="mp in containers: a rank killed, served again", seconds=round(time.monotonic() - started, 1))
    assert boxes.containers(one) == first, "the keeper of the other host lives on"
    boxes.fleet.reboot(two)
    until(boxes.healthy, 600)
    assert boxes.answers() == boxes.one_host


def test_ranks_stop_together(boxes: Boxes) -> None:
    one, two = boxes.fleet.names
    assert boxes.fleet.sh(two, f"pgrep -f '{MP_ENGINE}'")
    boxes.fleet.sh(one, "systemctl stop vllm-chat")
    until(
        lambda: not boxes.fleet.sh(two, f"pgrep -f '{MP_ENGINE}'", check=False),
        60,
        "the end of the other rank's engine",
    )
    assert boxes.containers(one) == {}


def reaches(address: str, port: int) -> bool:
    """Whether this machine, which is no host of the cluster, reaches a port of one."""
    try:
        socket.create_connection((address, port), 3).close()
    except OSError:
        return False
    return True


def test_firewall_managers_let_the_hosts_in_and_nobody_else(boxes: Boxes) -> None:
    one, two = boxes.fleet.names
    managers = {
        one: {"vllm_interconnect_firewall": "ufw"},
        two: {"vllm_interconnect_firewall": "firewalld"},
    }
    output, changed = boxes.play(2, "--tags", "preflight", fail=True, each=managers)
    text = " ".join(output.split())
    for name in ("ufw", "firewalld"):
        assert f"the firewall manager {name} is not on the host: " in text
    assert set(changed.values()) == {0}
    apt = "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update && apt-get -qq install -y --no-install-recommends"
    boxes.fleet.sh(one, f"{apt} ufw </dev/null && ufw allow 22/tcp && ufw --force enable")
    # The start of firewalld takes the container's way to a name server with it: nothing can be installed after that.
    boxes.fleet.sh(two, f"{apt} firewalld netbase nftables </dev/null && systemctl start firewalld")
    before = [boxes.fleet.sh(one, "ufw show added"), boxes.fleet.sh(two, "firewall-cmd --list-all-zones")]

    boxes.play(2, each=managers)
    assert boxes.answers() == boxes.one_host
    for host in (one, two):
        assert reaches(boxes.fleet.manage(host), 22)
    assert not reaches(boxes.fleet.address(one), 29600)
    boxes.fleet.sh(one, "ufw --force disable")
    assert not reaches(boxes.fleet.address(one), 29600), "the table of nftables closes it, too"
    boxes.fleet.sh(one, "ufw --force enable")
    output, changed = boxes.play(2, "--diff", each=managers)
    assert set(changed.values()) == {0}, output

    boxes.play(2, playbook="playbooks/teardown.yml", each=managers)
    after = [boxes.fleet.sh(one, "ufw show added"), boxes.fleet.sh(two, "firewall-cmd --list-all-zones")]
    assert after == before
    boxes.fleet.sh(one, "ufw --force disable")
    boxes.fleet.sh(two, "systemctl disable --now firewalld")


def test_teardown_of_mp_left_nothing(boxes: Boxes) -> None:
    for host in boxes.fleet.names:
        assert boxes.containers(host) == {}
        assert boxes.fleet.sh(host, "ls /etc/systemd/system/vllm-*", check=False) == ""
        assert "baremetal_vllm" not in boxes.fleet.sh(host, "nft list tables")


class Nodes:
    """The stand-in for vLLM with executor ray, on both hosts."""

    def __init__(self, boxes: Boxes) -> None:
        self.boxes, self.fleet, self.seqs = boxes, boxes.fleet, 16

    def play(self, *words: str, **more: Any) -> tuple[str, dict[str, int]]:
        service = {
            "name": "chat",
            "model": "/opt/models/six",
            "image": STANDIN,
            "engine_version": "0.25.1",
            "hosts": self.fleet.names,
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": 2,
            "executor": "ray",
            "max_model_len": 512,
            "max_num_seqs": self.seqs,
            "env": {"MY_SECRET": "s3cr3t"},
        }
        settings = {
            "vllm_services": [service],
            "vllm_ray_wheels": "/srv/wheels",
            "vllm_container_gpus": "request",
            "vllm_container_options": ["--ulimit=memlock=65536:65536"],  # these engines may not raise limits
            "vllm_interconnect_firewall": "nftables",
            "vllm_interconnect_check": False,  # there is no GPU that could compute a sum
            "preflight_allow_untested_distribution": True,
        }
        words = (*words, "--skip-tags", "verify,nvidia_container_toolkit")
        return self.boxes.play(2, *words, **{**settings, **more})

    def engines(self) -> list[Any]:
        code = (
            "import json, urllib.request as r; key = open('/etc/vllm/chat/api_key').read().strip(); "
            "q = r.Request('http://127.0.0.1:8000/v1/models', headers={'Authorization': 'Bearer ' + key}); "
            "print(json.dumps(json.load(r.urlopen(q, timeout=5))['data'][0]['engines']))"
        )
        out = self.fleet.sh(self.fleet.names[0], f'python3 -c "{code}" 2>/dev/null', check=False)
        return list(json.loads(out)) if out.startswith("[") else []

    def serves(self) -> bool:
        addresses = [self.fleet.address(host) for host in self.fleet.names]
        return Counter(map(tuple, self.engines())) == Counter({(address, address): 2 for address in addresses})

    def status(self) -> str:
        address = f"{self.fleet.address(self.fleet.names[0])}:6379"
        ask = f"set -a; . /etc/ray/chat/env; RAY_ADDRESS={address} timeout 60 python3 -m ray.scripts.scripts status"
        return self.fleet.sh(self.fleet.names[0], f"docker exec ray-chat sh -c '{ask}'", check=False)


@pytest.fixture(scope="module")
def nodes(boxes: Boxes) -> Nodes:
    standin = CACHE / "standin-containers"
    write_standin(standin)
    if not boxes.fleet.sh(boxes.fleet.names[1], "command -v docker", check=False):  # none of the tests above ran
        boxes.play(2, "--tags", "docker")
    one, two = boxes.fleet.names
    for host in (one, two):
        boxes.fleet.sh(host, "rm -rf /opt/standin")
        docker("cp", str(standin), f"{host}:/opt/standin")
        boxes.fleet.sh(host, "ln -sf /opt/standin/nvidia-smi /usr/local/bin/nvidia-smi")
        # Docker gives GPUs to containers when it finds this program, which sets them up.
        boxes.fleet.sh(
            host,
            "printf '#!/bin/sh\\nexit 0\\n' >/usr/bin/nvidia-container-runtime-hook;"
            "chmod +x /usr/bin/nvidia-container-runtime-hook; systemctl restart docker",
        )
    if not boxes.fleet.sh(two, f"docker image ls --quiet {STANDIN}"):
        load = f"docker image inspect {LOCAL} >/dev/null 2>&1 || docker load --input {boxes.archive['archive']}"
        boxes.fleet.sh(one, f"set -e; {load}; {MAKE_STANDIN}")
        # Hosts of one service have one image, layer by layer: what each of them made would not do.
        carry = f"docker exec {one} docker save {STANDIN} | docker exec --interactive {two} docker load"
        subprocess.run(["sh", "-c", carry], check=True, capture_output=True)
    return Nodes(boxes)


def test_ray_forms_and_places_engines_of_a_standin(nodes: Nodes) -> None:
    started = time.monotonic()
    output, _ = nodes.play()
    told(figure="ray in containers: site.yml, with the image made", seconds=round(time.monotonic() - started, 1))
    assert "2 nodes with 4 GPUs are here" in output
    assert nodes.serves(), nodes.engines()
    status = nodes.status()
    assert status.partition("Active:")[2].partition("Pending:")[0].count("node_") == 2, status
    assert "4.0/4.0 GPU" in status
    for host in nodes.fleet.names:
        assert list(nodes.boxes.containers(host)) == ["ray-chat"], "the server is inside the node's container"
        assert RAY in nodes.fleet.sh(
            host,
            f"docker run --rm --entrypoint python3 baremetal/vllm-standin:0.25.1-ray{RAY} -c 'import ray; print(ray.__version__)'",
        )
        for port in (6379, 6380, 6381):
            assert not reaches(nodes.fleet.address(host), port), "this machine is no host of the cluster"
    before = [nodes.boxes.containers(host) for host in nodes.fleet.names]
    output, changed = nodes.play("--diff")
    assert set(changed.values()) == {0}, output
    assert before == [nodes.boxes.containers(host) for host in nodes.fleet.names]


def test_no_secret_is_shown_or_copied_to_workers_of_a_standin(nodes: Nodes) -> None:
    one, two = nodes.fleet.names
    secrets = [nodes.fleet.sh(one, f"cat /etc/vllm/chat/{name}") for name in ("api_key", "cluster_token")] + ["s3cr3t"]
    for host in (one, two):
        seen = nodes.fleet.sh(host, "docker inspect ray-chat; ps -eo args; systemctl show ray-chat vllm-chat")
        assert not [word for word in secrets if word in seen]
    environments = nodes.fleet.sh(two, "cat /proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'", check=False)
    assert "VLLM_HOST_IP=" in environments
    assert not [word for word in secrets if word in environments]


def test_a_changed_server_of_a_standin_leaves_the_nodes_alone(nodes: Nodes) -> None:
    before = [nodes.boxes.containers(host) for host in nodes.fleet.names]
    nodes.seqs = 8  # a change of env is one of the nodes, too
    nodes.play()
    assert nodes.serves()
    assert before == [nodes.boxes.containers(host) for host in nodes.fleet.names]
    nodes.fleet.sh(nodes.fleet.names[0], "systemctl stop vllm-chat")
    assert "api_server" not in nodes.fleet.sh(nodes.fleet.names[0], "ps -eo args"), "no server is left in the container"
    nodes.fleet.sh(nodes.fleet.names[0], "systemctl start vllm-chat")
    until(nodes.serves, 180)


def test_nodes_of_a_standin_come_back(nodes: Nodes) -> None:
    one, two = nodes.fleet.names
    nodes.fleet.sh(two, "docker kill ray-chat")
    until(lambda: not nodes.serves(), 60, "the end of the server")
    started = time.monotonic()
    until(nodes.serves, 300)
    told(
        figure="ray in containers: a worker's container killed, served again",
        seconds=round(time.monotonic() - started, 1),
    )
    nodes.fleet.reboot(one)
    started = time.monotonic()
    until(nodes.serves, 400)
    told(figure="ray in containers: the head host rebooted, served again", seconds=round(time.monotonic() - started, 1))
    output, changed = nodes.play()
    assert set(changed.values()) == {0}, output


def test_teardown_of_a_standin_leaves_nothing(nodes: Nodes) -> None:
    nodes.play(playbook="playbooks/teardown.yml")
    for host in nodes.fleet.names:
        assert nodes.boxes.containers(host) == {}
        assert nodes.fleet.sh(host, "ls /etc/systemd/system | grep -E '^(ray|vllm)[-_]'", check=False) == ""
