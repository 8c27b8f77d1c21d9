#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the stages of `make test` in two lanes side by side and ends with one line of counts.

    tests/run.py [STAGE...]     without an argument all but `vm`, which needs QEMU

The lanes take about as long as each other: each has gates that only compute, and gates that mostly wait for what they start.
A gate that fails does not stop the ones behind it. What a gate prints goes to .cache/test-logs/STAGE-GATE.log; of one
that fails, the end is shown here too. The exit status is 1 if anything failed and 2 for a stage that does not exist.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "test-logs"
SHOWN_LINES = 80


class Counts(NamedTuple):
    """How many checks passed, failed and were left out."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def plus(self, passed: int = 0, failed: int = 0, skipped: int = 0) -> Counts:
        return Counts(self.passed + passed, self.failed + failed, self.skipped + skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed" + (f", {self.skipped} skipped" if self.skipped else "")


class Gate(NamedTuple):
    """One command, and the seconds after which it is ended and counts as failed.

    A command that holds the word {junit} is pytest and says there what it counted; one that ends with a line
    `WORD: N passed, N failed` is believed; any other counts as one check.
    """

    name: str
    command: list[str]
    limit_s: int


def pytest(folder: str, limit_s: int) -> Gate:
    return Gate("pytest", ["pytest", f"tests/{folder}", "--junitxml={junit}"], limit_s)


# The order is that of cost: what fails soon fails first.
STAGES: dict[str, list[Gate]] = {
    "lint": [
        Gate("ruff", ["ruff", "check"], 60),
        Gate(
            "shellcheck", ["bash", "-c", "git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck --severity=warning"], 60
        ),
        Gate("yamllint", ["yamllint", "--strict", "."], 120),
        Gate("mypy", ["mypy"], 300),
        Gate("changelog", ["antsibull-changelog", "lint"], 60),
        Gate("ansible-lint", ["ansible-lint", "--offline", "--strict"], 600),
    ],
    "unit": [pytest("unit", 1800)],
    "quality": [pytest("quality", 1200)],
    "molecule": [Gate("scenarios", ["molecule/run.sh"], 2400)],
    "integration": [pytest("integration", 2700)],
    "vm": [pytest("vm", 2700)],
}
ON_DEMAND = {"vm"}
# Stages of a lane run one after the other.
LANES = (("lint", "unit", "integration"), ("quality", "molecule", "vm"))
_running: set[subprocess.Popen[bytes]] = set()
_printing, _stopping = threading.Lock(), threading.Event()


def run(gate: Gate, log: Path, junit: Path) -> int:
    """The gate's exit status; -1 if it cannot be started or was ended for taking too long, with all that it started."""
    environment = os.environ | {
        "PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_INJECT_FACT_VARS": "false",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
    }
    command = [word.replace("{junit}", str(junit)) for word in gate.command]
    with log.open("wb") as out:
        if _stopping.is_set():
            return -1
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        except OSError as error:
            out.write(f"{command[0]}: {error.strerror}; remove .venv to have it made anew\n".encode())
            return -1
        _running.add(process)
        try:
            return process.wait(gate.limit_s)
        except subprocess.TimeoutExpired:
            end(process)
            out.write(f"\nended after its limit of {gate.limit_s} s\n".encode())
            return -1
        finally:
            _running.discard(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a gate with all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def count(gate: Gate, status: int, log: Path, junit: Path) -> Counts:
    """What the gate counted. One that ended badly has at least one failure, whatever it says."""
    counts = Counts(1, 0) if status == 0 else Counts(0, 1)
    if gate.command[-1].endswith("{junit}"):
        suites = ET.parse(junit).getroot().iter("testsuite") if junit.exists() else ()
        counts = Counts()
        for suite in suites:
            total, *bad = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
            counts = counts.plus(total - sum(bad), bad[0] + bad[1], bad[2])
    elif said := re.findall(r"^\w+: (\d+) passed, (\d+) failed$", log.read_text(errors="replace"), re.MULTILINE):
        counts = Counts(*map(int, said[-1]))
    proved = status == 0 and counts.passed > 0  # a run without a test proves nothing
    return counts if proved or counts.failed else counts.plus(failed=1)


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in STAGES]:
        print(f"there is no stage {', '.join(unknown)}: there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    asked = names or [name for name in STAGES if name not in ON_DEMAND]
    lanes = [[name for name in asked if name in lane] for lane in LANES]
    lanes += [[name] for name in asked if not any(name in lane for lane in LANES)]
    with ThreadPoolExecutor(len(lanes)) as pool:
        waiting = [
            pool.submit(lambda lane=lane: [check(name, gate) for name in lane for gate in STAGES[name]])
            for lane in lanes
        ]
        try:
            results = [counts for lane in waiting for counts in lane.result()]
        except BaseException:  # a test runner that is interrupted must not leave its tests behind
            _stopping.set()
            for process in list(_running):
                end(process)
            raise
    total = Counts()
    for counts in results:
        total = total.plus(*counts)
    print(total)
    return 1 if total.failed else 0


def check(stage: str, gate: Gate) -> Counts:
    """Runs a gate, says how it went, and shows the end of its log when it failed."""
    title = f"{stage:<12}{gate.name:<14}"
    log, junit = LOGS / f"{stage}-{gate.name}.log", LOGS / f"{stage}-{gate.name}.xml"
    junit.unlink(missing_ok=True)
    print(f"{title}...", flush=True)
    started = time.monotonic()
    status = run(gate, log, junit)
    counts = count(gate, status, log, junit)
    with _printing:
        if counts.failed:
            print(f"--- the end of {log.relative_to(ROOT)}:")
            print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
            print("---")
        print(f"{title}{time.monotonic() - started:7.1f} s   {counts}", flush=True)
    return counts


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
