# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role nvidia_driver makes of a host: its expressions, with the vars files of each distribution and a look at a host that is
written here. The same on test hosts: molecule/nvidia_driver_changes_standin and nvidia_packages_standin."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, run

from ansible_collections.baremetal.vllm.plugins.modules.nvidia_driver_info import of_generations

ROLE = Path(__file__).parents[3] / "roles/nvidia_driver"
GENERATIONS = yaml.safe_load((ROLE / "vars/versions.yml").read_text())["__nvidia_driver_generations"]
DEBIAN, UBUNTU, ROCKY8, ROCKY9 = (
    {"os_family": "Debian", "distribution": "Debian", "distribution_version": "12.11", "distribution_major_version": "12"},
    {"os_family": "Debian", "distribution": "Ubuntu", "distribution_version": "22.04", "distribution_major_version": "22"},
    {"os_family": "RedHat", "distribution": "Rocky", "distribution_version": "8.10", "distribution_major_version": "8"},
    {"os_family": "RedHat", "distribution": "Rocky", "distribution_version": "9.6", "distribution_major_version": "9"},
)  # fmt: skip
KERNELS = {
    "Debian": "6.1.0-28-amd64",
    "Ubuntu": "6.8.0-90-generic",
    "Rocky8": "4.18.0-553.el8_10.x86_64",
    "Rocky9": "5.14.0-570.el9.x86_64",
}
H200, B200, V100 = "0x2335", "0x2901", "0x1db4"


def look(kernel: str, *devices: str, driver: str = "nvidia", **other: Any) -> dict[str, Any]:
    """What nvidia_driver_info returns for a host without a driver, and what else is said."""
    gpus = [{"address": f"0000:1{n}:00.0", "device_id": one, "driver": driver} for n, one in enumerate(devices)]
    return {
        "kernel": kernel, "running_kernel": kernel, "next_kernel": kernel, "next_module": {}, "next_headers": True,
        "gpus": gpus, "generations": of_generations(gpus, GENERATIONS),
        "nvswitches": 0, "loaded": {}, "modules": {}, "module": {}, "dkms": [], "broken_dkms": [], "userspace": "",
        "smi": {"version": "", "gpus": 0, "error": "nvidia-smi is not there"}, "uninstaller": "", "runfile_version": "",
        "alternate": False, "foreign": [], "unfinished": [],
        "compiler": {"command": "gcc", "path": "/usr/bin/gcc", "text": "", "source": "x"},
        "headers": True, "secure_boot": False, "signing_key": {"key": "", "certificate": "", "enrolled": False},
        "users": [], "x_servers": [], "packages": {}, "held": [], "units": {}, "files": {}, "short": [], "noexec": [],
        "package_lists": True, **other,
    }  # fmt: skip


