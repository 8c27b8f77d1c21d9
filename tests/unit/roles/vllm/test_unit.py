# SPDX-License-Identifier: GPL-3.0-or-later
"""Units and start scripts of a service, as systemd and the shell get them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

ROLES = Path(__file__).parents[4] / "roles"
SERVICE: dict[str, Any] = {
    "name": "chat", "served_model_name": "m", "runtime": "venv", "config_dir": "/etc/vllm/chat", "inside": "",
    "state_dir": "/var/lib/vllm/chat", "unit": "vllm-chat", "stop_timeout": 60, "span": None, "turn": [],
}  # fmt: skip


def rendered(template: str, **values: Any) -> str:
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["quote"] = shlex.quote
    text = (ROLES / template).read_text()
    return environment.from_string(text).render(**values)


def unit(**fields: Any) -> list[str]:
    settings = {"vllm_restart_limit": 5, "vllm_user": "vllm", "vllm_drain_timeout": 30}
    return rendered("vllm/templates/vllm.service.j2", svc={**SERVICE, **fields}, **settings).splitlines()


def test_a_server_on_ray_is_started_after_its_node_and_stopped_before() -> None:
    assert "After=network-online.target ray-chat.service" in unit(span={"executor": "ray"})
    contained = unit(span={"executor": "ray"}, runtime="container", inside="ray-chat")
    assert "After=network-online.target docker.service ray-chat.service" in contained


@pytest.mark.parametrize("networks, limit", [([], False), (["10.0.0.0/24"], True)])
def test_containers_of_a_node_are_kept_to_its_networks_or_to_none(networks: list[str], limit: bool) -> None:
    lines = rendered(
        "ray_cluster/templates/ray.slice.j2", ray_cluster_name="chat", __ray_cluster_networks=networks
    ).splitlines()
    assert ("IPAddressDeny=any" in lines) == ("IPAddressAllow=localhost 10.0.0.0/24" in lines) == limit


@pytest.mark.parametrize("span", [None, {"executor": "mp"}])
def test_other_servers_name_no_node(span: Any) -> None:
    assert "After=network-online.target" in unit(span=span)


@pytest.mark.parametrize("state", ["disk", "link"])
def test_a_start_ends_the_engines_that_the_last_one_left(tmp_path: Path, state: str) -> None:
    """Also where the state folder is a link: the kernel tells the real path of what works there."""
    (tmp_path / "disk/chat").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk")
    (tmp_path / "env").touch()
    folder = tmp_path / state / "chat"
    fields = {"state_dir": str(folder), "config_dir": str(tmp_path), "headless": True, "command": ["pwd", "-P"]}
    script = rendered("vllm/templates/start.sh.j2", svc={**SERVICE, **fields})
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, cwd=folder, start_new_session=True) as engine:
        (folder / "group").write_text(f"{engine.pid}\n")
        try:
            # It starts where systemd or supervisor leave it.
            started = subprocess.run(
                ["sh", "-c", script], cwd=folder, env={"PWD": str(folder)}, capture_output=True, text=True
            )
            assert started.stdout.splitlines() == ["baremetal: start of vllm-chat", f"{tmp_path}/disk/chat"], (
                started.stderr
            )
            assert engine.wait(5) == -9
        finally:
            engine.kill()


def test_a_start_waits_for_its_turn_with_no_secret_in_its_environment(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("TOKEN=secret\n")
    fields = {"state_dir": str(tmp_path), "config_dir": str(tmp_path), "headless": True, "command": ["env"]}
    turn = ["sh", "-c", 'echo "turn of $1: ${TOKEN-nothing}"; exit 1', "sh", "GPU 0"]
    script = rendered("vllm/templates/start.sh.j2", svc={**SERVICE, **fields, "turn": turn})
    started = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    lines = started.stdout.splitlines()
    assert lines[1] == "turn of GPU 0: nothing" and "TOKEN=secret" in lines, started.stderr


def test_servers_start_after_what_brings_the_gpus() -> None:
    for lines in (unit(), unit(runtime="container")):
        assert any(line.startswith("After=baremetal-nvidia-check.service") for line in lines)


def test_what_a_boot_may_change_is_found_at_each_start() -> None:
    words = [sys.executable, str(ROLES / "vllm/files/baremetal_interface.py"), "127.0.0.1", "eth7"]
    svc = {**SERVICE, "env": {"GLOO_SOCKET_IFNAME": "eth7"}, "span": {"found_at_start": {"GLOO_SOCKET_IFNAME": words}}}
    script = f"set -a\n{rendered('vllm/templates/env.j2', svc=svc)}\nenv"
    started = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert "GLOO_SOCKET_IFNAME=lo" in started.stdout.splitlines()
    svc["span"] = None
    assert rendered("vllm/templates/env.j2", svc=svc).splitlines()[1:] == ["GLOO_SOCKET_IFNAME=eth7"]


@pytest.mark.parametrize("asked, name", [("eth7", "lo"), ("ib0", "ib0")])
def test_a_ray_node_finds_its_interface_too(asked: str, name: str) -> None:
    words = [sys.executable, str(ROLES / "vllm/files/baremetal_interface.py"), "127.0.0.1", "eth7"]
    env = {"NCCL_SOCKET_IFNAME": asked}
    text = rendered("ray_cluster/templates/env.j2", __ray_cluster_env=env, __ray_cluster_interface_words=words)
    started = subprocess.run(["sh", "-c", f"set -a\n{text}\nenv"], capture_output=True, text=True, check=True)
    assert f"NCCL_SOCKET_IFNAME={name}" in started.stdout.splitlines()
    assert "GLOO_SOCKET_IFNAME" not in started.stdout
