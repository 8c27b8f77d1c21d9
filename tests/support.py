# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests of the whole collection call: commands as a user runs them, and the interpreters of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What role vllm gives host_services of a host with systemd, for services on one host.
SERVICE_SETTINGS: dict[str, Any] = {
    "root": "/opt/vllm",
    "config_dir": "/etc/vllm",
    "state_dir": "/var/lib/vllm",
    "log_dir": "/var/log/vllm",
    "bind": "127.0.0.1",
    "start_timeout": 900,
    "drain_timeout": 60,
    "user": "vllm",
    "architecture": "x86_64",
    "gpu": {"gpus": [], "cpu": {"memory_available_mib": 30000, "memory_own_mib": 0}},
    "container": {
        "mirror": "",
        "images": {},
        "gpus": "request",
        "shm_size": "10g",
        "nofile": 1048576,
        "log_options": {"max-size": "50m"},
        "options": [],
    },
    "open_paths": ["/health", "/metrics"],
    "python": "",
    "host_python": "/usr/bin/python3",
    "manager": "systemd",
    "supervisor_dir": "/opt/vllm/supervisor",
    "supervisorctl": ["/opt/vllm/tools/bin/supervisorctl", "--configuration=/x"],
}


def run(command: Sequence[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a user would elsewhere: with no setting of this checkout or of the caller's Ansible."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "GALAXY_", "PYTHON"))}
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = kept | {"PATH": tools, "LC_ALL": "C.UTF-8", "ANSIBLE_INJECT_FACT_VARS": "false"} | variables
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def checked(command: Sequence[str | Path], cwd: Path, **variables: str) -> str:
    """What it printed; one that fails fails the test, with that as the reason."""
    done = run(command, cwd, **variables)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done.stdout


def find_pythons() -> dict[str, str]:
    """Minor version -> an interpreter that runs, of TEST_PYTHONS (a folder of installations), of pyenv or on PATH."""
    folders = [os.environ["TEST_PYTHONS"]] if "TEST_PYTHONS" in os.environ else []
    if shutil.which("pyenv"):
        folders.append(subprocess.check_output(["pyenv", "root"], text=True).strip() + "/versions")
    candidates = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/python3"))]
    candidates += [sys.executable, *(f"python3.{minor}" for minor in range(6, 15))]
    found: dict[str, str] = {}
    for candidate in candidates:
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        with contextlib.suppress(OSError):  # run, not looked up: a name on PATH may be a shim for what is not there
            process = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
            if process.returncode == 0:
                version, path = process.stdout.split()
                found.setdefault(version, path)
    return found


def asleep(program: Path) -> subprocess.Popen[bytes]:
    """A process that sleeps for a minute under the name of ``program``, which is made."""
    program.parent.mkdir(exist_ok=True)
    program.symlink_to(shutil.which("sleep") or "")
    process = subprocess.Popen([program, "60"])
    # Popen returns while the kernel still puts the new program in place.
    while Path(f"/proc/{process.pid}/comm").read_text().strip() != program.name:
        time.sleep(0.01)
    return process
