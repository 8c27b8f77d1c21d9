# SPDX-License-Identifier: GPL-3.0-or-later
"""Which layout is chosen, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.tables import load

SMALL = "Qwen/Qwen2.5-1.5B"
MIDDLE = "Qwen/Qwen2.5-7B-Instruct"
LARGE = "Qwen/Qwen3-32B"
CONFIGS = json.loads((Path(__file__).parents[4] / "benchmarks" / "truth" / "configs.json").read_text())
LLAMA_31: dict[str, Any] = {
    "model": "llama",
    "config": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
}  # fmt: skip
LLAMA = load("models")["models"]["mistralai/Mistral-7B-v0.1"]["config"]


def plan(there: Any, *services: dict[str, Any]) -> dict[str, Any]:
    named = [{"name": f"service{number}", **service} for number, service in enumerate(services)]
    return make_plan(named, hosts_from_text(there) if isinstance(there, str) else there)


def one(there: Any, **service: Any) -> dict[str, Any]:
    row: dict[str, Any] = plan(there, {"model": MIDDLE, **service})["services"][0]
    return row


def value(row: dict[str, Any], flag: str) -> str | None:
    return row["args"][row["args"].index(flag) + 1] if flag in row["args"] else None


def sizes(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["tensor_parallel_size"], row["pipeline_parallel_size"], row["data_parallel_size"]


GLM_45V: dict[str, Any] = {
    "architectures": ["Glm4vMoeForConditionalGeneration"],
    "model_type": "glm4v_moe",
    "text_config": {
        "model_type": "glm4v_moe_text", "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 65536, "vocab_size": 151552, "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "glm4v_moe", "depth": 24, "hidden_size": 1536, "num_heads": 12, "intermediate_size": 10944,
        "out_hidden_size": 4096,
    },
}  # fmt: skip
QWEN_25_VL: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_size": 2048,
    "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "max_position_embeddings": 128000, "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "vision_config": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 2048},
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ objectives


def test_spare_gpus_become_replicas_for_throughput_and_width_for_latency() -> None:
    assert sizes(one("4x H200", objective="throughput")) == (1, 1, 4)
    assert sizes(one("4x H200", objective="latency")) == (4, 1, 1)


def test_replicas_have_two_api_servers_each_where_the_host_has_cores() -> None:
    def there(cores: int) -> list[dict[str, Any]]:
        return [{**hosts_from_text("2x H100")[0], "cpu": {"cores": cores}}]

    wide = one(there(32), max_model_len=4096)
    assert (sizes(wide), value(wide, "--api-server-count"), wide["api_server_count"]) == ((1, 1, 2), "4", 4)
    assert any("4 API servers for 2 replicas" in line for line in wide["why"])
    for row in (
        one(there(15), max_model_len=4096),  # fewer than 8 cores a replica
        one("2x H100", max_model_len=4096),  # not known
        one(there(32), max_model_len=4096, objective="latency"),
        one(there(32), max_model_len=4096, data_parallel_size=1, tensor_parallel_size=1),
        one(there(32), max_model_len=4096, engine_version="0.8.5.post1"),
    ):
        assert value(row, "--api-server-count") is None
    asked = one(there(32), max_model_len=4096, extra_args=["--api-server-count", "3"])
    assert (asked["args"].count("--api-server-count"), value(asked, "--api-server-count")) == (1, "3")


def test_width_stops_at_what_the_model_allows() -> None:
    row = one("8x H200", objective="latency")  # 28 heads, 4 of them KV: TP 8 is not possible
    assert sizes(row) == (4, 1, 1)


@pytest.mark.parametrize(
    ("there", "config", "asked", "told"),
    [
        ("8x A100-40GB", GLM_45V, {}, "num_heads 12"),
        ("8x H100", QWEN_25_VL, {"objective": "latency"}, "intermediate_size 3420"),
    ],
)
def test_a_vision_tower_that_tp_cannot_cut_is_kept_whole(
    there: str, config: dict[str, Any], asked: dict[str, Any], told: str
) -> None:
    row = one(there, model="vision", config=config, tensor_parallel_size=8, **asked)
    assert row["fits"], row["problems"]
    assert value(row, "--mm-encoder-tp-mode") == "data"
    cut = one(there, model="vision", config={**config, "vision_config": {**config["vision_config"], "num_heads": 16,
              "intermediate_size": 3424}}, tensor_parallel_size=8, **asked)  # fmt: skip
    assert value(cut, "--mm-encoder-tp-mode") is None
    assert row["memory"]["weights_gib"] > cut["memory"]["weights_gib"] + 0.4
    four = one(there, model="vision", config=config, tensor_parallel_size=4, max_model_len=2048, **asked)
    assert value(four, "--mm-encoder-tp-mode") is None
    old = one(there, model="vision", config=config, tensor_parallel_size=8, engine_version="0.10.1.1", **asked)
    assert (
        f"TP 8 is not possible: {told} of the vision tower, which releases from 0.10.2 on keep whole"
        in old["problems"][0]
    )


def test_no_more_gpus_than_needed_when_others_want_them_too() -> None:
    result = plan("4x H200", {"model": MIDDLE}, {"model": LARGE})
    assert result["fits"]
    assert sorted(len(row["gpus"]["host1"]) for row in result["services"]) == [2, 2]


def test_the_smallest_tp_that_holds_it() -> None:
    row = one("4x L40S", model=LARGE, max_model_len=8192, objective="throughput")
    assert sizes(row) == (2, 1, 2)
    assert any("TP 1 does not hold the weights" in line for line in row["why"])


@pytest.mark.parametrize(
    ("there", "service"),
    [
        ("2x V100-PCIE-32GB", {"max_model_len": 8192}),
        ("3x(2x V100-PCIE-16GB no-p2p)", {"model": SMALL}),
        ("2x T4", {"model": SMALL, "engine_version": "0.10.2"}),
        ("2x V100-PCIE-32GB", {"model": SMALL, "data_parallel_size": 1}),
    ],
)
def test_the_v0_core_is_planned_without_replicas(there: Any, service: dict[str, Any]) -> None:
    row = one(there, **service)
    assert row["fits"] and row["engine_core"] == "V0"
    assert [(sizes(item), len(item["gpu_uuids"])) for item in row["instances"]] == [((1, 1, 1), 1)] * len(row["hosts"])
    assert value(row, "--data-parallel-size") is None
    idle = any("1 GPU(s) of host1 stay idle" in line for line in row["why"])
    assert idle == ("data_parallel_size" not in service)


@pytest.mark.parametrize(
    ("there", "service", "told"),
    [
        ("2x V100-PCIE-32GB", {"data_parallel_size": 2}, "data_parallel_size 2 needs the V1 core"),
        ("2x V100-PCIE-32GB", {"gpus": 2, "tensor_parallel_size": 1}, "gpus 2 with TP 1 x PP 1 needs the V1 core"),
        ("2x A10", {"engine_version": "0.7.2", "data_parallel_size": 2}, "data_parallel_size 2 needs the V1 core"),
        ("2x A10", {"engine_version": "0.8.2", "data_parallel_size": 2}, "of vLLM 0.8.3 or newer"),
    ],
)
def test_replicas_that_nothing_would_start_are_refused(there: Any, service: dict[str, Any], told: str) -> None:
    row = one(there, model=SMALL, **service)
    assert told in row["problems"][0]
    assert "make 2 services of one replica each, on ports of their own" in row["problems"][0]


def test_a_number_of_gpus_is_one_wide_server_where_there_are_no_replicas() -> None:
    for there, version in (("2x V100-PCIE-32GB", None), ("2x A10", "0.7.2")):
        row = one(there, model=SMALL, gpus=2, engine_version=version)
        assert (sizes(row), value(row, "--tensor-parallel-size")) == ((2, 1, 1), "2")


def test_embedding_models_are_not_replicated() -> None:
    assert sizes(one("4x A10", model="BAAI/bge-m3")) == (1, 1, 1)


# --------------------------------------------------------------------------------------------- what is set is kept


@pytest.mark.parametrize(
    ("setting", "flag", "given"),
    [
        ("tensor_parallel_size", "--tensor-parallel-size", 2),
        ("pipeline_parallel_size", "--pipeline-parallel-size", 2),
        ("data_parallel_size", "--data-parallel-size", 3),
        ("gpu_memory_utilization", "--gpu-memory-utilization", 0.77),
        ("max_model_len", "--max-model-len", 5000),
        ("max_num_seqs", "--max-num-seqs", 33),
        ("max_num_batched_tokens", "--max-num-batched-tokens", 3333),
        ("dtype", "--dtype", "float16"),
        ("port", "--port", 9000),
        ("served_model_name", "--served-model-name", "chat"),
        ("kv_cache_dtype", "--kv-cache-dtype", "fp8"),
    ],
)
def test_what_is_set_is_kept(setting: str, flag: str, given: Any) -> None:
    row = one("4x H200", **{setting: given})
    assert row["fits"], row["problems"]
    assert value(row, flag) == str(given)


def test_eager_mode_is_kept_when_asked_for_and_not_chosen_otherwise() -> None:
    assert "--enforce-eager" in one("1x H200", enforce_eager=True)["args"]
    assert "--enforce-eager" not in one("1x H200")["args"]


def test_a_number_of_gpus_is_used_up() -> None:
    assert sizes(one("8x H200", gpus=4, objective="throughput")) == (1, 1, 4)
    assert sizes(one("8x H200", gpus=4, objective="latency")) == (4, 1, 1)
    assert one("8x H200", gpus=3, objective="latency")["data_parallel_size"] == 3  # TP 3 is not possible


def test_gpus_by_index_are_those() -> None:
    row = one("4x H200", gpus=[1, 3])
    assert row["gpus"] == {"host1": [1, 3]}


def test_hosts_by_name_are_all_used() -> None:
    row = one("3x(2x A10)", hosts=["host1", "host3"], max_model_len=4096)
    assert row["hosts"] == ["host1", "host3"]
    assert [instance["hosts"] for instance in row["instances"]] == [["host1"], ["host3"]]


def test_extra_arguments_come_last_and_env_goes_through() -> None:
    row = one("1x H200", extra_args=["--seed", "7"], env={"A": 1})
    assert row["args"][-2:] == ["--seed", "7"]
    assert row["env"] == {"A": "1"}


@pytest.mark.parametrize(
    ("there", "version", "flag"),
    [
        ("2x V100-PCIE-32GB", "0.8.5.post1", ["--no-enable-chunked-prefill"]),
        ("1x A100-SXM4-80GB", "0.8.4", []),  # V1
        ("1x A100-SXM4-80GB", "0.7.2", ["--enable-chunked-prefill=False"]),
        ("1x A100-SXM4-80GB", "0.5.3", ["--enable-chunked-prefill=False"]),
        ("1x A100-SXM4-80GB", "0.5.2", []),  # a switch that is off by itself
    ],
)
def test_long_prompts_are_not_split_by_the_v0_core(there: str, version: str, flag: list[str]) -> None:
    service = {"model": "mistralai/Mistral-7B-v0.1", "config": {**LLAMA, "max_position_embeddings": 65536}}
    row = one(there, **service, engine_version=version, max_model_len=40960, max_num_seqs=16)
    assert row["fits"], row["problems"]
    assert [arg for arg in row["args"] if "chunked-prefill" in arg] == flag
    asked = one(there, **service, engine_version=version, max_model_len=40960, extra_args=["--enable_chunked_prefill"])
    assert [arg for arg in asked["args"] if "chunked" in arg] == ["--enable_chunked_prefill"]


@pytest.mark.parametrize(
    ("there", "service", "ways"),
    [
        (
            "2x V100-PCIE-16GB no-p2p",
            {
                "tensor_parallel_size": 2,
                "max_model_len": 4096,
                "enforce_eager": True,
                "gpu_memory_utilization": 0.85,
            },
            "set max_num_batched_tokens 4096 or leave it out, or lower max_model_len to 2048",
        ),
        (
            "1x A10",
            {"model": SMALL, "engine_version": "0.7.2", "max_model_len": 32768},
            "set max_num_batched_tokens 32768 or leave it out, or lower max_model_len to 2048, or give extra_args "
            "--enable-chunked-prefill",
        ),
    ],
)
def test_a_batch_that_holds_no_whole_prompt_is_refused_on_the_v0_core(
    there: str, service: dict[str, Any], ways: str
) -> None:
    row = one(there, max_num_batched_tokens=2048, **service)
    (problem,) = row["problems"]
    assert f"max_num_batched_tokens 2048 is below max_model_len {service['max_model_len']}" in problem
    assert problem.endswith(f"does not split prompts: {ways}")


def test_a_batch_on_the_v0_core_limits_a_context_that_nobody_set() -> None:
    row = one("1x A10", model=SMALL, engine_version="0.7.2", max_num_batched_tokens=3000)
    assert (row["max_model_len"], row["max_num_batched_tokens"]) == (3000, 3000)
    split = one(
        "1x A10",
        model=SMALL,
        engine_version="0.7.2",
        max_model_len=32768,
        max_num_batched_tokens=2048,
        extra_args=["--enable-chunked-prefill"],
    )
    assert split["fits"] and value(split, "--max-num-batched-tokens") == "2048"
    assert one("1x A10", model=SMALL, max_model_len=32768, max_num_batched_tokens=2048)["fits"]
    few = one("1x A10", model=SMALL, engine_version="0.7.2", max_model_len=128, max_num_batched_tokens=128)
    assert few["max_num_seqs"] <= 128  # vLLM refuses more


@pytest.mark.parametrize(
    ("there", "service", "told"),
    [
        (
            "2x H200",
            {"model": "experts", "data_parallel_size": 2, "enable_expert_parallel": False},
            "data_parallel_size 2 with enable_expert_parallel false",
        ),
        (
            "4x H200",
            {"model": "experts", "data_parallel_size": 2, "pipeline_parallel_size": 2},
            "data_parallel_size 2 with pipeline_parallel_size 2",
        ),
        (
            "2x(4x A10)",
            {
                "data_parallel_size": 2,
                "tensor_parallel_size": 2,
                "pipeline_parallel_size": 2,
                "hosts": ["host1", "host2"],
            },
            "data_parallel_size 2: the replicas of one server are on one host, and 8 GPUs are more than the 4 of one",
        ),
        (
            "2x(4x A10)",
            {"model": LARGE, "data_parallel_size": 2},
            "data_parallel_size 2: the replicas of one server are on one host, and 8 GPUs are more than the 4 of one",
        ),
        ("4x H200", {"data_parallel_size": 3, "gpus": 4}, "no layout of 4 GPUs and data_parallel_size 3 is possible"),
        (
            "2x A10",
            {"tensor_parallel_size": 2, "executor": "ray", "max_model_len": 4096},
            "executor ray: vLLM 0.25.1 comes without Ray",
        ),
    ],
)
def test_what_is_set_is_not_dropped(there: str, service: dict[str, Any], told: str) -> None:
    config = {"config": CONFIGS["qwen3-30b-a3b"]} if service.get("model") == "experts" else {}
    row = one(there, **service, **config)
    assert not row["fits"] and told in row["problems"][0]


def test_numbers_of_gpus_and_replicas_are_kept_together() -> None:
    assert sizes(one("4x H200", data_parallel_size=2, gpus=4)) == (2, 1, 2)
    assert sizes(one("4x H200", data_parallel_size=2, pipeline_parallel_size=2)) == (1, 2, 2)
    spread = one("2x H200", model="experts", config=CONFIGS["qwen3-30b-a3b"], data_parallel_size=2)
    assert sizes(spread) == (1, 1, 2) and "--enable-expert-parallel" in spread["args"]


def test_ray_on_one_host_is_the_images() -> None:
    for more in ({"image": "registry.example/vllm-ray:1"}, {"engine_version": "0.8.5.post1"}):
        row = one("2x A10", tensor_parallel_size=2, executor="ray", max_model_len=4096, **more)
        assert row["fits"] and value(row, "--distributed-executor-backend") == "ray"


def test_two_services_on_one_port_of_a_host_are_refused() -> None:
    asked = [{"model": SMALL, "port": 8000}, {"model": MIDDLE, "port": 8000}]
    result = plan("2x A10", *asked)
    assert result["problems"] == [
        "service1: port 8000 of host1 is service0's already: set another port of the service, or leave it out"
    ]
    assert "port 8000 of box is service0's" in plan(CPU, asked[0], asked[0])["problems"][0]
    apart = [{**service, "hosts": [f"host{number}"]} for number, service in enumerate(asked, 1)]
    assert plan("2x(1x A10)", *apart)["fits"]


def test_an_extra_argument_that_the_plan_decides_is_refused() -> None:
    row = one("2x H200", extra_args=["--tensor-parallel-size", "2"])
    assert "set tensor_parallel_size of the service instead" in row["problems"][0]


@pytest.mark.parametrize(
    ("extra_args", "told"),
    [
        (
            ["--api-key", "sk-of-somebody"],
            "extra_args holds --api-key, which the roles decide: set api_key of the service",
        ),
        (
            ["--api_key=sk-of-somebody"],
            "extra_args holds --api-key, which the roles decide: set api_key of the service",
        ),
        (["--hf-token", "hf_of_somebody"], "set model_token, which no process list shows"),
        (["--ssl-keyfile", "/k.pem", "--ssl_certfile=/c.pem"], "let role proxy serve TLS"),
        ("--uds /run/x.sock", "extra_args holds --uds, which the roles decide: leave it out"),
        (["--config=/srv/x.yaml"], "write what the file holds into the service, where it is checked"),
        (["--host", "0.0.0.0"], "set bind of the service"),
        (["--port", "9000"], "set port of the service instead"),
        (["--trust_remote_code"], "set trust_remote_code of the service instead"),
        (["--no-enforce-eager"], "extra_args holds --no-enforce-eager, which the plan decides: set enforce_eager"),
        (["--shutdown-timeout=0"], "set vllm_drain_timeout"),
        (["--node-rank", "1"], "set hosts of the service"),
        (["--prefill-context-parallel-size", "2"], "it multiplies the GPUs of a server"),
        (["-pcp", "2"], "extra_args holds -pcp: it multiplies the GPUs of a server"),
        (["--kv_cache_memory_bytes=5000000000"], "passes over the planned gpu_memory_utilization"),
        (["-dcp", "2"], "extra_args holds -dcp 2, which has to divide TP, and TP is 1: leave it out, or set"),
        (["--decode_context_parallel_size=2"], "has to divide TP"),
    ],
)
@pytest.mark.parametrize("there", ["1x H200", [{"name": "host1", "gpus": [], "cpu": {"memory_total_mib": 65536}}]])
def test_an_extra_argument_that_goes_past_the_roles_is_refused(there: Any, extra_args: Any, told: str) -> None:
    problems = " ".join(one(there, model=SMALL, extra_args=extra_args)["problems"])
    assert told in problems
    assert "somebody" not in problems


def test_extra_arguments_that_go_with_the_plan() -> None:
    for extra_args in (["-dcp", "2"], ["-O3"], ["-O", "2"]):
        assert one("2x H200", tensor_parallel_size=2, extra_args=extra_args)["fits"]


def test_extra_arguments_as_text_are_words_of_a_shell() -> None:
    row = one("1x H200", extra_args='--limit-mm-per-prompt \'{"image": 2}\' --chat-template "/a b/c.jinja"')
    assert row["args"][-4:] == ["--limit-mm-per-prompt", '{"image": 2}', "--chat-template", "/a b/c.jinja"]


def test_an_extra_argument_that_the_release_lacks_is_refused_with_its_replacement() -> None:
    row = one("2x H200", extra_args=["--num-scheduler-steps", "8"])
    assert "0.10.0 is the last with it; use --async-scheduling" in row["problems"][0]


OVERRIDES = ["--hf-overrides", '{"architectures": ["Qwen3ForSequenceClassification"]}']


@pytest.mark.parametrize(
    ("service", "task", "flags"),
    [
        ({}, "generate", []),
        ({"task": "generate"}, "generate", []),
        ({"task": "embed"}, "embed", ["--runner", "pooling", "--convert", "embed"]),
        ({"task": "score"}, "score", ["--runner", "pooling", "--convert", "classify"]),
        ({"task": "embed", "engine_version": "0.9.2"}, "embed", ["--task", "embed"]),
        ({"task": "score", "extra_args": OVERRIDES}, "score", ["--runner", "pooling", "--convert", "classify"]),
        ({"extra_args": OVERRIDES}, "score", ["--runner", "pooling"]),
        ({"extra_args": ["--runner", "pooling"]}, "embed", ["--runner", "pooling"]),
        (
            {"extra_args": ["--runner=pooling", "--convert=classify"]},
            "score",
            ["--runner=pooling", "--convert=classify"],
        ),
        ({"extra_args": ["--convert", "embed"]}, "embed", ["--convert", "embed"]),
        ({"extra_args": ["--runner", "generate"]}, "generate", ["--runner", "generate"]),
        ({"extra_args": ["--task", "embedding"], "engine_version": "0.9.2"}, "embed", ["--task", "embedding"]),
        ({"model": "BAAI/bge-m3"}, "embed", ["--runner", "pooling"]),
        ({"model": "BAAI/bge-m3", "task": "embed"}, "embed", ["--runner", "pooling"]),
        ({"model": "BAAI/bge-reranker-base"}, "score", ["--runner", "pooling"]),
        ({"model": "BAAI/bge-m3", "extra_args": ["--runner", "pooling"]}, "embed", ["--runner", "pooling"]),
    ],
)
@pytest.mark.parametrize("there", ["1x H200", [{"name": "host1", "gpus": [], "cpu": {"memory_total_mib": 65536}}]])
def test_what_a_model_is_served_for(there: Any, service: dict[str, Any], task: str, flags: list[str]) -> None:
    if not isinstance(there, str) and "engine_version" in service:
        pytest.skip("CPUs have builds of newer releases")
    row = one(there, **{"model": SMALL, **service})
    assert not row["problems"]
    assert row["task"] == task
    seen = [
        word
        for before, word in zip(["", *row["args"]], row["args"], strict=False)
        if word.split("=")[0] in ("--runner", "--convert", "--task") or before in ("--runner", "--convert", "--task")
    ]
    assert seen == flags


def test_a_task_that_cannot_be_is_refused() -> None:
    assert (
        "beside task: embed of the service: give one of the two"
        in one("1x H200", task="embed", extra_args=["--runner", "pooling"])["problems"][0]
    )
    assert (
        "has no flag for task: embed: take engine_version 0.6.4 or newer"
        in one("1x A10", model=SMALL, task="embed", engine_version="0.6.3")["problems"][0]
    )


def test_ports_differ() -> None:
    result = plan("4x A10", {"model": SMALL}, {"model": SMALL, "port": 8000}, {"model": SMALL})
    assert [row["port"] for row in result["services"]] == [8001, 8000, 8002]


# ------------------------------------------------------------------------------------------------------- sharing


def test_two_services_share_one_gpu_and_leave_nothing_negative() -> None:
    result = plan("1x A10", {"model": SMALL}, {"model": "BAAI/bge-m3"})
    assert result["fits"], result["problems"]
    assert len(result["gpus"][0]["services"]) == 2
    assert result["gpus"][0]["free_gib"] >= 0
    assert sum(row["gpu_memory_utilization"] for row in result["services"]) < 1
    assert any("shares GPUs with service1" in line for line in result["services"][0]["why"])


def test_a_release_that_counts_others_as_its_own_does_not_share() -> None:
    pinned = {"engine_version": "0.8.5", "max_model_len": 2048}
    result = plan("1x A100-80GB", {"model": SMALL, **pinned}, {"model": MIDDLE, **pinned})
    assert any("counts the memory of" in problem for problem in result["problems"])


def test_memory_in_use_is_left_alone() -> None:
    hosts = hosts_from_text("1x A10")
    alone = one(hosts, max_model_len=4096)
    hosts[0]["gpus"][0]["memory_used_mib"] = 2048
    beside = one(hosts, max_model_len=4096)
    assert beside["fits"], beside["problems"]
    assert beside["gpu_memory_utilization"] < alone["gpu_memory_utilization"]
    assert any("in use by others" in line for line in beside["why"])
    hosts[0]["gpus"][0]["memory_used_mib"] = 12000
    full = one(hosts, max_model_len=4096)
    assert not full["fits"]


def test_a_gpu_that_is_full_of_others_is_said_to_be() -> None:
    hosts = hosts_from_text("1x A10")
    hosts[0]["gpus"][0]["memory_used_mib"] = hosts[0]["gpus"][0]["memory_total_mib"]
    problems = one(hosts, max_model_len=4096)["problems"]
    assert "GiB are in use by others" in problems[0] and "gpu_memory_utilization" not in " ".join(problems)
    assert problems[-1] == "on such GPUs of its own it fits (TP 1)"


def test_a_busy_gpu_is_avoided() -> None:
    hosts = hosts_from_text("2x A10")
    hosts[0]["gpus"][0]["memory_used_mib"] = 12000
    assert one(hosts, max_model_len=4096, data_parallel_size=1)["gpus"] == {"host1": [1]}


# ------------------------------------------------------------------------------------------------ unlike hardware


def test_unlike_gpus_do_not_work_together() -> None:
    row = one("1x H200 + 2x L4", objective="latency")
    assert len({(host, index) for host, indices in row["gpus"].items() for index in indices}) in (1, 2)
    assert row["gpus"] in ({"host1": [0]}, {"host1": [1, 2]})
    assert any("unlike GPUs" in line for line in row["why"])


def test_unlike_gpus_by_index_are_refused() -> None:
    row = one("1x H200 + 1x L4", gpus=[0, 1], tensor_parallel_size=2)
    assert not row["fits"]


def test_mig_slices_hold_engines_of_one_gpu_only() -> None:
    hosts = hosts_from_text("1x H100")
    part = {"profile": "3g.40gb", "memory_total_mib": 40320}
    hosts[0]["gpus"][0] |= {"mig": True, "mig_devices": [{**part, "uuid": f"MIG-{n}"} for n in (1, 2)]}
    row = one(hosts, max_model_len=4096)
    assert row["fits"], row["problems"]
    assert sizes(row) == (1, 1, 1)
    assert row["gpu_uuids"]["host1"][0].startswith("MIG-")
    refused = one(hosts, model=LARGE, max_model_len=4096)
    assert "slices of a GPU (MIG) do not work together: take a larger one, or the whole GPU" in refused["problems"]
    assert not any("such GPUs hold it" in problem for problem in refused["problems"])
    told = (
        "2 GPUs are asked for, and slices of a GPU (MIG) do not work together: ask for one, and make a service for each of the "
        "others"
    )
    for asked in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpus"):
        assert one(hosts, max_model_len=4096, **{asked: 2})["problems"] == [told]


def test_without_nvlink_custom_all_reduce_is_off() -> None:
    assert "--disable-custom-all-reduce" not in one("2x H200", tensor_parallel_size=2)["args"]
    assert "--disable-custom-all-reduce" in one("2x L40S", tensor_parallel_size=2)["args"]


def test_without_p2p_the_pipeline_comes_first_for_throughput() -> None:
    asked = {"model": LARGE, "max_model_len": 8192, "gpus": 2}
    assert sizes(one("2x L40S no-p2p", **asked)) == (1, 2, 1)
    assert sizes(one("2x L40S no-p2p", **asked, objective="latency")) == (2, 1, 1)
    assert sizes(one("2x L40S", **asked)) == (2, 1, 1)


def test_an_old_driver_gets_the_image_for_it() -> None:
    hosts = hosts_from_text("1x H100")
    hosts[0]["driver_version"] = "575.64.03"
    assert one(hosts)["image"].endswith("-cu129")
    assert one(hosts, runtime="venv")["image"] is None


def test_an_old_driver_is_enough_where_the_build_has_machine_code() -> None:
    hosts = hosts_from_text("1x A10")
    hosts[0]["driver_version"] = "550.144.03"
    row = one(hosts, max_model_len=4096)
    assert row["image"] == "vllm/vllm-openai:v0.25.1-cu129"
    assert any("all parts have machine code for compute capability 8.6" in line for line in row["why"])
    assert one(hosts, max_model_len=4096, runtime="venv")["engine_version"] == "0.19.1"  # whose own CUDA is 12.9


def test_an_image_that_would_not_start_with_an_old_driver_is_not_taken() -> None:
    hosts = hosts_from_text("1x RTX-4090")
    hosts[0]["driver_version"] = "550.144.03"
    assert one(hosts, max_model_len=4096)["engine_version"] == "0.8.5.post1"
    assert one(hosts, max_model_len=4096, runtime="venv")["engine_version"] == "0.19.1"
    hosts[0]["driver_version"] = "535.183.01"
    assert one(hosts, max_model_len=4096)["engine_version"] == "0.4.2"  # the only one whose image starts
    assert one(hosts, max_model_len=4096, runtime="venv")["engine_version"] == "0.19.1"
    llama = one(hosts, max_model_len=4096, **LLAMA_31)
    assert llama["engine_version"] == "0.25.1"
    assert any("refuses driver 535.183.01 on NVIDIA GeForce RTX 4090" in line for line in llama["why"])


def test_a_release_must_read_the_kind_of_rope_scaling() -> None:
    (problem, way) = one("1x H100", **LLAMA_31, engine_version="0.5.3")["problems"]
    assert problem == "vLLM 0.5.3 does not know rope_scaling of type llama3: it came with 0.5.3.post1"
    assert way == "engine_version 0.25.1 can"
    assert one("1x H100", **LLAMA_31, engine_version="0.5.3.post1")["fits"]


def test_a_driver_that_would_have_to_compile_for_the_gpu_decides_which_release() -> None:
    hosts = hosts_from_text("1x H100")
    hosts[0]["driver_version"] = "550.144.03"
    row = one(hosts, max_model_len=4096)
    assert row["engine_version"] == "0.8.5.post1"
    assert any("550.144.03 supports in full" in line for line in row["why"])
    pinned = one(hosts, max_model_len=4096, engine_version="0.25.1")
    assert pinned["image"].endswith("-cu129")
    assert any("may be refused" in line for line in pinned["why"])


@pytest.mark.parametrize(
    "driver, asked, version, why",
    [
        ("535.183.01", {}, "0.25.1", "parts that the driver compiles at run time may be refused"),
        (
            "535.183.01",
            {"pipeline_parallel_size": 2},
            "0.25.1",
            "parts that the driver compiles at run time may be refused",
        ),
        ("550.144.03", {"executor": "mp", "pipeline_parallel_size": 2}, "0.25.1", "may be refused"),
        ("550.144.03", {"pipeline_parallel_size": 2}, "0.8.5.post1", "550.144.03 supports in full"),
    ],
)
def test_a_release_that_cannot_divide_the_model_as_asked_is_not_taken(
    driver: str, asked: dict[str, Any], version: str, why: str
) -> None:
    hosts = [{**host, "driver_version": driver} for host in hosts_from_text("2x(1x H100)")]
    named = {"hosts": [host["name"] for host in hosts]} if asked else {}
    row = one(hosts, max_model_len=4096, **named, **asked)
    assert row["fits"], row["problems"]
    assert row["engine_version"] == version
    assert any(why in line for line in row["why"]), row["why"]


@pytest.mark.parametrize(
    ("there", "head", "version"),
    [
        ("2x V100-PCIE-32GB", 256, "0.8.5.post1"),
        # The V1 core's attention holds no heads of 1024 bytes on these.
        ("1x RTX-2080-Ti-22GB", 256, "0.10.2"),
        ("1x RTX-2080-Ti-22GB", 128, "0.25.1"),
    ],
)
def test_a_model_that_is_wrong_in_float16_is_planned_in_float32(there: str, head: int, version: str) -> None:
    row = one(there, model="gemma", config={**CONFIGS["gemma-2-2b"], "head_dim": head})
    assert row["fits"], row["problems"]
    assert (value(row, "--dtype"), row["dtype"], row["engine_version"]) == ("float32", "float32", version)
    assert any("gemma2 is wrong in float16" in line for line in row["why"])
    half = one("1x A10", model="gemma", config={**CONFIGS["gemma-2-2b"], "head_dim": head})
    assert value(half, "--dtype") is None
    assert row["memory"]["weights_gib"] == pytest.approx(2 * half["memory"]["weights_gib"], rel=0.03)


@pytest.mark.parametrize(
    ("there", "service", "told"),
    [
        (
            "1x A10",
            {"dtype": "float16"},
            "refuses dtype float16 for gemma2, which is wrong in it: leave it out, or give bf",
        ),
        ("1x RTX-2080-Ti-22GB", {"dtype": "float16"}, "leave it out, or give float32"),
        ("1x RTX-2080-Ti-22GB", {"quant": {"quant_method": "awq", "bits": 4}}, "awq weights do not run beside float32"),
        (
            "1x A10",
            {"quant": {"quant_method": "awq", "bits": 4}, "dtype": "float32"},
            "beside dtype float32: leave it out",
        ),
        ("1x RTX-2080-Ti-22GB", {"engine_version": "0.25.1"}, "heads of at most 512 bytes on compute capability 7.5"),
    ],
)
def test_a_dtype_that_cannot_be_is_refused(there: str, service: dict[str, Any], told: str) -> None:
    config = {**CONFIGS["gemma-2-2b"], "quantization_config": service.pop("quant", None)}
    row = one(there, model="gemma", config=config, **service)
    assert told in row["problems"][0]


def test_weights_that_a_gpu_cannot_run_are_refused() -> None:
    row = one("1x RTX-2080-Ti-22GB", model="openai/gpt-oss-20b", config=CONFIGS["gpt-oss-20b"])
    assert row["problems"] == ["mxfp4 weights need compute capability 8.0, the GPU has 7.5"]
    config = {**CONFIGS["llama-3.1-8b"], "quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
    assert any("not vLLM 0.25.1: modelopt weights" in line for line in one("1x A10", model="fp8", config=config)["why"])
    assert one("1x L4", model="fp8", config=config)["engine_version"] == "0.25.1"
    asked = one("1x A10", model="fp8", config=config, engine_version="0.25.1")
    assert asked["problems"] == [
        "modelopt weights need compute capability 8.9 in vLLM 0.25.1, the GPU has 8.6",
        "engine_version 0.33.0 can",
    ]
    config = {**CONFIGS["llama-3.1-8b"], "quantization_config": {"quant_method": "fbgemm_fp8"}}
    assert "fbgemm_fp8 weights need compute capability 8.0" in one("1x T4", model="fp8", config=config)["problems"][0]


def test_a_gpu_that_nothing_supports_is_refused() -> None:
    row = one("1x P100-PCIE-16GB")
    assert "compute capability 6.0" in row["problems"][0]


# -------------------------------------------------------------------------------------------------- several hosts


def test_pipeline_between_hosts_tensor_inside() -> None:
    row = one("2x(8x A100-80GB)", model="deepseek-ai/DeepSeek-R1", max_model_len=4096)
    assert row["fits"], row["problems"]
    assert sizes(row) == (8, 2, 1)
    assert row["hosts"] == ["host1", "host2"]
    assert row["executor"] == "ray" and not row["ray_in_image"]
    assert any("comes without Ray" in line for line in row["why"])


def test_multiprocessing_across_hosts_has_arguments_for_each() -> None:
    row = one("2x(8x A100-80GB)", model="deepseek-ai/DeepSeek-R1", max_model_len=4096, executor="mp")
    nodes = row["instances"][0]["node_args"]
    assert list(nodes) == ["host1", "host2"]
    assert "--headless" in nodes["host2"] and "--headless" not in nodes["host1"]
    assert nodes["host2"][nodes["host2"].index("--node-rank") + 1] == "1"
    assert "--distributed-executor-backend" not in row["args"]


def test_replicas_on_further_hosts_are_servers_of_their_own() -> None:
    row = one("3x(1x H200)")
    assert row["hosts"] == ["host1", "host2", "host3"]
    assert len(row["instances"]) == 3


def test_the_order_of_hosts_does_not_matter() -> None:
    hosts = hosts_from_text("2x(2x A10), 1x(4x H200), 1x(1x L4)")
    services = ({"model": MIDDLE}, {"model": LARGE}, {"model": "BAAI/bge-m3"})
    assert plan(hosts, *services) == plan(list(reversed(hosts)), *services)


# --------------------------------------------------------------------------------------------------------- refusals


def test_advice_names_every_setting_that_has_to_go() -> None:
    row = one(
        "4x A10", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", max_num_batched_tokens=65536, max_model_len=32768
    )
    assert "it fits (TP 4) with max_num_batched_tokens left out" in row["problems"]
    row = one("1x A10", max_model_len=32768, max_num_seqs=256, gpu_memory_utilization=0.7)
    assert "it fits (TP 1) with gpu_memory_utilization left out" in row["problems"]
    assert not any("max_num_seqs" in problem for problem in row["problems"])


def test_a_setting_of_one_is_a_setting() -> None:
    row = one("1x A100-40GB", gpu_memory_utilization=1)
    assert not row["fits"] and row["problems"][1] == "it fits (TP 1) with gpu_memory_utilization left out"
    assert "it fits (TP 2) with gpus left out" in one("4x L40S", model=LARGE, gpus=1)["problems"]


def test_advice_counts_on_what_other_services_leave() -> None:
    half = {"model": "Qwen/Qwen2.5-14B", "gpu_memory_utilization": 0.5, "max_model_len": 8192}
    refused = plan("1x A100-80GB", half, half)["services"][1]["problems"]
    assert "it fits (TP 1) with gpu_memory_utilization left out" in refused
    assert plan("1x A100-80GB", half, {"model": "Qwen/Qwen2.5-14B", "max_model_len": 8192})["fits"]
    # Nothing helps beside the first one.
    refused = plan("1x A10", {"model": MIDDLE}, {"model": MIDDLE})["services"][1]["problems"]
    assert refused[1:] == ["on such GPUs of its own it fits (TP 1)"]


def test_advice_for_a_service_over_several_hosts() -> None:
    spread = {"hosts": ["host1", "host2", "host3"], "tensor_parallel_size": 2, "pipeline_parallel_size": 3}
    tight = {"max_num_batched_tokens": 131072, "gpu_memory_utilization": 0.8, "max_model_len": 8192}
    row = one("3x(2x V100-PCIE-16GB no-p2p)", model="Qwen/Qwen2.5-14B", **spread, **tight)
    # Not "3 such GPUs hold it": there are six.
    assert row["problems"][1:] == ["it fits (TP 2 x PP 3) with max_num_batched_tokens left out"]


def test_more_memory_is_no_advice_where_it_is_not_missing() -> None:
    (problem,) = one("2x RTX-2080-Ti-22GB", dtype="bfloat16")["problems"]
    assert problem.endswith("bfloat16 needs compute capability 8.0, this GPU has 7.5: use float16")


def test_a_refusal_has_the_arithmetic_and_ways_out() -> None:
    row = one("1x A10", model=LARGE, max_model_len=8192)
    assert not row["fits"] and row["hosts"] == [] and row["args"] == []
    assert "GiB" in row["problems"][0]
    assert any("bits" in problem for problem in row["problems"]), row["problems"]
    assert any("such GPUs hold it" in problem for problem in row["problems"]), row["problems"]


@pytest.mark.parametrize("share", [0.26, 0.22])
def test_quantized_weights_that_are_advised_fit(share: float) -> None:
    """A sixth of this model is its embedding, which stays in 16 bits."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
        "max_position_embeddings": 131072, "sliding_window": 1024, "torch_dtype": "bfloat16",
        "architectures": ["Gemma3ForCausalLM"],
    }  # fmt: skip
    asked = {"model": "some/model", "config": text, "max_model_len": 4096, "gpu_memory_utilization": share}
    problems = one("1x L4", **asked)["problems"]
    (advice,) = [problem for problem in problems if problem.startswith("weights of 8 bits (FP8) fit")]
    assert one("1x L4", **asked, quantization="fp8")["fits"] is (share > 0.23)
    assert ("gpu_memory_utilization left out" in advice) is (share <= 0.23)


