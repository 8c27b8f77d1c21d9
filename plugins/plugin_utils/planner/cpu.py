# SPDX-License-Identifier: GPL-3.0-or-later
"""Engines without a GPU: weights and KV cache in RAM."""

from __future__ import annotations

import math
from typing import Any

from . import engine as engines
from .engine import Engine
from .hardware import Host
from .layout import MIB, SLACK, Layout, Task, usual_lengths
from .model import pp_problems, tp_problems
from .service import Service
from .settle import command_line, extra_arguments
from .tables import load

# Memory of an engine beside weights and KV cache: 1.4 GiB of Python and torch in three processes, measured with 0.32.0,
# and room for activations.
CPU_OVERHEAD_GIB = 2.0
# A larger cache serves more requests than a CPU can: the rest is left to the page cache with the weight files.
AMPLE_CACHE_GIB = 4
CPU_SEQS = 64
CPU_TOKENS = 2048


def place_on_cpu(task: Task, layout: Layout, port: int) -> list[dict[str, Any]]:
    """One engine on the host with the most memory free, or on each host that the user named; none with a problem.

    With a parallelism above 1 it is one engine over all named hosts, with the same number of ranks on each.
    """
    service = task.service
    engine = service.engine or engines.get(load("engines")["default_version"]["cpu"])
    if problem := engines.architecture_problem(engine, service.shape.architecture) or (
        None if service.image else engines.method_problem(engine.version, service.quantization_method)
    ):
        task.problems.append(problem)
        return []
    tp, pp = service.tp or 1, service.pp or 1
    spans = tp * pp > 1
    task.problems += _parallel_problems(service, engine, layout)
    dtype = "bfloat16" if service.dtype == "auto" else service.dtype
    hosts = [host for host in layout.allowed(service) if host.memory_total_mib]
    if not hosts:
        task.problems.append("no host says how much memory its CPU has (cpu.memory_total_mib)")
        return []

    def free(host: Host) -> float:
        return host.memory_available_mib / MIB - layout.cpu_claims.get(host.name, 0.0)

    chosen = hosts if service.hosts is not None else [max(hosts, key=lambda host: (free(host), -hosts.index(host)))]
    element = 4 if dtype == "float32" else 2
    # Ranks of one host share its memory, so that a host holds its part of the whole.
    weights = service.shape.parameters * element / 1024**3 / (len(chosen) if spans else 1)
    per_token = 0 if service.pools else service.shape.kv_bytes_per_token(1, element)
    least = min(free(host) for host in chosen)
    room = (least - weights - CPU_OVERHEAD_GIB) * (1 - SLACK)

    def space(length: int) -> int:
        """VLLM_CPU_KVCACHE_SPACE, whole GiB."""
        return max(1, math.ceil(per_token * length * service.min_concurrency / 1024**3))

    lengths = [service.max_model_len] if service.max_model_len else usual_lengths(service)
    length = next((length for length in lengths if space(length) <= room), None)
    if length is None:
        task.problems.append(
            f"does not fit into the memory of {chosen[0].name}: {weights:.2f} GiB of weights + {CPU_OVERHEAD_GIB:.2f} "
            f"GiB for the engine + {space(lengths[-1])} GiB of KV cache for {lengths[-1]} tokens, "
            f"{least:.2f} GiB are available"
        )
        return []
    seqs = service.max_num_seqs or CPU_SEQS
    useful = math.ceil(per_token * length * seqs / 1024**3)
    cache = max(space(length), min(useful, AMPLE_CACHE_GIB, int(room / 2))) if per_token else 1
    total = weights + CPU_OVERHEAD_GIB + cache
    for host in chosen:
        layout.cpu_claims[host.name] = layout.cpu_claims.get(host.name, 0.0) + total
    # Compiling needs a C++ compiler and Python's headers on the host, and minutes at the first start.
    eager = service.enforce_eager is not False
    settings: dict[str, Any] = {
        "port": port,
        "dtype": dtype,
        "max_model_len": length,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": service.max_num_batched_tokens or max(CPU_TOKENS, length if service.pools else 0),
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "data_parallel_size": 1,
        "enable_expert_parallel": False,
        "gpu_memory_utilization": None,
        "enforce_eager": eager,
        "executor": "mp" if spans else "uni",
        "link": "none",
        "engine_core": "V1",
    }
    image = service.image or f"vllm/vllm-openai-cpu:v{engine.version}-x86_64"
    tokens = int(cache * 1024**3 / per_token) if per_token else 0
    task.why += [
        f"CPU: {'asked for' if service.device else 'no host has a GPU'}; vLLM {engine.version}, TP {tp}",
        "not compiled: that needs a C++ compiler on the host; enforce_eager: false compiles"
        if eager
        else "compiled at the first start: the host needs a C++ compiler and Python's headers",
        f"{weights:.2f} GiB of weights in {dtype}, {cache} GiB of KV cache, {CPU_OVERHEAD_GIB:g} GiB for the engine, "
        f"of {least:.2f} GiB available",
    ]
    row = {
        **settings,
        "task": service.task,
        "gpus": {},
        "gpu_uuids": {},
        "engine_version": engine.version,
        "ray_in_image": False,
        "command": engine.command(),
        "image": image if service.runtime == "container" else None,
        # Split embeddings are compiled even in eager mode, unless this forbids it.
        "env": {
            "VLLM_CPU_KVCACHE_SPACE": str(cache),
            **({"TORCHDYNAMO_DISABLE": "1"} if eager and tp > 1 else {}),
            **service.env,
        },
        "args": command_line(service, engine.version, settings, extra_arguments(task, engine.version, tp)),
        "memory": {
            "requested_gib": round(total, 3),
            "weights_gib": round(weights, 3),
            "activation_gib": 0.0,
            "non_torch_gib": CPU_OVERHEAD_GIB,
            "cuda_graph_gib": 0.0,
            "kv_cache_gib": float(cache if per_token else 0),
            "kv_cache_tokens": tokens,
            "max_concurrency": round(tokens / length, 2),
            "fits": True,
            "reason": f"{total:.2f} of {least:.2f} GiB of memory that are available",
            "outside_gib": 0.0,
            "warmup_gib": 0.0,
            "footprint_gib": round(total, 3),
            "held_gib": 0.0,
        },
    }
    groups = [chosen] if spans else [[host] for host in chosen]
    return [{**row, "hosts": [host.name for host in group]} for group in groups]


