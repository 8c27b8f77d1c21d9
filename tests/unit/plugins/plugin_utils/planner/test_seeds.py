# SPDX-License-Identifier: GPL-3.0-or-later
"""The deployments that inventories/ holds, against what reality said of them: each README there has the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import engine_memory
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

CONFIGS = Path(__file__).parents[4] / "benchmarks" / "truth" / "configs.json"
INVENTORIES = Path(__file__).parents[5] / "inventories"
TWO_V100 = "2x V100-PCIE-16GB no-p2p"
# What the hand-made deployment started Qwen2.5-14B with, after vLLM had refused everything roomier.
TIGHT = {
    "engine_version": "0.3.0",
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.995,
    "max_model_len": 400,
    "max_num_batched_tokens": 400,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "extra_args": ["--swap-space", "4", "--max-paddings", "16"],
}
# ... and an ordinary batch.
USUAL = {"max_model_len": 4096, "max_num_batched_tokens": 4096, "max_num_seqs": 256}


def plan(gpus: str, *services: dict[str, Any]) -> dict[str, Any]:
    named = [{"name": f"service{number}", **service} for number, service in enumerate(services)]
    return make_plan(named, hosts_from_text(gpus))


def one(gpus: str, **service: Any) -> dict[str, Any]:
    row: dict[str, Any] = plan(gpus, service)["services"][0]
    return row


class TestV100:
    """Three hosts of two V100-PCIE-16GB without P2P."""

    def test_14b_starts_on_one_host_with_400_tokens_and_0995(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-14B", **TIGHT)
        assert row["fits"], row["problems"]
        assert row["dtype"] == "float16"
        assert "--disable-custom-all-reduce" in row["args"]
        assert row["image"] == "vllm/vllm-openai:v0.3.0"
        assert row["memory"]["reason"] == (
            "15.51 GiB (0.995 of 15.59) - weights 13.95 - activations 0.10 - libraries 0.45 = 1.01 GiB of KV cache for 11024 tokens"
        )

    @pytest.mark.parametrize(
        "asked, arithmetic",
        [
            (
                {"gpu_memory_utilization": 0.8},
                "12.47 GiB (0.8 of 15.59) - weights 13.95 - activations 0.10 - libraries 0.45 = -2.03 GiB",
            ),
            (
                {"gpu_memory_utilization": 0.9},
                "14.03 GiB (0.9 of 15.59) - weights 13.95 - activations 0.10 - libraries 0.45 = -0.47 GiB",
            ),
            # An ordinary batch: what fails is 256 requests at once, at any utilization.
            (
                {"gpu_memory_utilization": 0.98, **USUAL},
                "15.27 GiB (0.98 of 15.59) - weights 13.95 - activations 1.46 - libraries 0.45 = -0.58 GiB",
            ),
            (
                {"gpu_memory_utilization": 0.995, **USUAL},
                "15.51 GiB (0.995 of 15.59) - weights 13.95 - activations 1.46 - libraries 0.45 = -0.35 GiB",
            ),
        ],
    )
    def test_why_14b_did_not_start_on_one_host(self, asked: dict[str, Any], arithmetic: str) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-14B", **{**TIGHT, **asked})
        assert not row["fits"]
        assert row["problems"][0] == (
            f"does not fit on Tesla V100-PCIE-16GB with TP 2: no memory is left for the KV cache: {arithmetic}"
        )
        assert any("fits (TP 2)" in problem or "it fits" in problem for problem in row["problems"][1:]), row["problems"]

    def test_the_batch_of_16_makes_the_room(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-14B", **{**TIGHT, **USUAL, "max_num_seqs": 16})
        assert row["fits"], row["problems"]

    @pytest.mark.parametrize(
        "model, weights, missing", [("Qwen/Qwen2.5-32B", "30.55", "-15.79"), ("Qwen/Qwen3-32B", "30.52", "-15.77")]
    )
    def test_32b_does_not_fit_on_two(self, model: str, weights: str, missing: str) -> None:
        row = one(TWO_V100, model=model, max_model_len=400)
        assert row["problems"] == [
            "does not fit on Tesla V100-PCIE-16GB with TP 1 x PP 2: no memory is left for the KV cache: 15.30 GiB (0.982 of "
            f"15.59) - weights {weights} - activations 0.10 - libraries 0.45 = {missing} GiB",
            "5 such GPUs hold it (TP 1 x PP 5)",
        ]

    def test_32b_fits_on_all_six_through_the_pipeline(self) -> None:
        row = one("3x(2x V100-PCIE-16GB no-p2p)", model="Qwen/Qwen2.5-32B", max_model_len=4096)
        assert row["fits"], row["problems"]
        assert (row["tensor_parallel_size"], row["pipeline_parallel_size"]) == (2, 3)
        assert row["executor"] == "ray" and row["ray_in_image"]
        assert row["args"][row["args"].index("--distributed-executor-backend") + 1] == "ray"

    @pytest.mark.parametrize(
        "model, why",
        [
            ("Qwen/Qwen2.5-1.5B", "TP 6 is not possible: vocabulary of 151936, padded to 151936; "),
            ("Qwen/Qwen2.5-7B", "TP 6 is not possible: 28 attention heads; "),
            ("Qwen/Qwen2.5-14B", "TP 6 is not possible: 40 attention heads. Possible: 1, 2, 4, 8"),
            ("tiiuae/falcon-7b", "TP 6 is not possible: vocabulary of 65024, padded to 65024; "),
        ],
    )
    def test_tp_6_is_not_possible(self, model: str, why: str) -> None:
        row = one("3x(2x V100-PCIE-16GB)", model=model, tensor_parallel_size=6)
        assert not row["fits"]
        assert row["problems"][0].startswith(why)

    def test_weights_of_8_bits_need_a_newer_gpu(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-14B", quantization="fp8")
        assert row["problems"] == ["fp8 weights need compute capability 8.0 in vLLM 0.8.5.post1, the GPU has 7.0"]
        awq = {"model": "awq", "config": json.loads(CONFIGS.read_text())["qwen2.5-7b-awq"]}
        assert one(TWO_V100, **awq)["problems"] == ["awq weights need compute capability 7.5, the GPU has 7.0"]

    def test_the_inventory_is_planned_as_its_readme_says(self) -> None:
        folder = INVENTORIES / "v100-ray-3x2"
        services = yaml.safe_load((folder / "group_vars" / "all.yml").read_text())["vllm_services"]
        hosts = [{**host, "name": f"v100-{n}"} for n, host in enumerate(hosts_from_text(f"3x({TWO_V100})"), 1)]
        (row,) = make_plan(services, hosts)["services"]
        assert row["args"] == [
            *("--model", "Qwen/Qwen2.5-14B", "--served-model-name", "Qwen/Qwen2.5-14B", "--port", "8000"),
            *("--dtype", "float16", "--max-model-len", "8192", "--gpu-memory-utilization", "0.9"),
            *("--max-num-seqs", "256", "--max-num-batched-tokens", "8192"),
            *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
            *("--distributed-executor-backend", "ray", "--disable-custom-all-reduce"),
        ]
        assert row["env"] == {"VLLM_USE_V1": "0"}
        assert (row["engine_version"], row["ray_in_image"]) == ("0.8.5.post1", True)
        assert row["gpus"] == {name: [0, 1] for name in ("v100-1", "v100-2", "v100-3")}
        memory = row["memory"]
        assert memory["reason"] == (
            "14.03 GiB (0.9 of 15.59) - weights 4.91 - activations 1.50 - libraries 0.45 = 7.17 GiB of KV cache for 234944 tokens"
        )
        assert memory["max_concurrency"] == pytest.approx(234944 / 8192, abs=0.01)
        assert memory["footprint_gib"] == 14.622  # with CUDA graphs and the context, of 15.59
        readme = (folder / "README.md").read_text()
        assert f"{memory['weights_gib']:.2f} GiB of weights a GPU instead of" in readme
        assert f"{memory['kv_cache_gib']:.2f} GiB of cache for {memory['kv_cache_tokens']:,} tokens" in readme
        # Two of the hosts hold this context, too, with fewer requests at once.
        assert any(line.startswith("2 hosts are enough: TP 2 x PP 2 holds 8192 tokens") for line in row["why"])
        (two,) = make_plan([{**services[0], "hosts": ["v100-1", "v100-2"], "pipeline_parallel_size": 2}], hosts)[
            "services"
        ]
        assert f"room for {two['memory']['kv_cache_tokens']:,} tokens" in readme

    def test_the_release_is_the_last_that_supports_the_gpu(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-7B-Instruct", max_model_len=4096)
        assert row["fits"], row["problems"]
        assert row["engine_version"] == "0.8.5.post1"
        assert row["env"]["VLLM_USE_V1"] == "0"
        assert row["dtype"] == "float16"
        assert not row["enforce_eager"]

    @pytest.mark.parametrize(
        ("driver", "why"),
        [
            ("535.183.01", "all parts have machine code for compute capability 7.0"),
            ("550.144.03", "vLLM 0.25.1 (CUDA 13.0) has no code for compute capability 7.0"),
            ("580.159.04", "vLLM 0.25.1 (CUDA 13.0) has no code for compute capability 7.0"),
        ],
    )
    @pytest.mark.parametrize("number", [1, 3])
    def test_the_release_is_the_same_with_every_driver_that_runs_it(self, number: int, driver: str, why: str) -> None:
        hosts = [{**host, "driver_version": driver} for host in hosts_from_text(f"{number}x({TWO_V100})")]
        asked: dict[str, Any] = {"name": "qwen", "model": "Qwen/Qwen2.5-14B", "max_model_len": 2048}
        if number > 1:
            asked |= {"hosts": [host["name"] for host in hosts], "pipeline_parallel_size": 3}
        (row,) = make_plan([asked], hosts)["services"]
        assert row["fits"], row["problems"]
        assert row["engine_version"] == "0.8.5.post1"
        assert any(why in line for line in row["why"]), row["why"]

    def test_the_image_that_was_tried_in_vain_is_refused(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen2.5-7B", engine_version="0.10.1.1")
        assert "no code for compute capability 7.0" in row["problems"][0]
        assert "engine_version 0.8.5.post1 can" in row["problems"]

    def test_flags_that_0_3_0_did_not_know_are_refused(self) -> None:
        wrong = ["--distributed-executor-backend", "ray", "--enable-chunked-prefill", "False"]
        row = one(TWO_V100, model="Qwen/Qwen2.5-1.5B", engine_version="0.3.0", extra_args=wrong)
        assert any("set executor of the service instead" in problem for problem in row["problems"])
        assert any("no --enable-chunked-prefill: it came with 0.4.1" in problem for problem in row["problems"])

    def test_qwen3_was_not_known_to_0_3_0(self) -> None:
        row = one(TWO_V100, model="Qwen/Qwen3-14B", engine_version="0.3.0")
        assert "does not know Qwen3ForCausalLM: it came with 0.8.4" in row["problems"][0]

    def test_14b_on_four_of_two_hosts_had_no_room_for_its_batch(self) -> None:
        """TP 4 with 131072 tokens a batch: half an hour of loading, then "No available memory for the cache blocks"."""
        shape = parse_config(json.loads(CONFIGS.read_text())["qwen2.5-14b"])
        asked: dict[str, Any] = {
            "gpu_memory_total_mib": 16384, "compute_capability": "7.0", "engine_version": "0.3.0", "dtype": "float16",
            "tensor_parallel_size": 4, "gpu_memory_utilization": 0.8, "enforce_eager": True,
        }  # fmt: skip
        as_tried = engine_memory(shape, max_model_len=32768, max_num_batched_tokens=131072, **asked)
        assert as_tried.reason == (
            "no memory is left for the KV cache: 12.47 GiB (0.8 of 15.59) - weights 6.95 - activations 8.79 - libraries 0.45 = -3.72 GiB"
        )
        assert engine_memory(shape, max_model_len=4096, max_num_batched_tokens=4096, **asked).fits

    @pytest.mark.parametrize(
        "version, way",
        [
            ("0.8.5.post1", "set tensor_parallel_size 2 and pipeline_parallel_size 2"),
            ("0.3.0", "is not possible, either: PP 2 is not possible: vLLM 0.3.0 has no pipeline parallelism"),
        ],
    )
    def test_tp_does_not_leave_the_host(self, version: str, way: str) -> None:
        spread = {"hosts": ["host1", "host2"], "tensor_parallel_size": 4, "engine_version": version}
        row = one("2x(2x V100-PCIE-16GB no-p2p)", model="Qwen/Qwen2.5-1.5B", **spread)
        (problem,) = row["problems"]
        assert problem.startswith("TP 4 does not fit into a host of 2 GPUs") and problem.endswith(way)

    def test_an_address_of_ray_is_no_flag(self) -> None:
        row = one(
            TWO_V100, model="Qwen/Qwen2.5-1.5B", engine_version="0.3.0", extra_args=["--ray-cluster-address", "a:6379"]
        )
        assert any("--ray-cluster-address" in problem for problem in row["problems"]), row["problems"]


class TestA10:
    """Four A10: a 32B model, an embedding model and a reranker."""

    CHAT: ClassVar[dict[str, Any]] = {"model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B", "max_model_len": 16384}
    BESIDE = ({"model": "BAAI/bge-m3"}, {"model": "BAAI/bge-reranker-base"})

    def test_tp_3_is_not_possible_and_what_is(self) -> None:
        row = plan("4x A10", {**self.CHAT, "tensor_parallel_size": 3}, *self.BESIDE)["services"][0]
        assert not row["fits"]
        assert "TP 3 is not possible: 40 attention heads" in row["problems"][0]
        assert "ossible: 1, 2, 4, 8" in row["problems"][0]

    def test_all_three_fit_together_with_tp_4(self) -> None:
        result = plan("4x A10", self.CHAT, *self.BESIDE)
        assert result["fits"], result["problems"]
        chat, embed, rank = result["services"]
        assert chat["tensor_parallel_size"] == 4
        assert chat["max_model_len"] == 16384
        assert not chat["enforce_eager"]
        assert "TP 3 is not possible: 40 attention heads" in chat["why"]
        assert embed["memory"]["kv_cache_tokens"] == rank["memory"]["kv_cache_tokens"] == 0
        for gpu in result["gpus"]:
            assert gpu["free_gib"] > 0.1, "a planned utilization leaves a little of each GPU untouched"

    def test_the_driver_and_the_release_of_the_source_as_the_readme_says(self) -> None:
        folder = INVENTORIES / "deepseek-r1-distill-4xa10"
        services = yaml.safe_load((folder / "group_vars" / "all.yml").read_text())["vllm_services"]
        hosts = [{**hosts_from_text("4x A10")[0], "name": "a10", "driver_version": "550.144.03"}]

        def fits(*pinned: str, version: str = "0.7.2", length: int = 32768) -> list[bool]:
            asked = [
                {
                    **service,
                    **({"engine_version": version} if service["name"] in pinned else {}),
                    **({"max_model_len": length} if service["name"] == "chat" else {}),
                }
                for service in services
            ]
            return [row["fits"] for row in make_plan(asked, hosts)["services"]]

        images = {row["image"] for row in make_plan(services, hosts)["services"]}
        assert images == {"vllm/vllm-openai:v0.25.1-cu129"}
        every = ("chat", "embed", "rerank")
        assert fits("chat") == fits(*every) == [True, False, False]
        assert fits("chat", length=24576) == fits(*every, length=24576) == [True, True, True]
        assert fits(*every, version="0.8.5.post1") == [False, False, False]
        readme = (folder / "README.md").read_text()
        assert "the `-cu129` image of 0.25.1 for all three" in readme
        assert "With `max_model_len: 24576` for chat all three fit" in readme

    def test_the_release_of_the_source_and_its_flags(self) -> None:
        row = one("4x A10", **{**self.CHAT, "engine_version": "0.7.2"})
        assert row["fits"], row["problems"]
        assert row["args"][0] == "--model"
        assert not any(flag in row["args"] for flag in ("--runner", "--data-parallel-size"))
        # 0.7.2 wants a second flag beside the parser: leaving the parser out is no option for a reasoning model.
        assert "--reasoning-parser" in row["args"]


class TestDeepSeekR1:
    """641 GiB of weights on four A100-80G."""

    def test_it_cannot_fit(self) -> None:
        row = one("4x A100-80GB", model="/data/models/DeepSeek-R1", max_model_len=4096, tensor_parallel_size=4)
        assert not row["fits"]
        assert "weights 161." in row["problems"][0]  # GiB on each of four GPUs of 80
        assert any("16 such GPUs hold it (TP 8 x PP 2)" in problem for problem in row["problems"]), row["problems"]

    def test_it_fits_on_eight_h200(self) -> None:
        row = one("8x H200", model="deepseek-ai/DeepSeek-R1", max_model_len=32768)
        assert row["fits"], row["problems"]
        assert row["tensor_parallel_size"] == 8

    def test_its_distillate_fits_on_the_four(self) -> None:
        assert one("4x A100-80GB", model="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B")["fits"]


class TestStep35Flash:
    """Eight GPUs of 80 GB: the FP8 weights are quantized in blocks of 128, which 1280 / TP must keep whole."""

    @pytest.mark.parametrize("tp", [4, 8])
    def test_fp8_cannot_be_split_by_4_or_8(self, tp: int) -> None:
        row = one(
            "8x A100-80GB", model="stepfun-ai/Step-3.5-Flash-FP8", trust_remote_code=True, tensor_parallel_size=tp
        )
        assert not row["fits"]
        assert f"TP {tp} is not possible" in row["problems"][0]
        assert "ossible: 1, 2" in row["problems"][0] and "expert parallel" in row["problems"][0]

    def test_fp8_is_planned_with_its_experts_spread_over_all(self) -> None:
        row = one("8x A100-80GB", model="stepfun-ai/Step-3.5-Flash-FP8", trust_remote_code=True, max_model_len=65536)
        assert row["fits"], row["problems"]
        assert row["tensor_parallel_size"] in (1, 2)
        assert row["tensor_parallel_size"] * row["data_parallel_size"] == 8
        assert row["enable_expert_parallel"] and "--enable-expert-parallel" in row["args"]

    def test_bf16_fits_with_tp_8(self) -> None:
        row = one("8x A100-80GB", model="stepfun-ai/Step-3.5-Flash", trust_remote_code=True, max_model_len=65536)
        assert row["fits"], row["problems"]
        assert row["tensor_parallel_size"] == 8
        assert row["args"][row["args"].index("--tool-call-parser") + 1] == "step3p5"

    def test_its_code_must_be_allowed(self) -> None:
        row = one("8x A100-80GB", model="stepfun-ai/Step-3.5-Flash", max_model_len=65536)
        assert any("set trust_remote_code: true" in problem for problem in row["problems"])


class TestStep3VL:
    """Two cards of 22 GB of the Turing generation."""

    ASKED: ClassVar[dict[str, Any]] = {
        "model": "stepfun-ai/Step3-VL-10B",
        "trust_remote_code": True,
        "gpu_memory_utilization": 0.85,
    }

    def test_it_fits_as_it_was_run(self) -> None:
        row = one("2x RTX-2080-Ti-22GB", **self.ASKED, tensor_parallel_size=2, max_model_len=4096)
        assert row["fits"], row["problems"]
        assert row["dtype"] == "float16"
        assert "--trust-remote-code" in row["args"]
        assert "--disable-custom-all-reduce" in row["args"]

    def test_the_release_before_its_class_is_refused(self) -> None:
        row = one("2x RTX-2080-Ti-22GB", **self.ASKED, engine_version="0.14.1")
        assert "it came with 0.16.0" in row["problems"][0]


@pytest.mark.parametrize("name", sorted(path.parent.name for path in INVENTORIES.glob("*/hosts.yml")))
def test_the_inventory_plans(name: str) -> None:
    everything = yaml.safe_load((INVENTORIES / name / "hosts.yml").read_text())["all"]
    hosts = []
    for host, variables in everything["hosts"].items():
        known = {**everything.get("vars", {}), **(variables or {})}
        if "plan_host_gpus" not in known:
            pytest.skip(f"{name} is planned from the facts of its host")
        described = hosts_from_text(known["plan_host_gpus"])[0]
        hosts.append({**described, "name": host, "driver_version": known.get("plan_host_driver")})
    services = yaml.safe_load((INVENTORIES / name / "group_vars" / "all.yml").read_text())["vllm_services"]
    result = make_plan(services, hosts)
    assert result["fits"], result["problems"]
    assert {host for row in result["services"] for host in row["hosts"]} == {host["name"] for host in hosts}
