#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long site.yml takes on many hosts on which nothing has to be done, and how that grows with their number.

    tests/benchmarks/scale.py [NUMBER...]     (default: 5 50; root, Docker Engine)

Hosts are systemd containers on a network of their own, each with one service, whose engine is a stand-in (the fake OpenAI
server of the tests). For each number of hosts: one run that sets them up, then one that changes nothing, with forks 25.
Prints a line of JSON for each: seconds, seconds of CPU of the controller, memory of all its processes together (PSS, looked at
every two seconds) and of the largest, changed hosts; and at the end how the second run grew from the fewest to the most hosts:
the ratio of the seconds, that ratio over the one of hosts / forks (1 is linear), and over the one of hosts / forks rounded up,
which a controller would reach that has a processor for each fork. A run in which a host failed, or a second one that changed
something, ends it: their times would say nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"
FORKS = 25
NETWORK, SUBNET = "baremetal-scale", "10.79.0"
# Each systemd takes five of them, of the same user; the kernel's default is 128.
INOTIFY, INOTIFY_NEEDED = Path("/proc/sys/fs/inotify/max_user_instances"), 1024
RUN = [
    *("--cap-add", "SYS_ADMIN", "--cap-add", "SYS_PTRACE", "--security-opt", "seccomp=unconfined"),
    *("--security-opt", "apparmor=unconfined", "--cgroupns=host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
    *("--tmpfs", "/run", "--tmpfs", "/tmp", "--stop-signal", "SIGRTMIN+3"),
]
STANDIN = """#!/bin/sh
exec /usr/bin/python3 /opt/standin/serve.py "$@"
"""
SERVE = """import os, sys
if "-c" in sys.argv[1:2]:
    exec(sys.argv[2]); sys.exit()
sys.path.insert(0, "/opt/standin")
from fakes.openai_server import OpenAiServer
from fakes.server import Server
class Here(OpenAiServer):
    def __init__(self):
        super().__init__(os.environ["VLLM_API_KEY"])
        self.server_close()
        Server.__init__(self, int(sys.argv[sys.argv.index("--port") + 1]))
Here().serve_forever()
"""


def docker(*words: str, check: bool = True) -> str:
    return subprocess.run(["docker", *words], check=check, capture_output=True, text=True).stdout.strip()


def start(number: int, folder: Path) -> None:
    image = subprocess.run([ROOT / "molecule/images/build.sh", "debian12"], check=True, capture_output=True, text=True)
    tag = image.stdout.split()[-1]
    # Below Docker's own group all hosts together would get the processor time of one process of the controller.
    group = ["--cgroup-parent", "/"] if docker("info", "--format", "{{.CgroupDriver}}") == "cgroupfs" else []
    there = docker("ps", "--format", "{{.Names}}").split()
    if NETWORK not in docker("network", "ls", "--format", "{{.Name}}").split():
        docker("network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
    for host in range(1, number + 1):
        name = f"scale{host}"
        if name not in there:
            address = f"{SUBNET}.{host + 9}"
            mounts = ["--volume", f"{folder / 'standin'}:/opt/standin:ro"]
            mounts += ["--volume", f"{folder / 'key.pub'}:/root/.ssh/authorized_keys:ro"]
            docker("run", "--detach", "--name", name, "--network", NETWORK, "--ip", address, *RUN, *group, *mounts, tag)
    for host in range(1, number + 1):
        deadline = time.monotonic() + 300
        while docker("exec", f"scale{host}", "systemctl", "is-active", "ssh", check=False) != "active":
            if time.monotonic() > deadline:
                raise SystemExit(f"scale{host} did not boot within 300 s")
            time.sleep(1)


def memory_mib(process: int) -> float:
    """PSS of a process and all below it; 0 for one that has gone."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0.0
    own = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return (int(own[1]) / 1024 if own else 0.0) + sum(memory_mib(int(child)) for child in children)


def play(number: int, folder: Path) -> dict[str, Any]:
    hosts = {f"scale{host}": {"ansible_host": f"{SUBNET}.{host + 9}"} for host in range(1, number + 1)}
    names = list(hosts)
    variables = {
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(folder / "key"),
        "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
        "ansible_python_interpreter": "/usr/bin/python3",
        "vllm_existing_python": "/opt/standin/python",
        "vllm_api_key": "",
        "vllm_verify_client": "never",
        "vllm_services": [
            {"name": "chat", "model": "random-llama", "source": "generated", "hosts": names, "max_model_len": 512}
        ],
    }
    inventory = folder / f"hosts{number}.json"
    inventory.write_text(json.dumps({"all": {"hosts": hosts, "vars": variables}}))
    environment = os.environ | {"ANSIBLE_PIPELINING": "1", "ANSIBLE_INJECT_FACT_VARS": "false"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [BIN / "ansible-playbook", ROOT / "site.yml", "-i", inventory, "--forks", str(FORKS)]
    log, peak = folder / f"run{number}.log", 0.0
    with log.open("w") as out:
        run = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        while True:
            try:
                run.wait(2)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, memory_mib(run.pid))
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    recap = re.findall(r"^scale\d+ .*changed=(\d+) +unreachable=0 +failed=0 ", log.read_text(), re.MULTILINE)
    if run.returncode or len(recap) != number:
        raise SystemExit(log.read_text()[-5000:])
    return {
        "hosts": number,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "memory_mib": round(peak),
        "largest_process_mib": after.ru_maxrss // 1024,
        "changed": sum(int(changed) > 0 for changed in recap),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    numbers = [int(word) for word in sys.argv[1:]] or [5, 50]
    folder = Path(tempfile.mkdtemp(prefix="baremetal-scale-"))
    (folder / "standin").mkdir()
    shutil.copytree(ROOT / "tests" / "fakes", folder / "standin" / "fakes")
    (folder / "standin" / "python").write_text(STANDIN)
    (folder / "standin" / "python").chmod(0o755)
    (folder / "standin" / "serve.py").write_text(SERVE)
    folder.chmod(0o755)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    seconds, inotify = {}, INOTIFY.read_text()
    if int(inotify) < INOTIFY_NEEDED:
        INOTIFY.write_text(str(INOTIFY_NEEDED))
    try:
        for number in numbers:
            start(number, folder)
            print(json.dumps({"run": "first", **play(number, folder)}), flush=True)
            again = play(number, folder)
            print(json.dumps({"run": "second", **again}), flush=True)
            if again["changed"]:
                raise SystemExit(f"the second run changed {again['changed']} hosts, see {folder}/run{number}.log")
            seconds[number] = again["seconds"]
    finally:
        for name in docker("ps", "-a", "--format", "{{.Names}}", "--filter", f"network={NETWORK}").split():
            docker("rm", "--force", "--volumes", name, check=False)
        docker("network", "rm", NETWORK, check=False)
        INOTIFY.write_text(inotify)
    low, high = min(seconds), max(seconds)
    if low != high:
        growth = seconds[high] / seconds[low]
        batches = math.ceil(high / FORKS) / math.ceil(low / FORKS)
        against = {"of_hosts_by_forks": growth / (high / low), "of_batches": growth / batches}
        print(json.dumps({"growth": round(growth, 2), **{name: round(value, 2) for name, value in against.items()}}))


if __name__ == "__main__":
    main()
