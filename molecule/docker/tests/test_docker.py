# SPDX-License-Identifier: GPL-3.0-or-later
"""The engine runs, with what the variables and the host's owner asked for."""

from __future__ import annotations

import json

import pytest

IMAGE = "local/sh"


@pytest.fixture(scope="module")
def info(host):
    return json.loads(host.check_output("docker info --format '{{json .}}'"))


@pytest.fixture(scope="module")
def daemon_json(host):
    return json.loads(host.file("/etc/docker/daemon.json").content_string)


@pytest.fixture(scope="module")
def container(host):
    """A container of an image made on the host, as no registry is reached: its name."""
    host.run_expect([0], "apt-get install -y busybox-static")
    host.check_output("mkdir -p /root/sh/bin && cp $(command -v busybox) /root/sh/bin/sh")
    host.check_output(f"tar -C /root/sh -c . | docker import - {IMAGE}")
    host.check_output(f"docker run --detach --name probe --network none {IMAGE} /bin/sh -c 'echo up; exec sleep 600'")
    yield "probe"
    host.run("docker rm --force probe")


def test_the_unit_runs_and_comes_back_after_a_boot(host):
    assert host.service("docker").is_running
    assert host.service("docker").is_enabled


def test_what_the_owner_had_set_is_kept(daemon_json, info):
    assert daemon_json["labels"] == ["rack=7"]
    assert daemon_json["max-concurrent-downloads"] == 2
    assert info["Labels"] == ["rack=7"]


def test_the_files_mode_is_kept(host):
    assert host.file("/etc/docker/daemon.json").mode == 0o640


def test_variables_win_over_the_file(daemon_json, info):
    assert daemon_json["registry-mirrors"] == ["https://mirror.example.com", "http://127.0.0.1:5000"]
    assert info["RegistryConfig"]["Mirrors"] == ["https://mirror.example.com/", "http://127.0.0.1:5000/"]


def test_log_options_are_merged_as_text(daemon_json):
    assert daemon_json["log-opts"] == {"compress": "true", "max-size": "20m", "max-file": "4"}


def test_live_restore_and_data_root_are_in_force(info):
    assert info["LiveRestoreEnabled"] is True
    assert info["DockerRootDir"] == "/var/lib/docker/data"


def test_further_options_are_written(daemon_json):
    assert daemon_json["max-concurrent-uploads"] == 3
    assert daemon_json["default-ulimits"] == {
        "nofile": {"Name": "nofile", "Hard": 16384, "Soft": 16384},
        "memlock": {"Name": "memlock", "Hard": 65536, "Soft": 65536},
    }


def test_no_copies_are_left_behind(host):
    assert [name for name in host.check_output("ls -A /etc/docker").split() if "daemon.json" in name] == ["daemon.json"]


def test_a_container_gets_the_limits_and_the_log_settings(host, container):
    assert host.check_output(f"docker exec {container} /bin/sh -c 'ulimit -n'") == "16384"
    log = json.loads(host.check_output(f"docker inspect --format '{{{{json .HostConfig.LogConfig}}}}' {container}"))
    assert log == {"Type": "json-file", "Config": {"compress": "true", "max-size": "20m", "max-file": "4"}}


def test_the_engine_was_restarted_once(host):
    starts = host.check_output("journalctl -u docker -o cat | grep -c 'Daemon has completed initialization'")
    assert int(starts) == 2  # by the package's installation, and for the settings


def test_a_container_outlives_a_restart_of_the_engine(host, container):
    pid = host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' {container}")
    host.check_output("systemctl restart docker")
    assert host.check_output(f"docker inspect --format '{{{{.State.Pid}}}}' {container}") == pid
    assert host.file(f"/proc/{pid}").exists
