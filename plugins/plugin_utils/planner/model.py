# SPDX-License-Identifier: GPL-3.0-or-later
"""Shape of a model, read from its Hugging Face ``config.json``.

``parse_config`` turns the file into a ``ModelShape``; ``tp_problems``, ``pp_problems`` and ``tp_sizes`` say how vLLM
can split it. All sizes are counts of elements unless the name says bytes, MiB or GiB.

Sources: vLLM 0.24.0 and 0.25.1 (model_executor/layers/linear.py, vocab_parallel_embedding.py, fused_moe,
quantization, config/model.py, distributed/utils.py).
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import PlanError
from .tables import load

Config = Mapping[str, Any]
GIB = 1 << 30
MIB = 1 << 20
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float": 4, "float32": 4}

# Families that consist of the layers this module builds (vLLM's model classes). Those that were also measured are in
# tests/benchmarks/truth; their weights came out within 1% (4-bit ones 2%).
KNOWN = frozenset({
    "llama", "qwen2", "qwen3", "mistral", "qwen2_moe", "qwen3_moe", "falcon", "phi3", "gemma", "gemma2",
    "gemma3_text", "gemma3", "gpt_oss", "deepseek_v2", "deepseek_v3", "xlm-roberta", "bert", "roberta", "mixtral",
    "baichuan", "internlm2", "starcoder2", "step3p5", "granite", "olmo2"
})  # fmt: skip
# MLP of two matrices (up, down) instead of three.
UNGATED = frozenset({
    "falcon", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "bloom", "opt", "mpt", "phi", "starcoder2", "nemotron",
    "nemotron_h", "bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "distilbert"
})  # fmt: skip
# tie_word_embeddings where the config leaves it out: these families' own default (the others do not tie).
TIED = frozenset({
    "gemma", "gemma2", "gemma3", "gemma3_text", "falcon", "gpt2", "bloom", "opt", "mpt", "cohere", "cohere2",
    "gpt_bigcode", "starcoder2", "gpt_neo", "codegen", "mamba", "falcon_mamba"
})  # fmt: skip
BIAS_QKV = frozenset({
    "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "gpt_oss", "gpt2", "opt", "bloom", "bert", "roberta",
    "xlm-roberta", "phi"
})  # fmt: skip
ENCODERS = frozenset({
    "bert", "roberta", "xlm-roberta", "modernbert", "nomic_bert", "distilbert", "camembert", "electra", "new"
})  # fmt: skip
# Their position table has two rows more than positions (padding comes first).
OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert"})
# Names of classes that generate, before those that pool: ChatModel is a Model, too (_SUFFIX_TO_DEFAULTS of config/model.py).
GENERATE_SUFFIXES = ("ChatModel", "LMHeadModel")
POOL_SUFFIXES = ("Model", "ForSequenceClassification", "ForRewardModel", "ForTokenClassification", "EmbeddingModel")
SLIDING = frozenset({"sliding_attention", "sliding", "local_attention", "local", "swa"})
CHUNKED = frozenset({"chunked_attention", "chunked"})
STATEFUL = frozenset({"mamba", "mamba2", "linear_attention", "recurrent", "conv", "short_conv", "hybrid_mamba", "gdn"})
FULL = frozenset({"full_attention", "attention", "full", "global", "global_attention"})
MLPS = frozenset({"mlp", "moe"})  # layers that are an MLP alone
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # letters of Nemotron-H's hybrid_override_pattern


@dataclass(frozen=True)
class Attention:
    """Attention of one layer. ``kind``: full, sliding, chunked, mla, state (Mamba, linear attention) or encoder.

    ``window``: tokens a sliding or chunked layer looks back. MLA, and full attention out of a latent: ``latent``
    (kv_lora_rank), ``rope_dim``, ``nope_dim``, ``q_rank`` (0: q is one matrix), ``index_heads`` of ``index_dim`` that the
    indexer of sparse attention chooses by (0: it has none, or reads an earlier layer's choice). State:
    ``state`` elements for one request over all heads (conv and recurrent), ``state_bytes``: bytes of a recurrent one
    (0: as the model's others), ``projection``: elements of its matrices, ``groups`` of its heads (0: none). ``shared``: it
    reads the KV cache of an earlier layer and has none.
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    window: int = 0
    latent: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    q_rank: int = 0
    index_heads: int = 0
    index_dim: int = 0
    bias: bool = False
    state: tuple[int, int] = (0, 0)
    state_bytes: int = 0
    projection: int = 0
    state_heads: int = 0
    groups: int = 0
    shared: bool = False

    @property
    def index_bytes(self) -> int:
        """Of a token in the indexer's cache: 8 bits an element, a scale of 32 for each 128 (deepseek_v2.py)."""
        return self.index_dim + self.index_dim // 128 * 4


@dataclass(frozen=True)
class Mlp:
    """MLP of one layer: dense (``experts`` 0) or experts of ``expert_size`` beside shared ones of ``shared_size``.

    ``latent``: what the experts read and write instead of the hidden size (0: the hidden size), between two matrices.
    """

    intermediate: int
    gated: bool
    experts: int = 0
    top_k: int = 0
    expert_size: int = 0
    shared_size: int = 0
    latent: int = 0


@dataclass(frozen=True)
class Layer:
    """``beside``: a state that works on the same input as the attention."""

    attention: Attention | None
    mlp: Mlp | None
    beside: Attention | None = None

    @property
    def mixers(self) -> tuple[Attention, ...]:
        return tuple(mixer for mixer in (self.attention, self.beside) if mixer)


@dataclass(frozen=True)
class Quantization:
    """Weights of the quantized matrices: ``bits`` each, with scales of ``scale_bits`` for every ``group`` inputs
    (0: one for each output) or for each block. ``skip_attention``, ``skip_dense``: those stay unquantized. ``halves``:
    a group of the experts may be cut, and its scales be repeated. ``integer``: they are integers.
    ``whole``: matrices of the files cannot be cut."""

    method: str
    bits: float
    group: int = 0
    scale_bits: float = 16
    zero_bits: float = 0
    block: tuple[int, int] = (0, 0)
    activation_bits: int = 16
    integer: bool = False
    skip_attention: bool = False
    skip_dense: bool = False
    marlin: bool = False
    halves: bool = False
    whole: bool = False

    @property
    def kernels(self) -> str:
        """Name in ``quantization`` of engines.yml: compressed-tensors has others for each kind of weights."""
        if self.method != "compressed-tensors":
            return self.method
        kind = "packed" if self.activation_bits == 16 else ""
        return f"{self.method} {kind if self.integer else 'float'}".strip()


@dataclass(frozen=True)
class ModelShape:
    """What the planner knows of a model. Build it with ``parse_config``.

    Attributes:
        architecture: first of ``architectures``, such as ``Qwen2ForCausalLM``.
        kind: ``generate`` or ``pool`` (embedding, reranking, classification).
        num_layers: decoder (or encoder) layers; two for each one of the config that has all parts twice.
        heads, kv_heads, head_dim: attention of the widest layer kind.
        hidden_size, intermediate_size, vocab_size: 0 where the model has none.
        experts, experts_per_token: 0 for dense models.
        max_position: largest context that the config allows, in tokens.
        dtype: dtype of the config (``bfloat16``, ``float16``, ``float32``).
        quantization: method of the checkpoint (``fp8``, ``gptq``, ``awq``, ``compressed-tensors`` ...) or None.
        weights_gib: size of the weight files, when it was given.
        parameters: count of parameters.
        confidence: ``high`` (a family whose layers are known), ``medium`` (read by the general rules) or ``low``.
        notes: one line each: what was assumed.
        layers: every layer in order.
        unbounded: the config has no largest context: max_position is what vLLM takes unless it is told another one.
        compressed: layers keep their KV cache in parts (``compress_ratios``).
        outer_type: model_type of the whole, where model_type is that of its language model.
        vision_cut: numbers of the vision tower that TP has to divide where it cuts it, by their names.
        rope_type: kind of rope_scaling, such as ``llama3``; empty where the config has none.
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
    layers: tuple[Layer, ...] = field(default=(), repr=False)
    quant: Quantization | None = None
    position_rows: int = 0
    rotary_elements: int = 0
    vision_parameters: int = 0
    vision_cut: tuple[tuple[str, int], ...] = ()
    unbounded: bool = False
    compressed: bool = False
    outer_type: str = ""
    rope_type: str = ""
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def keeps_vision_whole(self, tp: int) -> bool:
        """TP cannot cut the vision tower, so that every GPU holds all of it (--mm-encoder-tp-mode data)."""
        return any(number % tp for _, number in self.vision_cut)

    @property
    def has_kv_cache(self) -> bool:
        return any(mixer.kind != "encoder" for layer in self.layers for mixer in layer.mixers)

    @property
    def states(self) -> int:
        """Layers that keep a state for each request."""
        return sum(any(mixer.kind == "state" for mixer in layer.mixers) for layer in self.layers)

    def kv_bytes_per_token(self, tensor_parallel_size: int = 1, element_bytes: int = 2) -> int:
        """Bytes of KV cache for one token of a long context on one GPU, summed over all layers that keep it."""
        return sum(
            kv_page(layer.attention, tensor_parallel_size, element_bytes)
            for layer in self.layers
            if layer.attention and layer.attention.kind not in ("encoder", "state") and not layer.attention.shared
        )


def kv_page(attention: Attention, tp: int, element_bytes: float) -> int:
    """Bytes of one token in one layer's KV cache on one GPU."""
    if attention.kind == "mla":  # one latent vector for all heads: every GPU holds all of it
        return int((attention.latent + attention.rope_dim) * element_bytes) + attention.index_bytes
    v_dim = (
        attention.head_dim if attention.latent else attention.v_dim
    )  # out of a latent they are padded to the keys' size
    return int(max(1, attention.kv_heads // tp) * (attention.head_dim + v_dim) * element_bytes)


# ---------------------------------------------------------------------------------------------------------------------
# Reading the config
# ---------------------------------------------------------------------------------------------------------------------


class _Reader:
    """Typed look-ups in a config under any of several names; wrong types and absurd values are refused by name."""

    def __init__(self, config: Config, field: str = "config") -> None:
        self.config = config
        self.field = field

    def find(self, *names: str) -> tuple[str, Any]:
        for name in names:
            if self.config.get(name) is not None:
                return name, self.config[name]
        return names[0], None

    def count(self, *names: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        name, value = self.find(*names)
        if value is None:
            if default is None:
                raise PlanError(
                    f"{self.field}.{name}",
                    None,
                    "is this the config.json of a language model? If its class has a default for it, give the whole file as "
                    f"`config` of the service, with {name} in it",
                )
            return default
        if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise PlanError(f"{self.field}.{name}", value, f"a whole number from {low} to {high} is needed")
        return value

    def flag(self, *names: str, default: bool = False) -> bool:
        value = self.find(*names)[1]
        return default if value is None else bool(value)

    def number(self, name: str, default: float) -> float:
        """A finite number above 0."""
        value = self.find(name)[1]
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1 << 20:
            raise PlanError(f"{self.field}.{name}", value, f"a number above 0 and at most {1 << 20} is needed")
        return value

    def items(self, name: str, least: int = 0) -> Sequence[Any]:
        """A list; an empty one where there is none."""
        value = self.find(name)[1]
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)) or 0 < len(value) < least:
            raise PlanError(f"{self.field}.{name}", value, f"a list of at least {least} entries is needed")
        return value


def _text_config(config: Config) -> tuple[Config, bool]:
    """(the language model's part, whether there is another part beside it)."""
    for name in ("text_config", "llm_config", "language_config"):
        part = config.get(name)
        if isinstance(part, Mapping) and part:
            return {**{k: v for k, v in config.items() if not isinstance(v, Mapping)}, **part}, True
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping) and isinstance(thinker.get("text_config"), Mapping):
        return {**config, **thinker["text_config"]}, True
    return config, isinstance(config.get("vision_config"), Mapping)


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
        weights_gib: size of the weight files in GiB, when known: weights are scaled to it.
        safetensors: sizes of the weight files in bytes by name (same use as ``weights_gib``).
        quantization: what ``--quantization`` will be, or None for what the checkpoint says.
        dtype: what ``--dtype`` will be; only checked here, ``engine_memory`` needs it.

    Raises:
        PlanError: the mapping is not a model's config, or a field is absurd.
    """
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise PlanError("dtype", dtype, f"one of auto, {', '.join(sorted(DTYPE_BYTES))} is allowed")
    if not isinstance(config, Mapping):
        raise PlanError("config", config, "give the content of a model's config.json as a mapping")
    if not config:
        raise PlanError("config", config, "it is empty; give the content of a model's config.json")
    text, multimodal = _text_config(config)
    notes: list[str] = []
    architectures = config.get("architectures")
    if architectures is not None and (
        isinstance(architectures, str)
        or not isinstance(architectures, Sequence)
        or not all(isinstance(a, str) for a in architectures)
    ):
        raise PlanError("config.architectures", architectures, "a list of class names is needed")
    architecture = architectures[0] if architectures else ""
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    if not architecture and not model_type:
        raise PlanError("config.architectures", None, "a model's config.json names its class or its model_type")
    # What the class of the config fills in, and what it calls by other names.
    stateful = load("configs")["states"].get(model_type)
    if text is not config or stateful:
        text = {**load("configs")["defaults"].get(model_type, {}), **text}
    if stateful:
        text = {**text, **{name: text[own] for name, own in stateful.items() if own in text}}
    for name in load("configs")["parts"].get(model_type, ()):
        if isinstance(text.get(name), Mapping):
            text = {**text[name], **text}
    read = _Reader(text)

    hidden = read.count("hidden_size", "n_embd", "d_model", "dim", high=1 << 20)
    named = len(_layer_names(text)) or None
    num_layers = read.count("num_hidden_layers", "n_layer", "num_layers", "n_layers", default=named, high=2048)
    heads = 1
    if stateful is None:
        heads = read.count("num_attention_heads", "n_head", "num_heads", "n_heads", high=4096)
    vocab = read.count("vocab_size", "padded_vocab_size", high=1 << 24)
    head_dim = read.count("head_dim", "attention_head_dim", "kv_channels", default=max(1, hidden // heads), high=4096)
    if "head_dim" not in text and "kv_channels" not in text and hidden % heads and not text.get("kv_lora_rank"):
        raise PlanError(
            "config.num_attention_heads", heads, f"it must divide hidden_size {hidden}, or head_dim be given"
        )
    kv_heads = _kv_heads(read, model_type, heads)
    ungated = model_type in UNGATED
    intermediate = read.count(
        "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim", default=4 * hidden, high=1 << 24
    )
    layers = _layers(read, model_type, num_layers, heads, kv_heads, head_dim, hidden, intermediate, not ungated, notes)
    num_layers = len(layers)
    encoder = model_type in ENCODERS
    kind = "pool" if encoder or _pools(architecture) else "generate"
    tied = read.flag("tie_word_embeddings", default=model_type in TIED)
    quant = _quantization(config, text, quantization, notes)
    known = model_type in KNOWN and not multimodal
    confidence = "high" if known else "medium"
    if not known:
        label = architecture or model_type
        notes.append(f"{label}: layers read by the general rules, not compared with a measurement")
        if multimodal and weights_gib is None and safetensors is None:
            notes.append("the part beside the text model is estimated; give weights_gib for the true size")
    if not architecture:
        notes.append(f"no architectures in the config: taken for a model of type {model_type}")
        confidence = "low"
    if any(mixer.kind == "state" for layer in layers for mixer in layer.mixers) and confidence != "low":
        notes.append("layers with a state instead of a KV cache are estimated")
        confidence = "medium"

    config_dtype = str(text.get("torch_dtype") or text.get("dtype") or config.get("torch_dtype") or "float16")
    config_dtype = config_dtype.removeprefix("torch.")
    if config_dtype not in DTYPE_BYTES:
        raise PlanError("config.torch_dtype", config_dtype, f"one of {', '.join(sorted(DTYPE_BYTES))} is needed")
    vision = _vision_parameters(config.get("vision_config")) if multimodal else 0
    max_position = _max_position(read, text, model_type)
    position_rows = (
        read.count("max_position_embeddings", default=0, low=0) if encoder or model_type in ("gpt2", "opt") else 0
    )
    # One table of cosines and sines for all layers, at the length of the config.
    rotary = 0 if position_rows or stateful else int(_rotary_positions(read, text) * head_dim * _partial(text))
    if text.get("kv_lora_rank"):
        rotary = _rotary_positions(read, text) * 2 * read.count("qk_rope_head_dim", default=64)
    widest = max((layer.attention for layer in layers if layer.attention), key=lambda a: a.heads, default=None)
    moe = next((layer.mlp for layer in layers if layer.mlp and layer.mlp.experts), None)
    if safetensors is not None:
        total = 0
        if not isinstance(safetensors, Mapping):
            raise PlanError(
                "safetensors", safetensors, "a mapping of the files' names to their sizes in bytes is needed"
            )
        for name, size in safetensors.items():
            if isinstance(size, bool) or not isinstance(size, (int, float)) or size < 0:
                raise PlanError(f"safetensors[{name}]", size, "a size in bytes, 0 or more, is needed")
            total += int(size)
        if weights_gib is None:
            weights_gib = total / GIB
    if weights_gib is not None and (
        isinstance(weights_gib, bool) or not isinstance(weights_gib, (int, float)) or not 0 < weights_gib < 1e5
    ):
        raise PlanError("weights_gib", weights_gib, "a size in GiB above 0 is needed")
    shape = ModelShape(
        architecture=architecture,
        model_type=model_type,
        kind=kind,
        num_layers=num_layers,
        heads=widest.heads if widest else heads,
        kv_heads=widest.kv_heads if widest else kv_heads,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocab,
        experts=moe.experts if moe else 0,
        experts_per_token=moe.top_k if moe else 0,
        max_position=max_position,
        dtype=config_dtype,
        quantization=quant.method if quant else None,
        tie_word_embeddings=tied,
        multimodal=multimodal,
        trust_remote_code=bool(config.get("auto_map")),
        weights_gib=weights_gib,
        parameters=0,
        confidence=confidence,
        notes=tuple(notes),
        layers=layers,
        quant=quant,
        position_rows=position_rows,
        rotary_elements=rotary,
        vision_parameters=vision,
        vision_cut=_vision_cut(config) if multimodal else (),
        unbounded=stateful is not None and not _limits(read),
        compressed=bool(text.get("compress_ratios")),
        outer_type=str(config.get("model_type") or model_type),
        rope_type=str(_rope(text).find("rope_type", "type")[1] or ""),
    )
    parameters = sum(rows * cols for _, rows, cols, _ in matrices(shape, 1, 1, range(num_layers), True, True))
    return replace(shape, parameters=parameters + vision, cache={})


def _kv_heads(read: _Reader, model_type: str, heads: int) -> int:
    if model_type == "falcon" or read.config.get("multi_query") is not None:
        if read.flag("new_decoder_architecture"):
            return read.count("num_kv_heads", "num_key_value_heads", default=heads)
        if read.flag("multi_query", default=model_type == "falcon"):
            return read.count("multi_query_group_num", "n_head_kv", default=1)
        return heads
    if model_type == "chatglm" and read.flag("multi_query_attention"):
        return read.count("multi_query_group_num", default=heads)
    kv = read.count(
        "num_key_value_heads",
        "num_kv_heads",
        "num_attention_groups",
        "n_head_kv",
        "kv_n_heads",
        default=heads,
        high=4096,
    )
    if heads % kv:
        raise PlanError("config.num_key_value_heads", kv, f"it must divide the {heads} attention heads")
    return kv


def _pools(architecture: str) -> bool:
    if architecture.endswith(GENERATE_SUFFIXES) or architecture in load("configs")["generators"]:
        return False
    return architecture.endswith(POOL_SUFFIXES) and "ForCausalLM" not in architecture


def _partial(text: Config) -> float:
    rope = text.get("rope_parameters")
    value = text.get("partial_rotary_factor") or (
        rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    )
    return float(value) if isinstance(value, (int, float)) and 0 < value <= 1 else 1.0


def _rope(text: Config) -> _Reader:
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(name), Mapping):
            return _Reader(text[name], f"config.{name}")
    return _Reader({})


def _rotary_positions(read: _Reader, text: Config) -> int:
    """Rows of the table of cosines: a yarn table is built for the stretched length."""
    positions = read.count("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=2048)
    rope = _rope(text)
    if str(rope.find("rope_type", "type")[1]) in ("yarn", "deepseek_yarn"):
        return int(rope.count("original_max_position_embeddings", default=positions) * rope.number("factor", 1))
    return positions


def _limits(read: _Reader) -> list[int]:
    """The largest contexts that a config names. model_max_length wins over the others, as in vLLM."""
    names: tuple[str, ...] = (
        "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions",
        "max_sequence_length", "max_seq_length", "seq_len",
    )  # fmt: skip
    if read.config.get("model_max_length"):
        names = ("model_max_length",)
    return [read.count(name, high=1 << 30) for name in names if read.config.get(name) is not None]


def _max_position(read: _Reader, text: Config, model_type: str) -> int:
    if text.get("sentence_max_seq_length") is not None:  # added by the module model_info
        return read.count("sentence_max_seq_length", high=1 << 30)
    limit = min(_limits(read), default=2048)
    if model_type in OFFSET_POSITIONS:
        return max(1, limit - 2)
    rope = _rope(text)
    kind = str(rope.find("rope_type", "type")[1] or "default")
    if model_type.startswith("gemma3"):  # its max_position_embeddings are stretched ones
        return limit
    factor = rope.number("factor", 0)
    if factor and kind not in ("default", "su", "longrope", "llama3", "mrope"):
        if kind in ("yarn", "deepseek_yarn"):
            limit = rope.count("original_max_position_embeddings", default=limit)
        return int(limit * factor)
    return limit


def _layer_names(text: Config) -> list[str]:
    """What the config calls each layer, in words; empty where it does not say."""
    pattern = text.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return [PATTERN.get(letter, "none") for letter in pattern]
    types = text.get("layer_types") or text.get("layers_block_type")
    return [str(item) for item in types] if isinstance(types, Sequence) and not isinstance(types, str) else []


def _kinds(read: _Reader, model_type: str, num_layers: int, notes: list[str]) -> list[str]:
    """Kind of each layer's attention; ``both``: attention and a state beside it."""
    text = read.config
    if model_type in load("configs")["states"]:
        return ["state"] * num_layers
    if model_type in load("configs")["attention_beside_state"]:
        return ["both"] * num_layers
    if model_type in ENCODERS:
        return ["encoder"] * num_layers
    attention = "mla" if text.get("kv_lora_rank") and model_type not in load("configs")["latent_spread"] else "full"
    states = _linear(read).items("kda_layers")  # counted from 1
    if states:
        return ["state" if index + 1 in states else attention for index in range(num_layers)]
    if attention == "mla":
        return ["mla"] * num_layers
    hybrid = read.items("hybrid_layer_pattern", num_layers)
    if hybrid:
        return ["sliding" if hybrid[index] == 1 else "full" for index in range(num_layers)]
    names = _layer_names(text)
    if len(names) >= num_layers:
        kinds = []
        for name in names[:num_layers]:
            if name in SLIDING:
                kinds.append("sliding")
            elif name in CHUNKED:
                kinds.append("chunked")
            elif name in STATEFUL:
                kinds.append("state")
            elif name in MLPS or name == "none":
                kinds.append("none")
            else:
                if name not in FULL:
                    notes.append(f"layer type {name} is not known: planned as full attention")
                kinds.append("full")
        if "sliding" in kinds and not _window(read):
            kinds = ["full" if kind == "sliding" else kind for kind in kinds]
        return kinds
    period = text.get("attn_layer_period")
    if isinstance(period, int) and period > 0:
        offset = read.count("attn_layer_offset", default=0, low=0)
        return ["full" if index % period == offset else "state" for index in range(num_layers)]
    indices = text.get("attn_layer_indices") or text.get("full_attn_idxs")
    if isinstance(indices, Sequence) and not isinstance(indices, str):
        return ["full" if index in indices else "state" for index in range(num_layers)]
    interval = text.get("full_attention_interval")
    if isinstance(interval, int) and interval > 0:
        return ["full" if index % interval == interval - 1 else "state" for index in range(num_layers)]
    if isinstance(text.get("attention_chunk_size"), int) and text.get("no_rope_layers") is not None:
        chunked = read.items("no_rope_layers", num_layers) or [int((i + 1) % 4 != 0) for i in range(num_layers)]
        return ["chunked" if chunked[index] else "full" for index in range(num_layers)]
    if _window(read):
        every = text.get("sliding_window_pattern") or text.get("_sliding_window_pattern")
        if not every and model_type in ("gemma3_text", "gemma3"):
            every = 6
        if not every and model_type == "gemma2":
            every = 2
        if isinstance(every, int) and every > 1:
            return ["full" if (index + 1) % every == 0 else "sliding" for index in range(num_layers)]
        return ["sliding"] * num_layers
    return ["full"] * num_layers


def _linear(read: _Reader) -> _Reader:
    """Kimi-Linear's own part of the config."""
    part = read.config.get("linear_attn_config")
    return _Reader(part if isinstance(part, Mapping) else {}, "config.linear_attn_config")


def _window(read: _Reader) -> int:
    text = read.config
    window = text.get("sliding_window")
    if isinstance(window, list):
        window = next((item for item in window if item), None)
    if isinstance(window, bool) or not isinstance(window, int) or window <= 0:
        return 0
    # Qwen2 and Qwen3 name a window and switch it off beside it.
    return window if text.get("use_sliding_window", True) else 0


def _layers(
    read: _Reader,
    model_type: str,
    num_layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    intermediate: int,
    gated: bool,
    notes: list[str],
) -> tuple[Layer, ...]:
    text = read.config
    bias = read.flag("attention_bias", "qkv_bias", "add_qkv_bias", default=model_type in BIAS_QKV)
    window = _window(read) or read.count("attention_chunk_size", default=0, low=0)
    other = text.get("attention_other_setting")
    attentions: dict[str, Attention | None] = {"none": None}

    def attention(kind: str) -> Attention | None:
        if kind in attentions:
            return attentions[kind]
        if kind == "mla" or model_type in load("configs")["latent_spread"]:
            nope = read.count("qk_nope_head_dim", default=128)
            rope_dim = read.count("qk_rope_head_dim", default=64)
            made = Attention(
                kind,
                heads,
                heads,
                nope + rope_dim,
                read.count("v_head_dim", default=nope),
                latent=read.count("kv_lora_rank"),
                rope_dim=rope_dim,
                nope_dim=nope,
                q_rank=read.count("q_lora_rank", default=0, low=0),
            )
        elif kind == "state":
            made = replace(_state_attention(read, hidden), state_bytes=_state_bytes(read, model_type))
        else:
            made = Attention(kind, heads, kv_heads, head_dim, head_dim, bias=bias)
            if kind in ("sliding", "chunked"):
                made = replace(made, window=window)
            if kind == "full" and text.get("global_head_dim") is not None:  # Gemma 4: wider heads, fewer of them for KV
                size, kv = read.count("global_head_dim", high=4096), kv_heads
                if read.flag("attention_k_eq_v"):
                    kv = read.count("num_global_key_value_heads", default=kv_heads, high=4096)
                made = replace(made, kv_heads=kv, head_dim=size, v_dim=size)
            if text.get("hybrid_layer_pattern"):  # MiMo-V2: values have a size of their own, sliding layers have all
                own = "swa_" if kind == "sliding" else ""
                size = read.count(f"{own}head_dim", default=head_dim, high=4096)
                made = replace(
                    made,
                    heads=read.count(f"{own}num_attention_heads", default=heads, high=4096),
                    kv_heads=read.count(f"{own}num_key_value_heads", default=kv_heads, high=4096),
                    head_dim=size,
                    v_dim=read.count(f"{own}v_head_dim", default=size, high=4096),
                    window=read.count("sliding_window_size", "sliding_window") if own else 0,
                )
            if isinstance(other, Mapping) and kind in str(other.get("attention_type")):
                groups = _Reader(other)
                made = replace(
                    made,
                    heads=groups.count("num_attention_heads", default=heads),
                    kv_heads=groups.count("num_attention_groups", default=kv_heads),
                    head_dim=groups.count("head_dim", default=head_dim),
                    v_dim=groups.count("head_dim", default=head_dim),
                )
        attentions[kind] = made
        return made

    # Llama 4 names its dense layers' size apart: its intermediate_size is that of the experts.
    dense = Mlp(read.count("intermediate_size_mlp", default=intermediate, high=1 << 24), gated)
    sparse, is_sparse = _experts(read, num_layers, intermediate, gated)
    kinds = _kinds(read, model_type, num_layers, notes)
    names = _layer_names(text)
    # Where MLPs are layers of their own, the others have none.
    apart = len(names) >= num_layers and (
        isinstance(text.get("hybrid_override_pattern"), str) or MLPS.intersection(names)
    )
    blocks = text.get("block_configs")
    sizes = dict(enumerate(blocks)) if isinstance(blocks, list) else {}
    # Gemma 3n and 4: the last layers read the KV cache of earlier ones, and may have an MLP of twice the width for it.
    shared_from = num_layers - read.count("num_kv_shared_layers", default=0, low=0, high=num_layers - 1)
    beyond = replace(dense, intermediate=2 * dense.intermediate) if read.flag("use_double_wide_mlp") else dense
    cache: dict[Layer, Layer] = {}
    layers = []
    for index, kind in enumerate(kinds):
        shares = index >= shared_from
        mlp: Mlp | None = sparse if sparse and is_sparse[index] else beyond if shares else dense
        if apart:
            mlp = {"mlp": dense, "moe": sparse}.get(names[index])
        if mlp and mlp.experts and isinstance(sizes.get(index), Mapping):
            own = _Reader(sizes[index], f"config.block_configs[{index}]")  # Nemotron-H Puzzle: experts of unlike sizes
            mlp = replace(
                mlp,
                expert_size=own.count("moe_intermediate_size", default=mlp.expert_size),
                top_k=own.count("num_experts_per_tok", default=mlp.top_k, high=mlp.experts),
            )
        if model_type in load("configs")["states"]:
            mlp = None
        both = kind == "both"
        made = Layer(attention("full" if both else kind), mlp, attention("state") if both else None)
        if shares and made.attention:
            made = replace(made, attention=replace(made.attention, shared=True))
        indexed = kind == "mla" and _has_indexer(read, index)
        if indexed and made.attention:
            chooser = replace(
                made.attention,
                index_heads=read.count("index_n_heads", default=64),
                index_dim=read.count("index_head_dim", default=128),
            )
            made = replace(made, attention=chooser)
        if isinstance(sizes.get(index), Mapping):
            made = _block(_Reader(sizes[index], f"config.block_configs[{index}]"), made, heads, hidden)
        layers.append(cache.setdefault(made, made))
    if sparse and model_type in load("configs")["layers_of_two"]:  # the second MLP is counted as a shared expert
        second = replace(sparse, shared_size=dense.intermediate)
        layers = [replace(layer, mlp=mlp) for layer in layers for mlp in (dense, second)]
    return tuple(layers)


def _block(block: _Reader, layer: Layer, heads: int, hidden: int) -> Layer:
    """A layer of Nemotron-NAS: KV heads and an MLP of its own, or none of the two (nemotron_nas.py)."""
    attention, mlp = layer.attention, layer.mlp
    own = block.find("attention")[1]
    if isinstance(own, Mapping) and attention:
        part = _Reader(own, f"{block.field}.attention")
        if part.flag("replace_with_linear"):
            raise PlanError(
                f"{part.field}.replace_with_linear", True, "attention that is replaced by a matrix cannot be planned"
            )
        group = 1 if part.flag("no_op") else part.count("n_heads_in_group", high=heads)
        attention = None if part.flag("no_op") else replace(attention, kv_heads=heads // group)
    own = block.find("ffn")[1]
    if isinstance(own, Mapping) and mlp:
        part = _Reader(own, f"{block.field}.ffn")
        size = part.count("intermediate_size", default=mlp.intermediate, high=1 << 24)
        if own.get("ffn_mult") is not None:
            size = math.ceil(int(2 * part.number("ffn_mult", 1) * hidden / 3) / 256) * 256
        mlp = None if part.flag("no_op") else replace(mlp, intermediate=size)
    return replace(layer, attention=attention, mlp=mlp)


def _has_indexer(read: _Reader, index: int) -> bool:
    """Whether a layer of sparse attention chooses its tokens, or reads the choice of an earlier one (deepseek_v2.py)."""
    if not read.config.get("index_topk"):
        return False
    pattern = read.config.get("index_topk_pattern")
    if isinstance(pattern, str):
        return pattern[index : index + 1] != "S"
    first = read.count("index_skip_topk_offset", default=2, low=0)
    return max(index - first + 1, 0) % read.count("index_topk_freq", default=1) == 0


def _state_bytes(read: _Reader, model_type: str) -> int:
    """Bytes of an element of the recurrent part of a state; 0: as the model's others."""
    row = load("configs")["state_dtype"].get(model_type, {})
    dtype = read.config.get(row.get("field")) or row.get("default")
    if dtype in (None, "auto"):
        return 0
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise PlanError(f"config.{row['field']}", dtype, f"one of {', '.join(sorted(DTYPE_BYTES))} is needed")
    return DTYPE_BYTES[dtype]


def _state_attention(read: _Reader, hidden: int) -> Attention:
    """Mamba-2, Mamba-1 and gated delta layers: the state that a request keeps, and the layer's matrices."""
    text = read.config
    if text.get("linear_num_value_heads"):
        key_heads, value_heads = read.count("linear_num_key_heads"), read.count("linear_num_value_heads")
        key_dim, value_dim = (
            read.count("linear_key_head_dim", default=128),
            read.count("linear_value_head_dim", default=128),
        )
        keys, values = key_heads * key_dim, value_heads * value_dim
        conv = (2 * keys + values) * (read.count("linear_conv_kernel_dim", default=4) - 1)
        projection = hidden * (2 * keys + 2 * values + 2 * value_heads) + values * hidden
        return Attention(
            "state", key_heads, key_heads, key_dim, value_dim,
            state=(conv, value_heads * key_dim * value_dim), projection=projection, state_heads=key_heads,
        )  # fmt: skip
    linear = _linear(read)
    if linear.items("kda_layers"):
        value_heads, size = linear.count("num_heads", high=4096), linear.count("head_dim", high=4096)
        values = value_heads * size
        conv = 3 * values * (linear.count("short_conv_kernel_size", default=4) - 1)
        projection = 4 * hidden * values + hidden * value_heads + 2 * size * (hidden + values)
        return Attention(
            "state", value_heads, value_heads, size, size, state=(conv, values * size), projection=projection,
            state_heads=value_heads,
        )  # fmt: skip
    inner = read.count("mamba_d_ssm", "mamba_intermediate_size", default=0, low=0)
    expand = read.find("mamba_expand", "expand")[1]
    head_dim = read.count("mamba_d_head", "mamba_head_dim", default=64)
    named = read.count("mamba_n_heads", "mamba_num_heads", default=0, low=0)
    if not inner:
        inner = named * head_dim if named else int(hidden * (expand if isinstance(expand, (int, float)) else 2))
    state = read.count("mamba_d_state", "ssm_state_size", "state_size", default=16 if not named else 128)
    width = read.count("mamba_d_conv", "conv_kernel", default=4)
    if not named:  # Mamba-1
        rank = math.ceil(hidden / 16)
        if text.get("mamba_dt_rank") != "auto":
            rank = read.count("mamba_dt_rank", default=rank)
        projection = hidden * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * hidden
        return Attention("state", 1, 1, 1, 1, state=(inner * (width - 1), inner * state), projection=projection)
    groups = read.count("mamba_n_groups", "n_groups", default=1)
    conv_dim = inner + 2 * groups * state
    projection = hidden * (inner + conv_dim + named) + inner * hidden
    return Attention(
        "state", named, named, head_dim, head_dim,
        state=(conv_dim * (width - 1), named * head_dim * state), projection=projection, state_heads=named,
        groups=groups,
    )  # fmt: skip


def _experts(read: _Reader, num_layers: int, intermediate: int, gated: bool) -> tuple[Mlp | None, list[bool]]:
    """(MLP of the sparse layers, which layers those are)."""
    text = read.config
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    experts = read.count(*names, default=0, low=0, high=1 << 16)
    if experts <= 1:
        return None, [False] * num_layers
    top_k = read.count(
        "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts", default=2
    )
    if top_k > experts:
        raise PlanError("config.num_experts_per_tok", top_k, f"there are {experts} experts")
    size = read.count(
        "moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size", default=intermediate
    )
    shared = read.count(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
        "share_expert_dim", default=0, low=0,
    )  # fmt: skip
    if not shared:
        shared = size * read.count("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0, low=0)
    if not shared and text.get("intermediate_size_mlp") is not None:
        shared = size  # Llama 4 has one as large as an expert, and says so nowhere
    sparse = [True] * num_layers
    enumerated = text.get("moe_layers_enum")
    frequency = text.get("moe_layer_freq")
    if isinstance(enumerated, str):
        chosen = {int(part) for part in enumerated.split(",") if part.strip().isdigit()}
        sparse = [index in chosen for index in range(num_layers)]
    elif isinstance(frequency, (list, tuple)):
        sparse = [bool(frequency[index]) if index < len(frequency) else True for index in range(num_layers)]
    else:
        first = read.count("first_k_dense_replace", "moe_layer_start_index", default=0, low=0)
        step = read.count(
            "decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step", "expert_layer_period", default=1
        )
        offset = read.count("expert_layer_offset", default=step - 1, low=0)
        dense = read.items("mlp_only_layers")
        sparse = [
            index >= first and index not in dense and (step == 1 or index % step == offset)
            for index in range(num_layers)
        ]
    latent = read.count("moe_latent_size", default=0, low=0)
    return Mlp(intermediate, gated, experts, top_k, size, shared, latent), sparse


def _vision_parameters(part: object) -> int:
    """Rough size of a vision tower: attention and MLP of each of its layers."""
    if not isinstance(part, Mapping):
        return 0
    if isinstance(part.get("width"), Mapping):  # DeepSeek-OCR: several towers, by their names
        return sum(_vision_parameters(tower) for tower in part["width"].values())
    read = _Reader(part, "config.vision_config")
    width = read.count("embed_dim", "width", "hidden_size", default=0, low=0)
    depth = read.count("depth", "num_hidden_layers", "layers", default=0, low=0)
    ratio = part.get("mlp_ratio")
    inner = read.count(
        "intermediate_size", default=int(width * (ratio if isinstance(ratio, (int, float)) else 4)), low=0
    )
    return depth * (4 * width * width + 2 * width * inner)


def _vision_cut(config: Config) -> tuple[tuple[str, int], ...]:
    row, part = load("configs")["vision_cut"].get(str(config.get("model_type"))), config.get("vision_config")
    if row is None or not isinstance(part, Mapping):
        return ()
    read = _Reader(part, "config.vision_config")
    return tuple((name, read.count(name)) for name in row["numbers"] if part.get(name) is not None)


def _names_attention(items: object) -> bool:
    return isinstance(items, Sequence) and any("attn" in str(item) or "attention" in str(item) for item in items)


def _quantization(config: Config, text: Config, wanted: str | None, notes: list[str]) -> Quantization | None:
    raw = config.get("quantization_config") or text.get("quantization_config") or config.get("compression_config")
    if raw is not None and not isinstance(raw, Mapping):
        raise PlanError("config.quantization_config", raw, "a mapping is needed")
    if not raw:
        if wanted in (None, "none", ""):
            return None
        if wanted in ("fp8", "fp8_per_tensor", "experts_int8"):  # quantized while it is loaded
            return Quantization(str(wanted), 8, activation_bits=8, skip_attention=wanted == "experts_int8")
        if wanted == "fp8_per_block":
            return Quantization("fp8_per_block", 8, block=(128, 128), scale_bits=32, activation_bits=8)
        if wanted == "bitsandbytes":
            return Quantization("bitsandbytes", 4, group=64, scale_bits=8)
        raise PlanError(
            "quantization", wanted, "the checkpoint is not quantized: none, fp8 or bitsandbytes is possible"
        )
    method = str(raw.get("quant_method") or wanted or "").lower()
    plain = [name.lower().replace("_", "-").removesuffix("-marlin") for name in (method, wanted or method)]
    if wanted not in (None, "none", "") and not (plain[0].startswith(plain[1]) or plain[1].startswith(plain[0])):
        raise PlanError("quantization", wanted, f"the checkpoint is quantized with {method}: leave it out")
    read = _Reader(raw)
    skip = _names_attention(raw.get("modules_to_not_convert")) or _names_attention(raw.get("ignored_layers"))
    if method in ("gptq", "gptq_marlin", "gptq_bitblas", "awq", "awq_marlin", "auto-round", "autoround"):
        bits = read.count("bits", "w_bit", default=4, high=16)
        if bits not in (2, 3, 4, 8):
            raise PlanError("config.quantization_config.bits", bits, "2, 3, 4 or 8 are known")
        group = read.count("group_size", "q_group_size", default=128, low=-1)
        zero = method.startswith("awq") or not read.flag("sym", default=True)
        plain_method = method in ("gptq", "gptq_marlin", "awq", "awq_marlin")
        return Quantization(
            method, bits, max(group, 0), 16, bits if zero else 0, skip_attention=skip, marlin=True,
            halves=plain_method and bits in (4, 8) and not read.flag("desc_act"),
        )  # fmt: skip
    if method == "fp8" or method == "fbgemm_fp8":
        block = raw.get("weight_block_size")
        if block is not None and not (
            isinstance(block, Sequence) and len(block) == 2 and all(isinstance(b, int) and b > 0 for b in block)
        ):
            raise PlanError("config.quantization_config.weight_block_size", block, "two whole numbers are needed")
        size = (int(block[0]), int(block[1])) if block else (0, 0)
        return Quantization(method, 8, block=size, scale_bits=32, activation_bits=8, skip_attention=skip)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed_tensors(raw, notes)
    if method == "mxfp4":
        return Quantization("mxfp4", 4, 32, 8, skip_attention=True, skip_dense=True, marlin=True)
    if method in ("modelopt", "modelopt_fp4", "nvfp4"):
        algorithm = str(raw.get("quant_algo") or (raw.get("quantization") or {}).get("quant_algo") or "FP8").upper()
        if "FP4" in algorithm:
            return Quantization("modelopt_fp4", 4, 16, 8, activation_bits=4, skip_attention=skip)
        return Quantization(method, 8, activation_bits=8, skip_attention=skip)
    if method == "bitsandbytes":
        bits = 8 if read.flag("load_in_8bit", "_load_in_8bit") else 4
        return Quantization(method, bits, 64 if bits == 4 else 0, 8 if bits == 4 else 16, whole=True)
    bits = read.count("bits", "w_bit", "num_bits", default=16, high=32)
    notes.append(f"quantization method {method or 'without a name'} is not known: planned with {bits} bits a weight")
    return Quantization(method or "unknown", bits)


def _compressed_tensors(raw: Config, notes: list[str]) -> Quantization:
    groups = raw.get("config_groups")
    weights = None
    inputs = None
    if isinstance(groups, Mapping):
        for group in groups.values():
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
                weights, inputs = group["weights"], group.get("input_activations")
                break
    if weights is None:
        notes.append("compressed-tensors without config_groups: planned with 8 bits a weight")
        return Quantization("compressed-tensors", 8)
    read = _Reader(weights)
    bits = read.count("num_bits", default=8, high=16)
    group_size = (
        read.count("group_size", default=0, low=-1) if weights.get("strategy") in ("group", "tensor_group") else 0
    )
    block = weights.get("block_structure")
    size = (0, 0)
    if weights.get("strategy") == "block" and isinstance(block, Sequence) and len(block) == 2:
        size = (int(block[0]), int(block[1]))
    activation = _Reader(inputs).count("num_bits", default=8) if isinstance(inputs, Mapping) else 16
    return Quantization(
        "compressed-tensors", bits, max(group_size, 0), 8 if bits == 4 and weights.get("type") == "float" else 16,
        0 if weights.get("symmetric", True) else bits, size, activation, weights.get("type", "int") == "int",
        _names_attention(raw.get("ignore")), marlin=activation == 16,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Matrices on one GPU
# ---------------------------------------------------------------------------------------------------------------------


def padded_vocab(vocab: int) -> int:
    """Rows of the embedding: vLLM pads to 64 and splits the padded rows."""
    return -(-vocab // 64) * 64


def matrices(
    shape: ModelShape, tp: int, expert_split: int, indices: range, first: bool, last: bool
) -> Iterator[tuple[str, int, int, str]]:
    """(name, rows, columns, part) of each tensor on one GPU, as vLLM fuses them.

    Args:
        expert_split: GPUs over which the experts are dealt whole (expert parallelism), 1: their matrices are sliced.
        indices: layers of this pipeline stage. first, last: the stage holds the embedding, the output.

    ``part`` says what quantization does with it: attention, dense, expert or plain (never quantized).
    """
    hidden = shape.hidden_size
    vocab = padded_vocab(shape.vocab_size) // tp
    if first or (last and shape.tie_word_embeddings):
        yield "embed", vocab, hidden, "plain"
    if first and shape.position_rows:
        yield "positions", shape.position_rows, hidden, "plain"
    if last and not shape.tie_word_embeddings and shape.kind == "generate":
        yield "lm_head", vocab, hidden, "plain"
    for index in indices:
        layer = shape.layers[index]
        for mixer in layer.mixers:
            yield from _attention_matrices(mixer, hidden, tp)
        if layer.mlp:
            yield from _mlp_matrices(layer.mlp, hidden, tp, expert_split)
        yield "norms", 2, hidden, "plain"
    if last and shape.kind == "pool" and "Classification" in shape.architecture:
        yield "classifier", hidden, hidden, "plain"


def _attention_matrices(a: Attention, hidden: int, tp: int) -> Iterator[tuple[str, int, int, str]]:
    if a.kind == "state":
        yield "in_proj", a.projection // hidden // tp, hidden, "attention"
        return
    heads = a.heads // tp
    if a.latent:
        if a.q_rank:
            yield "qkv_a", a.q_rank + a.latent + a.rope_dim, hidden, "attention"
            yield "q_b", heads * a.head_dim, a.q_rank, "attention"
        else:
            yield "q", heads * a.head_dim, hidden, "attention"
            yield "kv_a", a.latent + a.rope_dim, hidden, "attention"
        if a.index_heads:  # whole on every GPU; keys and weights of the heads are one matrix, kept in 16 bits
            yield "index_q", a.index_heads * a.index_dim, a.q_rank or hidden, "attention"
            yield "index_k", a.index_dim + a.index_heads, hidden, "plain"
        yield "kv_b", heads * (a.nope_dim + a.v_dim), a.latent, "attention"
        yield "o", hidden, heads * a.v_dim, "attention"
        return
    kv_heads = max(1, a.kv_heads // tp)
    yield "qkv", heads * a.head_dim + kv_heads * (a.head_dim + a.v_dim), hidden, "attention"
    if a.bias:
        yield "qkv_bias", heads * a.head_dim + kv_heads * (a.head_dim + a.v_dim), 1, "plain"
    yield "o", hidden, heads * a.v_dim, "attention"


def _mlp_matrices(m: Mlp, hidden: int, tp: int, expert_split: int) -> Iterator[tuple[str, int, int, str]]:
    up = 2 if m.gated else 1
    if not m.experts:
        yield "up", up * m.intermediate // tp, hidden, "dense"
        yield "down", hidden, m.intermediate // tp, "dense"
        return
    local = -(-m.experts // expert_split)
    size = m.expert_size if expert_split > 1 else m.expert_size // tp
    width = m.latent or hidden
    yield "experts_up", local * up * size, width, "expert"
    yield "experts_down", local * width, size, "expert"
    if m.latent:  # whole on every GPU
        yield "latent_in", m.latent, hidden, "dense"
        yield "latent_out", hidden, m.latent, "dense"
    yield "router", m.experts, hidden, "plain"
    if m.shared_size:
        yield "shared_up", up * m.shared_size // tp, hidden, "dense"
        yield "shared_down", hidden, m.shared_size // tp, "dense"


# ---------------------------------------------------------------------------------------------------------------------
# How it can be split
# ---------------------------------------------------------------------------------------------------------------------


def _positive(field_name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(field_name, value, "give a whole number of at least 1")
    return value


def tp_problems(
    shape: ModelShape,
    tp: int,
    *,
    engine_version: str | None = None,
    expert_parallel: bool = False,
    data_parallel_size: int = 1,
    quantization: str | None = None,
) -> list[str]:
    """Reasons why ``tp`` is not possible, such as ``TP 3 is not possible: 40 attention heads``. Empty when it is.

    The other rules are the same in every engine version of the catalog; blocks and groups of weights that are quantized
    while they are loaded (``quantization``) follow from the shape. With ``expert_parallel`` whole experts are dealt
    over ``tp * data_parallel_size`` GPUs instead of being sliced. An ``engine_version`` of None stands for a new one,
    which cuts experts inside a quantization group and keeps a vision tower whole.

    Raises:
        PlanError: ``tp`` is not a whole number above 0.
    """
    _positive("tensor_parallel_size", tp)
    if tp == 1 and not expert_parallel:
        return []
    halves, whole_from = _halves(engine_version), _vision_whole_from(shape, engine_version)
    key = ("tp", tp, expert_parallel, data_parallel_size, halves, whole_from)
    if key not in shape.cache:
        why = dict.fromkeys(_split_problems(shape, tp, expert_parallel, data_parallel_size, halves))
        if whole_from:
            for name, number in shape.vision_cut:
                if number % tp:
                    why[f"{name} {number} of the vision tower, which releases from {whole_from} on keep whole"] = None
        shape.cache[key] = [f"TP {tp} is not possible: {reason}" for reason in why]
    return list(shape.cache[key])


def _halves(version: str | None) -> bool:
    if version is None:
        return True
    from .engine import at_least  # not at the top: see pp_problems

    return at_least(version, load("configs")["halved_groups"]["first"])


def _vision_whole_from(shape: ModelShape, version: str | None) -> str:
    """The first release that can keep the vision tower whole, where this one is older."""
    if version is None or not shape.vision_cut:
        return ""
    from .engine import at_least  # not at the top: see pp_problems

    first: str = load("configs")["vision_cut"][shape.outer_type]["whole_from"]
    return "" if at_least(version, first) else first


def expert_group(quant: Quantization, hidden: int, part: int) -> int:
    """Inputs that share a scale in experts of which each GPU holds ``part`` columns: the group, halved until it divides
    both; 0 where none that the kernels take does.
    """
    group, least = quant.group, load("configs")["halved_groups"]["least"]
    while quant.halves and group >= least and (part % group or hidden % group):
        group //= 2
    return group if group >= least and not (part % group or hidden % group) else 0


def _split_problems(shape: ModelShape, tp: int, expert_parallel: bool, dp: int, halves: bool) -> Iterator[str]:
    if tp > 1 and shape.quant and shape.quant.whole:  # bitsandbytes_loader.py of vLLM 0.25.1
        yield f"weights in the format of {shape.quant.method} cannot be cut: PP divides them, or take the unquantized ones"
        return
    if padded_vocab(shape.vocab_size) % tp:
        yield f"vocabulary of {shape.vocab_size}, padded to {padded_vocab(shape.vocab_size)}"
    for layer in dict.fromkeys(shape.layers):
        m = layer.mlp
        for a in layer.mixers:
            if a.kind == "state":
                if (a.state_heads or a.state[1]) % tp:
                    yield f"{a.state_heads or a.state[1]} heads of the layers with a state"
                elif a.groups > 1 and a.groups % tp:  # mamba_mixer2.py: a single one is repeated
                    yield f"{a.groups} groups of heads of the layers with a state"
            elif a.heads % tp:
                yield f"{a.heads} attention heads"
            elif a.kind != "mla" and (a.kv_heads % tp if a.kv_heads >= tp else tp % a.kv_heads):
                yield f"{a.kv_heads} KV heads can neither be divided nor repeated"
            elif shape.quant and not shape.quant.skip_attention:
                yield from _row_problems(shape.quant, "o_proj", a.heads * a.v_dim, tp)
        if m and not m.experts:
            yield from _slice_problems(shape, "intermediate size", m.intermediate, tp, shape.quant)
        if m and m.experts:
            if expert_parallel:
                if m.experts % (tp * dp):
                    yield f"{m.experts} experts cannot be dealt evenly over {tp * dp} GPUs"
            else:
                quant = (
                    shape.quant if halves and shape.quant and shape.quant.halves and m.expert_size % tp == 0 else None
                )
                if not (quant and expert_group(quant, m.latent or shape.hidden_size, m.expert_size // tp)):
                    yield from _slice_problems(shape, "expert intermediate size", m.expert_size, tp, shape.quant, True)
            if m.shared_size:
                yield from _slice_problems(shape, "shared expert intermediate size", m.shared_size, tp, shape.quant)


def _slice_problems(
    shape: ModelShape, what: str, size: int, tp: int, quant: Quantization | None, experts: bool = False
) -> Iterator[str]:
    if size % tp:
        yield f"{what} {size}"
    elif quant and (experts or not quant.skip_dense) and quant.method != "mxfp4":
        yield from _row_problems(quant, what, size, tp)


def _row_problems(quant: Quantization, what: str, size: int, tp: int) -> Iterator[str]:
    """A row-parallel matrix (down_proj, o_proj) is cut along its inputs: scales must not straddle the cut."""
    part = size // tp
    if size % tp:
        return  # said elsewhere
    block = quant.block[1]
    if block and part % block:
        yield f"{what} {size} in {quant.method} blocks of {block} leaves {size / tp:g} for each GPU"
    elif quant.group and part % quant.group:
        yield f"{what} {size} in quantization groups of {quant.group} leaves {size / tp:g} for each GPU"
    elif quant.marlin and quant.bits in (4, 8) and part % 128:
        yield f"{what} {size} leaves {size / tp:g} for each GPU, the {quant.method} kernels take multiples of 128"


def pp_problems(shape: ModelShape, pp: int, *, engine_version: str | None = None) -> list[str]:
    """Reasons why ``pp`` pipeline stages are not possible. Empty when they are.

    Raises:
        PlanError: ``pp`` is not a whole number above 0.
    """
    _positive("pipeline_parallel_size", pp)
    if pp == 1:
        return []
    problems = []
    if pp > shape.num_layers:
        problems.append(f"PP {pp} is not possible: {shape.num_layers} layers")
    if engine_version:
        from .engine import at_least  # not at the top: engine.py loads the catalog, which a config alone does not need

        if not at_least(engine_version, "0.4.3"):
            problems.append(f"PP {pp} is not possible: vLLM {engine_version} has no pipeline parallelism")
    encoder = shape.kind == "pool" and shape.model_type in ENCODERS
    if encoder or shape.architecture in load("configs")["no_stages"]:
        problems.append(f"PP {pp} is not possible: {shape.architecture} cannot be split into stages")
    return problems


def pp_layers(num_layers: int, pp: int) -> list[range]:
    """Layers of each stage: what does not divide goes to the stages from the second last backwards."""
    sizes = [num_layers // pp] * pp
    for extra in range(num_layers % pp):
        sizes[-(extra + 2)] += 1
    stages, start = [], 0
    for size in sizes:
        stages.append(range(start, start + size))
        start += size
    return stages


def tp_sizes(config: Config, max_tp: int = 16) -> list[int]:
    """Valid tensor-parallel sizes from 1 to ``max_tp`` for a Hugging Face config.

    Raises:
        PlanError: the config is not a model's, or ``max_tp`` is not a whole number from 1 to 1024.
    """
    _positive("max", max_tp)
    if max_tp > 1024:
        raise PlanError("max", max_tp, "no engine spans more than 1024 GPUs")
    shape = parse_config(config)
    return [tp for tp in range(1, max_tp + 1) if not tp_problems(shape, tp)]
