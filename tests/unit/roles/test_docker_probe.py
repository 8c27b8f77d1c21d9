# SPDX-License-Identifier: GPL-3.0-or-later
"""The scripts that the role docker runs on a host: what they make of files that are there in many shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parents[3] / "roles" / "docker" / "files"


@pytest.fixture
def probe():
    spec = importlib.util.spec_from_file_location("docker_probe", FILES / "probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "options", "error"),
    [
        ("", {}, ""),
        ("\n", {}, ""),
        ('{"live-restore": true}', {"live-restore": True}, ""),
        ('{\n "a": 1,\n}', {}, "line 3 column 1 is not valid JSON"),
        ('{"a": 1} x', {}, "line 1 column 10 is not valid JSON"),
        ('["a"]', {}, "line 1 holds a list where a JSON object {...} is expected"),
        ('{\n "a": 1,\n "b": 2,\n "a": 3\n}', {}, "line 4 sets a a second time"),
    ],
)
def test_daemon_json(probe, tmp_path, monkeypatch, text, options, error):
    path = tmp_path / "daemon.json"
    path.write_text(text)
    monkeypatch.setattr(probe, "DAEMON_JSON", str(path))
    result = probe.daemon_json()
    assert result["options"] == options
    assert result["error"].startswith(f"{path} {error}") if error else result["error"] == ""


def test_daemon_json_that_is_not_there(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "DAEMON_JSON", str(tmp_path / "none.json"))
    assert probe.daemon_json() == {"options": {}, "error": ""}


def test_daemon_json_that_cannot_be_read(probe, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "DAEMON_JSON", str(tmp_path))
    assert "cannot be read" in probe.daemon_json()["error"]


def test_a_stale_pid_file_is_not_believed(probe, tmp_path, monkeypatch):
    pidfile = tmp_path / "docker.pid"
    pidfile.write_text(f"{os.getpid()}\n")  # a process, but no dockerd
    monkeypatch.setattr(probe, "PIDFILES", (str(pidfile),))
    assert probe.engine_pid() == 0


def test_a_process_started_before_now(probe):
    import time

    assert time.time() - 3600 * 24 < probe.started_at(os.getpid()) <= time.time() + 1


DOCKERD = """#!/bin/sh
[ "{version}" = new ] && for word; do [ "$word" = --validate ] && exit 0; done
echo "{says}" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("version", "says", "code"),
    [
        ("28.1", "", 0),
        ("20.10.24", "unable to parse logging level: validate-only", 0),
        ("20.10.24", "the following directives don't match any configuration option: x", 1),
    ],
)
def test_validate_speaks_to_old_and_new_engines(tmp_path, version, says, code):
    dockerd = tmp_path / "dockerd"
    dockerd.write_text(DOCKERD.format(version="new" if version.startswith("28") else "old", says=says))
    dockerd.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(FILES / "validate.py"), str(dockerd), version, "-H", "fd://"],
        input=json.dumps({"log-level": "info"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (code, says if code else "")
