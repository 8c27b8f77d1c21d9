# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from support import SERVICE_SETTINGS

from ansible_collections.baremetal.vllm.plugins.filter.host_services import host_services, image_reference
from ansible_collections.baremetal.vllm.plugins.filter.vllm_plan import vllm_plan
from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama
from ansible_collections.baremetal.vllm.plugins.plugin_utils import multi_host

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
    return host_services(vllm_plan(asked, HOSTS), host, asked, {**SERVICE_SETTINGS, **settings})


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
        "/etc/vllm/chat/restart",
        "/etc/systemd/system/vllm-chat-standby.service",
    ]


def test_under_supervisor() -> None:
    (svc,) = here(manager="supervisor")
    assert svc["unit_file"] == "/opt/vllm/supervisor/conf.d/vllm-chat.conf"
    assert svc["pid_command"] == [*SERVICE_SETTINGS["supervisorctl"], "pid", "vllm-chat"]
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


def test_numbers_that_came_as_text() -> None:
    assert here(drain_timeout="120", start_timeout=900) == here(drain_timeout=120, start_timeout=900)


def test_an_engine_that_takes_its_model_as_an_option() -> None:
    plan = vllm_plan([service()], HOSTS)
    plan["services"][0]["instances"][0]["args"] = ["--model", "/m", "--port", "8000"]
    host = plan["services"][0]["instances"][0]["hosts"][0]
    assert host_services(plan, host, [service()], SERVICE_SETTINGS)[0]["command"][3:5] == ["--model", "/m"]


def test_the_environment() -> None:
    plan = vllm_plan([service()], HOSTS)
    instance = plan["services"][0]["instances"][0]
    instance["env"] = {"VLLM_CPU_KVCACHE_SPACE": 4, "VLLM_NO_USAGE_STATS": "0"}
    (svc,) = host_services(plan, instance["hosts"][0], [service()], SERVICE_SETTINGS)
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
    assert host_services({"services": [], "problems": ["x"]}, "one", [], SERVICE_SETTINGS) == []


