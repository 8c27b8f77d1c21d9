# SPDX-License-Identifier: GPL-3.0-or-later
"""Models and settings for which vLLM has no kernels on a GPU, or not in a release."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import engine_memory
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

DENSE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 152064,
}  # fmt: skip
MLA = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048,
    "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 16384, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
SPARSE = {
    **MLA, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128,
    "index_n_heads": 64, "index_topk": 2048, "q_lora_rank": 1536,
}  # fmt: skip
H200 = {"gpu_memory_total_mib": 143771, "compute_capability": "9.0"}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 64, "hidden_size": 2880,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "num_local_experts": 32, "quantization_config": {"quant_method": "mxfp4"}, "sliding_window": 128,
    "tie_word_embeddings": False, "vocab_size": 201088, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
}  # fmt: skip
GEMMA3_TEXT = {
    **GEMMA3["text_config"],
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 262144,
    "torch_dtype": "bfloat16",
}  # type: ignore[dict-item]


def one(there: str, config: dict[str, Any], **service: Any) -> dict[str, Any]:
    row: dict[str, Any] = make_plan([{"name": "s", "model": "m", "config": config, **service}], hosts_from_text(there))[
        "services"
    ][0]
    return row


@pytest.mark.parametrize(
    ("gpus", "version"), [("4x T4", None), ("2x V100-32GB", "0.8.5.post1"), ("2x V100-32GB", None)]
)
def test_latent_attention_needs_8_0(gpus: str, version: str | None) -> None:
    row = one(gpus, MLA, engine_version=version)
    assert not row["fits"]
    assert "latent attention (MLA) of deepseek_v2 needs compute capability 8.0, the GPU has 7." in row["problems"][0]
    assert one("2x A10", MLA)["fits"]


def test_sparse_attention_needs_the_gpus_of_its_backends() -> None:
    row = one("8x A100", SPARSE)
    told = "sparse attention (index_topk) of deepseek_v32 needs compute capability 9.x, 10.x, 12.x in vLLM 0.25.1, the GPU has 8.0"
    assert not row["fits"] and told in row["problems"][0]
    assert one("1x H100", SPARSE)["fits"]
    assert "9.x, 10.x in vLLM 0.16.0" in one("1x A100", SPARSE, engine_version="0.16.0")["problems"][0]


def test_the_indexer_of_sparse_attention_has_a_cache() -> None:
    plain = parse_config({key: value for key, value in SPARSE.items() if key != "index_topk"})
    assert parse_config(SPARSE).kv_bytes_per_token() - plain.kv_bytes_per_token() == 27 * 132


def test_the_indexer_is_whole_on_every_gpu() -> None:
    plain = {key: value for key, value in SPARSE.items() if key != "index_topk"}
    matrices = 27 * (1536 * 64 * 128 + 2048 * (128 + 64)) * 2 / 2**30
    for tp in (1, 4):
        with_it, without = (
            engine_memory(parse_config(config), tensor_parallel_size=tp, **H200) for config in (SPARSE, plain)
        )
        assert with_it.weights_gib - without.weights_gib == pytest.approx(matrices, rel=0.03)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, set(range(27))),
        ({"index_topk_freq": 4}, {0, 1, 5, 9, 13, 17, 21, 25}),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, {0, 1, 2, 6, 10, 14, 18, 22, 26}),
        ({"index_topk_pattern": "FSSF" + "S" * 20}, {0, 3, 24, 25, 26}),
    ],
)  # fmt: skip
def test_layers_that_read_an_earlier_choice_have_no_indexer(config: dict[str, Any], layers: set[int]) -> None:
    shape = parse_config({**SPARSE, **config})
    found = {index for index, layer in enumerate(shape.layers) if layer.attention and layer.attention.index_bytes}
    assert found == layers
    plain = parse_config({key: value for key, value in SPARSE.items() if key != "index_topk"})
    assert shape.kv_bytes_per_token() - plain.kv_bytes_per_token() == len(layers) * 132


def test_a_compressed_cache_is_not_counted() -> None:
    config = {
        **DENSE,
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "compress_ratios": [4] * 28,
    }
    row = one("8x H100", config)
    assert not row["fits"] and "(compress_ratios), which is not counted here" in row["problems"][0]


@pytest.mark.parametrize(
    ("gpus", "config", "service", "told"),
    [
        ("2x T4", DENSE, {"engine_version": "0.25.1", "kv_cache_dtype": "fp8"}, "fp8 needs compute capability 8.0 in vLLM 0.25.1"),
        ("1x V100-32GB", DENSE, {"kv_cache_dtype": "bfloat16"}, "no kv_cache_dtype bfloat16: it came with 0.11.0"),
        ("2x T4", DENSE, {"kv_cache_dtype": "bfloat16"}, "bfloat16 needs compute capability 8.0, the GPU has 7.5"),
        ("1x RTX-3090", GPT_OSS, {"kv_cache_dtype": "fp8"}, "fp8 for the attention of gpt_oss needs compute capability 8.9"),
        ("4x RTX-3090", GEMMA3, {"kv_cache_dtype": "fp8"}, "fp8 for the attention of gemma3 needs compute capability 8.9"),
        ("1x A100", {**DENSE, "head_dim": 96}, {"engine_version": "0.25.1", "kv_cache_dtype": "fp8"}, "fp8 for heads of 96 needs"),
        ("1x A100", MLA, {"kv_cache_dtype": "fp8_ds_mla"}, "is for sparse latent attention (index_topk), which deepseek_v2 has not"),
    ],
)  # fmt: skip
def test_a_cache_that_cannot_be_is_refused(
    gpus: str, config: dict[str, Any], service: dict[str, Any], told: str
) -> None:
    row = one(gpus, config, **service)
    assert not row["fits"] and told in row["problems"][0] and "leave it out" in row["problems"][0].lower()


@pytest.mark.parametrize(
    ("gpus", "config", "dtype"),
    [
        ("1x RTX-3090", DENSE, "fp8"), ("4x RTX-3090", GEMMA3_TEXT, "fp8"), ("1x L40S", GPT_OSS, "fp8"),
        ("1x H100", GPT_OSS, "fp8"), ("1x H100", SPARSE, "fp8_ds_mla"), ("1x A100", MLA, "fp8"), ("1x A100", DENSE, "bfloat16"),
    ],
)  # fmt: skip
def test_a_cache_that_can_be_is_planned(gpus: str, config: dict[str, Any], dtype: str) -> None:
    row = one(gpus, config, kv_cache_dtype=dtype)
    assert row["fits"] and row["engine_version"] == "0.25.1"


def test_an_unknown_cache_is_refused_by_the_name_of_its_service() -> None:
    with pytest.raises(PlanError, match=r"vllm_services\[s\]\.kv_cache_dtype.*fp4.*give one of auto"):
        one("1x A100", DENSE, kv_cache_dtype="fp4")


def test_weights_in_the_format_of_bitsandbytes_are_not_cut() -> None:
    config = {
        **DENSE,
        "num_hidden_layers": 84,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    row = one("2x T4", config)
    assert row["fits"] and (row["tensor_parallel_size"], row["pipeline_parallel_size"]) == (1, 2)
    refused = one("2x T4", config, tensor_parallel_size=2)
    assert (
        "TP 2 is not possible: weights in the format of bitsandbytes cannot be cut: PP divides them"
        in refused["problems"][0]
    )
    assert one("2x T4", DENSE, quantization="bitsandbytes", tensor_parallel_size=2)["fits"]


def test_weights_of_8_bit_integers_need_a_gpu_that_multiplies_them() -> None:
    parts = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    int8 = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": parts, "input_activations": parts}},
    }
    fp8 = {**int8, "config_groups": {"group_0": {"weights": {**parts, "type": "float"}, "input_activations": parts}}}
    row = one("1x RTX-5090", {**DENSE, "quantization_config": int8})
    assert (
        not row["fits"]
        and "run below compute capability 10.0, the GPU has 12.0: take weights in FP8" in row["problems"][0]
    )
    assert one("1x RTX-5090", {**DENSE, "quantization_config": fp8})["fits"]
    assert one("1x L40S", {**DENSE, "quantization_config": int8})["fits"]


def test_mxfp4_runs_with_bfloat16_only() -> None:
    row = one("1x L40S", GPT_OSS, dtype="half")
    assert row["problems"] == ["mxfp4 weights run with dtype bfloat16 only, not float16: leave dtype out"]
    assert one("1x L40S", GPT_OSS, dtype="bfloat16")["fits"]


def method(name: str, **fields: Any) -> dict[str, Any]:
    return {**DENSE, "quantization_config": {"quant_method": name, **fields}}


@pytest.mark.parametrize(
    ("name", "service", "told"),
    [
        ("aqlm", {"engine_version": "0.25.1"}, "dropped quantization method aqlm: 0.10.0 is the last with it; engine_version 0.10.0 can"),
        ("bitsandbytes", {"engine_version": "0.32.0"}, "method bitsandbytes: 0.27.1 is the last with it; later ones take it by "
         "vllm-bnb-plugin, in an `image` of your own; engine_version 0.25.1 can"),
        ("compressed-tensors", {"engine_version": "0.4.2"}, "method compressed-tensors: it came with 0.5.0; engine_version 0.25.1 can"),
        ("bitsandbytes", {"engine_version": "0.32.0", "device": "cpu"}, "vLLM 0.32.0 has dropped quantization method bitsandbytes"),
    ],
)  # fmt: skip
def test_a_release_without_the_quantization_method_is_refused(name: str, service: dict[str, Any], told: str) -> None:
    row = one("1x H100", method(name), **service)
    assert not row["fits"] and told in "; ".join(row["problems"])


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_an_image_of_the_users_own_may_have_the_plugin(device: str) -> None:
    service = {
        "engine_version": "0.32.0",
        "device": device,
        "runtime": "container",
        "image": "registry.example/vllm-bnb:1",
    }
    assert "quantization method" not in "; ".join(
        one("1x H100", method("bitsandbytes", load_in_4bit=True), **service)["problems"]
    )


def test_a_method_that_no_release_for_the_gpu_has_says_what_would_help() -> None:
    told = one("1x V100-32GB", method("auto-round", bits=4))["problems"]
    assert "came with 0.9.0" in told[0] and told[1] == "take other weights, or a GPU that such a release runs on"


@pytest.mark.parametrize("name", ["compressed-tensors", "bitsandbytes"])
@pytest.mark.parametrize("gpu", ["1x H100", "1x RTX-4090"])
def test_a_release_is_not_chosen_for_a_driver_without_the_quantization_method(name: str, gpu: str) -> None:
    config = method(name, load_in_4bit=True)
    hosts = [{**host, "driver_version": "535.183.01"} for host in hosts_from_text(gpu)]
    row = make_plan([{"name": "s", "model": "m", "config": config, "max_model_len": 4096}], hosts)["services"][0]
    assert row["fits"] and row["engine_version"] == "0.25.1"


@pytest.mark.parametrize(
    ("name", "version", "allowed"),
    [
        ("fbgemm_fp8", "0.25.1", True),
        ("fbgemm_fp8", "0.13.0", False),
        ("fp8", "0.25.1", False),
        ("hqq", "0.14.1", True),
    ],
)
def test_a_deprecated_quantization_method_is_allowed(name: str, version: str, allowed: bool) -> None:
    row = one("1x H100", method(name), engine_version=version)
    assert row["fits"] and ("--allow-deprecated-quantization" in row["args"]) == allowed


FP8_PARTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT4_PARTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("raw", "before", "first"),
    [
        ({"quant_method": "fp8"}, "0.13.0", "0.14.0"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": INT4_PARTS}}}, "0.11.2", "0.12.0"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": FP8_PARTS, "input_activations": FP8_PARTS}},
            },
            "0.14.1",
            "0.16.0",
        ),
    ],
)
def test_turing_runs_quantized_weights_from_a_release_on(raw: dict[str, Any], before: str, first: str) -> None:
    config = {**DENSE, "quantization_config": raw}
    (problem, way) = one("1x T4", config, max_model_len=4096, engine_version=before)["problems"]
    assert f"weights need compute capability 8.0 in vLLM {before}, the GPU has 7.5" in problem
    assert way == "engine_version 0.25.1 can"
    assert one("1x T4", config, max_model_len=4096, engine_version=first)["fits"]
    assert one("1x A10", config, max_model_len=4096, engine_version=before)["fits"]
