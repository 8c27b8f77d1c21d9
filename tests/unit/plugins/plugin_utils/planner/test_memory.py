# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory of one engine: against measured rows, against its own rules, and what is refused."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import memory
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import (
    Allocator,
    capture_sizes,
    cuda_total_gib,
    engine_memory,
    largest_max_model_len,
    lowest_utilization,
)
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import ModelShape, parse_config

TRUTH = Path(__file__).parents[4] / "benchmarks" / "truth"
CONFIGS: dict[str, dict[str, Any]] = json.loads((TRUTH / "configs.json").read_text())
MIB = 1 << 20
KEPT = (
    "gpu_memory_total_mib", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization", "max_model_len",
    "max_num_batched_tokens", "max_num_seqs", "enforce_eager", "dtype", "kv_cache_dtype",
)  # fmt: skip


def shape(name: str, **arguments: Any) -> ModelShape:
    return parse_config(CONFIGS[name], **arguments)


def measured() -> list[Any]:
    found = []
    for file in sorted(TRUTH.glob("h*.json")):
        data = json.loads(file.read_text())
        for number, row in enumerate(data["rows"]):
            version = row.get("vllm") or data["meta"]["vllm"]
            row["gpu_memory_total_mib"] = data["meta"]["memory_total_mib"]
            found.append(pytest.param(version, row, id=f"{file.name[:4]}-{version}-{row['model']}-{number}"))
    return found


def plan_of(version: str, row: dict[str, Any]) -> memory.MemoryPlan:
    return engine_memory(
        shape(row["model"], quantization=row.get("quantization")),
        engine_version=version,
        expert_parallel=row.get("enable_expert_parallel", False),
        **{key: row[key] for key in KEPT if key in row},
    )


@pytest.mark.parametrize(("version", "row"), measured())
def test_what_real_engines_measured(version: str, row: dict[str, Any]) -> None:
    plan = plan_of(version, row)
    if row["ok"] is not None:
        assert plan.fits == row["ok"], plan.reason
    weights = row.get("weights_gib") or row.get("weights")
    if weights and plan.weights_gib:
        assert plan.weights_gib == pytest.approx(weights, rel=0.02)
    if row["ok"] and "requested" in row and "in_use_at_end" in row:
        # What another service on the same GPU has to do without; graphs are estimated from above.
        assert row["in_use_at_end"] - 0.1 < plan.footprint_gib + plan.held_gib < row["in_use_at_end"] + 1.6
    peak = row.get("torch_peak_gib") or row.get("torch_peak")
    if peak:
        assert plan.activation_gib == pytest.approx(peak, abs=0.05)
    # A cache of less than 1 GiB is the edge: 50 MiB are 5% of it.
    if row.get("kv_tokens") and plan.kv_cache_gib >= 1:
        assert plan.kv_cache_tokens == pytest.approx(row["kv_tokens"], rel=0.05)


def test_the_median_of_small_requests_is_within_two_percent() -> None:
    errors = []
    for param in measured():
        version, row = param.values
        plan = plan_of(version, row)
        if row.get("kv_tokens") and plan.requested_gib <= 24:
            errors.append(abs(plan.kv_cache_tokens / row["kv_tokens"] - 1))
    assert len(errors) > 25
    assert statistics.median(errors) < 0.02


@pytest.mark.parametrize(
    ("model", "tp", "gib"),
    [("qwen3-0.6b", 1, 5.56), ("llama-3.1-8b", 1, 4.76), ("llama-3.1-70b", 2, 4.84), ("gpt-oss-20b", 1, 7.38)],
)
def test_activations_of_an_older_release(model: str, tp: int, gib: float) -> None:
    """vLLM 0.11 on H100s, 1024 requests and 8192 tokens (llm-d-planner, empirical-vllm-memory-results.md)."""
    plan = engine_memory(
        shape(model), gpu_memory_total_mib=81559, engine_version="0.11.0", tensor_parallel_size=tp,
        gpu_memory_utilization=0.95, max_num_batched_tokens=8192, max_num_seqs=1024,
    )  # fmt: skip
    assert plan.activation_gib == pytest.approx(gib, rel=0.12)


V100 = {"gpu_memory_total_mib": 16384, "compute_capability": "7.0", "engine_version": "0.3.0", "dtype": "float16"}


