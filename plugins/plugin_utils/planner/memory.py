# SPDX-License-Identifier: GPL-3.0-or-later
"""Where each GiB of one GPU goes when one vLLM engine starts on it.

vLLM takes ``utilization x total``, starts once with a dummy batch, and gives the KV cache what that left. This module
computes the same terms from the tensors that are alive at each peak, instead of from constants for a model:
docs/memory-model.md derives them. Sources: vLLM 0.24.0 and 0.25.1 (v1/worker/gpu_worker.py, gpu_model_runner.py,
gpu/model_runner.py, sample/, v1/kv_cache_interface.py, v1/core/kv_cache_utils.py, fused_moe/) and allocation traces of
those versions on an H200 (tests/benchmarks/truth).
"""

# pylint: disable=disallowed-name,missing-kwoa # _ is a value that nothing reads; arguments are passed on as a dictionary
from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Any

from . import engine
from .errors import PlanError
from .model import (
    DTYPE_BYTES,
    ENCODERS,
    GIB,
    MIB,
    ModelShape,
    expert_group,
    kv_page,
    matrices,
    pp_layers,
    pp_problems,
    tp_problems,
)
from .tables import load

KV_DTYPES = {
    "auto": 0.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "fp8_ds_mla": 656 / 576,  # 656 bytes a token: 512 latent, their scales, 64 rotary ones in 16 bits
}
BLOCK = 16  # tokens of a KV block

# Memory of the CUDA libraries and of communication, GiB on each GPU. outside: taken before vLLM reads how much is free
# (context, NCCL); inside: taken while it profiles, so part of the request. alone, tp: one GPU, tensor parallel;
# pp: pipeline only. Sources: H200 rows in tests/benchmarks/truth; other GPUs: NCCL from aiconfigurator-core 0.12
# (systems/*.yaml, 0.33 to 0.38), context from vllm-project/vllm#14447 and from a V100 out-of-memory message that shows
# 0.45 with TP 2 (0.28 context, 0.17 NCCL).
OUTSIDE = {"hopper": {"alone": 0.515, "tp": 1.53, "pp": 1.43}, "other": {"alone": 0.40, "tp": 0.75, "pp": 0.75}}
OUTSIDE_EXPERTS = 0.47  # more for TP of a mixture of experts
INSIDE = {"alone": 0.225, "tp": 0.54, "pp": 0.065}
# Free memory that an engine needs beside its request after profiling: kernels loaded later. A full batch that runs again
# needs its products once more (_products_token).
LATE = 0.1
# What the allocator comes to hold beside its request once the engine serves: GiB of fragments, and copies of the logits in
# float32, one row for each request, of the warm-up that samples with every feature. Profiling leaves these out. An engine
# alone on its GPU gives them back where memory is short; another engine on the same GPU never sees them.
# Source: `in_use_at_end` of the H200 rows in tests/benchmarks/truth, none of which holds over 0.1 GiB more.
HELD = 0.15
HELD_LOGITS = {"v1": 2.5, "v2": 4.0, "v2 tp": 5.2}
INSIDE_GRAPHS = 0.01  # more kernels are loaded while graphs are profiled
# V0 counts NCCL, and up to 0.6.2 the context too. On Hopper: vllm-project/vllm#10511; elsewhere #14447, #15598, V100.
V0_INSIDE = {"hopper": {"alone": 1.79, "tp": 3.58}, "other": {"alone": 0.20, "tp": 0.45}}
V0_CONTEXT = 0.28

# cuBLAS workspace: PyTorch reserves 32 MiB on Hopper and newer, 8.1 MiB elsewhere; compiled code holds a second, larger
# one on Hopper (60 MiB in every compiled trace).
WORKSPACE = {"hopper": 32 * MIB, "other": int(8.125 * MIB)}
COMPILED_WORKSPACE = {"hopper": 60 * MIB, "other": 0}

