# SPDX-License-Identifier: GPL-3.0-or-later
"""Which service runs on which GPUs, with which parallelism and how much of their memory.

``make_plan`` works in four steps:

1. *Need*: for each service and kind of GPU, the layouts (TP x PP, for experts also DP) that could hold it, in the
   order in which they are wanted, each with the lowest ``gpu_memory_utilization`` that does.
2. *Placement*: services with the greatest need first, each in its first layout that finds room. Only the need is
   claimed, so that several services can share a GPU.
3. *Growth*: GPUs that nobody claimed become replicas (objective throughput) or a wider TP (objective latency).
4. *Settlement*: what is free on the claimed GPUs is divided, and the final memory, flags and image follow.

Memory is counted by memory.py, flags and releases by engine.py; here is only the search. Sizes are GiB.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import engine as engines
from .engine import Engine
from .errors import PlanError
from .hardware import Gpu, Host
from .memory import cuda_total_gib, engine_memory, lowest_utilization, states_problem
from .model import pp_problems, tp_problems
from .service import Service
from .tables import load

Able = tuple[Engine, str, list[str]]  # a release, the suffix of its image's tag, remarks
MIB = 1024  # MiB in a GiB
MAX_TP = 16
# A context that nobody asked for is planned up to this; what is free beyond it is still used.
USUAL_CONTEXT = 32768
SHORTEST_CONTEXT = 128
# Share of a GPU that a planned utilization leaves untouched: fragmentation, and memory that appears after profiling.
SLACK = 0.01
# A service that needs less of a GPU than this is packed beside others instead of getting a GPU of its own.
SMALL = 0.3


# ------------------------------------------------------------------------------------------------- GPUs as places


@dataclass
class Place:
    """One GPU and who claims how much of it."""

    host: Host
    gpu: Gpu
    total: float  # what CUDA can use
    claims: list[tuple[Instance, float]] = field(default_factory=list)

    @property
    def used(self) -> float:
        return self.gpu.memory_used_mib / MIB

    @property
    def free(self) -> float:
        return self.total - self.used - sum(size for _, size in self.claims)

    def claimed_beside(self, instance: Instance) -> float:
        """GiB that others than an instance claim."""
        return sum(size for claimant, size in self.claims if claimant is not instance)

    @property
    def idle(self) -> bool:
        return not self.claims

    @property
    def label(self) -> str:
        return f"{self.host.name} GPU {self.gpu.index}"


class Shape(NamedTuple):
    """Parallelism of one instance."""

    tp: int
    pp: int = 1
    dp: int = 1

    @property
    def world(self) -> int:
        """GPUs that it takes."""
        return self.tp * self.pp * self.dp


@dataclass(frozen=True)
class Need:
    """A layout of one service on one kind of GPU and the least that it takes of each.

    Attributes:
        utilization: the lowest that holds the context and concurrency asked for.
        footprint: what each GPU then holds, outside parts included.
        held: what the allocator holds on top, which counts where another service has the same GPU.
        room: what has to be free for it: more than the footprint where the utilization is the plan's own choice.
        visible: memory of the GPU that CUDA can use; a utilization is a share of it.
    """

    kind: tuple[Any, ...]
    engine: Engine
    tag: str
    shape: Shape
    max_model_len: int
    tokens: int
    seqs: int
    eager: bool
    utilization: float
    footprint: float
    held: float
    room: float
    visible: float

    @property
    def small(self) -> bool:
        """It leaves most of a GPU to others."""
        return self.footprint < SMALL * self.visible


@dataclass
class Instance:
    """One server of a service, on one host, or on several when its stages span them.

    ``shape`` starts as the need's and grows with replicas (DP) or width (TP).
    """

    need: Need
    places: list[Place]
    shape: Shape
    widened: bool = False

    @property
    def hosts(self) -> list[Host]:
        return list({place.host.name: place.host for place in self.places}.values())

    def claim(self, places: Iterable[Place]) -> None:
        for place in places:
            place.claims.append((self, self.need.footprint + self.need.held))

    def settle(self, size_gib: float) -> None:
        """Makes its claims what it takes in the end."""
        for place in self.places:
            place.claims = [(claimant, size_gib if claimant is self else size) for claimant, size in place.claims]

    def release(self) -> None:
        for place in self.places:
            place.claims = [claim for claim in place.claims if claim[0] is not self]


@dataclass
class Task:
    """One service on its way through the plan."""

    service: Service
    order: int
    instances: list[Instance] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)


# --------------------------------------------------------------------------------------------------------- needs


class Needs:
    """Needs of services on kinds of GPUs. Everything is computed once: 200 equal hosts cost as much as one."""

    def __init__(self) -> None:
        self._services: dict[int, Service] = {}  # those that were seen, so that the id of each stays its own
        self._engines: dict[tuple[Any, ...], tuple[Engine | None, str, list[str], list[str]]] = {}
        self._needs: dict[tuple[Any, ...], Need | None] = {}

    def engine(self, service: Service, gpu: Gpu, driver: str | None) -> tuple[Engine | None, str, list[str], list[str]]:
        """(release, tag suffix, problems, remarks) for a service on a kind of GPU with a driver."""
        self._services[id(service)] = service
        key = (id(service), gpu.kind, driver)
        if key not in self._engines:
            self._engines[key] = _choose_engine(service, gpu, driver)
        return self._engines[key]

    def find(
        self,
        service: Service,
        gpu: Gpu,
        engine: Engine,
        tag: str,
        length: int,
        shape: Shape,
        eager: bool,
        most: float,
        lean: bool,
    ) -> Need | None:
        """The need with the largest batch (lean: the smallest) whose utilization is at most ``most``, or None."""

        self._services[id(service)] = service

        def need(tokens: int, seqs: int, eager: bool) -> Need | None:
            key = (id(service), gpu.kind, engine.version, tag, length, shape, tokens, seqs, eager)
            if key not in self._needs:
                self._needs[key] = make_need(service, gpu, engine, tag, length, tokens, seqs, shape, eager)
            return self._needs[key]

        if _least_weights_gib(service) / shape.world > gpu.memory_total_mib / MIB:
            return None
        if length > (longest_prompt(service, engine, gpu) or length):
            return None
        order = list(batches(service, gpu, engine, length))
        # When the smallest batch without CUDA graphs is too much, so is every other: most layouts end here.
        if need(*order[-1], service.enforce_eager is not False) is None:
            return None
        found = (need(*batch, eager) for batch in (reversed(order) if lean else order))
        return next((need for need in found if need and need.utilization <= most), None)


def _least_weights_gib(service: Service) -> float:
    """Less than the weights can be in memory: what rules out most layouts of a large model without counting tensors."""
    if service.shape.weights_gib is not None:
        return service.shape.weights_gib * 0.9
    quantized = service.quantization_method
    return service.shape.parameters * (0.5 if quantized else 2) / 1024**3 * 0.9


def _choose_engine(service: Service, gpu: Gpu, driver: str | None) -> tuple[Engine | None, str, list[str], list[str]]:
    """The release that the user set, or the default one, or else the newest that can serve this model on this GPU.

    One that can divide the model as the user wants comes before others, and then one that the driver runs for certain.
    """
    container = service.runtime == "container"
    driver = None if service.image else driver
    wanted = load("engines")["default_version"]["cuda"]
    names = [service.engine.version] if service.engine else [wanted, *reversed(engines.versions())]
    able: list[Able] = []
    refused: list[str] = []
    for engine in map(engines.get, names):
        suffix, problems, remarks = engines.build_for(engine, gpu.capability, driver, container)
        if problem := engines.architecture_problem(engine, service.shape.architecture):
            problems.append(problem)
        if problem := engines.rope_problem(engine, service.shape.rope_type):
            problems.append(problem)
        if problem := states_problem(service.shape, engine.version, engine.core(gpu.capability) == "V0"):
            problems.append(problem)
        if problems:
            refused += problems
        elif engine.version != wanted and not service.engine and refused:
            able.append((engine, suffix, [*remarks, f"vLLM {engine.version}: {refused[0]}"]))
        else:
            able.append((engine, suffix, remarks))
    if not able:
        if service.engine and (other := _choose_engine(replace(service, engine=None), gpu, driver)[0]):
            refused.append(f"engine_version {other.version} can")
        return None, "", refused if service.engine else refused[:1], []
    problem = _weights_problem(service, able[0][0], gpu)
    running = [each for each in able if not _weights_problem(service, each[0], gpu)]
    # Releases that do not refuse what is wrong are no way out.
    if problem and (not running or service.dtype == "float16"):
        refused = [problem]
        if service.engine and (other := _choose_engine(replace(service, engine=None), gpu, driver)[0]):
            refused.append(f"engine_version {other.version} can")
        elif engines.method_problem(able[0][0].version, service.quantization_method):
            refused.append("take other weights, or a GPU that such a release runs on")
        return None, "", refused, []
    if problem:
        engine, suffix, remarks = running[0]
        running[0] = engine, suffix, [*remarks, f"not vLLM {able[0][0].version}: {problem}"]
    able = running
    dividing = [each for each in able if not _undividable(service, each[0], gpu)] or able
    engine, suffix, remarks = _for_driver(dividing, gpu, driver, container)
    if dividing[0] is not able[0]:
        remarks = [*remarks, f"not vLLM {able[0][0].version}: {_undividable(service, able[0][0], gpu)}"]
    if engine is not dividing[0][0]:
        remarks = [f"vLLM {engine.version}: the newest that driver {driver} supports in full; a newer one allows more"]
    if problem := engines.start_problem(engine, suffix, gpu.name, driver, container):
        remarks = [*remarks, problem]
    return engine, suffix, [], remarks


def _for_driver(able: Sequence[Able], gpu: Gpu, driver: str | None, container: bool) -> Able:
    """Of releases in the order in which they are wanted, the first that the driver runs for certain.

    One older than the floor of the catalog is taken only where the first one does not even start.
    """
    sure = [each for each in able if not engines.is_risky(*each[:2], gpu.capability, gpu.name, driver, container)]
    first, floor = able[0], load("engines")["chosen_for_driver_from"]
    starts = engines.start_problem(*first[:2], gpu.name, driver, container) is None
    return next((each for each in sure if not starts or engines.at_least(each[0].version, floor)), first)


def _weights_problem(service: Service, engine: Engine, gpu: Gpu) -> str | None:
    """Why a release cannot run the model's weights and its attention on a GPU, or None."""
    if problem := _attention_problem(service, engine, gpu) or _cache_problem(service, engine, gpu):
        return problem
    shape, method = service.shape, service.quantization_method
    never, quant = load("engines")["no_int8_from"], shape.quant
    if (
        quant
        and quant.integer
        and (quant.bits, quant.activation_bits) == (8, 8)
        and gpu.capability >= engines.parse_capability(never)
    ):
        return (
            f"{method} weights with 8-bit integers and activations run below compute capability {never}, the GPU has "
            f"{engines.show(gpu.capability)}: take weights in FP8 or 4 bits"
        )
    kinds = ("full", "sliding", "chunked")
    head = max(
        (layer.attention.head_dim for layer in shape.layers if layer.attention and layer.attention.kind in kinds),
        default=0,
    )
    kernels = quant.kernels if quant and quant.method == method else ""
    return (
        engines.quantization_problem(engine.version, method, gpu.capability, kernels)
        or (None if service.image else engines.method_problem(engine.version, method))
        or engines.dtype_problem(engine, gpu.capability, shape.model_type, dtype_for(service, gpu), method, head)
    )


