# SPDX-License-Identifier: GPL-3.0-or-later
"""The scripts that the role nvidia_driver runs on a host: what they make of what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parents[3] / "roles" / "nvidia_driver" / "files"


@pytest.fixture
def probe():
    spec = importlib.util.spec_from_file_location("driver_probe", FILES / "probe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)",
            {"version": "580.159.04", "flavour": "open"},
        ),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.144.03  Mon Dec 30 17:44:08 UTC 2024",
            {"version": "550.144.03", "flavour": "proprietary"},
        ),
        ("", {}),
    ],
)
def test_loaded(probe, tmp_path, monkeypatch, line, expected):
    (tmp_path / "version").write_text(line + "\nGCC version: gcc 12\n" if line else "")
    monkeypatch.setattr(probe, "DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(probe, "MODULES", str(tmp_path))
    assert probe.loaded() == expected


@pytest.mark.parametrize(
    ("line", "row"),
    [
        # dkms 3, 2, with a note behind, and added only
        ("nvidia/580.159.04, 6.1.0-56-amd64, x86_64: installed", ("580.159.04", "6.1.0-56-amd64", "installed")),
        ("nvidia, 470.256.02, 5.15.0-1-generic, x86_64: built", ("470.256.02", "5.15.0-1-generic", "built")),
        (
            "nvidia/550.144.03, 6.8.0-87-generic, x86_64: installed (WARNING! Diff between built and installed module!)",
            ("550.144.03", "6.8.0-87-generic", "installed"),
        ),
        ("nvidia/550.144.03: added", ("550.144.03", "", "added")),
        ("zfs/2.1.11, 6.1.0-56-amd64, x86_64: installed", None),
    ],
)
def test_dkms_rows(probe, line, row):
    found = [(item["version"], item["kernel"], item["state"]) for item in probe.dkms_rows(line, "nvidia")]
    assert found == ([row] if row else [])


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ("gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0", "gcc-12"),
        ("x86_64-linux-gnu-gcc-12 (Ubuntu 12.3.0-1ubuntu1~22.04) 12.3.0", "x86_64-linux-gnu-gcc-12"),
        ("gcc (GCC) 11.4.1 20230605 (Red Hat 11.4.1-2)", "gcc"),
    ],
)
def test_compiler_of_a_kernel(probe, tmp_path, monkeypatch, text, command):
    (tmp_path / "config-6.1").write_text(f'CONFIG_CC_IS_GCC=y\nCONFIG_CC_VERSION_TEXT="{text}"\n')
    monkeypatch.setattr(probe, "KERNELS", str(tmp_path / "modules"))
    monkeypatch.setattr(probe, "BOOT", str(tmp_path))
    found = probe.compiler("6.1")
    assert (found["text"], found["command"], found["source"]) == (text, command, str(tmp_path / "config-6.1"))


def test_the_next_kernel_is_the_newest_that_has_modules(probe, tmp_path, monkeypatch):
    for name in ("6.1.0-9-amd64", "6.1.0-56-amd64", "6.1.0-6-amd64"):
        (tmp_path / f"vmlinuz-{name}").touch()
        (tmp_path / "modules" / name).mkdir(parents=True)
    (tmp_path / "vmlinuz-6.9.0-1-amd64").touch()  # removed, its image left behind
    monkeypatch.setattr(probe, "KERNELS", str(tmp_path / "modules"))
    monkeypatch.setattr(probe, "BOOT", str(tmp_path))
    monkeypatch.setattr(probe.shutil, "which", lambda *args, **kwargs: None)
    assert probe.next_kernel("6.1.0-9-amd64") == "6.1.0-56-amd64"


@pytest.mark.parametrize(("value", "expected"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False)])
def test_secure_boot(probe, tmp_path, monkeypatch, value, expected):
    (tmp_path / "SecureBoot-8be4df61").write_bytes(value)
    monkeypatch.setattr(probe, "EFI", str(tmp_path))
    assert probe.secure_boot() is expected


def test_gpus_and_switches_are_told_apart(probe, tmp_path, monkeypatch):
    for address, vendor, kind in (
        ("0000:17:00.0", "0x10de", "0x030200"),
        ("0000:05:00.0", "0x10de", "0x068000"),
        ("0000:17:00.1", "0x10de", "0x040300"),
        ("0000:01:00.0", "0x1a03", "0x030000"),
    ):
        folder = tmp_path / address
        folder.mkdir()
        for name, value in (("vendor", vendor), ("class", kind), ("device", "0x2335")):
            (folder / name).write_text(value + "\n")
    monkeypatch.setattr(probe, "PCI", str(tmp_path))
    gpus, switches = probe.pci()
    assert [row["address"] for row in gpus] == ["0000:17:00.0"]
    assert [row["address"] for row in switches] == ["0000:05:00.0"]


@pytest.mark.parametrize(
    ("line", "unit", "container"),
    [
        ("0::/system.slice/nvidia-persistenced.service", "nvidia-persistenced.service", ""),
        ("0::/system.slice/docker-" + "ab" * 32 + ".scope", "", "abababababab"),
        ("1:name=systemd:/docker/" + "cd" * 32, "", "cdcdcdcdcdcd"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/x.scope", "", ""),
        ("0::/system.slice/ssh.service", "", ""),
    ],
)
def test_owner_of_a_process(probe, tmp_path, monkeypatch, line, unit, container):
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_text(line + "\n")
    monkeypatch.setattr(probe, "PROC", str(tmp_path))
    assert probe.owner("42") == {"unit": unit, "container": container}


def test_a_disk_that_is_too_small_is_named(probe, tmp_path):
    assert probe.short_of_space({str(tmp_path / "not" / "yet"): 1}) == []
    (line,) = probe.short_of_space({str(tmp_path): 10**9})
    assert line.startswith(f"{tmp_path} has ")
    assert line.endswith(f"MiB free of {10**9} needed")


def test_processes_are_stopped_with_consent_only():
    user = subprocess.Popen(
        [sys.executable, "-c", "import signal,time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"]
    )
    rows = [{"pid": user.pid, "unit": "", "container": "", "command": "stubborn"}]
    try:
        for stop, kinds in ((False, []), (True, ["process"])):
            asked = {"users": rows, "units": [], "stop": stop, "seconds": 1}
            done = subprocess.run(
                [sys.executable, str(FILES / "release.py"), json.dumps(asked)],
                capture_output=True,
                text=True,
                check=True,
            )
            assert [row["kind"] for row in json.loads(done.stdout)["stopped"]] == kinds
            assert (user.poll() is None) is not stop
    finally:
        if user.poll() is None:
            os.kill(user.pid, signal.SIGKILL)
        user.wait()
