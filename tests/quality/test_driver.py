# SPDX-License-Identifier: GPL-3.0-or-later
"""tests/run.py: what fails is counted as failed, whatever else is said, and the rest still runs."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import pytest
import run


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """stages(gate=command, ...) -> exit status and closing line of a run with these gates as its only stage."""
    monkeypatch.setattr(run, "LOGS", run.ROOT / ".cache" / "driver-test")

    def stages(limit_s: int = 60, **commands: str) -> tuple[int, str]:
        gates = [run.Gate(name, command.split("|"), limit_s) for name, command in commands.items()]
        monkeypatch.setattr(run, "STAGES", {"only": gates})
        status = run.main([])
        return status, capsys.readouterr().out.splitlines()[-1]

    return stages


def pytest_of(folder: Path, body: str) -> str:
    file = folder / "test_it.py"
    file.write_text(body)
    return f"pytest|-c|/dev/null|-p|no:cacheprovider|{file}|--junitxml={{junit}}"


def test_commands_count_one_each(stages) -> None:
    assert stages(good="true") == (0, "1 passed, 0 failed")
    assert stages(bad="false", good="true") == (1, "1 passed, 1 failed")
    assert stages(missing="no-such-program", good="true") == (1, "1 passed, 1 failed")


def test_pytest_counts(stages, tmp_path: Path) -> None:
    body = (
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_error(broken): pass\n"
        "@pytest.mark.skip\ndef test_left(): pass\n"
    )
    assert stages(pytest=pytest_of(tmp_path, body)) == (1, "1 passed, 2 failed, 1 skipped")


@pytest.mark.parametrize("body", ["", "import pytest\npytestmark = pytest.mark.skip\ndef test_left(): pass\n"])
def test_pytest_without_a_test_fails(stages, tmp_path: Path, body: str) -> None:
    status, line = stages(pytest=pytest_of(tmp_path, body))
    assert status == 1
    assert line.startswith("0 passed, 1 failed")


@pytest.mark.parametrize("body", ["import nowhere\n", "def test_dies():\n    import os\n    os._exit(0)\n"])
def test_pytest_that_ends_early_fails(stages, tmp_path: Path, body: str) -> None:
    assert stages(pytest=pytest_of(tmp_path, body)) == (1, "0 passed, 1 failed")


def test_scenarios_are_believed(stages) -> None:
    assert stages(good="echo|molecule: 3 passed, 0 failed") == (0, "3 passed, 0 failed")
    assert stages(bad="sh|-c|echo molecule: 2 passed, 1 failed; exit 1") == (1, "2 passed, 1 failed")
    assert stages(none="echo|molecule: 0 passed, 0 failed") == (1, "0 passed, 1 failed")
    assert stages(dies="sh|-c|echo molecule: 2 passed, 0 failed; exit 1") == (1, "2 passed, 1 failed")


def test_time_limit(stages, tmp_path: Path) -> None:
    """What hangs is ended with its children, and the next gate runs."""
    started = time.monotonic()
    pid = tmp_path / "pid"
    status, line = stages(limit_s=2, hangs=f"sh|-c|sleep 300 & echo $! > {pid}; wait", good="true")
    assert (status, line) == (1, "1 passed, 1 failed")
    assert time.monotonic() - started < 30
    stat = Path("/proc", pid.read_text().strip(), "stat")
    with contextlib.suppress(OSError):  # it has gone
        while not re.search(r"\) [ZX] ", stat.read_text()):  # a signal is sent before it is obeyed
            assert time.monotonic() - started < 30
            time.sleep(0.05)


def test_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["lnit"]) == 2
    assert "lnit" in capsys.readouterr().err


def test_lanes_run_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each lane's gate waits for what the other one makes; a failure in one lane stops neither."""
    monkeypatch.setattr(run, "LOGS", run.ROOT / ".cache" / "driver-test")
    wait = "touch {0}; for _ in $(seq 100); do [ -e {1} ] && exit {2}; sleep 0.1; done; exit 9"
    one, other = tmp_path / "one", tmp_path / "other"
    gates = {
        "slow": [run.Gate("one", ["sh", "-c", wait.format(one, other, 0)], 20)],
        "after": [run.Gate("true", ["true"], 20)],
        "quick": [run.Gate("other", ["sh", "-c", wait.format(other, one, 1)], 20)],
    }
    monkeypatch.setattr(run, "STAGES", gates)
    monkeypatch.setattr(run, "LANES", (("slow", "after"), ("quick",)))
    assert run.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 1 failed"
