#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast the role model hashes and copies, against sha256sum, openssl and cp on the same files.

    tests/benchmarks/model_speed.py [--gib 4] [--repeat 3] [folder on the disk to measure]

Medians in MiB/s and as ratios to the tools; the page cache is warm for all alike. `copy` is a model from a share
(file://) to its place: read, hashed, written and flushed. `cp + sync` only reads, writes and flushes; `cp + sync & sha256` hashes the
origin meanwhile, and is the least that such a copy can take. sha256sum may be built without the processor's own instructions
for it (Debian's is), which openssl has: hence both.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "collections")]

import model_jobs  # noqa: E402

FILES = 4


def timed(work: Callable[[], object]) -> float:
    os.sync()
    started = time.monotonic()
    work()
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("folder", nargs="?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name).resolve()
        origin = folder / "origin"
        origin.mkdir()
        (origin / "config.json").write_text("{}")
        block = random.Random(0).randbytes(1 << 20)
        for number in range(FILES):
            with (origin / f"model-{number}.safetensors").open("wb") as file:
                for _ in range(int(arguments.gib * 1024 / FILES)):
                    file.write(block)
        names = sorted(str(path) for path in origin.iterdir())
        model = model_jobs.read_model(f"file://{origin}", "", "http")
        mib = sum(entry["size"] for entry in model["files"]) / 2**20

        def job(jobs: int, **changes: object) -> object:
            return model_jobs.make_job(model, folder / "models", jobs=jobs, **changes)

        def copy(jobs: int) -> None:
            model_jobs.run(job(jobs))

        def remove() -> None:
            shutil.rmtree(folder / "models", ignore_errors=True)
            shutil.rmtree(folder / "cp", ignore_errors=True)

        def tool(*command: str) -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

        def cp() -> None:
            tool("cp", "-r", str(origin), str(folder / "cp"))
            tool("sync", *(str(folder / "cp" / Path(name).name) for name in names))

        def cp_beside_hash() -> None:
            with subprocess.Popen(["openssl", "dgst", "-sha256", *names], stdout=subprocess.DEVNULL) as hashing:
                cp()
            assert hashing.returncode == 0

        ways: dict[str, Callable[[], None]] = {
            "sha256sum": lambda: tool("sha256sum", *names),
            "openssl sha256": lambda: tool("openssl", "dgst", "-sha256", *names),
            "verify, 1 job": lambda: model_jobs.run(job(1, verify=True)) and None,
            "verify, 4 jobs": lambda: model_jobs.run(job(4, verify=True)) and None,
            "cp + sync": cp,
            "cp + sync & sha256": cp_beside_hash,
            "copy, 1 job": lambda: copy(1),
            "copy, 4 jobs": lambda: copy(4),
        }
        tool("sha256sum", *names)
        found: dict[str, list[float]] = {way: [] for way in ways}
        before = os.getloadavg()[0]
        for _ in range(arguments.repeat):
            for way, work in ways.items():
                remove()
                if way.startswith("verify"):
                    copy(4)
                found[way].append(mib / timed(work))
        medians = {way: statistics.median(rates) for way, rates in found.items()}
        loads = " ".join(f"{load:.1f}" for load in (before, os.getloadavg()[0]))
        print(f"{mib:.0f} MiB in {FILES} files, medians of {arguments.repeat}; load before and after: {loads}")
        for way, rate in medians.items():
            base = medians["cp + sync" if way.startswith(("cp", "copy")) else "sha256sum"]
            print(f"{way:24} {rate:7.0f} MiB/s   {rate / base:5.2f} x")


if __name__ == "__main__":
    main()