def _attention_problem(service: Service, engine: Engine, gpu: Gpu) -> str | None:
    """Why a release has no kernels for the model's attention on a GPU, or None."""
    shape, table = service.shape, load("engines")
    has = f"the GPU has {engines.show(gpu.capability)}"
    mla = [layer.attention for layer in shape.layers if layer.attention and layer.attention.kind == "mla"]
    if mla and gpu.capability < engines.parse_capability(table["mla_from"]):
        return f"latent attention (MLA) of {shape.model_type} needs compute capability {table['mla_from']}, {has}: take a newer GPU"
    majors = engines.by_release(table["sparse_mla_majors"], engine.version)
    if any(attention.index_bytes for attention in mla) and gpu.capability[0] not in majors:
        return (
            f"sparse attention (index_topk) of {shape.model_type} needs compute capability {', '.join(f'{each}.x' for each in majors)} "
            f"in vLLM {engine.version}, {has}: take such a GPU"
        )
    return None


def _cache_problem(service: Service, engine: Engine, gpu: Gpu) -> str | None:
    """Why a release cannot keep the KV cache of a model in the dtype asked for on a GPU, or None."""
    dtype, shape, table = service.kv_cache_dtype, service.shape, load("engines")["kv_cache"]
    if dtype == "auto":
        return None
    asked, release = f"kv_cache_dtype {dtype}", f"vLLM {engine.version}"
    has = f"the GPU has {engines.show(gpu.capability)}: leave it out"
    first = table["first"].get(dtype)
    if first and not engines.at_least(engine.version, first):
        return f"{release} has no {asked}: it came with {first}. Leave it out"
    attentions = [layer.attention for layer in shape.layers if layer.attention]
    if dtype == "fp8_ds_mla" and not any(attention.index_bytes for attention in attentions):
        return f"{asked} is for sparse latent attention (index_topk), which {shape.model_type} has not: leave it out, or give fp8"
    if dtype == "bfloat16" and gpu.capability < engines.parse_capability(table["bfloat16_from"]):
        return f"{asked} needs compute capability {table['bfloat16_from']}, {has}"
    plain = [each.head_dim for each in attentions if each.kind in ("full", "sliding", "chunked")]
    if not dtype.startswith("fp8") or not plain or engine.core(gpu.capability) == "V0":
        return None
    if gpu.capability >= engines.parse_capability(table["fp8_from"]):
        return None
    if gpu.capability < engines.parse_capability(table["flashinfer_from"]):
        return f"{asked} needs compute capability {table['flashinfer_from']} in {release}, {has}"
    beyond = next((head for head in plain if head not in table["flashinfer_heads"]), None)
    if beyond or shape.outer_type in table["fp8_not"]:
        whose = f"heads of {beyond}" if beyond else f"the attention of {shape.outer_type}"
        return f"{asked} for {whose} needs compute capability {table['fp8_from']} in {release}, {has}"
    return None


