# SPDX-License-Identifier: GPL-3.0-or-later
"""After the last case the host has nothing of a driver, and the installers are still there."""

from __future__ import annotations


def test_nothing_of_the_driver_is_left(host):
    assert host.run("dkms status").stdout == ""
    assert not host.file("/var/lib/nvidia/log").exists
    assert not host.exists("nvidia-smi")
    assert not host.file("/usr/local/sbin/baremetal-nvidia-check").exists


def test_the_installer_is_still_in_the_cache(host):
    found = host.check_output("ls /var/cache/baremetal/nvidia_driver").split()
    assert "NVIDIA-Linux-x86_64-580.159.04.run" in found