def test_fewer_tokens_are_named_when_they_help() -> None:
    row = one("1x A10", max_model_len=32768, min_concurrency=8)
    assert not row["fits"]
    length = next(problem.split()[1] for problem in row["problems"] if problem.startswith("max_model_len"))
    assert one("1x A10", max_model_len=int(length), min_concurrency=8)["fits"]


def test_a_context_beyond_the_models_is_refused_unless_allowed() -> None:
    row = one("1x H200", max_model_len=50000)
    assert "more than the model's own 32768" in row["problems"][0]
    assert one("1x H200", max_model_len=50000, env={"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"})["fits"]


def test_more_gpus_than_there_are() -> None:
    assert (
        "8 GPUs are asked for and 2 of one kind are there"
        in one("2x A10", tensor_parallel_size=4, data_parallel_size=2)["problems"][0]
    )


def test_one_that_does_not_fit_does_not_spoil_the_others() -> None:
    result = plan("1x A10", {"model": "deepseek-ai/DeepSeek-R1"}, {"model": SMALL})
    assert [row["fits"] for row in result["services"]] == [False, True]
    assert not result["fits"] and result["problems"][0].startswith("service0: ")


# -------------------------------------------------------------------------------------------------------------- CPU

CPU = [{"name": "box", "gpus": [], "cpu": {"cores": 2, "memory_total_mib": 24000, "memory_available_mib": 20000}}]


