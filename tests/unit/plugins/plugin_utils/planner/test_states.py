# SPDX-License-Identifier: GPL-3.0-or-later
"""Models whose layers keep a state for each request (Mamba, gated delta nets), alone or with attention."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import engine_memory, lowest_utilization
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config, tp_problems
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

TYPES = [{0: "full_attention"}.get((index + 1) % 4, "linear_attention") for index in range(64)]
QWEN35: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "hidden_size": 5120, "intermediate_size": 17408, "head_dim": 256,
        "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4, "layer_types": TYPES,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
        "partial_rotary_factor": 0.25, "tie_word_embeddings": False, "vocab_size": 248320,
    },
    "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16},
}  # fmt: skip
FALCON_H1 = {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "attn_layer_indices": None, "head_dim": 128,
    "hidden_size": 3072, "intermediate_size": 12288, "mamba_d_conv": 4, "mamba_d_head": 128, "mamba_d_ssm": 3072,
    "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24, "max_position_embeddings": 262144,
    "num_attention_heads": 12, "num_hidden_layers": 44, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 130049,
}  # fmt: skip
CODESTRAL_MAMBA = {
    "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64,
    "state_size": 128, "head_dim": 64, "num_heads": 128, "n_groups": 8, "expand": 2, "conv_kernel": 4, "vocab_size": 32768,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
FALCON_MAMBA = {
    "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "hidden_size": 4096,
    "num_hidden_layers": 64, "state_size": 16, "intermediate_size": 8192, "expand": 16, "conv_kernel": 4,
    "time_step_rank": 256, "vocab_size": 65024, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip
MAMBA = {
    "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64,
    "state_size": 16, "intermediate_size": 5120, "time_step_rank": 160, "vocab_size": 50280, "conv_kernel": 4,
}  # fmt: skip
H100 = {"gpu_memory_total_mib": 81559, "max_model_len": 32768, "max_num_batched_tokens": 8192}


def one(gpus: str, **service: Any) -> dict[str, Any]:
    row: dict[str, Any] = make_plan([{"name": "s", "model": "m", **service}], hosts_from_text(gpus))["services"][0]
    return row


def test_graphs_need_a_block_for_the_state_of_each_request() -> None:
    refused = one("1x H100", config=QWEN35, max_num_seqs=1024, enforce_eager=False)
    assert not refused["fits"]
    assert "max_num_seqs 1024 is more than the" in refused["problems"][0]
    assert "or set enforce_eager" in refused["problems"][0]
    assert one("1x H100", config=QWEN35, max_num_seqs=1024)["enforce_eager"]
    # Nobody asked for 1024: a smaller batch, with graphs.
    planned = one("1x H100", config=QWEN35)
    assert planned["fits"] and not planned["enforce_eager"]
    assert planned["max_num_seqs"] == 256


def test_the_number_in_the_refusal_is_the_largest_that_starts() -> None:
    shape = parse_config(QWEN35)
    arguments = {**H100, "gpu_memory_utilization": 0.9}
    reason = engine_memory(shape, max_num_seqs=1024, **arguments).reason
    blocks = int(reason.split("Lower max_num_seqs to ")[1].split(",")[0])
    assert engine_memory(shape, max_num_seqs=blocks, **arguments).fits
    lowest = lowest_utilization(shape, max_num_seqs=512, **H100)
    assert lowest is not None and lowest > 0.9
    assert engine_memory(shape, max_num_seqs=512, gpu_memory_utilization=lowest, **H100).fits
    assert not engine_memory(shape, max_num_seqs=512, gpu_memory_utilization=lowest - 0.002, **H100).fits


def test_what_an_engine_counted_on_an_h100() -> None:
    """vllm-project/recipes#551: 856 blocks for Qwen3.6-27B-FP8, whose shape is that of Qwen3.5-27B, with utilization 0.95."""
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    plan = engine_memory(parse_config({**QWEN35, **fp8}), max_num_seqs=1024, gpu_memory_utilization=0.95, **H100)
    blocks = int(plan.reason.split("more than the ")[1].split()[0])
    assert blocks == pytest.approx(856, rel=0.06)


def test_the_config_says_in_what_dtype_a_state_is_kept() -> None:
    half = {**QWEN35, "text_config": {**QWEN35["text_config"], "mamba_ssm_dtype": None}}
    short = {**H100, "max_model_len": 16, "max_num_seqs": 1}
    wide, narrow = (engine_memory(parse_config(config), **short) for config in (QWEN35, half))
    assert wide.kv_least_gib / narrow.kv_least_gib > 1.5
    with pytest.raises(PlanError, match=r"config.mamba_ssm_dtype is 'int3'; one of"):
        parse_config({**QWEN35, "text_config": {**QWEN35["text_config"], "mamba_ssm_dtype": "int3"}})


@pytest.mark.parametrize(
    ("config", "billions", "states"),
    [(FALCON_H1, 7.59, 44), (CODESTRAL_MAMBA, 7.29, 64), (FALCON_MAMBA, 7.27, 64), (MAMBA, 2.77, 64)],
)
def test_the_parameters_are_those_that_were_published(config: dict[str, Any], billions: float, states: int) -> None:
    shape = parse_config(config)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.005)
    assert shape.states == states


def test_attention_and_state_in_one_layer_both_take_memory() -> None:
    shape = parse_config(FALCON_H1)
    assert shape.kv_bytes_per_token() == 44 * 2 * 2 * 128 * 2
    memory = engine_memory(shape, max_num_seqs=16, **H100)
    state = 44 * ((3072 + 2 * 256) * 3 + 24 * 128 * 256) * 2 / (1 << 30)
    assert memory.kv_needed_gib > 32768 * shape.kv_bytes_per_token() / (1 << 30) + state
    assert one("1x A10", config=FALCON_H1)["max_num_seqs"] < 256


def test_states_alone_do_not_grow_with_the_context() -> None:
    shape = parse_config(CODESTRAL_MAMBA)
    assert shape.kv_bytes_per_token() == 0
    state = 64 * ((8192 + 2 * 8 * 128) * 3 + 128 * 64 * 128) * 2 / (1 << 30)
    for length in (128, 2048):
        memory = engine_memory(shape, max_num_seqs=16, **{**H100, "max_model_len": length})
        assert memory.kv_needed_gib == pytest.approx(state)
    assert "128 heads of the layers with a state" in tp_problems(shape, 3)[0] + tp_problems(shape, 3)[1]


def test_a_config_without_a_largest_context_takes_the_one_that_is_asked_for() -> None:
    assert one("1x A10", config=FALCON_MAMBA)["max_model_len"] == 2048  # what vLLM takes by itself
    row = one("1x A10", config=FALCON_MAMBA, max_model_len=8192)
    assert row["fits"] and row["max_model_len"] == 8192


def test_states_of_the_v0_core_are_not_counted_and_that_is_said() -> None:
    refused = one("1x A10", config=FALCON_MAMBA, engine_version="0.7.2")
    assert refused["problems"] == [
        "the V0 core of vLLM 0.7.2 keeps the states of 64 layers outside of the KV cache, which is not counted here: take "
        "engine_version 0.25.1, on a GPU that it runs on",
        "engine_version 0.25.1 can",
    ]
    memory = engine_memory(parse_config(FALCON_MAMBA), engine_version="0.7.2", **{**H100, "max_model_len": 2048})
    assert not memory.fits and "outside of the KV cache" in memory.reason
