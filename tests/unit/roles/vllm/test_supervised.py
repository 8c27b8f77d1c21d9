# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers under a real supervisor, by the role's own templates: the limit of restarts, the status 78, and a stop."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[4]
PACKAGE = yaml.safe_load((ROOT / "roles/vllm/vars/main.yml").read_text())["__vllm_supervisor_package"]
LIMIT = 3


class Supervisor:
    def __init__(self, bin_: Path, folder: Path, render: Callable[..., Any]) -> None:
        self.bin, self.folder, self.render = bin_, folder, render
        self.variables = {"__vllm_supervisor_dir": str(folder), "vllm_log_dir": str(folder)}
        (folder / "conf.d").mkdir()
        (folder / "lib").mkdir()
        shutil.copy(ROOT / "roles/vllm/files/baremetal_supervised.sh", folder / "lib")
        # The pause between two starts is not what is tested.
        (folder / "sleep").write_text('#!/bin/sh\n[ "$1" = 5 ] || exec /bin/sleep "$1"\n')
        (folder / "sleep").chmod(0o755)
        self.write("supervisord.conf", "supervisord.conf.j2")

    def write(self, name: str, template: str, **variables: Any) -> None:
        text = (ROOT / "roles/vllm/templates" / template).read_text()
        (self.folder / name).write_text(self.render(text, **self.variables, **variables) + "\n")

    def add(self, name: str, script: str, drain_s: int = 10, user: str = "") -> None:
        """A program whose start script is this one. With a user, as if root had written it."""
        config = self.folder / name
        config.mkdir()
        (config / "start.sh").write_text(f"#!/bin/sh\necho start >>{config}/log\n{script}")
        (config / "start.sh").chmod(0o755)
        svc = {
            "unit": name, "config_dir": str(config), "state_dir": str(config), "runtime": "venv", "stop_timeout": drain_s,
            "log_file": f"{config}/output",
        }  # fmt: skip
        self.write(
            f"conf.d/{name}.conf", "program.conf.j2", svc=svc, vllm_root=str(self.folder), vllm_restart_limit=LIMIT,
            __vllm_starts_file=f"{config}/starts", ansible_facts={"user_uid": 0 if user else 1}, vllm_user=user,
        )  # fmt: skip

    def run(self, program: str, *words: str) -> str:
        # Core dumps are allowed, which this machine may have off: what is said of them has to be the role's doing.
        allow = ["sh", "-c", 'ulimit -S -c "$(ulimit -H -c)"; exec "$@"', "-"]
        command = [*allow, str(self.bin / program), f"--configuration={self.folder}/supervisord.conf", *words]
        environment = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "HOME": "/nowhere",
            "USER": "starter",
            "LOGNAME": "starter",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert program == "supervisorctl" or not done.returncode, done.stderr
        return done.stdout

    def state(self, name: str) -> str:
        return self.run("supervisorctl", "status", name).split()[1]

    def ended(self, name: str, seconds: float = 30) -> bool:
        """Whether supervisor takes it for ended for good, by the time."""
        deadline = time.monotonic() + seconds
        while self.state(name) != "EXITED":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    def starts(self, name: str) -> int:
        log = self.folder / name / "log"
        return log.read_text().count("start") if log.exists() else 0

    def says(self, name: str, what: str, times: int = 1, seconds: float = 30) -> bool:
        """Whether the program's own log, or what it printed, has these words so often within the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            texts = [path.read_text() for path in (self.folder / name).iterdir() if path.name in ("log", "output")]
            if " ".join(texts).count(what) >= times:
                return True
            time.sleep(0.1)
        return False


@pytest.fixture
def supervisor(tool_environment: Callable[..., Path], render: Callable[..., Any]) -> Iterator[Supervisor]:
    with tempfile.TemporaryDirectory(prefix="bm-") as folder:
        supervisor = Supervisor(tool_environment(PACKAGE), Path(folder), render)
        yield supervisor
        supervisor.run("supervisorctl", "shutdown")
        deadline = time.monotonic() + 30
        while (Path(folder) / "supervisord.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.2)


def test_restarts_are_limited_whenever_a_server_ends(supervisor: Supervisor) -> None:
    supervisor.add("early", "exit 1\n")
    supervisor.add("late", "sleep 2\nexit 0\n")
    supervisor.add("killed", "sleep 1\nkill -KILL $$\n")
    supervisor.run("supervisord")
    for name in ("early", "late", "killed"):
        assert supervisor.says(name, "3 starts within an hour (vllm_restart_limit): left alone")
        assert supervisor.ended(name) and supervisor.starts(name) == LIMIT
    # What the role does before it starts a server.
    (supervisor.folder / "early/starts").unlink()
    supervisor.run("supervisorctl", "restart", "early")
    assert supervisor.says("early", "left alone", 2) and supervisor.starts("early") == 2 * LIMIT


def test_starts_of_an_hour_ago_do_not_count(supervisor: Supervisor) -> None:
    supervisor.add("chat", 'ulimit -c >"$(dirname "$0")/output-core"\nexec sleep 60\n')
    (supervisor.folder / "chat/starts").write_text(" ".join([str(int(time.time()) - 3700)] * 9))
    supervisor.run("supervisord")
    assert supervisor.says("chat", "start") and supervisor.state("chat") == "RUNNING"
    assert len((supervisor.folder / "chat/starts").read_text().split()) == 1
    # A dump of memory would hold the API key.
    assert (supervisor.folder / "chat/output-core").read_text().strip() == "0"


def test_what_a_restart_does_not_mend_is_not_restarted(supervisor: Supervisor) -> None:
    supervisor.add("chat", "sleep 1\nexit 78\n")
    supervisor.run("supervisord")
    assert supervisor.ended("chat")
    time.sleep(2)
    assert (supervisor.state("chat"), supervisor.starts("chat")) == ("EXITED", 1)


def test_a_stop_lets_requests_end(supervisor: Supervisor) -> None:
    """The engine's process has no say in the stop: its server ends it when it has done its work."""
    supervisor.add(
        "chat",
        """cd "$(dirname "$0")"
sh -c 'trap "echo broken >>log; exit 1" TERM; i=0; while [ $i -lt 20 ]; do i=$((i + 1)); sleep 0.2; done; echo done >>log' &
engine=$!
trap 'while kill -0 $engine 2>/dev/null; do wait $engine; done; echo stopped >>log; exit 0' TERM
echo ready >>log
while :; do wait; done
""",
    )
    supervisor.run("supervisord")
    assert supervisor.says("chat", "ready")
    supervisor.run("supervisorctl", "stop", "chat")
    assert (supervisor.folder / "chat/log").read_text().split() == ["start", "ready", "done", "stopped"]


def test_a_server_of_another_user_has_a_home_of_its_own(supervisor: Supervisor) -> None:
    """Not that of who started the supervisor, into which it may not write. Without another user that one is its own."""
    me = pwd.getpwuid(os.getuid()).pw_name
    script = 'echo "home $HOME of $USER $LOGNAME" >>"$(dirname "$0")/output"\nexec sleep 60\n'
    supervisor.add("chat", script, user=me)
    supervisor.add("own", script)
    supervisor.run("supervisord")
    assert supervisor.says("chat", f"home {supervisor.folder}/chat of {me} {me}\n")
    assert supervisor.says("own", "home /nowhere of starter starter\n")