def test_a_host_without_gpus_serves_from_memory() -> None:
    row = one(CPU, model=SMALL, max_model_len=2048, runtime="venv")
    assert row["fits"], row["problems"]
    assert row["device"] == "cpu" and row["engine_version"] == load("engines")["default_version"]["cpu"]
    assert value(row, "--dtype") == "bfloat16" and "--gpu-memory-utilization" not in row["args"]
    assert 1 <= int(row["env"]["VLLM_CPU_KVCACHE_SPACE"]) <= 4
    assert row["memory"]["requested_gib"] < 20000 / 1024
    assert row["instances"][0]["hosts"] == ["box"]


def test_a_cache_is_not_larger_than_all_requests_together() -> None:
    row = one(CPU, model=SMALL, max_model_len=256, max_num_seqs=4)
    assert row["env"]["VLLM_CPU_KVCACHE_SPACE"] == "1"


def test_what_the_memory_cannot_hold_is_refused() -> None:
    row = one(CPU, model=LARGE, max_model_len=2048)
    assert "GiB of weights" in row["problems"][0] and "19.53 GiB are available" in row["problems"][0]


def test_services_on_one_cpu_share_its_memory() -> None:
    small = {"model": SMALL, "max_model_len": 2048}
    result = plan(CPU, *[small] * 2)
    assert result["fits"], result["problems"]
    assert not plan(CPU, *[small] * 6)["fits"]


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, r"vllm_services\[0\]\.name is ''"),
        ({"model": None}, r"vllm_services\[a\]\.model is None"),
        ({"model": "some/model"}, r"vllm_services\[a\]\.config is None; give the model's config.json"),
        ({"config": {"hello": 1}}, r"vllm_services\[a\]\.config"),
        ({"config": "x"}, "give a mapping"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; give a number above 0 and at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
        ({"gpu_memory_utilization": "high"}, "gpu_memory_utilization is 'high'"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization is True"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; give a whole number of at least 1"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size is 1.5"),
        ({"max_model_len": -1}, "max_model_len is -1"),
        ({"max_num_seqs": "many"}, "max_num_seqs is 'many'"),
        *(
            ({key: 10**12}, rf"vllm_services\[a\]\.{key} is 1000000000000; give a whole number from 1 to 1073741824")
            for key in ("max_num_seqs", "max_num_batched_tokens", "max_model_len")
        ),
        ({"min_concurrency": 0.5}, "min_concurrency is 0.5; give a number of at least 1"),
        ({"weights_gib": -3}, "weights_gib is -3"),
        ({"gpus": 0}, "gpus is 0; give a whole number of at least 1"),
        ({"gpus": []}, "give a number of GPUs, or a list of different indices"),
        ({"gpus": [0, 0]}, "give a number of GPUs, or a list of different indices"),
        ({"hosts": ["nobody"]}, r"vllm_services\[a\]\.hosts is 'nobody'; no such host; there are host1"),
        ({"hosts": []}, "give the names of hosts"),
        ({"engine_version": "9.9.9"}, r"vllm_services\[a\]\.engine_version is '9.9.9'; no such vLLM release"),
        ({"objective": "speed"}, "objective is 'speed'; give one of throughput, latency"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"runtime": "podman"}, "runtime is 'podman'; give one of container, venv"),
        ({"task": "chat"}, "task is 'chat'; give one of generate, embed, score"),
        ({"model": "BAAI/bge-m3", "task": "generate"}, "does not generate: give embed or score"),
        ({"executor": "slurm"}, "executor is 'slurm'; give one of ray, mp"),
        ({"port": 70000}, "port is 70000; give a port from 1 to 65535"),
        ({"enforce_eager": "perhaps"}, "enforce_eager is 'perhaps'; give true or false"),
        ({"max_model_length": 4096}, "there is no such setting; did you mean max_model_len?"),
        ({"tensor_paralel_size": 2}, "did you mean tensor_parallel_size?"),
        ({"extra_args": 5}, "extra_args is 5; give a list"),
        ({"extra_args": "--x 'y"}, r"extra_args is .*; a shell cannot read it \(No closing quotation\)"),
        ({"env": ["A"]}, "env is .*give a mapping"),
    ],
)
def test_bad_services_are_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make_plan([{"name": "a", "model": SMALL, **changes}], hosts_from_text("1x A10"))


