#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts vLLM engines on real GPUs, with dummy weights, and writes down where their memory went.

    vllm_truth.py CASES.json OUT_DIR [--gpus N] [--limit SECONDS] [--only NAME,...]

CASES.json: {"configs": {name: config.json}, "cases": [{"model": name, "tensor_parallel_size": 1, ...}]}: every key of a
case but ``model``, ``name``, ``runner`` and ``trace`` goes to the engine as it is. OUT_DIR/rows.jsonl gets one row for
each case as it ends, so a run that is cut short loses nothing. A GPU runs one engine at a time: profiling would take a
neighbour's memory for its own.

The same file is loaded by the engine's processes as a vLLM plugin, which reads the exact bytes that the log rounds to
10 MiB. ``"trace": true`` also lists what was allocated at the peak of the profile run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

GIB = 1 << 30
NOT_ENGINE = ("model", "name", "trace", "env", "predicted_before")
MARK = "VLLM_TRUTH_FILE"


def register_hook() -> None:
    """Entry point of the plugin: makes the workers write what they measured into the file that MARK names."""
    target = os.environ.get(MARK)
    if not target:
        return
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    if getattr(Worker, "_truth", False):
        return
    Worker._truth = True
    measure, warm_up = Worker.determine_available_memory, Worker.compile_or_warm_up_model
    found: dict = {}

    def save(worker) -> None:
        Path(f"{target}.{worker.rank}").write_text(json.dumps(found))

    def determine_available_memory(self):
        first = self.init_snapshot
        found.update(
            total=first.total_memory,
            before=first.total_memory - first.free_memory,
            requested=self.requested_memory,
            weights=int(self.model_runner.model_memory_usage),
            model_runner="V2" if ".gpu.model_runner" in type(self.model_runner).__module__ else "V1",
        )
        save(self)
        profile = self.model_runner.profile_run

        def traced() -> None:
            torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=1_000_000)
            try:
                profile()
            finally:
                found["peak"] = live_at_peak(torch.cuda.memory._snapshot(), torch.cuda.current_device())
                torch.cuda.memory._record_memory_history(None)

        if os.environ.get(MARK + "_TRACE"):
            self.model_runner.profile_run = traced
        available = measure(self)
        found.update(
            torch_peak=int(self.peak_activation_memory),
            non_torch=int(self.non_torch_memory),
            cudagraph_est=int(getattr(self, "cudagraph_memory_estimate", 0)),
            available=int(self.available_kv_cache_memory_bytes),
        )
        save(self)
        return available

    def compile_or_warm_up_model(self):
        capture = self.model_runner.capture_model

        def counted():
            found["cudagraph_actual"] = int(capture())
            return found["cudagraph_actual"]

        self.model_runner.capture_model = counted
        result = warm_up(self)
        # Models without a KV cache are not profiled.
        found.setdefault("weights", int(self.model_runner.model_memory_usage))
        found.setdefault("before", self.init_snapshot.total_memory - self.init_snapshot.free_memory)
        free, total = torch.cuda.mem_get_info()
        found["in_use_at_end"] = total - free
        save(self)
        return result

    Worker.determine_available_memory = determine_available_memory
    Worker.compile_or_warm_up_model = compile_or_warm_up_model


def live_at_peak(snapshot: dict, device: int) -> list:
    """[bytes, count, where] of what was allocated when the sum was largest."""
    live: dict = {}
    total = best = 0
    best_live: dict = {}
    since = 0
    for event in snapshot["device_traces"][device]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
            if total > best:
                best, since = total, since + 1
                best_live = dict(live) if len(live) < 3000 else best_live
        elif event["action"] == "free_requested" and event["addr"] in live:
            total -= live.pop(event["addr"])["size"]
    groups: dict = {}
    for event in best_live.values():
        frames = [f for f in event["frames"] if "/torch/" not in f["filename"]][:4]
        where = " < ".join(f"{Path(f['filename']).name}:{f['line']} {f['name']}" for f in frames)
        entry = groups.setdefault((event["size"], where), [event["size"], 0, where])
        entry[1] += 1
    return [[best, 1, "SUM"], *sorted(groups.values(), key=lambda g: -g[0] * g[1])[:24]]


def one(case_file: str) -> None:
    """Starts the engine of one case in this process; the log says the rest."""
    case = json.loads(Path(case_file).read_text())
    from vllm import LLM

    folder = Path(case_file).parent
    args = {key: value for key, value in case.items() if key not in NOT_ENGINE}
    pooling = args.get("runner") == "pooling"
    if pooling:  # these need a tokenizer to start: any will do
        from tokenizers import Tokenizer, models

        words = ["<s>", "<pad>", "</s>", "<unk>"]
        Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")).save(str(folder / "tokenizer.json"))
        names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), words, strict=True))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    LLM(model=str(folder), skip_tokenizer_init=not pooling, load_format="dummy", seed=0, **args)
    print("TRUTH ENGINE STARTED", flush=True)
    os._exit(0)


