# SPDX-License-Identifier: GPL-3.0-or-later
"""Why a service cannot run on the hosts there are, with the arithmetic, and the nearest thing that can."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from . import engine as engines
from .engine import Engine
from .hardware import Host
from .layout import (
    MIB,
    SHORTEST_CONTEXT,
    Layout,
    Need,
    Needs,
    Place,
    Shape,
    Task,
    Team,
    batches,
    by_kind,
    dtype_for,
    eligible,
    longest_prompt,
    memory_arguments,
    replica_problem,
    usual_lengths,
    valid_shapes,
    valid_tp,
)
from .memory import engine_memory
from .model import Quantization, pp_problems, tp_problems
from .service import Service, beyond_the_model

SLICES = "slices of a GPU (MIG) do not work together"
# A refusal counts with this context when the user named none.
SHORT_CONTEXT = 2048


# The layout that the plan has for a service with other settings beside all others; None when it or others find no place.
Holds = Callable[[Service], Shape | None]


def refuse(task: Task, layout: Layout, holds: Holds) -> list[str]:
    """Why a service found no place, with the arithmetic, and the nearest thing that could run."""
    service = task.service
    hosts = layout.allowed(service)
    if beyond_the_model(service):
        return []  # said once for every service, placed or not
    groups = [group for host in hosts for group in by_kind(eligible(service, layout.places[host.name]))]
    if not groups:
        wanted = f" with index {', '.join(map(str, service.gpu_indices))}" if service.gpu_indices else ""
        return [f"there is no GPU{wanted} on {', '.join(host.name for host in hosts)}"]
    team = _team(task, layout)
    if team is None:
        return [_unlike(hosts, groups)]
    gpu = team.gpu
    engine, _, problems, _ = layout.needs.engine(service, gpu, team.driver)
    if engine is None:
        return problems
    if problem := replica_problem(service, engine, gpu):
        return [problem]
    whole, length = longest_prompt(service, engine, gpu), service.max_model_len or SHORTEST_CONTEXT
    if whole and length > whole:
        return [
            f"max_num_batched_tokens {whole} is below max_model_len {length}, and the V0 core of vLLM {engine.version} does "
            f"not split prompts: set max_num_batched_tokens {length} or leave it out, or lower max_model_len to {whole}"
            # Volta's kernels cannot work on a part of a prompt.
            + (", or give extra_args --enable-chunked-prefill" if gpu.capability >= (7, 5) else "")
        ]
    valid = valid_tp(service, engine, bool(service.expert_parallel))
    if service.tp and service.tp not in valid:
        reasons = tp_problems(
            service.shape,
            service.tp,
            engine_version=engine.version,
            expert_parallel=bool(service.expert_parallel),
            quantization=service.quantization,
        )
        ways = f"possible: {', '.join(map(str, valid))}"
        if service.shape.experts and not service.expert_parallel:
            ways += "; or expert parallel with data parallel over all GPUs (leave tensor_parallel_size out)"
        return [f"{'; '.join(reasons)}. {ways[0].upper()}{ways[1:]}"]
    if service.pp and (reasons := pp_problems(service.shape, service.pp, engine_version=engine.version)):
        return reasons
    total = sum(len(other) for other in groups if other[0].gpu.kind == gpu.kind)
    asked = (service.tp or 1) * (service.pp or 1) * (service.dp or 1)
    asked = max(asked, service.gpu_count or 0)
    if gpu.mig and asked > 1:
        return [f"{asked} GPUs are asked for, and {SLICES}: ask for one, and make a service for each of the others"]
    if asked > total:
        return [
            f"{asked} GPUs are asked for and {total} of one kind are there ({gpu.name}, {gpu.memory_total_mib} MiB)"
        ]
    if (service.dp or 1) > 1 and asked > team.count:
        return [_apart(service, team, asked)]
    if service.hosts is not None and (problem := _uneven(service, team)):
        return [problem]
    return _too_little(service, team, engine, total, holds)


def _team(task: Task, layout: Layout) -> Team | None:
    """The GPUs that a refusal is about; None when the hosts that the user named have none that could work together."""
    service = task.service
    hosts = layout.allowed(service)
    several = service.hosts is not None and len(hosts) > 1
    if several and service.pp != 1:
        return next(layout.teams(service, hosts, len(hosts)), None)
    best = [
        max(groups, key=_size) for host in hosts if (groups := by_kind(eligible(service, layout.places[host.name])))
    ]
    # Each host that the user named has to hold a server; of others the best one is enough.
    return Team([(min if several else max)(best, key=_size)])


def _size(group: Sequence[Place]) -> tuple[float, int]:
    return len(group) * group[0].total, -group[0].gpu.index


def _unlike(hosts: Sequence[Host], groups: Sequence[Sequence[Place]]) -> str:
    """Why hosts cannot work together: what each of them has."""
    has = {
        host.name: " and ".join(
            f"{len(group)} {group[0].gpu.name} ({group[0].gpu.memory_total_mib} MiB)"
            for group in groups
            if group[0].host is host
        )
        for host in hosts
    }
    return (
        "the GPUs of one server are alike, and the hosts have no kind in common: "
        + "; ".join(f"{name} has {what or 'none'}" for name, what in has.items())
        + ". Name hosts with equal GPUs, or make a service for each kind"
    )


def _uneven(service: Service, team: Team) -> str | None:
    """Why stages cannot be divided among the hosts that the user named, each of which gets as many."""
    tp, pp, number = service.tp or 1, service.pp or 1, len(team.groups)
    stages = team.count // tp
    if number < 2 or not stages or pp <= stages:
        return None
    text = f"TP {tp} x PP {pp} does not go onto {number} hosts: "
    possible = ", ".join(str(number * each) for each in range(1, stages + 1))
    if pp % number:
        text += "each gets the same number of stages"
    elif pp // number > stages:
        least = min(team.groups, key=len)
        text += f"{least[0].host.name} has {len(least)} GPUs, and {pp // number} stages take {tp * pp // number}"
    else:
        return None
    return f"{text}. Set pipeline_parallel_size {possible}, or name other hosts"


def _apart(service: Service, team: Team, gpus: int) -> str:
    return (
        f"data_parallel_size {service.dp}: the replicas of one server are on one host, and {gpus} GPUs are more than the "
        f"{team.count} of one. Make a service for each, on ports of their own"
    )


def _too_little(service: Service, team: Team, engine: Engine, total: int, holds: Holds) -> list[str]:
    """The arithmetic of the layout that comes nearest, and what would help."""
    gpu, count, link = team.gpu, team.count, team.link
    group = [place for part in team.groups for place in part]
    hosts = len(team.groups) if len(team.groups) > 1 else max(1, total // len(group))
    hosts = 1 if gpu.mig else hosts
    shapes = valid_shapes(service, engine, gpu, count, hosts, link)
    if not shapes:
        sizes = [tp for tp in valid_tp(service, engine) if tp <= count]
        if service.tp and service.tp > count and sizes and service.tp % sizes[-1] == 0:
            # Each layer of each token would cross the network twice.
            way = f"set tensor_parallel_size {sizes[-1]} and pipeline_parallel_size {service.tp // sizes[-1]}"
            never = pp_problems(service.shape, service.tp // sizes[-1], engine_version=engine.version)
            return [
                f"TP {service.tp} does not fit into a host of {count} GPUs, and TP stays inside a host: "
                + (f"{way} is not possible, either: {never[0]}" if never else way)
            ]
        possible = ", ".join(map(str, sizes))
        gpus = service.gpu_count or len(service.gpu_indices or ()) or count
        copies = f" and data_parallel_size {service.dp}" if service.dp else ""
        return [f"no layout of {gpus} GPUs{copies} is possible: TP can be {possible or 'none'}"]
    shape = max(shapes, key=lambda shape: shape.world)
    whole = longest_prompt(service, engine, gpu)
    length = service.max_model_len or min(usual_lengths(service)[0], whole or SHORT_CONTEXT, SHORT_CONTEXT)
    tokens, seqs = list(batches(service, gpu, engine, length))[-1]
    eager = service.enforce_eager is not False
    need = Needs().find(service, gpu, engine, "", length, shape, eager, 1.0, True)
    if need and all(place.free >= need.room for place in group):
        if not service.shape.experts and (service.dp or 1) > 1:
            fitting = (s for s in shapes if Needs().find(service, gpu, engine, "", length, s, eager, 1.0, True))
            if (least := min(s.world for s in fitting) * (service.dp or 1)) > count:
                return [_apart(service, team, least)]
        return [
            f"{words(shape)} fits on GPUs like these, but not on these hosts: each one gets the same number of stages, "
            f"at most {count // shape.tp} of them. Set pipeline_parallel_size to another number, or leave it out"
        ]
    arguments = memory_arguments(service, gpu, engine, shape, eager, tokens, seqs)
    # What those who are there already claim, with all that their allocators keep, may be more than there is.
    free, total_gib = max(0.0, min(place.free for place in group)), group[0].total
    arguments["gpu_memory_used_mib"] = max(0.0, total_gib - free) * MIB
    # The most that the engine may ask for: what is free less what lies outside of its share.
    outside = engine_memory(service.shape, gpu_memory_utilization=0.5, max_model_len=length, **arguments).outside_gib
    thousandths = min(1000, math.floor((free - outside) / total_gib * 1000))
    most = max(1, thousandths) / 1000
    memory = engine_memory(
        service.shape, gpu_memory_utilization=service.utilization or most, max_model_len=length, **arguments
    )
    reason = memory.reason
    if memory.fits and memory.max_concurrency < service.min_concurrency:
        reason = f"it holds {memory.max_concurrency:.2f} requests of {length} tokens, not {service.min_concurrency:g}"
    if thousandths < 1 and service.utilization is None:  # no share of which it could count
        reason = f"{total_gib - free:.2f} of {total_gib:.2f} GiB are in use by others"
    taken = [
        f"{place.label}: {max(0.0, place.free):.2f} of {place.total:.2f} GiB are free"
        for place in group
        if not place.idle
    ]
    problem = f"does not fit on {gpu.name} with {words(shape)}: {reason}" + (f" ({'; '.join(taken)})" if taken else "")
    ways = _ways_out(service, team, engine, length, holds)
    if not ways and memory.weights_gib:  # else it is not memory that is missing
        ways = ["not even 32 such GPUs hold it: take GPUs with more memory, or a smaller model"]
    return [problem, *ways]


def words(shape: Shape) -> str:
    """ "TP 2 x PP 3"."""
    text = f"TP {shape.tp}" + (f" x PP {shape.pp}" if shape.pp > 1 else "")
    return text + (f" x DP {shape.dp} with experts spread" if shape.dp > 1 else "")


# Settings without which a service may fit, those that are missed least first.
LOOSE = {
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs",
    "utilization": "gpu_memory_utilization",
    "enforce_eager": "enforce_eager",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "gpu_count": "gpus",
    "gpu_indices": "gpus",
}
# What quantized weights would be, as checkpoints of these methods are (the embedding and the output stay as they are).
SMALLER = {
    "8 bits (FP8)": Quantization("fp8", 8, activation_bits=8),
    "4 bits (AWQ, GPTQ)": Quantization("awq", 4, 128, 16, 4, marlin=True, halves=True),
}


def _without(service: Service, keys: Sequence[str]) -> Service:
    """The service with these settings left to the plan; CUDA graphs that were asked for are given up."""
    changes = dict.fromkeys(keys)
    return replace(service, **{**changes, **({"enforce_eager": True} if "enforce_eager" in changes else {})})  # type: ignore[arg-type]


def _way(fits: str, keys: Sequence[str], shape: Shape) -> str:
    """One piece of advice: what has to be left out for it is named."""
    left_out = [LOOSE[key] for key in keys if key != "enforce_eager"]
    parts = [f"{' and '.join(left_out)} left out"] if left_out else []
    parts += ["enforce_eager true"] if "enforce_eager" in keys else []
    return f"{fits} ({words(shape)})" + (f" with {' and '.join(parts)}" if parts else "")


def _ways_out(service: Service, team: Team, engine: Engine, length: int, holds: Holds) -> list[str]:
    """The nearest things that fit: settings as the plan would hold them beside all other services, then other GPUs."""

    gpu, count, link = team.gpu, team.count, team.link

    def find(
        other: Service,
        tokens: int,
        gpus: int = count,
        hosts: int = 1 if gpu.mig else len(team.groups),
        graphs: bool = False,
    ) -> Need | None:
        """The first layout of up to ``gpus`` GPUs a host, which nobody else uses, that holds it."""
        needs = Needs()
        eager = [other.enforce_eager] if other.enforce_eager is not None else [False] if graphs else [False, True]
        for choice in eager:
            for shape in valid_shapes(other, engine, gpu, gpus, hosts, link):
                if need := needs.find(other, gpu, engine, "", tokens, shape, choice, 1.0, False):
                    return need
        return None

    def least(keys: Sequence[str], other: Service) -> tuple[Sequence[str], Shape] | None:
        """The fewest of these settings that have to go, and the layout that it has then."""
        found = holds(_without(other, keys))
        for key in reversed(keys) if found else ():
            fewer = [name for name in keys if name != key]
            if shape := holds(_without(other, fewer)):
                keys, found = fewer, shape
        return (keys, found) if found else None

    def holding(keys: Sequence[str], tokens: int) -> Shape | None:
        return holds(replace(_without(service, keys), max_model_len=tokens))

    # Not `in (None, True)`: a 1 equals True.
    asked = [key for key in LOOSE if (value := getattr(service, key)) is not None and value is not True]
    free = _without(service, asked)
    ways = []
    alone = find(free, length)
    fitting = least(asked, service) if asked and alone else None
    if fitting:
        ways.append(_way("it fits", *fitting))
    shorter = [tokens for tokens in usual_lengths(service) if tokens < length] if service.max_model_len else []
    if shorter and (alone or find(free, shorter[-1])):
        for keys in [[]] if fitting or not asked else [[], asked]:
            longest = _longest(shorter, partial(holding, keys))
            if longest and (found := least(keys, replace(service, max_model_len=longest))):
                ways.append(_way(f"max_model_len {longest} fits", *found))
                break
    if service.shape.quantization is None and dtype_for(service, gpu) != "float32":
        for label, quant in SMALLER.items():
            quantized = replace(service.shape, quantization=quant.method, quant=quant, weights_gib=None, cache={})
            smaller = replace(service, shape=quantized, quantization=None)
            problem = engines.quantization_problem(engine.version, quant.method, gpu.capability)
            if (
                problem
                or engines.method_problem(engine.version, quant.method)
                or not find(_without(smaller, asked), length)
            ):
                continue
            if found := least(asked, smaller):
                ways.append(_way(f"weights of {label} fit on these GPUs", *found))
                break
    if alone and not ways:
        own = find(service, length)
        ways.append(_way("on such GPUs of its own it fits", [] if own else asked, (own or alone).shape))
    if gpu.mig and not alone:
        ways.append(f"{SLICES}: take a larger one, or the whole GPU")
    need = None if gpu.mig else find(free, length, max(count, 8), 4, graphs=True)
    if need and need.shape.world > len(team.groups) * count:
        keys = asked
        for key in reversed(asked):
            fewer = [name for name in keys if name != key]
            other = find(_without(service, fewer), length, max(count, 8), 4, graphs=True)
            keys = fewer if other and other.shape == need.shape else keys
        ways.append(_way(f"{need.shape.world} such GPUs hold it", keys, need.shape))
    return ways


def _longest(lengths: Sequence[int], fits: Callable[[int], Shape | None]) -> int | None:
    """The longest of these contexts, from the longest on, that fits: what holds one holds a shorter one."""
    if not fits(lengths[-1]):
        return None
    low, high = -1, len(lengths) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(lengths[middle]) else (middle, high)
    return lengths[high]