@pytest.mark.parametrize(
    ("services", "text"),
    [
        ([], "vllm_services is .*give at least one service"),
        ("chat", "give a list"),
        ([5], "give a mapping"),
        ([{"name": "a", "model": SMALL}] * 2, "two services have this name"),
    ],
)
def test_bad_lists_of_services_are_refused(services: Any, text: str) -> None:
    with pytest.raises(PlanError, match=text):
        make_plan(services, hosts_from_text("1x A10"))


def test_more_hosts_than_needed_are_slower() -> None:
    """A model that one host holds, spread over two: the plan says so; one that needs them: it does not."""
    spread = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "max_model_len": 4096}
    small = plan("2x(2x A10)", {"model": "Qwen/Qwen2.5-7B-Instruct", "hosts": ["host1", "host2"], **spread})
    assert small["fits"], small["problems"]
    (line,) = [line for line in small["services"][0]["why"] if line.startswith("one host is enough: ")]
    assert "TP 1 x PP 1 on host1 holds 4096 tokens" in line
    assert "a request takes longer" in line
    large = plan("2x(2x A10)", {"model": "Qwen/Qwen2.5-32B-Instruct", "hosts": ["host1", "host2"], **spread})
    assert large["fits"], large["problems"]
    assert not any("one host is enough" in line for line in large["services"][0]["why"])


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 3}])
def test_fewer_hosts_are_named_when_they_are_enough(sizes: dict[str, int]) -> None:
    asked = {"model": LARGE, "max_model_len": 8192, "hosts": ["host1", "host2", "host3"], **sizes}
    row = one("3x(2x A10)", **asked)
    assert row["fits"], row["problems"]
    (line,) = [line for line in row["why"] if "enough" in line]
    assert line == (
        "2 hosts are enough: TP 2 x PP 2 holds 8192 tokens; over 3 hosts each token waits longer for the network, so that "
        "a request takes longer. Name 2 hosts only"
    )
    # Over the two that it names it says nothing more.
    two = one("3x(2x A10)", **{**asked, "hosts": ["host1", "host2"], **(sizes and {"pipeline_parallel_size": 2})})
    assert two["fits"] and not [line for line in two["why"] if "enough" in line]


