# SPDX-License-Identifier: GPL-3.0-or-later
"""selinux_nginx with stand-ins for getenforce, getsebool, setsebool and semanage (molecule/proxy/files/selinux_standin.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ansible_collections.baremetal.vllm.plugins.modules import selinux_nginx

BOOLEAN = ["setsebool", "-P", "httpd_can_network_connect", "on"]


def add(port: int) -> list[str]:
    return ["semanage", "port", "-a", "-t", "http_port_t", "-p", "tcp", str(port)]


def remove(port: int) -> list[str]:
    return ["semanage", "port", "-d", "-p", "tcp", str(port)]


class Host:
    def __init__(self, folder: Path, run: Callable[..., dict[str, Any]]) -> None:
        self.folder, self.run_module, self.record = folder, run, folder / "record"
        shutil.copy(ROOT / "molecule/proxy/files/selinux_standin.py", folder / "standin")
        for name in ("getenforce", "getsebool", "setsebool", "semanage"):
            (folder / name).symlink_to("standin")

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "selinux.json").read_text()))

    def put(self, **state: Any) -> None:
        start = {"mode": "Enforcing", "booleans": {BOOLEAN[2]: False}, "local": {}, "calls": []}
        (self.folder / "selinux.json").write_text(json.dumps({**start, **state}))

    def run(self, *ports: int, check: bool = False, connect: bool = True, **more: bool) -> dict[str, Any]:
        given = {"ports": list(ports), "connect": connect, "record": str(self.record), **more}
        return self.run_module(selinux_nginx, check, **given)


@pytest.fixture
def host(tmp_path: Path, run_module: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Host:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    host = Host(tmp_path / "bin", run_module)
    host.put()
    return host


def test_ports_and_boolean_are_added_once_and_ports_taken_back(host: Host) -> None:
    first = [BOOLEAN, add(8444), add(8445)]
    checked = host.run(8443, 8444, 8445, check=True)
    assert (checked["changed"], checked["todo"]) == (True, [" ".join(command) for command in first])
    assert host.state["calls"] == [] and not host.record.exists()
    assert host.run(8443, 8444, 8445)["todo"] == checked["todo"]
    assert host.state["calls"] == first
    assert host.run(8443, 8444, 8445)["changed"] is host.run(8443, 8444, 8445, check=True)["changed"] is False
    assert not host.run(8443, 8445, take_back=False)["changed"]
    assert host.run(8443, 8445)["todo"] == [" ".join(remove(8444))]
    assert host.run(connect=False, check=True)["todo"] == [" ".join(remove(8445))]
    host.run(connect=False)
    assert host.state["calls"] == [*first, remove(8444), remove(8445)]
    assert host.state["booleans"] == {BOOLEAN[2]: True}
    assert not host.record.exists()
    assert not host.run(connect=False)["changed"]


def test_what_was_there_before_stays(host: Host) -> None:
    """A port and the boolean that the administrator has set, also after a teardown."""
    host.put(local={"8444": "http_port_t", "8500-8600": "http_port_t"}, booleans={BOOLEAN[2]: True})
    for ports in ((8443, 8444, 8080, 8501), ()):
        assert not host.run(*ports)["changed"]
    assert host.state["calls"] == [] and not host.record.exists()


def test_a_port_that_was_given_away_later_is_not_taken_back(host: Host) -> None:
    host.run(8444)
    host.put(local={"8444": "postgresql_port_t"}, booleans={BOOLEAN[2]: True})
    assert not host.run()["changed"]
    assert host.state["calls"] == [] and not host.record.exists()


@pytest.mark.parametrize(
    ("port", "local", "kind", "way_out"),
    [
        (5432, {}, "postgresql_port_t", "-m"),
        (5901, {}, "vnc_port_t", "-a"),
        (8443, {"8443": "vnc_port_t"}, "vnc_port_t", "-m"),
    ],
)
def test_a_port_of_another_service_is_refused(
    host: Host, port: int, local: dict[str, str], kind: str, way_out: str
) -> None:
    host.put(local=local)
    (problem,) = host.run(8444, port, check=True)["problems"]
    assert problem == (
        f"SELinux keeps port {port} of the proxy for {kind}, and nginx from it: take another proxy_port, or give it to nginx with "
        f"semanage port {way_out} -t http_port_t -p tcp {port}"
    )
    assert host.run(8444, port)["msg"] == problem
    assert host.state["calls"] == [] and not host.record.exists()
    command = problem.rpartition(" with ")[2].split()
    subprocess.run([host.folder / command[0], *command[1:]], check=True)
    assert host.run(port, check=True)["problems"] == []
    host.put(mode="Permissive", local=local)
    assert host.run(port, check=True)["problems"] == []


@pytest.mark.parametrize("missing", [False, True])
def test_without_selinux_nothing_is_done(host: Host, missing: bool) -> None:
    host.put(mode="Disabled")
    if missing:
        for path in host.folder.glob("*"):
            path.unlink()
    result = host.run(8444, 5432)
    assert (result["changed"], result["problems"], result["todo"]) == (False, [], [])


def test_semanage_is_asked_for_where_ports_are(host: Host) -> None:
    (host.folder / "semanage").unlink()
    result = host.run(8443, check=True)
    assert (result["semanage"], result["todo"]) == (False, [" ".join(BOOLEAN), "semanage"])
    assert "install policycoreutils-python-utils" in host.run(8443)["msg"]
    host.record.write_text("[8444]")
    assert not host.run(connect=False)["changed"]
    assert host.record.exists()


def test_a_policy_without_the_boolean(host: Host) -> None:
    host.put(booleans={})
    assert not host.run(8443)["changed"]


def test_what_fails_is_told_and_noted(host: Host) -> None:
    """The port was noted before, so that it is taken back if it came about."""
    (host.folder / "standin").write_text(
        (host.folder / "standin").read_text().replace('state["local"][port] = kind', 'end(1, "OSError: Read-only")')
    )
    assert "OSError: Read-only" in host.run(8444)["stderr"]
    assert json.loads(host.record.read_text()) == [8444]
