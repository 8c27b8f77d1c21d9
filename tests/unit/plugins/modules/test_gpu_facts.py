# SPDX-License-Identifier: GPL-3.0-or-later
"""gpu_facts against a strict stand-in for nvidia-smi that prints what the real one printed on hosts with H200s."""

from __future__ import annotations

import csv
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, checked

from ansible_collections.baremetal.vllm.plugins.modules import gpu_facts
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import parse_host, pci_catalog

CAPTURES = Path(__file__).parent / "captures"
FAKE = str(Path(__file__).parents[3] / "fakes/nvidia_smi.py")
H200 = {
    "address": "0000:00:06.0",
    "device_id": "2335",
    "driver": "nvidia",
    "module": "nvidia",
    "name": "NVIDIA H200",
    "architecture": "Hopper",
    "compute_capability": "9.0",
    "memory_total_mib": 143771,
    "kernel_module": "either",
    "last_driver_branch": None,
    "nvlink": "switch",
}
ONE = {"0000:00:06.0": ("0x10de", "0x030200", "0x2335", "nvidia")}
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)\n"
PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17 22:55:48 UTC 2024\nGCC version:  gcc 12\n"
)


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
def root(tmp_path: Path) -> Callable[..., Path]:
    """root({address: (vendor, class, device, driver)}, {path: text}) -> a host's file system, with this machine's /proc."""

    def make(devices: dict[str, tuple[str, str, str, str | None]], files: dict[str, str | bytes] | None = None) -> Path:
        root = tmp_path / "root"
        (root / "sys/bus/pci/devices").mkdir(parents=True)
        for address, (vendor, kind, device, driver) in devices.items():
            folder = root / "sys/devices/pci0000:00" / address
            folder.mkdir(parents=True)
            for name, value in (("vendor", vendor), ("class", kind), ("device", device)):
                (folder / name).write_text(f"{value}\n")
            if driver:
                bound = root / "sys/bus/pci/drivers" / driver
                module = root / "sys/module" / {"NovaCore": "nova_core"}.get(driver, driver)
                for made in (bound, module):
                    made.mkdir(parents=True, exist_ok=True)
                if not (bound / "module").exists():
                    (bound / "module").symlink_to(module)
                (folder / "driver").symlink_to(bound)
            (root / "sys/bus/pci/devices" / address).symlink_to(folder)
        for name, content in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        if not (root / "proc").exists():
            (root / "proc").symlink_to("/proc")
        return root

    return make


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """programs(name=script) puts these first on PATH."""

    def make(**scripts: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return make


@pytest.fixture
def facts(run_module: Callable[..., dict[str, Any]], root: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """facts(devices, files, **params) -> the fact gpu, read with the stand-in."""

    def read(
        devices: dict[str, Any] | None = None, files: dict[str, str | bytes] | None = None, **params: Any
    ) -> dict[str, Any]:
        given = {"nvidia_smi": FAKE, "catalog": pci_catalog(), "root": str(root(devices or {}, files)), **params}
        result = run_module(gpu_facts, **given)
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
        "memory_reserved_mib": None,
        "compute_capability": "9.0",
        "pci_bus_id": "00000000:00:07.0",
        "mig": False,
        "mig_devices": [],
    }
    assert gpu["state"] == "ok"
    assert gpu["links"] == [["X", "NV18"], ["NV18", "X"]]
    assert gpu["p2p"] == [["X", "OK"], ["OK", "X"]]
    assert gpu["pci"] == [H200]


def test_topology_of_four_gpus_as_captured() -> None:
    assert gpu_facts.parse_matrix(capture("h200_x4_topo.txt"), [0, 1, 2, 3]) == [
        ["X" if i == j else "NV18" for j in range(4)] for i in range(4)
    ]


def test_topology_with_network_cards_and_a_legend() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\x1b[0m\nGPU0\t X \tPHB\tPIX\t0-15\nGPU1\tPHB\t X \tSYS\t0-15\n"
        "NIC0\tPIX\tSYS\t X \t\n\nLegend:\n\n  X    = Self\n  SYS  = Connection over PCIe and between NUMA nodes\n"
    )
    assert gpu_facts.parse_matrix(text, [0, 1]) == [["X", "PHB"], ["PHB", "X"]]


def test_a_table_that_is_none_gives_no_links() -> None:
    assert gpu_facts.parse_matrix("GPU0\tX\n", [0, 1]) == []


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
        },
        {
            "sys/class/infiniband/mlx5_0/device/vpd": b"ConnectX-7",
            "sys/class/infiniband/mlx5_1/device/vpd": b"\x90V3\x06SW_MNG\xfe",
        },
    )
    assert [(one["address"], one["device_id"], one["driver"]) for one in gpu["pci"]] == [
        ("0000:01:00.0", "1db6", "nouveau"),
        ("0000:03:00.0", "2335", None),
    ]
    # The second is a device by which switches of NVLink 5 are managed; on a real host its folder is a link to the PCI address.
    assert (gpu["state"], gpu["nvswitches"]) == ("no_driver", ["0000:04:00.0", "device"])
    assert gpu["nouveau"] == {"loaded": ["nouveau"], "bound": ["0000:01:00.0"]}
    assert (gpu["device"], gpu["gpus"], gpu["driver_version"]) == ("cpu", [], None)
    assert gpu["problem"] == (
        f"{FAKE} failed (exit status 9): NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    )


def test_driver_and_library_of_two_versions(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(fail=[18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161"])
    gpu = facts(ONE, {"proc/driver/nvidia/version": PROPRIETARY})
    assert (gpu["device"], gpu["state"]) == ("cpu", "mismatch")
    assert gpu["problem"].endswith(
        "(exit status 18): Failed to initialize NVML: Driver/library version mismatch NVML library version: 535.161: "
        "the loaded module is 535.161.07; reboot, or stop what uses the GPUs and load the module anew"
    )
    assert gpu["module"]["loaded"] == {"version": "535.161.07", "flavour": "proprietary"}


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
    assert gpu["problem"].startswith(f"{FAKE} did not answer within 1 s: look for 'NVRM: Xid'")
    assert gpu["state"] == "hung"


def test_a_gpu_that_is_not_told_of_costs_no_other(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    first, second = captured_gpus()
    scene(**{**two_h200s(), "gpus": [{**first, "memory.total": "[N/A]"}, second]})
    gpu = facts(ONE)
    assert [one["index"] for one in gpu["gpus"]] == [1]
    assert (gpu["device"], gpu["state"]) == ("cuda", "ok")
    reason = "the driver does not tell its memory.total"
    assert gpu["gpus_unusable"] == [{"index": 0, "name": "NVIDIA H200", "reason": reason}]
    assert gpu["problem"] == f"GPU 0 (NVIDIA H200): {reason}"
    assert parse_host({**gpu, "name": "h"}, "h").gpus[0].index == 1


@pytest.mark.parametrize("field", ["memory.used", "mig.mode.current", "memory.reserved"])
@pytest.mark.parametrize("value", ["[N/A]", "[Not Supported]", "[Unknown Error]", "[Insufficient Permissions]", "N/A"])
def test_what_is_not_needed_may_be_missing(
    scene: Callable[..., None], facts: Callable[..., Any], field: str, value: str
) -> None:
    first, second = ({**gpu, "memory.reserved": "611 MiB"} for gpu in captured_gpus())
    scene(**{**two_h200s(), "gpus": [{**first, field: value}, second]})
    gpu = facts()
    assert (len(gpu["gpus"]), gpu["problem"]) == (2, "")
    assert gpu["gpus"][1]["memory_reserved_mib"] == 611
    assert len(parse_host({**gpu, "name": "h"}, "h").gpus) == 2


def test_a_field_that_an_old_driver_does_not_know(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    """compute_cap came with branch 510: the catalog knows it."""
    gpus = [{key: value for key, value in gpu.items() if key != "compute_cap"} for gpu in captured_gpus()[:1]]
    scene(gpus=gpus)
    gpu = facts(ONE)
    assert (gpu["gpus"][0]["compute_capability"], gpu["problem"]) == ("9.0", "")
    assert gpu["gpus_unusable"] == []


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("memory.total", "lots", "nvidia-smi reports memory.total of GPU 0 as 'lots'"),
        ("name", "NVIDIA H200, odd", "nvidia-smi printed a line that is no GPU: 0,"),
    ],
)
def test_unreadable_answers_are_told(
    scene: Callable[..., None], facts: Callable[..., Any], field: str, value: str, problem: str
) -> None:
    scene(gpus=[{**captured_gpus()[0], field: value}])
    gpu = facts(ONE)
    assert (gpu["device"], gpu["state"]) == ("cpu", "failed")
    assert problem in gpu["problem"]


def test_a_gpu_that_fell_off_the_bus(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    scene(**two_h200s())
    lost = {f"0000:00:{slot:02x}.0": ("0x10de", "0x030200", "0x2335", "nvidia") for slot in (6, 7, 8)}
    lost["0000:00:09.0"] = ("0x10de", "0x030200", "0x2335", "vfio-pci")  # given to a guest on purpose
    gpu = facts(lost)
    assert (len(gpu["gpus"]), gpu["state"]) == (2, "ok")
    assert gpu["problem"].startswith("on the PCI bus but not in nvidia-smi: 0000:00:08.0; look for 'NVRM'")


MIG_XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <gpu id="00000000:00:06.0"><uuid>{0}</uuid><mig_mode><current_mig>Enabled</current_mig></mig_mode><mig_devices>
    <mig_device><index>0</index><gpu_instance_id>1</gpu_instance_id><compute_instance_id>0</compute_instance_id>
      <fb_memory_usage><total>71424 MiB</total><reserved>0 MiB</reserved><used>50030 MiB</used></fb_memory_usage></mig_device>
    <mig_device><index>1</index><gpu_instance_id>2</gpu_instance_id><compute_instance_id>0</compute_instance_id>
      <fb_memory_usage><total>71424 MiB</total><reserved>0 MiB</reserved><used>30 MiB</used></fb_memory_usage></mig_device>
    </mig_devices>
    <processes><process_info><gpu_instance_id>1</gpu_instance_id><compute_instance_id>0</compute_instance_id>
      <pid>{2}</pid><type>C</type><process_name>VLLM::EngineCore</process_name><used_memory>50000 MiB</used_memory>
    </process_info></processes></gpu>
  <gpu id="00000000:00:07.0"><uuid>{1}</uuid><mig_devices>
		None
	</mig_devices><processes></processes></gpu>
</nvidia_smi_log>
"""
MIG_LIST = """GPU 0: NVIDIA H200 (UUID: {0})
  MIG 3g.71gb     Device  0: (UUID: MIG-11111111-aaaa-5555-8888-000000000000)
  MIG 3g.71gb     Device  1: (UUID: MIG-22222222-aaaa-5555-8888-000000000000)
GPU 1: NVIDIA H200 (UUID: {1})
"""


def test_slices_of_a_gpu(
    scene: Callable[..., None], facts: Callable[..., Any], server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    first, second = captured_gpus()
    uuids = (first["uuid"], second["uuid"])
    first |= {"mig.mode.current": "Enabled", "memory.used": "50060 MiB"}
    second |= {"mig.mode.current": "[N/A]"}
    text = MIG_XML.format(*uuids, server.pid)
    scene(**{**two_h200s(), "gpus": [first, second]}, xml=text, list=MIG_LIST.format(*uuids))
    gpu = facts(own_paths=[f"{tmp_path}/state"])
    assert [one["mig"] for one in gpu["gpus"]] == [True, False]
    slices = [
        {
            "index": index,
            "uuid": f"MIG-{str(index + 1) * 8}-aaaa-5555-8888-000000000000",
            "profile": "3g.71gb",
            "memory_total_mib": 71424,
            "memory_used_mib": 30,  # of the first, 50000 are a managed server's
        }
        for index in (0, 1)
    ]
    assert [one["mig_devices"] for one in gpu["gpus"]] == [slices, []]
    assert gpu["gpus"][0]["memory_used_mib"] == 60
    (process,) = (one for one in gpu["processes"] if one["pid"] == server.pid)
    assert (process["memory_used_mib"], process["own"], process["gpus"]) == (50000, True, [uuids[0]])
    planned = parse_host({**gpu, "name": "h"}, "h").gpus
    assert [(one.mig, one.uuid[:5], one.memory_total_mib) for one in planned] == [
        (True, "MIG-1", 71424),
        (True, "MIG-2", 71424),
        (False, "GPU-7", 143771),
    ]


# A100 40 GB as NVIDIA's guide to MIG divides it: 3g.20gb with two compute instances that share its 20 GB, and a 2g.10gb. Two forms of
# -L: that of the first drivers with MIG, and today's.
SHARED_XML = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<driver_version>535.129.03</driver_version>
	<attached_gpus>2</attached_gpus>
	<gpu id="00000000:00:06.0">
		<mig_mode>
			<current_mig>Enabled</current_mig>
			<pending_mig>Enabled</pending_mig>
		</mig_mode>
		<mig_devices>{devices}
		</mig_devices>
		<fb_memory_usage>
			<total>40960 MiB</total>
			<reserved>446 MiB</reserved>
			<used>31 MiB</used>
		</fb_memory_usage>
		<uuid>{first}</uuid>
	</gpu>
	<gpu id="00000000:00:07.0">
		<mig_mode>
			<current_mig>N/A</current_mig>
		</mig_mode>
		<mig_devices>
			None
		</mig_devices>
		<uuid>{second}</uuid>
	</gpu>
</nvidia_smi_log>
"""
SHARED_DEVICE = """
			<mig_device>
				<index>{0}</index>
				<gpu_instance_id>{1}</gpu_instance_id>
				<compute_instance_id>{2}</compute_instance_id>
				<device_attributes>
					<shared>
						<multiprocessor_count>14</multiprocessor_count>
					</shared>
				</device_attributes>
				<ecc_error_count>
					<volatile_count>
						<sram_uncorrectable>0</sram_uncorrectable>
					</volatile_count>
				</ecc_error_count>
				<fb_memory_usage>
					<total>{3} MiB</total>
					<reserved>0 MiB</reserved>
					<used>19 MiB</used>
					<free>1 MiB</free>
				</fb_memory_usage>
				<bar1_memory_usage>
					<total>32767 MiB</total>
				</bar1_memory_usage>
			</mig_device>"""


@pytest.mark.parametrize(
    "uuids",
    [
        ("MIG-{0}/2/0", "MIG-{0}/2/1", "MIG-{0}/5/0"),
        tuple(f"MIG-e07a497d-1bb6-5a42-b670-1c33bf55ab6{number}" for number in range(3)),
    ],
)
def test_compute_instances_that_share_memory_count_once(
    scene: Callable[..., None], facts: Callable[..., Any], uuids: tuple[str, ...]
) -> None:
    first, second = captured_gpus()
    own = [uuid.format(first["uuid"]) for uuid in uuids]
    devices = "".join(SHARED_DEVICE.format(*row) for row in ((0, 2, 0, 20096), (1, 2, 1, 20096), (2, 5, 0, 9984)))
    xml = SHARED_XML.format(devices=devices, first=first["uuid"], second=second["uuid"])
    listed = f"""GPU 0: NVIDIA A100-SXM4-40GB (UUID: {first["uuid"]})
  MIG 1c.3g.20gb  Device  0: (UUID: {own[0]})
  MIG 1c.3g.20gb  Device  1: (UUID: {own[1]})
  MIG 2g.10gb+me  Device  2: (UUID: {own[2]})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {second["uuid"]})
"""
    scene(**{**two_h200s(), "gpus": [{**first, "mig.mode.current": "Enabled"}, second]}, xml=xml, list=listed)
    found = facts()["gpus"][0]["mig_devices"]
    assert [(one["index"], one["uuid"], one["profile"], one["memory_total_mib"]) for one in found] == [
        (0, own[0], "1c.3g.20gb", 20096),
        (2, own[2], "2g.10gb+me", 9984),
    ]


def test_mig_without_slices(scene: Callable[..., None], facts: Callable[..., Any]) -> None:
    first, second = captured_gpus()
    text = "<nvidia_smi_log><gpu><uuid>x</uuid><mig_devices>None</mig_devices></gpu></nvidia_smi_log>"
    scene(**{**two_h200s(), "gpus": [{**first, "mig.mode.current": "Enabled"}, second]}, xml=text, list="")
    assert [(one["mig"], one["mig_devices"]) for one in facts()["gpus"]] == [(True, []), (False, [])]


def test_who_uses_the_gpus(
    scene: Callable[..., None], facts: Callable[..., Any], server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    gpus = captured_gpus()
    apps = [
        {"gpu_uuid": gpu["uuid"], "pid": str(server.pid), "used_memory": size}
        for gpu, size in zip(gpus, ("900 MiB", "[N/A]"), strict=True)
    ]
    scene(**{**two_h200s(), "gpus": gpus, "apps": apps})
    (process,) = (one for one in facts(own_paths=["/elsewhere"])["processes"] if one["pid"] == server.pid)
    assert process["command"] == "sleep"
    assert process["user"] == pwd.getpwuid(os.getuid()).pw_name
    assert (process["memory_used_mib"], process["own"]) == (900, False)
    assert process["gpus"] == [gpu["uuid"] for gpu in gpus]


def fake_process(root: Path, pid: int, opened: str, group: str, command: str) -> None:
    folder = root / f"proc/{pid}"
    (folder / "fd").mkdir(parents=True)
    (folder / "fd/3").symlink_to(opened)
    (folder / "cgroup").write_text(f"0::{group}\n")
    (folder / "cmdline").write_text(command.replace(" ", "\0"))


def test_who_has_a_gpu_open_is_known_without_nvidia_smi(tmp_path: Path) -> None:
    root, identifier = tmp_path, "0123456789ab" + "c" * 52
    fake_process(
        root, 11, "/dev/nvidia0", f"/system.slice/docker-{identifier}.scope", "/usr/bin/python3 serve --api-key s3cret"
    )
    fake_process(
        root, 12, "/dev/nvidiactl", "/system.slice/nvidia-persistenced.service", "/usr/bin/nvidia-persistenced"
    )
    fake_process(root, 13, "/dev/nvidia-uvm", "/system.slice/nvidia-dcgm.service", "/usr/bin/nv-hostengine -n")
    fake_process(root, 14, "/dev/null", "/user.slice", "sleep")
    found = gpu_facts.gpu_processes([], gpu_facts.device_users(str(root)), {"13"}, str(root))
    assert [(one["pid"], one["command"], one["unit"], one["own"]) for one in found] == [
        (11, "python3", "docker 0123456789ab", False),
        (12, "nvidia-persistenced", "nvidia-persistenced.service", False),
        (13, "nv-hostengine", "nvidia-dcgm.service", True),
    ]
    assert "s3cret" not in json.dumps(found)


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


def test_own_servers_are_known_behind_a_link(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """The kernel tells the real path of their folder."""
    (tmp_path / "link").symlink_to("state")
    assert gpu_facts.own_processes([f"{tmp_path}/link"]) == {str(server.pid)}
    assert gpu_facts.own_processes([f"{tmp_path}/state-of-others"]) == set()


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


# ---- what is known without the driver's help ----

MODINFO = r"""
while [ $# -gt 1 ]; do case $1 in -b) shift 2;; -k) kernel=$2; shift 2;; *) exit 3;; esac; done
case $kernel/$1 in
  6.1.0-9-amd64/nvidia) printf 'filename:       /lib/modules/x/nvidia.ko
version:        575.64.03
license:        NVIDIA
';;
  6.1.0-13-amd64/nvidia-current-open)
    printf 'filename:       /lib/modules/y/nvidia.ko
alias:  char-major-195
version:        580.65.06
license:        Dual MIT/GPL
';;
  *) echo "modinfo: ERROR: Module $1 not found." >&2; exit 1;;
esac
"""
KERNELS = {
    "lib/modules/6.1.0-9-amd64/modules.dep": "",
    "lib/modules/6.1.0-13-amd64/modules.dep": "",
    "lib/modules/6.1.0-10-amd64/left-behind": "",
    "boot/vmlinuz-6.1.0-9-amd64": "",
    "boot/vmlinuz-6.1.0-13-amd64": "",
    "boot/vmlinuz-0-rescue-1234": "",
    "proc/sys/kernel/osrelease": "6.1.0-9-amd64\n",
    "proc/meminfo": "MemTotal: 1024 kB\n",
}


def test_the_module_on_disk_of_each_kernel(facts: Callable[..., Any], programs: Callable[..., None]) -> None:
    programs(modinfo=MODINFO)
    gpu = facts({}, KERNELS, nvidia_smi="/nowhere")
    assert gpu["kernel"] == {
        "running": "6.1.0-9-amd64",
        "installed": ["6.1.0-9-amd64", "6.1.0-13-amd64"],
        "next": "6.1.0-13-amd64",
    }
    assert [(one["kernel"], one["version"], one["flavour"]) for one in gpu["module"]["on_disk"]] == [
        ("6.1.0-9-amd64", "575.64.03", "proprietary"),
        ("6.1.0-13-amd64", "580.65.06", "open"),
    ]
    assert gpu["module"]["loaded"] is None


@pytest.mark.parametrize(
    ("text", "version", "flavour"), [(OPEN, "580.159.04", "open"), (PROPRIETARY, "535.161.07", "proprietary")]
)
def test_the_loaded_module(facts: Callable[..., Any], text: str, version: str, flavour: str) -> None:
    gpu = facts({}, {"proc/driver/nvidia/version": text}, nvidia_smi="/nowhere")
    assert gpu["module"]["loaded"] == {"version": version, "flavour": flavour}


@pytest.mark.parametrize(
    ("text", "rows", "problem"),
    [
        (  # DKMS 3
            "nvidia/575.64.03, 6.1.0-9-amd64, x86_64: installed\nnvidia/575.64.03, 6.1.0-13-amd64, x86_64: built\nzfs/2.1, 6.1, x: added",
            [("nvidia", "575.64.03", "6.1.0-9-amd64", "installed"), ("nvidia", "575.64.03", "6.1.0-13-amd64", "built")],
            "",
        ),
        (  # DKMS 2
            "nvidia, 550.144.03, 5.15.0-100-generic, x86_64: installed\nnvidia, 550.144.03: added",
            [("nvidia", "550.144.03", "5.15.0-100-generic", "installed"), ("nvidia", "550.144.03", None, "added")],
            "",
        ),
        (
            "nvidia-current/535.247.01, 6.1.0-9-amd64, x86_64: installed (WARNING! Diff between built and installed module!)",
            [("nvidia-current", "535.247.01", "6.1.0-9-amd64", "installed")],
            "WARNING! Diff between built",
        ),
        (  # what is left of a removed version stops dkms
            "Error! Could not locate dkms.conf file.\nFile: /var/lib/dkms/nvidia/470.82/source/dkms.conf does not exist.",
            [],
            "/var/lib/dkms/nvidia/470.82/source/dkms.conf does not exist",
        ),
    ],
)
def test_dkms(
    facts: Callable[..., Any], programs: Callable[..., None], text: str, rows: list[Any], problem: str
) -> None:
    programs(dkms=f"cat <<'END'\n{text}\nEND")
    module = facts({}, {"var/lib/dkms/nvidia/x": ""}, nvidia_smi="/nowhere")["module"]
    assert [(row["name"], row["version"], row["kernel"], row["state"]) for row in module["dkms"]] == rows
    assert problem in module["dkms_problem"]


def test_dkms_is_not_asked_where_it_has_nothing(facts: Callable[..., Any], programs: Callable[..., None]) -> None:
    programs(dkms="echo nvidia/1.2, x, y: installed")
    assert facts({}, nvidia_smi="/nowhere")["module"]["dkms"] == []


def test_a_driver_of_the_distribution_is_seen(facts: Callable[..., Any]) -> None:
    assert facts({}, {"usr/lib/nvidia/alternate-install-present": ""}, nvidia_smi="/nowhere")["module"]["packaged"]


def test_nova_holds_the_gpu(facts: Callable[..., Any]) -> None:
    gpu = facts({"0000:01:00.0": ("0x10de", "0x030000", "0x2b85", "NovaCore")}, nvidia_smi="/nowhere")
    assert gpu["nouveau"] == {"loaded": ["nova_core"], "bound": ["0000:01:00.0"]}
    assert gpu["pci"][0]["kernel_module"] == "open"


@pytest.mark.parametrize(
    ("device", "architecture", "kernel_module", "branch"),
    [
        ("1db6", "Volta", "proprietary", 580),
        ("1d81", "Volta", "proprietary", 580),  # TITAN V, which has no row
        ("1b06", "Pascal", "proprietary", 580),
        ("1f08", "Turing", "either", None),
        ("2236", "Ampere", "either", None),
        ("2b8c", "Blackwell", "open", None),
        ("0fc6", "", "", None),  # Kepler: too old to be known here
    ],
)
def test_generations_by_device_id(
    facts: Callable[..., Any], device: str, architecture: str, kernel_module: str, branch: int | None
) -> None:
    (gpu,) = facts({"0000:01:00.0": ("0x10de", "0x030000", f"0x{device}", None)}, nvidia_smi="/nowhere")["pci"]
    assert (gpu["architecture"], gpu["kernel_module"], gpu["last_driver_branch"]) == (
        architecture,
        kernel_module,
        branch,
    )


EFI = "sys/firmware/efi/efivars/{}-8be4df61-93ca-11d2-aa0d-00e098032b8c"
ON, OFF = b"\x06\0\0\0\x01", b"\x06\0\0\0\0"


@pytest.mark.parametrize(
    ("files", "enabled"),
    [
        ({}, False),  # no EFI at all
        ({EFI.format("SecureBoot"): OFF}, False),
        ({EFI.format("SecureBoot"): ON}, True),
        ({EFI.format("SecureBoot"): ON, EFI.format("MokSBStateRT"): ON}, False),
        ({"sys/firmware/efi/runtime": b""}, None),  # efivarfs is not mounted
    ],
)
def test_secure_boot(facts: Callable[..., Any], files: dict[str, bytes], enabled: bool | None) -> None:
    assert facts({}, files, nvidia_smi="/nowhere")["secure_boot"] == {"enabled": enabled, "key": "", "enrolled": None}


@pytest.mark.parametrize(
    ("answer", "enrolled"),
    [("echo $2 is already enrolled", True), ("echo $2 is not enrolled; exit 1", False)],
)
def test_the_signing_key(facts: Callable[..., Any], programs: Callable[..., None], answer: str, enrolled: bool) -> None:
    programs(mokutil=answer)
    files = {EFI.format("SecureBoot"): ON, "var/lib/shim-signed/mok/MOK.der": b"key"}
    found = facts({}, files, nvidia_smi="/nowhere")["secure_boot"]
    assert found == {"enabled": True, "key": "/var/lib/shim-signed/mok/MOK.der", "enrolled": enrolled}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run/.containerenv": ""}, "container"),
        ({"proc/cpuinfo": "flags\t\t: fpu sse hypervisor lahf_lm\n"}, "vm"),
        ({"proc/cpuinfo": "flags\t\t: fpu sse\n", "sys/class/dmi/id/product_name": "KVM"}, "vm"),
        ({"proc/cpuinfo": "flags\t\t: fpu sse\n", "sys/class/dmi/id/product_name": "PowerEdge R750"}, "bare"),
    ],
)
def test_virtual_or_bare(facts: Callable[..., Any], files: dict[str, str], expected: str) -> None:
    assert facts({}, files, nvidia_smi="/nowhere")["virtual"] == expected


def test_the_catalog_comes_with_the_task(tmp_path: Path) -> None:
    """Through Ansible: the action plugin gives the module what the controller knows of GPUs."""
    folder = tmp_path / "sys/bus/pci/devices/0000:01:00.0"
    folder.mkdir(parents=True)
    for name, value in (("vendor", "0x10de"), ("class", "0x030200"), ("device", "0x1db6")):
        (folder / name).write_text(value)
    playbook = [{"hosts": "localhost", "gather_facts": False, "tasks": [
        {"baremetal.vllm.gpu_facts": {"root": str(tmp_path), "nvidia_smi": "/nowhere"}},
        {"ansible.builtin.copy": {"content": "{{ ansible_facts['gpu'] | to_json }}", "dest": f"{tmp_path}/gpu.json", "mode": "0600"}},
    ]}]  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps(playbook))
    command = ["ansible-playbook", "-i", "localhost,", "-c", "local", str(tmp_path / "play.yml")]
    variables = {"ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"), "ANSIBLE_LOCAL_TEMP": str(tmp_path / "tmp")}
    checked([*command, "-e", f"ansible_python_interpreter={sys.executable}"], tmp_path, **variables)
    gpu = json.loads((tmp_path / "gpu.json").read_text())
    assert gpu["pci"][0]["name"] == "Tesla V100-PCIE-32GB"
    assert (gpu["state"], gpu["problem"]) == ("no_driver", "cannot run /nowhere: No such file or directory")
