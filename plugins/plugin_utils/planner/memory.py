# SPDX-License-Identifier: GPL-3.0-or-later
"""Where each GiB of one GPU goes when one vLLM engine starts on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .model import ModelShape


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the GPU that decides (of a pipeline: the stage with the fewest blocks). All GiB are 2**30 bytes.

    Attributes:
        requested_gib: utilization x memory that CUDA sees.
        weights_gib, activation_gib, non_torch_gib: what profiling takes from the request.
        cuda_graph_gib: memory that CUDA graphs take once captured (only part of the request where the engine
            subtracts it: see ``cuda_graph_counted_gib``).
        kv_cache_gib: what is left for the KV cache (0 for models that have none).
        kv_cache_tokens: tokens that the cache holds over all requests of one engine.
        max_concurrency: requests of max_model_len tokens that fit at once.
        fits: the engine starts.
        reason: one sentence: why it fits or what is missing, with the arithmetic.
        outside_gib: CUDA context and NCCL, outside the request, on the same GPU.
        footprint_gib: what the GPU holds once the engine serves (request + outside + uncounted graphs).
        kv_needed_gib: KV cache that one request of max_model_len tokens needs.
        largest_max_model_len: the longest context that this KV cache holds (0 when none; capped at the config's).
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
    cuda_graph_counted_gib: float
    kv_needed_gib: float
    largest_max_model_len: int

    def as_dict(self) -> dict[str, Any]:
        """The ten keys of the filter ``vllm_memory``, sizes rounded to 3 digits."""
        raise NotImplementedError


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
        gpu_memory_total_mib: total memory as ``nvidia-smi`` shows it.
        gpu_memory_used_mib: memory in use by others (with ``gpu_memory_total_mib`` it says what is free).
        gpu_memory_reserved_mib: ``memory.reserved`` of ``nvidia-smi``: part of the total that CUDA cannot see; None
            estimates it.

    Raises:
        PlanError: an argument is out of range or not known (the message names it).
    """
    raise NotImplementedError


def largest_max_model_len(shape: ModelShape, *, limit: int | None = None, **engine: Any) -> int:
    """The longest ``max_model_len`` with which the engine starts (``engine``: arguments of ``engine_memory`` without
    max_model_len), at most ``limit`` (default: the config's maximum). 0 when none."""
    raise NotImplementedError


def lowest_utilization(shape: ModelShape, *, concurrency: float = 1.0, **engine: Any) -> float | None:
    """The lowest ``gpu_memory_utilization`` (rounded up to 0.001) that holds ``concurrency`` requests of max_model_len
    tokens (``engine``: arguments of ``engine_memory`` without gpu_memory_utilization). None when even what is free
    is too little."""
    raise NotImplementedError
