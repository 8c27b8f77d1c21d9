# SPDX-License-Identifier: GPL-3.0-or-later
"""Final numbers, image, environment and command line of each server, and why they are so."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import engine as engines
from .layout import (
    LINKS,
    MIB,
    SLACK,
    Instance,
    Layout,
    Need,
    Needs,
    Task,
    batches,
    dtype_for,
    longest_prompt,
    memory_arguments,
    oldest_driver,
    spanning_problem,
    spreads_experts,
    valid_shapes,
    valid_tp,
)
from .memory import MemoryPlan, engine_memory
from .model import tp_problems
from .service import DIVIDES_TP, PAST_THE_PLAN, PLANNED_FLAGS, REFUSED_FLAGS, Service
from .tables import load


class _Server:
    """Memory of one server, for the batches and contexts that are tried.

    ``limit`` is what it may take of each of its GPUs: its claim, and an equal part of what is free with those that are
    ``unsettled``.
    """

    def __init__(self, service: Service, instance: Instance, unsettled: Collection[int]) -> None:
        self.service, self.need = service, instance.need
        self.shape, self.gpu = instance.shape, instance.places[0].gpu
        self.shares = any(len(place.claims) > 1 for place in instance.places)
        self.used = max(place.used + place.claimed_beside(instance) for place in instance.places)
        slack = SLACK * self.need.visible if service.utilization is None else 0.0
        self.limit = min(
            (place.total - place.used - place.claimed_beside(instance))
            - place.free
            + (place.free - slack) / sum(id(claimant) in unsettled for claimant, _ in place.claims)
            for place in instance.places
        )
        # Where prompts are not split, the batch must hold a whole one.
        unsplit = self.need.engine.core(self.gpu.capability) == "V0" or service.pools
        self.unsplit = unsplit and service.max_num_batched_tokens is None
        for tokens, seqs in batches(service, self.gpu, self.need.engine, self.need.max_model_len):
            self.utilization = self._utilization(tokens, seqs)
            self.tokens, self.seqs = tokens, seqs
            if self.holds(self.need.max_model_len, tokens, seqs):
                return
        self.tokens, self.seqs, self.utilization = self.need.tokens, self.need.seqs, self.need.utilization

    def _utilization(self, tokens: int, seqs: int) -> float:
        """What was asked for; else the highest within the limit, up to the engine's own default."""
        need = self.need
        self.utilization = need.utilization
        if self.service.utilization is not None or self.service.pools:
            return need.utilization
        memory = self.memory(need.max_model_len, tokens, seqs)
        highest = need.utilization + (self.limit - self._takes(memory)) / need.visible
        return max(need.utilization, math.floor(min(need.engine.gpu_memory_utilization, highest) * 1000) / 1000)

    def _takes(self, memory: MemoryPlan) -> float:
        """GiB of each GPU. What the allocator holds counts where another service would have to do without."""
        return memory.footprint_gib + (memory.held_gib if self.shares else 0.0)

    def memory(self, length: int, tokens: int, seqs: int) -> MemoryPlan:
        arguments = memory_arguments(
            self.service, self.gpu, self.need.engine, self.shape, self.need.eager, tokens, seqs
        )
        return engine_memory(
            self.service.shape,
            gpu_memory_utilization=self.utilization,
            max_model_len=length,
            gpu_memory_used_mib=self.used * MIB,
            **arguments,
        )

    def holds(self, length: int, tokens: int, seqs: int) -> bool:
        memory = self.memory(length, tokens, seqs)
        enough = self.service.pools or memory.max_concurrency + 1e-6 >= self.service.min_concurrency
        return memory.fits and enough and self._takes(memory) <= self.limit + 1e-6

    def tokens_for(self, length: int) -> int:
        """max_num_batched_tokens for a context."""
        return max(self.tokens, length) if self.unsplit else self.tokens

    def longest(self) -> int:
        """The longest context, up to the model's own, that leaves ``min_concurrency`` requests."""
        low, high = self.need.max_model_len, max(self.service.shape.max_position, self.need.max_model_len)
        high = min(high, longest_prompt(self.service, self.need.engine, self.gpu) or high)
        if self.holds(high, self.tokens_for(high), self.seqs):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            if self.holds(middle, self.tokens_for(middle), self.seqs):
                low = middle
            else:
                high = middle
        return low


# An API server takes text apart and together in Python, on one core. Two a replica gave a 7B on two H100 1.10 times the
# tokens at 1024 clients and a quarter of the time to the first one, and cost nothing at 8 (docs/performance.md; 16 cores
# a replica). A replica's engine and its workers want cores, too.
API_SERVERS_OF_REPLICA = 2
CORES_OF_REPLICA = 8


