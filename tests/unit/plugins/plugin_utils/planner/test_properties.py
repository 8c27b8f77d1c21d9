# SPDX-License-Identifier: GPL-3.0-or-later
"""What holds for every plan, whatever is asked of whatever hosts."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import engine as engines
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config, tp_problems
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.render import as_html, as_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.tables import load

# The same examples in every run: a failure is a defect, not luck.
steady = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

MODELS = sorted(load("models")["models"])
GPUS = [row["name"] for row in load("gpus")["gpus"] if row["compute_capability"] != "6.0"]

groups = st.builds(
    lambda hosts, gpus, name, link: f"{hosts}x({gpus}x {name}{link})",
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(GPUS),
    st.sampled_from(["", "", " nvlink", " pcie", " no-p2p"]),
)


@st.composite
def clusters(draw: st.DrawFn) -> list[dict[str, Any]]:
    hosts = hosts_from_text(", ".join(draw(st.lists(groups, min_size=1, max_size=3))))
    for host in hosts:
        if draw(st.booleans()):
            gpu = draw(st.sampled_from(host["gpus"]))
            gpu["memory_used_mib"] = draw(st.integers(0, gpu["memory_total_mib"]))
        host["driver_version"] = draw(st.sampled_from([None, "580.159.04", "575.64.03", "550.144.03"]))
    return hosts


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), st.none(), strategy)


@st.composite
def demands(draw: st.DrawFn, number: int = 0) -> dict[str, Any]:
    wanted = {
        "objective": draw(st.sampled_from(["throughput", "latency"])),
        "max_model_len": draw(maybe(st.integers(16, 40000))),
        "min_concurrency": draw(maybe(st.floats(1, 20))),
        "gpu_memory_utilization": draw(maybe(st.floats(0.05, 1.0))),
        "tensor_parallel_size": draw(maybe(st.sampled_from([1, 2, 3, 4, 6, 8]))),
        "data_parallel_size": draw(maybe(st.sampled_from([1, 2, 3]))),
        "gpus": draw(maybe(st.integers(1, 8))),
        "max_num_seqs": draw(maybe(st.integers(1, 512))),
        "enforce_eager": draw(maybe(st.booleans())),
        "engine_version": draw(
            maybe(st.sampled_from(["0.6.3", "0.8.5.post1", "0.10.2", "0.19.1", "0.25.1", "0.33.0"]))
        ),
        "runtime": draw(st.sampled_from(["container", "venv"])),
    }
    service = {"name": f"s{number}", "model": draw(st.sampled_from(MODELS)), "trust_remote_code": draw(st.booleans())}
    return service | {key: value for key, value in wanted.items() if value is not None}


@st.composite
def asked(draw: st.DrawFn) -> list[dict[str, Any]]:
    return [draw(demands(number=number)) for number in range(draw(st.integers(1, 4)))]


@steady
@given(asked(), clusters())
def test_never_more_memory_than_there_is(services: list[dict[str, Any]], hosts: list[dict[str, Any]]) -> None:
    plan = make_plan(services, hosts)
    # A GPU that a service took although the plan refuses it (for a flag, say) counts as well.
    for gpu in plan["gpus"]:
        if gpu["services"]:
            taken = gpu["used_by_others_gib"] + sum(part["total_gib"] for part in gpu["services"])
            assert taken <= gpu["total_gib"] + 0.01, gpu
            for part in gpu["services"]:
                named = sum(size for key, size in part.items() if key not in ("service", "total_gib"))
                # What a service without KV cache does not use of its share is nobody's part.
                assert named <= part["total_gib"] + 0.05, part
                assert part["kv_cache_gib"] == 0 or named >= part["total_gib"] - 0.05, part


@steady
@given(asked(), clusters())
def test_no_plan_has_an_invalid_layout_or_an_unknown_flag(
    services: list[dict[str, Any]], hosts: list[dict[str, Any]]
) -> None:
    plan = make_plan(services, hosts)
    for service, row in zip(services, plan["services"], strict=True):
        config = load("models")["models"][service["model"]]["config"]
        for server in row["instances"]:
            tp = server["tensor_parallel_size"]
            problems = tp_problems(
                parse_config(config),
                tp,
                engine_version=server["engine_version"],
                expert_parallel=server["enable_expert_parallel"],
            )
            assert not problems
            used = [(host, index) for host, indices in server["gpus"].items() for index in indices]
            world = tp * server["pipeline_parallel_size"] * server["data_parallel_size"]
            assert len(used) == len(set(used)) == world or row["device"] == "cpu"
            for flag in engines.flag_names(server["args"]):
                assert engines.has_flag(server["engine_version"], flag), flag
            if row["fits"]:
                for key in ("tensor_parallel_size", "data_parallel_size", "max_model_len", "max_num_seqs"):
                    if key in service and (key != "data_parallel_size" or service.get("gpus") is None):
                        assert server[key] == service[key], key


@steady
@given(asked(), clusters(), st.randoms())
def test_the_order_of_the_hosts_does_not_matter(
    services: list[dict[str, Any]], hosts: list[dict[str, Any]], random: Any
) -> None:
    shuffled = list(hosts)
    random.shuffle(shuffled)
    assert make_plan(services, hosts) == make_plan(services, shuffled)


@steady
@given(asked(), clusters())
def test_a_plan_is_plain_data_that_can_be_shown(services: list[dict[str, Any]], hosts: list[dict[str, Any]]) -> None:
    plan = make_plan(services, hosts)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["fits"] == (not plan["problems"]) == all(row["fits"] for row in plan["services"])
    text, page = as_text(plan), as_html(plan)
    for service, row in zip(services, plan["services"], strict=True):
        assert service["name"] in text and service["name"] in page
        assert row["problems"] or row["instances"]
        assert row["fits"] or row["problems"]


@steady
@given(demands(), clusters(), st.integers(2, 8))
def test_fewer_tokens_fit_where_more_do(service: dict[str, Any], hosts: list[dict[str, Any]], part: int) -> None:
    long = make_plan([service], hosts)["services"][0]
    assume(long["fits"])
    length = max(1, long["max_model_len"] // part)
    short = make_plan([{**service, "max_model_len": length}], hosts)["services"][0]
    assert short["fits"], short["problems"]


ADVICE = re.compile(r"(?:max_model_len (\d+) fits|it fits) \(TP [^)]*\)(?: with (.+))?")


# Services of which most ask for too much in one way or another, but could have less.
tight = st.fixed_dictionaries(
    {
        "model": st.sampled_from(
            ["Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-14B", "stepfun-ai/Step-3.5-Flash-FP8", "Qwen/Qwen2.5-32B"]
        )
    },
    optional={
        "max_model_len": st.sampled_from([2048, 16384, 32768]),
        "gpu_memory_utilization": st.floats(0.2, 0.95),
        "max_num_batched_tokens": st.sampled_from([2048, 16384, 65536]),
        "max_num_seqs": st.sampled_from([16, 256, 1024]),
        "enforce_eager": st.booleans(),
        "tensor_parallel_size": st.sampled_from([1, 2, 4]),
        "gpus": st.integers(1, 4),
    },
)


def followed(service: dict[str, Any], problem: str) -> dict[str, Any] | None:
    """A service that does what a problem advises, or None where that is no advice about settings."""
    found = ADVICE.fullmatch(problem)
    if not found:
        return None
    length, changes = found.groups()
    left_out, named, rest = (changes or "").partition(" left out")
    other = {key: value for key, value in service.items() if not named or key not in left_out.split(" and ")}
    if "enforce_eager true" in (rest if named else left_out):
        other["enforce_eager"] = True
    return {**other, **({"max_model_len": int(length)} if length else {})}


def test_advice_that_is_followed_to_the_letter_is_not_refused() -> None:
    advice = []

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(tight, min_size=1, max_size=2), st.sampled_from([1, 2, 4]), st.sampled_from(["A10", "L40S", "H100"])
    )
    def follow(wanted: list[dict[str, Any]], count: int, gpu: str) -> None:
        services = [{**service, "name": f"s{number}"} for number, service in enumerate(wanted)]
        hosts = hosts_from_text(f"1x({count}x {gpu})")
        rows = make_plan(services, hosts)["services"]
        for number, row in enumerate(rows):
            for problem in [] if row["instances"] else row["problems"]:
                if other := followed(services[number], problem):
                    advice.append(problem)
                    again = make_plan([*services[:number], other, *services[number + 1 :]], hosts)["services"]
                    placed = [bool(service["instances"]) for service in again]
                    assert placed[number], (problem, again[number]["problems"])
                    assert sum(placed) > sum(bool(row["instances"]) for row in rows), (problem, rows)
                    assert not any("does not fit" in text for text in again[number]["problems"])

    follow()
    assert len(advice) > 30


@steady
@given(demands(), st.sampled_from(GPUS), st.floats(0.3, 0.9), st.floats(0.01, 0.3))
def test_more_utilization_holds_more_tokens(service: dict[str, Any], gpu: str, low: float, more: float) -> None:
    fixed = {**service, "tensor_parallel_size": 1, "gpus": 1, "max_model_len": 256, "data_parallel_size": 1}
    rows = [
        make_plan([{**fixed, "gpu_memory_utilization": value}], hosts_from_text(f"1x {gpu}"))["services"][0]
        for value in (low, min(1.0, low + more))
    ]
    assume(all(row["fits"] for row in rows))
    batches = {(row["max_num_seqs"], row["max_num_batched_tokens"], row["enforce_eager"]) for row in rows}
    assume(len(batches) == 1)
    assert rows[0]["memory"]["kv_cache_tokens"] <= rows[1]["memory"]["kv_cache_tokens"]


def test_the_real_parser_takes_every_command_line(ask_vllm: Any) -> None:
    version, _, _ = ask_vllm([])
    lines: list[list[str]] = []

    @settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(asked(), clusters())
    def collect(services: list[dict[str, Any]], hosts: list[dict[str, Any]]) -> None:
        plan = make_plan([{**service, "engine_version": version} for service in services], hosts)
        for row in plan["services"]:
            for server in row["instances"]:
                lines.append(server["args"])
                lines.extend(server.get("node_args", {}).values())

    collect()
    assert len(lines) > 50
    _, _, errors = ask_vllm([*lines, ["m", "--swap-space", "4"]])
    assert errors[-1], "the parser must refuse what it does not know, or this test proves nothing"
    assert [(line, error) for line, error in zip(lines, errors, strict=False) if error] == []


def test_a_service_beside_one_that_claims_all_is_refused_in_words() -> None:
    """What the allocator of the first keeps makes its claim larger than the GPU."""
    hosts = hosts_from_text("8 x RTX 2080 Ti")
    small = {"name": "embed", "model": "BAAI/bge-m3", "objective": "throughput"}
    large = {"name": "chat", "model": "Qwen/Qwen2.5-32B", "objective": "throughput", "max_model_len": 16}
    plan = make_plan([small, large], hosts)
    (refused,) = [row for row in plan["services"] if not row["fits"]]
    assert "GiB are in use by others" in refused["problems"][0]
    assert " -" not in refused["problems"][0]
