# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ansible.errors import AnsibleError, AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.filter.plan_inputs import plan_inputs
from ansible_collections.baremetal.vllm.plugins.filter.vllm_plan import vllm_plan

CONFIG = {"architectures": ["LlamaForCausalLM"]}


def reading(**fields: Any) -> dict[str, Any]:
    """What model_info tells of one model."""
    told = {"model": "owner/name", "source": "huggingface", "path": "/srv/models/owner/name", "problem": ""}
    return {**told, "config": CONFIG, "weights_bytes": 2**30, **fields}


def one(service: dict[str, Any], *readings: dict[str, Any], **more: Any) -> dict[str, Any]:
    hosts = [f"gpu{number}" for number in range(len(readings))]
    result = plan_inputs([service], hosts, [{"gpus": []}] * len(hosts), [{"chat": found} for found in readings], **more)
    return result["services"][0]


def test_what_was_read_joins_what_was_written() -> None:
    service = {"name": "chat", "model": "owner/name", "port": 8001}
    assert one(service, reading()) == {
        "name": "chat",
        "model": "owner/name",
        "port": 8001,
        "config": CONFIG,
        "model_path": "/srv/models/owner/name",
        "served_model_name": "owner/name",
        "runtime": "venv",
        "weights_gib": 1.0,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [("served_model_name", "mine"), ("runtime", "container"), ("weights_gib", 7), ("config", {"x": 1})],
)
def test_what_the_user_wrote_wins(field: str, value: Any) -> None:
    assert one({"name": "chat", "model": "owner/name", field: value}, reading())[field] == value


def test_the_runtime_of_the_role() -> None:
    assert one({"name": "chat", "model": "owner/name"}, reading(), runtime="container")["runtime"] == "container"


def test_a_key_is_no_part_of_a_plan() -> None:
    assert "sk-secret" not in str(one({"name": "chat", "model": "owner/name", "api_key": "sk-secret"}, reading()))


@pytest.mark.parametrize("path", ["/srv/models/mine", "/srv/models/mine/"])
def test_a_folder_is_served_under_its_last_name(path: str) -> None:
    service = one({"name": "chat", "model": path}, reading(model=path, source="path", path=path))
    assert service["served_model_name"] == "mine"


def test_weights_that_nobody_could_measure_are_left_to_the_planner() -> None:
    assert "weights_gib" not in one({"name": "chat", "model": "owner/name"}, reading(weights_bytes=0))


def test_one_host_that_can_read_the_model_is_enough() -> None:
    broken = {"model": "owner/name", "problem": "HTTP 503", "config": {}, "weights_bytes": 0}  # no source, no path
    assert one({"name": "chat", "model": "owner/name"}, broken, reading())["config"] == CONFIG


def test_a_model_that_nobody_can_read_is_left_to_the_preflight() -> None:
    services = [{"name": "chat", "model": "gpt"}, {"name": "other", "model": "owner/name"}]
    models = [{"chat": reading(problem="no such model"), "other": reading()}]
    result = plan_inputs(services, ["gpu0"], [{}], models)
    assert [service["name"] for service in result["services"]] == ["other"]


def test_an_image_is_refused_that_the_driver_to_be_cannot_run() -> None:
    """Before it is installed: vLLM 0.33 is built for CUDA 13, which wants branch 580."""
    gpu = {"name": "NVIDIA A10", "memory_total_mib": 23028, "compute_capability": "8.6"}
    facts = {"gpus": [], "pci": [gpu], "state": "no_driver", "driver_version": None, "cpu": {}}
    service = {"name": "chat", "model": "Qwen/Qwen2.5-7B-Instruct", "engine_version": "0.33.0", "max_model_len": 4096}
    info = {"chat": {"model": service["model"], "source": "path", "path": "/m", "problem": "no", "config": {}}}

    def problems(driver: str) -> str:
        inputs = plan_inputs([service], ["h"], [facts], [info], drivers=[driver])
        return " ".join(vllm_plan([service], inputs["hosts"])["problems"])

    assert "needs driver 580.65.06 or newer, the host has 535.309.01" in problems("535.309.01")
    assert problems("580.159.04") == ""


def test_hosts_keep_their_names() -> None:
    gpu = [{"gpus": [1], "device": "cuda", "name": "wrong"}, {"gpus": [], "device": "cpu"}]
    assert plan_inputs([], ["b", "a"], gpu, [{}, {}])["hosts"] == [
        {"gpus": [1], "device": "cuda", "name": "b"},
        {"gpus": [], "device": "cpu", "name": "a"},
    ]


