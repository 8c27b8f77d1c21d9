# SPDX-License-Identifier: GPL-3.0-or-later
"""Models and settings for which vLLM has no kernels on a GPU, or not in a release."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
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


def one(gpus: str, config: dict[str, Any], **service: Any) -> dict[str, Any]:
    row: dict[str, Any] = make_plan([{"name": "s", "model": "m", "config": config, **service}], hosts_from_text(gpus))[
        "services"
    ][0]
    return row


@pytest.mark.parametrize(("gpus", "version"), [("4x T4", None), ("2x V100-32GB", "0.8.5.post1"), ("2x V100-32GB", None)])
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


def test_a_compressed_cache_is_not_counted() -> None:
    config = {**DENSE, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "compress_ratios": [4] * 28}
    row = one("8x H100", config)
    assert not row["fits"] and "(compress_ratios), which is not counted here" in row["problems"][0]
