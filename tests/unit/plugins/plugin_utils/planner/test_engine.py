# SPDX-License-Identifier: GPL-3.0-or-later
"""What a release supports: GPUs, drivers, model classes, flags."""

from __future__ import annotations

import pytest

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import engine as engines
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError

VOLTA, TURING, AMPERE, HOPPER, BLACKWELL = (7, 0), (7, 5), (8, 6), (9, 0), (12, 0)


@pytest.mark.parametrize(
    ("older", "newer"),
    [("0.9.2", "0.10.0"), ("0.8.5", "0.8.5.post1"), ("0.10.1", "0.10.1.1"), ("0.25.1", "0.26.0"), ("0.4.3", "0.33.0")],
)
def test_versions_are_ordered_by_number(older: str, newer: str) -> None:
    assert engines.version_key(older) < engines.version_key(newer)
    assert engines.at_least(newer, older) and not engines.at_least(older, newer)


@pytest.mark.parametrize("version", ["0.25.7", "latest", "", None, 1, "0.25", "nightly"])
def test_a_release_that_does_not_exist_is_refused(version: object) -> None:
    with pytest.raises(PlanError, match=r"^engine_version is .*no such vLLM release.*0\.3\.0 to 0\.33\.0"):
        engines.get(version)


def test_a_leading_v_is_taken() -> None:
    assert engines.get("v0.25.1").version == "0.25.1"


@pytest.mark.parametrize("value", ["8", "8.6.1", "sm_86", None, "", 86])
def test_a_capability_of_another_form_is_refused(value: object) -> None:
    with pytest.raises(PlanError, match="compute_capability is"):
        engines.parse_capability(value)


@pytest.mark.parametrize(
    ("version", "capability", "driver", "tag"),
    [
        ("0.8.5.post1", VOLTA, "550.144.03", ""),
        ("0.25.1", TURING, "580.159.04", ""),
        ("0.25.1", HOPPER, None, ""),  # the driver is still to be installed
        ("0.25.1", AMPERE, "575.64.03", "-cu129"),
        ("0.32.0", AMPERE, "575.64.03", "-cu129"),
        ("0.25.1", BLACKWELL, "580.65.06", ""),
    ],
)
def test_the_build_follows_gpu_and_driver(
    version: str, capability: tuple[int, int], driver: str | None, tag: str
) -> None:
    assert engines.build_for(engines.get(version), capability, driver, True)[:2] == (tag, [])


@pytest.mark.parametrize(
    ("version", "capability", "driver", "text"),
    [
        ("0.9.0", VOLTA, None, "no code for compute capability 7.0: it needs 7.5"),
        ("0.25.1", VOLTA, None, "no code for compute capability 7.0: it needs 7.5"),
        ("0.8.5", BLACKWELL, None, "no code for compute capability 12.0: it needs 7.0 to 9.0"),
        ("0.33.0", HOPPER, "575.64.03", "needs driver 580.65.06 or newer, the host has 575.64.03"),
        ("0.8.5", HOPPER, "470.10", "needs driver 525.60.13 or newer"),
    ],
)
def test_what_cannot_run_says_why(version: str, capability: tuple[int, int], driver: str | None, text: str) -> None:
    _, problems, _ = engines.build_for(engines.get(version), capability, driver, True)
    assert text in "; ".join(problems)


def test_an_old_driver_is_only_taken_with_a_warning() -> None:
    assert "may be refused" in engines.build_for(engines.get("0.8.5"), HOPPER, "535.129.03", True)[2][0]
    assert engines.build_for(engines.get("0.8.5"), HOPPER, "550.144.03", True)[2] == []


def test_a_virtual_environment_has_no_second_build() -> None:
    _, problems, _ = engines.build_for(engines.get("0.25.1"), HOPPER, "575.64.03", False)
    assert "needs driver 580.65.06" in problems[0]


@pytest.mark.parametrize(
    ("version", "capability", "core"),
    [
        ("0.3.0", HOPPER, "V0"),
        ("0.7.2", HOPPER, "V0"),
        ("0.8.5.post1", VOLTA, "V0"),
        ("0.8.5.post1", AMPERE, "V1"),
        ("0.25.1", TURING, "V1"),
    ],
)
def test_the_core_follows_release_and_gpu(version: str, capability: tuple[int, int], core: str) -> None:
    assert engines.get(version).core(capability) == core


@pytest.mark.parametrize(
    ("version", "mib", "name", "expected"),
    [
        ("0.25.1", 143771, "NVIDIA H200", (8192, 1024)),
        ("0.25.1", 81920, "NVIDIA A100-SXM4-80GB", (2048, 256)),
        ("0.25.1", 23028, "NVIDIA A10", (2048, 256)),
        ("0.28.0", 183359, "NVIDIA B200", (16384, 1024)),
        ("0.27.1", 183359, "NVIDIA B200", (8192, 1024)),
        ("0.6.3", 81920, "NVIDIA A100-SXM4-80GB", (None, 256)),
    ],
)
def test_batches_are_the_engines_own(version: str, mib: int, name: str, expected: tuple[int | None, int]) -> None:
    assert engines.get(version).batch_defaults(mib, name) == expected