def _undividable(service: Service, engine: Engine, gpu: Gpu) -> str | None:
    """Why a release cannot divide the model as the user wants, or None."""
    if problem := replica_problem(service, engine, gpu):
        return problem
    several = service.hosts is not None and len(service.hosts) > 1
    if several and (problem := spanning_problem(engine, service.executor)):
        return problem
    # Several hosts are several stages, unless each of them holds a server of its own.
    stages = service.pp or (2 if several else 1)
    return next(iter(pp_problems(service.shape, stages, engine_version=engine.version)), None)


def spanning_problem(engine: Engine, executor: str | None) -> str | None:
    """Why an executor cannot work over several hosts, or None."""
    if executor == "mp" and not engine.mp_nodes:
        return f"executor mp does not span hosts in vLLM {engine.version}: use ray, or a release from 0.11.1 on"
    return None


def batches(service: Service, gpu: Gpu, engine: Engine, length: int) -> Iterator[tuple[int, int]]:
    """(max_num_batched_tokens, max_num_seqs) to try, from the engine's defaults down; what the user set stays."""
    unchunked = engine.core(gpu.capability) == "V0"
    row = replace(engine, batching="v0") if unchunked else engine
    tokens, seqs = row.batch_defaults(gpu.memory_total_mib, gpu.name)
    fixed_tokens, fixed_seqs = service.max_num_batched_tokens, service.max_num_seqs
    tried = set()
    for limit_tokens, limit_seqs in ((tokens or 0, seqs), (2048, 256), (2048, 64), (2048, 16)):
        number = fixed_seqs or min(seqs, limit_seqs)
        if fixed_tokens:
            total = fixed_tokens
        elif unchunked:  # a prompt is not split, so that the batch must hold a whole one
            total = max(length, 2048 if limit_tokens == (tokens or 0) else number)
        elif service.pools:
            total = max(length, min(tokens or 2048, limit_tokens), number)
        else:
            total = max(min(tokens or 2048, limit_tokens), number)
        if (total, number) not in tried:
            tried.add((total, number))
            yield total, number


