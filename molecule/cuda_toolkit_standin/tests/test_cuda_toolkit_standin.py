# SPDX-License-Identifier: GPL-3.0-or-later
"""Toolkits that compile, the link and the paths as they were asked for, no driver, and no gigabytes left behind."""

from __future__ import annotations

import pytest


def test_the_toolkit_compiles(host):
    host.check_output("printf '__global__ void f() {}\\nint main() { return 0; }\\n' > /root/a.cu")
    host.check_output("/usr/local/cuda-12.9/bin/nvcc -o /root/a /root/a.cu && /root/a")


def test_link_and_paths_are_ours(host):
    assert host.file("/usr/local/cuda").linked_to == "/usr/local/cuda-12.9"
    shell = host.check_output("sh -lc 'command -v nvcc; echo $LD_LIBRARY_PATH'")
    assert shell.split() == ["/usr/local/cuda/bin/nvcc", "/usr/local/cuda/lib64"]


def test_two_by_runfile(host):
    if host.check_output("hostname") != "cuda-runfile":
        pytest.skip("the other host has one")
    assert "release 13.0" in host.check_output("/usr/local/cuda-13.0/bin/nvcc --version")


def test_the_local_repository_is_gone(host):
    assert host.run("ls -d /var/cuda-repo-*").rc != 0
    assert host.run("ls /etc/apt/sources.list.d/cuda-*").rc != 0
    host.check_output("apt-get update -q")


def test_no_driver_came_with_it(host):
    assert not host.exists("nvidia-smi")
    assert not host.package("cuda-drivers").is_installed
