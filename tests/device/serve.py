#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings up four services on this machine's GPUs with `ansible-playbook site.yml`, and compares plan and reality.

    pip download --dest wheels --no-deps supervisor==4.3.0     # before, for a machine without a network
    tests/device/serve.py VLLM_PYTHON OUT.json [--wheels wheels] [--python PYTHON] [--ansible PLAYBOOK] [--keep] [--boot] [--apart]

VLLM_PYTHON is the interpreter of an environment that holds vLLM; nothing is installed, no network, Docker or systemd is
needed. Weights are dummies (--load-format dummy) behind the real models' config.json; files of the real size take no
disk. Services: a 7B as two replicas of TP 1, a 32B on TP 2, a mixture of experts and an embedding model, on two GPUs or
more (which they share where there are two). With one GPU the 7B (TP 1), a second one, the mixture and the embedding model run.

Runs site.yml twice (the second must change nothing), changes one service, sees that only that one restarted, and tears
down. With --boot it also starts all of them at once, as after a boot, and compares the KV caches that they get. With
--apart there is a 7B on each GPU instead, which start together: the first run has to be shorter than all starts in a row. Prints a
line for each service, writes all of it to OUT.json, and exits with 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "collections"), str(Path(__file__).parent)]
import dummy_model  # noqa: E402

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.tables import load  # noqa: E402

