# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.host_services import host_services
from ansible_collections.baremetal.vllm.plugins.filter.vllm_plan import vllm_plan
from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama

SETTINGS = {
    "root": "/opt/vllm",
    "config_dir": "/etc/vllm",
    "state_dir": "/var/lib/vllm",
    "log_dir": "/var/log/vllm",
    "bind": "127.0.0.1",
    "start_timeout": 900,
    "drain_timeout": 60,
    "user": "vllm",
    "architecture": "x86_64",
    "gpu": {"gpus": [], "cpu": {"memory_available_mib": 30000, "memory_own_mib": 0}},
    "container": {
        "mirror": "",
        "images": {},
        "gpus": "request",
        "shm_size": "10g",
        "nofile": 1048576,
        "log_options": {"max-size": "50m"},
        "options": [],
    },
    "open_paths": ["/health", "/metrics"],
    "python": "",
    "manager": "systemd",
    "supervisor_dir": "/opt/vllm/supervisor",
    "supervisorctl": ["/opt/vllm/tools/bin/supervisorctl", "--configuration=/x"],
}
CPU = {"cores": 8, "memory_total_mib": 32000, "memory_available_mib": 30000}
HOSTS = [{"name": name, "device": "cpu", "gpus": [], "links": [], "cpu": CPU} for name in ("one", "two")]


def service(**fields: Any) -> dict[str, Any]:
    """A service as plan_inputs gives it to the planner."""
    read = {"config": random_llama.CONFIG, "model_path": "/srv/models/random-llama", "weights_gib": 0.003}
    return {
        "name": "chat",
        "model": "random-llama",
        "served_model_name": "random-llama",
        "runtime": "venv",
        **read,
        **fields,
    }


