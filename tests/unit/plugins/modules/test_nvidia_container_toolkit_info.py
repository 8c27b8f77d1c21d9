# SPDX-License-Identifier: GPL-3.0-or-later
"""nvidia_container_toolkit_info on the files of a host with a driver and CDI specifications."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import host_look
from ansible_collections.baremetal.vllm.plugins.modules import nvidia_container_toolkit_info as info


def test_driver_and_specifications(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (x@y)\n"
    (tmp_path / "version").write_text(text)
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/nvidia.yaml").write_text("kind: nvidia.com/gpu\nhostPath: /usr/lib/libcuda.so.580.159.04\n")
    (tmp_path / "cdi/old.json").write_text('{"kind": "nvidia.com/gpu", "hostPath": "/usr/lib/libcuda.so.550.144.03"}')
    (tmp_path / "cdi/other.yaml").write_text("kind: vendor.com/net\n")
    (tmp_path / "cdi/nvidia.yaml.former").write_text("kind: nvidia.com/gpu\n")
    monkeypatch.setattr(host_look, "DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(info, "SPECS", (str(tmp_path / "cdi"),))
    monkeypatch.setattr(host_look, "PCI", str(tmp_path / "pci"))
    monkeypatch.setattr(info, "packages", lambda: {"nvidia-container-toolkit": "1.20.0-1", "bash": "5"})
    monkeypatch.setattr(info, "held", lambda: ["linux-image-amd64", "nvidia-container-toolkit"])
    settings = {"runtimes": {"nvidia": {}}, "features": True, "debug": True}
    monkeypatch.setattr(info, "daemon_json", lambda: {"options": settings, "error": ""})
    result = run_module(info, packages=["nvidia-container-toolkit"], note=str(tmp_path / "note"))
    assert (result["driver"], result["gpus"], result["accepted"]) == ("580.159.04", 0, "")
    assert {Path(path).name: spec for path, spec in result["specs"].items()} == {
        "nvidia.yaml": {"driver": "580.159.04", "slices": True},
        "old.json": {"driver": "550.144.03", "slices": True},
    }
    assert result["packages"] == {"nvidia-container-toolkit": "1.20.0-1"}
    assert result["held"] == ["nvidia-container-toolkit"]
    assert result["daemon_json"] == {"runtimes": {"nvidia": {}}}


def test_a_gpu_of_a_virtual_machine_is_not_counted(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [
        {"address": f"0000:1{n}:00.0", "device_id": "0x2335", "driver": name}
        for n, name in enumerate(("nvidia", "", "vfio-pci"))
    ]
    monkeypatch.setattr(info, "nvidia_devices", lambda: (gpus, []))
    assert run_module(info, note=str(tmp_path / "note"))["gpus"] == 2


@pytest.mark.parametrize(
    ("minors", "named", "fits"),
    [
        ([], [], True),
        ([21, 22, 30, 31], [21, 22, 30, 31], True),
        ([21, 22, 30, 31], [21, 22], False),  # a slice more
        ([21, 22, 30, 31], [], False),  # made before the GPU was cut
        ([21, 22], [21, 22, 30, 31], False),  # a slice less
        ([], [21, 22], False),  # a whole GPU again
    ],
)
def test_a_specification_of_other_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minors: list[int], named: list[int], fits: bool
) -> None:
    """Of each slice an instance and a compute instance in it, which the kernel and the specification tell by device files."""
    monkeypatch.setattr(info, "CAPABILITIES", str(tmp_path / "gpu*/mig"))
    (tmp_path / "gpu0/mig").mkdir(parents=True)
    (tmp_path / "gpu0/mig/config").write_text("DeviceFileMinor: 1\n")
    for number, minor in enumerate(minors):
        folder = tmp_path / f"gpu0/mig/gi{number // 2}" / ("ci0" if number % 2 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "access").write_text(f"DeviceFileMinor: {minor}\nDeviceFileMode: 292\nDeviceFileModify: 1\n")
    text = "".join(f"        - path: /dev/nvidia-caps/nvidia-cap{minor}\n" for minor in named)
    assert info.of_these_slices("kind: nvidia.com/gpu\n" + text) is fits
