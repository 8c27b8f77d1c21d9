# SPDX-License-Identifier: GPL-3.0-or-later
"""Shapes of real models: parameters, KV cache, how they can be split, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import engine_memory
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import (
    ModelShape,
    expert_group,
    matrices,
    padded_vocab,
    parse_config,
    pp_layers,
    pp_problems,
    tp_problems,
    tp_sizes,
)
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[4] / "benchmarks" / "truth" / "configs.json").read_text()
)
FALCON_H1 = {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "torch_dtype": "bfloat16", "hidden_size": 5120,
    "intermediate_size": 21504, "num_hidden_layers": 72, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
    "mamba_d_ssm": 4096, "mamba_n_heads": 32, "mamba_d_head": 128, "mamba_d_state": 256, "mamba_n_groups": 2,
    "vocab_size": 261120, "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip
POWERS = [1, 2, 4, 8, 16]


def config(kind: str, architecture: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [architecture], "torch_dtype": "bfloat16", **fields}


def qwen3(layers: int, hidden: int, heads: int, inter: int) -> dict[str, Any]:
    return config(
        "qwen3", "Qwen3ForCausalLM", num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, intermediate_size=inter, vocab_size=151936, tie_word_embeddings=False,
        max_position_embeddings=40960,
    )  # fmt: skip


BAICHUAN = config(
    "baichuan", "BaichuanForCausalLM", num_hidden_layers=32, hidden_size=4096, num_attention_heads=32,
    intermediate_size=11008, vocab_size=125696, model_max_length=4096, max_position_embeddings=4096,
    auto_map={"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
)  # fmt: skip
DEEPSEEK_R1 = config(
    "deepseek_v3", "DeepseekV3ForCausalLM", num_hidden_layers=61, hidden_size=7168, num_attention_heads=128,
    num_key_value_heads=128, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, moe_layer_freq=1, kv_lora_rank=512,
    q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, vocab_size=129280,
    max_position_embeddings=163840, tie_word_embeddings=False,
    rope_scaling={"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
    quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
)  # fmt: skip
STEP = config(
    "step3p5", "Step3p5ForCausalLM", num_hidden_layers=45, hidden_size=4096, num_attention_heads=64,
    num_attention_groups=8, head_dim=128, intermediate_size=11264, moe_intermediate_size=1280, moe_num_experts=288,
    moe_top_k=8, share_expert_dim=1280, moe_layers_enum=",".join(map(str, range(3, 45))), vocab_size=128896,
    max_position_embeddings=262144, sliding_window=512, tie_word_embeddings=False,
    layer_types=["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(48)],
    attention_other_setting={
        "attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128,
    },
)  # fmt: skip
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
STEP_VL = {
    "architectures": ["StepVLForConditionalGeneration"],
    "model_type": "step_vl",
    "auto_map": {"AutoModel": "modeling.StepVL"},
    "text_config": {k: v for k, v in qwen3(36, 4096, 32, 12288).items() if k != "architectures"},
    "vision_config": {"width": 1536, "layers": 47, "heads": 16, "mlp_ratio": 5.83},
}


@pytest.mark.parametrize(
    ("source", "billions", "kv_bytes", "sizes", "longest"),
    [
        pytest.param(CONFIGS["qwen2.5-1.5b"], 1.54, 28672, [1, 2, 4], 32768, id="qwen2.5-1.5b"),
        pytest.param(CONFIGS["qwen2.5-7b"], 7.6, 57344, [1, 2, 4], 32768, id="qwen2.5-7b"),
        pytest.param(CONFIGS["qwen2.5-14b"], 14.7, 196608, [1, 2, 4, 8], 32768, id="qwen2.5-14b"),
        pytest.param(CONFIGS["qwen2.5-32b"], 32.7, 262144, [1, 2, 4, 8], 32768, id="qwen2.5-32b"),
        pytest.param(qwen3(40, 5120, 40, 17408), 14.8, 163840, [1, 2, 4, 8], 40960, id="qwen3-14b"),
        pytest.param(qwen3(64, 5120, 64, 25600), 32.8, 262144, POWERS, 40960, id="qwen3-32b"),
        pytest.param(CONFIGS["llama-2-7b"], 6.7, 524288, POWERS, 4096, id="llama-2-7b"),
        pytest.param(CONFIGS["mistral-7b"], 7.25, 131072, POWERS, 32768, id="mistral-7b"),
        pytest.param(CONFIGS["falcon-7b"], 6.92, 8192, [1], 2048, id="falcon-7b"),
        pytest.param(BAICHUAN, 7.5, 524288, POWERS, 4096, id="baichuan2-7b"),
        pytest.param(CONFIGS["bge-m3"], 0.567, 0, POWERS, 8192, id="bge-m3"),
        pytest.param(CONFIGS["bge-reranker-base"], 0.278, 0, [1, 2, 4], 512, id="bge-reranker-base"),
        pytest.param(DEEPSEEK_R1, 671, 70272, POWERS, 163840, id="deepseek-r1"),
        pytest.param(STEP, 196, 45 * 4096, POWERS, 262144, id="step-3.5-flash"),
        pytest.param(STEP_VL, 10.0, 147456, POWERS, 40960, id="step3-vl-10b"),
    ],
)
def test_models_of_the_seeds(
    source: dict[str, Any], billions: float, kv_bytes: int, sizes: list[int], longest: int
) -> None:
    shape = parse_config(source)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.02)
    assert shape.kv_bytes_per_token() == kv_bytes
    assert tp_sizes(source, 16) == sizes
    assert shape.max_position == longest


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("InternVLChatModel", "generate"), ("GPT2LMHeadModel", "generate"), ("QWenLMHeadModel", "generate"),
        ("ChatGLMModel", "generate"), ("Qwen2_5OmniModel", "generate"), ("UltravoxModel", "generate"),
        ("Qwen2Model", "pool"), ("JinaEmbeddingsV5Model", "pool"), ("Qwen2ForRewardModel", "pool"),
    ],
)  # fmt: skip
def test_a_model_in_the_name_of_a_class_does_not_always_pool(architecture: str, kind: str) -> None:
    shape = parse_config({**qwen3(8, 1024, 16, 4096), "architectures": [architecture]})
    assert shape.kind == kind
    heads = [name for name, *_ in matrices(shape, 1, 1, range(8), True, True) if name == "lm_head"]
    assert bool(heads) == (kind == "generate")


def test_step_flash_in_fp8_blocks_splits_over_two_gpus_at_most() -> None:
    source = {**STEP, "quantization_config": FP8_BLOCKS}
    assert tp_sizes(source, 8) == [1, 2]
    assert (
        "TP 4 is not possible: expert intermediate size 1280 in fp8 blocks of 128 leaves 320 for each GPU"
        in tp_problems(parse_config(source), 4)
    )
    # Dealing whole experts out does not help: the shared expert is still cut.
    assert any("shared expert" in r for r in tp_problems(parse_config(source), 4, expert_parallel=True))
    assert not tp_problems(parse_config(source), 2, expert_parallel=True, data_parallel_size=4)


def test_reasons_name_the_numbers() -> None:
    shape = parse_config(CONFIGS["qwen2.5-32b"])
    assert tp_problems(shape, 3) == ["TP 3 is not possible: 40 attention heads"]
    assert tp_problems(shape, 6) == ["TP 6 is not possible: 40 attention heads"]
    assert "TP 5 is not possible: 8 KV heads can neither be divided nor repeated" in tp_problems(shape, 5)
    assert tp_problems(shape, 1) == tp_problems(shape, 8) == []
    assert tp_problems(parse_config(CONFIGS["qwen3-30b-a3b"]), 2, expert_parallel=True, data_parallel_size=3) == [
        "TP 2 is not possible: 128 experts cannot be dealt evenly over 6 GPUs"
    ]


def test_kv_heads_are_repeated_when_there_are_fewer_than_gpus() -> None:
    shape = parse_config(CONFIGS["qwen2.5-1.5b"])
    assert shape.kv_bytes_per_token(2) == shape.kv_bytes_per_token() // 2
    assert shape.kv_bytes_per_token(4) == shape.kv_bytes_per_token(2)


def test_a_latent_cache_is_not_split() -> None:
    shape = parse_config(DEEPSEEK_R1)
    assert shape.kv_bytes_per_token(8) == shape.kv_bytes_per_token(1) == 61 * (512 + 64) * 2


def test_a_latent_that_is_spread_over_all_heads_is_split() -> None:
    minicpm3 = config(
        "minicpm3", "MiniCPM3ForCausalLM", hidden_size=2560, intermediate_size=6400, num_hidden_layers=62,
        num_attention_heads=40, num_key_value_heads=40, kv_lora_rank=256, q_lora_rank=768, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, vocab_size=73448, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    shape = parse_config(minicpm3)
    assert shape.parameters / 1e9 == pytest.approx(4.07, rel=0.01)
    assert (shape.kv_bytes_per_token(), shape.kv_bytes_per_token(8)) == (952_320, 119_040)


def test_layers_that_have_all_parts_twice() -> None:
    longcat = config(
        "longcat_flash", "LongcatFlashForCausalLM", hidden_size=6144, ffn_hidden_size=12288, expert_ffn_hidden_size=2048,
        num_layers=28, num_attention_heads=64, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=512, zero_expert_num=256, moe_topk=12, vocab_size=131072,
        max_position_embeddings=131072, tie_word_embeddings=False,
    )  # fmt: skip
    shape = parse_config(longcat)
    assert shape.parameters / 1e9 == pytest.approx(560, rel=0.01)
    assert shape.kv_bytes_per_token() == 2 * 28 * (512 + 64) * 2


def test_layers_of_nemotron_nas_have_sizes_of_their_own() -> None:
    def block(group: int | None, mult: float | None) -> dict[str, Any]:
        return {
            "attention": {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": False},
            "ffn": {"ffn_mult": mult, "no_op": mult is None, "replace_with_linear": False},
        }

    nas = config(
        "nemotron-nas", "DeciLMForCausalLM", hidden_size=8192, intermediate_size=None, num_attention_heads=64,
        num_hidden_layers=4, num_key_value_heads=None, vocab_size=128256, max_position_embeddings=131072,
        block_configs=[block(8, 5.25), block(16, 1.0), block(None, 2.625), block(None, None)],
    )  # fmt: skip
    shape = parse_config(nas)
    kv = [layer.attention.kv_heads if layer.attention else 0 for layer in shape.layers]
    assert kv == [8, 4, 0, 0]
    assert [layer.mlp.intermediate if layer.mlp else 0 for layer in shape.layers] == [28672, 5632, 14336, 0]
    assert shape.kv_bytes_per_token() == (8 + 4) * 2 * 128 * 2
    nas["block_configs"][0]["attention"]["n_heads_in_group"] = None
    with pytest.raises(PlanError, match=r"config\.block_configs\[0\]\.attention\.n_heads_in_group"):
        parse_config(nas)


def test_fields_in_parts_of_a_config() -> None:
    dbrx = config(
        "dbrx", "DbrxForCausalLM", d_model=6144, n_heads=48, n_layers=40, max_seq_len=32768, vocab_size=100352,
        attn_config={"kv_n_heads": 8, "model_type": "", "clip_qkv": 8, "rope_theta": 500000},
        ffn_config={"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "model_type": ""},
        tie_word_embeddings=False,
    )  # fmt: skip
    shape = parse_config(dbrx)
    assert shape.parameters / 1e9 == pytest.approx(132, rel=0.01)
    assert (shape.experts, shape.experts_per_token, shape.kv_heads, shape.max_position) == (16, 4, 8, 32768)


def test_quantization_groups_must_not_straddle_the_cut() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
    odd = {**CONFIGS["llama-2-7b"], "intermediate_size": 11008, "quantization_config": awq}
    assert tp_sizes(CONFIGS["llama-2-7b"], 8) == [1, 2, 4, 8]
    assert tp_sizes(odd, 8) == [1, 2]  # 11008 / 4 = 2752 = 21.5 groups of 128
    assert "groups of 128 leaves 2752" in tp_problems(parse_config(odd), 4)[0]


def qwen3_moe(raw: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-30B-A3B."""
    return config(
        "qwen3_moe", "Qwen3MoeForCausalLM", num_hidden_layers=48, hidden_size=2048, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, vocab_size=151936, tie_word_embeddings=False, max_position_embeddings=40960,
        quantization_config=raw,
    )  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def test_groups_of_experts_are_halved_where_the_release_can() -> None:
    shape = parse_config(qwen3_moe(GPTQ))
    assert tp_sizes(qwen3_moe(GPTQ), 8) == [1, 2, 4, 8]  # 768 / 4 = 192 = 3 groups of 64, 768 / 8 = 96 = 3 of 32
    assert tp_sizes(qwen3_moe({"quant_method": "awq", "bits": 4, "group_size": 128}), 8) == [1, 2, 4, 8]
    for version in ("0.13.0", "0.25.1"):
        assert not tp_problems(shape, 4, engine_version=version)
    assert "groups of 128 leaves 192" in tp_problems(shape, 4, engine_version="0.12.0")[0]
    assert expert_group(shape.quant, 2048, 192) == 64  # type: ignore[arg-type]
    assert expert_group(shape.quant, 2048, 48) == 0  # type: ignore[arg-type]
    assert "leaves 48" in tp_problems(shape, 16)[0] + tp_problems(shape, 16)[-1]


