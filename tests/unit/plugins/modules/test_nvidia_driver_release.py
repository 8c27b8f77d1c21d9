# SPDX-License-Identifier: GPL-3.0-or-later
"""nvidia_driver_release on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import nvidia_driver_release

IGNORES = "import signal,time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


@pytest.fixture
def user() -> Iterator[subprocess.Popen[str]]:
    """A process that only SIGKILL ends."""
    process = subprocess.Popen([sys.executable, "-c", IGNORES], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    yield process
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def release(
    run_module: Callable[..., dict[str, Any]],
    user: subprocess.Popen[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(nvidia_driver_release, "MODULES", str(tmp_path))
    rows = [{"pid": user.pid, "unit": "", "container": "", "command": "stubborn"}]
    return lambda **settings: run_module(nvidia_driver_release, users=rows, seconds=1, **settings)


def test_without_consent_nothing_is_stopped(release: Callable[..., Any], user: subprocess.Popen[str]) -> None:
    assert release()["stopped"] == []
    assert user.poll() is None


def test_check_mode_stops_nothing(release: Callable[..., Any], user: subprocess.Popen[str]) -> None:
    result = release(check=True, stop=True)
    assert (result["changed"], result["stopped"], user.poll()) == (False, [], None)


def test_with_consent_it_is(release: Callable[..., Any], user: subprocess.Popen[str]) -> None:
    result = release(stop=True)
    assert result["changed"] is True
    assert result["stopped"] == [{"kind": "process", "name": user.pid}]
    assert result["problems"] == []
    assert user.poll() is not None


def test_a_module_that_stays_is_named(release: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "nvidia_drm").mkdir()
    assert release()["loaded"] == ["nvidia_drm"]