def test_the_first_engine_counts_everything_on_the_gpu() -> None:
    alone = engine_memory(shape("qwen2.5-1.5b"), enforce_eager=True, **V100)
    beside = engine_memory(shape("qwen2.5-1.5b"), enforce_eager=True, gpu_memory_used_mib=2048, **V100)
    assert alone.fits and beside.kv_cache_gib == pytest.approx(alone.kv_cache_gib - 2)
    later = {**V100, "engine_version": "0.6.3"}
    own = engine_memory(shape("qwen2.5-1.5b"), enforce_eager=True, gpu_memory_used_mib=1024, **later)
    assert own.kv_cache_gib == pytest.approx(
        engine_memory(shape("qwen2.5-1.5b"), enforce_eager=True, **later).kv_cache_gib
    )


def test_an_engine_without_chunks_profiles_the_longest_prompt() -> None:
    engine = {"gpu_memory_total_mib": 24576, "compute_capability": "8.6", "engine_version": "0.6.3"}
    short = engine_memory(shape("qwen2.5-1.5b"), max_model_len=2048, **engine)
    long = engine_memory(shape("qwen2.5-1.5b"), max_model_len=32768, **engine)
    assert long.activation_gib > 2  # 32768 tokens x 3 x 8960 and 4 x 1536 elements of 2 bytes; short: the sampler
    assert short.activation_gib < 1.5
    new = {**engine, "engine_version": "0.25.1"}
    assert (
        engine_memory(shape("qwen2.5-1.5b"), max_model_len=2048, **new).activation_gib
        == engine_memory(shape("qwen2.5-1.5b"), max_model_len=32768, **new).activation_gib
    )


A10 = {"gpu_memory_total_mib": 23028, "compute_capability": "8.6"}


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("qwen2.5-32b", {"tensor_parallel_size": 3}, "TP 3 is not possible: 40 attention heads"),
        ("qwen2.5-14b", {}, "no memory is left for the KV cache"),
        ("llama-2-7b", {"gpu_memory_utilization": 0.65}, "one request of 4096 tokens needs 2.00 GiB of KV cache"),
        ("qwen2.5-7b", {"gpu_memory_utilization": 1.0}, "are free at the start: at most 0.98"),
        ("qwen2.5-7b", {"gpu_memory_used_mib": 8192}, "are free at the start: at most 0.6"),
        ("qwen2.5-1.5b", {"gpu_memory_utilization": 0.98, "enforce_eager": True}, "starting takes 0.20 GiB on top"),
        ("llama-2-7b", {"max_model_len": 8192}, "more than the 4096 tokens of the model's config"),
        ("qwen2.5-1.5b", {"max_num_batched_tokens": 128}, "128 is below max_num_seqs 256"),
        ("bge-m3", {"max_model_len": 8192}, "an encoder reads a text in one piece"),
        ("bge-m3", {"gpu_memory_used_mib": 22000, "max_model_len": 512}, "are needed and"),
        ("qwen2.5-1.5b", {"dtype": "bfloat16", "compute_capability": "7.5"}, "bfloat16 needs compute capability 8.0"),
    ],
)
def test_what_cannot_start_and_why(model: str, arguments: dict[str, Any], words: str) -> None:
    plan = engine_memory(shape(model), **{**A10, **arguments})
    assert not plan.fits
    assert words in plan.reason


def test_poolers_have_no_cache() -> None:
    plan = engine_memory(shape("bge-m3"), max_model_len=8192, max_num_batched_tokens=8192, **A10)
    assert plan.fits and plan.kv_cache_tokens == 0 and plan.kv_cache_gib == 0
    assert plan.weights_gib == pytest.approx(1.057, abs=0.01)  # float32 on disk, 16 bits on the GPU
    assert largest_max_model_len(shape("bge-m3"), max_num_batched_tokens=8192, **A10) == 8192
    # Nothing is profiled: a utilization below the weights holds back nothing, and is no excuse to call the rest free.
    small = {**A10, "gpu_memory_utilization": 0.03}
    plan = engine_memory(shape("bge-m3"), max_model_len=8192, max_num_batched_tokens=8192, **small)
    held = plan.weights_gib + plan.activation_gib + plan.non_torch_gib + plan.cuda_graph_gib + plan.outside_gib
    assert plan.fits and plan.requested_gib < plan.weights_gib
    assert plan.footprint_gib == pytest.approx(held)


