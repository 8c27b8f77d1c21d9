#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tasks and seconds of a second run: this collection's driver, engine and container toolkit beside what peers run for them.

    molecule converge -s peers_standin
    tests/benchmarks/peers.py --ansible BIN --roles FOLDER [--runs 5]

BIN is the bin folder of an environment with the package `ansible` (peers need community.general); both sides run with
it. FOLDER holds the peers' roles by these names: geerlingguy.docker, nvidia.nvidia_driver, and DeepOps' `facts` and
`nvidia_container_toolkit`. Theirs run once, or until they change nothing, then both sides run in turn. Their package
names are set to those that the stand-in of Ubuntu 22.04 has; nothing else of theirs is changed. A run of theirs reads
the host's facts, as their roles need them. The last lines are the ratios of the medians, ours to theirs: of seconds, which
want a machine that does nothing else, and of the controller's processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS = "peers-ubuntu2204-ours", "peers-ubuntu2204-theirs"
MIRROR = "http://127.0.0.1:8080"
PACKAGES = [f"{name}-580-server" for name in ("libnvidia-compute", "nvidia-utils", "nvidia-compute-utils")]
PEERS = [
    {
        "hosts": THEIRS,
        "become": True,
        "vars": {
            "nvidia_driver_ubuntu_packages": ["nvidia-dkms-580-server-open", *PACKAGES],
            "nvidia_driver_skip_reboot": True,
            "docker_repo_url": f"{MIRROR}/linux",
            "docker_packages": ["docker-ce", "docker-ce-cli", "containerd.io"],
            "nvidia_container_toolkit_repo_base_url": f"{MIRROR}/libnvidia-container",
        },
        "roles": ["facts", "nvidia.nvidia_driver", "geerlingguy.docker", "nvidia_container_toolkit"],
    }
]


def play(ansible: Path, inventory: Path, playbook: Path, roles: Path | None) -> tuple[dict[str, int], float, float]:
    """The recap's counts, the seconds, and the controller's processor seconds."""
    settings = {
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections") if roles is None else "",
        "ANSIBLE_ROLES_PATH": str(roles or ""),
        "ANSIBLE_PIPELINING": "true",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_HOST_KEY_CHECKING": "false",
        "PATH": f"{ansible}:{os.environ['PATH']}",
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    done = subprocess.run(
        ["ansible-playbook", "-i", inventory, playbook],
        cwd=inventory.parent,  # not by this repository's ansible.cfg
        env=kept | {name: value for name, value in settings.items() if value},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    recap = re.search(rf"^(?:{OURS}|{THEIRS}) +: (ok=.*)$", done.stdout, re.M)
    if done.returncode or not recap:
        sys.exit(f"{playbook.name} ended with {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    counts = {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", recap[1])}
    return counts, seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def reach(host: str, key: Path) -> dict[str, object]:
    """Connection variables of a container, which lets the key in from now on."""
    port = subprocess.run(["docker", "port", host, "22/tcp"], capture_output=True, text=True, check=True).stdout
    subprocess.run(
        ["docker", "exec", "-i", host, "sh", "-c", "cat >> /root/.ssh/authorized_keys"],
        input=key.with_suffix(".pub").read_bytes(),
        check=True,
    )
    return {
        "ansible_host": "127.0.0.1",
        "ansible_port": int(port.split()[0].rpartition(":")[2]),
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(key),
        "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
        "ansible_python_interpreter": "/usr/bin/python3",
        "pins": sums(host, "pins"),
        "engine": sums(host, "docker"),
    }


def sums(host: str, name: str) -> dict[str, str]:
    """Sums of the keys of a stand-in's repositories, which users would have among their variables or do not need."""
    text = subprocess.run(
        ["docker", "exec", host, "cat", f"/srv/mirror/{name}.json"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, str] = json.loads(text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ansible", type=Path, required=True, metavar="BIN")
    parser.add_argument("--roles", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        key, inventory, playbook = (Path(folder) / name for name in ("id_ed25519", "hosts.json", "peers.json"))
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        inventory.write_text(json.dumps({"all": {"hosts": {name: reach(name, key) for name in (OURS, THEIRS)}}}))
        playbook.write_text(json.dumps(PEERS))
        sides = {
            "peers": (playbook, given.roles),
            "baremetal.vllm": (ROOT / "molecule/peers_standin/converge.yml", None),
        }
        for side in sides.values():  # the first run, whose seconds are the packages'
            play(given.ansible, inventory, *side)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        processor: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.runs):
            for name, side in sides.items():
                counts, took, worked = play(given.ansible, inventory, *side)
                seconds[name].append(took)
                processor[name].append(worked)
                print(
                    f"{name:<16}{took:7.1f} s {worked:7.1f} s of the controller's processors   "
                    + " ".join(f"{key}={counts[key]}" for key in ("ok", "changed", "skipped"))
                )
    for what, measured in (("seconds", seconds), ("the controller's processor seconds", processor)):
        ours, theirs = (statistics.median(measured[name]) for name in ("baremetal.vllm", "peers"))
        print(f"medians of {what}: ours {ours:.1f}, theirs {theirs:.1f}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
