# SPDX-License-Identifier: GPL-3.0-or-later
"""The module as Ansible calls it: what it starts, who meets whom, what is left when something dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_jobs
import pytest

from ansible_collections.baremetal.vllm.plugins.modules import model_fetch
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub, Link

REPO = "owner/tiny"
TOKEN = "hf_right_0123456789"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "origin"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(3_000_000))
    with Hub() as hub:
        hub.add(REPO, folder, token=TOKEN)
        yield hub


@pytest.fixture
def call(hub: Hub, tmp_path: Path, run_module: Callable[..., Any]) -> Callable[..., Any]:
    model = model_jobs.read_model(REPO, hub.url, token=TOKEN)

    def call(state: str, **params: Any) -> Any:
        settings = {
            "model": model,
            "root": str(tmp_path / "models"),
            "endpoint": hub.url,
            "token": TOKEN,
            "reserve_mib": 1,
            "timeout": 3,
        }
        return run_module(model_fetch, state=state, **{**settings, **params})

    return call


def wait(call: Callable[..., Any], **params: Any) -> Any:
    for _ in range(300):
        result = call("finished", **params)
        if result.get("failed") or result["progress"]["state"] == "done":
            return result
        time.sleep(0.05)
    raise AssertionError(result)


def processes(root: Path) -> list[int]:
    """Those that this test has started: they hold the lock."""
    found = []
    for status in root.glob(".staging/*.json"):
        process = json.loads(status.read_text())["pid"]
        if Path(f"/proc/{process}").exists():
            found.append(process)
    return found


def test_start_and_wait(call: Callable[..., Any], tmp_path: Path) -> None:
    assert call("started", check=True)["changed"] is True
    assert not (tmp_path / "models").exists()
    assert call("started")["changed"] in (False, True)
    result = wait(call)
    assert (result["changed"], result["progress"]["done_bytes"]) == (True, 3_000_002)
    data = (tmp_path / "models" / REPO / "main/model.safetensors").read_bytes()
    assert data == (tmp_path / "origin/model.safetensors").read_bytes()
    assert (tmp_path / "models" / REPO / "main/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_two_runs_at_once_meet(call: Callable[..., Any], hub: Hub, tmp_path: Path) -> None:
    hub.link = Link(500_000)
    first, second = call("started"), call("started")
    assert (first["progress"]["attached"], second["progress"]["attached"]) == (False, True)
    assert first["progress"]["pid"] == second["progress"]["pid"] or first["progress"]["state"] == "starting"
    assert wait(call)["changed"] is True
    assert len([path for path in hub.paths() if path.startswith("/cdn/")]) == 1


def test_a_folder_that_another_run_makes_meanwhile(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], os.makedirs

    def late(path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        make(path, exist_ok=True)
        made.append(path)
        make(path, mode, exist_ok)

    monkeypatch.setattr(os, "makedirs", late)
    assert not call("started").get("failed")
    assert str(tmp_path / "models/.staging") in made
    assert wait(call)["changed"] is True


def test_a_killed_process_is_told_and_taken_up(call: Callable[..., Any], hub: Hub, tmp_path: Path) -> None:
    hub.faults.append(Fault("/cdn/", stall_at=2_000_000))
    call("started", timeout=60)
    (part,) = _until(lambda: list((tmp_path / "models").glob(".staging/*/parts/model.safetensors.incomplete")))
    _until(lambda: part.stat().st_size > 1_500_000)
    (process,) = processes(tmp_path / "models")
    os.kill(process, signal.SIGKILL)
    _until(lambda: not processes(tmp_path / "models"))
    result = call("finished")
    assert result["failed"]
    assert f"the process ({process}) that fetched {REPO} has ended without saying why" in result["msg"]
    hub.faults.clear()
    again = call("started")
    result = wait(call)
    assert f"an earlier run (process {process}) ended without saying why" in result["progress"]["notes"][0]
    assert again["progress"]["attached"] is False
    assert result["progress"]["hub_bytes"] < 2_000_000


def _until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it does not come to that")


def test_a_fetch_that_nothing_is_known_of_has_not_ended_well(call: Callable[..., Any], tmp_path: Path) -> None:
    """As where the disk was so full that not even the reason could be written."""
    (tmp_path / "models").mkdir()
    result = call("finished")
    assert result["failed"] and "MiB are free there. Make room, or set model_root to a larger disk" in result["msg"]


def test_a_failure_is_one_line(call: Callable[..., Any], hub: Hub) -> None:
    call("started", token="hf_wrong_0123456789")
    result = wait(call, token="hf_wrong_0123456789")
    assert result["failed"]
    assert "is not to be had: HTTP 403 from" in result["msg"]
    assert "accept its licence at the hub and give the token" in result["msg"]
    assert "\n" not in result["msg"]


def test_the_token_is_nowhere(call: Callable[..., Any], hub: Hub, tmp_path: Path) -> None:
    """Neither on disk nor in a command line nor in what the module says, while the process works and after it."""
    hub.faults.append(Fault("/cdn/", stall_at=1_000_000, times=1))
    texts = [call("started")["text"]]
    _until(lambda: processes(tmp_path / "models"))
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert TOKEN.encode() not in process.read_bytes()
        except OSError:
            continue
    for _ in range(2):
        for path in (tmp_path / "models").rglob("*"):
            with contextlib.suppress(OSError):  # a folder, or one that the process has renamed
                assert TOKEN.encode() not in path.read_bytes()
        texts.append(wait(call)["text"])
    assert not any(TOKEN in text for text in texts)


def test_a_target_that_cannot_be_written(call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("started", root=str(tmp_path / "file/models"))
    assert result["failed"]
    assert str(tmp_path / "file/models") in result["msg"]


# ---- real disks ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"NOT TESTED on a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("share", [False, True])
def test_a_disk_that_somebody_fills_meanwhile(
    call: Callable[..., Any], hub: Hub, tmp_path: Path, small_disk: Path, share: bool
) -> None:
    """Both ways of bytes: from a connection, and copied by the kernel. What has come stays, and the next run takes it up."""
    settings: dict[str, Any] = {"root": str(small_disk), "reserve_mib": 0}
    if share:
        settings["model"] = model_jobs.read_model(f"file://{tmp_path}/origin", "", "http")
    else:
        hub.faults.append(Fault("/cdn/", stall_at=1_000_000, times=1))
        call("started", **settings, timeout=4)
        _until(lambda: [part for part in small_disk.rglob("*.incomplete") if part.stat().st_size > 700_000])
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 3_000_000)
    if share:  # too fast to be met on its way: the check before the first byte is told of more room than there is
        real, model_fetch.model_store.free_bytes = model_fetch.model_store.free_bytes, lambda path: 10**12
        try:
            call("started", **settings)
        finally:
            model_fetch.model_store.free_bytes = real
    result = wait(call, **settings)
    assert result["failed"]
    assert "No space left on device" in result["msg"] and "make room and run again" in result["msg"], result["msg"]
    assert not (small_disk / REPO / "main").exists()
    filler.unlink()
    hub.faults.clear()
    call("started", **settings)
    result = wait(call, **settings)
    assert result["changed"] is True, result
    assert result["progress"]["hub_bytes"] < 2_500_000, "what had come is not fetched again"
    (found,) = small_disk.rglob("model.safetensors")
    assert found.read_bytes() == (tmp_path / "origin/model.safetensors").read_bytes()


def test_a_disk_that_is_mounted_read_only(call: Callable[..., Any], small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = call("started", root=f"{small_disk}/models")
    assert result["failed"]
    assert f"{small_disk} cannot be written (its file system is mounted read-only): mount it writable" in result["msg"]
