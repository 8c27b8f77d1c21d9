# SPDX-License-Identifier: GPL-3.0-or-later
"""Shape of a model, read from its Hugging Face ``config.json``.

``parse_config`` turns the file into a ``ModelShape``; ``tp_problems``, ``pp_problems`` and ``tp_sizes`` say how vLLM
can split it. All sizes are counts of elements unless the name says bytes, MiB or GiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import PlanError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class ModelShape:
    """What the planner knows of a model. Build it with ``parse_config``.

    Attributes:
        architecture: first of ``architectures``, such as ``Qwen2ForCausalLM``.
        kind: ``generate`` or ``pool`` (embedding, reranking, classification).
        num_layers: decoder (or encoder) layers.
        heads, kv_heads, head_dim: attention of the widest layer kind.
        hidden_size, intermediate_size, vocab_size: 0 where the model has none.
        experts, experts_per_token: 0 for dense models.
        max_position: largest context that the config allows, in tokens.
        dtype: dtype of the config (``bfloat16``, ``float16``, ``float32``).
        quantization: method of the checkpoint (``fp8``, ``gptq``, ``awq``, ``compressed-tensors`` ...) or None.
        parameters: count of parameters.
        confidence: ``high`` (a family whose layers are known), ``medium`` (read by the general rules) or ``low``.
        notes: one line each: what was assumed.
    """

    architecture: str
    model_type: str
    kind: str
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    experts: int
    experts_per_token: int
    max_position: int
    dtype: str
    quantization: str | None
    tie_word_embeddings: bool
    multimodal: bool
    trust_remote_code: bool
    weights_gib: float | None
    parameters: int
    confidence: str
    notes: tuple[str, ...] = ()
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def kv_bytes_per_token(self, tensor_parallel_size: int = 1, element_bytes: int = 2) -> int:
        """Bytes of KV cache for one token of a long context on one GPU, summed over all layers."""
        raise NotImplementedError


def parse_config(
    config: Config,
    *,
    weights_gib: float | None = None,
    safetensors: Mapping[str, int] | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
) -> ModelShape:
    """Reads a Hugging Face ``config.json``.

    Args:
        config: the file as a mapping.
        weights_gib: size of the weight files in GiB, when known; overrides what is computed from the shape.
        safetensors: sizes of the weight files in bytes by name (same use as ``weights_gib``).
        quantization: what ``--quantization`` will be, or None for what the checkpoint says.
        dtype: what ``--dtype`` will be.

    Raises:
        PlanError: the mapping is not a model's config, or a field is absurd.
    """
    raise NotImplementedError


def tp_problems(
    shape: ModelShape,
    tp: int,
    *,
    engine_version: str | None = None,
    expert_parallel: bool = False,
    quantization: str | None = None,
) -> list[str]:
    """Reasons why ``tp`` is not possible, such as ``TP 3 is not possible: 40 attention heads``. Empty when it is."""
    raise NotImplementedError


def pp_problems(shape: ModelShape, pp: int, *, engine_version: str | None = None) -> list[str]:
    """Reasons why ``pp`` stages are not possible. Empty when they are."""
    raise NotImplementedError


def tp_sizes(config: Config, max_tp: int = 16) -> list[int]:
    """Valid tensor-parallel sizes from 1 to ``max_tp`` for a Hugging Face config."""
    shape = parse_config(config)
    if max_tp < 1:
        raise PlanError("max", max_tp, "give a whole number of at least 1")
    return [tp for tp in range(1, max_tp + 1) if not tp_problems(shape, tp)]