def longest_prompt(service: Service, engine: Engine, gpu: Gpu) -> int | None:
    """The batch that the user set where it has to hold a whole prompt: the V0 core does not start with a longer context."""
    whole = engine.core(gpu.capability) == "V0" and not service.splits_prompts
    return service.max_num_batched_tokens if whole else None


def memory_arguments(
    service: Service, gpu: Gpu, engine: Engine, shape: Shape, eager: bool, tokens: int, seqs: int
) -> dict[str, Any]:
    """Arguments of memory.engine_memory that do not depend on context and utilization."""
    return {
        "gpu_memory_total_mib": gpu.memory_total_mib,
        "gpu_memory_reserved_mib": gpu.memory_reserved_mib,
        "compute_capability": engines.show(gpu.capability),
        "engine_version": engine.version,
        "tensor_parallel_size": shape.tp,
        "pipeline_parallel_size": shape.pp,
        # Replicas of a dense model do not share anything.
        "data_parallel_size": shape.dp if service.shape.experts else 1,
        "expert_parallel": spreads_experts(service, shape),
        "enforce_eager": eager,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": seqs,
        "dtype": dtype_for(service, gpu),
        "kv_cache_dtype": service.kv_cache_dtype,
        "quantization": service.quantization,
    }


def spreads_experts(service: Service, shape: Shape) -> bool:
    return service.shape.experts > 0 and (bool(service.expert_parallel) or shape.dp > 1)


def make_need(
    service: Service,
    gpu: Gpu,
    engine: Engine,
    tag: str,
    length: int,
    tokens: int,
    seqs: int,
    shape: Shape,
    eager: bool,
) -> Need | None:
    """The least that a layout takes, or None when even a whole GPU is too little."""
    arguments = memory_arguments(service, gpu, engine, shape, eager, tokens, seqs)
    utilization = service.utilization
    if utilization is None:
        utilization = lowest_utilization(
            service.shape, concurrency=service.min_concurrency, max_model_len=length, **arguments
        )
        if utilization is None:
            return None
    memory = engine_memory(service.shape, gpu_memory_utilization=utilization, max_model_len=length, **arguments)
    visible = memory.requested_gib / utilization
    if not memory.fits or (memory.max_concurrency + 1e-6 < service.min_concurrency and not service.pools):
        return None
    room = memory.footprint_gib + (SLACK * visible if service.utilization is None else 0.0)
    if room > visible:
        return None
    return Need(
        kind=gpu.kind,
        engine=engine,
        tag=tag,
        shape=shape,
        max_model_len=length,
        tokens=tokens,
        seqs=seqs,
        eager=eager,
        utilization=utilization,
        footprint=memory.footprint_gib,
        held=memory.held_gib,
        room=room,
        visible=visible,
    )


def dtype_for(service: Service, gpu: Gpu) -> str:
    """What ``--dtype`` is: GPUs below 8.0 have no bfloat16."""
    if service.dtype != "auto" or gpu.capability >= (8, 0):
        return service.dtype
    return "float32" if engines.float16_is_wrong(service.shape.model_type) else "float16"


def valid_tp(service: Service, engine: Engine, expert_parallel: bool = False) -> list[int]:
    """Tensor-parallel sizes that the model and the release allow."""
    key = ("valid_tp", engine.version, expert_parallel, service.quantization)
    if key not in service.shape.cache:
        service.shape.cache[key] = [
            tp
            for tp in range(1, MAX_TP + 1)
            if not tp_problems(
                service.shape,
                tp,
                engine_version=engine.version,
                expert_parallel=expert_parallel,
                quantization=service.quantization,
            )
        ]
    sizes: list[int] = service.shape.cache[key]
    return sizes