def test_the_stage_with_least_room_decides() -> None:
    plan = engine_memory(shape("qwen2.5-7b"), pipeline_parallel_size=2, engine_version="0.24.0", **A10)
    alone = engine_memory(shape("qwen2.5-7b"), engine_version="0.24.0", **A10)
    assert plan.stage == 0  # it compiles with a copy of the embedding
    assert plan.weights_gib == pytest.approx(alone.weights_gib / 2, rel=0.02)
    assert plan.kv_cache_tokens > 2 * alone.kv_cache_tokens


def test_given_weights_scale_what_is_computed() -> None:
    computed = engine_memory(shape("llama-3.1-8b"), **A10)
    given_size = engine_memory(shape("llama-3.1-8b", weights_gib=14.96 * 1.1), **A10)
    assert given_size.weights_gib == pytest.approx(computed.weights_gib * 1.1, rel=0.005)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-32b", "qwen3-30b-a3b", "deepseek-v2-lite", "olmoe-1b-7b"])
def test_files_of_the_right_size_change_nothing(name: str) -> None:
    """What PyTorch's allocator adds to the tensors is on no disk, and must not be scaled away: 0.1 GiB of a 7B were."""
    bare = shape(name)
    gpu = {"gpu_memory_total_mib": 143771, "engine_version": "0.25.1", "max_model_len": 4096}
    on_disk = engine_memory(shape(name, weights_gib=2 * bare.parameters / (1 << 30)), **gpu)
    assert on_disk.weights_gib == pytest.approx(engine_memory(bare, **gpu).weights_gib, rel=1e-4)


def test_experts_that_are_dealt_whole() -> None:
    sliced = engine_memory(shape("qwen3-30b-a3b"), gpu_memory_total_mib=81559, tensor_parallel_size=2)
    dealt = engine_memory(
        shape("qwen3-30b-a3b"), gpu_memory_total_mib=81559, tensor_parallel_size=2, expert_parallel=True
    )
    spread = engine_memory(
        shape("qwen3-30b-a3b"), gpu_memory_total_mib=81559, expert_parallel=True, data_parallel_size=8
    )
    assert dealt.weights_gib == pytest.approx(sliced.weights_gib, rel=0.01)
    assert spread.weights_gib < 0.2 * 56.9


def test_hybrid_layers_share_blocks() -> None:
    """12 full and 12 sliding layers: 1024 and 521 blocks of 12 layers for one request of 16384 tokens."""
    plan = engine_memory(
        shape("gpt-oss-20b"), gpu_memory_total_mib=143771, gpu_memory_utilization=0.16, max_model_len=16384,
        max_num_batched_tokens=8192,
    )  # fmt: skip
    assert plan.kv_needed_gib == pytest.approx((1024 + 521) * 12 * 16 * 2 * 8 * 64 * 2 / (1 << 30))


def test_groups_of_nearly_equal_size_are_padded() -> None:
    """13 full and 12 sliding layers become two groups of 13, not one of 12 beside three."""
    source = {**CONFIGS["gpt-oss-20b"], "num_hidden_layers": 25}
    source["layer_types"] = ["full_attention", "sliding_attention"] * 12 + ["full_attention"]
    plan = engine_memory(parse_config(source), gpu_memory_total_mib=81559, max_model_len=16384)
    assert plan.kv_needed_gib == pytest.approx((1024 + 137) * 13 * 16 * 2 * 8 * 64 * 2 / (1 << 30))


def test_packed_latents_take_656_bytes() -> None:
    cache = {"gpu_memory_total_mib": 143771, "max_model_len": 16384}
    packed = engine_memory(shape("deepseek-v2-lite"), kv_cache_dtype="fp8_ds_mla", **cache)
    assert packed.kv_needed_gib == pytest.approx(16384 * 27 * 656 / (1 << 30))


@pytest.mark.parametrize(
    ("sizes", "counted"),
    [
        ([1000], 1024),
        ([24 * MIB], 24 * MIB),
        ([25 * MIB], 26 * MIB),  # segments of 2 MiB, never cut
        ([int(12.5 * MIB)], int(12.5 * MIB)),  # 1.5 MiB are cut off
        ([int(13.5 * MIB)], 14 * MIB),  # half a MiB stays with the tensor
        ([6 * MIB, 6 * MIB, 6 * MIB], 18 * MIB),  # three of one segment of 20 MiB
        ([6 * MIB, 6 * MIB, int(7.5 * MIB)], 20 * MIB),  # and this one takes the rest whole
    ],
)
def test_allocator_rules(sizes: list[int], counted: int) -> None:
    allocator = Allocator()
    for size in sizes:
        allocator.take(size)
    assert allocator.counted == counted


