# SPDX-License-Identifier: GPL-3.0-or-later
"""One entry of ``vllm_services``, checked."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from .engine import Engine, get
from .errors import PlanError
from .hardware import mapping, sequence, whole
from .memory import KV_DTYPES
from .model import Config, ModelShape, parse_config
from .tables import load, model_entry

# vLLM takes a longer context than the model's own when this is set in its environment.
STRETCH = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
# The largest number of tokens, requests or GPUs that the planner counts with.
MOST = 1 << 30
OBJECTIVES = ("throughput", "latency")
TASKS = ("generate", "embed", "score")
# What vLLM's own flags call them. Others (reward, transcription) are no task that the roles can ask for.
TASK_FLAGS = {"generate": "generate", "embed": "embed", "embedding": "embed", "score": "score", "classify": "score"}
DTYPES = ("auto", "float16", "half", "bfloat16", "float32", "float")
# Keys that the planner reads. Others belong to the roles that serve the model and are left alone.
KEYS = (
    "name", "model", "model_path", "served_model_name", "source", "revision", "config", "weights_gib",
    "safetensors", "objective", "max_model_len", "min_concurrency", "gpus", "hosts", "engine_version", "runtime",
    "device", "port", "image", "env", "extra_args", "tensor_parallel_size", "pipeline_parallel_size",
    "data_parallel_size", "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens", "dtype",
    "kv_cache_dtype", "quantization", "enforce_eager", "executor", "trust_remote_code", "enable_expert_parallel", "task",
)  # fmt: skip
# Flags that follow from keys of the service: in extra_args they would contradict the plan.
PLANNED_FLAGS = {
    "--model": "model",
    "--served-model-name": "served_model_name",
    "--port": "port",
    "--dtype": "dtype",
    "--max-model-len": "max_model_len",
    "--gpu-memory-utilization": "gpu_memory_utilization",
    "--max-num-seqs": "max_num_seqs",
    "--max-num-batched-tokens": "max_num_batched_tokens",
    "--tensor-parallel-size": "tensor_parallel_size",
    "-tp": "tensor_parallel_size",
    "--pipeline-parallel-size": "pipeline_parallel_size",
    "-pp": "pipeline_parallel_size",
    "--data-parallel-size": "data_parallel_size",
    "-dp": "data_parallel_size",
    "--enable-expert-parallel": "enable_expert_parallel",
    "--distributed-executor-backend": "executor",
    "--worker-use-ray": "executor",
    "--enforce-eager": "enforce_eager",
    "--quantization": "quantization",
    "-q": "quantization",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--trust-remote-code": "trust_remote_code",
}
# Flags that would go past the roles, with what to do instead. Secrets among arguments are in every process list.
REFUSED_FLAGS = {
    "--api-key": "set api_key of the service, or vllm_api_key, which no process list shows",
    "--hf-token": "set model_token, which no process list shows",
    "--host": "set bind of the service, or vllm_bind",
    "--uds": "leave it out: the proof, the proxy and clients ask bind and port of the service",
    **dict.fromkeys(
        ("--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-certfile", "--ssl-ciphers", "--ssl-keyfile", "--enable-ssl-refresh"),
        "let role proxy serve TLS (proxy_enabled)",
    ),
    "--config": "write what the file holds into the service, where it is checked",
    "--shutdown-timeout": "set vllm_drain_timeout",
    **dict.fromkeys(
        ("--headless", "--master-addr", "--master-port", "--nnodes", "--node-rank"), "set hosts of the service"
    ),
}  # fmt: skip

# Flags that take GPUs or memory past the plan, with what they do and what to do instead.
PAST_THE_PLAN = {
    **dict.fromkeys(
        ("--prefill-context-parallel-size", "-pcp"),
        "it multiplies the GPUs of a server, and only those of TP and PP are planned: leave it out, and set "
        "tensor_parallel_size or pipeline_parallel_size of the service",
    ),
    "--kv-cache-memory-bytes": "vLLM passes over the planned gpu_memory_utilization beside it: set that of the service instead",
}  # fmt: skip
# Flags whose number has to divide TP.
DIVIDES_TP = ("--decode-context-parallel-size", "-dcp")


@dataclass(frozen=True)
class Service:
    """What a user asks for. None stands for "to be planned".

    Attributes:
        shape: of the model. entry: its row of models.yml, empty when it has none.
        gpu_count, gpu_indices: ``gpus`` as a number or as a list of indices.
        flags: flags that the model needs, from models.yml, without those that ``extra_args`` sets itself.
        task: what clients can ask of it: generate, embed or score. task_asked: the key ``task`` says so.
    """

    name: str
    model: str
    model_path: str
    served_model_name: str
    shape: ModelShape
    entry: Mapping[str, Any]
    config_from: str
    objective: str
    max_model_len: int | None
    min_concurrency: float
    gpu_count: int | None
    gpu_indices: tuple[int, ...] | None
    hosts: tuple[str, ...] | None
    engine: Engine | None
    runtime: str
    device: str | None
    port: int | None
    image: str | None
    env: Mapping[str, str]
    extra_args: tuple[str, ...]
    flags: tuple[str, ...]
    tp: int | None
    pp: int | None
    dp: int | None
    utilization: float | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    dtype: str
    kv_cache_dtype: str
    quantization: str | None
    enforce_eager: bool | None
    executor: str | None
    trust_remote_code: bool
    expert_parallel: bool | None
    task: str
    task_asked: bool

    @property
    def pools(self) -> bool:
        """It is made to embed, rank or classify: no KV cache. A generating model that is served for that keeps its own."""
        return self.shape.kind == "pool"

    @property
    def quantization_method(self) -> str | None:
        """Of its weights: as the user says, else as the model's config does."""
        return self.quantization or self.shape.quantization

    @property
    def splits_prompts(self) -> bool:
        """``extra_args`` tell the V0 core to split prompts."""
        told = self.told("--enable-chunked-prefill")
        return told is not None and told.lower() != "false"

    def told(self, flag: str) -> str | None:
        """What ``extra_args`` give a flag."""
        return _given([arg.replace("_", "-") for arg in self.extra_args], flag)

    @property
    def needs_code(self) -> bool:
        """The model's repository brings code that has to run."""
        return bool(self.entry.get("trust_remote_code")) or self.shape.trust_remote_code