@pytest.mark.parametrize(
    ("version", "architecture", "text"),
    [
        ("0.14.1", "StepVLForConditionalGeneration", "it came with 0.16.0"),
        ("0.25.1", "BaichuanForCausalLM", "0.23.0 is the last with it"),
        ("0.8.3", "Qwen3ForCausalLM", "it came with 0.8.4"),
        ("0.23.0", "BaichuanForCausalLM", None),
        ("0.25.1", "SomebodysOwnForCausalLM", None),
    ],
)
def test_model_classes_come_and_go(version: str, architecture: str, text: str | None) -> None:
    problem = engines.architecture_problem(engines.get(version), architecture)
    assert (problem is None) if text is None else (problem is not None and text in problem)


@pytest.mark.parametrize(
    ("version", "flag", "known"),
    [
        ("0.3.0", "--worker-use-ray", True),
        ("0.7.0", "--worker-use-ray", False),
        ("0.3.0", "--distributed-executor-backend", False),
        ("0.3.0", "--max-paddings", True),
        ("0.4.1", "--max-paddings", False),
        ("0.17.1", "--swap-space", True),
        ("0.18.0", "--swap-space", False),
        ("0.10.1", "--runner", True),
        ("0.10.0", "--runner", False),
        ("0.25.1", "--no-enable-prefix-caching", True),
        ("0.6.4", "--no-enable-prefix-caching", False),
        ("0.25.1", "--no-max-model-len", False),
        ("0.25.1", "-tp", True),
        ("0.25.1", "--there-is-no-such-flag", False),
    ],
)
def test_flags_are_known_from_their_first_to_their_last_release(version: str, flag: str, known: bool) -> None:
    assert engines.has_flag(version, flag) is known
    assert (engines.flag_problem(version, flag) is None) is known
    assert engines.option(version, flag, 1) == ([flag, "1"] if known else [])


@pytest.mark.parametrize(
    ("version", "flag", "text"),
    [
        ("0.25.1", "--worker-use-ray", "use --distributed-executor-backend ray"),
        ("0.3.0", "--distributed-executor-backend", "use --worker-use-ray"),
        ("0.25.1", "--swap-space", "0.17.1 is the last with it"),
        ("0.25.1", "--speculative-model", "use --speculative-config"),
        ("0.25.1", "--max-model-length", "did you mean --max-model-len?"),
        ("0.6.3", "--runner", "use --task"),
    ],
)
def test_an_unknown_flag_is_refused_with_its_replacement(version: str, flag: str, text: str) -> None:
    assert text in str(engines.flag_problem(version, flag))


def test_a_flag_that_vllm_rewrites_is_known() -> None:
    (flag,) = engines.flag_names(["-O3"])
    assert engines.flag_problem("0.25.1", flag) is None
    assert engines.flag_problem("0.11.0", flag) is None
    assert "it came with 0.6.5" in str(engines.flag_problem("0.6.0", flag))


def test_flags_are_read_in_all_their_spellings() -> None:
    args = ["--max_model_len=4096", "-tp", "2", "-O3", "--speculative-config.method", "ngram", "--seed", "-1"]
    assert list(engines.flag_names(args)) == ["--max-model-len", "-tp", "-O", "--speculative-config", "--seed"]


def test_quantized_weights_need_their_gpu() -> None:
    assert "need compute capability 7.5" in str(engines.quantization_problem("0.25.1", "awq", VOLTA))
    assert engines.quantization_problem("0.25.1", "gptq", VOLTA) is None
    assert engines.quantization_problem("0.25.1", "fp8", AMPERE) is None
    assert engines.quantization_problem("0.25.1", None, VOLTA) is None
    for method in ("mxfp4", "fbgemm_fp8", "experts_int8", "modelopt_mxfp8"):
        assert "need compute capability 8.0, the GPU has 7.5" in str(
            engines.quantization_problem("0.25.1", method, (7, 5))
        )
        assert engines.quantization_problem("0.25.1", method, AMPERE) is None


def test_the_gpu_that_quantized_weights_need_follows_the_release() -> None:
    assert "8.9 in vLLM 0.25.1" in str(engines.quantization_problem("0.25.1", "modelopt", AMPERE))
    assert engines.quantization_problem("0.30.0", "modelopt", AMPERE) is None
    assert "8.0 in vLLM 0.10.2" in str(engines.quantization_problem("0.10.2", "modelopt_fp4", (7, 5)))
    assert engines.quantization_problem("0.25.1", "modelopt_fp4", (7, 5)) is None