def test_a_table_of_cosines_leaves_blocks_for_later_tensors() -> None:
    """131072 positions of 128: 64 MiB are left, and a tensor of 48 MiB takes them whole (seen with Llama-3.1-8B)."""
    allocator = Allocator()
    allocator.rotary(131072 * 128, 2)
    allocator.take(48 * MIB)
    assert allocator.counted == (32 + 64) * MIB


def test_capture_sizes() -> None:
    """As the engine's log says: PIECEWISE=51, FULL=35 with 256 requests; 51 of both with 1024."""
    assert capture_sizes(256, 8192) == (51, 35)
    assert capture_sizes(1024, 16384) == (51, 51)
    assert capture_sizes(64, 2048) == (19, 11)


def test_memory_that_the_driver_keeps() -> None:
    assert cuda_total_gib(143771, 616) == pytest.approx(139.80, abs=0.005)
    assert cuda_total_gib(143771) == pytest.approx(139.80, abs=0.005)
    assert cuda_total_gib(23028) == pytest.approx(22.06, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"gpu_memory_total_mib": 0}, "gpu_memory_total_mib"),
        ({"gpu_memory_total_mib": -5}, "gpu_memory_total_mib"),
        ({"gpu_memory_total_mib": "24 GB"}, "gpu_memory_total_mib"),
        ({"gpu_memory_total_mib": float("nan")}, "gpu_memory_total_mib"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization"),
        ({"gpu_memory_used_mib": -1}, "gpu_memory_used_mib"),
        ({"gpu_memory_used_mib": 99999}, "gpu_memory_used_mib"),
        ({"gpu_memory_reserved_mib": 23000}, "gpu_memory_reserved_mib"),
        ({"compute_capability": 8}, "compute_capability"),
        ({"engine_version": "0.99.0"}, "engine_version"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 1.5}, "pipeline_parallel_size"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"max_num_batched_tokens": "2048"}, "max_num_batched_tokens"),
        ({"max_num_seqs": None}, "max_num_seqs"),
        ({"enforce_eager": "yes"}, "enforce_eager"),
        ({"dtype": "int8"}, "dtype"),
        ({"kv_cache_dtype": "int2"}, "kv_cache_dtype"),
        ({"quantization": "awq"}, "quantization"),
    ],
)
def test_absurd_arguments_are_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(PlanError) as caught:
        engine_memory(shape("qwen2.5-1.5b"), **{**A10, **arguments})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} is ")


@pytest.mark.parametrize("pp", [3, 6])
@pytest.mark.parametrize("eager", [True, False])
def test_the_lowest_utilization_of_a_pipeline_whose_stages_differ(pp: int, eager: bool) -> None:
    """The stage with the most layers decides when there is much room, the one with the embedding when there is little."""
    engine = {
        **A10,
        "pipeline_parallel_size": pp,
        "tensor_parallel_size": 2,
        "max_num_seqs": 16,
        "enforce_eager": eager,
    }

    def holds(thousandths: int) -> bool:
        plan = engine_memory(shape("qwen2.5-32b"), gpu_memory_utilization=thousandths / 1000, **engine)
        return plan.fits and plan.max_concurrency >= 1

    real = next((number / 1000 for number in range(1, 1001) if holds(number)), None)
    assert lowest_utilization(shape("qwen2.5-32b"), **engine) == real


def test_the_lowest_utilization_is_the_lowest() -> None:
    for name in ("qwen2.5-7b", "qwen3-30b-a3b", "gemma-3-1b", "deepseek-v2-lite"):
        engine = {"gpu_memory_total_mib": 81559, "max_model_len": 8192}
        for concurrency in (1, 7.5):
            found = lowest_utilization(shape(name), concurrency=concurrency, **engine)
            assert found is not None
            at = engine_memory(shape(name), gpu_memory_utilization=found, **engine)
            below = engine_memory(shape(name), gpu_memory_utilization=round(found - 0.001, 3), **engine)
            assert at.fits and at.max_concurrency >= concurrency
            assert not below.fits or below.max_concurrency < concurrency
    assert lowest_utilization(shape("qwen2.5-32b"), **A10) is None
    assert lowest_utilization(shape("qwen2.5-7b"), tensor_parallel_size=3, **A10) is None
    with pytest.raises(PlanError, match="concurrency is 0"):
        lowest_utilization(shape("qwen2.5-7b"), concurrency=0, **A10)