def runs_replicas(engine: Engine, gpu: Gpu) -> bool:
    """One server of this release runs several engines on this GPU: only the V1 core starts the others."""
    return engine.core(gpu.capability) == "V1" and engines.has_flag(engine.version, "--data-parallel-size")


def replica_problem(service: Service, engine: Engine, gpu: Gpu) -> str | None:
    """Why a release cannot run the replicas that the user asks for, by their number or by one of GPUs, or None."""
    if service.shape.experts and (service.dp or 1) > 1:
        if service.expert_parallel is False:
            return (
                f"data_parallel_size {service.dp} with enable_expert_parallel false: replicas of a model with experts are "
                f"planned with the experts spread over them. Leave one of the two out, or make {service.dp} services"
            )
        if (service.pp or 1) > 1:
            return (
                f"data_parallel_size {service.dp} with pipeline_parallel_size {service.pp}: experts are planned spread over "
                "replicas of one stage. Leave one of the two out"
            )
    gpus = service.gpu_count or len(service.gpu_indices or ())
    divided = (service.tp or 0) * (service.pp or 1)
    if service.dp:
        number, asked = service.dp, f"data_parallel_size {service.dp}"
    elif gpus and divided and gpus % divided == 0:
        number, asked = gpus // divided, f"gpus {gpus} with TP {service.tp} x PP {service.pp or 1}"
    else:
        return None
    if number == 1 or runs_replicas(engine, gpu):
        return None
    row = load("flags")["flags"]["--data-parallel-size"]
    return (
        f"{asked} needs the V1 core of vLLM {row['first']} or newer, which alone starts the other replicas; vLLM "
        f"{engine.version} has its {engine.core(gpu.capability)} core on compute capability "
        f"{engines.show(gpu.capability)}: make {number} services of one replica each, on ports of their own"
    )


def valid_shapes(service: Service, engine: Engine, gpu: Gpu, host_gpus: int, hosts: int, link: str) -> list[Shape]:
    """What could be tried for one instance on hosts of ``host_gpus`` equal GPUs with this link, the wanted ones first.

    Fewest GPUs first. Over NVLink, TP comes before spreading experts and that before PP; over slower links PP is worth
    more, and without P2P it is the first for throughput. What one host cannot hold spans hosts: TP fills each, PP joins
    them. DP above 1 is for experts only: it divides them.
    """
    shapes = []
    for tp in valid_tp(service, engine, bool(service.expert_parallel)):
        if tp > host_gpus or service.tp not in (None, tp):
            continue
        stages = host_gpus // tp
        for pp in range(1, stages * hosts + 1):
            spans = pp > stages
            if service.pp not in (None, pp) or (service.pools and pp > 1 and service.pp is None):
                continue
            if spans and (pp % stages or stages * tp < host_gpus) and service.pp is None:
                continue  # leaves GPUs of each host idle
            if not pp_problems(service.shape, pp, engine_version=engine.version):
                shapes.append(Shape(tp, pp))
    spreads = service.shape.experts and service.pp in (None, 1) and service.expert_parallel is not False
    if spreads and runs_replicas(engine, gpu) and engines.has_flag(engine.version, "--enable-expert-parallel"):
        shapes += [
            Shape(tp, 1, dp)
            for dp in range(2, host_gpus + 1)
            for tp in valid_tp(service, engine, True)
            if tp * dp <= host_gpus and service.tp in (None, tp) and service.shape.experts % (tp * dp) == 0
        ]
    if service.shape.experts and service.dp:
        shapes = [shape for shape in shapes if shape.dp == service.dp]
    gpus = service.gpu_count or len(service.gpu_indices or ())
    if gpus:
        copies = 1 if service.shape.experts or not runs_replicas(engine, gpu) else service.dp
        shapes = [s for s in shapes if (s.world * copies == gpus if copies else gpus % s.world == 0)]

    def rank(shape: Shape) -> tuple[int, ...]:
        kind = 1 if shape.dp > 1 else 2 if shape.pp > 1 else 0
        spans = shape.tp * shape.pp > host_gpus
        if link in ("nvlink", "none") and not spans:
            return (kind, shape.world)
        pipeline_first = link == "pcie" and service.objective == "throughput" and not spans
        return (shape.world, shape.tp if pipeline_first else -shape.tp)

    # For latency a number of GPUs is meant as one wide engine, not as replicas.
    wide = service.objective == "latency" and gpus
    return sorted(shapes, key=lambda shape: (-shape.tp if wide else 0, *rank(shape)))


# ----------------------------------------------------------------------------------------------------- placement


def eligible(service: Service, places: Sequence[Place]) -> list[Place]:
    """Places of one host that the service may use."""
    if service.gpu_indices is not None:
        return [place for place in places if place.gpu.index in service.gpu_indices]
    return list(places)


def by_kind(places: Iterable[Place]) -> list[list[Place]]:
    """Groups of equal GPUs, the largest group first: an engine's ranks must not differ."""
    groups: dict[tuple[Any, ...], list[Place]] = {}
    for place in places:
        groups.setdefault(place.gpu.kind, []).append(place)
    return sorted(groups.values(), key=lambda group: (-len(group), -group[0].total, group[0].gpu.index))


