# SPDX-License-Identifier: GPL-3.0-or-later
"""nvidia_driver_info: what it makes of what is on a host."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import host_look
from ansible_collections.baremetal.vllm.plugins.modules import nvidia_driver_info


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
def test_loaded(tmp_path, monkeypatch, line, expected):
    (tmp_path / "version").write_text(line + "\nGCC version: gcc 12\n" if line else "")
    monkeypatch.setattr(host_look, "DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(nvidia_driver_info, "MODULES", str(tmp_path))
    assert nvidia_driver_info.loaded() == expected


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
def test_dkms_rows(line, row):
    found = [(item["version"], item["kernel"], item["state"]) for item in nvidia_driver_info.dkms_rows(line, "nvidia")]
    assert found == ([row] if row else [])


@pytest.mark.parametrize(
    ("form", "text", "command"),
    [
        ('CONFIG_CC_VERSION_TEXT="{}"', "gcc-12 (Debian 12.2.0-14+deb12u1) 12.2.0", "gcc-12"),
        (
            'CONFIG_CC_VERSION_TEXT="{}"',
            "x86_64-linux-gnu-gcc-12 (Ubuntu 12.3.0-1ubuntu1~22.04) 12.3.0",
            "x86_64-linux-gnu-gcc-12",
        ),
        ('CONFIG_CC_VERSION_TEXT="{}"', "gcc (GCC) 11.4.1 20230605 (Red Hat 11.4.1-2)", "gcc"),
        ("#\n# Compiler: {}\n#", "gcc (GCC) 8.5.0 20210514 (Red Hat 8.5.0-26)", "gcc"),  # kernel 4.18 of EL 8
    ],
)
def test_compiler_of_a_kernel(tmp_path, monkeypatch, form, text, command):
    (tmp_path / "config-6.1").write_text(f"{form.format(text)}\nCONFIG_CC_IS_GCC=y\n")
    monkeypatch.setattr(nvidia_driver_info, "KERNELS", str(tmp_path / "modules"))
    monkeypatch.setattr(nvidia_driver_info, "BOOT", str(tmp_path))
    found = nvidia_driver_info.compiler("6.1")
    assert (found["text"], found["command"], found["source"]) == (text, command, str(tmp_path / "config-6.1"))


def test_the_next_kernel_is_the_newest_that_has_modules(tmp_path, monkeypatch):
    for name in ("6.1.0-9-amd64", "6.1.0-56-amd64", "6.1.0-6-amd64"):
        (tmp_path / f"vmlinuz-{name}").touch()
        (tmp_path / "modules" / name).mkdir(parents=True)
    (tmp_path / "vmlinuz-6.9.0-1-amd64").touch()  # removed, its image left behind
    monkeypatch.setattr(nvidia_driver_info, "KERNELS", str(tmp_path / "modules"))
    monkeypatch.setattr(nvidia_driver_info, "BOOT", str(tmp_path))
    monkeypatch.setattr(nvidia_driver_info, "which", lambda name: "")
    assert nvidia_driver_info.next_kernel("6.1.0-9-amd64") == "6.1.0-56-amd64"


ON, OFF = b"\x06\0\0\0\x01", b"\x06\0\0\0\0"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"SecureBoot": ON}, True),
        ({"SecureBoot": OFF}, False),
        ({"SecureBoot": ON, "MokSBStateRT": OFF}, True),
        ({"SecureBoot": ON, "MokSBStateRT": ON}, False),  # shim's validation is switched off
        ({}, False),
    ],
)
def test_secure_boot(run_module: Callable[..., dict[str, Any]], tmp_path, monkeypatch, files, expected):
    (tmp_path / "efivars").mkdir()
    for name, value in files.items():
        (tmp_path / f"efivars/{name}-8be4df61").write_bytes(value)
    monkeypatch.setattr(host_look, "EFI", str(tmp_path))
    assert run_module(nvidia_driver_info)["secure_boot"] is expected


def test_gpus_and_switches_are_told_apart(tmp_path, monkeypatch):
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
    monkeypatch.setattr(host_look, "PCI", str(tmp_path))
    gpus, switches = host_look.nvidia_devices()
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
def test_owner_of_a_process(tmp_path, monkeypatch, line, unit, container):
    (tmp_path / "42").mkdir()
    (tmp_path / "42" / "cgroup").write_text(line + "\n")
    monkeypatch.setattr(nvidia_driver_info, "PROC", str(tmp_path))
    assert nvidia_driver_info.owner("42") == {"unit": unit, "container": container}


@pytest.mark.parametrize(
    ("container", "name", "unit"),
    [
        ("ef" * 32, "vllm-chat", "vllm-chat.service"),
        ("aa" * 32, "vllm-former", ""),  # its unit is not up
        ("bb" * 32, "", ""),  # Docker does not know it
    ],
)
def test_a_container_belongs_to_the_active_unit_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, name: str, unit: str
) -> None:
    for program, text in (
        ("docker", f"echo {name and '/' + name}"),
        ("systemctl", 'test "$*" = "is-active --quiet vllm-chat.service"'),
    ):
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setattr(host_look, "PATHS", f"{tmp_path}:{host_look.PATHS}")
    (tmp_path / "42").mkdir()
    (tmp_path / "42/cgroup").write_text(f"0::/system.slice/docker-{container}.scope\n")
    monkeypatch.setattr(nvidia_driver_info, "PROC", str(tmp_path))
    assert nvidia_driver_info.owner("42") == {"unit": unit, "container": container[:12]}


@pytest.mark.parametrize(("state", "enabled"), [("enabled", True), ("static", True), ("disabled", False), ("", False)])
def test_a_unit_that_cannot_be_enabled_is_as_good_as_enabled(
    monkeypatch: pytest.MonkeyPatch, state: str, enabled: bool
) -> None:
    text = f"Id=a.service\nLoadState=loaded\nActiveState=active\nUnitFileState={state}\n"
    monkeypatch.setattr(nvidia_driver_info, "output", lambda *argv: text)
    expected = {"exists": True, "active": True, "enabled": enabled}
    assert nvidia_driver_info.units(["a.service"]) == {"a.service": expected}


def test_a_disk_that_is_too_small_is_named(tmp_path):
    assert nvidia_driver_info.short_of_space({str(tmp_path / "not" / "yet"): 1}) == []
    (line,) = nvidia_driver_info.short_of_space({str(tmp_path): 10**9})
    assert line.startswith(f"{tmp_path} has ")
    assert line.endswith(f"MiB free of {10**9} needed")


def test_packages_that_were_never_set_up_are_in_the_way_too(run_module: Callable[..., dict[str, Any]], monkeypatch):
    states = {
        "nvidia-dkms-535": ("535.1", "half-configured"),
        "nvidia-utils-535": ("535.1", "installed"),
        "nvidia-driver-470": ("470.1", "config-files"),
        "bash": ("5", "installed"),
    }
    monkeypatch.setattr(nvidia_driver_info, "package_states", lambda: states)
    result = run_module(nvidia_driver_info, foreign="^nvidia-", packages=["bash", "nvidia-dkms-535"])
    assert result["foreign"] == ["nvidia-dkms-535", "nvidia-utils-535"]
    assert result["unfinished"] == ["nvidia-dkms-535"]
    assert result["packages"] == {"bash": "5", "nvidia-utils-535": "535.1"}


def test_a_host_without_gpus(run_module: Callable[..., dict[str, Any]], tmp_path, monkeypatch):
    monkeypatch.setattr(host_look, "PCI", str(tmp_path))
    result = run_module(nvidia_driver_info, check=True, folders={str(tmp_path): 10**9}, packages=["none"])
    assert result["changed"] is False
    assert (result["gpus"], result["smi"]["error"]) == ([], "there is no GPU")
    assert result["kernel"] == result["running_kernel"]
    assert result["short"][0].startswith(f"{tmp_path} has ")


def test_a_program_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it does not die: one that is stuck in the driver does not, for which a signal that is not sent stands in."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setattr(host_look.subprocess.Popen, "kill", lambda process: None)
    monkeypatch.setattr(host_look, "PATHS", f"{tmp_path}:{host_look.PATHS}")
    began = time.monotonic()
    assert nvidia_driver_info.smi(1) == {"version": "", "gpus": 0, "error": "no answer within 1 seconds"}
    assert time.monotonic() - began < 10


def test_room_is_looked_for_above_folders_that_are_to_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nvidia_driver_info.existing(str(tmp_path / "a/b")) == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert nvidia_driver_info.existing("cache/driver") == nvidia_driver_info.existing("") == "/"
