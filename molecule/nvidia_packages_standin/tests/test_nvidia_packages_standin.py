# SPDX-License-Identifier: GPL-3.0-or-later
"""The wanted branch and no newer one, a module by the kernel's compiler, and everything that goes with it in its version."""

from __future__ import annotations

import pytest

# Host -> driver, tree in DKMS, compiler, package of headers to come, packages that are held, package of nvidia-smi
HOSTS = {
    "packages-debian12": (
        "535.309.01",
        "nvidia-current",
        "gcc-12",
        "linux-headers-amd64",
        {"linux-headers-amd64", "nvidia-kernel-dkms", "nvidia-fabricmanager-535"},
        "nvidia-smi",
    ),
    "packages-ubuntu2204": (
        "580.95.05",
        "nvidia",
        "x86_64-linux-gnu-gcc-12",
        "linux-headers-generic-hwe-22.04",
        {"linux-image-generic-hwe-22.04", "nvidia-dkms-580-server-open", "nvidia-fabricmanager"},
        "nvidia-utils-580-server",
    ),
    "packages-rocky9": (
        "580.95.05",
        "nvidia",
        "gcc",
        "kernel-devel",
        {"kernel-core-0:5.14.0", "kmod-nvidia-open-dkms-3:580", "nvidia-fabricmanager-0:580"},
        "nvidia-driver-cuda",
    ),
    "packages-rocky8": (
        "580.95.05",
        "nvidia",
        "gcc",
        "kernel-devel",
        {"kernel-core-0:4.18.0", "kmod-nvidia-open-dkms-3:580", "nvidia-fabricmanager-0:580"},
        "nvidia-driver-cuda",
    ),
    "runfile-ubuntu2204": (
        "580.95.05",
        "nvidia",
        "x86_64-linux-gnu-gcc-12",
        "linux-headers-generic-hwe-22.04",
        {"linux-image-generic-hwe-22.04", "nvidia-fabricmanager"},
        "",
    ),
    "runfile-rocky9": (
        "580.95.05",
        "nvidia",
        "gcc",
        "kernel-devel",
        {"kernel-core-0:5.14.0", "nvidia-fabricmanager-0:580"},
        "",
    ),
    "runfile-rocky8": (
        "580.95.05",
        "nvidia",
        "gcc",
        "kernel-devel",
        {"kernel-core-0:4.18.0", "nvidia-fabricmanager-0:580"},
        "",
    ),
}


@pytest.fixture(scope="module")
def name(host):
    return host.check_output("cat /etc/hostname")


@pytest.fixture(scope="module")
def version(name):
    return HOSTS[name][0]


@pytest.fixture(scope="module")
def kernel(host):
    return host.check_output("uname -r")


@pytest.fixture(scope="module")
def apt(host):
    return host.exists("apt-get")


def test_the_driver_is_of_the_wanted_branch(host, name, kernel, version):
    tree, package = HOSTS[name][1], HOSTS[name][5]
    if package:
        assert version in host.package(package).version
    else:
        assert host.exists("nvidia-uninstall")
    assert host.check_output(f"modinfo -k {kernel} -F version {tree}") == version
    assert f"{tree}/{version}, {kernel}, x86_64: installed" in host.check_output("dkms status")
    assert version in host.file("/proc/driver/nvidia/version").content_string
    assert len(host.check_output("nvidia-smi -L").splitlines()) == 2


def test_the_stream_is_the_branchs(host, apt):
    if apt:
        pytest.skip("streams are of dnf")
    assert "stream=580-open" in host.file("/etc/dnf/modules.d/nvidia-driver.module").content_string


def test_the_compiler_of_the_kernel_built_it(host, name, kernel, version):
    tree, compiler = HOSTS[name][1:3]
    log = host.check_output(f"cat /var/lib/dkms/{tree}/{version}/{kernel}/x86_64/log/make.log")
    assert f"CC={compiler}" in log
    if name.startswith("runfile"):
        log = host.file("/var/log/nvidia-installer.log").content_string
        assert f'Performing CC sanity check with CC="{compiler}"' in log


def test_headers_of_kernels_to_come(host, name):
    assert host.package(HOSTS[name][3]).is_installed


