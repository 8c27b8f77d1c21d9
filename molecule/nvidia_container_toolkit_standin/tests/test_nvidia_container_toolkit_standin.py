# SPDX-License-Identifier: GPL-3.0-or-later
"""The toolkit is there in one version and held; the engine has the runtime beside its own settings; CDI fits the driver."""

from __future__ import annotations

import json

PACKAGES = ("nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container-tools", "libnvidia-container1")


def test_the_four_packages_are_of_one_version_and_held(host):
    assert {host.package(name).version for name in PACKAGES} == {"1.20.0-1"}
    assert set(PACKAGES) <= set(host.check_output("apt-mark showhold").split())


def test_the_runtime_is_merged_into_what_was_there(host):
    options = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert options["runtimes"]["nvidia"]["path"] == "nvidia-container-runtime"
    assert options["max-concurrent-uploads"] == 3
    assert options["features"]["cdi"] is True
    assert "nvidia" in json.loads(host.check_output("docker info --format '{{json .Runtimes}}'"))


def test_the_specification_is_of_the_driver_and_the_only_one(host):
    assert "libcuda.so.580.159.04" in host.file("/var/run/cdi/nvidia.yaml").content_string
    assert not host.file("/etc/cdi/nvidia.yaml").exists
    assert host.file("/etc/cdi/nvidia.yaml.former").exists


def test_a_container_was_seen_to_see_the_gpus(host):
    note = host.file("/var/lib/baremetal/nvidia_container_toolkit.accepted").content_string
    assert "driver 580.159.04, toolkit 1.20.0-1" in note
    assert "2 GPUs" in note
    assert host.check_output("docker ps -aq") == ""


def test_a_container_without_the_devices_sees_none(host):
    """What the acceptance looks at comes by CDI and by nothing else."""
    host.check_output("mkdir -p /srv/image/bin && cp /bin/true /srv/image/bin/ && tar -C /srv/image -c . | docker import - local/none")
    assert host.run("docker run --rm --network none local/none nvidia-smi -L").rc == 127