@pytest.mark.parametrize("services", [None, "chat", {"name": "chat"}, ["chat"], [None]])
def test_services_that_are_none(services: Any) -> None:
    with pytest.raises(
        AnsibleFilterError, match=r"^vllm_services is .*: give a list of services, each with name and model"
    ):
        plan_inputs(services, [], [], [])


@pytest.mark.parametrize("name", [None, "", 7, "-x", "_x", ".", "..", "a b", "a/b", "a\n", "a;b", "\u00fc", "a" * 64])
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(AnsibleFilterError) as error:
        plan_inputs([{"name": "fine"}, {"name": name}], [], [], [])
    assert str(error.value) == (
        f"vllm_services[1].name is {name!r}: give up to 63 letters, digits, '_', '.' and '-', a letter or digit first"
    )


@pytest.mark.parametrize(
    ("name", "whose"),
    [
        ("chat-standby", "the server that stands by for another"),
        ("proxy", "the reverse proxy"),
        ("interconnect-firewall", "the interconnect's firewall"),
        ("interconnect.nft", "the interconnect's firewall"),
        ("supervisord", "the supervisor"),
    ],
)
def test_names_that_are_taken(name: str, whose: str) -> None:
    with pytest.raises(AnsibleFilterError) as error:
        plan_inputs([{"name": name}], [], [], [])
    assert str(error.value) == (
        f"vllm_services[0].name is {name}: {whose} has a unit, log or folder of this name; give another one"
    )


@pytest.mark.parametrize("name", ["a", "standby", "proxy2", "Qwen2.5-7B_x", "7b", "a" * 63])
def test_names_that_will_do(name: str) -> None:
    assert plan_inputs([{"name": name}], [], [], [])["services"] == []


def test_names_must_differ() -> None:
    with pytest.raises(
        AnsibleFilterError, match=r"^vllm_services\[2\].name is a, as of another service: names must differ$"
    ):
        plan_inputs([{"name": "a"}, {"name": "b"}, {"name": "a"}], [], [], [])


class TestALimitedRun:
    def plan(self, run: list[str], **service: Any) -> list[dict[str, Any]]:
        given = {"name": "chat", "model": "owner/name", **service}
        models = [{"chat": reading()} for _ in run]
        result = plan_inputs([given], run, [{}] * len(run), models, all_hosts=["a", "b", "c"])
        services: list[dict[str, Any]] = result["services"]
        return services

    @pytest.mark.parametrize("hosts", [["a"], "a", ["a", "b"]])
    def test_a_service_of_hosts_that_are_all_here(self, hosts: Any) -> None:
        assert len(self.plan(["a", "b"], hosts=hosts)) == 1

    @pytest.mark.parametrize("hosts", [["c"], "c"])
    def test_a_service_of_other_hosts_is_left_out(self, hosts: Any) -> None:
        assert self.plan(["a", "b"], hosts=hosts) == []

    def test_a_service_that_also_needs_another_host(self) -> None:
        with pytest.raises(
            AnsibleFilterError, match=r"^this run is limited to a, b, and service chat needs c, too: run without"
        ):
            self.plan(["a", "b"], hosts=["b", "c"])

    def test_a_service_of_any_host(self) -> None:
        with pytest.raises(
            AnsibleFilterError, match="service chat may run on any host and would be planned anew: run without"
        ):
            self.plan(["a", "b"])

    def test_all_hosts_are_no_limit(self) -> None:
        assert len(self.plan(["c", "a", "b"])) == 1


def test_in_a_template(render: Callable[..., Any]) -> None:
    variables = {"services": [{"name": "chat", "model": "owner/name"}], "read": [{"chat": reading()}]}
    inputs = render("{{ services | baremetal.vllm.plan_inputs(['gpu0'], [{'device': 'cpu'}], read) }}", **variables)
    assert inputs["hosts"] == [{"device": "cpu", "name": "gpu0"}]
    assert inputs["services"][0]["model_path"] == "/srv/models/owner/name"
    with pytest.raises(AnsibleError, match="vllm_services is 'chat'"):
        render("{{ 'chat' | baremetal.vllm.plan_inputs([], [], []) }}")