def here(host: str = "one", *services: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """What runs on a host, by a real plan."""
    asked = list(services) or [service(hosts=["one"])]
    return host_services(vllm_plan(asked, HOSTS), host, asked, {**SETTINGS, **settings})


def test_under_systemd() -> None:
    (svc,) = here()
    assert (svc["name"], svc["unit"], svc["device"]) == ("chat", "vllm-chat", "cpu")
    assert svc["venv"] == {"path": f"/opt/vllm/venvs/cpu-{svc['version']}", "device": "cpu", "version": svc["version"]}
    assert svc["python"] == f"{svc['venv']['path']}/bin/python"
    assert svc["unit_file"] == "/etc/systemd/system/vllm-chat.service"
    assert svc["base_url"] == "http://127.0.0.1:8000/v1"
    assert svc["pid_command"] == ["systemctl", "show", "--property=MainPID", "--value", "vllm-chat"]
    assert svc["log_command"][:2] == ["journalctl", "--unit=vllm-chat"]
    assert svc["watched"] == [
        "/etc/systemd/system/vllm-chat.service",
        "/etc/vllm/chat/endpoint.json",
        "/etc/vllm/chat/api_key",
        "/etc/vllm/chat/plan.json",
        "/etc/vllm/chat/env",
        "/etc/vllm/chat/start.sh",
    ]


def test_under_supervisor() -> None:
    (svc,) = here(manager="supervisor")
    assert svc["unit_file"] == "/opt/vllm/supervisor/conf.d/vllm-chat.conf"
    assert svc["pid_command"] == [*SETTINGS["supervisorctl"], "pid", "vllm-chat"]
    assert svc["log_command"] == ["tail", "--lines=4000", "/var/log/vllm/chat.log"]


def test_the_command() -> None:
    (svc,) = here()
    command = svc["command"]
    assert command[:5] == [
        svc["python"],
        "-m",
        "baremetal_serve",
        "--model",
        "/srv/models/random-llama",
    ]
    assert command[-4:] == ["--host", "127.0.0.1", "--middleware", "baremetal_guard.PathGuard"]
    assert command[command.index("--port") + 1] == "8000"
    assert not [word for word in command if "api" in word and "key" in word], "secrets stay out of process lists"


def test_an_engine_that_takes_its_model_as_an_option() -> None:
    plan = vllm_plan([service()], HOSTS)
    plan["services"][0]["instances"][0]["args"] = ["--model", "/m", "--port", "8000"]
    host = plan["services"][0]["instances"][0]["hosts"][0]
    assert host_services(plan, host, [service()], SETTINGS)[0]["command"][3:5] == ["--model", "/m"]


def test_the_environment() -> None:
    plan = vllm_plan([service()], HOSTS)
    instance = plan["services"][0]["instances"][0]
    instance["env"] = {"VLLM_CPU_KVCACHE_SPACE": 4, "VLLM_NO_USAGE_STATS": "0"}
    (svc,) = host_services(plan, instance["hosts"][0], [service()], SETTINGS)
    assert svc["env"] == {
        "BAREMETAL_OPEN_PATHS": "/health /metrics",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": "/opt/vllm/lib",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": "/var/lib/vllm/chat/cache/vllm",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "0",  # what the plan says wins
        "XDG_CACHE_HOME": "/var/lib/vllm/chat/cache",
    }


@pytest.mark.parametrize(
    ("bind", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
        ("gpu1.example", "http://gpu1.example:8000"),
    ],
)
def test_where_it_is_reached(bind: str, url: str) -> None:
    for svc in (*here(bind=bind), *here("one", service(hosts=["one"], bind=bind), bind="10.9.9.9")):
        assert (svc["root_url"], svc["base_url"], svc["bind"]) == (url, f"{url}/v1", bind)
        assert svc["command"][svc["command"].index("--host") + 1] == bind


def test_an_environment_that_is_already_there() -> None:
    (svc,) = here(python="/home/me/vllm/bin/python")
    assert (svc["venv"], svc["python"]) == (None, "/home/me/vllm/bin/python")
    assert svc["command"][0] == "/home/me/vllm/bin/python"


def test_what_a_service_says_of_itself() -> None:
    (svc,) = here("one", service(hosts=["one"], start_timeout=60, endpoint_file="/home/me/endpoint.json", port=8123))
    assert (svc["start_timeout"], svc["port"]) == (60, 8123)
    assert svc["endpoint_files"] == ["/etc/vllm/chat/endpoint.json", "/home/me/endpoint.json"]
    assert "/home/me/endpoint.json" in svc["watched"]


def test_each_host_has_its_own() -> None:
    services = [service(name="a", hosts=["one"]), service(name="b", hosts=["two"]), service(name="c", hosts=["two"])]
    assert [svc["name"] for svc in here("one", *services)] == ["a"]
    assert sorted(svc["name"] for svc in here("two", *services)) == ["b", "c"]
    assert here("three", *services) == []


def test_nothing_planned() -> None:
    assert host_services({"services": [], "problems": ["x"]}, "one", [], SETTINGS) == []


def test_in_a_template(render: Callable[..., Any]) -> None:
    asked = [service(hosts=["one"], api_key="sk-secret")]
    variables = {"plan": vllm_plan(asked, HOSTS), "services": asked, "settings": SETTINGS}
    shown = render("{{ plan | baremetal.vllm.host_services('one', services, settings) }}", **variables)
    assert shown[0]["unit"] == "vllm-chat"
    assert "sk-secret" not in str(shown), "it is kept as a fact"


def test_a_server_sees_its_own_gpus_and_no_others() -> None:
    gpu = {
        "name": "NVIDIA A10",
        "memory_total_mib": 23028,
        "memory_used_mib": 0,
        "compute_capability": "8.6",
        "mig": False,
    }
    hosts = [{"name": "one", "gpus": [{**gpu, "index": index, "uuid": f"GPU-{index}"} for index in range(4)]}]
    asked = [service(name="a", gpus=[2]), service(name="b", gpus=[0, 1], port=8001)]
    found = {svc["name"]: svc for svc in host_services(vllm_plan(asked, hosts), "one", asked, SETTINGS)}
    assert found["a"]["env"]["CUDA_VISIBLE_DEVICES"] == "2"
    assert found["b"]["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["a"]["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in here()[0]["env"]


def test_slices_are_named_by_their_uuid() -> None:
    plan = vllm_plan([service(hosts=["one"])], HOSTS)
    (instance,) = plan["services"][0]["instances"]
    instance.update(gpus={"one": [0]}, gpu_uuids={"one": ["MIG-7", "MIG-8"]})
    (svc,) = host_services(plan, "one", [service()], SETTINGS)
    assert svc["env"]["CUDA_VISIBLE_DEVICES"] == "MIG-7,MIG-8"


def test_what_is_told() -> None:
    (svc,) = here(
        "one", service(hosts=["one"], extra_args=["--enable-auto-tool-choice", "--tool-call-parser", "hermes"])
    )
    told = svc["told"]
    assert told["base_url"] == svc["base_url"]
    assert told["api_key_file"] == svc["api_key_file"]
    assert told["python"] == [svc["python"]]
    assert (told["service"], told["model"], told["task"]) == ("chat", "random-llama", "generate")
    assert (told["tool_calls"], told["vision"], told["gpus"]) == (True, False, [])
    assert here()[0]["told"]["tool_calls"] is False