# Models whose MLP drops its first product before the second (Python's name is bound again), so that one hidden state
# fewer is alive. Source: model_executor/models/llama.py against qwen2.py.
REBINDING = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "MixtralForCausalLM"})
# Model runner V2 of 0.22 to 0.24: these classes; from 0.25 every dense decoder and these sparse ones.
RUNNER_V2_FIRST = frozenset({
    "Qwen3ForCausalLM", "DeepseekV2ForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM", "LlamaForCausalLM",
    "MistralForCausalLM"
})  # fmt: skip
RUNNER_V2_SPARSE = frozenset({"DeepseekV2ForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM"})


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the GPU that decides (of a pipeline: the stage with the fewest blocks). All GiB are 2**30 bytes.

    Attributes:
        requested_gib: utilization x memory that CUDA sees.
        weights_gib, activation_gib, non_torch_gib: what profiling takes from the request.
        cuda_graph_gib: memory that CUDA graphs take once captured (``cuda_graph_counted_gib`` of it comes from the
            request, the rest from what is free beside it).
        kv_cache_gib: what is left for the KV cache; negative when nothing is (0 for models that have none).
        kv_cache_tokens: tokens that the cache holds over all requests of one engine.
        max_concurrency: requests of max_model_len tokens that fit at once.
        fits: the engine starts.
        reason: one sentence: why it fits or what is missing, with the arithmetic.
        outside_gib: CUDA context and NCCL, outside the request, on the same GPU.
        footprint_gib: the most that the engine needs of the GPU to start (request, outside, uncounted graphs, warm-up).
        warmup_gib: what a full batch takes beside the request when it runs again to warm up kernels.
        held_gib: what its allocator comes to hold on top, and gives back only to itself.
        kv_needed_gib: KV cache that one request of max_model_len tokens needs.
        kv_least_gib: KV cache without which the engine does not start.
        largest_max_model_len: the longest context that this KV cache holds (0 when none; capped at the config's).
        stage: pipeline stage that decides.
    """

    requested_gib: float
    weights_gib: float
    activation_gib: float
    non_torch_gib: float
    cuda_graph_gib: float
    kv_cache_gib: float
    kv_cache_tokens: int
    max_concurrency: float
    fits: bool
    reason: str
    outside_gib: float
    footprint_gib: float
    held_gib: float
    warmup_gib: float
    cuda_graph_counted_gib: float
    kv_needed_gib: float
    kv_least_gib: float
    largest_max_model_len: int
    stage: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The ten keys of the filter ``vllm_memory``, sizes rounded to 3 digits."""
        rounded = {
            name: round(getattr(self, name), 3)
            for name in (
                "requested_gib",
                "weights_gib",
                "activation_gib",
                "non_torch_gib",
                "cuda_graph_gib",
                "kv_cache_gib",
            )
        }
        return {
            **rounded,
            "kv_cache_tokens": self.kv_cache_tokens,
            "max_concurrency": round(self.max_concurrency, 2),
            "fits": self.fits,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class _KvGroup:
    """Layers that share one block table: ``kind``, ``window`` and tokens of a block."""

    kind: str
    window: int
    block: int

    def blocks(self, length: int, batched: int) -> int:
        """Blocks that one request of ``length`` tokens holds."""
        if self.kind == "state":
            return 1
        if self.kind == "sliding":  # the window may begin inside a block: one more
            return -(-min(self.window - 1 + batched, length) // self.block) + 1
        if self.kind == "chunked":
            return -(-min(self.window + batched, length) // self.block)
        return -(-length // self.block)


@dataclass(frozen=True)
class _Stage:
    """What one GPU of one pipeline stage holds; bytes, or bytes for each token of the batch (``*_token``)."""

    weights: int
    dense: tuple[int, int]
    sparse: tuple[int, int]
    products: int
    attention: int
    moe_token: int
    moe_before_dense: bool
    mla_row: int
    hidden: int
    embedding: int
    first: bool
    last: bool
    block_bytes: int
    groups: tuple[_KvGroup, ...]


# ---------------------------------------------------------------------------------------------------------------------
# What a GPU holds, by split: computed once for a model
# ---------------------------------------------------------------------------------------------------------------------


LARGE = 20 * MIB


class Allocator:
    """Bytes that PyTorch's caching allocator counts for tensors that are made one after the other.

    Up to 1 MiB a tensor gets a multiple of 512 bytes. Up to 10 MiB it is cut from segments of 20 MiB, above from a
    segment of its own in steps of 2 MiB; what is left of a block is cut off when it is more than 1 MiB, and counts as
    the tensor's otherwise. From ``whole_from`` on nothing is cut off: vLLM 0.20 and later load weights with
    ``max_split_size_mb:20``. Source: c10/cuda/CUDACachingAllocator (PyTorch 2.11), vLLM v1/worker/gpu_worker.py.

    Attributes:
        counted: bytes so far.
        stored: bytes of those tensors, without rounding, that a checkpoint holds.
    """

    def __init__(self, whole_from: int = LARGE) -> None:
        self.counted = self.stored = 0
        self._whole_from = whole_from
        self._free: list[int] = []  # in order of size

    def take(self, size: int, stored: bool = True) -> None:
        """One tensor of ``size`` bytes that stays."""
        self.stored += size if stored else 0
        if size <= MIB:
            self.counted += -(-size // 512) * 512
            return
        whole = size >= self._whole_from  # takes a free block only when that is little larger
        index = bisect_left(self._free, size)
        if index < len(self._free) and self._free[index] < (size + LARGE if whole else self._whole_from):
            block = self._free.pop(index)
        else:
            block = LARGE if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if not whole and block - size > MIB:
            insort(self._free, block - size)
            block = size
        self.counted += block

    def rotary(self, elements: int, element: int) -> None:
        """The table of cosines and sines, with what building it in float32 leaves free for later tensors."""
        self.take(elements * element, stored=False)
        self._free = sorted(
            [*self._free, *(size for size in (elements * 2, elements * 2, elements * 4) if size >= LARGE)]
        )


def _weights(
    shape: ModelShape, tp: int, expert_split: int, layers: range, first: bool, last: bool, element: int, whole_from: int
) -> Allocator:
    quant = shape.quant
    memory = Allocator(whole_from)
    table = shape.rotary_elements
    experts = next((m for m in (shape.layers[index].mlp for index in layers) if m and m.experts), None)
    cut = 0  # group of experts that are cut inside a group
    if quant is not None and experts and expert_split == 1:
        cut = expert_group(quant, experts.latent or shape.hidden_size, experts.expert_size // tp)
    for name, rows, cols, part in matrices(shape, tp, expert_split, layers, first, last):
        quantized = (
            quant is not None
            and part != "plain"
            and not (part == "attention" and quant.skip_attention)
            and not (part == "dense" and quant.skip_dense)
            and name != "kv_b"
        )
        if quant is None or not quantized:
            memory.take(rows * cols * element)
            if name == "o" and table:  # built with the first attention layer
                memory.rotary(table, element)
                table = 0
            continue
        if quant.method == "mxfp4":
            cols = -(-cols // 256) * 256  # the kernels' layout pads the inputs
        memory.take(int(rows * cols * quant.bits / 8))
        if quant.block[0]:
            scales = -(-rows // quant.block[0]) * -(-cols // quant.block[1])
        else:
            group = cut if part == "expert" and cut else quant.group
            scales = rows * cols // group if group else rows
        memory.take(int(scales * quant.scale_bits / 8))
        if quant.group and quant.zero_bits:
            memory.take(int(scales * quant.zero_bits / 8))
        if name == "o" and table:
            memory.rotary(table, element)
            table = 0
    for index in layers:
        a = shape.layers[index].attention
        if a and a.kind == "mla":  # kv_b is kept, and taken apart once more for decoding
            memory.take(a.heads // tp * a.nope_dim * a.latent * element, stored=False)
            memory.take(a.heads // tp * a.v_dim * a.latent * element, stored=False)
    if first and shape.vision_parameters:
        memory.take(shape.vision_parameters * element // (1 if shape.keeps_vision_whole(tp) else tp))
    return memory


def _disk_bytes(shape: ModelShape) -> int:
    """Bytes of the checkpoint as this module sees it, to compare with the true size."""
    return max(1, _weights(shape, 1, 1, range(shape.num_layers), True, True, DTYPE_BYTES[shape.dtype], LARGE).stored)


def _products(inner: int, gated: bool) -> int:
    """Elements for each token of what an MLP makes inside: gate, up and their product."""
    return (3 if gated else 2) * inner


def _dense_token(shape: ModelShape, inner: int, gated: bool, tp: int, element: int, compiled: bool) -> int:
    """Bytes alive for each token at the peak of a dense MLP.

    The gate and up products, their activation, and hidden states: compiled code keeps three; plain Python keeps one
    more (the layer's caller still holds its input), and a copy that an all-reduce writes.
    """
    hidden = shape.hidden_size
    wide = _products(inner, gated)
    if compiled:
        size = wide + 3 * hidden
    else:
        reduced = 1 if tp > 1 else 0
        size = wide + (4 + reduced) * hidden
        if shape.architecture in REBINDING:
            size = max(wide + 3 * hidden, inner + (4 + reduced) * hidden)
    # An 8-bit kernel quantizes the input of the second product first.
    eight = shape.quant is not None and shape.quant.activation_bits == 8 and not shape.quant.skip_dense
    return size * element + (inner if eight else 0)


def _products_token(shape: ModelShape, tp: int, layers: range, element: int) -> int:
    """Bytes for each token of what an MLP outside the experts makes: gate, up and their product.

    A layer may need them anew while the blocks of the layer before are free, but cut by smaller tensors. Profiling counts
    what is allocated, not what is lost so. Without that room two engines ran out of memory as a full batch ran again: a 1B
    model on an H200 (0.045 GiB were free, its products take 0.09) and a 7B on two H100 (2.2 and 3.5; tests/benchmarks/truth).
    """
    sizes = (
        _products((m.shared_size if m.experts else m.intermediate) // tp, m.gated)
        for m in {shape.layers[index].mlp for index in layers}
        if m
    )
    return max(sizes, default=0) * element


def _mlp_tokens(
    shape: ModelShape, tp: int, layers: range, element: int, sparse: bool, compiled: bool
) -> int:  # fmt: skip
    """The same over the stage's dense layers, or over its sparse ones (shared experts, and two more hidden states)."""
    worst = 0
    for m in {shape.layers[index].mlp for index in layers}:
        if m and not m.experts and not sparse:
            worst = max(worst, _dense_token(shape, m.intermediate // tp, m.gated, tp, element, compiled))
        elif m and m.experts and sparse:
            worst = max(worst, (3 * (m.shared_size // tp) + 5 * shape.hidden_size) * element)
    return worst


def _attention_token(shape: ModelShape, tp: int, layers: range, element: int) -> int:
    """Bytes alive for each token at the peak of an attention layer."""
    worst = 0
    for a in {mixer for index in layers for mixer in shape.layers[index].mixers}:
        if a.kind == "mla":
            size = a.heads // tp * (a.head_dim + a.v_dim) + 2 * (a.latent + a.rope_dim)
        elif a.kind != "state":
            size = 3 * (a.heads // tp * a.head_dim) + 2 * max(1, a.kv_heads // tp) * a.head_dim
        else:
            size = 2 * a.projection // shape.hidden_size // tp
        worst = max(worst, (size + 2 * shape.hidden_size) * element)
    return worst


def _moe_token(shape: ModelShape, tp: int, expert_split: int, layers: range, element: int) -> int:
    """Bytes of the experts' two workspaces for each token. They stay allocated once grown.

    Source: fused_moe/experts/triton_moe.py: (tokens, top_k, max(width, hidden)) before and after the activation.
    """
    worst = 0
    for layer in {shape.layers[index] for index in layers}:
        m = layer.mlp
        if m and m.experts:
            size = m.expert_size if expert_split > 1 else m.expert_size // tp
            up = (2 if m.gated else 1) * size
            if shape.quant and shape.quant.method == "mxfp4":  # its kernel keeps the activation alone
                worst = max(worst, m.top_k * size * element)
                continue
            width = m.latent or shape.hidden_size
            worst = max(worst, m.top_k * (max(up, width) + max(size, width)) * element)
    return worst


def _sparse_before_dense(shape: ModelShape, layers: range) -> bool:
    seen = False
    for index in layers:
        m = shape.layers[index].mlp
        if m and m.experts:
            seen = True
        elif m and seen:
            return True
    return False


def _kv_layout(
    shape: ModelShape, layers: range, tp: int, kv_bytes: float, state_bytes: int
) -> tuple[int, tuple[_KvGroup, ...]]:
    """(bytes of one block over all layers that share it, groups of layers with a block table each).

    Layers of one kind share a table. Different kinds are cut into groups of equal size (the smallest kind's, or the
    largest's when the sizes are within 1.5), and block i of every group lies in the same memory.
    """
    pages: dict[tuple[str, int, int], int] = {}
    for a in (mixer for index in layers for mixer in shape.layers[index].mixers):
        if a.kind == "encoder" or a.shared:
            continue
        if a.kind == "state":
            size = int((a.state[0] * state_bytes + a.state[1] * (a.state_bytes or state_bytes)) / tp)
            key = ("state", 0, size)
        else:
            key = (a.kind, a.window, kv_page(a, tp, kv_bytes))
        pages[key] = pages.get(key, 0) + 1
    if not pages:
        return 0, ()
    windows = {(kind, window) for kind, window, _ in pages}
    if len(windows) == 1:
        (kind, window) = next(iter(windows))
        total = sum(size * count for (_, _, size), count in pages.items())
        return (total if kind == "state" else total * BLOCK), (_KvGroup(kind, window, BLOCK),)
    # All pages get the largest size: attention blocks grow in tokens until they hold a state.
    attention = {size for kind, _, size in pages if kind != "state"}
    state = max((size for kind, _, size in pages if kind == "state"), default=0)
    largest = max(attention) if attention else 1
    tokens = BLOCK * max(1, math.ceil(state / (largest * BLOCK)))
    page = largest * tokens
    counts = list(pages.values())
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups: list[_KvGroup] = []
    for (kind, window, bytes_token), count in pages.items():
        block = tokens if kind == "state" else tokens * (largest // bytes_token)
        groups += [_KvGroup(kind, window, block)] * -(-count // size)
    return size * page, tuple(groups)


def _stages(
    shape: ModelShape, tp: int, pp: int, expert_split: int, element: int, kv_bytes: float, whole_from: int
) -> tuple[_Stage, ...]:
    key = ("stages", tp, pp, expert_split, element, kv_bytes, whole_from)
    if key in shape.cache:
        return shape.cache[key]  # type: ignore[no-any-return]
    stages = []
    scale = shape.weights_gib * GIB / _disk_bytes(shape) if shape.weights_gib else 1.0
    for number, layers in enumerate(pp_layers(shape.num_layers, pp)):
        first, last = number == 0, number == pp - 1
        block_bytes, groups = _kv_layout(shape, layers, tp, kv_bytes, element)
        latent = next((a for a in (shape.layers[i].attention for i in layers) if a and a.kind == "mla"), None)
        stages.append(
            _Stage(
                weights=int(
                    _weights(shape, tp, expert_split, layers, first, last, element, whole_from).counted * scale
                ),
                dense=tuple(_mlp_tokens(shape, tp, layers, element, False, compiled) for compiled in (False, True)),  # type: ignore[arg-type]
                sparse=tuple(_mlp_tokens(shape, tp, layers, element, True, compiled) for compiled in (False, True)),  # type: ignore[arg-type]
                products=_products_token(shape, tp, layers, element),
                attention=_attention_token(shape, tp, layers, element),
                moe_before_dense=_sparse_before_dense(shape, layers),
                moe_token=_moe_token(shape, tp, expert_split, layers, element),
                mla_row=latent.heads // tp * (latent.nope_dim + latent.v_dim) * element if latent else 0,
                hidden=shape.hidden_size * element,
                embedding=-(-shape.vocab_size // 64) * 64 // tp * shape.hidden_size * element if first else 0,
                first=first,
                last=last,
                block_bytes=block_bytes,
                groups=groups,
            )
        )
    shape.cache[key] = tuple(stages)
    return shape.cache[key]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------------------
# One engine
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Engine:
    """Facts of an engine version on a GPU that decide memory."""

    v0: bool
    counts_all: bool
    runner_v2: bool
    graphs_counted: bool
    native_sort: bool
    compile_peak: bool
    fused_reduce: bool
    whole_from: int
    chunked_above: int
    expert_chunk: int | None
    family: str


def _engine(shape: ModelShape, version: str, capability: tuple[int, int]) -> _Engine:
    key = ("engine", version, capability)
    if key not in shape.cache:
        release = engine.get(version)
        text = release.version

        def since(floor: str) -> bool:
            return engine.at_least(text, floor)

        v0 = release.core(capability) == "V0"
        dense = not shape.experts and not shape.states
        runner_v2 = (
            shape.kind == "generate"
            and not v0
            and (
                since("0.33.0")
                or (since("0.25.0") and (dense or shape.architecture in RUNNER_V2_SPARSE))
                or (since("0.22.0") and shape.architecture in RUNNER_V2_FIRST)
            )
        )
        shape.cache[key] = _Engine(
            v0=v0,
            counts_all=not since("0.6.3"),
            runner_v2=runner_v2,
            graphs_counted=since("0.20.0") and not runner_v2,
            native_sort=v0 or not since("0.20.0"),
            compile_peak=since("0.20.0"),
            # 0.25 prefers another backend, which took nothing in the rows measured.
            fused_reduce=since("0.20.0") and not since("0.25.0"),
            whole_from=LARGE if since("0.20.0") else 1 << 62,
            chunked_above=engine.splits_above(text),
            expert_chunk=engine.by_release(load("engines")["expert_chunk"], text),
            family="hopper" if capability >= (9, 0) else "other",
        )
    return shape.cache[key]  # type: ignore[no-any-return]


def cuda_total_gib(total_mib: float, reserved_mib: float | None = None) -> float:
    """GiB that CUDA sees: the total of nvidia-smi less what the driver keeps (``memory.reserved``), both in MiB.

    Without a reading: 400 MiB and 0.15% of the total. That is 616 MiB on an H200 (its reading) and 435 on an A10
    (PyTorch sees 22.06 GiB there).
    """
    return (total_mib - (400 + 0.0015 * total_mib if reserved_mib is None else reserved_mib)) / 1024


def capture_sizes(max_num_seqs: int, max_num_batched_tokens: int) -> tuple[int, int]:
    """(sizes captured piece by piece, sizes captured whole for decoding) with the default settings.

    1, 2, 4, then every 8 up to 248, then every 16 up to twice max_num_seqs or 512; whole graphs up to max_num_seqs.
    """
    top = min(2 * max_num_seqs, 512, max_num_batched_tokens)

    def up_to(limit: int) -> int:
        return sum(s <= limit for s in (1, 2, 4)) + max(0, min(limit, 248) // 8) + max(0, (limit - 240) // 16)

    return up_to(top), up_to(min(top, max_num_seqs))


def _graphs(shape: ModelShape, facts: _Engine, stage_layers: int, seqs: int, batched: int) -> tuple[float, float]:
    """(GiB that the graphs take, GiB that the engine sets aside for them).

    Calibrated, not derived: captures take what the driver takes for them. Fitted to 19 rows of 0.24.0 and 0.25.1 on an
    H200: a part that is the same for all, one for each layer, more with experts and with 4-bit kernels, in proportion
    to the number of graphs (86 with max_num_seqs 256).
    """
    pieces, whole = capture_sizes(seqs, batched)
    if not shape.has_kv_cache:
        whole = 0
    share = (pieces + whole) / 86
    extra = 0.12 if shape.experts else 0.0
    if shape.quant and shape.quant.marlin and shape.quant.bits == 4:
        extra += 0.14
    if facts.runner_v2:
        return (0.16 + 0.0134 * stage_layers + 2 * extra) * share**1.5, 0.0
    estimate = (0.169 + 0.0055 * stage_layers + extra) * share
    return (0.165 + 0.0094 * stage_layers + extra) * share, estimate if facts.graphs_counted else 0.0


def _sampler(shape: ModelShape, facts: _Engine, stage: _Stage, rows: int, batched: int, sms: int, element: int) -> int:
    """Bytes at the peak of the sampler: logits of ``rows`` requests, in the model's dtype and in float32."""
    vocab = shape.vocab_size
    states = batched * stage.hidden + 2 * rows * stage.hidden
    if facts.native_sort:
        # Top-p by sorting: float32 copies, indices of 8 bytes and the sort's own buffers: 9.7 copies of 4 bytes.
        # Source: eight H100 rows of llm-d-planner (vLLM 0.11) agree within 3%.
        return int(9.7 * 4 * rows * vocab) + states
    if facts.runner_v2:  # logits and a float32 copy, then Gumbel maxima of 1024 columns
        return rows * vocab * (element + 4) + rows * -(-vocab // 1024) * 12 + states - rows * stage.hidden
    # Logits, float32 copy, probabilities, noise; and the buffer of the Triton top-k kernel, a row for each SM.
    programs = min(1 << max(0, min(sms, rows) - 1).bit_length(), sms) if rows >= 8 else 2 * rows
    return rows * vocab * (element + 12) + programs * vocab * 4 + states + MIB


def _held(shape: ModelShape, facts: _Engine, stage: _Stage, rows: int, tp: int) -> float:
    """GiB that the allocator holds beside the request once the engine serves."""
    if facts.v0 or shape.kind != "generate":
        return 0.0
    version = "v1" if not facts.runner_v2 else "v2 tp" if tp > 1 else "v2"
    return HELD + (HELD_LOGITS[version] * rows * shape.vocab_size * 4 / GIB if stage.last else 0.0)


# Streaming multiprocessors, by compute capability: only the height of a small buffer depends on them.
_SMS = {(7, 0): 80, (7, 5): 40, (8, 0): 108, (8, 6): 72, (8, 9): 58, (9, 0): 132}


def _activation(
    shape: ModelShape, facts: _Engine, stage: _Stage, *, batched: int, seqs: int, length: int, eager: bool, sms: int,
    element: int, tp: int, gathered: int,
) -> tuple[int, int]:  # fmt: skip
    """(bytes at the highest peak of the profile run, bytes that a full batch takes again once the cache is there).

    Args:
        gathered: tokens of all replicas, which come to the experts of each (all2all.py); 0: the experts have their own alone.
    """
    workspace = WORKSPACE[facts.family]
    stays = stage.moe_token * max(batched, min(gathered, facts.expert_chunk or gathered))
    compiled = not eager and not facts.v0
    eight = shape.quant is not None and shape.quant.activation_bits == 8
    dense = stage.dense[compiled] * batched
    if dense:
        # 8-bit products do not go through cuBLAS.
        dense += 0 if eight and not shape.experts else workspace
        dense += COMPILED_WORKSPACE[facts.family] if compiled and not shape.experts else 0
        dense += stays if stage.moe_before_dense else 0
    attention = stage.attention * batched + stays
    if stage.mla_row:
        # Room to expand the cached latents of a long prompt, allocated whole in the profile run.
        expanded = max(min(max(8 * length, 4 * seqs * BLOCK), 64 * 1024), seqs * BLOCK)
        attention += expanded * stage.mla_row + workspace
    sparse = 0
    if stage.sparse[compiled]:
        sparse = stage.sparse[compiled] * batched + stays + workspace + gathered * stage.hidden
    peak = steady = max(dense, attention, sparse)
    if facts.compile_peak and not eager and stage.first and shape.kind == "generate":
        # The first start compiles: the code generator times its kernels on tensors as large as the real ones, the
        # embedding among them.
        quantized = batched * shape.hidden_size if eight and shape.quant and not shape.quant.block[0] else 0
        product = COMPILED_WORKSPACE[facts.family] if tp > 1 else 0  # the piece ends with a product then
        peak = max(peak, stage.embedding + 2 * batched * stage.hidden + quantized + product)
    if stage.last and shape.kind == "generate":
        rows = min(seqs, batched)
        sampler = _sampler(shape, facts, stage, rows, batched, sms, element) + workspace
        if not facts.v0:
            sampler += stays
        steady = max(steady, sampler)
    return max(peak, steady), steady


# Largest message that is reduced and normalized in one kernel, MiB by TP size. Source: FI_ALLREDUCE_FUSION_MAX_SIZE_MB.
_FUSED_MIB = {(9, 0): {2: 64, 4: 2, 8: 1}, (10, 0): {2: 64, 4: 32, 8: 1}}


def _fused_reduce(facts: _Engine, tp: int, capability: tuple[int, int], batch_bytes: int) -> float:
    """GiB of buffers for the fused all-reduce: one and three more of ``tp`` messages. Measured: 0.507 with TP 2."""
    limit = _FUSED_MIB.get(capability, {}).get(tp, 0) * MIB
    return 4 * tp * min(limit, batch_bytes) / GIB if facts.fused_reduce else 0.0


def _number(name: str, value: object, low: float, high: float, allowed: str, *, above: bool = False) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not (low < value if above else low <= value) or not value <= high:  # type: ignore[operator]
        raise PlanError(name, value, allowed)
    return float(value)  # type: ignore[arg-type]


def _whole(name: str, value: object, low: int = 1, high: int = 1 << 30) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PlanError(name, value, f"give a whole number from {low} to {high}")
    return value


def _element_bytes(shape: ModelShape, dtype: str, capability: tuple[int, int]) -> tuple[int, str | None]:
    """(bytes of an element of weights and activations, why the engine refuses the dtype)."""
    if dtype == "auto":
        return 2, None  # float32 checkpoints are loaded as 16 bits, bfloat16 ones as float16 where there is none
    if dtype not in DTYPE_BYTES:
        raise PlanError("dtype", dtype, f"one of auto, {', '.join(sorted(DTYPE_BYTES))} is allowed")
    if dtype == "bfloat16" and capability < (8, 0):
        return 2, f"bfloat16 needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}: use float16"
    return DTYPE_BYTES[dtype], None


def states_problem(shape: ModelShape, version: str, v0: bool) -> str | None:
    """Why the memory of a model's states, or of its cache, is not known, or None."""
    if shape.compressed:
        return (
            f"{shape.model_type} keeps a KV cache that is compressed by layer (compress_ratios), which is not counted here: take "
            "another model"
        )
    if not v0 or not shape.states:
        return None
    return (
        f"the V0 core of vLLM {version} keeps the states of {shape.states} layers outside of the KV cache, which is not "
        "counted here: take engine_version 0.25.1, on a GPU that it runs on"
    )


def engine_memory(
    shape: ModelShape,
    *,
    gpu_memory_total_mib: float,
    compute_capability: str = "9.0",
    engine_version: str = "0.25.1",
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    gpu_memory_utilization: float = 0.9,
    max_model_len: int = 4096,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    enforce_eager: bool = False,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    quantization: str | None = None,
    gpu_memory_used_mib: float = 0,
    gpu_memory_reserved_mib: float | None = None,
    expert_parallel: bool = False,
    data_parallel_size: int = 1,
) -> MemoryPlan:
    """Memory of one engine on one GPU.

    Args:
        quantization: what ``--quantization`` will be; the shape must have been read with it.
        gpu_memory_total_mib: total memory as ``nvidia-smi`` shows it.
        gpu_memory_used_mib: memory in use by others (with ``gpu_memory_total_mib`` it says what is free).
        gpu_memory_reserved_mib: ``memory.reserved`` of ``nvidia-smi``: part of the total that CUDA cannot see; None
            estimates it.

    Raises:
        PlanError: an argument is out of range or not known (the message names it).
    """
    total_mib = _number(
        "gpu_memory_total_mib", gpu_memory_total_mib, 1024, 1 << 24, "a size in MiB, 1024 or more, is needed"
    )
    utilization = _number(
        "gpu_memory_utilization", gpu_memory_utilization, 0, 1, "above 0 and up to 1 is allowed", above=True
    )
    used_mib = _number("gpu_memory_used_mib", gpu_memory_used_mib, 0, total_mib, "from 0 to the GPU's total is allowed")
    if gpu_memory_reserved_mib is not None:
        _number(
            "gpu_memory_reserved_mib", gpu_memory_reserved_mib, 0, total_mib / 2, "a size in MiB below half the total"
        )
    capability = engine.parse_capability(compute_capability)
    tp = _whole("tensor_parallel_size", tensor_parallel_size, high=1024)
    pp = _whole("pipeline_parallel_size", pipeline_parallel_size, high=1024)
    dp = _whole("data_parallel_size", data_parallel_size, high=4096)
    length = _whole("max_model_len", max_model_len)
    batched = _whole("max_num_batched_tokens", max_num_batched_tokens)
    seqs = _whole("max_num_seqs", max_num_seqs)
    if not isinstance(enforce_eager, bool):
        raise PlanError("enforce_eager", enforce_eager, "true or false is needed")
    if kv_cache_dtype not in KV_DTYPES:
        raise PlanError("kv_cache_dtype", kv_cache_dtype, f"one of {', '.join(KV_DTYPES)} is allowed")
    if quantization not in (None, "", "none") and not shape.quantization:
        raise PlanError("quantization", quantization, "the model's shape was read without it: give it to parse_config")
    facts = _engine(shape, engine_version, capability)
    element, refused = _element_bytes(shape, dtype, capability)

    total = cuda_total_gib(total_mib, gpu_memory_reserved_mib) * GIB
    requested = math.ceil(total * utilization)
    problems = tp_problems(
        shape, tp, engine_version=engine_version, expert_parallel=expert_parallel, data_parallel_size=dp
    )
    problems += pp_problems(shape, pp, engine_version=engine_version)
    if refused:
        problems.append(refused)
    if length > shape.max_position and not shape.unbounded:
        problems.append(f"max_model_len {length} is more than the {shape.max_position} tokens of the model's config")
    if batched < seqs:
        problems.append(f"max_num_batched_tokens {batched} is below max_num_seqs {seqs}")
    if batched < length and shape.model_type in ENCODERS:
        problems.append(
            f"max_num_batched_tokens {batched} is below max_model_len {length}: an encoder reads a text in one piece"
        )
    if problem := states_problem(shape, engine_version, facts.v0):
        problems.append(problem)
    if problems:
        return _refusal(requested, problems)

    world = "tp" if tp > 1 else "pp" if pp > 1 else "alone"
    kv_bytes = KV_DTYPES[kv_cache_dtype] or element
    expert_split = tp * dp if expert_parallel and shape.experts else 1
    stages = _stages(shape, tp, pp, expert_split, element, kv_bytes, facts.whole_from)
    if facts.v0 and batched < length <= facts.chunked_above:
        batched = length  # V0 reads a prompt in one piece, and profiles with the longest
    gathered = dp * batched if expert_split > 1 and dp > 1 else 0
    sms = _SMS.get(capability, 132)
    fused = 0.0 if enforce_eager else _fused_reduce(facts, tp, capability, batched * stages[0].hidden)
    if facts.v0:
        inside = V0_INSIDE[facts.family]["alone" if world == "alone" else "tp"]
        outside = V0_CONTEXT
        if facts.counts_all:  # the whole GPU counts: context, and whatever others hold
            inside, outside = inside + used_mib / 1024 + (V0_CONTEXT if world == "alone" else 0.0), 0.0
    else:
        outside = OUTSIDE[facts.family][world] + (OUTSIDE_EXPERTS if shape.experts and tp > 1 else 0.0)
        inside = INSIDE[world] + fused + (0.0 if enforce_eager or facts.runner_v2 else INSIDE_GRAPHS)

    free = total - used_mib * MIB - outside * GIB
    worst: tuple[float, int, _Stage, int, int, float, float] | None = None
    for number, stage in enumerate(stages):
        peak, steady = _activation(
            shape, facts, stage, batched=batched, seqs=seqs, length=length, eager=enforce_eager, sms=sms,
            element=element, tp=tp, gathered=gathered,
        )  # fmt: skip
        graphs = counted = 0.0
        if not enforce_eager:
            graphs, counted = _graphs(shape, facts, shape.num_layers // pp, seqs, batched)
        available = requested - stage.weights - peak - (inside + counted) * GIB
        blocks = available / stage.block_bytes if stage.block_bytes else available / (1 << 62)
        if worst is None or blocks < worst[0]:
            worst = (blocks, number, stage, peak, steady, graphs, counted)
    if worst is None:
        raise AssertionError("a model has one pipeline stage at least")
    _, number, stage, peak, steady, graphs, counted = worst
    available = requested - stage.weights - peak - (inside + counted) * GIB
    return _verdict(
        shape, facts, stage, number=number, requested=requested, free=free, available=available, peak=peak,
        steady=steady, graphs=graphs, counted=counted, inside=inside, outside=outside, length=length, batched=batched,
        utilization=utilization, total=total, held=_held(shape, facts, stage, min(seqs, batched), tp),
        rows=0 if enforce_eager else seqs,
    )  # fmt: skip


def _refusal(requested: int, problems: list[str]) -> MemoryPlan:
    nothing = 0.0
    return MemoryPlan(
        requested_gib=requested / GIB, weights_gib=nothing, activation_gib=nothing, non_torch_gib=nothing,
        cuda_graph_gib=nothing, kv_cache_gib=nothing, kv_cache_tokens=0, max_concurrency=nothing, fits=False,
        reason="; ".join(problems), outside_gib=nothing, footprint_gib=nothing, held_gib=nothing, warmup_gib=nothing,
        cuda_graph_counted_gib=nothing, kv_needed_gib=nothing, kv_least_gib=nothing, largest_max_model_len=0,
    )  # fmt: skip


def _need(stage: _Stage, length: int, batched: int) -> int:
    return sum(group.blocks(length, batched) for group in stage.groups)


def _longest(stage: _Stage, blocks: int, batched: int, limit: int) -> int:
    """The longest context of which one request fits into ``blocks``."""
    if _need(stage, limit, batched) <= blocks:
        return limit
    low, high = 0, limit  # fits, does not fit
    while high - low > 1:
        middle = (low + high) // 2
        if _need(stage, middle, batched) <= blocks:
            low = middle
        else:
            high = middle
    return low


def _verdict(
    shape: ModelShape, facts: _Engine, stage: _Stage, *, number: int, requested: float, free: float, available: float,
    peak: int, steady: int, graphs: float, counted: float, inside: float, outside: float, length: int, batched: int,
    utilization: float, total: float, held: float, rows: int,
) -> MemoryPlan:  # fmt: skip
    """``rows``: requests of the largest CUDA graph of a decoding batch."""
    needs_cache = bool(stage.groups)
    blocks = max(0, int(available // stage.block_bytes)) if needs_cache else 0
    need = _need(stage, length, batched) if needs_cache else 0
    # Graphs are captured with a state for each request. Source: config/compilation.py of 0.25.1 and 0.32.0.
    states = rows if any(group.kind == "state" for group in stage.groups) else 0
    concurrency = blocks / need if need else 0.0
    tokens = blocks * BLOCK
    if need and (len(stage.groups) > 1 or stage.groups[0].kind != "full"):
        tokens = int(concurrency * length)  # what the engine reports where layers hold different lengths
    uncounted = (graphs - counted) * GIB
    # Once the cache is there, graphs are captured and a full batch runs again to warm up kernels: that must fit into
    # what the peak left and what is free beside the request.
    warmup = 0.0 if facts.v0 or not needs_cache else LATE * GIB + stage.products * batched + steady - peak
    late = uncounted + warmup - (free - requested)
    warmup = max(0.0, warmup)
    g = GIB
    parts = (
        f"{requested / g:.2f} GiB ({utilization:g} of {total / g:.2f}) - weights {stage.weights / g:.2f} - activations "
        f"{peak / g:.2f} - libraries {inside:.2f}" + (f" - CUDA graphs {counted:.2f}" if counted else "")
    )
    longest = 0
    footprint = requested + max(0.0, uncounted) + warmup
    if not needs_cache:
        # Encoders keep no cache: nothing is profiled, and what they need must be free.
        resident = stage.weights + peak + inside * g + graphs * g
        footprint = max(footprint, resident)  # nothing holds them to what they request
        fits = requested <= free and resident <= free
        reason = (
            f"weights {stage.weights / g:.2f} GiB and activations {peak / g:.2f} GiB, no KV cache"
            if fits
            else f"{max(requested, resident) / g:.2f} GiB are needed and {max(0.0, free) / g:.2f} GiB are free"
        )
        longest = shape.max_position if fits else 0
        tokens, concurrency, available = 0, float(max(1, batched // length)) if fits else 0.0, 0.0
    else:
        longest = _longest(stage, blocks, batched, shape.max_position)
        # Engines that count the whole GPU as theirs find out by the KV cache.
        fits = (facts.v0 and facts.counts_all) or requested <= free
        if not fits:
            reason = (
                f"gpu_memory_utilization {utilization:g} asks for {requested / g:.2f} GiB and "
                f"{max(0.0, free) / g:.2f} GiB are free at the start: at most {max(0.0, free / total):.3f}"
            )
        elif available <= 0 or blocks < 1:
            fits = False
            reason = f"no memory is left for the KV cache: {parts} = {available / g:.2f} GiB"
        elif blocks < need:
            fits = False
            reason = (
                f"one request of {length} tokens needs {need * stage.block_bytes / g:.2f} GiB of KV cache: {parts} = "
                f"{available / g:.2f} GiB, enough for max_model_len {longest}"
            )
        elif blocks < states:
            fits = False
            reason = (
                f"max_num_seqs {states} is more than the {blocks} blocks of the KV cache, and CUDA graphs need one for the "
                f"state of each request: {parts} = {available / g:.2f} GiB. Lower max_num_seqs to {blocks}, or set "
                "enforce_eager"
            )
        elif late > 0 and not facts.v0:
            fits = False
            reason = (
                f"the KV cache fits, but starting takes {(uncounted + warmup) / g:.2f} GiB on top (CUDA graphs "
                f"{uncounted / g:.2f}, warm-up with {batched} tokens {warmup / g:.2f}) and {late / g:.2f} GiB of that are "
                "missing: lower gpu_memory_utilization or max_num_batched_tokens"
                + (", or set enforce_eager" if uncounted else "")
            )
        else:
            reason = f"{parts} = {available / g:.2f} GiB of KV cache for {tokens} tokens"
    return MemoryPlan(
        requested_gib=requested / g,
        weights_gib=stage.weights / g,
        activation_gib=peak / g,
        non_torch_gib=inside,
        cuda_graph_gib=graphs,
        kv_cache_gib=available / g,
        kv_cache_tokens=tokens,
        max_concurrency=concurrency,
        fits=fits,
        reason=reason,
        outside_gib=outside,
        footprint_gib=footprint / g + outside,
        held_gib=max(0.0, held - warmup / g),
        warmup_gib=warmup / g,
        cuda_graph_counted_gib=counted,
        kv_needed_gib=need * stage.block_bytes / g,
        kv_least_gib=max(need, states) * stage.block_bytes / g,
        largest_max_model_len=longest,
        stage=number,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the layout search asks
# ---------------------------------------------------------------------------------------------------------------------


def largest_max_model_len(shape: ModelShape, *, limit: int | None = None, **arguments: Any) -> int:
    """The longest ``max_model_len`` with which the engine starts, at most ``limit`` (default: the config's maximum).

    Args:
        arguments: those of ``engine_memory`` without max_model_len.

    Returns:
        tokens, 0 when no length is possible.
    """
    top = shape.max_position if limit is None else min(_whole("limit", limit), shape.max_position)
    plan = engine_memory(shape, max_model_len=top, **arguments)
    if plan.fits:
        return top
    guess = min(top, plan.largest_max_model_len)
    # Usually the cache's own answer is right at once; lengths change the profile batch of V0 and the MLA buffer.
    if guess and engine_memory(shape, max_model_len=guess, **arguments).fits:
        if guess == top or not engine_memory(shape, max_model_len=min(top, guess + BLOCK), **arguments).fits:
            return guess
        low, high = guess, top
    else:
        low, high = 0, guess or top
    while high - low > 1:
        middle = (low + high) // 2
        if engine_memory(shape, max_model_len=middle, **arguments).fits:
            low = middle
        else:
            high = middle
    return low


def lowest_utilization(shape: ModelShape, *, concurrency: float = 1.0, **arguments: Any) -> float | None:
    """The lowest ``gpu_memory_utilization``, in steps of 0.001, that holds ``concurrency`` requests of max_model_len.

    Args:
        arguments: those of ``engine_memory`` without gpu_memory_utilization.

    Returns:
        the utilization, or None when even what is free is too little.
    """
    wanted = _number("concurrency", concurrency, 0, 1e9, "a number above 0 is needed", above=True)

    def enough(thousandths: int) -> bool:
        plan = engine_memory(shape, gpu_memory_utilization=thousandths / 1000, **arguments)
        return plan.fits and (not plan.kv_needed_gib or plan.max_concurrency >= wanted)

    # More utilization gives more cache until the GPU has no more: start from arithmetic, end with the real answer. Which
    # pipeline stage decides depends on the utilization, so that the arithmetic may have to be done again where it ended.
    place = 1000
    for _ in range(arguments.get("pipeline_parallel_size", 1)):
        plan = engine_memory(shape, gpu_memory_utilization=place / 1000, **arguments)
        if not plan.kv_needed_gib and not plan.weights_gib:
            return None
        spent = plan.requested_gib - plan.kv_cache_gib + max(wanted * plan.kv_needed_gib, plan.kv_least_gib)
        if not plan.kv_needed_gib:
            spent = plan.weights_gib + plan.activation_gib + plan.non_torch_gib + plan.cuda_graph_gib
        start = math.ceil(spent / plan.requested_gib * place)
        for thousandths in range(max(1, start - 1), min(1000, start + 4) + 1):
            if enough(thousandths):
                return thousandths / 1000
        if not 1 <= start < 1000 or start == place:
            break
        place = start
    return None