# Measured KV tokens may be this much off the plan (docs/performance.md has the planner's own bounds).
BOUND = 0.10
BOOT_S = 900
# What this machine sets for its links, and where compiled kernels lie, holds for the servers, too.
LINKS = ("NCCL_", "NVSHMEM_", "TORCH_SYMM_", "FLASHINFER_")
RECAP = re.compile(r"^here\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)


def configs() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/benchmarks/truth/configs.json").read_text())
    # Not of its size, so that the planner does without it; vLLM's model reads it.
    bge = {**load("models")["models"]["BAAI/bge-m3"]["config"], "position_embedding_type": "absolute"}
    return {**found, "bge-m3": bge}


def services(gpus: int, memory_mib: int, models: Path) -> list[dict[str, Any]]:
    links = {name: value for name, value in os.environ.items() if name.startswith(LINKS)}
    dummy = {"extra_args": ["--load-format", "dummy"], "env": links}
    chat = {"name": "chat", "model": str(models / "qwen2.5-7b"), "max_model_len": 8192, **dummy}
    chat |= {"tensor_parallel_size": 1, "data_parallel_size": min(gpus, 2)}
    big = {
        "name": "big",
        "model": str(models / "qwen2.5-32b"),
        "max_model_len": 8192,
        "tensor_parallel_size": 2,
        **dummy,
    }
    # 57 GiB of weights are too much beside the others on two GPUs of 80 GB.
    moe_model, moe_length = ("qwen3-30b-a3b", 8192) if memory_mib > 120_000 else ("olmoe-1b-7b", 4096)
    moe = {"name": "moe", "model": str(models / moe_model), "max_model_len": moe_length, "gpus": 1, **dummy}
    embed = {"name": "embed", "model": str(models / "bge-m3"), "max_model_len": 8192, **dummy}
    if gpus >= 2:
        return [chat, big, moe, embed]
    return [chat, {**chat, "name": "second", "max_model_len": 4096}, moe, embed]


class Play:
    """site.yml on this machine with the services of a file."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work, self.options = work, options
        self.data = Path("/tmp/serve-device")

    def settings(self, entries: list[dict[str, Any]]) -> None:
        variables = {
            "vllm_services": entries,
            "vllm_existing_python": self.options.vllm_python,
            "vllm_python": self.options.python or self.options.vllm_python,
            "vllm_service_manager": "supervisor",
            "vllm_verify_client": "never",
            "vllm_user": "{{ ansible_facts['user_id'] }}",
            "vllm_root": str(self.data),
            "vllm_config_dir": str(self.data / "config"),
            "vllm_state_dir": str(self.data / "state"),
            "vllm_log_dir": str(self.data / "log"),
            "ansible_become": False,
            "preflight_allow_untested_distribution": True,
        }
        hosts = {"here": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}}
        (self.work / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts, "vars": variables}}))

    def run(self, playbook: str = "site.yml", ok: bool = True) -> tuple[str, int, float]:
        """(output, changed, seconds)."""
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections")}
        if self.options.wheels:
            environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.options.wheels.resolve())}
        start = time.monotonic()
        process = subprocess.Popen(
            [self.options.ansible, playbook, "-i", str(self.work / "hosts.yml")],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines = []
        for line in process.stdout or []:
            lines.append(line)
            if re.match(r"\s+\[here\]|fatal|TASK .*(Wait|Plan|Prove)", line):
                print(f"{time.monotonic() - start:5.0f} s {line.rstrip()[:400]}", flush=True)
        output, seconds = "".join(lines), time.monotonic() - start
        if ok and process.wait() != 0:
            print(output[-6000:])
            sys.exit(f"serve: {playbook} failed")
        match = RECAP.search(output)
        return output, int(match[1]) if match else -1, seconds

    def measured(self) -> dict[str, dict[str, Any]]:
        files = sorted(self.data.glob("config/*/measured.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in files}

    def control(self, *words: str) -> str:
        program = [self.data / "tools/bin/supervisorctl", f"--configuration={self.data}/supervisor/supervisord.conf"]
        done = subprocess.run([*map(str, program), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def pid(self, name: str) -> str:
        return self.control("pid", f"vllm-{name}")

    def boot(self, names: list[str]) -> tuple[dict[str, int], float]:
        """KV tokens of each service, and seconds until all answered, when all were started at once."""
        urls = {
            name: json.loads((self.data / "config" / name / "endpoint.json").read_text())["base_url"] for name in names
        }
        self.control("stop", "all")
        start = time.monotonic()
        self.control("start", "all")
        while waiting := [name for name in names if not answers(urls[name].removesuffix("/v1") + "/health")]:
            if time.monotonic() - start > BOOT_S:
                sys.exit(f"serve: {', '.join(waiting)} did not answer {BOOT_S} s after all were started")
            time.sleep(1)
        found = {}
        for name in names:
            last = (self.data / "log" / f"{name}.log").read_text().rpartition("baremetal: start of ")[2]
            sizes = re.findall(r"GPU KV cache size: ([\d,]+) tokens", last)
            found[name] = min(
                (int(size.replace(",", "")) for size in sizes), default=0
            )  # of replicas, as the role does
        return found, time.monotonic() - start


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def compare(seen: dict[str, dict[str, Any]], failures: list[str]) -> list[dict[str, Any]]:
    """Prints what each service's engine measured against its plan."""
    rows = []
    for name, row in seen.items():
        planned, found = row["planned"].get("kv_cache_tokens", 0), row["measured"].get("kv_cache_tokens", 0)
        off = found / planned - 1 if planned else 0.0
        if planned and not -BOUND <= off <= BOUND:
            failures.append(f"{name}: {found} KV tokens measured, {planned} planned ({off:+.1%})")
        rows.append({"service": name, "planned": planned, "measured": found, "off": round(off, 4), **row})
        weights = f"{row['measured'].get('weights_gib', 0):.2f} of {row['planned'].get('weights_gib', 0):.2f} GiB"
        print(
            f"serve: {name:7} KV tokens {found:>9} planned {planned:>9} ({off:+.1%}), weights {weights}, "
            f"up in {row['seconds']:.0f} s {row['stages']}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vllm_python")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ansible", default=str(ROOT / ".venv/bin/ansible-playbook"))
    parser.add_argument("--python", help="interpreter to make the supervisor's environment with, if not VLLM_PYTHON")
    parser.add_argument("--wheels", type=Path, help="folder with supervisor's wheel, for a machine without a network")
    parser.add_argument("--keep", action="store_true", help="leave the services running")
    parser.add_argument("--boot", action="store_true", help="at the end, start all services at once")
    parser.add_argument("--apart", action="store_true", help="a service with a GPU of its own on each instead")
    options = parser.parse_args()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    smi = subprocess.run(query, capture_output=True, text=True, check=False)
    memories = [int(line) for line in smi.stdout.splitlines() if line.isdigit()]
    gpus = len(memories)
    if not gpus:
        sys.exit("serve: nvidia-smi lists no GPU on this machine")
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        play = Play(work, options)
        entries = services(gpus, min(memories), work / "models")
        if options.apart:
            one = {**entries[0], "data_parallel_size": 1}
            entries = [{**one, "name": f"chat{gpu}", "gpus": [gpu]} for gpu in range(gpus)]
        for entry in entries:
            path = Path(entry["model"])
            if not path.exists():
                dummy_model.write(configs()[path.name], path)
        play.settings(entries)
        try:
            _, _, first = play.run()
            starts = [row["seconds"] for row in play.measured().values()]
            if options.apart:
                print(
                    f"serve: the first run took {first:.0f} s, its starts {' + '.join(f'{took:.0f}' for took in starts)} s"
                )
                if gpus > 1 and first >= sum(starts):
                    failures.append("services with GPUs of their own did not start together")
            _, changed, second = play.run()
            if changed != 0:
                failures.append(f"the second run changed {changed}")
            before = {entry["name"]: play.pid(entry["name"]) for entry in entries}
            entries[-1]["max_num_seqs"] = 64
            play.settings(entries)
            output, _, third = play.run()
            after = {entry["name"]: play.pid(entry["name"]) for entry in entries}
            restarted = [name for name in before if before[name] != after[name]]
            if restarted != [entries[-1]["name"]]:
                failures.append(f"a change of {entries[-1]['name']} restarted {', '.join(restarted) or 'nothing'}")
            stood_by = "answered all the time" in output
            boot: dict[str, int] = {}
            if options.boot:
                boot, seconds = play.boot([entry["name"] for entry in entries])
                print(f"serve: all started at once, and answered after {seconds:.0f} s: KV tokens {boot}")
                for name, row in play.measured().items():
                    tokens = row["measured"].get("kv_cache_tokens", 0)
                    if tokens and not -BOUND <= boot[name] / tokens - 1 <= BOUND:
                        failures.append(f"{name}: {boot[name]} KV tokens when all started at once, {tokens} alone")
        finally:
            rows = compare(play.measured(), failures)
            if not options.keep:
                play.run("playbooks/teardown.yml", ok=False)
        told = {"gpus": gpus, "first_s": first, "second_s": second, "change_s": third, "stood_by": stood_by,
                "services": rows, "boot": boot, "failures": failures}  # fmt: skip
        options.out.write_text(json.dumps(told, indent=1) + "\n")
    print(f"serve: first run {first:.0f} s, second {second:.0f} s (changed={changed}), change of one {third:.0f} s"
          f"{', another server stood by' if stood_by else ''}")  # fmt: skip
    for failure in failures:
        print(f"serve: FAILED {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
