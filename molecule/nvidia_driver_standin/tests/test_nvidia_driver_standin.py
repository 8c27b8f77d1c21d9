# SPDX-License-Identifier: GPL-3.0-or-later
"""The driver is on disk, in DKMS, loaded and answers; what goes with it runs."""

from __future__ import annotations

import pytest

VERSION = "580.159.04"


@pytest.fixture(scope="module")
def kernel(host):
    return host.check_output("uname -r")


def test_dkms_has_it_for_this_kernel(host, kernel):
    assert f"nvidia/{VERSION}, {kernel}, x86_64: installed" in host.check_output("dkms status")


def test_the_module_is_the_open_one_of_that_version(host, kernel):
    assert host.check_output(f"modinfo -k {kernel} -F version nvidia") == VERSION
    assert "GPL" in host.check_output(f"modinfo -k {kernel} -F license nvidia")


def test_it_is_loaded_and_both_gpus_answer(host):
    assert VERSION in host.file("/proc/driver/nvidia/version").content_string
    assert len(host.check_output("nvidia-smi -L").splitlines()) == 2


def test_the_first_build_and_the_rebuild_use_the_compiler_of_the_kernel(host, kernel):
    config = host.check_output(f"grep CONFIG_CC_VERSION_TEXT /lib/modules/{kernel}/build/.config")
    compiler = config.split('"')[1].split()[0]
    assert (
        f'Performing CC sanity check with CC="{compiler}"' in host.file("/var/log/nvidia-installer.log").content_string
    )
    assert f"CC={compiler}" in host.check_output("cat /var/lib/dkms/nvidia/*/*/*/log/make.log")


def test_headers_of_kernels_to_come_are_installed(host):
    assert host.package("linux-headers-amd64").is_installed


def test_daemon_and_check_are_enabled(host):
    assert host.service("nvidia-persistenced").is_running
    assert host.service("nvidia-persistenced").is_enabled
    assert host.service("baremetal-nvidia-check").is_enabled


def test_the_check_at_boot_builds_a_module_that_is_missing(host, kernel):
    host.check_output("systemctl stop nvidia-persistenced")
    host.check_output(f"dkms uninstall -m nvidia -v {VERSION} -k {kernel}")
    host.check_output(f"rm -f /lib/modules/{kernel}/kernel/drivers/video/nvidia*.ko")
    assert host.run(f"modinfo -k {kernel} nvidia").rc != 0
    host.check_output("systemctl restart baremetal-nvidia-check")
    assert host.check_output(f"modinfo -k {kernel} -F version nvidia") == VERSION
    host.check_output("systemctl start nvidia-persistenced")


def test_the_check_at_boot_says_when_it_cannot(host, kernel):
    host.check_output(f"dkms unbuild -m nvidia -v {VERSION} -k {kernel}")
    host.check_output(f"mv /lib/modules/{kernel}/build /lib/modules/{kernel}/build.away")
    try:
        said = host.run("/usr/local/sbin/baremetal-nvidia-check")
        assert said.rc == 1
        assert f"headers of kernel {kernel} are not installed" in said.stderr
        assert f"kernel {kernel} has no NVIDIA module {VERSION}" in said.stderr
    finally:
        host.check_output(f"mv /lib/modules/{kernel}/build.away /lib/modules/{kernel}/build")
    host.check_output("/usr/local/sbin/baremetal-nvidia-check")
    assert host.check_output(f"modinfo -k {kernel} -F version nvidia") == VERSION


def test_the_installer_stays_in_the_cache(host):
    assert host.file(f"/var/cache/baremetal/nvidia_driver/NVIDIA-Linux-x86_64-{VERSION}.run").exists