def test_other_groups_of_experts_are_not_halved() -> None:
    packed = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}},
    }
    for raw in ({**GPTQ, "desc_act": True}, packed):
        assert tp_sizes(qwen3_moe(raw), 8) == [1, 2]


# Real files of config.json, which leave out what equals the default of their classes.
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
    },
}
ROPE8 = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, "model_type": "gemma3_text"}
GEMMA3_4B = {
    **GEMMA3,
    "text_config": {**ROPE8, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
}
GEMMA3_27B = {
    **GEMMA3,
    "text_config": {
        **ROPE8, "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16,
    },
}  # fmt: skip
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096, "model_type": "llama",
        "torch_dtype": "float16", "vocab_size": 32064,
    },
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "billions", "heads", "context"),
    [
        (GEMMA3_4B, 4.30, (8, 4, 256), 131072),
        (GEMMA3_27B, 27.4, (32, 16, 128), 131072),
        (LLAVA, 7.06, (32, 32, 128), 4096),
    ],
)
def test_what_a_config_leaves_out_is_what_its_class_says(
    raw: dict[str, Any], billions: float, heads: tuple[int, int, int], context: int
) -> None:
    shape = parse_config(raw)
    assert shape.parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == heads
    assert shape.max_position == context


def test_a_field_that_nobody_knows_is_asked_for_where_it_can_be_given() -> None:
    with pytest.raises(
        PlanError, match="give the whole file as `config` of the service, with num_attention_heads in it"
    ):
        parse_config(config("other", "OtherForCausalLM", hidden_size=4096, num_hidden_layers=32, vocab_size=32000))