def _api_servers(service: Service, instance: Instance) -> int | None:
    """API servers of replicas on one host; None leaves it to vLLM, which starts one for each."""
    replicas = instance.shape.dp
    asked = {"--api-server-count", "-asc"}.intersection(engines.flag_names(service.extra_args))
    spread = service.objective == "throughput" and replicas > 1 and len(instance.hosts) == 1
    if asked or service.pools or not spread or instance.hosts[0].cores < replicas * CORES_OF_REPLICA:
        return None
    return replicas * API_SERVERS_OF_REPLICA


def _image(service: Service, need: Need) -> str | None:
    if service.runtime != "container":
        return None
    return service.image or f"vllm/vllm-openai:v{need.engine.version}{need.tag}"


def _executor(task: Task, instance: Instance) -> str:
    """``uni`` (one GPU), ``mp`` or ``ray``."""
    service, need = task.service, instance.need
    if len(instance.hosts) > 1:
        executor = service.executor or "ray"
        if problem := spanning_problem(need.engine, executor):
            task.problems.append(problem)
        return executor
    if service.executor:
        if service.executor not in need.engine.executors:
            task.problems.append(
                f"vLLM {need.engine.version} has executor {', '.join(need.engine.executors)}, not {service.executor}"
            )
        elif service.executor == "ray" and not need.engine.ray and not service.image:
            # The roles add it to servers over several hosts, whose nodes they run.
            task.problems.append(
                f"executor ray: vLLM {need.engine.version} comes without Ray, and on one host nothing adds it: leave executor "
                "out, or set image to one with Ray"
            )
        return service.executor
    return "uni" if instance.shape.tp * instance.shape.pp == 1 else need.engine.executors[0]


def command_line(service: Service, version: str, settings: Mapping[str, Any], extra: Sequence[str]) -> list[str]:
    """Arguments of the server after its entrypoint. Holds no flag that the release does not know."""

    def option(flag: str, value: object = True) -> list[str]:
        return engines.option(version, flag, value)

    def above_one(key: str) -> int | None:
        return settings[key] if settings[key] > 1 else None

    tp, utilization = settings["tensor_parallel_size"], settings["gpu_memory_utilization"]
    args = [service.model_path] if engines.get(version).entrypoint == "serve" else ["--model", service.model_path]
    args += option("--served-model-name", service.served_model_name)
    args += option("--port", settings["port"])
    args += option("--dtype", settings["dtype"] if settings["dtype"] != "auto" else None)
    args += option("--max-model-len", settings["max_model_len"])
    args += option("--gpu-memory-utilization", None if utilization is None else f"{utilization:g}")
    args += option("--max-num-seqs", settings["max_num_seqs"])
    args += option("--max-num-batched-tokens", settings["max_num_batched_tokens"])
    args += option("--tensor-parallel-size", above_one("tensor_parallel_size"))
    args += option("--pipeline-parallel-size", above_one("pipeline_parallel_size"))
    args += option("--data-parallel-size", above_one("data_parallel_size"))
    args += option("--api-server-count", settings.get("api_server_count"))
    args += option("--enable-expert-parallel", settings["enable_expert_parallel"])
    if settings["executor"] == "ray":
        args += option("--distributed-executor-backend", "ray") or option("--worker-use-ray")
    args += option("--enforce-eager", settings["enforce_eager"])
    args += option("--disable-custom-all-reduce", tp > 1 and settings["link"] != "nvlink")
    args += option("--quantization", service.quantization)
    if engines.is_deprecated(version, service.quantization_method):
        args += option("--allow-deprecated-quantization")
    if service.shape.keeps_vision_whole(tp):
        args += option("--mm-encoder-tp-mode", "data")
    args += option("--kv-cache-dtype", service.kv_cache_dtype if service.kv_cache_dtype != "auto" else None)
    args += option("--trust-remote-code", service.trust_remote_code)
    args += task_flags(service, version)
    # Volta's kernels cannot work on a part of a prompt.
    splits = settings["engine_core"] == "V0" and settings["max_model_len"] > engines.splits_above(version)
    if splits and not service.splits_prompts:
        args += engines.disabled(version, "--enable-chunked-prefill")
    return [*args, *extra]


# Flags that say what a model is served for.
TASK_FLAGS = ("--task", "--runner", "--convert")


