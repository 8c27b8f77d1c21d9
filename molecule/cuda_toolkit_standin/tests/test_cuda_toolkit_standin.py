# SPDX-License-Identifier: GPL-3.0-or-later
"""Toolkits that compile, the link and the paths as they were asked for, no driver, and no gigabytes left behind."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def name(host):
    return host.check_output("hostname")


@pytest.fixture(scope="module")
def wanted(name):
    return {"12.9": "12.9.1"} if name.startswith("cuda-local") else {"12.9": "12.9.1", "13.0": "13.0.2"}


def test_each_toolkit_compiles(host, wanted):
    host.check_output("printf '__global__ void f() {}\\nint main() { return 0; }\\n' > /root/a.cu")
    for series in wanted:
        host.check_output(f"/usr/local/cuda-{series}/bin/nvcc -o /root/a /root/a.cu && /root/a")


def test_link_and_paths_are_ours(host):
    assert host.file("/usr/local/cuda").linked_to == "/usr/local/cuda-12.9"
    shell = host.check_output("sh -lc 'command -v nvcc; echo $LD_LIBRARY_PATH'")
    assert shell.split() == ["/usr/local/cuda/bin/nvcc", "/usr/local/cuda/lib64"]


def test_the_proof_is_noted(host, wanted):
    note = host.file("/var/lib/baremetal/cuda_toolkit.proved").content_string
    assert note.startswith(f"CUDA {', '.join(wanted.values())} compile with g++ ")
    assert note.split()[-1][0].isdigit()


def test_the_local_repository_is_gone(host):
    assert host.run("ls -d /var/cuda-repo-*").rc != 0
    assert host.run("ls /etc/apt/sources.list.d/cuda-* /etc/yum.repos.d/cuda-*").rc != 0
    host.check_output("apt-get update -q" if host.exists("apt-get") else "dnf -q makecache")


def test_no_driver_came_with_it(host):
    assert not host.exists("nvidia-smi")
    assert not host.package("cuda-drivers").is_installed


def test_the_network_repository_gives_no_driver(host, name):
    """What is asked for by hand does not come either: a driver by runfile would be overrun."""
    if name == "cuda-ubuntu2204":
        policy = host.check_output("apt-cache policy cuda-drivers")
        assert "590.48.01-1" in policy  # it is there
        assert "Candidate: (none)" in policy
    elif name == "cuda-rocky9":
        assert "nvidia-driver-cuda" in host.check_output(
            "dnf -q list --available --disableexcludes=all nvidia-driver-cuda"
        )
        assert host.run("dnf -q list --available nvidia-driver-cuda").rc != 0
    else:
        pytest.skip("has no such repository")
