# SPDX-License-Identifier: GPL-3.0-or-later
"""docker_engine_info: what it makes of an engine's traces on a host."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import docker_engine_info


def test_a_stale_pid_file_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pidfile = tmp_path / "docker.pid"
    pidfile.write_text(f"{os.getpid()}\n")  # a process, but no dockerd
    monkeypatch.setattr(docker_engine_info, "PIDFILES", (str(pidfile),))
    assert docker_engine_info.engine_pid() == 0


def test_a_process_started_before_now() -> None:
    assert time.time() - 3600 * 24 < docker_engine_info.started_at(os.getpid()) <= time.time() + 1


def test_a_host_without_an_engine(run_module: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docker_engine_info, "which", lambda name: "")
    monkeypatch.setattr(docker_engine_info, "PIDFILES", ())
    monkeypatch.setattr(docker_engine_info, "packages", lambda: {"docker-ce": "5:29.1.3", "bash": "5.2"})
    result = run_module(docker_engine_info, check=True, packages=["docker-ce", "runc"], files=["/none"], nofile=64)
    assert result["changed"] is False
    assert (result["dockerd"], result["version"], result["pid"], result["info"]) == ("", "", 0, {})
    assert result["packages"] == {"docker-ce": "5:29.1.3"}
    assert result["files"] == {"/none": ""}
    assert result["nofile_possible"] is True
