# SPDX-License-Identifier: GPL-3.0-or-later
"""After all the refusals every host is as it was."""

from __future__ import annotations

import json

import pytest


def name_of(host):
    return host.check_output("hostname")


def test_no_engine_was_installed(host):
    if name_of(host) == "refusals-engine":
        pytest.skip("has one from the beginning")
    assert not host.exists("dockerd")


def test_the_broken_file_is_untouched(host):
    if name_of(host) != "refusals-broken":
        pytest.skip("about another host")
    assert host.file("/etc/docker/daemon.json").content_string == (
        '{\n  "live-restore": true,\n  "log-driver" "json-file"\n}\n'
    )
    assert host.check_output("ls -A /etc/docker") == "daemon.json"


def test_the_engine_runs_with_its_former_settings(host):
    if name_of(host) != "refusals-engine":
        pytest.skip("about another host")
    assert host.service("docker").is_running
    options = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert "bridge" not in options
    info = json.loads(host.check_output("docker info --format '{{json .}}'"))
    assert info["LiveRestoreEnabled"] is True
    assert info["Images"] == 1
    assert info["DockerRootDir"] == "/var/lib/docker"
    assert host.check_output("ls /etc/docker") == "daemon.json"