@pytest.mark.parametrize(
    ("raw", "method", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq", 4),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq", 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq", 4),
        (FP8_BLOCKS, "fp8", 8),
        ({"quant_method": "mxfp4"}, "mxfp4", 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", 4),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt_fp4", 4),
        (CONFIGS["llama-3.1-8b-w4a16"]["quantization_config"], "compressed-tensors", 4),
        (CONFIGS["llama-3.1-8b-w8a8-fp8"]["quantization_config"], "compressed-tensors", 8),
    ],
)
def test_quantized_checkpoints(raw: dict[str, Any], method: str, bits: int) -> None:
    shape = parse_config({**CONFIGS["llama-3.1-8b"], "quantization_config": raw})
    assert shape.quantization == method
    assert shape.quant is not None and shape.quant.bits == bits


def test_an_unknown_quantization_is_planned_and_said() -> None:
    shape = parse_config({**CONFIGS["llama-3.1-8b"], "quantization_config": {"quant_method": "shiny", "bits": 3}})
    assert shape.quant is not None and shape.quant.bits == 3
    assert "shiny is not known" in " ".join(shape.notes)


def kinds(shape: ModelShape) -> list[str]:
    return [layer.attention.kind if layer.attention else "none" for layer in shape.layers]


def test_layer_kinds() -> None:
    gemma = kinds(parse_config(CONFIGS["gemma-3-1b"]))
    assert gemma.count("full") == 4 and gemma[5] == "full" and gemma[0] == "sliding"
    assert kinds(parse_config(CONFIGS["gpt-oss-20b"]))[:2] == ["sliding", "full"]
    assert set(kinds(parse_config(CONFIGS["mistral-7b-swa"]))) == {"sliding"}
    assert set(kinds(parse_config(CONFIGS["qwen2.5-14b"]))) == {"full"}  # names a window and switches it off
    mixed = {**CONFIGS["qwen3-8b"], "layer_types": ["linear_attention"] * 3 + ["full_attention"] + ["odd"] * 32}
    shape = parse_config({**mixed, "linear_num_value_heads": 32, "linear_num_key_heads": 16})
    assert kinds(shape)[:5] == ["state"] * 3 + ["full", "full"]
    assert any("odd is not known" in note for note in shape.notes) and shape.confidence == "medium"
    jamba = {**CONFIGS["llama-3.1-8b"], "model_type": "jamba", "attn_layer_period": 8, "attn_layer_offset": 4}
    assert kinds(parse_config(jamba)).count("full") == 4
    llama4 = {**CONFIGS["llama-3.1-8b"], "attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0] * 8}
    assert kinds(parse_config(llama4))[:4] == ["chunked", "chunked", "chunked", "full"]


GEMMA4_31B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "text_config": {
        "model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
        "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4, "attention_k_eq_v": True,
        "head_dim": 256, "global_head_dim": 512, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
        "sliding_window": 1024, "max_position_embeddings": 262144, "vocab_size": 262144, "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27},
}  # fmt: skip


def heads(shape: ModelShape, kind: str) -> tuple[int, int, int, int, int]:
    """(heads, KV heads, head_dim, that of values, window) of the layers of a kind."""
    a = next(layer.attention for layer in shape.layers if layer.attention and layer.attention.kind == kind)
    return a.heads, a.kv_heads, a.head_dim, a.v_dim, a.window


def test_full_layers_of_gemma_4_have_other_heads() -> None:
    shape = parse_config(GEMMA4_31B)
    assert heads(shape, "full") == (32, 4, 512, 512, 0)
    assert heads(shape, "sliding") == (32, 16, 256, 256, 1024)
    memory = engine_memory(
        shape, gpu_memory_total_mib=81559, gpu_memory_utilization=0.95, max_model_len=131072, max_num_seqs=16
    )
    assert memory.fits and memory.kv_needed_gib == pytest.approx(12.36, abs=0.01)
    assert "runs heads of at most 512 bytes" in refusal("1x RTX-2080-Ti-22GB", GEMMA4_31B)
    # Without attention_k_eq_v they have as many KV heads as the others.
    own = {**GEMMA4_31B["text_config"], "attention_k_eq_v": False}  # type: ignore[dict-item]
    assert heads(parse_config({**GEMMA4_31B, "text_config": own}), "full") == (32, 16, 512, 512, 0)


def test_the_last_layers_of_small_gemma_4_have_no_kv_cache_of_their_own() -> None:
    """E2B: layers 15 to 34 read that of layers 13 and 14 (vLLM's gemma4.py), and are twice as wide."""
    text = {
        **GEMMA4_31B["text_config"], "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35,
        "num_attention_heads": 8, "num_key_value_heads": 1, "attention_k_eq_v": False, "num_kv_shared_layers": 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "sliding_window": 512,
        "use_double_wide_mlp": True,
    }  # type: ignore[dict-item] # fmt: skip
    shape = parse_config({**GEMMA4_31B, "text_config": text})
    assert [bool(layer.attention and layer.attention.shared) for layer in shape.layers] == [False] * 15 + [True] * 20
    assert shape.kv_bytes_per_token() == 12 * 2 * 256 * 2 + 3 * 2 * 512 * 2
    assert [layer.mlp.intermediate for layer in shape.layers if layer.mlp] == [6144] * 15 + [12288] * 20
    own = parse_config({**GEMMA4_31B, "text_config": {**text, "num_kv_shared_layers": 0}})
    assert own.kv_bytes_per_token() == 28 * 2 * 256 * 2 + 7 * 2 * 512 * 2
    needs = [
        engine_memory(each, gpu_memory_total_mib=24576, gpu_memory_utilization=0.9, max_model_len=32768).kv_needed_gib
        for each in (shape, own)
    ]
    assert needs[0] < 0.5 * needs[1]


def refusal(there: str, raw: dict[str, Any], **service: Any) -> str:
    services = [{"name": "a", "model": "some/model", "config": raw, "trust_remote_code": True, **service}]
    return " ".join(make_plan(services, hosts_from_text(there))["services"][0]["problems"])


MIMO_V2_FLASH = config(
    "mimo_v2_flash", "MiMoV2FlashForCausalLM", head_dim=192, v_head_dim=128, swa_head_dim=192, swa_v_head_dim=128,
    swa_num_attention_heads=64, swa_num_key_value_heads=8, hidden_size=4096, intermediate_size=16384,
    moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, num_attention_heads=64,
    num_key_value_heads=4, num_hidden_layers=48, sliding_window=128, sliding_window_size=128, moe_layer_freq=[0] + [1] * 47,
    hybrid_layer_pattern=[0] + [1, 1, 1, 1, 1, 0] * 7 + [1, 1, 1, 1, 0], max_position_embeddings=262144, vocab_size=152576,
    tie_word_embeddings=False, quantization_config=FP8_BLOCKS,
)  # fmt: skip
KIMI_LINEAR = config(
    "kimi_linear", "KimiLinearForCausalLM", first_k_dense_replace=1, head_dim=72, hidden_size=2304, intermediate_size=9216,
    kv_lora_rank=512, model_max_length=1048576, moe_intermediate_size=1024, moe_layer_freq=1, num_attention_heads=32,
    num_experts=256, num_experts_per_token=8, num_hidden_layers=27, num_key_value_heads=32, num_shared_experts=1,
    q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=163840,
    tie_word_embeddings=False, linear_attn_config={
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4,
        "kda_layers": [i for i in range(1, 27) if i % 4],
    },
)  # fmt: skip


def test_layers_of_two_kinds_under_other_names() -> None:
    mimo = parse_config(MIMO_V2_FLASH)
    assert kinds(mimo).count("full") == 9 and kinds(mimo)[:7] == ["full", *["sliding"] * 5, "full"]
    assert heads(mimo, "full") == (64, 4, 192, 128, 0)
    assert heads(mimo, "sliding") == (64, 8, 192, 128, 128)
    assert mimo.parameters / 1e9 == pytest.approx(309, rel=0.005)
    kimi = parse_config(KIMI_LINEAR)
    assert kinds(kimi)[:4] == ["state", "state", "state", "mla"] and kinds(kimi).count("mla") == 7
    assert kimi.parameters / 1e9 == pytest.approx(49.1, rel=0.005)
    assert (kimi.max_position, kimi.experts_per_token) == (1048576, 8)
    state = kimi.layers[0].attention
    assert state and (state.state, state.state_bytes) == ((3 * 4096 * 3, 32 * 128 * 128), 4)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),  # Command-R
        ({"max_position_embeddings": 8192, "model_max_length": 4096}, 4096),
        ({"max_position_embeddings": 8192, "seq_len": 4096}, 4096),
        ({"max_target_positions": 448}, 448),
        ({"max_seq_length": 1024}, 1024),
    ],
)
def test_limits_of_the_context_have_many_names(fields: dict[str, int], context: int) -> None:
    bare = {
        key: item
        for key, item in CONFIGS["llama-3.1-8b"].items()
        if key not in ("max_position_embeddings", "rope_scaling")
    }
    assert parse_config({**bare, **fields}).max_position == context


