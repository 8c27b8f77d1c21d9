# SPDX-License-Identifier: GPL-3.0-or-later
"""The toolkit is there in one version and held; the engine has the runtime beside its own settings; CDI fits the driver."""

from __future__ import annotations

import json

import pytest

PACKAGES = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)


@pytest.fixture(scope="module")
def name(host):
    return host.check_output("hostname")


def test_the_four_packages_are_of_one_version(host, name):
    assert {host.package(package).version for package in PACKAGES} == {
        "1.20.0" if name == "toolkit-rocky9" else "1.20.0-1"
    }


def test_the_four_packages_are_held(host, name):
    if name == "toolkit-rocky9":
        locks = [line for line in host.check_output("dnf -q versionlock list").splitlines() if line]
        assert sorted(line.rpartition("-0:1.20.0-1")[0] for line in locks) == sorted(PACKAGES)
    else:
        assert set(PACKAGES) <= set(host.check_output("apt-mark showhold").split())


def test_the_package_source_is_ours_and_signed(host, name):
    if name == "toolkit-rocky9":
        text = host.file("/etc/yum.repos.d/baremetal-nvidia-container-toolkit.repo").content_string
        assert "baseurl = file:///srv/mirror/libnvidia-container/stable/rpm/$basearch" in text
        assert "gpgcheck = 1" in text
    else:
        text = host.file("/etc/apt/sources.list.d/baremetal-nvidia-container-toolkit.sources").content_string
        assert "URIs: file:///srv/mirror/libnvidia-container/stable/deb/amd64/" in text
        assert "Signed-By: /etc/apt/keyrings/baremetal-nvidia-container-toolkit.asc" in text
    assert "trusted" not in text.lower()


def test_the_runtime_is_merged_into_what_was_there(host, name):
    options = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert options["runtimes"]["nvidia"]["path"] == "nvidia-container-runtime"
    assert options["max-concurrent-uploads"] == 3
    # Ubuntu's stand-in has an engine that would not start with it.
    assert options.get("features", {}).get("cdi", False) is (name != "toolkit-ubuntu2204")
    assert "nvidia" in json.loads(host.check_output("docker info --format '{{json .Runtimes}}'"))


def test_the_specification_is_of_the_driver_and_the_only_one(host):
    text = host.file("/var/run/cdi/nvidia.yaml").content_string
    assert "libcuda.so.580.159.04" in text
    assert "590.48.01" not in text
    assert "nvidia-caps" not in text  # the slices that there were meanwhile
    assert not host.file("/etc/cdi/nvidia.yaml").exists
    assert host.file("/etc/cdi/nvidia.yaml.former").exists


def test_a_container_was_seen_to_see_the_gpus(host):
    note = host.file("/var/lib/baremetal/nvidia_container_toolkit.accepted").content_string
    assert "driver 580.159.04, toolkit 1.20.0-1" in note
    assert "2 GPUs" in note
    assert host.check_output("docker ps -aq") == ""


def test_a_container_without_the_devices_sees_none(host):
    """What the acceptance looks at comes by CDI and by nothing else."""
    host.check_output(
        "mkdir -p /srv/image/bin && cp /bin/true /srv/image/bin/ && tar -C /srv/image -c . | docker import - local/none"
    )
    assert host.run("docker run --rm --network none local/none nvidia-smi -L").rc == 127
