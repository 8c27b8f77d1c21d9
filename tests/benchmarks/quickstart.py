#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long the quickstart takes, first and second run, split into its stages.

    tests/benchmarks/quickstart.py [RUNS]     medians of RUNS (5) as a Markdown table

Each first run starts from a fresh clone of this checkout; package downloads are as warm as the network's caches are.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PORT = "18100"
# Part of a task's name -> stage that it counts to; the rest is "look, plan, configure".
STAGES = {
    "Install the tools": "uv and supervisor",
    "Install vLLM": "vLLM's environment",
    "Make the random model": "model",
    "Wait for answers": "server start",
    "Prove that": "proof",
}
TASK = re.compile(r"^(\S+ \S+?),\d+ .*? TASK \[(.*)\]")


def quickstart(checkout: Path) -> tuple[dict[str, float], int, int]:
    """Seconds by stage, tasks that ran, and tasks that changed something."""
    log = checkout / "ansible.log"
    log.unlink(missing_ok=True)
    started = time.time()
    output = subprocess.run(
        ["make", "quickstart", f"PORT={PORT}"],
        cwd=checkout,
        env={**os.environ, "ANSIBLE_LOG_PATH": str(log), "ANSIBLE_NOCOLOR": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    ended = time.time()
    marks = []
    for line in log.read_text().splitlines():
        if match := TASK.match(line):
            marks.append((datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").astimezone().timestamp(), match[2]))
    stages = {"controller": max(0.0, marks[0][0] - started)}
    for (begin, name), (end, _) in zip(marks, [*marks[1:], (ended, "")], strict=True):
        stage = next((stage for part, stage in STAGES.items() if part in name), "look, plan, configure")
        stages[stage] = stages.get(stage, 0.0) + end - begin
    stages["all"] = ended - started
    recap = re.search(r"^quickstart\s*: ok=(\d+)\s+changed=(\d+)", output, re.MULTILINE)
    assert recap, output
    return stages, int(recap[1]), int(recap[2])


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results: dict[str, list[tuple[dict[str, float], int, int]]] = {"first": [], "second": []}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            checkout = Path(folder) / "clone"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
            try:
                results["first"].append(quickstart(checkout))
                assert set(STAGES.values()) <= set(results["first"][-1][0]), f"a task has another name: {STAGES}"
                results["second"].append(quickstart(checkout))
            finally:
                subprocess.run(["make", "quickstart-down"], cwd=checkout, check=True, capture_output=True)
    print(f"| stage | {' | '.join(f'{name} run, s' for name in results)} |\n|---|---:|---:|")
    stages = sorted({stage for result in results.values() for seconds, _, _ in result for stage in seconds} - {"all"})
    for stage in [*stages, "all"]:
        medians = [statistics.median(run[0].get(stage, 0.0) for run in result) for result in results.values()]
        print(f"| {stage} | {' | '.join(f'{median:.1f}' for median in medians)} |")
    for title, index in (("tasks that ran", 1), ("changed", 2)):
        print(
            f"| {title} | {' | '.join(str(statistics.median(run[index] for run in result)) for result in results.values())} |"
        )


if __name__ == "__main__":
    main()