def test_which_layers_have_experts() -> None:
    r1 = parse_config(DEEPSEEK_R1)
    assert [bool(layer.mlp and layer.mlp.experts) for layer in r1.layers[:4]] == [False, False, False, True]
    every_second = {**CONFIGS["qwen3-30b-a3b"], "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    sparse = [bool(layer.mlp and layer.mlp.experts) for layer in parse_config(every_second).layers]
    assert sparse[:4] == [False, False, False, True]


LLAMA4_SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "model_type": "llama4",
    "text_config": {
        "attention_chunk_size": 8192, "head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1,
        "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 10485760,
        "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1,
        "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 16, "vocab_size": 202048,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    },
    "vision_config": {"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34},
}  # fmt: skip
NEMOTRON3_NANO = config(
    "nemotron_h", "NemotronHForCausalLM", hidden_size=2688, intermediate_size=1856, moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712, n_routed_experts=128, n_shared_experts=1, num_experts_per_tok=6,
    num_attention_heads=32, num_key_value_heads=2, head_dim=128, num_hidden_layers=52,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", mamba_num_heads=64, mamba_head_dim=64,
    ssm_state_size=128, n_groups=8, conv_kernel=4, expand=2, max_position_embeddings=262144, vocab_size=131072,
    tie_word_embeddings=False,
)  # fmt: skip


NEMOTRON3_SUPER = {
    **NEMOTRON3_NANO, "hidden_size": 4096, "intermediate_size": 2688, "moe_intermediate_size": 2688, "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376, "n_routed_experts": 512, "num_experts_per_tok": 22, "num_hidden_layers": 88,
    "hybrid_override_pattern": "ME" * 40 + "*" * 8, "mamba_num_heads": 128,
}  # fmt: skip
# Its config names the kinds of layers in words, and no number of them.
NEMOTRON3_ULTRA = {
    **{key: item for key, item in NEMOTRON3_SUPER.items() if key != "hybrid_override_pattern"}, "hidden_size": 8192,
    "intermediate_size": 5120, "moe_intermediate_size": 5120, "moe_latent_size": 2048, "num_hidden_layers": None,
    "moe_shared_expert_intermediate_size": 10240, "num_attention_heads": 64, "mamba_num_heads": 256,
    "layers_block_type": ["mamba", "moe"] * 48 + ["attention"] * 12,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "billions"),
    [(LLAMA4_SCOUT, 108.6), (NEMOTRON3_NANO, 31.6), (NEMOTRON3_SUPER, 120.6), (NEMOTRON3_ULTRA, 550)],
)
def test_experts_of_other_forms(raw: dict[str, Any], billions: float) -> None:
    """Llama 4 has a shared expert that its config does not name; the MLPs of Nemotron-H have no gate, its experts a latent."""
    assert parse_config(raw).parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_a_latent_is_whole_on_every_gpu_and_makes_the_experts_room_small() -> None:
    shape = parse_config(NEMOTRON3_SUPER)
    for tp in (1, 4):
        found = [
            (rows, columns)
            for name, rows, columns, _ in matrices(shape, tp, 1, range(88), True, True)
            if "latent" in name
        ]
        assert found == [(1024, 4096), (4096, 1024)] * 40
    wide = parse_config({**NEMOTRON3_SUPER, "moe_latent_size": None})
    gpu = {
        "gpu_memory_total_mib": 143771,
        "compute_capability": "9.0",
        "tensor_parallel_size": 8,
        "max_num_batched_tokens": 8192,
    }
    small, large = (engine_memory(one, **gpu).activation_gib for one in (shape, wide))
    # 22 experts a token read and write 4096 elements of 2 bytes instead of 1024.
    assert large - small == pytest.approx(8192 * 22 * 2 * (4096 - 1024) * 2 / 2**30, rel=0.01)


@pytest.mark.parametrize("field", ["layers_block_type", "layer_types"])
def test_layers_named_in_words_are_those_of_the_letters(field: str) -> None:
    words = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
    pattern = "ME*-" * 22
    letters = parse_config({**NEMOTRON3_SUPER, "hybrid_override_pattern": pattern})
    named = parse_config({**NEMOTRON3_ULTRA, **{key: NEMOTRON3_SUPER[key] for key in ("hidden_size", "moe_latent_size", "mamba_num_heads",
        "num_attention_heads", "moe_intermediate_size", "intermediate_size", "moe_shared_expert_intermediate_size")},
        "layers_block_type": None, field: [words[letter] for letter in pattern]})  # fmt: skip
    assert named.layers == letters.layers and named.num_layers == 88


def test_experts_of_unlike_sizes() -> None:
    blocks = [
        {"block_type": "moe", "moe_intermediate_size": 1280, "num_experts_per_tok": 4},
        {"block_type": "attention"},
    ]
    pattern = {"hybrid_override_pattern": "E*", "num_hidden_layers": 2}
    own = parse_config({**NEMOTRON3_SUPER, **pattern, "block_configs": blocks}).layers[0].mlp
    assert own and (own.expert_size, own.top_k, own.latent) == (1280, 4, 1024)
    with pytest.raises(PlanError, match=r"config.block_configs\[0\].num_experts_per_tok"):
        parse_config({**NEMOTRON3_SUPER, **pattern, "block_configs": [{"num_experts_per_tok": 513}]})


def test_dense_layers_of_llama_4_have_a_size_of_their_own() -> None:
    maverick = {**LLAMA4_SCOUT["text_config"], "interleave_moe_layer_step": 2, "num_local_experts": 128}  # type: ignore[dict-item]
    layers = parse_config({**LLAMA4_SCOUT, "text_config": maverick}).layers
    dense, sparse = layers[0].mlp, layers[1].mlp
    assert dense and sparse and (dense.experts, dense.intermediate) == (0, 16384)
    assert (sparse.experts, sparse.expert_size, sparse.shared_size) == (128, 8192, 8192)


def test_an_unknown_architecture_says_how_sure_it_is() -> None:
    shape = parse_config({**CONFIGS["llama-3.1-8b"], "architectures": ["NovelForCausalLM"], "model_type": "novel"})
    assert shape.confidence == "medium" and "general rules" in shape.notes[0]
    nameless = {k: v for k, v in CONFIGS["llama-3.1-8b"].items() if k != "architectures"}
    assert parse_config(nameless).confidence == "low"
    assert parse_config(CONFIGS["llama-3.1-8b"]).confidence == "high"


def test_vision_towers_by_their_names() -> None:
    towers = {"clip-l-14-224": {"layers": 24, "width": 1024}, "sam_vit_b": {"layers": 12, "width": 768}}
    text = qwen3(8, 1024, 16, 4096)
    vision = {"mlp_ratio": 3.7362, "width": towers}
    shape = parse_config({**text, "architectures": ["DeepseekOCRForCausalLM"], "vision_config": vision})
    assert shape.vision_parameters / 1e6 == pytest.approx(302 + 85, rel=0.01)
    towers["sam_vit_b"]["width"] = -1
    with pytest.raises(PlanError, match=r"^config\.vision_config\.width is -1"):
        parse_config({**text, "vision_config": vision})


def test_attention_that_is_replaced_by_a_matrix_is_named() -> None:
    blocks = [{"attention": {"n_heads_in_group": None, "replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}}]
    config = {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "hidden_size": 64, "num_attention_heads": 8,
        "num_hidden_layers": 1, "vocab_size": 128, "intermediate_size": 128, "block_configs": blocks,
    }  # fmt: skip
    with pytest.raises(PlanError, match=r"block_configs\[0\].attention.replace_with_linear is True; attention that is"):
        parse_config(config)


def test_weight_sizes_can_be_given() -> None:
    sizes = {"model-00001.safetensors": 8 << 30, "model-00002.safetensors": 7 << 30}
    assert parse_config(CONFIGS["llama-3.1-8b"], safetensors=sizes).weights_gib == 15
    assert parse_config(CONFIGS["llama-3.1-8b"], safetensors=sizes, weights_gib=15.2).weights_gib == 15.2


@pytest.mark.parametrize(
    "architecture", ["Gemma3nForCausalLM", "Idefics3ForConditionalGeneration", "Zamba2ForCausalLM"]
)
def test_classes_without_pipeline_stages(architecture: str) -> None:
    shape = parse_config({**qwen3(8, 1024, 16, 4096), "architectures": [architecture]})
    assert pp_problems(shape, 2) == [f"PP 2 is not possible: {architecture} cannot be split into stages"]
    assert pp_problems(shape, 1) == []


def test_groups_of_heads_with_a_state_are_divided_or_one() -> None:
    def sizes(groups: int) -> list[int]:
        return tp_sizes({**FALCON_H1, "mamba_n_groups": groups}, 8)

    assert (sizes(1), sizes(2), sizes(4)) == ([1, 2, 4], [1, 2], [1, 2, 4])
    shape = parse_config({**FALCON_H1, "mamba_n_groups": 2})
    assert tp_problems(shape, 4) == ["TP 4 is not possible: 2 groups of heads of the layers with a state"]


def test_pipeline_stages() -> None:
    assert [len(stage) for stage in pp_layers(28, 2)] == [14, 14]
    assert [len(stage) for stage in pp_layers(61, 4)] == [15, 15, 16, 15]
    assert [len(stage) for stage in pp_layers(30, 4)] == [7, 8, 8, 7]
    shape = parse_config(CONFIGS["qwen2.5-7b"])
    assert not pp_problems(shape, 3, engine_version="0.25.1")
    assert "has no pipeline parallelism" in pp_problems(shape, 2, engine_version="0.3.0")[0]
    assert "28 layers" in pp_problems(shape, 29)[0]
    assert pp_problems(parse_config(CONFIGS["bge-m3"]), 2)


BASE = CONFIGS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("broken", "field"),
    [
        ("config.json", "config"),
        ([], "config"),
        ({}, "config"),
        ({"name": "package", "version": "1.0"}, "config.architectures"),
        ({"model_type": "llama"}, "config.hidden_size"),
        ({**BASE, "hidden_size": -4096}, "config.hidden_size"),
        ({**BASE, "hidden_size": "4096"}, "config.hidden_size"),
        ({**BASE, "num_hidden_layers": 0}, "config.num_hidden_layers"),
        ({**BASE, "num_attention_heads": 7}, "config.num_attention_heads"),
        ({**BASE, "num_key_value_heads": 5}, "config.num_key_value_heads"),
        ({**BASE, "vocab_size": True}, "config.vocab_size"),
        ({**BASE, "torch_dtype": "int3"}, "config.torch_dtype"),
        ({**BASE, "architectures": "LlamaForCausalLM"}, "config.architectures"),
        ({**BASE, "quantization_config": "awq"}, "config.quantization_config"),
        ({**BASE, "quantization_config": {"quant_method": "awq", "bits": 5}}, "config.quantization_config.bits"),
        ({**BASE, "num_local_experts": 4, "num_experts_per_tok": 8}, "config.num_experts_per_tok"),
        ({**BASE, "rope_scaling": {"type": "yarn", "factor": "x"}}, "config.rope_scaling.factor"),
        ({**BASE, "rope_scaling": {"type": "linear", "factor": math.nan}}, "config.rope_scaling.factor"),
        (
            {**BASE, "rope_scaling": None, "rope_parameters": {"type": "yarn", "factor": math.inf}},
            "config.rope_parameters.factor",
        ),
        (
            {**BASE, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": ["a"]}},
            "config.rope_scaling.original_max_position_embeddings",
        ),
        (
            {**BASE, "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": math.nan}},
            "config.rope_scaling.original_max_position_embeddings",
        ),
        ({**BASE, "num_experts": 4, "mlp_only_layers": "x"}, "config.mlp_only_layers"),
        ({**BASE, "attention_chunk_size": 64, "no_rope_layers": [1]}, "config.no_rope_layers"),
        ({**BASE, "attention_chunk_size": 64, "no_rope_layers": "x"}, "config.no_rope_layers"),
        ({**MIMO_V2_FLASH, "hybrid_layer_pattern": [0, 1]}, "config.hybrid_layer_pattern"),
        ({**KIMI_LINEAR, "linear_attn_config": {"kda_layers": 1}}, "config.linear_attn_config.kda_layers"),
        ({**DEEPSEEK_R1, "qk_rope_head_dim": ["a"]}, "config.qk_rope_head_dim"),
        ({**NEMOTRON3_NANO, "mamba_ssm_cache_dtype": [1]}, "config.mamba_ssm_cache_dtype"),
    ],
)
def test_what_is_no_models_config_is_refused_by_field(broken: Any, field: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_config(broken)
    assert caught.value.field == field
    assert field in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"weights_gib": -1}, "weights_gib"),
        ({"weights_gib": "15"}, "weights_gib"),
        ({"safetensors": {"a": -5}}, "safetensors[a]"),
        ({"safetensors": ["a"]}, "safetensors"),
        ({"quantization": "awq"}, "quantization"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_config(BASE, **arguments)
    assert caught.value.field == field


def test_another_quantization_than_the_checkpoints_is_refused() -> None:
    with pytest.raises(PlanError, match="quantization is 'fp8'; the checkpoint is quantized with awq"):
        parse_config(CONFIGS["qwen2.5-7b-awq"], quantization="fp8")
    assert parse_config(CONFIGS["qwen2.5-7b-awq"], quantization="awq_marlin").quantization == "awq"


@pytest.mark.parametrize("size", [0, -2, 1.5, "2", True, 4096])
def test_bad_largest_size(size: Any) -> None:
    with pytest.raises(PlanError, match="max is"):
        tp_sizes(BASE, size)


@settings(max_examples=150, deadline=None)
@given(
    heads=st.integers(1, 96),
    repeat=st.sampled_from([1, 2, 3, 4, 5, 7, 8]),
    inter=st.integers(64, 40000),
    vocab=st.integers(100, 300000),
)
def test_sizes_follow_the_rules(heads: int, repeat: int, inter: int, vocab: int) -> None:
    """Whatever the shape: each size offered divides what must be divided, each one left out breaks a rule."""
    source = {
        **BASE, "num_attention_heads": heads * repeat, "num_key_value_heads": heads, "head_dim": 64,
        "hidden_size": 64 * heads * repeat, "intermediate_size": inter, "vocab_size": vocab,
    }  # fmt: skip
    offered = tp_sizes(source, 16)
    assert offered[0] == 1
    for tp in range(2, 17):
        rules = [
            heads * repeat % tp == 0,
            heads % tp == 0 if heads >= tp else tp % heads == 0,
            inter % tp == 0,
            padded_vocab(vocab) % tp == 0,
        ]
        assert (tp in offered) == all(rules)


def test_the_length_of_sentence_transformers_counts() -> None:
    assert parse_config({**CONFIGS["bge-m3"], "sentence_max_seq_length": 512}).max_position == 512