@pytest.mark.parametrize("number, size, servers", [(1, (2, 1, 1), 1), (2, (2, 1, 1), 2), (3, (2, 1, 1), 3)])
def test_the_same_service_grows_with_its_hosts(number: int, size: tuple[int, ...], servers: int) -> None:
    """Its sizes left out: a model that one host holds is served by each."""
    names = [f"host{n}" for n in range(1, number + 1)]
    row = one("3x(2x A10)", model="Qwen/Qwen2.5-14B", max_model_len=8192, hosts=names)
    assert row["fits"], row["problems"]
    assert [instance["hosts"] for instance in row["instances"]] == [[name] for name in names]
    assert [sizes(instance) for instance in row["instances"]] == [size] * servers


@pytest.mark.parametrize("number, size", [(1, None), (2, (2, 2, 1)), (3, (2, 3, 1))])
def test_the_same_service_of_a_larger_model_grows_with_its_hosts(number: int, size: tuple[int, ...] | None) -> None:
    names = [f"host{n}" for n in range(1, number + 1)]
    row = one("3x(2x A10)", model=LARGE, max_model_len=8192, hosts=names, executor="mp")
    if size is None:
        assert "4 such GPUs hold it (TP 4)" in row["problems"], row["problems"]
        return
    assert row["fits"], row["problems"]
    assert (row["hosts"], sizes(row)) == (names, size)
    # TP 4 would hold it, and no host has four.
    assert [line for line in row["why"] if "does not hold" in line] == [
        "TP 2 does not hold the weights and a context of 8192 tokens"
    ]
