# SPDX-License-Identifier: GPL-3.0-or-later
"""The plan: what ``vllm_plan`` returns."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .cpu import place_on_cpu
from .hardware import Host, parse_hosts
from .layout import Layout, Needs, Shape, Task
from .refusal import refuse
from .service import STRETCH, Service, beyond_the_model, parse_services
from .settle import explain, name_of, settle

FIRST_PORT = 8000


def make_plan(services: object, hosts: object) -> dict[str, Any]:
    """Plans all services on all hosts.

    Args:
        services: ``vllm_services``: a list of mappings, see service.py.
        hosts: a list of mappings, see hardware.parse_host.

    Returns:
        ``{fits, problems, services, gpus}``. Each service holds what its first server is started with and, in
        ``instances``, the same for each of its servers. ``gpus`` says of each GPU where its memory goes.

    Raises:
        PlanError: input that is not a plan's: the message names field, value and what is allowed.
    """
    asked, there = parse_services(services), parse_hosts(hosts)
    ports = _ports(asked)
    layout, on_cpu = _place_best(ports, asked, there, Needs())
    for task in layout.tasks:
        if not task.instances and task.order not in on_cpu and layout.device(task.service) == "cuda":
            task.problems += refuse(task, layout, partial(_would_hold, layout, ports))
        _check(task)
    layout.grow()
    servers = _settle_all(layout, ports)
    rows = []
    listening: dict[tuple[str, int], str] = {}
    for task in layout.tasks:
        settled = [servers[id(instance)] for instance in task.instances]
        _check_sharing(task, layout)
        if task.order in on_cpu:
            settled = on_cpu[task.order]
        _check_ports(task, layout, settled, listening)
        rows.append(_row(task, layout, settled))
    problems = [f"{row['name']}: {problem}" for row in rows for problem in row["problems"]]
    return {"fits": not problems, "problems": problems, "services": rows, "gpus": _gpu_rows(layout, rows)}


def _place_best(
    ports: Mapping[str, int], asked: Sequence[Service], there: Sequence[Host], needs: Needs
) -> tuple[Layout, dict[int, list[dict[str, Any]]]]:
    """Places all services, with small batches where that leaves fewer without a place."""
    layout, on_cpu = _place(ports, Layout(asked, there, needs))
    if any(not task.instances or _is_last_resort(task) for task in layout.tasks):
        other = _place(ports, Layout(asked, there, needs, lean=True))
        if _badness(other[0]) < _badness(layout):
            return other
    return layout, on_cpu


def _would_hold(layout: Layout, ports: Mapping[str, int], other: Service) -> Shape | None:
    """The layout of a service that found no place once ``other`` is asked for in its stead; None when that has none, too,
    or takes the place of another service. Those that found no place, either, take none.
    """
    asked = [task.service for task in layout.tasks if task.instances]
    trial, _ = _place_best(ports, [*asked, other], layout.hosts, layout.needs)
    task = trial.tasks[-1]
    if not all(task.instances for task in trial.tasks):
        return None
    _check_sharing(task, trial)
    return None if task.problems else task.instances[0].need.shape


def _place(ports: Mapping[str, int], layout: Layout) -> tuple[Layout, dict[int, list[dict[str, Any]]]]:
    """Places all services: the layout, and what runs on CPUs by the order of the service."""
    on_cpu: dict[int, list[dict[str, Any]]] = {}
    # The most demanding first: those that are tied to GPUs or hosts, then by the size of the weights.
    order = sorted(
        layout.tasks,
        key=lambda task: (
            task.service.gpu_indices is None,
            task.service.hosts is None,
            -task.service.shape.parameters,
            task.service.name,
        ),
    )
    for task in order:
        if layout.device(task.service) == "cuda":
            layout.place(task)
        elif result := place_on_cpu(task, layout, ports[task.service.name]):
            on_cpu[task.order] = result
    return layout, on_cpu


def _settle_all(layout: Layout, ports: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """What each server is started with, by the id of its instance."""
    unsettled = {id(instance) for task in layout.tasks for instance in task.instances}
    found = {}
    # What cannot grow comes first, so that the others divide what it leaves.
    for task in sorted(layout.tasks, key=lambda task: task.service.utilization is None and not task.service.pools):
        for instance in task.instances:
            found[id(instance)] = settle(task, instance, unsettled, ports[task.service.name])
            unsettled.remove(id(instance))
    return found


def _is_last_resort(task: Task) -> bool:
    """It was placed without CUDA graphs although the user did not ask for that."""
    return task.service.enforce_eager is None and any(instance.need.eager for instance in task.instances)


def _badness(layout: Layout) -> tuple[int, int]:
    return sum(not task.instances for task in layout.tasks), sum(_is_last_resort(task) for task in layout.tasks)


def _check(task: Task) -> None:
    """What a user must know or allow before it can run, wherever it is placed."""
    service = task.service
    if service.needs_code and not service.trust_remote_code:
        task.problems.append(
            f"{service.model} brings code of its own that has to run: read it, pin `revision`, and set "
            "trust_remote_code: true"
        )
    if beyond_the_model(service):
        task.problems.append(
            f"max_model_len {service.max_model_len} is more than the model's own {service.shape.max_position}: lower "
            f"it, or set env {STRETCH} to 1 for a model that can be stretched"
        )


def _check_sharing(task: Task, layout: Layout) -> None:
    """Releases that take the memory of other processes for their own cannot share a GPU by their utilizations."""
    for instance in task.instances:
        gpu, engine = instance.places[0].gpu, instance.need.engine
        others = {
            name_of(layout, claimant)
            for place in instance.places
            for claimant, _ in place.claims
            if claimant is not instance
        }
        if others and engine.core(gpu.capability) in engine.counts_others:
            task.problems.append(
                f"vLLM {engine.version} counts the memory of {', '.join(sorted(others))} on the same GPU as its own: "
                "give it GPUs of its own, or take engine_version 0.10.0 or newer"
            )
            return


def _check_ports(
    task: Task, layout: Layout, settled: Sequence[Mapping[str, Any]], listening: dict[tuple[str, int], str]
) -> None:
    """Two services cannot listen on one port of a host. ``listening``: who does, by host and port."""
    for server in settled:
        # Of several hosts the first one listens.
        host = next(host.name for host in layout.hosts if host.name in server["hosts"])
        other = listening.setdefault((host, server["port"]), task.service.name)
        if other != task.service.name:
            task.problems.append(
                f"port {server['port']} of {host} is {other}'s already: set another port of the service, or leave it out"
            )


def _ports(services: Sequence[Service]) -> dict[str, int]:
    """A port for each service: its own, or the next that nobody has, from 8000 on."""
    taken = {service.port for service in services}
    ports = {}
    following = FIRST_PORT
    for service in services:
        if service.port is None:
            while following in taken:
                following += 1
            taken.add(following)
        ports[service.name] = service.port or following
    return ports


def _row(task: Task, layout: Layout, settled: list[dict[str, Any]]) -> dict[str, Any]:
    """One entry of the result's ``services``."""
    service = task.service
    row: dict[str, Any] = {
        "name": service.name,
        "model": service.model,
        "objective": service.objective,
        "runtime": service.runtime,
    }
    row["device"] = layout.device(service)
    problems = list(dict.fromkeys(task.problems))
    if not settled:
        return {
            **row,
            "fits": False,
            "problems": problems,
            "hosts": [],
            "gpus": {},
            "args": [],
            "instances": [],
            "why": task.why,
        }
    why = explain(task, layout, settled[0]) if task.instances else task.why
    hosts = [host for item in settled for host in item["hosts"]]
    gpus = {host: indices for item in settled for host, indices in item["gpus"].items()}
    uuids = {host: names for item in settled for host, names in item["gpu_uuids"].items()}
    return {
        **row,
        **settled[0],
        "fits": not problems,
        "problems": problems,
        "hosts": hosts,
        "gpus": gpus,
        "gpu_uuids": uuids,
        "instances": settled,
        "why": list(dict.fromkeys(why)),
    }