def test_in_a_template(render: Callable[..., Any]) -> None:
    asked = [service(hosts=["one"], api_key="sk-secret")]
    variables = {"plan": vllm_plan(asked, HOSTS), "services": asked, "settings": SERVICE_SETTINGS}
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
    found = {svc["name"]: svc for svc in host_services(vllm_plan(asked, hosts), "one", asked, SERVICE_SETTINGS)}
    assert found["a"]["env"]["CUDA_VISIBLE_DEVICES"] == "2"
    assert found["b"]["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["a"]["env"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "CUDA_VISIBLE_DEVICES" not in here()[0]["env"]


def test_slices_are_named_by_their_uuid() -> None:
    asked = [service(hosts=["one"]), service(name="other", hosts=["one"], port=8001)]
    plan = vllm_plan(asked, HOSTS)
    for planned in plan["services"]:
        planned["instances"][0].update(gpus={"one": [0]}, gpu_uuids={"one": ["MIG-7", "MIG-8"]})
    (svc, _) = host_services(plan, "one", asked, SERVICE_SETTINGS)
    assert svc["env"]["CUDA_VISIBLE_DEVICES"] == "MIG-7,MIG-8"
    assert svc["turn"][4:] == ["MIG-7", "MIG-8"]


@pytest.mark.parametrize(("runtime", "python"), [("venv", "/opt/vllm/venvs/cuda-"), ("container", "/usr/bin/python3")])
def test_servers_that_share_gpus_start_one_after_the_other(runtime: str, python: str) -> None:
    half = {"gpu_memory_utilization": 0.3, "runtime": runtime}
    asked = [
        service(name="a", gpus=[0, 1], tensor_parallel_size=2, start_timeout=1200, **half),
        service(name="b", gpus=[1], port=8001, **half),
        service(name="alone", gpus=[2], port=8002, runtime=runtime),
    ]
    found = {svc["name"]: svc for svc in host_services(vllm_plan(asked, [GPU_HOST]), "one", asked, SERVICE_SETTINGS)}
    words = ["/opt/vllm/lib/baremetal_turn.py", "http://127.0.0.1:8000/health", "1200", "1"]
    assert found["a"]["turn"][0].startswith(python) and found["a"]["turn"][1:] == words
    assert found["a"]["standby"]["turn"] == found["a"]["turn"], "it loads beside the other one as well"
    assert found["b"]["turn"][2:] == ["http://127.0.0.1:8001/health", "900", "1"]
    assert found["alone"]["turn"] == []
    settings = {**SERVICE_SETTINGS, "start_timeout": 0}  # the role's default: as long as the weights take
    (unsaid,) = [
        svc for svc in host_services(vllm_plan(asked, [GPU_HOST]), "one", asked, settings) if svc["name"] == "b"
    ]
    assert unsaid["turn"][3] == "1800", "at 0 nobody would wait"


def test_servers_over_several_hosts_wait_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them could wait for each other, each on another host."""
    asked = [service(hosts=["one"]), service(name="b", hosts=["one"], port=8001)]
    plan = vllm_plan(asked, HOSTS)
    for planned, hosts in zip(plan["services"], (["one"], ["one", "two"]), strict=True):
        planned["instances"][0].update(hosts=hosts, gpus={host: [0] for host in hosts})
    monkeypatch.setattr(multi_host, "spans", lambda *_: [{"service": "b", "hosts": ["one", "two"]}])
    monkeypatch.setattr(multi_host, "spread", lambda one, *_: one)
    assert [svc["turn"] for svc in host_services(plan, "one", asked, SERVICE_SETTINGS)] == [[], []]


def test_a_services_own_modules_are_found_beside_the_roles() -> None:
    (svc,) = here("one", service(hosts=["one"], env={"PYTHONPATH": "/srv/plugins:/opt/vllm/lib"}))
    assert svc["env"]["PYTHONPATH"] == "/opt/vllm/lib:/srv/plugins"


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


GPU = {"name": "NVIDIA A10", "memory_total_mib": 23028, "memory_used_mib": 0, "compute_capability": "8.6", "mig": False}
GPU_HOST = {"name": "one", "gpus": [{**GPU, "index": index, "uuid": f"GPU-{index}"} for index in range(4)]}


def in_container(*, gpus: str = "request", facts: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    asked = [service(**{"runtime": "container", "gpus": [1, 2], "tensor_parallel_size": 1, **fields})]
    options = {**SERVICE_SETTINGS["container"], "gpus": gpus}
    settings = {**SERVICE_SETTINGS, "container": options, "gpu": facts or {"gpus": GPU_HOST["gpus"], "cpu": {}}}
    (svc,) = host_services(vllm_plan(asked, [GPU_HOST]), "one", asked, settings)
    return svc


class TestContainer:
    def test_nothing_more_than_it_needs(self) -> None:
        svc = in_container()
        assert svc["venv"] is None
        options = svc["run_options"]
        for option in (
            "--read-only",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--rm",
            "--network=host",
            "--ulimit=core=0",
        ):
            assert option in options
        assert not [word for word in options if word.startswith(("--privileged", "--cap-add", "--env", "-e"))]
        assert "--stop-timeout=90" in options
        mounts = [word.removeprefix("--mount=type=bind,src=") for word in options if word.startswith("--mount")]
        assert mounts == [
            "/etc/vllm/chat,dst=/etc/vllm/chat,readonly",
            "/opt/vllm/lib,dst=/opt/vllm/lib,readonly",
            "/srv/models/random-llama,dst=/srv/models/random-llama,readonly",
            "/var/lib/vllm/chat,dst=/var/lib/vllm/chat",
        ]

    def test_gpus_by_request_and_by_cdi(self) -> None:
        options = in_container()["run_options"]
        assert options[options.index("--gpus") + 1] == '"device=GPU-1,GPU-2"'
        options = in_container(gpus="cdi")["run_options"]
        assert "--gpus" not in options
        assert [word for word in options if "nvidia.com" in word] == [
            "--device=nvidia.com/gpu=GPU-1",
            "--device=nvidia.com/gpu=GPU-2",
        ]
        options = in_container(gpus="runtime")["run_options"]
        assert "--gpus" not in options
        assert options[options.index("--runtime=nvidia") + 1] == "--env=NVIDIA_VISIBLE_DEVICES=GPU-1,GPU-2"
        assert "CUDA_VISIBLE_DEVICES" not in in_container()["env"]

    def test_files_that_arguments_name_are_there(self) -> None:
        extra = ["--enable-lora", "--lora-modules", "sql=/srv/loras/sql", "--chat-template=/srv/t.jinja"]
        extra += ["--disable-access-log-for-endpoints", "/health,/metrics", "--root-path", "/llm"]
        mounts = [word for word in in_container(extra_args=extra)["run_options"] if word.startswith("--mount")]
        assert [word.split("src=")[1].split(",")[0] for word in mounts if "/srv/" in word] == [
            "/srv/loras/sql",
            "/srv/models/random-llama",
            "/srv/t.jinja",
        ]
        assert not [word for word in mounts if "metrics" in word or "llm," in word]

    @pytest.mark.parametrize(
        ("extra", "paths"),
        [
            (["--chat-template", "{{ messages[0].content }} /no_think"], []),
            (["--chat-template", "{% for m in messages %}\n/think {{ m }}{% endfor %}"], []),
            (["--tool-parser-plugin", "/srv/a.py,/srv/b.py"], ["/srv/a.py", "/srv/b.py"]),
            (["--lora-modules", "a=/srv/a", "b=/srv/b"], ["/srv/a", "/srv/b"]),
            (["--lora-modules", '{"name": "a", "path": "/srv/a"}'], ["/srv/a"]),
            (['--speculative-config={"model": "/srv/draft", "x": [{"y": "/srv/z"}]}'], ["/srv/draft", "/srv/z"]),
            (["--chat-template", "/srv/my templates/t.jinja"], ["/srv/my templates/t.jinja"]),
            (["--served-model-name", "m", "/mine"], []),
        ],
    )
    def test_what_is_a_file_and_what_is_not(self, extra: list[str], paths: list[str]) -> None:
        mounts = [word for word in in_container(extra_args=extra)["run_options"] if word.startswith("--mount")]
        sources = [word.split("src=")[1].split(",dst=")[0] for word in mounts]
        own = ["/etc/vllm/chat", "/opt/vllm/lib", "/srv/models/random-llama", "/var/lib/vllm/chat"]
        assert sorted(set(sources) - set(own)) == paths

    def test_a_snapshot_of_the_hubs_cache_has_its_links_there(self) -> None:
        """Its files are links to ../../blobs."""
        cache = "/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B"
        draft = "/srv/hub/models--a--b"
        svc = in_container(
            model_path=f"{cache}/snapshots/0123abcd/", extra_args=["--speculative-model", f"{draft}/snapshots/main"]
        )
        sources = [word.split("src=")[1].split(",")[0] for word in svc["run_options"] if word.startswith("--mount")]
        assert cache in sources and draft in sources
        assert not [source for source in sources if "snapshots" in source]

    def test_memory_of_gpus_may_be_locked(self) -> None:
        """NCCL registers buffers with network cards, which Docker's limit of some MiB does not allow."""
        assert "--ulimit=memlock=-1" in in_container()["run_options"]
        (svc,) = here("one", service(hosts=["one"], runtime="container"))
        assert not [word for word in svc["run_options"] if "memlock" in word]

    def test_another_archive_is_another_container(self) -> None:
        """The tag is the same, so that the archive's checksum is what tells them apart."""
        image = in_container()["image"]["reference"]
        asked = [service(runtime="container", gpus=[1, 2], tensor_parallel_size=1)]
        labels = []
        for digit in "ab":
            images = {image: {"archive": "/a.tar", "checksum": "sha256:" + digit * 64}}
            settings = {**SERVICE_SETTINGS, "container": {**SERVICE_SETTINGS["container"], "images": images}}
            settings["gpu"] = {"gpus": GPU_HOST["gpus"], "cpu": {}}
            (svc,) = host_services(vllm_plan(asked, [GPU_HOST]), "one", asked, settings)
            labels.append([word for word in svc["run_options"] if word.startswith("--label=baremetal.vllm.archive=")])
        assert len(labels[0]) == len(labels[1]) == 1 and labels[0] != labels[1]
        assert not [word for word in in_container()["run_options"] if "vllm.archive" in word]

    def test_the_one_that_stands_by(self) -> None:
        svc = in_container()
        other = svc["standby"]
        assert (other["unit"], other["port"]) == ("vllm-chat-standby", svc["port"])
        assert other["api_key_file"] == svc["api_key_file"]
        assert (other["config_dir"], other["state_dir"]) == ("/etc/vllm/chat/standby", "/var/lib/vllm/chat/standby")
        assert other["command"] == svc["command"]

    def test_room_for_a_second_server(self) -> None:
        busy = [{**gpu, "memory_used_mib": 0} for gpu in GPU_HOST["gpus"]]
        own = [{"pid": 1, "own": True, "memory_used_mib": 40000, "gpus": ["GPU-1", "GPU-2"]}]
        small = {"gpu_memory_utilization": 0.3, "max_model_len": 256}
        assert in_container(**small, facts={"gpus": busy, "cpu": {}})["room"] is True
        assert in_container(**small, facts={"gpus": busy, "cpu": {}, "processes": own})["room"] is False


class TestImages:
    def reference(self, image: str, architecture: str = "x86_64", **options: Any) -> str:
        container = {"mirror": "", "images": {}, **options}
        found: str = image_reference(image, {"architecture": architecture, "container": container})["reference"]
        return found

    def test_names(self) -> None:
        image, digest = "vllm/vllm-openai:v0.25.1", "sha256:" + "a" * 64
        assert self.reference(image) == image
        assert self.reference(image, mirror="r.example.com/hub/") == f"r.example.com/hub/{image}"
        assert self.reference("r.example.com:5000/x/y:1", mirror="other.example.com") == "r.example.com:5000/x/y:1"
        pinned = {image: {"digest": digest}}
        assert self.reference(image, images=pinned) == f"vllm/vllm-openai@{digest}"
        assert (
            self.reference(image, images=pinned, mirror="r.example.com") == f"r.example.com/vllm/vllm-openai@{digest}"
        )
        assert self.reference(image, images={image: {"archive": "/a.tar"}}, mirror="r.example.com") == image
        assert self.reference(image, images={image: {"reference": "mine:1"}}) == "mine:1"

    def test_architecture(self) -> None:
        image = "vllm/vllm-openai-cpu:v0.32.0-x86_64"
        assert self.reference(image, "aarch64") == "vllm/vllm-openai-cpu:v0.32.0-arm64"
        assert self.reference("vllm/vllm-openai:v0.25.1", "aarch64") == "vllm/vllm-openai:v0.25.1"

    @pytest.mark.parametrize(("pin", "what"), [({"digest": "abc"}, "digest is abc"), ({"diggest": "x"}, "has diggest")])
    def test_mistakes(self, pin: dict[str, str], what: str) -> None:
        with pytest.raises(AnsibleFilterError, match=what):
            self.reference("x/y:1", images={"x/y:1": pin})
