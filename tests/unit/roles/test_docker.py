# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role docker makes of its variables; on test hosts: molecule/docker, docker_repository and docker_refusals."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from support import asleep

ROLE = Path(__file__).parents[3] / "roles/docker"
LEFT_ALONE = {"docker_log_driver": "", "docker_log_options": {}, "docker_live_restore": None, "docker_nofile": 0}


def test_settings_can_be_left_to_the_engine(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    """As docs/docker.md says, by values that the argument specification takes."""
    assert all(f"`{name}: " in (ROLE.parents[1] / "docs/docker.md").read_text() for name in LEFT_ALONE)
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    checked = ArgumentSpecValidator({name: options[name] for name in LEFT_ALONE}).validate(dict(LEFT_ALONE))
    assert checked.error_messages == []
    for null in (None, "null"):
        said = LEFT_ALONE | {"docker_live_restore": null}
        assert render("{{ __docker_own_options }}", **role_vars("docker", "main") | said) == {}


@pytest.mark.parametrize(
    ("value", "wrong"), [(True, False), ("no", False), (None, False), ("null", False), ("sometimes", True), (5, True)]
)
def test_live_restore(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], value: Any, wrong: bool
) -> None:
    row = next(row for row in role_vars("docker", "main")["__docker_checks"] if "Allowed are true" in row["message"])
    assert render(row["wrong"], docker_live_restore=value) is wrong


def look(**other: Any) -> dict[str, Any]:
    """What docker_engine_info returns for a Debian 13 host with the distribution's engine, and what is said otherwise."""
    return {
        "pid1": "systemd", "dockerd": "/usr/sbin/dockerd", "version": "20.10.24", "engine_package": "docker.io",
        "packages": {"docker.io": "20.10.24+dfsg1-1", "docker-cli": "20.10.24+dfsg1-1"}, "pid": 1,
        "unit": {"exists": True, "enabled": True, "needs_reload": False, "arguments": []},
        "info": {"settings": {"data-root": "/var/lib/docker"}, "images": 2, "containers": 1, "swarm": False, "runtimes": []},
        "daemon_json": {"options": {}, "error": ""}, "data_roots": {}, "files": {},
        "newer_files": [], "foreign_sources": [], "objection": "",
        "package_lists": True, "nofile_limit": 2**20, "nofile_possible": True, **other,
    }  # fmt: skip


@pytest.mark.parametrize("program", ["dockerd", "containerd"])
@pytest.mark.parametrize("other", ["sleep", "containerd", "ended dockerd"])
def test_number_of_a_killed_engine_is_anothers_now_standin(
    program: str, other: str, tmp_path: Path, render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    """The stand-in refuses as dockerd does: where the file has the number of a process, whatever process that is.

    A containerd that outlived its dockerd keeps its file: the next dockerd takes it up by that.
    """
    files = {name: tmp_path / f"{name}.pid" for name in ("dockerd", "containerd")}
    engine, client, up = tmp_path / "dockerd", tmp_path / "docker", tmp_path / "up"
    engine.write_text(
        f'#!/bin/sh\nif kill -0 "$(cat {files["dockerd"]})" 2> /dev/null; then echo "pid file found" >&2; exit 1; fi\n'
        f": > {up}\nwhile test -e {up}; do sleep 0.1; done\n"  # an engine that answers stays; one that has ended has failed
    )
    client.write_text(f"#!/bin/sh\ntest -e {up}\n")
    for path in (engine, client):
        path.chmod(0o755)
    tasks = yaml.safe_load((ROLE / "tasks/start_process.yml").read_text())
    (start,) = [task for task in tasks if task["name"] == "Start the engine as a process of its own"]
    command = render(
        start["ansible.builtin.shell"]["cmd"],
        **role_vars("docker", "main") | {
            "__docker_pid_files": {name: str(path) for name, path in files.items()},
            "__docker_log_file": str(tmp_path / "log"),
            "__docker_env_file": str(tmp_path / "env"),
            "__docker_probe": {"dockerd": str(engine)},
        },
    )  # fmt: skip
    name = other.split()[-1]
    with asleep(tmp_path / "bin" / name) as process:
        files[program].write_text(f"{process.pid}\n")
        if other != name:  # and nobody has waited for it, as under a process 1 that does not
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        try:
            done = subprocess.run(
                ["sh", "-c", command],
                env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True, timeout=30,
            )  # fmt: skip
        finally:
            process.kill()
            up.unlink(missing_ok=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert files[program].exists() is (program == other)


@pytest.fixture
def docker(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """docker(expression, what the look finds, what is said) -> its value"""

    def docker(name: str, found: dict[str, Any] | None = None, **said: Any) -> Any:
        facts = {
            "distribution": "Debian", "distribution_version": "13.1", "distribution_major_version": "13",
            "distribution_release": "trixie", "architecture": "x86_64",
        }  # fmt: skip
        given = {
            "ansible_facts": facts,
            "__docker_probe": look(**(found or {})),
            "ansible_check_mode": False,
            "inventory_hostname": "h",
        }
        return render(f"{{{{ __docker_{name} }}}}", **role_vars("docker", "main", "Debian", "Debian_13") | given | said)

    return docker


def test_a_data_root_with_something_in_it_is_left_by_consent(docker: Callable[..., Any]) -> None:
    said = {"docker_data_root": "/data/docker"}
    (problem,) = docker("problems", **said)
    assert "keeps 2 images and 1 containers in /var/lib/docker" in " ".join(problem.split())
    assert "docker_leave_old_data_root to true" in problem
    assert docker("problems", **said, docker_leave_old_data_root=True) == []
    empty = {"info": {**look()["info"], "images": 0, "containers": 0}}
    assert docker("problems", empty, **said) == []
    assert docker("daemon_options", **said, docker_leave_old_data_root=True)["data-root"] == "/data/docker"


def test_a_data_root_behind_a_link(docker: Callable[..., Any]) -> None:
    """The engine tells of the folder that the link leads to."""
    found = {
        "daemon_json": {"options": {"data-root": "/data/docker"}, "error": ""},
        "data_roots": {"/data/docker": {"path": "/mnt/nvme/docker", "exists": True}},
        "info": {**look()["info"], "settings": {"data-root": "/mnt/nvme/docker"}},
    }
    assert docker("differences", found, docker_data_root="/data/docker") == []
    assert docker("problems", found, docker_data_root="/data/docker") == []
    found["info"] = look()["info"]
    assert docker("differences", found) == ["data-root of daemon.json is not in force"]
    (problem,) = docker("problems", found, docker_data_root="/data/docker")
    assert "keeps 2 images and 1 containers in /var/lib/docker" in " ".join(problem.split())


def test_a_version_that_is_asked_for(docker: Callable[..., Any]) -> None:
    """Of the engine and of its client, which is a package of its own here; nothing else has that version."""
    there = {"docker_version": "20.10.24+dfsg1-1"}
    assert docker("install_needed") is False and docker("install_needed", **there) is False
    other = {"docker_version": "20.10.25-1", "docker_extra_packages": ["docker-compose"]}
    assert docker("install_needed", **other) is True
    specs = docker("package_specs", **other)
    assert {"docker.io=20.10.25-1", "docker-compose"} <= set(specs)
    assert not [spec for spec in specs if "=" in spec and not spec.startswith(("docker.io=", "docker-cli="))]
    (problem,) = docker("problems", {"packages": {}, "engine_package": ""}, docker_version="29.1.3")
    assert "came by other means than a package that this role knows" in " ".join(problem.split())