def _gpu_rows(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each GPU's memory goes to, in GiB."""
    memories = {
        id(instance): (task.service.name, settled["memory"])
        for task, row in zip(layout.tasks, rows, strict=True)
        for instance, settled in zip(task.instances, row["instances"], strict=False)
    }
    result = []
    for host in layout.hosts:
        for place in layout.places[host.name]:
            parts = []
            for instance, _ in place.claims:
                name, memory = memories[id(instance)]
                held = memory["held_gib"] if len(place.claims) > 1 else 0.0
                parts.append(
                    {
                        "service": name,
                        "weights_gib": memory["weights_gib"],
                        "activation_gib": memory["activation_gib"],
                        "non_torch_gib": memory["non_torch_gib"],
                        "cuda_graph_gib": memory["cuda_graph_gib"],
                        "kv_cache_gib": memory["kv_cache_gib"],
                        "warmup_gib": memory["warmup_gib"],
                        "outside_gib": memory["outside_gib"],
                        "held_gib": held,
                        "total_gib": round(memory["footprint_gib"] + held, 3),
                    }
                )
            taken = sum(part["total_gib"] for part in parts)
            result.append(
                {
                    "host": host.name,
                    "index": place.gpu.index,
                    "name": place.gpu.name,
                    "total_gib": round(place.total, 3),
                    "used_by_others_gib": round(place.used, 3),
                    "services": parts,
                    "free_gib": round(place.total - place.used - taken, 3),
                }
            )
    return result
