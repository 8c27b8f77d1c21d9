# SPDX-License-Identifier: GPL-3.0-or-later
"""host_look: what modules make of files and package managers that come in many shapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import host_look


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """programs(name=script, ...): the only ones that there are, beside the shell's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(host_look, "PATHS", str(folder))

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text("#!/bin/sh\n" + script)
            path.chmod(0o755)
        # PATHS is what programs get as PATH, too; execvp of the parent looks in its own.
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


def test_what_a_folder_is_called_in_proc(tmp_path: Path) -> None:
    """By its real path, and in a container, where the folder is mounted, by the one that is written."""
    (tmp_path / "disk/chat").mkdir(parents=True)
    (tmp_path / "state").symlink_to("disk")
    here, there = f"{tmp_path}/state/chat", f"{tmp_path}/disk/chat"
    assert host_look.names_of(here) == host_look.names_of(f"{tmp_path}/state//chat/") == {here, there}
    assert host_look.names_of(there) == {there}


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
def test_daemon_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, options: dict[str, Any], error: str
) -> None:
    path = tmp_path / "daemon.json"
    path.write_text(text)
    monkeypatch.setattr(host_look, "DAEMON_JSON", str(path))
    result = host_look.daemon_json()
    assert result["options"] == options
    assert result["error"].startswith(f"{path} {error}") if error else result["error"] == ""


def test_daemon_json_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_look, "DAEMON_JSON", str(tmp_path / "none.json"))
    assert host_look.daemon_json() == {"options": {}, "error": ""}


def test_daemon_json_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_look, "DAEMON_JSON", str(tmp_path))
    assert "cannot be read" in host_look.daemon_json()["error"]


DPKG = """[ "$1" = -W ] && [ "$2" = -f ] || { echo "dpkg-query: error" >&2; exit 2; }
printf 'gcc-12 12.2.0-14 installed\\ndocker.io 20.10.24 config-files\\nlibc6 2.36 installed\\nnvidia-dkms-535 535.1 half-configured\\n'
"""
RPM = """case "$1" in
  -q) echo "package rpm is not installed"; exit 1 ;;
  -qa) printf 'docker-ce 3:29.1.3-1.el9 installed\\nnvidia-container-toolkit 0:1.20.0-1 installed\\n' ;;
esac
"""


def test_packages_of_dpkg(programs: Callable[..., None]) -> None:
    programs(dpkg_query=DPKG)
    assert host_look.packages() == {"gcc-12": "12.2.0-14", "libc6": "2.36"}
    assert host_look.package_states()["nvidia-dkms-535"] == ("535.1", "half-configured")


def test_packages_of_rpm_with_their_epoch(programs: Callable[..., None]) -> None:
    programs(rpm=RPM)
    assert host_look.packages() == {"docker-ce": "3:29.1.3-1.el9", "nvidia-container-toolkit": "1.20.0-1"}


def test_rpm_as_a_mere_tool_on_debian_is_not_asked(programs: Callable[..., None]) -> None:
    programs(dpkg_query=DPKG, rpm="echo 'package rpm is not installed'; exit 1\n")
    assert "libc6" in host_look.packages()


def test_held_by_apt(programs: Callable[..., None]) -> None:
    programs(apt_mark='[ "$*" = showhold ] && printf "b\\na\\n"\n')
    assert host_look.held() == ["a", "b"]


def test_held_by_dnf(programs: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text("# Added\nkernel-core-0:5.14.0-503.el9.*\nlibnvidia-container1-1.20.0-1.*\n\n")
    monkeypatch.setattr(host_look, "VERSIONLOCK", str(tmp_path / "list"))
    programs()
    assert host_look.held() == ["kernel-core", "libnvidia-container1"]


def test_sources_of_somebody_elses_making(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {
        "a.list": "# deb https://download.example/x /\n",
        "b.list": "deb [signed-by=/k] https://download.example/x /\n",
        "c.repo": "[x]\nbaseurl = https://download.example/x\n",
        "own.sources": "Types: deb\nURIs: https://download.example/x\n",
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host_look, "SOURCES", (f"{tmp_path}/*",))
    found = host_look.foreign_sources("download[.]example", "own")
    assert [Path(path).name for path in found] == ["b.list", "c.repo"]


def test_switches_of_nvlink_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, data in (("mlx5_0", b"\x82\x2c\x00ConnectX-7\xff"), ("mlx5_4", b"\x90V3\x06SW_MNG\xfe")):
        (tmp_path / name / "device").mkdir(parents=True)
        (tmp_path / name / "device/vpd").write_bytes(data)
    monkeypatch.setattr(host_look, "INFINIBAND", str(tmp_path))
    assert host_look.nvlink_switches() == ["mlx5_4"]


def test_a_command_that_hangs_or_is_not_there() -> None:
    assert host_look.run("sleep", "5", timeout=0.2) == (None, "")
    status, text = host_look.run("/nowhere/program")
    assert status is None
    assert "No such file" in text
    assert host_look.output("false") == ""


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert host_look.read(str(tmp_path)) == ""
    assert host_look.sha256(str(tmp_path / "none")) == ""