def test_the_longest_context_is_the_longest() -> None:
    cases = [("llama-2-7b", {}), ("deepseek-v2-lite", {"gpu_memory_total_mib": 40960}), ("mistral-7b-swa", {})]
    cases += [("qwen2.5-7b", {"engine_version": "0.6.3"}), ("gpt-oss-20b", {"gpu_memory_utilization": 0.75})]
    for name, arguments in cases:
        engine = {**A10, **arguments}
        longest = largest_max_model_len(shape(name), **engine)
        assert longest > 0
        assert engine_memory(shape(name), max_model_len=longest, **engine).fits
        if longest < shape(name).max_position:
            assert not engine_memory(shape(name), max_model_len=longest + 16, **engine).fits
    assert largest_max_model_len(shape("qwen2.5-32b"), **A10) == 0
    assert largest_max_model_len(shape("qwen2.5-1.5b"), limit=1000, **A10) == 1000


NAMES = sorted(CONFIGS)
VERSIONS = ["0.3.0", "0.6.3", "0.8.5", "0.11.0", "0.24.0", "0.25.1", "0.33.0"]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    version=st.sampled_from(VERSIONS),
    total=st.integers(8192, 160000),
    low=st.integers(50, 999),
    more=st.integers(1, 400),
    length=st.integers(64, 60000),
    batched=st.integers(512, 32768),
    seqs=st.integers(1, 512),
    eager=st.booleans(),
    split=st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2)]),
)
def test_never_more_than_there_is_and_monotone(
    name: str, version: str, total: int, low: int, more: int, length: int, batched: int, seqs: int, eager: bool,
    split: tuple[int, int],
) -> None:  # fmt: skip
    model = shape(name)

    def at(utilization: int, tokens: int) -> memory.MemoryPlan:
        return engine_memory(
            model, gpu_memory_total_mib=total, engine_version=version, gpu_memory_utilization=utilization / 1000,
            max_model_len=tokens, max_num_batched_tokens=batched, max_num_seqs=seqs, enforce_eager=eager,
            tensor_parallel_size=split[0], pipeline_parallel_size=split[1],
        )  # fmt: skip

    plan = at(low, length)
    assert plan.requested_gib <= total / 1024
    if plan.weights_gib:  # not refused for its split
        spent = plan.weights_gib + plan.activation_gib + plan.non_torch_gib + plan.cuda_graph_counted_gib
        if model.has_kv_cache:
            assert spent + plan.kv_cache_gib == pytest.approx(plan.requested_gib, abs=1e-6)
        if plan.fits:
            assert spent + max(plan.kv_cache_gib, plan.kv_needed_gib) <= total / 1024
            assert plan.outside_gib + plan.requested_gib <= total / 1024 or version in ("0.3.0", "0.6.3", "0.8.5")
    higher = at(min(1000, low + more), length)
    assert higher.kv_cache_tokens >= plan.kv_cache_tokens
    shorter = at(low, length // 2)
    if plan.fits:
        assert shorter.fits, shorter.reason
        assert shorter.max_concurrency >= plan.max_concurrency


def test_it_is_fast_enough_for_a_search() -> None:
    model = shape("qwen3-30b-a3b")
    engine_memory(model, **A10)
    began = time.process_time()
    for length in range(1024, 3024):
        engine_memory(model, max_model_len=length, **A10)
    assert (time.process_time() - began) / 2000 < 0.001  # about 0.05 ms on an idle machine


def test_experts_of_replicas_have_the_tokens_of_all() -> None:
    """GLM-4.5-Air's like: every replica's experts work on the batches of all (source-derived, not measured)."""
    arguments: dict[str, Any] = {
        "gpu_memory_total_mib": 81559, "expert_parallel": True, "max_num_batched_tokens": 8192, "max_model_len": 4096,
        "max_num_seqs": 16,
    }  # fmt: skip
    model = shape("qwen3-30b-a3b")
    one, four = (engine_memory(model, data_parallel_size=dp, **arguments).activation_gib for dp in (1, 4))
    row = 8 * (2048 + 2048) * 2  # top_k, the wider of hidden size and products before and after the activation, bytes
    assert (four - one) * 2**30 >= 3 * 8192 * row
    two, four = (
        engine_memory(model, data_parallel_size=dp, engine_version="0.14.0", **arguments).activation_gib
        for dp in (2, 4)
    )
    assert 0 < (four - two) * 2**30 <= 2 * 8192 * 2048 * 2  # no more than 16384 tokens at once: the gathered ones alone
