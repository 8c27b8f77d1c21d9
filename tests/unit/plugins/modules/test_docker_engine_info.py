# SPDX-License-Identifier: GPL-3.0-or-later
"""docker_engine_info: what it makes of an engine's traces on a host."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import asleep

from ansible_collections.baremetal.vllm.plugins.modules import docker_engine_info


def test_a_stale_pid_file_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pidfile = tmp_path / "docker.pid"
    pidfile.write_text(f"{os.getpid()}\n")  # a process, but no dockerd
    monkeypatch.setattr(docker_engine_info, "PIDFILES", (str(pidfile),))
    assert docker_engine_info.engine_pid() == 0


def test_an_engine_that_has_ended_and_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a process 1 that waits for nobody: the process stays in the table."""
    engine = asleep(tmp_path / "dockerd")
    pidfile = tmp_path / "docker.pid"
    pidfile.write_text(f"{engine.pid}\n")
    monkeypatch.setattr(docker_engine_info, "PIDFILES", (str(pidfile),))
    assert docker_engine_info.engine_pid() == engine.pid
    engine.kill()
    os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)
    assert docker_engine_info.engine_pid() == 0
    engine.wait()


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
    # The module's own limit is that of every program it starts.
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 64
    assert run_module(docker_engine_info, nofile=2**60)["nofile_possible"] is False


def test_folders_of_data_behind_links(
    run_module: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "disk/docker").mkdir(parents=True)
    (tmp_path / "data").symlink_to("disk")
    there, to_be = f"{tmp_path}/data/docker", f"{tmp_path}/data/other"
    monkeypatch.setattr(docker_engine_info, "daemon_json", lambda: {"options": {"data-root": there}, "error": ""})
    assert run_module(docker_engine_info, data_root=to_be)["data_roots"] == {
        there: {"path": f"{tmp_path}/disk/docker", "exists": True},
        to_be: {"path": f"{tmp_path}/disk/other", "exists": False},
    }


DOCKERD = """#!/bin/sh
[ "$*" = --version ] && {{ echo "Docker version {version}, build 1"; exit; }}
echo "$*" > {folder}/arguments
while [ "$1" != --config-file ]; do shift; done
cat "$2" > {folder}/settings
{new} && for word; do [ "$word" = --validate ] && exit 0; done
echo "$2: {says}" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("version", "new", "says", "objection"),
    [
        ("28.1.0", True, "", ""),
        ("28.1.0", False, "unknown option", "/etc/docker/daemon.json: unknown option"),
        ("20.10.24", False, "unable to parse logging level: validate-only", ""),
        ("20.10.24", False, "unable to parse: x", "/etc/docker/daemon.json: unable to parse: x"),
    ],
)
def test_the_engine_judges_settings(
    run_module: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    new: bool,
    says: str,
    objection: str,
) -> None:
    dockerd = tmp_path / "dockerd"
    dockerd.write_text(DOCKERD.format(version=version, folder=tmp_path, new=str(new).lower(), says=says))
    dockerd.chmod(0o755)
    monkeypatch.setattr(docker_engine_info, "which", lambda name: str(dockerd))
    monkeypatch.setattr(docker_engine_info, "PIDFILES", ())
    monkeypatch.setattr(docker_engine_info, "unit", lambda: {"arguments": ["-H", "fd://"]})
    result = run_module(docker_engine_info, check=True, settings='{"log-level": "info", "debug": true}')
    assert result["objection"] == objection
    assert (tmp_path / "arguments").read_text().startswith("-H fd:// --config-file ")
    # An old one takes no level in both places.
    assert ("log-level" in json.loads((tmp_path / "settings").read_text())) is version.startswith("28")


def test_without_settings_nothing_is_asked(
    run_module: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker_engine_info, "which", lambda name: "/no/dockerd")
    monkeypatch.setattr(docker_engine_info, "PIDFILES", ())
    assert run_module(docker_engine_info)["objection"] == ""
