#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Time of vllm_plan, and how it grows with hosts and services.

    PYTHONPATH=collections python tests/benchmarks/plan_speed.py [--check]

--check exits with 1 when a target is missed: 50 ms for one host (the first plan of a process and a refusal, too), 2 s for
200 hosts with 20 services, 10 s for 1000.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

# Models of many sizes, so that services share GPUs, take whole ones, and need several.
MODELS = (
    "Qwen/Qwen2.5-1.5B",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen2.5-14B-Instruct",
    "Qwen/Qwen3-32B",
    "mistralai/Mistral-7B-v0.1",
    "BAAI/bge-m3",
    "BAAI/bge-reranker-base",
    "meta-llama/Llama-2-7b-chat-hf",
    "Qwen/Qwen3-14B",
)
KINDS = ("8x H100", "4x A10", "8x A100-80GB", "2x V100-PCIE-16GB", "4x L40S")
# (hosts, services): hosts grow first, then services.
SIZES = (
    *((1, 1), (1, 3), (10, 5), (50, 10), (100, 20), (200, 20), (400, 20), (1000, 20)),
    *((200, 5), (200, 10), (200, 40)),
)
TARGETS = {(1, 1): 0.05, (1, 3): 0.05, (200, 20): 2.0, (1000, 20): 10.0}


def services(count: int) -> list[dict[str, Any]]:
    return [
        {
            "name": f"service{number}",
            "model": MODELS[number % len(MODELS)],
            "objective": ("throughput", "latency")[number % 7 == 6],
        }
        for number in range(count)
    ]


def hosts(count: int) -> list[dict[str, Any]]:
    """Hosts of five kinds; every tenth has memory in use, so that not all of a kind are alike."""
    made = []
    for number in range(count):
        host = hosts_from_text(KINDS[number % len(KINDS)])[0]
        host["name"] = f"gpu{number + 1}"
        host["driver_version"] = "580.159.04"
        if number % 10 == 9:
            host["gpus"][0]["memory_used_mib"] = 3000
        made.append(host)
    return made


def measure(host_count: int, service_count: int, repeat: int) -> tuple[float, dict[str, Any]]:
    there, asked = hosts(host_count), services(service_count)
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        plan = make_plan(asked, there)
        times.append(time.perf_counter() - start)
    return statistics.median(times), plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 when a target is missed")
    check = parser.parse_args().check
    missed = 0
    refused = [{"name": "r1", "model": "deepseek-ai/DeepSeek-R1"}]
    for what, asked in (("first plan of a process, with reading the catalog", services(1)), ("refusal", refused)):
        start = time.perf_counter()
        plan = make_plan(asked, hosts(1))
        seconds = time.perf_counter() - start
        assert plan["fits"] == (asked is not refused)
        missed += seconds > TARGETS[1, 1]
        print(f"{what}: {seconds * 1000:.0f} ms{'  TOO SLOW' if seconds > TARGETS[1, 1] else ''}")
    print(f"{'hosts':>6} {'services':>9} {'seconds':>9} {'target':>7}  GPUs given to services")
    for size in SIZES:
        seconds, plan = measure(*size, repeat=5 if size[0] <= 50 else 3 if size[0] <= 200 else 1)
        target = TARGETS.get(size)
        given = sum(bool(gpu["services"]) for gpu in plan["gpus"])
        bad = target is not None and seconds > target
        missed += bad
        limit = f"{target:.2f}" if target else ""
        verdict = "  TOO SLOW" if bad else ""
        print(f"{size[0]:>6} {size[1]:>9} {seconds:>9.4f} {limit:>7}  {given} of {len(plan['gpus'])}{verdict}")
    return 1 if check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