@pytest.fixture
def host(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """host(name of an expression, facts, devices, what is said, what the look finds) -> its value"""

    def host(name: str, facts: dict[str, str], *devices: str, found: dict[str, Any] | None = None, **said: Any) -> Any:
        kernel = KERNELS.get(facts["distribution"]) or KERNELS["Rocky" + facts["distribution_major_version"]]
        variables = role_vars(ROLE.name, "main", "versions", facts["os_family"], facts["distribution"]) | {
            "ansible_facts": {**facts, "architecture": "x86_64"},
            "inventory_hostname": "h",
            "role_path": str(ROLE),
            **said,
        }
        wish = render("{{ __nvidia_driver_wish }}", **variables)
        variables["__nvidia_driver_probe"] = look(kernel, *devices, wish=wish, **(found or {}))
        return render(f"{{{{ {name} }}}}", **variables)

    return host


PACKAGE, RUNFILE = {"nvidia_driver_method": "package"}, {"nvidia_driver_method": "runfile"}


@pytest.mark.parametrize(
    ("facts", "devices", "said", "problem"),
    [
        (DEBIAN, [H200], {**PACKAGE, "nvidia_driver_branch": "580"}, "Debian 12 packages 535 alone. Set nvidia_driver_method to runfile"),
        (DEBIAN, [H200], {**PACKAGE, "nvidia_driver_branch": "535"}, ""),
        (DEBIAN, [H200], {**PACKAGE, "nvidia_driver_branch": "580", "nvidia_driver_packages": ["nvidia-open-580"]}, ""),
        (DEBIAN, [B200], PACKAGE, "driver 535 is older than a GPU here (0x2901)"),
        (DEBIAN, [B200], RUNFILE, ""),
        (UBUNTU, [B200], {**RUNFILE, "nvidia_driver_branch": "550"}, '570 is the first branch for. Set nvidia_driver_branch to "580".'),
        (UBUNTU, [V100], {**RUNFILE, "nvidia_driver_branch": "590"}, "no longer drives a GPU here"),
        (UBUNTU, [V100], {**PACKAGE, "nvidia_driver_branch": "580"}, ""),
        (UBUNTU, [V100], {**RUNFILE, "nvidia_driver_branch": 580}, ""),
        (UBUNTU, [V100], {**RUNFILE, "nvidia_driver_branch": None}, ""),
        (ROCKY8, [H200], PACKAGE, ""),
        (ROCKY9, [B200, V100], RUNFILE, "a host has one kind"),
        ({**ROCKY9, "distribution_major_version": "10", "distribution_version": "10.0"}, [H200], RUNFILE, "Rocky 10.0 is not supported"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    host: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, str],
    devices: list[str],
    said: dict[str, Any],
    problem: str,
) -> None:
    monkeypatch.setitem(KERNELS, "Rocky10", "6.12.0-55.el10.x86_64")
    problems = host("__nvidia_driver_problems", facts, *devices, **said)
    assert (problem in "\n".join(problems)) if problem else problems == []


@pytest.mark.parametrize(
    ("facts", "said", "packages"),
    [
        (DEBIAN, {}, ["nvidia-kernel-dkms", "nvidia-driver-libs"]),
        (UBUNTU, {}, ["nvidia-dkms-580-server-open", "nvidia-utils-580-server"]),
        (
            UBUNTU,
            {"nvidia_driver_version": "575.64.03"},
            ["nvidia-dkms-575-server-open=575.64.03-*", "nvidia-utils-575-server=575.64.03-*"],
        ),
        (ROCKY9, {}, ["kmod-nvidia-open-dkms-580.*", "nvidia-driver-cuda-580.*"]),
        (
            ROCKY8,
            {"nvidia_driver_version": "570.195.03", "nvidia_driver_module_type": "proprietary"},
            ["kmod-nvidia-latest-dkms-570.195.03-*", "nvidia-driver-cuda-570.195.03-*"],
        ),
    ],
)
def test_packages_are_of_the_wanted_branch(
    host: Callable[..., Any], facts: dict[str, str], said: dict[str, Any], packages: list[str]
) -> None:
    assert host("__nvidia_driver_asked_packages", facts, H200, **PACKAGE, **said)[:2] == packages


@pytest.mark.parametrize(
    ("facts", "package"),
    [
        (DEBIAN, "linux-headers-amd64"),
        (UBUNTU, "linux-headers-generic-hwe-22.04"),
        (ROCKY8, "kernel-devel"),
        (ROCKY9, "kernel-devel"),
    ],
)
def test_headers_of_kernels_to_come(host: Callable[..., Any], facts: dict[str, str], package: str) -> None:
    assert host("__nvidia_driver_meta_packages", facts, H200) == [package]


def installed(version: str, **other: Any) -> dict[str, Any]:
    """What is found of a driver by packages that works."""
    kernel = KERNELS["Rocky9"]
    row = {"module": "nvidia", "version": version, "kernel": kernel, "state": "installed"}
    names = ("kmod-nvidia-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced")
    return {
        "loaded": {"version": version, "flavour": "open"}, "module": {"version": version, "flavour": "open"}, "dkms": [row],
        "userspace": version, "smi": {"version": version, "gpus": 1, "error": ""}, "packages": dict.fromkeys(names, f"3:{version}-1.el9"),
        "foreign": list(names), **other,
    }  # fmt: skip


def test_another_branch_is_a_change_where_packages_carry_none_in_their_names(host: Callable[..., Any]) -> None:
    found = installed("570.195.03")
    missing = host("__nvidia_driver_missing", ROCKY9, H200, found=found, **PACKAGE, nvidia_driver_branch="580")
    assert missing == ["the driver is 570.195.03, not of branch 580"]
    assert host("__nvidia_driver_missing", ROCKY9, H200, found=found, **PACKAGE, nvidia_driver_branch="570") == []


def test_what_works_is_kept_unless_it_is_what_the_role_brings(host: Callable[..., Any]) -> None:
    """What goes with a driver is set up in the run that installs it, too."""
    found = installed("580.95.05")
    assert host("__nvidia_driver_wanted", ROCKY9, H200, found=found, **RUNFILE) is False
    assert host("__nvidia_driver_wanted", ROCKY9, H200, found=found, **PACKAGE) is True
    assert host("__nvidia_driver_change_needed", ROCKY9, H200, found=found, **PACKAGE) is False
    assert (
        host("__nvidia_driver_wanted", UBUNTU, H200, found=found, **PACKAGE) is False
    )  # other packages than the role's
    by_file = {**found, "uninstaller": "/usr/bin/nvidia-uninstall"}
    assert host("__nvidia_driver_wanted", ROCKY9, H200, found=by_file, **PACKAGE) is False


@pytest.mark.parametrize(
    ("consent", "unsaid"), [(None, True), ("null", True), ("", True), ("false", False), (True, False)]
)
def test_consent_to_a_reboot_is_said_or_not(host: Callable[..., Any], consent: Any, unsaid: bool) -> None:
    assert host("__nvidia_driver_reboot_unsaid", DEBIAN, nvidia_driver_reboot=consent) is unsaid


def test_what_dkms_has_not_installed_is_missing(host: Callable[..., Any]) -> None:
    row = {"module": "nvidia", "version": "580.95.05", "kernel": KERNELS["Rocky9"], "state": "built"}
    missing = host("__nvidia_driver_missing", ROCKY9, H200, found=installed("580.95.05", dkms=[row]), **PACKAGE)
    assert missing == ["DKMS has not installed it (built)"]


def test_the_tree_in_dkms_has_the_name_that_its_package_gave_it(host: Callable[..., Any]) -> None:
    row = {"module": "nvidia-current", "version": "535.309.01", "kernel": KERNELS["Debian"], "state": "installed"}
    assert (
        host("__nvidia_driver_tree", DEBIAN, H200, found=installed("535.309.01", dkms=[row]), **PACKAGE)
        == "nvidia-current"
    )
    assert host("__nvidia_driver_tree", DEBIAN, H200, **PACKAGE) == "nvidia-current"
    assert host("__nvidia_driver_tree", DEBIAN, H200, **RUNFILE) == "nvidia"
    assert host("__nvidia_driver_tree", UBUNTU, H200, **PACKAGE) == "nvidia"
    # PACKAGE_NAME of nvidia-open-kernel-dkms 550.163.01-2
    opened = {**PACKAGE, "nvidia_driver_module_type": "open"}
    assert host("__nvidia_driver_tree", DEBIAN, H200, **opened) == "nvidia-current-open"
    rows = host("__nvidia_driver_files", DEBIAN, H200, **opened)
    assert {row["path"]: row["wanted"] for row in rows if row["path"].startswith("/etc/dkms/")} == {
        "/etc/dkms/nvidia-current-open.conf": True,
        "/etc/dkms/nvidia.conf": False,
        "/etc/dkms/nvidia-current.conf": False,
    }


@pytest.mark.parametrize("name", ["nvidia", "nvidia-current", "nvidia-current-open", "nvidia-other"])
def test_the_check_at_boot_knows_each_name_of_the_module(tmp_path: Path, name: str) -> None:
    script = (ROLE / "files/check.sh").read_text()
    begin = script.index("module() {")
    (tmp_path / "modinfo").write_text(f'#!/bin/sh\n[ "$5" = {name} ] && echo 550.163.01\n')
    (tmp_path / "modinfo").chmod(0o755)
    function = script[begin : script.index("\n}\n", begin) + 3]
    done = subprocess.run(
        ["sh", "-c", f"PATH={tmp_path}:$PATH kernel=6.1; {function} module"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ("" if name == "nvidia-other" else "550.163.01\n")


def test_the_controller_is_not_changed_where_only_a_reboot_ends_the_change(tmp_path: Path) -> None:
    """The role reboot would refuse, and the way back would take away what was installed."""
    include = {"name": "baremetal.vllm.nvidia_driver", "tasks_from": "release"}
    said = {
        "__nvidia_driver_here": False,
        "__nvidia_driver_busy": True,
        "__nvidia_driver_stopped": [],
        "__nvidia_driver_released": {"loaded": ["nvidia"], "problems": []},
        "nvidia_driver_reboot": True,
    }
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False}
    play["tasks"] = [{"ansible.builtin.include_role": include, "vars": said}]
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    done = run(["ansible-playbook", "-i", "localhost,", tmp_path / "play.yml"], ROOT, ANSIBLE_NOCOLOR="1")
    assert "is the controller itself (its connection is local). Set baremetal_reboot" in " ".join(done.stdout.split())


def test_a_fabric_manager_is_no_driver_in_the_way(host: Callable[..., Any]) -> None:
    found = {"foreign": ["nvidia-fabricmanager"], "nvswitches": 4, "packages": {"nvidia-fabricmanager": "580.95.05-1"}}
    assert host("__nvidia_driver_problems", ROCKY9, H200, found=found, **RUNFILE) == []
    assert host("__nvidia_driver_to_remove", ROCKY9, H200, found=found, **RUNFILE) == []
    assert (
        host("__nvidia_driver_to_remove", ROCKY9, H200, found=found, nvidia_driver_state="absent") == found["foreign"]
    )
    (problem,) = host(
        "__nvidia_driver_problems", ROCKY9, H200, found=installed("580.95.05"), **RUNFILE, nvidia_driver_branch="580"
    )
    assert "in its way is a driver that came otherwise: kmod-nvidia-open-dkms" in problem


def test_packages_that_could_not_be_set_up_are_removed_and_are_no_way_back(host: Callable[..., Any]) -> None:
    found = {"foreign": ["nvidia-dkms-535", "nvidia-utils-535"], "unfinished": ["nvidia-dkms-535"]}
    assert host("__nvidia_driver_unfinished", UBUNTU, H200, found=found, **RUNFILE) == ["nvidia-dkms-535"]
    assert host("__nvidia_driver_good_packages", UBUNTU, H200, found=found, **RUNFILE) == ["nvidia-utils-535"]
    (problem,) = host("__nvidia_driver_problems", UBUNTU, H200, found=found, **RUNFILE)
    assert "in its way is a driver that came otherwise: nvidia-dkms-535, nvidia-utils-535" in problem


@pytest.mark.parametrize(("device", "file"), [(H200, False), (B200, True)])
def test_nvlink_5_has_a_subnet_manager(host: Callable[..., Any], device: str, file: bool) -> None:
    name, files = (
        "/etc/modules-load.d/baremetal-nvidia.conf",
        "__nvidia_driver_files | selectattr('wanted') | map(attribute='path') | list",
    )
    assert (name in host(files, ROCKY9, device, found={"nvswitches": 2}, **PACKAGE)) is file
    assert (
        "nvlsm" in host("__nvidia_driver_fabric_packages", ROCKY9, device, found={"nvswitches": 2}, **PACKAGE)
    ) is file
    assert name not in host(files, ROCKY9, device, **PACKAGE)


@pytest.mark.parametrize(
    ("there", "missing"),
    [("580.95.05-1", False), ("580.126.20-1", True), ("580.95.05.1-1", True), ("3:580.95.05-1.el9", False)],
)
def test_the_fabric_manager_is_of_the_very_version(host: Callable[..., Any], there: str, missing: bool) -> None:
    found = installed("580.95.05", nvswitches=1)
    found["packages"] = {**found["packages"], "nvidia-fabricmanager": there}
    assert host("__nvidia_driver_fabric_missing", ROCKY9, H200, found=found, **PACKAGE) is missing


def test_opengl_comes_by_choice(host: Callable[..., Any]) -> None:
    said = {**RUNFILE, "nvidia_driver_version": "575.64.03"}
    flag = "--no-opengl-files"
    assert flag in host("__nvidia_driver_command", UBUNTU, H200, **said)
    assert flag not in host("__nvidia_driver_command", UBUNTU, H200, **said, nvidia_driver_opengl=True)


@pytest.mark.parametrize(
    ("option", "unit"),
    [
        ("nvidia_driver_persistenced", "nvidia-persistenced.service"),
        ("nvidia_driver_boot_check", "baremetal-nvidia-check.service"),
    ],
)
def test_a_unit_that_is_no_longer_wanted_goes(host: Callable[..., Any], option: str, unit: str) -> None:
    path = f"/etc/systemd/system/{unit}"
    found = installed(
        "580.159.04",
        uninstaller="/usr/bin/nvidia-uninstall",
        files={path: "a sum"},
        units={unit: {"enabled": True, "active": True}},
    )
    said = {**RUNFILE, "nvidia_driver_branch": "580"}
    for wanted in (True, False):
        asked = {**said, option: wanted}
        assert (unit in host("__nvidia_driver_wanted_units", ROCKY9, H200, found=found, **asked)) is wanted
        assert (path in host("__nvidia_driver_stale_files", ROCKY9, H200, found=found, **asked)) is wanted
        assert (path in host("__nvidia_driver_leftover_files", ROCKY9, H200, found=found, **asked)) is not wanted
        assert host("__nvidia_driver_work_needed", ROCKY9, H200, found=found, **asked)


@pytest.mark.parametrize(
    ("facts", "said", "own"),
    [(UBUNTU, PACKAGE, True), (UBUNTU, RUNFILE, True), (DEBIAN, PACKAGE, False), (ROCKY9, PACKAGE, False)],
)
def test_the_unit_of_ubuntus_packages_gives_way(
    host: Callable[..., Any], facts: dict[str, str], said: dict[str, Any], own: bool
) -> None:
    """It has the daemon do without persistence."""
    path = "/etc/systemd/system/nvidia-persistenced.service"
    assert (path in host("__nvidia_driver_stale_files", facts, H200, **said)) is own
    found = {"files": {path: "a sum"}}
    assert (path in host("__nvidia_driver_leftover_files", facts, H200, found=found, **said)) is not own
    unwanted = {**said, "nvidia_driver_persistenced": False}
    assert path in host("__nvidia_driver_leftover_files", facts, H200, found=found, **unwanted)


STOPPED = [
    {"kind": "unit", "name": "app.service"},
    {"kind": "container", "name": "chat"},
    {"kind": "process", "name": "python (7)"},
]


@pytest.mark.parametrize(
    ("pending", "codes", "left"),
    [
        (False, [0, 0], ["process python (7)"]),
        (False, [0, 1], ["chat", "process python (7)"]),
        (True, None, ["app.service", "chat", "process python (7)"]),
    ],
)
def test_what_does_not_run_again_is_told(
    render: Callable[..., Any], pending: bool, codes: list[int] | None, left: list[str]
) -> None:
    say = yaml.safe_load((ROLE / "tasks/restart.yml").read_text())[-1]
    results = [{"rc": code, "item": item} for code, item in zip(codes or [], STOPPED, strict=False)]
    said = {
        "__nvidia_driver_stopped": STOPPED,
        "__nvidia_driver_pending": pending,
        "__nvidia_driver_restarted": {"results": results} if codes else {"skipped": True},
    }
    (expression,) = say["vars"].values()
    assert render(expression, **said) == left
    message = render(say["ansible.builtin.debug"]["msg"], **said, inventory_hostname="h", __nvidia_driver_left=left)
    assert message.endswith(", ".join(left))
    assert ("before it is rebooted" in message) is pending


def test_a_daemon_is_started_anew_by_a_unit_that_is_new(host: Callable[..., Any]) -> None:
    tasks = yaml.safe_load((ROLE / "tasks/services.yml").read_text())
    (state,) = (
        task["ansible.builtin.systemd_service"]["state"]
        for task in tasks
        if task["name"].startswith("Enable the units")
    )
    expression = state.strip().removeprefix("{{").removesuffix("}}")
    path = "/etc/systemd/system/nvidia-persistenced.service"
    written = sha256((ROLE / "files" / Path(path).name).read_bytes()).hexdigest()
    for there, unit, expected in (
        ("", "nvidia-persistenced", "restarted"),
        (written, "nvidia-persistenced", "started"),
        ("", "nvidia-fabricmanager", "started"),
        ("", "baremetal-nvidia-check", "left out"),
    ):
        found = installed("580.95.05", files={path: there})
        asked = {**PACKAGE, "omit": "left out", "item": f"{unit}.service"}
        assert host(expression, UBUNTU, H200, found=found, **asked) == expected


@pytest.mark.parametrize(
    ("drivers", "said", "problem"),
    [
        (["nvidia", "nvidia"], {}, "nvidia-smi sees 1 of 2 GPUs"),
        (["nvidia", ""], {}, "nvidia-smi sees 1 of 2 GPUs"),
        (["nvidia", "vfio-pci"], {}, ""),
        (["nvidia", "nvgrace-gpu-vfio-pci"], {}, ""),
        (["nvidia", "nvidia"], {"preflight_accept": ["gpu"]}, ""),
        (["nvidia", "nvidia"], {"preflight_accept": "clock"}, "nvidia-smi sees 1 of 2 GPUs"),
    ],
)
def test_gpus_that_the_driver_need_not_list(
    host: Callable[..., Any], drivers: list[str], said: dict[str, Any], problem: str
) -> None:
    gpus = [{"address": f"0000:1{n}:00.0", "device_id": H200, "driver": name} for n, name in enumerate(drivers)]
    found = installed("580.95.05", gpus=gpus)
    assert host("__nvidia_driver_disproved", ROCKY9, found=found, **PACKAGE, **said) == ([problem] if problem else [])


def test_a_gpu_of_a_virtual_machine_is_in_the_way_only_where_it_is_the_only_one(host: Callable[..., Any]) -> None:
    given, own = ({"address": "0000:10:00.0", "device_id": H200, "driver": name} for name in ("vfio-pci", ""))
    assert host("__nvidia_driver_problems", ROCKY9, found={"gpus": [given, own]}, **RUNFILE) == []
    (problem,) = host("__nvidia_driver_problems", ROCKY9, found={"gpus": [given]}, **RUNFILE)
    assert "the driver vfio-pci holds the GPU 0000:10:00.0" in problem
    (problem,) = host(
        "__nvidia_driver_problems", ROCKY9, found={"gpus": [given, {**own, "driver": "nouveau"}]}, **RUNFILE
    )
    assert "the driver nouveau holds the GPU" in problem


@pytest.mark.parametrize(
    ("said", "managed", "to_be"),
    [
        ({}, False, ""),
        ({"nvidia_driver_branch": "570"}, True, "570.211.01"),
        ({"nvidia_driver_kernel": "6.1.0-56-amd64"}, True, "580.159.04"),
        ({"nvidia_driver_state": "present"}, True, ""),
        ({"nvidia_driver_hold": True}, True, ""),
        ({"nvidia_driver_hold": False}, True, ""),  # lets go of what was held
        ({"nvidia_driver_fabric_manager": "always"}, True, ""),
        ({"nvidia_driver_persistenced": False}, True, ""),
        ({"nvidia_driver_boot_check": False}, True, ""),
        ({"nvidia_driver_module_options": {"nvidia_uvm": "uvm_disable_hmm=1"}}, True, ""),
        ({"nvidia_driver_compiler": "gcc-12"}, True, ""),
        ({"nvidia_driver_hold": True, "baremetal_nvidia_driver": False}, False, ""),
        ({"baremetal_nvidia_driver": True}, True, ""),
        # Would have a driver that works installed anew.
        ({"nvidia_driver_method": "package", "nvidia_driver_module_type": "proprietary"}, False, ""),
    ],
)
def test_what_is_said_of_a_driver_that_answers(
    host: Callable[..., Any], said: dict[str, Any], managed: bool, to_be: str
) -> None:
    """It stays in its version where no other is asked for, which is what the plan is to know."""
    facts = {**UBUNTU, "gpu": {"pci": [{"device_id": H200}], "state": "ok"}}
    asked = {**said, "hostvars": {"h": said}}
    assert host("__nvidia_driver_managed | bool", facts, H200, **asked) is managed
    assert host("__nvidia_driver_to_be", facts, H200, **asked) == to_be
    without = {**facts, "gpu": {**facts["gpu"], "state": "no_driver"}}
    wanted = host("__nvidia_driver_to_be", without, H200, nvidia_driver_hold=True, hostvars={"h": {}})
    assert wanted == "580.159.04"


def test_a_driver_that_is_kept_is_told_of_what_has_no_effect_on_it(host: Callable[..., Any]) -> None:
    tasks = yaml.safe_load((ROLE / "tasks/main.yml").read_text())
    (task,) = (task for task in tasks if "ansible.builtin.debug" in task)
    said = {"nvidia_driver_hold": True, "hostvars": {"h": {"nvidia_driver_hold": True}}}

    def told(version: str, **other: Any) -> list[bool]:
        found = installed(version, uninstaller="/usr/bin/nvidia-uninstall")
        return [host(condition, ROCKY9, H200, found=found, **{**said, **other}) for condition in task["when"]]

    assert told("570.195.03") == [True, True]
    assert told("580.159.04") == [True, False]  # what the role brings
    assert told("570.195.03", nvidia_driver_branch="570") == [True, False]
    assert told("570.195.03", hostvars={"h": {}}) == [False, True]


def test_a_compiler_that_is_named_is_installed_and_is_that_of_every_later_build(host: Callable[..., Any]) -> None:
    said = {"nvidia_driver_compiler": "x86_64-linux-gnu-gcc-13"}
    assert host("__nvidia_driver_compiler_missing", UBUNTU, H200, **said) is True
    assert host("__nvidia_driver_compiler_missing", UBUNTU, H200) is False
    assert host("__nvidia_driver_compiler_package", UBUNTU, H200, **said) == "gcc-13"
    assert "baremetal_cc='x86_64-linux-gnu-gcc-13'\n" in host("__nvidia_driver_dkms_conf_content", UBUNTU, H200, **said)
    assert "baremetal_cc=''\n" in host("__nvidia_driver_dkms_conf_content", UBUNTU, H200)