def task_flags(service: Service, version: str) -> list[str]:
    """What makes the release serve the model for its task. A model that is made for it needs no conversion."""
    if service.task == "generate" or not set(TASK_FLAGS).isdisjoint(engines.flag_names(service.extra_args)):
        return []
    if runner := engines.option(version, "--runner", "pooling"):
        convert = (
            None if service.pools or not service.task_asked else {"embed": "embed", "score": "classify"}[service.task]
        )
        return [*runner, *engines.option(version, "--convert", convert)]
    return engines.option(version, "--task", service.task)


def extra_arguments(task: Task, version: str, tp: int) -> list[str]:
    """Flags that the model needs and that the user adds, checked against the release."""
    service = task.service
    mine = set(engines.flag_names(service.extra_args))
    extra: list[str] = []
    group: list[str] = []
    groups: list[list[str]] = []
    for arg in service.flags:
        group = [arg] if arg.startswith("-") else [*group, arg]
        if arg.startswith("-"):
            groups.append(group)
        else:
            groups[-1] = group
    for group in groups:
        if group[0] in mine:
            continue
        if engines.has_flag(version, group[0]):
            extra += group
        else:
            task.why.append(f"{group[0]} is left out: {engines.flag_problem(version, group[0])}")
    for flag in engines.flag_names(service.extra_args):
        meant = f"--{flag[5:]}" if flag.startswith("--no-") else flag
        if meant in PLANNED_FLAGS:
            task.problems.append(
                f"extra_args holds {flag}, which the plan decides: set {PLANNED_FLAGS[meant]} of the service instead"
            )
        elif flag in TASK_FLAGS and service.task_asked:
            task.problems.append(
                f"extra_args holds {flag} beside task: {service.task} of the service: give one of the two"
            )
        elif meant in REFUSED_FLAGS:
            task.problems.append(f"extra_args holds {flag}, which the roles decide: {REFUSED_FLAGS[meant]}")
        elif flag in PAST_THE_PLAN:
            task.problems.append(f"extra_args holds {flag}: {PAST_THE_PLAN[flag]}")
        elif flag in DIVIDES_TP and (told := service.told(flag) or "").isdigit() and tp % max(1, int(told)):
            task.problems.append(
                f"extra_args holds {flag} {told}, which has to divide TP, and TP is {tp}: leave it out, or set "
                f"tensor_parallel_size of the service to a multiple of {told}"
            )
        elif problem := engines.flag_problem(version, flag):
            task.problems.append(f"extra_args holds {flag}: {problem}")
    if service.task_asked and service.task != "generate" and not service.pools and not task_flags(service, version):
        task.problems.append(f"vLLM {version} has no flag for task: {service.task}: take engine_version 0.6.4 or newer")
    return [*extra, *service.extra_args]


def settle(task: Task, instance: Instance, unsettled: Collection[int], port: int) -> dict[str, Any]:
    """The final numbers and the command line of one server, whose claim becomes what it takes.

    Args:
        unsettled: ids of the instances, this one among them, that are not settled.
    """
    service, need = task.service, instance.need
    gpu = instance.places[0].gpu
    server = _Server(service, instance, unsettled)
    length = service.max_model_len or server.longest()
    tokens = server.tokens_for(length)
    memory = server.memory(length, tokens, server.seqs)
    instance.settle(memory.footprint_gib + memory.held_gib)
    if not memory.fits:
        task.problems.append(f"{instance.places[0].label}: {memory.reason}")
    by_host = [(host, [place.gpu for place in instance.places if place.host is host]) for host in instance.hosts]
    links = [host.link(gpu.index for gpu in gpus) for host, gpus in by_host]
    core = need.engine.core(gpu.capability)
    settings: dict[str, Any] = {
        "port": port,
        "dtype": dtype_for(service, gpu),
        "max_model_len": length,
        "max_num_seqs": server.seqs,
        "max_num_batched_tokens": tokens,
        "tensor_parallel_size": instance.shape.tp,
        "pipeline_parallel_size": instance.shape.pp,
        "data_parallel_size": instance.shape.dp,
        "api_server_count": _api_servers(service, instance),
        "enable_expert_parallel": spreads_experts(service, instance.shape),
        "gpu_memory_utilization": server.utilization,
        "enforce_eager": need.eager,
        "executor": _executor(task, instance),
        "link": max(links, key=lambda name: LINKS[name]),
        "engine_core": core,
    }
    args = command_line(
        service, need.engine.version, settings, extra_arguments(task, need.engine.version, instance.shape.tp)
    )
    env = dict(service.env)
    if core != need.engine.generation:
        env.setdefault("VLLM_USE_V1", "0")
    result = {
        **settings,
        "task": service.task,
        "dtype": service.shape.dtype if settings["dtype"] == "auto" else settings["dtype"],
        "hosts": [host.name for host, _ in by_host],
        "gpus": {host.name: sorted({gpu.index for gpu in gpus}) for host, gpus in by_host},
        "gpu_uuids": {host.name: [gpu.uuid for gpu in gpus] for host, gpus in by_host},
        "engine_version": need.engine.version,
        "ray_in_image": need.engine.ray,
        "command": need.engine.command(),
        "image": _image(service, need),
        "env": env,
        "args": args,
        "memory": {
            **memory.as_dict(),
            "outside_gib": round(memory.outside_gib, 3),
            "warmup_gib": round(memory.warmup_gib, 3),
            "footprint_gib": round(memory.footprint_gib, 3),
            "held_gib": round(memory.held_gib, 3),
        },
    }
    if len(by_host) > 1 and settings["executor"] == "mp":
        result["node_args"] = {
            host.name: [*args, *node_arguments(rank, len(by_host), by_host[0][0].name)]
            for rank, (host, _) in enumerate(by_host)
        }
    return result


