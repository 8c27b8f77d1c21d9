# SPDX-License-Identifier: GPL-3.0-or-later
"""nginx_unit with stand-ins for systemctl and journalctl, and this process in the place of nginx. A real nginx: molecule/proxy."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import nginx_unit

SYSTEMCTL = """#!/bin/sh
test "$1" = show || echo "$*" >>{folder}/orders
case "$*" in
"show --property=MainPID --value vllm-proxy") cat {folder}/pid ;;
"start vllm-proxy" | "restart vllm-proxy" | "reload-or-restart vllm-proxy") . {folder}/ordered ;;
*) echo "Unknown command verb or option: $*" >&2; exit 1 ;;
esac
"""
JOURNALCTL = """#!/bin/sh
case "$*" in
"--unit vllm-proxy --since @"[0-9]*" --output=cat --no-pager") cat {folder}/journal ;;
*) exit 1 ;;
esac
"""
REFUSED = """2026/11/26 12:00:00 [emerg] 12#12: bind() to 127.0.0.1:443 failed (98: Address already in use)
2026/11/26 12:00:01 [notice] 12#12: try again to bind() after 500ms
2026/11/26 12:00:01 [emerg] 12#12: bind() to 127.0.0.1:443 failed (98: Address already in use)
2026/11/26 12:00:02 [emerg] 12#12: still could not bind()
"""


class Nginx:
    def __init__(self, folder: Path, run: Callable[..., dict[str, Any]]) -> None:
        self.folder, self.run_module = folder, run
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            (folder / name).write_text(text.format(folder=folder))
            (folder / name).chmod(0o755)
        self.put(pid="0", ordered="", journal="", orders="")

    def put(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def run(self, *ports: int, check: bool = False, **params: Any) -> dict[str, Any]:
        given = {"unit": "vllm-proxy", "bind": "127.0.0.1", "ports": list(ports), "timeout": 1, **params}
        return self.run_module(nginx_unit, check, **given)

    def orders(self) -> list[str]:
        return (self.folder / "orders").read_text().splitlines()


@pytest.fixture
def nginx(
    tmp_path: Path, run_module: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Nginx]:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    yield Nginx(tmp_path / "bin", run_module)


@pytest.fixture
def port() -> Iterator[int]:
    """One that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def worker() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """worker(title) starts a child of this process under this name."""
    started = []

    def start(title: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([title, "60"], executable="/bin/sleep"))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_service_that_listens_as_planned_is_left_alone(nginx: Nginx, port: int) -> None:
    nginx.put(pid=str(os.getpid()))
    result = nginx.run(port)
    assert (result["changed"], result["serving"], result["rebind"]) == (False, True, False)
    assert result["listening"] == [f"127.0.0.1:{port}"]
    assert nginx.run(port, check=True, state="reloaded")["changed"]
    assert nginx.orders() == []


@pytest.mark.parametrize("bind", ["0.0.0.0", "::1", "127.0.0.2"])
def test_another_address_takes_a_restart_and_another_port_does_not(nginx: Nginx, port: int, bind: str) -> None:
    nginx.put(pid=str(os.getpid()))
    result = nginx.run(port, bind=bind, check=True)
    assert (result["changed"], result["serving"], result["rebind"]) == (True, False, True)
    for ports in ((port, port + 1), (port + 1,)):
        result = nginx.run(*ports, check=True)
        assert (result["changed"], result["serving"], result["rebind"]) == (True, False, False)


def test_one_that_does_not_run(nginx: Nginx) -> None:
    result = nginx.run(8443, check=True)
    assert (result["changed"], result["serving"], result["rebind"], result["listening"]) == (True, False, False, [])
    nginx.put(ordered="echo 'Unit vllm-proxy.service not found.' >&2; exit 5")
    assert nginx.run(8443)["msg"] == (
        "vllm-proxy did not take its settings at systemctl start. It listens on nothing, and should on 127.0.0.1:8443. "
        "Unit vllm-proxy.service not found."
    )


def test_a_reload_that_is_refused_fails_in_its_own_words(
    nginx: Nginx, port: int, worker: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Its workers are those of before, and so it was refused, even where it listens as planned."""
    worker("nginx: worker process")
    nginx.put(pid=str(os.getpid()), journal=REFUSED)
    assert nginx.run(port, state="reloaded")["msg"] == (
        f"vllm-proxy did not take its settings at systemctl reload-or-restart. It listens on 127.0.0.1:{port}, and should on "
        f"127.0.0.1:{port}. nginx says: [emerg] bind() to 127.0.0.1:443 failed (98: Address already in use); "
        "[emerg] still could not bind()"
    )
    assert nginx.orders() == ["reload-or-restart vllm-proxy"]


def test_new_workers_on_the_planned_addresses_are_the_proof(
    nginx: Nginx, port: int, worker: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """Those of before may be there still, to finish what they have begun."""
    worker("nginx: worker process is shutting down")
    before = worker("nginx: worker process")
    nginx.put(pid=str(os.getpid()))
    assert "did not take" in nginx.run(port + 1, state="restarted")["msg"]

    def reload() -> None:
        while "reload-or-restart vllm-proxy" not in nginx.orders():
            time.sleep(0.02)
        before.kill()
        worker("nginx: worker process")

    threading.Thread(target=reload, daemon=True).start()
    assert nginx.run(port, state="reloaded", timeout=30)["changed"]


def test_settings_that_were_written_after_its_workers_started(
    nginx: Nginx, port: int, worker: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """By a run that ended before it told nginx. This process stands in for the master, and its children for workers."""
    nginx.put(pid=str(os.getpid()))
    settings = tmp_path / "nginx.conf"
    settings.touch()
    paths = [str(settings), str(tmp_path / "nowhere")]
    assert nginx.run(port, settings=paths)["serving"], "without workers nobody has read it"
    worker("nginx: worker process")
    now = time.time()
    for written, behind in ((now - 60, False), (now, False), (now + 60, False)):
        os.utime(settings, (written, written))
        assert nginx.run(port, settings=paths)["serving"] is not behind
    time.sleep(1.5)
    settings.touch()
    result = nginx.run(port, settings=paths)
    assert (result["serving"], result["outdated"], result["changed"]) == (False, paths[:1], False)
    worker("nginx: worker process")
    assert nginx.run(port, settings=paths)["serving"]


def test_a_restart_that_lets_streams_end_takes_nothing_of_its_time(
    nginx: Nginx, port: int, worker: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    nginx.put(pid=str(os.getpid()), ordered="sleep 3.2")
    threading.Timer(4, worker, ["nginx: worker process"]).start()
    assert nginx.run(port, state="restarted", timeout=3)["changed"]


def test_an_address_that_is_none(nginx: Nginx) -> None:
    assert "bind is 'nowhere.invalid', which is no address" in nginx.run(8443, bind="nowhere.invalid")["msg"]


def test_addresses_as_the_kernel_writes_them() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        assert ("::1", server.getsockname()[1]) in nginx_unit.listening(os.getpid())
    assert nginx_unit.told({("::", 443), ("10.0.0.1", 80)}) == ["10.0.0.1:80", "[::]:443"]
