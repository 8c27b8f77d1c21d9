# SPDX-License-Identifier: GPL-3.0-or-later
"""Hosts and their GPUs, from facts or from a line such as ``3x(2x V100-PCIE-16GB)``."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from .engine import Capability, parse_capability
from .errors import PlanError
from .tables import load


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice, that an engine can be given.

    Attributes:
        index: number that nvidia-smi gives it (for a MIG slice: of the GPU that it is cut from).
        memory_total_mib, memory_used_mib: as nvidia-smi shows them.
        memory_reserved_mib: memory.reserved of nvidia-smi, which CUDA cannot use; None when not known.
        mig: it is a slice.
    """

    index: int
    uuid: str
    name: str
    memory_total_mib: int
    memory_used_mib: int
    capability: Capability
    mig: bool = False
    memory_reserved_mib: float | None = None

    @property
    def kind(self) -> tuple[str, int, Capability, bool]:
        """Equal for GPUs that can work in one group: an engine's ranks all get the memory of the smallest."""
        return (self.name, self.memory_total_mib, self.capability, self.mig)


@dataclass(frozen=True)
class Host:
    """A host with what the planner uses of it. ``nvlink`` and ``p2p``: pairs (i, j), i < j, of indices of GPUs."""

    name: str
    gpus: tuple[Gpu, ...]
    nvlink: frozenset[tuple[int, int]]
    p2p: frozenset[tuple[int, int]]
    driver_version: str | None
    memory_total_mib: int
    memory_available_mib: int
    network_mbps: int | None
    cores: int = 0  # 0: not known
    notes: tuple[str, ...] = ()

    def link(self, indices: Iterable[int]) -> str:
        """The weakest link among these GPUs: ``nvlink``, ``p2p``, ``pcie`` (through the host) or ``none`` (one GPU)."""
        numbers = sorted(set(indices))
        pairs = {(i, j) for place, i in enumerate(numbers) for j in numbers[place + 1 :]}
        if not pairs:
            return "none"
        if pairs <= self.nvlink:
            return "nvlink"
        return "p2p" if pairs <= self.p2p | self.nvlink else "pcie"


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts gpu2 before gpu10."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.findall(r"\d+|\D+", name))


@cache
def _gpu_rows() -> dict[str, dict[str, Any]]:
    """Rows of gpus.yml by every name that a person may write, in lower case without spaces."""
    rows = {}
    for row in load("gpus")["gpus"]:
        for name in (row["name"], *row.get("aliases", ())):
            rows[_plain(name)] = row
    return rows


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower().removeprefix("nvidia").removeprefix("tesla").removeprefix("geforce")


def gpu_row(name: str, memory_total_mib: int | None = None) -> dict[str, Any] | None:
    """Row of gpus.yml for a name as nvidia-smi prints it (cards of one name are told apart by memory), or None."""
    rows = [row for row in load("gpus")["gpus"] if row["smi"] == name]
    if not rows or memory_total_mib is None:
        return rows[0] if rows else None
    row: dict[str, Any] = min(rows, key=lambda row: abs(row["memory_total_mib"] - memory_total_mib))
    return row


def pci_catalog() -> dict[str, Any]:
    """What the module gpu_facts is given to name GPUs by their PCI device ids: ``devices`` by id, and ``architectures``."""
    data = load("gpus")
    devices: dict[str, dict[str, Any]] = {}
    for row in data["gpus"]:
        known = {
            "name": row["smi"],
            "kernel_module": row["module"],
            "last_driver_branch": row.get("last_driver_branch"),
        }
        known |= {key: row[key] for key in ("compute_capability", "memory_total_mib", "nvlink")}
        devices |= dict.fromkeys(row.get("pci", ()), known)
    return {"devices": devices, "architectures": data["architectures"]}


