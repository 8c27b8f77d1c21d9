# SPDX-License-Identifier: GPL-3.0-or-later
"""Packages of the wanted branch and no newer one, a module by the kernel's compiler, and everything that goes with it in its version."""

from __future__ import annotations

import pytest

VERSION = "580.95.05"


@pytest.fixture(scope="module")
def kernel(host):
    return host.check_output("uname -r")


@pytest.fixture(scope="module")
def apt(host):
    return host.exists("apt-get")


def test_the_driver_is_of_the_wanted_branch(host, kernel, apt):
    assert VERSION in host.package("nvidia-utils-580-server" if apt else "nvidia-driver-cuda").version
    assert host.check_output(f"modinfo -k {kernel} -F version nvidia") == VERSION
    assert f"nvidia/{VERSION}, {kernel}, x86_64: installed" in host.check_output("dkms status")
    assert VERSION in host.file("/proc/driver/nvidia/version").content_string
    assert len(host.check_output("nvidia-smi -L").splitlines()) == 2


def test_the_stream_is_the_branchs(host, apt):
    if apt:
        pytest.skip("streams are of dnf")
    assert "stream=580-open" in host.file("/etc/dnf/modules.d/nvidia-driver.module").content_string


def test_the_compiler_of_the_kernel_built_it(host, kernel, apt):
    log = host.check_output(f"cat /var/lib/dkms/nvidia/{VERSION}/{kernel}/x86_64/log/make.log")
    assert f"CC={'x86_64-linux-gnu-gcc-12' if apt else 'gcc'}" in log


def test_headers_of_kernels_to_come(host, apt):
    assert host.package("linux-headers-generic-hwe-22.04" if apt else "kernel-devel").is_installed


def test_the_fabric_manager_is_of_the_drivers_version_and_runs(host):
    assert host.package("nvidia-fabricmanager").version.startswith(VERSION)
    assert host.service("nvidia-fabricmanager").is_running
    assert host.service("nvidia-fabricmanager").is_enabled


def test_daemon_and_check_are_enabled(host):
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
    assert host.service("baremetal-nvidia-check").is_enabled


def test_kernel_and_driver_are_held(host, apt):
    if apt:
        held = host.check_output("apt-mark showhold").split()
        assert {"linux-image-generic-hwe-22.04", "nvidia-dkms-580-server-open", "nvidia-fabricmanager"} <= set(held)
    else:
        held = host.check_output("dnf -q versionlock list")
        for name in ("kernel-core-0:5.14.0", "kmod-nvidia-open-dkms-3:580", "nvidia-fabricmanager-0:580"):
            assert name in held


def test_options_of_modules(host):
    text = host.file("/etc/modprobe.d/baremetal-nvidia.conf").content_string
    assert "options nvidia_uvm uvm_disable_hmm=1" in text


def test_toolkits_side_by_side_and_no_driver_with_them(host):
    assert host.file("/usr/local/cuda").linked_to == "/usr/local/cuda-12.9"
    assert "release 12.9" in host.check_output("sh -lc 'nvcc --version'")
    assert "release 13.0" in host.check_output("/usr/local/cuda-13.0/bin/nvcc --version")
    assert not host.package("cuda-drivers").is_installed


def test_the_container_toolkit_by_dnf(host, apt):
    if apt:
        pytest.skip("the scenario nvidia_container_toolkit_standin has it")
    packages = (
        "nvidia-container-toolkit",
        "nvidia-container-toolkit-base",
        "libnvidia-container-tools",
        "libnvidia-container1",
    )
    assert {host.package(name).version for name in packages} == {"1.20.0"}
    assert all(f"{name}-0:1.20.0" in host.check_output("dnf -q versionlock list") for name in packages)
    assert f"libcuda.so.{VERSION}" in host.check_output("cat /run/cdi/nvidia.yaml")


def test_what_the_role_notes_is_what_it_holds(host, apt):
    noted = host.file("/var/lib/baremetal/nvidia_driver.held").content_string.split()
    assert "nvidia-fabricmanager" in noted
