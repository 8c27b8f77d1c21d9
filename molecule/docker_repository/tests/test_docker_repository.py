# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine is Docker's own package, from the repository that the role set up, behind the proxy asked for."""

from __future__ import annotations

import json

import pytest


@pytest.fixture(scope="module")
def standin(host):
    return host.file("/srv/mirror/docker.json").exists


def test_the_packages_are_dockers(host):
    assert host.package("docker-ce").is_installed
    assert host.package("containerd.io").is_installed
    assert not host.package("docker.io").is_installed
    assert not host.package("runc").is_installed


def test_the_engine_runs_with_the_defaults(host):
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled
    info = json.loads(host.check_output("docker info --format '{{json .}}'"))
    assert info["LiveRestoreEnabled"] is True
    assert info["LoggingDriver"] == "json-file"
    options = json.loads(host.file("/etc/docker/daemon.json").content_string)
    assert options["log-opts"] == {"max-size": "100m", "max-file": "3"}


def test_the_key_is_the_pinned_one_and_no_other_is_trusted(host, standin):
    if host.package("rpm").is_installed or not host.exists("apt-get"):
        keys = host.check_output("rpm -q gpg-pubkey --qf '%{summary}\\n'")
        assert "docker" in keys.lower()
        repository = host.file("/etc/yum.repos.d/baremetal-docker.repo").content_string
        assert "gpgcheck = 1" in repository
    else:
        source = host.file("/etc/apt/sources.list.d/baremetal-docker.sources").content_string
        assert "Signed-By: /etc/apt/keyrings/baremetal-docker.asc" in source
        assert "trusted" not in source.lower()


def test_the_proxy_reaches_the_engine_and_only_root_reads_the_file(host, standin):
    if not standin:
        pytest.skip("a proxy that is not there would cut a real host off its repository")
    settings = host.file("/etc/docker/engine.env")
    assert settings.mode == 0o600
    pid = host.check_output("cat /run/docker.pid")
    environment = host.check_output(f"tr '\\0' '\\n' < /proc/{pid}/environ").splitlines()
    assert "HTTPS_PROXY=http://user:secret@proxy.example.com:3128" in environment
    assert "NO_PROXY=localhost,127.0.0.1" in environment
    assert "secret" not in host.check_output("systemctl show docker")