def test_the_fabric_manager_is_of_the_drivers_version_and_runs(host, name, version):
    package = "nvidia-fabricmanager-535" if name == "packages-debian12" else "nvidia-fabricmanager"
    assert host.package(package).version.startswith(version)
    assert host.service("nvidia-fabricmanager").is_running
    assert host.service("nvidia-fabricmanager").is_enabled


def test_no_fabric_manager_of_another_name_is_left(host, name, apt):
    listed = host.check_output("dpkg-query -W -f '${Package}\\n'" if apt else "rpm -qa --qf '%{NAME}\\n'").split()
    held = host.check_output("apt-mark showhold" if apt else "dnf -q versionlock list")
    wanted = ["nvidia-fabricmanager-535" if name == "packages-debian12" else "nvidia-fabricmanager"]
    assert [one for one in listed if one.startswith("nvidia-fabric")] == wanted
    assert [one.split("-0:")[0] for one in held.splitlines() if one.startswith("nvidia-fabric")] == wanted


@pytest.mark.parametrize("streams", ["as they are", "left out of account"])
def test_updates_leave_the_fabric_manager(host, name, version, apt, streams):
    """Also where NVIDIA's repository has the former name, which replaces any fabric manager of this one, outside of streams."""
    if apt:
        assert "Inst nvidia-fabric" not in host.check_output("apt-get -s dist-upgrade")
        return
    option = "--setopt=*.module_hotfixes=1" if streams != "as they are" else ""
    host.run(f"dnf -y {option} upgrade nvidia-fabric*")
    assert host.check_output("rpm -qa 'nvidia-fabric*'") == f"nvidia-fabricmanager-{version}-1.x86_64"


def test_daemon_and_check_are_enabled(host):
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
    assert host.service("baremetal-nvidia-check").is_enabled


def test_the_check_at_boot_builds_a_module_that_is_missing(host, name, kernel, version):
    tree = HOSTS[name][1]
    host.check_output(f"dkms uninstall -m {tree} -v {version} -k {kernel}")
    host.check_output(f"find /lib/modules/{kernel} -name 'nvidia*.ko' -delete")
    assert host.run(f"modinfo -k {kernel} {tree}").rc != 0
    host.check_output("systemctl restart baremetal-nvidia-check")
    assert host.check_output(f"modinfo -k {kernel} -F version {tree}") == version


def test_kernel_and_driver_are_held(host, name, apt):
    held = host.check_output("apt-mark showhold" if apt else "dnf -q versionlock list")
    assert [wanted for wanted in HOSTS[name][4] if wanted not in held] == []


def test_what_the_role_notes_is_what_it_holds(host):
    noted = host.file("/var/lib/baremetal/nvidia_driver.held").content_string.split()
    assert [one for one in noted if one.startswith("nvidia-fabricmanager")]


def test_options_of_modules(host):
    text = host.file("/etc/modprobe.d/baremetal-nvidia.conf").content_string
    assert "options nvidia_uvm uvm_disable_hmm=1" in text


def test_toolkits_side_by_side_and_no_driver_with_them(host, name):
    assert not host.package("cuda-drivers").is_installed
    if name not in ("packages-ubuntu2204", "packages-rocky9"):
        pytest.skip("has none")
    assert host.file("/usr/local/cuda").linked_to == "/usr/local/cuda-12.9"
    assert "release 12.9" in host.check_output("sh -lc 'nvcc --version'")
    assert "release 13.0" in host.check_output("/usr/local/cuda-13.0/bin/nvcc --version")


def test_the_container_toolkit_by_dnf(host, name, version):
    if name != "packages-rocky9":
        pytest.skip("the scenario nvidia_container_toolkit_standin has it")
    packages = (
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
        "libnvidia-container-tools",
        "libnvidia-container1",
    )
    assert {host.package(package).version for package in packages} == {"1.20.0"}
    assert all(f"{package}-0:1.20.0" in host.check_output("dnf -q versionlock list") for package in packages)
    assert f"libcuda.so.{version}" in host.check_output("cat /run/cdi/nvidia.yaml")