def with_gpus_to_come(facts: Mapping[str, Any], driver: str = "") -> dict[str, Any]:
    """Facts of a host as it will be once it has ``driver`` (nothing: no change), with the GPUs that have none yet.

    What the catalog does not know by its PCI device id cannot be planned before the driver is there.
    """
    pci = facts.get("pci") or []
    known = all(gpu.get("memory_total_mib") and gpu.get("compute_capability") for gpu in pci)
    if facts.get("gpus") or not pci or not known or facts.get("state") not in ("no_driver", "mismatch"):
        return {**facts, "driver_version": driver} if driver and facts.get("gpus") else dict(facts)
    keys = ("name", "memory_total_mib", "compute_capability")
    gpus = [{"index": index, "uuid": "", **{key: gpu[key] for key in keys}} for index, gpu in enumerate(pci)]
    return {**facts, "gpus": gpus, "device": "cuda", "driver_version": driver or None, "links": [], "p2p": []}


# ----------------------------------------------------------------------------------------------------- from facts


def whole(value: object, field: str, least: int = 0) -> int:
    """A whole number of at least ``least``; text of digits counts, as Jinja makes it.

    Raises:
        PlanError: anything else.
    """
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(field, value, f"give a whole number of at least {least}")
    return value


def mapping(value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise PlanError(field, value, "give a mapping")
    return value


def sequence(value: object, field: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise PlanError(field, value, "give a list")
    return value


def _parse_gpu(raw: object, field: str) -> list[Gpu]:
    """One entry of ``gpus``: one GPU, or its MIG slices when it is cut into some."""
    gpu = mapping(raw, field)
    for key in ("memory_total_mib", "compute_capability"):
        if gpu.get(key) is None:
            raise PlanError(f"{field}.{key}", gpu.get(key), "every GPU needs it (gpu_facts reports it)")
    index = whole(gpu.get("index", 0), f"{field}.index")
    total = whole(gpu["memory_total_mib"], f"{field}.memory_total_mib", 1)
    used = whole(gpu.get("memory_used_mib") or 0, f"{field}.memory_used_mib")
    if used > total:
        raise PlanError(f"{field}.memory_used_mib", used, f"it cannot be more than memory_total_mib, {total}")
    capability = parse_capability(gpu["compute_capability"], f"{field}.compute_capability")
    name = str(gpu.get("name") or "unknown GPU")
    uuid = str(gpu.get("uuid") or "")
    reserved = gpu.get("memory_reserved_mib")
    if reserved is not None:
        reserved = whole(reserved, f"{field}.memory_reserved_mib")
    slices = gpu.get("mig_devices") or (gpu["mig"] if isinstance(gpu.get("mig"), (list, tuple)) else None)
    if slices:
        return [
            Gpu(
                index=index,
                uuid=str(mapping(part, f"{field}.mig_devices[{number}]").get("uuid") or ""),
                name=f"{name} MIG {part.get('profile') or part.get('name') or number}",
                memory_total_mib=whole(
                    part.get("memory_total_mib"), f"{field}.mig_devices[{number}].memory_total_mib", 1
                ),
                memory_used_mib=whole(
                    part.get("memory_used_mib") or 0, f"{field}.mig_devices[{number}].memory_used_mib"
                ),
                capability=capability,
                mig=True,
                memory_reserved_mib=0,
            )
            for number, part in enumerate(sequence(slices, f"{field}.mig_devices"))
        ]
    if str(gpu.get("mig", "")).lower() in ("enabled", "true"):
        return []  # cut up, but without a slice: nothing can run on it
    return [Gpu(index, uuid, name, total, used, capability, memory_reserved_mib=reserved)]


def _pairs(matrix: object, field: str, numbers: Sequence[int], wanted: str) -> frozenset[tuple[int, int]]:
    """Pairs of GPUs whose cell of a matrix of nvidia-smi topo matches; rows and columns are the GPUs in order."""
    rows = sequence(matrix, field)
    if len(rows) < len(numbers):
        raise PlanError(field, f"{len(rows)} rows", f"give one row for each of the {len(numbers)} GPUs")
    found = set()
    for row, i in enumerate(numbers):
        cells = sequence(rows[row], f"{field}[{row}]")
        if len(cells) < len(numbers):
            raise PlanError(f"{field}[{row}]", cells, f"give one column for each of the {len(numbers)} GPUs")
        found |= {
            (i, j) for column, j in enumerate(numbers) if i < j and re.fullmatch(wanted, str(cells[column]).strip())
        }
    return frozenset(found)


def parse_host(raw: object, field: str) -> Host:
    """One host of ``vllm_plan``'s argument.

    Args:
        raw: ``{name, gpus: [{index, uuid, name, memory_total_mib, memory_used_mib, compute_capability, mig}],
            links: [[...]], p2p: [[...]], network: {speed_mbps}, driver_version,
            cpu: {cores, memory_total_mib, memory_available_mib}}``. ``links`` is the matrix of ``nvidia-smi topo -m``
            (NV12, PIX, SYS ...), ``p2p`` that of ``topo -p2p r`` (OK, NS ...).

    Raises:
        PlanError: something is missing or absurd.
    """
    host = mapping(raw, field)
    name = host.get("name")
    if not isinstance(name, str) or not name:
        raise PlanError(f"{field}.name", name, "give the name of the host")
    field = f"hosts[{name}]"
    gpus: list[Gpu] = []
    numbers = []
    notes = []
    for number, item in enumerate(sequence(host.get("gpus") or [], f"{field}.gpus")):
        parsed = _parse_gpu(item, f"{field}.gpus[{number}]")
        index = whole(item.get("index", number), f"{field}.gpus[{number}].index")
        if index in numbers:
            raise PlanError(f"{field}.gpus[{number}].index", index, "two GPUs of one host cannot have the same index")
        numbers.append(index)
        gpus += [gpu if gpu.index == index else Gpu(**{**gpu.__dict__, "index": index}) for gpu in parsed]
        if not parsed:
            notes.append(f"GPU {index} of {name} is in MIG mode without a slice: it cannot be used")
    cpu = mapping(host.get("cpu") or {}, f"{field}.cpu")
    total = whole(cpu.get("memory_total_mib") or 0, f"{field}.cpu.memory_total_mib")
    available = cpu.get("memory_available_mib")
    if not host.get("gpus") and not total:
        raise PlanError(
            f"{field}.gpus", host.get("gpus"), "give at least one GPU, or cpu.memory_total_mib to serve from the CPU"
        )
    network = mapping(host.get("network") or {}, f"{field}.network")
    speed = network.get("speed_mbps")
    driver = host.get("driver_version")
    if driver is not None and not re.fullmatch(r"\d{3,4}(\.\d+){0,3}", str(driver)):
        raise PlanError(
            f"{field}.driver_version", driver, "give it as nvidia-smi prints it, such as 580.159.04, or leave it out"
        )
    rows = [gpu_row(gpu.name, gpu.memory_total_mib) for gpu in gpus]
    every = frozenset((i, j) for i in numbers for j in numbers if i < j)
    if host.get("links"):
        nvlink = _pairs(host["links"], f"{field}.links", numbers, r"NV\d+")
    else:
        nvlink = every if rows and all(row and row["nvlink"] in ("mesh", "switch") for row in rows) else frozenset()
    if host.get("p2p"):
        p2p = _pairs(host["p2p"], f"{field}.p2p", numbers, "OK")
    else:
        p2p = every if rows and all(row and row["p2p"] for row in rows) else frozenset()
    if len(gpus) > 1 and not host.get("links") and not host.get("p2p"):
        notes.append(f"the links of {name}'s GPUs are taken from the catalog: its facts have none")
    return Host(
        name=name,
        gpus=tuple(sorted(gpus, key=lambda gpu: (gpu.index, gpu.uuid))),
        nvlink=nvlink,
        p2p=p2p,
        driver_version=None if driver is None else str(driver),
        memory_total_mib=total,
        memory_available_mib=total if available is None else whole(available, f"{field}.cpu.memory_available_mib"),
        network_mbps=whole(speed, f"{field}.network.speed_mbps")
        if isinstance(speed, (int, float)) and speed > 0
        else None,
        cores=whole(cpu.get("cores") or 0, f"{field}.cpu.cores"),
        notes=tuple(notes),
    )


def parse_hosts(raw: object) -> list[Host]:
    """All hosts, in the order of their names, so that a plan does not hang on the order of the inventory.

    Raises:
        PlanError: not a list of hosts, none, or two of one name.
    """
    hosts = [parse_host(item, f"hosts[{number}]") for number, item in enumerate(sequence(raw, "hosts"))]
    if not hosts:
        raise PlanError("hosts", raw, "give at least one host")
    seen: set[str] = set()
    for host in hosts:
        if host.name in seen:
            raise PlanError("hosts", host.name, "two hosts have this name; names must differ")
        seen.add(host.name)
    return sorted(hosts, key=lambda host: natural(host.name))


# ------------------------------------------------------------------------------------------------------ from text

_COUNTED = r"(?:(\d+)\s*[x*]\s*)?"
_WORDS = {"nvlink": ("NV4", "OK"), "pcie": ("PHB", "OK"), "no-p2p": ("PHB", "NS")}
SYNTAX = "write '4x A10', '2x V100-PCIE-16GB no-p2p', or '3x(2x A10), 1x(8x H100)' for several hosts"


def hosts_from_text(text: str) -> list[dict[str, Any]]:
    """Hosts that do not exist yet, in the form that ``vllm_plan`` takes.

    ``4x A10`` is one host with four GPUs, ``1x H100 + 2x L4`` one with two kinds, ``3x(2x V100-16GB), 1x(4x A10)``
    four hosts. A kind of GPU may be followed by ``nvlink`` (bridges are fitted), ``pcie`` or ``no-p2p``.

    Raises:
        PlanError: the text is not of this form, or the catalog has no such GPU.
    """
    if not isinstance(text, str) or not text.strip():
        raise PlanError("plan_gpus", text, SYNTAX)
    wrapped = text if "(" in text else f"({text})"
    hosts: list[dict[str, Any]] = []
    for group in re.split(r",(?![^(]*\))", wrapped):
        match = re.fullmatch(rf"\s*{_COUNTED}\(([^()]+)\)\s*", group)
        if not match:
            raise PlanError("plan_gpus", text, SYNTAX)
        if match[1] is not None and int(match[1]) < 1:
            raise PlanError("plan_gpus", text, "a number of hosts is at least 1")
        for _ in range(int(match[1] or 1)):
            hosts.append({"name": f"host{len(hosts) + 1}", **_gpus_from_text(match[2], text)})
    return hosts


def _gpus_from_text(body: str, text: str) -> dict[str, Any]:
    gpus: list[dict[str, Any]] = []
    links = []
    for part in re.split(r"[,+]", body):
        match = re.fullmatch(rf"\s*{_COUNTED}(.+?)\s*", part)
        if not match:
            raise PlanError("plan_gpus", text, SYNTAX)
        words = match[2].split()
        link = words.pop() if len(words) > 1 and words[-1] in _WORDS else None
        row = _gpu_rows().get(_plain(" ".join(words)))
        if row is None:
            near = get_close_matches(_plain(" ".join(words)), _gpu_rows(), n=3, cutoff=0.4)
            names = [_gpu_rows()[name]["name"] for name in near] or [row["name"] for row in load("gpus")["gpus"]]
            raise PlanError(
                "plan_gpus", text, f"the catalog has no GPU {' '.join(words)}; it has {', '.join(dict.fromkeys(names))}"
            )
        if match[1] is not None and int(match[1]) < 1:
            raise PlanError("plan_gpus", text, "a number of GPUs is at least 1")
        pair = (
            _WORDS[link]
            if link
            else ("NV4" if row["nvlink"] in ("mesh", "switch") else "PHB", "OK" if row["p2p"] else "NS")
        )
        for _ in range(int(match[1] or 1)):
            gpus.append(
                {
                    "index": len(gpus),
                    "uuid": "",
                    "name": row["smi"],
                    "memory_total_mib": row["memory_total_mib"],
                    "memory_used_mib": 0,
                    "compute_capability": row["compute_capability"],
                }
            )
            links.append((row["name"], pair))
    cells = range(len(gpus))

    def matrix(which: int, other: str) -> list[list[str]]:
        return [
            ["X" if i == j else links[i][1][which] if links[i][0] == links[j][0] else other for j in cells]
            for i in cells
        ]

    return {"gpus": gpus, "links": matrix(0, "PHB"), "p2p": matrix(1, "NS")}
