# SPDX-License-Identifier: GPL-3.0-or-later
"""gpu_facts against a strict stand-in for nvidia-smi that prints what the real one printed on hosts with H200s."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import gpu_facts

CAPTURES = Path(__file__).parent / "captures"
FAKE = str(Path(__file__).parents[3] / "fakes/nvidia_smi.py")
H200 = {"address": "0000:00:06.0", "device_id": "2335", "driver": "nvidia"}


def capture(name: str) -> str:
    return (CAPTURES / name).read_text()


def captured_gpus() -> list[dict[str, str]]:
    header, *rows = csv.reader(capture("h200_x2_query.csv").splitlines(), skipinitialspace=True)
    return [dict(zip([field.split()[0] for field in header], row, strict=True)) for row in rows]


def two_h200s() -> dict[str, Any]:
    topo = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\t0-31\t0\nGPU1\tNV18\t X \t0-31\t0\n"
    return {"gpus": captured_gpus(), "topo": {"-m": topo, "-p2p r": capture("h200_x2_p2p_r.txt")}}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def write(**scene: Any) -> None:
        (tmp_path / "scene.json").write_text(json.dumps(scene))
        monkeypatch.setenv("NVIDIA_SMI_SCENE", str(tmp_path / "scene.json"))

    return write


@pytest.fixture
def sysfs(tmp_path: Path) -> Callable[..., str]:
    """sysfs(address=(vendor, class, device, driver), ...) -> a root as the kernel lays it out."""

    def make(devices: dict[str, tuple[str, str, str, str | None]]) -> str:
        root = tmp_path / "sys"
        (root / "bus/pci/devices").mkdir(parents=True)
        for address, (vendor, kind, device, driver) in devices.items():
            folder = root / "devices/pci0000:00" / address
            folder.mkdir(parents=True)
            for name, value in (("vendor", vendor), ("class", kind), ("device", device)):
                (folder / name).write_text(f"{value}\n")
            if driver:
                (root / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
                (folder / "driver").symlink_to(root / "bus/pci/drivers" / driver)
            (root / "bus/pci/devices" / address).symlink_to(folder)
        return str(root)

    return make


@pytest.fixture
def facts(run_module: Callable[..., dict[str, Any]], sysfs: Callable[..., str]) -> Callable[..., dict[str, Any]]:
    """facts(devices, **params) -> the fact gpu, read with the stand-in."""

    def read(devices: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
        result = run_module(gpu_facts, **{"nvidia_smi": FAKE, "sysfs": sysfs(devices or {}), **params})
        assert result["changed"] is False
        return result["ansible_facts"]["gpu"]

    return read


def test_two_gpus_with_their_links(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(**two_h200s())
    gpu = facts({"0000:00:06.0": ("0x10de", "0x030200", "0x2335", "nvidia")})
    assert gpu["device"] == "cuda"
    assert gpu["driver_version"] == "580.159.04"
    assert gpu["problem"] == ""
    assert gpu["gpus"][1] == {
        "index": 1,
        "uuid": "GPU-7bd72414-5cfb-e90e-e27d-56b921f83962",
        "name": "NVIDIA H200",
        "memory_total_mib": 143771,
        "memory_used_mib": 0,
        "compute_capability": "9.0",
        "pci_bus_id": "00000000:00:07.0",
        "mig": False,
    }
    assert gpu["links"] == [["X", "NV18"], ["NV18", "X"]]
    assert gpu["p2p"] == [["X", "OK"], ["OK", "X"]]
    assert gpu["pci"] == [H200]


def test_topology_of_four_gpus_as_captured() -> None:
    assert gpu_facts.parse_matrix(capture("h200_x4_topo.txt"), 4) == [
        ["X" if i == j else "NV18" for j in range(4)] for i in range(4)
    ]


def test_topology_with_network_cards_and_a_legend() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tPHB\tPIX\t0-15\nGPU1\tPHB\t X \tSYS\t0-15\n"
        "NIC0\tPIX\tSYS\t X \t\n\nLegend:\n\n  X    = Self\n  SYS  = Connection over PCIe and between NUMA nodes\n"
    )
    assert gpu_facts.parse_matrix(text, 2) == [["X", "PHB"], ["PHB", "X"]]


def test_a_table_that_is_none_gives_no_links() -> None:
    assert gpu_facts.parse_matrix("GPU0\tX\n", 2) == []


def test_a_failing_topology_keeps_the_gpus(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(gpus=captured_gpus())
    gpu = facts()
    assert (gpu["device"], len(gpu["gpus"]), gpu["links"]) == ("cuda", 2, [])
    assert "exit status 2" in gpu["problem"]


def test_only_display_controllers_of_nvidia_count(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(gpus=[], fail=[9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."])
    gpu = facts(
        {
            "0000:01:00.0": ("0x10de", "0x030000", "0x1db6", "nouveau"),  # VGA
            "0000:01:00.1": ("0x10de", "0x040300", "0x10f0", "snd_hda_intel"),  # its sound card
            "0000:02:00.0": ("0x1002", "0x030000", "0x73bf", "amdgpu"),
            "0000:03:00.0": ("0x10de", "0x030200", "0x2335", None),  # 3D, without a driver
            "0000:04:00.0": ("0x10de", "0x068000", "0x22a3", None),  # NVSwitch
        }
    )
    assert gpu["pci"] == [
        {"address": "0000:01:00.0", "device_id": "1db6", "driver": "nouveau"},
        {"address": "0000:03:00.0", "device_id": "2335", "driver": None},
    ]
    assert (gpu["device"], gpu["gpus"], gpu["driver_version"]) == ("cpu", [], None)
    assert gpu["problem"] == (
        f"{FAKE} failed (exit status 9): NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    )


def test_driver_and_library_of_two_versions(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(fail=[18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161"])
    gpu = facts({"0000:00:06.0": ("0x10de", "0x030200", "0x2335", "nvidia")})
    assert gpu["device"] == "cpu"
    assert gpu["problem"].endswith(
        "(exit status 18): Failed to initialize NVML: Driver/library version mismatch NVML library version: 535.161"
    )


def test_no_gpu_and_no_driver_is_plainly_a_cpu(facts: Callable[..., Any]) -> None:
    gpu = facts(nvidia_smi="/nowhere/nvidia-smi")
    assert (gpu["device"], gpu["pci"], gpu["problem"]) == ("cpu", [], "")
    assert gpu["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert gpu["cpu"]["memory_total_mib"] >= gpu["cpu"]["memory_available_mib"] > 0


def test_a_gpu_without_nvidia_smi_is_a_problem(facts: Callable[..., Any]) -> None:
    gpu = facts({"0000:00:06.0": ("0x10de", "0x030200", "0x2335", None)}, nvidia_smi="/nowhere/nvidia-smi")
    assert gpu["device"] == "cpu"
    assert gpu["problem"] == "cannot run /nowhere/nvidia-smi: No such file or directory"


def test_a_hanging_driver_is_not_waited_for(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(**two_h200s(), hang=60)
    start = time.monotonic()
    gpu = facts({"0000:00:06.0": ("0x10de", "0x030200", "0x2335", "nvidia")}, timeout=1)
    assert time.monotonic() - start < 10
    assert gpu["problem"] == f"{FAKE} did not answer within 1 s"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("memory.total", "[N/A]", "nvidia-smi reports memory.total of GPU 0 as '[N/A]'"),
        ("name", "NVIDIA H200, odd", "nvidia-smi printed a line that is no GPU: 0,"),
    ],
)
def test_unreadable_answers_are_told(
    scene: Callable[..., None], facts: Callable[..., Any], field: str, value: str, problem: str
) -> None:
    scene(gpus=[{**captured_gpus()[0], field: value}])
    gpu = facts({"0000:00:06.0": ("0x10de", "0x030200", "0x2335", "nvidia")})
    assert gpu["device"] == "cpu"
    assert problem in gpu["problem"]


def test_mig_is_seen(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    first, second = captured_gpus()
    scene(gpus=[{**first, "mig.mode.current": "Enabled"}, {**second, "mig.mode.current": "[N/A]"}])
    assert [gpu["mig"] for gpu in facts()["gpus"]] == [True, False]


def test_a_warning_about_a_gpu_is_no_failure(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    """Exit status 14: the GPUs are told, and work."""
    scene(**two_h200s(), warn=[14, "WARNING: infoROM is corrupted at gpu 0000:00:06.0"])
    gpu = facts()
    assert (gpu["device"], len(gpu["gpus"]), gpu["problem"]) == ("cuda", 2, "")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that works below a folder, as servers of this collection do."""
    (tmp_path / "state/chat").mkdir(parents=True)
    (tmp_path / "state-of-others").mkdir()
    process = subprocess.Popen(["sleep", "60"], cwd=tmp_path / "state/chat")
    yield process
    process.kill()
    process.wait()