LINKS = {"none": 0, "nvlink": 0, "p2p": 1, "pcie": 2}


@dataclass(frozen=True)
class Team:
    """Equal GPUs of hosts that could work for one server. What they have in common is what the least of them has."""

    groups: Sequence[list[Place]]

    @property
    def gpu(self) -> Gpu:
        return self.groups[0][0].gpu

    @property
    def hosts(self) -> list[Host]:
        return [group[0].host for group in self.groups]

    @property
    def count(self) -> int:
        """GPUs that every host has. Slices do not work together."""
        return 1 if self.gpu.mig else min(map(len, self.groups))

    @property
    def link(self) -> str:
        links = [group[0].host.link(place.gpu.index for place in group) for group in self.groups]
        return max(links, key=lambda name: LINKS[name])

    @property
    def driver(self) -> str | None:
        return oldest_driver(self.hosts)


def oldest_driver(hosts: Iterable[Host]) -> str | None:
    """The driver that decides which release all of these hosts can run; one that is still to be installed can be any."""
    known = [host.driver_version for host in hosts if host.driver_version]
    return min(known, key=engines.version_key, default=None)


def _pick(places: Sequence[Place], count: int, need: Need) -> list[Place] | None:
    """The best ``count`` of these equal GPUs with room for the need, or None."""
    able = [place for place in places if place.free >= need.room + (0.0 if place.idle else need.held)]
    if len(able) < count or (count > 1 and able[0].gpu.mig):
        return None
    if count == 1:

        def rank(place: Place) -> tuple[Any, ...]:
            packed = place.claims and all(size < SMALL * place.total for _, size in place.claims)
            return (not (need.small and packed), not place.idle, -place.free, place.gpu.index, place.gpu.uuid)

        return [min(able, key=rank)]
    host = able[0].host
    idle = [place for place in able if place.idle]
    if len(idle) >= count:
        windows = [idle[start : start + count] for start in range(len(idle) - count + 1)]
        return min(windows, key=lambda window: LINKS[host.link(place.gpu.index for place in window)])
    return sorted(able, key=lambda place: (-place.free, place.gpu.index))[:count]


