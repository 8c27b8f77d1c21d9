# SPDX-License-Identifier: GPL-3.0-or-later
"""initramfs with stand-ins for update-initramfs and dracut that take the options of the real ones and no others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import initramfs

UPDATE = """
[ "$1" = -u ] && [ "$2" = -k ] && [ $# = 3 ] || { echo "usage: update-initramfs {-c|-d|-u} [-k version]" >&2; exit 1; }
[ -d "$ROOT/lib/modules/$3" ] || { echo "WARNING: missing /lib/modules/$3" >&2; exit 1; }
echo "update-initramfs: Generating /boot/initrd.img-$3"; echo new > "$ROOT/boot/initrd.img-$3"
"""
DRACUT = """
[ "$1" = --force ] && [ "$2" = --kver ] && [ $# = 3 ] || { echo "dracut: unknown argument '$1'" >&2; exit 1; }
[ -d "$ROOT/lib/modules/$3" ] || { echo "dracut: Cannot find module directory /lib/modules/$3" >&2; exit 1; }
echo new > "$ROOT/boot/initramfs-$3.img"
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """host(images, tools, age) -> module parameters for a host; `age`: seconds from the images to the change."""

    def make(images: dict[str, str], tools: dict[str, str], age: int) -> dict[str, Any]:
        denylist = tmp_path / "denylist.conf"
        denylist.write_text("blacklist nouveau\n")
        for kernel, name in images.items():
            (tmp_path / "lib/modules" / kernel).mkdir(parents=True)
            (tmp_path / "boot").mkdir(exist_ok=True)
            if name:
                (tmp_path / "boot" / name).write_text("old\n")
                made = denylist.stat().st_mtime - age
                os.utime(tmp_path / "boot" / name, (made, made))
        (tmp_path / "bin").mkdir()
        for name, script in tools.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        monkeypatch.setenv("ROOT", str(tmp_path))
        # The real ones must not be found in the folders that Ansible adds.
        monkeypatch.setattr(
            initramfs.AnsibleModule,
            "get_bin_path",
            lambda _self, name: str(tmp_path / "bin" / name) if name in tools else None,
        )
        return {"newer_than": [str(denylist)], "root": str(tmp_path)}

    return make


DEBIAN = {"6.1.0-9-amd64": "initrd.img-6.1.0-9-amd64", "6.1.0-13-amd64": "initrd.img-6.1.0-13-amd64"}
RHEL = {"5.14.0-503.el9.x86_64": "initramfs-5.14.0-503.el9.x86_64.img", "5.14.0-1.el9.x86_64": ""}


@pytest.mark.parametrize(
    ("images", "tools", "tool", "rebuilt"),
    [
        (DEBIAN, {"update-initramfs": UPDATE}, "update-initramfs", ["6.1.0-13-amd64", "6.1.0-9-amd64"]),
        (
            DEBIAN,
            {"update-initramfs": UPDATE, "dracut": DRACUT},
            "update-initramfs",
            ["6.1.0-13-amd64", "6.1.0-9-amd64"],
        ),
        (RHEL, {"dracut": DRACUT}, "dracut", ["5.14.0-503.el9.x86_64"]),  # a kernel without one gets none
    ],
)
def test_standin_tool_makes_them_anew_once(
    host: Callable[..., Any],
    run_module: Callable[..., Any],
    tmp_path: Path,
    images: dict[str, str],
    tools: dict[str, str],
    tool: str,
    rebuilt: list[str],
) -> None:
    params = host(images, tools, age=60)
    planned = run_module(initramfs, check=True, **params)
    assert (planned["changed"], planned["rebuilt"]) == (True, rebuilt)
    assert (tmp_path / "boot" / images[rebuilt[0]]).read_text() == "old\n"
    done = run_module(initramfs, **params)
    assert (done["changed"], done["rebuilt"]) == (True, rebuilt)
    assert done["tool"].endswith(f"/{tool}")
    assert all((tmp_path / "boot" / images[kernel]).read_text() == "new\n" for kernel in rebuilt)
    again = run_module(initramfs, **params)
    assert (again["changed"], again["rebuilt"], again["tool"]) == (False, [], "")


def test_younger_ones_are_left_alone_unless_forced(host: Callable[..., Any], run_module: Callable[..., Any]) -> None:
    params = host(DEBIAN, {"update-initramfs": UPDATE}, age=-60)
    assert run_module(initramfs, **params)["changed"] is False
    assert run_module(initramfs, force=True, **params)["rebuilt"] == ["6.1.0-13-amd64", "6.1.0-9-amd64"]


def test_a_container_has_none(host: Callable[..., Any], run_module: Callable[..., Any]) -> None:
    params = host({"6.1.0-9-amd64": ""}, {}, age=0)
    result = run_module(initramfs, **params)
    assert (result["changed"], result["images"]) == (False, {})


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ({}, "neither update-initramfs nor dracut is here"),
        ({"dracut": "echo 'dracut: No space left on device' >&2\nexit 1\n"}, "No space left on device"),
        ({"dracut": "echo done\n"}, "left "),  # says that all is well, and has done nothing
        ({"dracut": "sleep 30\n"}, "did not end within 1 s"),
    ],
)
def test_what_goes_wrong_is_told(
    host: Callable[..., Any], run_module: Callable[..., Any], tools: dict[str, str], said: str
) -> None:
    params = host(RHEL, tools, age=60)
    result = run_module(initramfs, timeout=1, **params)
    assert result["failed"]
    assert said in result["msg"]