def node_arguments(rank: int, hosts: int, head: str, port: int | None = None) -> list[str]:
    """What executor mp is told on each of several hosts; ``head`` is the address of rank 0."""
    arguments = ["--nnodes", str(hosts), "--node-rank", str(rank), "--master-addr", head]
    if port:
        arguments += ["--master-port", str(port)]
    return [*arguments, *(["--headless"] if rank else [])]


def explain(task: Task, layout: Layout, settled: Mapping[str, Any]) -> list[str]:
    """One line for each decision of the plan of one service."""
    service, instance = task.service, task.instances[0]
    need, gpu, host = instance.need, instance.places[0].gpu, instance.places[0].host
    why = [f"shape from {service.config_from} (confidence {service.shape.confidence})", *service.shape.notes]
    driver = oldest_driver(instance.hosts)
    why += layout.needs.engine(service, gpu, driver)[3]
    if len({host.driver_version for host in instance.hosts}) > 1:
        why.append(f"the hosts' drivers differ: the oldest, {driver}, decides which release all of them run")
    if not service.engine and need.engine.version == load("engines")["default_version"]["cuda"]:
        why.append(f"vLLM {need.engine.version}: the newest release whose memory was measured for this planner")
    why += host.notes
    if settled["engine_core"] == "V0" and need.engine.generation == "V1" and need.engine.v0_below:
        floor = engines.show(need.engine.v0_below)
        why.append(f"VLLM_USE_V1=0: the V1 core of {need.engine.version} needs compute capability {floor}")
    if service.dtype == "auto" and gpu.capability < (8, 0):
        wrong = f", and {service.shape.model_type} is wrong in float16" if settled["dtype"] == "float32" else ""
        why.append(f"{settled['dtype']}: compute capability {engines.show(gpu.capability)} has no bfloat16{wrong}")
    why += _why_parallel(task, settled)
    why += _why_memory(task, layout, settled)
    kinds = {place.gpu.kind for place in layout.places[host.name]}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{kind[0]} of {kind[1]} MiB" for kind in kinds))
        why.append(f"{host.name} has unlike GPUs ({names}): only equal ones work together, here {gpu.name}")
    if len(task.instances) > 1:
        names = ", ".join(host.name for item in task.instances for host in item.hosts)
        why.append(f"{len(task.instances)} servers, on {names}")
    return [*why, *task.why]


