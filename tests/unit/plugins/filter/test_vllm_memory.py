# SPDX-License-Identifier: GPL-3.0-or-later
"""The filter vllm_memory, called through Ansible's templating."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
KEYS = [
    "activation_gib", "cuda_graph_gib", "fits", "kv_cache_gib", "kv_cache_tokens", "max_concurrency", "non_torch_gib",
    "reason", "requested_gib", "weights_gib",
]  # fmt: skip


def render(template: str, **variables: Any) -> Any:
    try:
        from ansible.template import trust_as_template

        template = trust_as_template(template)
    except ImportError:  # before ansible-core 2.19 every string was a template
        pass
    return Templar(loader=DataLoader(), variables=variables).template(template)


def test_every_argument_of_the_interface() -> None:
    memory = render(
        "{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=143771, compute_capability='9.0', "
        "engine_version='0.25.1', tensor_parallel_size=1, pipeline_parallel_size=1, gpu_memory_utilization=0.1442, "
        "max_model_len=32768, max_num_batched_tokens=2048, max_num_seqs=1024, enforce_eager=false, dtype='auto', "
        "kv_cache_dtype='auto', quantization=none) }}",
        config=QWEN,
    )
    assert sorted(memory) == KEYS
    assert memory["fits"] is True
    assert memory["kv_cache_tokens"] == pytest.approx(86160, rel=0.02)  # measured
    assert memory["weights_gib"] == pytest.approx(14.29, abs=0.01)


def test_the_same_defaults() -> None:
    short = render("{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=23028) }}", config=QWEN)
    long = render(
        "{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=23028, gpu_memory_utilization=0.9, "
        "max_model_len=4096, max_num_batched_tokens=2048, max_num_seqs=256) }}",
        config=QWEN,
    )
    assert short == long


def test_quantization_while_loading() -> None:
    plain = render("{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=23028) }}", config=QWEN)
    fp8 = render(
        "{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=23028, quantization='fp8') }}", config=QWEN
    )
    assert fp8["weights_gib"] < 0.6 * plain["weights_gib"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("", "vllm_memory: gpu_memory_total_mib is None; the GPU's memory in MiB is needed"),
        ("23028", "vllm_memory is 23028; give arguments by name"),
        ("gpu_memory_total_mib=-1", "gpu_memory_total_mib is -1; a size in MiB"),
        (
            "gpu_memory_total_mib=23028, gpu_memory_utilization=1.2",
            "gpu_memory_utilization is 1.2; above 0",
        ),
        ("gpu_memory_total_mib=23028, engine_version='9.9'", "engine_version is '9.9'; no such vLLM release"),
        ("gpu_memory_total_mib=23028, utilisation=0.9", "utilisation is 0.9; there is no such argument; there are"),
        ("gpu_memory_total_mib=23028, quantization='awq'", "quantization is 'awq'; the checkpoint is not quantized"),
        ("gpu_memory_total_mib=23028, quantization=4", "quantization is 4; the name of a method"),
        ("gpu_memory_total_mib=23028, tensor_parallel_size=0", "tensor_parallel_size is 0; give a whole number"),
    ],
)
def test_bad_input_is_one_error_that_names_it(arguments: str, text: str) -> None:
    with pytest.raises(AnsibleError, match=text):
        render(f"{{{{ config | baremetal.vllm.vllm_memory({arguments}) }}}}", config=QWEN)