def start(case: dict, config: dict, gpus: list[int], folder: Path) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "case.json").write_text(json.dumps(case))
    plugin = folder / "plugin" / "vllm_truth-0.dist-info"
    plugin.mkdir(parents=True, exist_ok=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-truth\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nvllm_truth = vllm_truth:register_hook\n")
    paths = [str(Path(__file__).resolve().parent), str(folder / "plugin"), os.environ.get("PYTHONPATH", "")]
    env = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(paths),
        CUDA_VISIBLE_DEVICES=",".join(map(str, gpus)),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="DEBUG",
        **{MARK: str(folder / "found")},
        **case.get("env", {}),
    )
    if case.get("trace"):
        env[MARK + "_TRACE"] = "1"
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(Path(__file__).resolve()), "--one", str(folder / "case.json")]
        # A session of its own: its workers can be ended with it.
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def row_of(case: dict, folder: Path, seconds: float, timed_out: bool) -> dict:
    """What the log and the plugin's files say about one case."""
    log = (folder / "log").read_text(errors="replace")
    row = {key: value for key, value in case.items() if key != "trace"}
    row.update(ok="TRUTH ENGINE STARTED" in log, secs=round(seconds, 1))
    if timed_out:
        row["timed_out"] = True
    for rank in range(16):
        file = folder / f"found.{rank}"
        if not file.exists():
            break
        found = json.loads(file.read_text())
        if rank == 0:
            row.update({k: round(v / GIB, 4) if isinstance(v, int) else v for k, v in found.items()})
        else:
            row.setdefault("other_ranks", []).append(
                {k: round(v / GIB, 4) for k, v in found.items() if k in ("weights", "torch_peak", "available")}
            )
    if tokens := re.findall(r"KV cache size: ([\d,]+) tokens", log):
        row["kv_tokens"] = int(tokens[-1].replace(",", ""))
    if many := re.findall(r"Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", log):
        row["max_concurrency"] = float(many[-1])
    if backend := re.findall(r"Using (?:AttentionBackendEnum\.)?(\w+) (?:attention )?backend", log):
        row["attn"] = backend[-1]
    if not row["ok"]:
        errors = re.findall(r"(?:ValueError|RuntimeError|AssertionError|OutOfMemoryError|Error): (.*)", log)
        row["err"] = list(dict.fromkeys(error.strip()[:300] for error in errors))[:4] or log[-400:].splitlines()[-4:]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases")
    parser.add_argument("out", type=Path)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--case-limit", type=float, default=180, help="seconds for one engine")
    parser.add_argument("--work", type=Path, default=Path("/tmp/vllm_truth"))
    options = parser.parse_args()
    data = json.loads(Path(options.cases).read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = list(enumerate(data["cases"]))
    free = set(range(options.gpus))
    running: list = []
    began = time.monotonic()
    with (options.out / "rows.jsonl").open("a") as rows:
        while waiting or running:
            left = options.limit - (time.monotonic() - began)
            for entry in list(waiting):
                number, case = entry
                need = case.get("tensor_parallel_size", 1) * case.get("pipeline_parallel_size", 1)
                if need > options.gpus or left < 45:
                    waiting.remove(entry)
                elif need <= len(free):
                    gpus = sorted(free)[:need]
                    free -= set(gpus)
                    waiting.remove(entry)
                    folder = options.work / f"{number:03}"
                    process = start(case, data["configs"][case["model"]], gpus, folder)
                    running.append((process, case, gpus, folder, time.monotonic()))
            time.sleep(0.5)
            for item in list(running):
                process, case, gpus, folder, since = item
                spent = time.monotonic() - since
                late = spent > options.case_limit or left < 8
                if process.poll() is None and not late:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                row = row_of(case, folder, spent, late)
                if not row["ok"]:
                    keep = options.out / "failed.log"
                    with keep.open("a") as sink:
                        sink.write(f"=== {folder.name} {json.dumps(case)}\n")
                        sink.write((folder / "log").read_text(errors="replace")[-6000:])
                rows.write(json.dumps(row) + "\n")
                rows.flush()
                print(folder.name, case["model"], "ok" if row["ok"] else row.get("err"), round(spent), flush=True)
                running.remove(item)
                free |= set(gpus)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main()