def _why_parallel(task: Task, settled: Mapping[str, Any]) -> list[str]:
    service, instance = task.service, task.instances[0]
    need, host = instance.need, instance.places[0].host
    tp, pp, dp = instance.shape
    why = []
    planned = service.tp is None and service.pp is None
    if planned and tp * pp > 1:
        for size in range(2, tp):
            why += tp_problems(
                service.shape, size, engine_version=need.engine.version, quantization=service.quantization
            )[:1]
        # TP does not leave a host: of several, what one of them gives is the most that was tried.
        most = min(tp * pp, need.shape.world) - 1
        if len(instance.hosts) > 1:
            most = tp * pp // len(instance.hosts)
        smaller = [size for size in valid_tp(service, need.engine) if size <= most]
        if smaller and not instance.widened:
            why.append(f"TP {smaller[-1]} does not hold the weights and a context of {need.max_model_len} tokens")
    if pp > 1 and len(instance.hosts) > 1:
        speed = f" ({host.network_mbps} Mb/s)" if host.network_mbps else ""
        why.append(f"PP {pp}: TP inside a host, stages between hosts, which exchange far less{speed}")
        if fewer := _on_fewer_hosts(service, instance, settled["max_model_len"]):
            number, alone = fewer
            if number == 1:
                enough = f"one host is enough: TP {alone.shape.tp} x PP {alone.shape.pp} on {host.name}"
                way = "Leave the sizes out for a server on each host, which answer more together"
            else:
                enough = f"{number} hosts are enough: TP {alone.shape.tp} x PP {alone.shape.pp}"
                way = f"Name {number} hosts only"
            why.append(
                f"{enough} holds {alone.max_model_len} tokens; over {len(instance.hosts)} hosts each token waits "
                f"{'' if number == 1 else 'longer '}for the network, so that a request takes longer. {way}"
            )
    elif pp > 1:
        why.append(f"PP {pp}: stages exchange far less than TP ranks, and the GPUs' link is {settled['link']}")
    elif tp > 1 and planned and settled["link"] != "nvlink":
        why.append(f"TP {tp} before PP {tp} over {settled['link']}: a stage would wait while the others work")
    if need.shape.dp > 1:
        why.append(f"experts spread over {need.shape.world} GPUs: that is how their weights fit")
    elif dp > 1 and service.dp is None:
        why.append(f"{dp} replicas of TP {tp}: 4 of TP 1 were measured at 1.46 times the tokens of one TP 4")
    if settled["api_server_count"]:
        why.append(
            f"{settled['api_server_count']} API servers for {dp} replicas: two each were measured at 1.10 times the tokens "
            f"of one each at 1024 clients ({host.name} has {host.cores} cores)"
        )
    if tp > 1 and settled["link"] != "nvlink":
        why.append(f"custom all-reduce off: the GPUs' link is {settled['link']}, not NVLink")
    if settled["executor"] == "ray" and not need.engine.ray:
        why.append(f"vLLM {need.engine.version} comes without Ray: it has to be added")
    return why


def _on_fewer_hosts(service: Service, instance: Instance, length: int) -> tuple[int, Need] | None:
    """The fewest hosts, and the first layout with CUDA graphs on them, that hold this context on what each host gives."""
    place = instance.places[0]
    gpus = [other.gpu.index for other in instance.places if other.host is place.host]
    room = min(other.total - other.used - other.claimed_beside(instance) for other in instance.places)
    free = replace(service, tp=None, pp=None, dp=None, gpu_count=None, gpu_indices=None)
    engine, needs = instance.need.engine, Needs()
    for number in range(1, len(instance.hosts)):
        for shape in valid_shapes(free, engine, place.gpu, len(gpus), number, place.host.link(gpus)):
            need = needs.find(free, place.gpu, engine, "", length, shape, False, 1.0, False)
            if need and need.room <= room and shape.pp % number == 0:
                return number, need
    return None


def _why_memory(task: Task, layout: Layout, settled: Mapping[str, Any]) -> list[str]:
    service, instance = task.service, task.instances[0]
    need, gpu = instance.need, instance.places[0].gpu
    why = [
        f"{settled['memory']['weights_gib']:.2f} GiB of weights on a GPU of {need.visible:.2f} GiB that CUDA can use"
    ]
    length, own = settled["max_model_len"], service.shape.max_position
    if service.max_model_len is None and length < own:
        why.append(f"max_model_len {length}: the longest for {service.min_concurrency:g} request(s) at once, of {own}")
    others = {
        name_of(layout, claimant)
        for place in instance.places
        for claimant, _ in place.claims
        if claimant is not instance
    }
    if others:
        why.append(f"shares GPUs with {', '.join(sorted(others))}: what each claims adds up to what is free")
    used = max(place.used for place in instance.places)
    if used >= 0.5:
        why.append(f"{used:.2f} GiB of a GPU are in use by others and left to them")
    if need.eager and service.enforce_eager is None:
        why.append("enforce_eager: a last resort, CUDA graphs found no room (2.3 to 2.9 times as slow at 8 requests)")
    usual = need.engine.batch_defaults(gpu.memory_total_mib, gpu.name)[1]
    if service.max_num_seqs is None and settled["max_num_seqs"] < usual:
        why.append(f"max_num_seqs {settled['max_num_seqs']}, not {usual}: a smaller batch leaves memory for the cache")
    return why


def name_of(layout: Layout, instance: Instance) -> str:
    return next(task.service.name for task in layout.tasks if any(item is instance for item in task.instances))