def _one_of(raw: Mapping[str, Any], key: str, field: str, allowed: tuple[str, ...], default: str | None) -> str | None:
    value = raw.get(key)
    if value is None:
        return default
    if value not in allowed:
        raise PlanError(f"{field}.{key}", value, f"give one of {', '.join(allowed)}")
    return str(value)


def _flag(raw: Mapping[str, Any], key: str, field: str) -> bool | None:
    value = raw.get(key)
    if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
        value = value.lower() in ("true", "yes")
    if value is not None and not isinstance(value, bool):
        raise PlanError(f"{field}.{key}", value, "give true or false")
    return value


def _positive(raw: Mapping[str, Any], key: str, field: str) -> int | None:
    value = raw.get(key)
    if value is None:
        return None
    number = whole(value, f"{field}.{key}", 1)
    if number > MOST:
        raise PlanError(f"{field}.{key}", value, f"give a whole number from 1 to {MOST}")
    return number


def _number(raw: Mapping[str, Any], key: str, field: str, least: float = 0.0, most: float = 1e9) -> float | None:
    """A number above 0, at least ``least`` and at most ``most``."""
    value = raw.get(key)
    if value is None:
        return None
    try:
        number = float("x" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        number = -1.0
    if not (number > 0 and least <= number <= most):
        limits = f"of at least {least:g}" if least else "above 0" + (f" and at most {most:g}" if most < 1e9 else "")
        raise PlanError(f"{field}.{key}", value, f"give a number {limits}")
    return number


def _text(raw: Mapping[str, Any], key: str, field: str) -> str | None:
    value = raw.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise PlanError(f"{field}.{key}", value, "give text, or leave it out")
    return value


def _given(args: Sequence[str], flag: str) -> str | None:
    """What a flag is given among arguments, as ``--flag value`` or ``--flag=value``."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        name, equals, value = arg.partition("=")
        if name == flag:
            return value if equals else following
    return None


def _task(raw: Mapping[str, Any], field: str, shape: ModelShape, extra: Sequence[str]) -> str:
    """What the model is served for: as the key ``task`` says, or flags among ``extra_args``, or its architecture."""
    pools, classifies = shape.kind == "pool", "Classification" in shape.architecture
    asked = _one_of(raw, "task", field, TASKS, None)
    if asked == "generate" and pools:
        raise PlanError(f"{field}.task", asked, f"a {shape.architecture} does not generate: give embed or score")
    if asked:
        return asked
    told = _given(extra, "--task") or _given(extra, "--convert") or ""
    if told in TASK_FLAGS:
        return TASK_FLAGS[told]
    # --hf-overrides makes a reranker of a generating model by the name of another class.
    if classifies or any("ForSequenceClassification" in arg for arg in extra):
        return "score"
    return "embed" if pools or _given(extra, "--runner") == "pooling" else "generate"


def _shape(
    raw: Mapping[str, Any], field: str, model: str, dtype: str, quantization: str | None
) -> tuple[ModelShape, Mapping[str, Any], str]:
    """Shape of the model, its row of models.yml ({} without one) and where the shape comes from."""
    found = model_entry(model)
    entry: Mapping[str, Any] = found[1] if found else {}
    config: Config
    if raw.get("config") is not None:
        config, source = mapping(raw["config"], f"{field}.config"), "its config.json"
    elif found:
        config, source = entry["config"], f"the catalog's row {found[0]}"
    else:
        raise PlanError(
            f"{field}.config",
            None,
            "give the model's config.json as a mapping (module model_info reads it); without one only these are known: "
            f"{', '.join(load('models')['models'])}",
        )
    weights = _number(raw, "weights_gib", field)
    if weights is None and raw.get("safetensors") is None and raw.get("config") is None:
        weights = entry.get("weights_gib")
    try:
        shape = parse_config(
            config, weights_gib=weights, safetensors=raw.get("safetensors"), quantization=quantization, dtype=dtype
        )
    except PlanError as error:
        raise PlanError(f"{field}.{error.field}", error.value, error.allowed) from error
    return shape, entry, source


def parse_service(raw: object, number: int) -> Service:
    """Checks one entry of ``vllm_services``.

    Raises:
        PlanError: a field is missing, absurd, or looks like a misspelt one.
    """
    item = mapping(raw, f"vllm_services[{number}]")
    name = item.get("name")
    if not isinstance(name, str) or not name.strip():
        raise PlanError(f"vllm_services[{number}].name", name, "give the service a name")
    field = f"vllm_services[{name}]"
    for key in item:
        near = [] if key in KEYS else get_close_matches(str(key), KEYS, n=1, cutoff=0.85)
        if near:
            raise PlanError(f"{field}.{key}", item[key], f"there is no such setting; did you mean {near[0]}?")
    model = _text(item, "model", field)
    if model is None:
        raise PlanError(f"{field}.model", None, "give the id of a model or the path of its folder")
    dtype = _one_of(item, "dtype", field, DTYPES, "auto") or "auto"
    dtype = {"half": "float16", "float": "float32"}.get(dtype, dtype)
    quantization = _text(item, "quantization", field)
    shape, entry, config_from = _shape(item, field, model, dtype, quantization)

    gpus = item.get("gpus")
    count = indices = None
    if isinstance(gpus, (list, tuple)):
        indices = tuple(whole(index, f"{field}.gpus[{place}]") for place, index in enumerate(gpus))
        if not indices or len(set(indices)) != len(indices):
            raise PlanError(f"{field}.gpus", gpus, "give a number of GPUs, or a list of different indices")
    elif gpus is not None:
        count = whole(gpus, f"{field}.gpus", 1)
    hosts = item.get("hosts")
    if hosts is not None:
        hosts = (hosts,) if isinstance(hosts, str) else tuple(sequence(hosts, f"{field}.hosts"))
        if not hosts or not all(isinstance(host, str) for host in hosts):
            raise PlanError(f"{field}.hosts", item["hosts"], "give the names of hosts, or leave it out")
    extra = item.get("extra_args") or []
    if isinstance(extra, str):
        try:
            extra = shlex.split(extra)
        except ValueError as error:
            raise PlanError(
                f"{field}.extra_args", extra, f"a shell cannot read it ({error}): close it, or give a list"
            ) from error
    extra = tuple(str(arg) for arg in sequence(extra, f"{field}.extra_args"))
    env = {str(key): str(value) for key, value in mapping(item.get("env") or {}, f"{field}.env").items()}
    version = item.get("engine_version")
    port = item.get("port")
    if port is not None and whole(port, f"{field}.port", 1) > 65535:
        raise PlanError(f"{field}.port", port, "give a port from 1 to 65535")
    length = _positive(item, "max_model_len", field)
    if length and shape.max_position and (STRETCH in env or shape.unbounded):
        shape = replace(shape, max_position=max(length, shape.max_position))
    return Service(
        name=name,
        model=model,
        model_path=_text(item, "model_path", field) or model,
        served_model_name=_text(item, "served_model_name", field) or model,
        shape=shape,
        entry=entry,
        config_from=config_from,
        objective=_one_of(item, "objective", field, OBJECTIVES, "throughput") or "throughput",
        max_model_len=length,
        min_concurrency=_number(item, "min_concurrency", field, least=1.0) or 1.0,
        gpu_count=count,
        gpu_indices=indices,
        hosts=hosts,
        engine=None if version is None else get(version, f"{field}.engine_version"),
        runtime=_one_of(item, "runtime", field, ("container", "venv"), "container") or "container",
        device=_one_of(item, "device", field, ("cuda", "cpu"), None),
        port=None if port is None else whole(port, f"{field}.port", 1),
        image=_text(item, "image", field),
        env=env,
        extra_args=extra,
        flags=tuple(str(flag) for flag in entry.get("flags", ())),
        tp=_positive(item, "tensor_parallel_size", field),
        pp=_positive(item, "pipeline_parallel_size", field),
        dp=_positive(item, "data_parallel_size", field),
        utilization=_number(item, "gpu_memory_utilization", field, most=1.0),
        max_num_seqs=_positive(item, "max_num_seqs", field),
        max_num_batched_tokens=_positive(item, "max_num_batched_tokens", field),
        dtype=dtype,
        kv_cache_dtype=_one_of(item, "kv_cache_dtype", field, tuple(KV_DTYPES), "auto") or "auto",
        quantization=quantization,
        enforce_eager=_flag(item, "enforce_eager", field),
        executor=_one_of(item, "executor", field, ("ray", "mp"), None),
        trust_remote_code=bool(_flag(item, "trust_remote_code", field)),
        expert_parallel=_flag(item, "enable_expert_parallel", field),
        task=_task(item, field, shape, extra),
        task_asked=item.get("task") is not None,
    )


def beyond_the_model(service: Service) -> bool:
    """It asks for a longer context than the model's own."""
    return service.max_model_len is not None and 0 < service.shape.max_position < service.max_model_len


def parse_services(raw: object) -> list[Service]:
    """All services in the order given.

    Raises:
        PlanError: not a list, none, or two of one name.
    """
    services = [parse_service(item, number) for number, item in enumerate(sequence(raw, "vllm_services"))]
    if not services:
        raise PlanError("vllm_services", raw, "give at least one service")
    seen: set[str] = set()
    for service in services:
        if service.name in seen:
            raise PlanError("vllm_services", service.name, "two services have this name; names must differ")
        seen.add(service.name)
    return services
