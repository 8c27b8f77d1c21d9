# SPDX-License-Identifier: GPL-3.0-or-later
"""A test machine with a real kernel: Debian 12 in QEMU, emulated, so that it needs neither KVM nor root."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOOT_LIMIT_S = 600  # a quiet machine takes 45


class Guest:
    """One machine on an overlay of the image, which stays as it is."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.key = folder / "id_ed25519"
        self.key.write_bytes((image / "id_ed25519").read_bytes())
        self.key.chmod(0o600)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.inventory = folder / "hosts.yml"
        self.inventory.write_text(
            json.dumps(
                {
                    "all": {
                        "hosts": {
                            "guest": {
                                "ansible_host": "127.0.0.1",
                                "ansible_port": self.port,
                                "ansible_user": "root",
                                "ansible_ssh_private_key_file": str(self.key),
                                "ansible_ssh_common_args": " ".join(self.options),
                                "ansible_python_interpreter": "/usr/bin/python3",
                            }
                        }
                    }
                }
            )
        )

    @property
    def options(self) -> list[str]:
        known = ["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"]
        return [*known, "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"]

    def start(self) -> None:
        # What else is tested meanwhile has limits of time; the guest's are generous.
        command = ["nice", "-n", "10"]
        command += ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536"]
        command += ["-kernel", str(self.image / "boot"), "-nodefaults", "-display", "none"]
        # What the guest writes goes to a temporary file, and need not reach this machine's disk.
        command += ["-drive", f"file={self.image}/disk.img,if=virtio,format=raw,snapshot=on,cache=unsafe"]
        command += ["-netdev", f"user,id=net0,hostfwd=tcp:127.0.0.1:{self.port}-:22"]
        command += ["-device", "virtio-net-pci,netdev=net0,id=nic0", "-device", "virtio-rng-pci"]
        command += ["-serial", f"file:{self.folder}/console.log"]
        command += ["-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.wait()

    def wait(self) -> None:
        end = time.monotonic() + BOOT_LIMIT_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"QEMU ended with {self.process.returncode}\n{self.console()}")
            if self.run("true", check=False).returncode == 0:
                return
            time.sleep(2)
        raise AssertionError(f"the guest did not answer within {BOOT_LIMIT_S} s\n{self.console()}")

    def console(self) -> str:
        path = self.folder / "console.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-40:]) if path.exists() else ""

    def run(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = ["ssh", *self.options, "-o", "ConnectTimeout=60", "-i", str(self.key), "-p", str(self.port)]
        done = subprocess.run([*command, "root@127.0.0.1", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{script}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def out(self, script: str) -> str:
        return self.run(script).stdout.strip()

    def play(self, playbook: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """ansible-playbook as a user runs it; output and errors in stdout."""
        with self.playing(playbook, *arguments) as process:
            try:
                output, _ = process.communicate(timeout=900)
            except subprocess.TimeoutExpired:
                process.kill()  # else leaving the block waits for it
                raise
            return subprocess.CompletedProcess(process.args, process.returncode, output)

    def playing(self, playbook: Path, *arguments: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        settings = {
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
            "ANSIBLE_INJECT_FACT_VARS": "false",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_TIMEOUT": "30",
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
        }
        return subprocess.Popen(
            ["ansible-playbook", "-i", str(self.inventory), str(playbook), *arguments],
            cwd=ROOT,
            env=kept | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def monitor(self, execute: str, **arguments: object) -> None:
        """One command of QEMU's monitor."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self.folder / "qmp"))
            stream = line.makefile("rw")
            for command in ({"execute": "qmp_capabilities"}, {"execute": execute, "arguments": arguments}):
                stream.write(json.dumps(command) + "\n")
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    assert "error" not in answer, answer

    def cable(self, plugged: bool) -> None:
        """Pulls the network cable, or plugs it in again."""
        self.monitor("set_link", name="nic0", up=plugged)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