def _parallel_problems(service: Service, engine: Engine, layout: Layout) -> list[str]:
    """What keeps one engine from spanning the CPUs of the hosts that the user named."""
    tp, pp = service.tp or 1, service.pp or 1
    problems = []
    if service.dp not in (None, 1):
        problems.append(f"data_parallel_size is {service.dp}: an engine on a CPU is planned with 1")
    if service.executor == "ray":
        problems.append("executor is ray: on CPUs it is mp, or leave it out")
    if tp * pp > 1:
        problems += tp_problems(service.shape, tp, engine_version=engine.version)
        problems += pp_problems(service.shape, pp, engine_version=engine.version)
        number = len(layout.allowed(service)) if service.hosts else 1
        if tp * pp % number:
            problems.append(
                f"TP {tp} x PP {pp} = {tp * pp} ranks do not divide by {number} hosts: each gets the same number"
            )
        if number > 1 and pp > 1:  # seen with 0.32.0: KeyError in the scheduler (update_from_output)
            problems.append(
                f"PP {pp} over CPUs of several hosts: vLLM starts so, and ends at the first request. Spread the ranks by "
                "tensor_parallel_size alone"
            )
        if number > 1 and not engine.mp_nodes:
            problems.append(f"executor mp does not span hosts in vLLM {engine.version}: take a release from 0.11.1 on")
    return problems