class Layout:
    """The search itself: hosts, services and who got what."""

    def __init__(self, services: Sequence[Service], hosts: Sequence[Host], needs: Needs, lean: bool = False) -> None:
        """lean: the smallest batches count, so that services that share GPUs leave each other room."""
        self.needs = needs
        self.lean = lean
        self.hosts = list(hosts)
        self.places = {host.name: [Place(host, gpu, _visible(gpu)) for gpu in host.gpus] for host in hosts}
        self.tasks = [Task(service, order) for order, service in enumerate(services)]
        self.cpu_claims: dict[str, float] = {}

    # -- which hosts

    def allowed(self, service: Service) -> list[Host]:
        if service.hosts is None:
            return self.hosts
        known = {host.name: host for host in self.hosts}
        for name in service.hosts:
            if name not in known:
                names = ", ".join(known)
                raise PlanError(f"vllm_services[{service.name}].hosts", name, f"no such host; there are {names}")
        return [host for host in self.hosts if host.name in service.hosts]

    def device(self, service: Service) -> str:
        gpus = any(self.places[host.name] for host in self.allowed(service))
        return service.device or ("cuda" if gpus else "cpu")

    # -- needs in the order in which they are wanted

    def _variants(self, service: Service, team: Team, hosts: int, length: int, eager: bool) -> Iterator[Need]:
        """Needs of a service on ``hosts`` hosts of a team."""
        gpu = team.gpu
        engine, tag, _, _ = self.needs.engine(service, gpu, team.driver)
        if engine is None or replica_problem(service, engine, gpu):
            return
        shapes = valid_shapes(service, engine, gpu, team.count, 1 if gpu.mig else hosts, team.link)
        limits = (1.0,) if service.utilization else (engine.gpu_memory_utilization, 1.0)
        for shape in shapes:
            for most in limits:
                need = self.needs.find(service, gpu, engine, tag, length, shape, eager, most, self.lean)
                if need:
                    yield need

    @staticmethod
    def _copies(service: Service, shape: Shape) -> int:
        """Replicas in one server that the user asked for, by data_parallel_size or by a number of GPUs."""
        if service.shape.experts:
            return 1
        gpus = service.gpu_count or len(service.gpu_indices or ())
        return service.dp or (gpus // shape.world if gpus else 1)

    # -- placing

    def place(self, task: Task) -> bool:
        """Claims GPUs for a service; False when there is no room for it."""
        service = task.service
        lengths = [service.max_model_len] if service.max_model_len else usual_lengths(service)
        found = self._find(service, lengths[0])
        if not found and len(lengths) > 1 and (shortest := self._find(service, lengths[-1])):
            # What holds a context holds a shorter one: the longest that finds room lies between.
            found, low, high = shortest, 0, len(lengths) - 1
            while high - low > 1:
                middle = (low + high) // 2
                if better := self._find(service, lengths[middle]):
                    found, high = better, middle
                else:
                    low = middle
        for instance in found:
            instance.claim(instance.places)
            task.instances.append(instance)
        return bool(found)

    def _find(self, service: Service, length: int) -> list[Instance]:
        """The servers of a service for a context, not yet claimed: one, or one on each host that the user named."""
        hosts = self.allowed(service)
        several = service.hosts is not None and len(hosts) > 1
        for eager in (False, True) if service.enforce_eager is None else (service.enforce_eager,):
            if several:
                alone = [found for host in hosts if (found := self._on_one_host(service, [host], length, eager))]
                if len(alone) == len(hosts):
                    return alone
            elif found := self._on_one_host(service, hosts, length, eager):
                return [found]
            if found := self._across_hosts(service, hosts, length, eager, len(hosts) if several else None):
                return [found]
        return []

    def _groups(self, service: Service, hosts: Sequence[Host]) -> list[list[list[Place]]]:
        """Groups of equal GPUs of these hosts, sorted by what decides a need: kind, release, number and link."""
        classes: dict[tuple[Any, ...], list[list[Place]]] = {}
        for host in hosts:
            for group in by_kind(eligible(service, self.places[host.name])):
                gpu, link = group[0].gpu, host.link(place.gpu.index for place in group)
                engine, tag, _, _ = self.needs.engine(service, gpu, host.driver_version)
                classes.setdefault((gpu.kind, engine, tag, len(group), link), []).append(group)
        return list(classes.values())

    def teams(self, service: Service, hosts: Sequence[Host], exactly: int | None) -> Iterator[Team]:
        """Hosts that could work together: all of those that the user named, or the most alike ones first."""
        kinds: dict[tuple[Any, ...], list[list[list[Place]]]] = {}
        for groups in self._groups(service, hosts):
            kinds.setdefault(groups[0][0].gpu.kind, []).append(groups)
        for classes in kinds.values():
            whole = [group for groups in classes for group in groups]
            order = {host.name: number for number, host in enumerate(hosts)}
            whole.sort(key=lambda group: order[group[0].host.name])
            if exactly is None:
                yield from (Team(groups) for groups in classes)
                if len(classes) == 1:
                    continue
                for least in sorted({len(group) for group in whole}, reverse=True):
                    yield Team([group for group in whole if len(group) >= least])
            elif len(whole) == exactly:
                yield Team(whole)

    def _on_one_host(self, service: Service, hosts: Sequence[Host], length: int, eager: bool) -> Instance | None:
        def ordered(groups: list[list[Place]]) -> Iterator[tuple[tuple[Any, ...], Need, list[list[Place]]]]:
            """The wanted order of one kind of GPU; among kinds: the fewest GPUs, then the smallest memory."""
            for number, need in enumerate(self._variants(service, Team(groups), 1, length, eager)):
                yield (number, need.shape.world, need.visible), need, groups

        classes = [ordered(groups) for groups in self._groups(service, hosts)]
        for _, need, groups in heapq.merge(*classes, key=lambda variant: variant[0]):
            copies = self._copies(service, need.shape)
            count = need.shape.world * copies
            fits = [(group, picked) for group in groups if (picked := _pick(group, count, need))]
            if fits:
                picked = min(fits, key=lambda fit: _host_rank(fit[0], fit[1], need.small))[1]
                return Instance(need, picked, need.shape._replace(dp=need.shape.dp * copies))
        return None

    def _across_hosts(
        self, service: Service, hosts: Sequence[Host], length: int, eager: bool, exactly: int | None
    ) -> Instance | None:
        """One instance whose pipeline stages span hosts: TP inside each."""
        for team in self.teams(service, hosts, exactly):
            if len(team.groups) < 2:
                continue
            for need in self._variants(service, team, len(team.groups), length, eager):
                tp, pp, dp = need.shape
                span = exactly or math.ceil(pp / (team.count // tp))
                if dp > 1 or self._copies(service, need.shape) > 1 or span < 2 or pp % span:
                    continue
                parts = [part for group in team.groups if (part := _pick(group, tp * pp // span, need))]
                if len(parts) >= span:
                    return Instance(need, [place for part in parts[:span] for place in part], need.shape)
        return None

    # -- growing

    def grow(self) -> None:
        """GPUs that nobody claimed become wider TP or replicas, in turn, the service with the fewest GPUs first."""
        for task in self.tasks:
            if task.service.objective == "latency":
                for instance in task.instances:
                    self._widen(task, instance)
        growing = [task for task in self.tasks if self._may_replicate(task)]
        size = {task.order: sum(len(instance.places) for instance in task.instances) for task in growing}
        for host in self.hosts:
            added = 1
            while added:
                for task in sorted(growing, key=lambda task: (size[task.order], task.order)):
                    added = self._replicate(task, host)
                    size[task.order] += added
                    if added:
                        break
                else:
                    added = 0

    @staticmethod
    def _may_replicate(task: Task) -> bool:
        service = task.service
        return (
            bool(task.instances)
            and service.objective == "throughput"
            and not service.pools
            and service.dp is None
            and service.gpu_count is None
            and service.gpu_indices is None
            and all(len(instance.hosts) == 1 for instance in task.instances)
        )

    def _idle(self, host: Host, need: Need) -> list[Place]:
        return [place for place in self.places[host.name] if place.idle and place.gpu.kind == need.kind]

    def _widen(self, task: Task, instance: Instance) -> None:
        """The widest TP that the idle GPUs of the instance's host allow."""
        service, need, shape = task.service, instance.need, instance.shape
        fixed = service.tp or service.gpu_count or service.gpu_indices or service.pools
        if fixed or shape.pp > 1 or shape.dp > 1 or instance.places[0].gpu.mig:
            return
        host = instance.hosts[0]
        idle = self._idle(host, need)
        for tp in reversed(valid_tp(service, need.engine, bool(service.expert_parallel))):
            if not shape.tp < tp <= shape.tp + len(idle):
                continue
            places = instance.places + idle[: tp - shape.tp]
            wider = self._reshaped(service, need, places[0].gpu, Shape(tp))
            # Its share of the GPUs that it has already may be smaller now, never larger.
            if wider and wider.footprint <= min(
                need.footprint, *(place.free - wider.room + wider.footprint for place in places[shape.tp :])
            ):
                count = tp - shape.tp
                task.why.append(
                    f"TP {tp} instead of {shape.tp}: objective latency, and {count} GPU(s) of {host.name} idle"
                )
                instance.release()
                instance.need, instance.places, instance.shape, instance.widened = wider, places, Shape(tp), True
                instance.claim(places)
                return

    def _reshaped(self, service: Service, need: Need, gpu: Gpu, shape: Shape) -> Need | None:
        """The need of the same context in another shape, within the engine's default utilization if that does."""
        for most in (need.engine.gpu_memory_utilization, 1.0):
            found = self.needs.find(
                service, gpu, need.engine, need.tag, need.max_model_len, shape, need.eager, most, self.lean
            )
            if found:
                return found
        return None

    def _replicate(self, task: Task, host: Host) -> int:
        """One more replica on a host, or for experts as many as can be; the number of GPUs that it took."""
        service, need = task.service, task.instances[0].need
        if service.hosts is not None and host.name not in service.hosts:
            return 0
        idle = self._idle(host, need)
        if not idle or self.needs.engine(service, idle[0].gpu, host.driver_version)[:2] != (need.engine, need.tag):
            return 0
        here = next((instance for instance in task.instances if instance.hosts[0] is host), None)
        if here is None:
            picked = _pick(idle, need.shape.world, need)
            if not picked:
                return 0
            instance = Instance(need, picked, need.shape)
            instance.claim(picked)
            task.instances.append(instance)
            return len(picked)
        if idle[0].gpu.mig:
            return 0
        if not runs_replicas(need.engine, idle[0].gpu):
            task.why.append(
                f"{len(idle)} GPU(s) of {host.name} stay idle: vLLM {need.engine.version} starts no replicas on them; "
                "another service with the same model can have them"
            )
            return 0
        if service.shape.experts:
            return self._spread_experts(service, here, idle)
        picked = _pick(idle, need.shape.world, need)
        if not picked:
            return 0
        here.claim(picked)
        here.places += picked
        here.shape = here.shape._replace(dp=here.shape.dp + 1)
        return len(picked)

    def _spread_experts(self, service: Service, here: Instance, idle: list[Place]) -> int:
        """Divides the experts of an instance among the most GPUs that their number allows."""
        tp, pp, now = here.shape
        if pp > 1 or service.expert_parallel is False:
            return 0
        if not engines.has_flag(here.need.engine.version, "--enable-expert-parallel"):
            return 0
        for dp in range(now + len(idle) // tp, now, -1):
            if service.shape.experts % (tp * dp):
                continue
            need = self._reshaped(service, here.need, idle[0].gpu, Shape(tp, 1, dp))
            picked = _pick(idle, (dp - now) * tp, need) if need else None
            if need and picked and need.footprint <= here.need.footprint:
                here.release()
                here.need, here.shape, here.places = need, need.shape, here.places + picked
                here.claim(here.places)
                return len(picked)
        return 0


def _host_rank(group: Sequence[Place], picked: Sequence[Place], small: bool) -> tuple[Any, ...]:
    """Which of several hosts: small services go where small ones are, others where the fewest GPUs stay idle."""
    idle = sum(place.idle for place in group)
    claimed = sum(not place.idle for place in picked)
    return (-claimed if small else claimed, idle, LINKS[group[0].host.link(place.gpu.index for place in picked)])


def _visible(gpu: Gpu) -> float:
    """Memory of a GPU that CUDA can use; memory.py knows how much of what nvidia-smi shows is reserved."""
    return cuda_total_gib(gpu.memory_total_mib, gpu.memory_reserved_mib)


def usual_lengths(service: Service) -> list[int]:
    """Contexts to plan for when the user named none: the model's own up to the usual one, then shorter ones."""
    longest = min(service.shape.max_position or USUAL_CONTEXT, USUAL_CONTEXT)
    lengths = [longest]
    while lengths[-1] > SHORTEST_CONTEXT:
        lengths.append(1 << ((lengths[-1] - 1).bit_length() - 1))
    return lengths