def test_memory_of_own_servers_is_free(
    scene: Callable[..., None], facts: Callable[..., Any], server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    gpus = captured_gpus()
    for gpu in gpus:
        gpu["memory.used"] = "100000 MiB"
    held = [
        {"gpu_uuid": gpus[0]["uuid"], "pid": str(server.pid), "used_memory": "90000 MiB"},
        {"gpu_uuid": gpus[1]["uuid"], "pid": str(os.getpid()), "used_memory": "90000 MiB"},  # somebody else's
        {"gpu_uuid": gpus[1]["uuid"], "pid": "999999999", "used_memory": "5 MiB"},  # gone
        {"gpu_uuid": gpus[1]["uuid"], "pid": str(server.pid), "used_memory": "[N/A]"},  # not told
    ]
    scene(**{**two_h200s(), "gpus": gpus, "apps": held})
    gpu = facts(own_paths=[f"{tmp_path}/state/", f"{tmp_path}/state-of"])
    assert [one["memory_used_mib"] for one in gpu["gpus"]] == [10000, 100000]


def test_memory_of_own_servers_is_available(facts: Callable[..., Any], tmp_path: Path) -> None:
    code = "import time; held = b'x' * (300 << 20); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        ids = gpu_facts.own_processes([str(tmp_path)])
        held = gpu_facts.held_in_ram(ids)
        process.kill()
    assert ids == {str(process.pid)}
    assert 300 <= held < 400
    assert gpu_facts.held_in_ram({"999999999"}) == 0
    cpu = facts(nvidia_smi="/nowhere", own_paths=["/"])["cpu"]  # everything is ours
    assert cpu["memory_available_mib"] <= cpu["memory_total_mib"]


def test_without_own_paths_all_memory_counts(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    gpus = captured_gpus()
    gpus[0]["memory.used"] = "100000 MiB"
    scene(gpus=gpus[:1], apps=[{"gpu_uuid": gpus[0]["uuid"], "pid": "1", "used_memory": "5 MiB"}])
    assert facts()["gpus"][0]["memory_used_mib"] == 100000


def test_bad_timeout(run_module: Callable[..., Any]) -> None:
    assert run_module(gpu_facts, timeout=0)["msg"] == "timeout is 0: give at least 1 second"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--query-gpus=index", "--format=csv"], 2, "ERROR: Option --query-gpus is not recognized."),
        (["--query-gpu=index,cuda_version", "--format=csv"], 2, 'Field "cuda_version" is not a valid field to query.'),
        (["--query-gpu=index"], 2, "--format= option must be specified"),
    ],
)
def test_the_stand_in_refuses(scene: Callable[..., None], arguments: list[str], status: int, text: str) -> None:
    """A stand-in that took everything would hide a misspelt option."""
    scene(**two_h200s())
    process = subprocess.run([FAKE, *arguments], capture_output=True, text=True)
    assert process.returncode == status
    assert text in process.stdout


def test_the_stand_in_prints_what_was_captured(scene: Callable[..., None]) -> None:
    scene(**two_h200s())
    header, *rows = capture("h200_x2_query.csv").splitlines()
    fields = ",".join(field.split()[0] for field in header.split(", "))
    process = subprocess.run([FAKE, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True)
    assert process.stdout.splitlines() == rows
