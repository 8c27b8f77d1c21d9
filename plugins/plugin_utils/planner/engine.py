# SPDX-License-Identifier: GPL-3.0-or-later
"""vLLM releases: image, CUDA, drivers, GPUs and model classes that they support, and the flags that they know.

The facts are in catalog/engines.yml, flags.yml and architectures.yml; this module only compares with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from .errors import PlanError
from .tables import load

Capability = tuple[int, int]
GIB = 1024  # MiB


def version_key(version: str) -> tuple[int, ...]:
    """Sort key of a version: "0.8.5.post1" -> (0, 8, 5, 1). Numbers alone decide, as in all of vLLM's releases."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def at_least(version: str, floor: str) -> bool:
    """Whether ``version`` is ``floor`` or newer. Missing parts count as 0: "580" is older than "580.65.06"."""
    return version_key(version) >= version_key(floor)


def parse_capability(value: object, field: str = "compute_capability") -> Capability:
    """ "8.6" -> (8, 6).

    Raises:
        PlanError: not of this form.
    """
    match = re.fullmatch(r"(\d{1,2})\.(\d)", str(value))
    if not match:
        raise PlanError(field, value, 'give it as nvidia-smi prints compute_cap, such as "8.6"')
    return int(match[1]), int(match[2])


def show(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True)
class Engine:
    """One vLLM release, as the row of engines.yml that lists it.

    Attributes:
        version: such as ``0.25.1``.
        generation: ``V0`` or ``V1``: the core that it starts on GPUs of ``v0_below`` or better.
        cuda: CUDA release of the image and of the wheel, ``13.0``.
        capability: lowest compute capability that the build has code for.
        ray: Ray comes with it.
        entrypoint: ``serve`` (``vllm serve MODEL``) or ``api_server`` (``python3 -m ... --model MODEL``).
        gpu_memory_utilization: the engine's own default.
        executors: what ``--distributed-executor-backend`` can be. mp_nodes: ``mp`` spans hosts.
    """

    version: str
    generation: str
    cuda: str
    capability: Capability
    ray: bool
    entrypoint: str
    gpu_memory_utilization: float
    batching: str
    executors: tuple[str, ...]
    mp_nodes: bool = False
    cu129: bool = False
    v0_below: Capability | None = None
    counts_others: tuple[str, ...] = ()

    def core(self, capability: Capability) -> str:
        """``V0`` or ``V1``: the engine core that a GPU of this capability gets."""
        return "V0" if self.v0_below and capability < self.v0_below else self.generation

    def batch_defaults(self, memory_total_mib: float, gpu_name: str) -> tuple[int | None, int]:
        """(max_num_batched_tokens, max_num_seqs) of the API server. None tokens: max_model_len, 2048 at least."""
        for row in load("engines")["batching"][self.batching]:
            if memory_total_mib >= row["min_gib"] * GIB and row.get("not_name", "\0") not in gpu_name.lower():
                return row["tokens"], row["seqs"]
        raise AssertionError(f"batching.{self.batching} of engines.yml has no row for every GPU")

    def builds(self, container: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """(tag suffix, row of the CUDA table) of each build, the default one first."""
        table = load("engines")["cuda"]
        yield "", table[self.cuda]
        if self.cu129 and container:
            yield "-cu129", table["12.9"]

    def command(self) -> list[str]:
        """What a virtual environment runs before the arguments; a container's image has it as its entrypoint."""
        return (
            ["vllm", "serve"] if self.entrypoint == "serve" else ["python3", "-m", "vllm.entrypoints.openai.api_server"]
        )


@cache
def _engines() -> dict[str, Engine]:
    engines = {}
    for row in load("engines")["engines"]:
        fields = {key: value for key, value in row.items() if key not in ("versions", "source")}
        fields["capability"] = parse_capability(row["capability"])
        fields["executors"] = tuple(row["executors"])
        fields["counts_others"] = tuple(row.get("counts_others", ()))
        if "v0_below" in row:
            fields["v0_below"] = parse_capability(row["v0_below"])
        for version in row["versions"]:
            engines[str(version)] = Engine(version=str(version), **fields)
    return engines


def versions() -> list[str]:
    """All releases of the catalog, oldest first."""
    return sorted(_engines(), key=version_key)


def get(version: object, field: str = "engine_version") -> Engine:
    """The release of that number.

    Raises:
        PlanError: there is no such release in the catalog; the message names the nearest.
    """
    text = str(version).removeprefix("v")
    engines = _engines()
    if text in engines:
        return engines[text]
    near = get_close_matches(text, engines, n=3, cutoff=0.5)
    hint = f"near: {', '.join(sorted(near, key=version_key))}; " if near else ""
    raise PlanError(field, version, f"no such vLLM release is known ({hint}all: {versions()[0]} to {versions()[-1]})")


def build_for(
    engine: Engine, capability: Capability, driver: str | None, container: bool
) -> tuple[str, list[str], list[str]]:
    """Picks the build that a GPU and a driver can run.

    Args:
        driver: version of the installed driver, None when it is still to be installed (then any is possible).

    Returns:
        tag suffix ("" or "-cu129"), problems (empty when it runs), remarks.
    """
    problems = []
    for full in (True, False):  # first a driver as new as the toolkit, then one that is merely compatible
        for suffix, cuda in engine.builds(container):
            floor = max(engine.capability, parse_capability(cuda["min_capability"]))
            name = f"vLLM {engine.version}{suffix} (CUDA {'12.9' if suffix else engine.cuda})"
            if not floor <= capability <= parse_capability(cuda["max_capability"]):
                problem = f"{name} has no code for compute capability {show(capability)}: it needs {show(floor)}"
                problem += f" to {cuda['max_capability']}"
            elif driver is not None and not at_least(driver, cuda["own_driver" if full else "min_driver"]):
                problem = f"{name} needs driver {cuda['min_driver']} or newer, the host has {driver}"
            else:
                remarks = []
                if suffix and driver is not None:
                    remarks.append(f"image with CUDA 12.9: driver {driver} is too old for CUDA {engine.cuda}")
                if not full:
                    jit = _jit_compiled(capability)
                    remarks.append(
                        f"driver {driver} is older than the {cuda['own_driver']} that its CUDA came with: it runs by "
                        "minor-version compatibility, "
                        + ("but parts that the driver compiles at run time may be refused" if jit else
                           f"and all parts have machine code for compute capability {show(capability)}")
                    )  # fmt: skip
                return suffix, [], remarks
            if not full and problem not in problems:
                problems.append(problem)
    return "", problems, []


def _jit_compiled(capability: Capability) -> bool:
    """The driver itself compiles parts of the builds for this GPU, which it can only if it is as new as their CUDA."""
    return capability >= parse_capability(load("engines")["jit_compiled_from"])


def is_risky(
    engine: Engine, suffix: str, capability: Capability, gpu_name: str, driver: str | None, container: bool
) -> bool:
    """The driver is older than the build's CUDA, and may refuse to compile parts of it or not let its image start."""
    old = driver is not None and not at_least(driver, _own_driver(engine, suffix))
    return old and (_jit_compiled(capability) or start_problem(engine, suffix, gpu_name, driver, container) is not None)


def _own_driver(engine: Engine, suffix: str) -> str:
    own: str = load("engines")["cuda"]["12.9" if suffix else engine.cuda]["own_driver"]
    return own


def start_problem(engine: Engine, suffix: str, gpu_name: str, driver: str | None, container: bool) -> str | None:
    """Why the image does not start with an old driver, or None."""
    unlisted = container and any(brand in gpu_name.lower() for brand in load("engines")["old_drivers_refused"])
    own = _own_driver(engine, suffix)
    if driver is None or not unlisted or at_least(driver, own):
        return None
    image = f"the image of vLLM {engine.version}{suffix}"
    return f"{image} refuses driver {driver} on {gpu_name}, unless GPUs come by CDI: install {own} or newer"


def rope_problem(engine: Engine, kind: str) -> str | None:
    """Why a release cannot read a kind of rope_scaling, or None."""
    first = load("engines")["rope_types"].get(kind)
    return None if first is None else _missing(engine.version, {"first": first}, f"rope_scaling of type {kind}")


def architecture_problem(engine: Engine, architecture: str) -> str | None:
    """Why the release cannot load a model class, or None (also for a class that no release lists: a plugin's)."""
    row = load("architectures")["architectures"].get(architecture)
    return None if row is None else _missing(engine.version, row, architecture)


def _missing(version: str, row: dict[str, Any], what: str) -> str | None:
    """Why a release lacks what the row gives the first and the last release of, or None."""
    if not at_least(version, row["first"]):
        return f"vLLM {version} does not know {what}: it came with {row['first']}"
    if "last" in row and version_key(version) > version_key(row["last"]):
        return f"vLLM {version} has dropped {what}: {row['last']} is the last with it"
    return None


def by_release(rows: dict[str, Any], version: str) -> Any:
    """What holds in a release, of rows by the release from which on they hold, oldest first."""
    return [row for first, row in rows.items() if at_least(version, first)][-1]


def method_problem(version: str, method: str | None) -> str | None:
    """Why a release cannot load weights of this quantization method, or None (also for one that no release lists)."""
    row = load("engines")["quantization_releases"].get(method or "", {})
    problem = _missing(version, row, f"quantization method {method}") if row else None
    if problem and "plugin" in row and at_least(version, row["first"]):
        problem += f"; later ones take it by {row['plugin']}, in an `image` of your own"
    return problem


def is_deprecated(version: str, method: str | None) -> bool:
    """The release takes weights of this quantization method only with --allow-deprecated-quantization."""
    row = load("engines")["quantization_releases"].get(method or "", {}).get("deprecated")
    return row is not None and _missing(version, row, "") is None


def quantization_problem(version: str, method: str | None, capability: Capability, kernels: str = "") -> str | None:
    """Why a release cannot run weights of this quantization method on a GPU, or None. ``kernels``: see model.Quantization."""
    kernels = kernels or method or ""
    floor, where = load("engines")["quantization"].get(kernels), ""
    if isinstance(floor, dict):
        floor, where = by_release(floor, version), f" in vLLM {version}"
    if floor is None or capability >= parse_capability(floor):
        return None
    return f"{kernels} weights need compute capability {floor}{where}, the GPU has {show(capability)}"


def float16_is_wrong(model_type: str) -> bool:
    """Models of this type need bfloat16 or float32."""
    return model_type in load("engines")["not_float16"]["model_types"]


def dtype_problem(
    engine: Engine, capability: Capability, model_type: str, dtype: str, quantization: str | None, head: int
) -> str | None:
    """Why a release cannot run a model in a dtype on a GPU, or None.

    Args:
        head: head_dim of the widest heads.
    """
    table = load("engines")["not_float16"]
    if dtype == "float16" and float16_is_wrong(model_type) and at_least(engine.version, table["refused_from"]):
        other = "bfloat16" if capability >= (8, 0) else "float32"
        return f"vLLM {engine.version} refuses dtype float16 for {model_type}, which is wrong in it: leave it out, or give {other}"
    if dtype not in ("auto", "bfloat16") and quantization in load("engines")["only_bfloat16"]:
        return f"{quantization} weights run with dtype bfloat16 only, not {dtype}: leave dtype out"
    if dtype == "float32" and quantization and quantization not in table["float32_beside"]:
        if capability >= (8, 0) or not float16_is_wrong(model_type):
            return f"{quantization} weights do not run beside dtype float32: leave it out"
        return (
            f"{quantization} weights do not run beside float32, which {model_type} needs on compute capability "
            f"{show(capability)}: take weights that are not quantized, or a GPU from 8.0 on"
        )
    size, most = head * (4 if dtype == "float32" else 2), load("engines")["head_bytes_below_8"]
    if capability < (8, 0) and engine.core(capability) == "V1" and size > most:
        return (
            f"vLLM {engine.version} runs heads of at most {most} bytes on compute capability {show(capability)}, {model_type} "
            f"has {size} (head_dim {head} in {dtype}): take a GPU from 8.0 on"
        )
    return None


# ---------------------------------------------------------------------------------------------------------- flags


def _row(flag: str) -> dict[str, Any] | None:
    row: dict[str, Any] | None = load("flags")["flags"].get(flag)
    return row


def has_flag(version: str, flag: str) -> bool:
    """Whether the release's API server knows ``--flag`` (``--no-flag`` counts where the release has that form)."""
    row = _row(flag)
    if row is None and flag.startswith("--no-"):
        row = _row("--" + flag[5:])
        return (
            row is not None
            and "negatable" in row
            and at_least(version, row["negatable"])
            and has_flag(version, "--" + flag[5:])
        )
    if row is None or not at_least(version, row["first"]):
        return False
    if "last" in row and version_key(version) > version_key(row["last"]):
        return False
    return version not in row.get("except", ())


def flag_names(args: Sequence[str]) -> Iterator[str]:
    """The flags among arguments, spelled as the catalog does: ``--max_model_len=4096`` -> ``--max-model-len``."""
    for arg in args:
        if arg.startswith("--"):
            # --speculative-config.method is a part of --speculative-config
            yield "--" + re.split(r"[=.]", arg[2:], maxsplit=1)[0].replace("_", "-")
        elif re.match(r"-[A-Za-z]", arg):
            name = arg.split("=", 1)[0]
            yield name if _row(name) else name[:2]  # -O3 is -O with its value


def flag_problem(version: str, flag: str) -> str | None:
    """Why the release refuses a flag, with its replacement; None when it knows it."""
    row = _row(flag)
    if has_flag(version, flag) or (row and has_flag(version, row.get("rewritten", ""))):
        return None
    if row is None:
        known = [name for name in load("flags")["flags"] if has_flag(version, name)]
        near = get_close_matches(flag, known, n=1, cutoff=0.75)
        return f"vLLM {version} has no {flag}" + (f"; did you mean {near[0]}?" if near else "")
    if not at_least(version, row["first"]):
        when = f"it came with {row['first']}"
    else:
        when = f"{row['last']} is the last with it" if "last" in row else "this release lacks it"
    way_out = "; ".join(
        part for part in (f"use {row['replacement']}" if "replacement" in row else "", row.get("note", "")) if part
    )
    return f"vLLM {version} has no {flag}: {when}" + (f"; {way_out}" if way_out else "; leave it out")


def disabled(version: str, flag: str) -> list[str]:
    """What turns a switch off that is on by itself: ``--no-flag``, ``--flag=False`` where there is none yet."""
    return option(version, f"--no-{flag[2:]}") or ([f"{flag}=False"] if has_flag(version, flag) else [])


def splits_above(version: str) -> int:
    """max_model_len above which the V0 core of a release splits prompts unless it is told not to."""
    row = load("engines")["v0_chunks"]
    return int(row["above"]) if at_least(version, row["from"]) else 1 << 62


def newest_python(version: str) -> str:
    """Newest minor release of Python, such as 3.12, that a release of vLLM for CUDA can be installed for."""
    newest: str = by_release(load("engines")["newest_python"], version)
    return newest


def option(version: str, flag: str, value: object = True) -> list[str]:
    """``[flag, value]`` or ``[flag]`` for True; empty for None, False and for flags that the release does not know."""
    if value is None or value is False or not has_flag(version, flag):
        return []
    return [flag] if value is True else [flag, str(value)]
