# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter vllm_memory."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vllm_memory
short_description: Where the memory of one GPU goes when a vLLM engine starts on it
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Computes what vLLM would measure at its start - weights, activations, libraries, CUDA graphs and what is left for
    the KV cache - and whether the engine starts at all.
  - Nothing is asked of any host. The derivation is in C(docs/memory-model.md).
options:
  _input:
    description: The content of the model's C(config.json).
    type: dict
    required: true
  gpu_memory_total_mib:
    description: Memory of the GPU in MiB, as C(nvidia-smi) shows it.
    type: float
    required: true
  compute_capability:
    description: Compute capability of the GPU.
    type: str
    default: "9.0"
  engine_version:
    description: Version of vLLM.
    type: str
    default: 0.25.1
  tensor_parallel_size:
    description: GPUs that share each layer.
    type: int
    default: 1
  pipeline_parallel_size:
    description: Stages that the layers are dealt to.
    type: int
    default: 1
  gpu_memory_utilization:
    description: Share of the GPU's memory that the engine takes.
    type: float
    default: 0.9
  max_model_len:
    description: Longest context of a request, in tokens.
    type: int
    default: 4096
  max_num_batched_tokens:
    description: Tokens of one step.
    type: int
    default: 2048
  max_num_seqs:
    description: Requests of one step.
    type: int
    default: 256
  enforce_eager:
    description: Neither compile nor capture CUDA graphs.
    type: bool
    default: false
  dtype:
    description: Data type of weights and activations.
    type: str
    choices: [auto, bfloat16, float16, half, float32, float]
    default: auto
  kv_cache_dtype:
    description: Data type of the KV cache.
    type: str
    choices: [auto, bfloat16, float16, fp8, fp8_e4m3, fp8_e5m2, fp8_ds_mla]
    default: auto
  quantization:
    description: What C(--quantization) is, where the checkpoint does not say it. V(none) is the same as leaving it out.
    type: str
"""

EXAMPLES = r"""
- name: Ask whether a model fits before anything is installed
  ansible.builtin.debug:
    msg: "{{ config | baremetal.vllm.vllm_memory(gpu_memory_total_mib=23028, compute_capability='8.6') }}"
  vars:
    config: "{{ lookup('ansible.builtin.file', 'config.json') | from_json }}"
"""

RETURN = r"""
_value:
  description: Memory of the GPU that has the least left for the KV cache. Sizes in GiB of 2**30 bytes.
  type: dict
  contains:
    requested_gib: {description: What the engine asks for., type: float}
    weights_gib: {description: Weights on this GPU., type: float}
    activation_gib: {description: The highest peak of a full batch., type: float}
    non_torch_gib: {description: CUDA libraries and communication buffers., type: float}
    cuda_graph_gib: {description: What captured CUDA graphs take., type: float}
    kv_cache_gib: {description: What is left for the KV cache. Negative where something is missing., type: float}
    kv_cache_tokens: {description: Tokens that the KV cache holds., type: int}
    max_concurrency: {description: Requests of C(max_model_len) tokens that it holds., type: float}
    fits: {description: The engine starts., type: bool}
    reason: {description: Why, with the arithmetic., type: str}
"""

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError

ARGUMENTS = (
    "gpu_memory_total_mib", "compute_capability", "engine_version", "tensor_parallel_size", "pipeline_parallel_size",
    "gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enforce_eager", "dtype",
    "kv_cache_dtype", "quantization",
)  # fmt: skip


def vllm_memory(config: Mapping[str, Any], *positional: object, **arguments: Any) -> dict[str, Any]:
    """Memory of one engine; the arguments are those of the planner's ``engine_memory`` with the same names."""
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.memory import engine_memory
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config

    try:
        if positional:
            raise PlanError("vllm_memory", positional[0], "give arguments by name, such as gpu_memory_total_mib=23028")
        for name in arguments:
            if name not in ARGUMENTS:
                raise PlanError(name, arguments[name], f"there is no such argument; there are {', '.join(ARGUMENTS)}")
        if "gpu_memory_total_mib" not in arguments:
            raise PlanError("gpu_memory_total_mib", None, "the GPU's memory in MiB is needed, as nvidia-smi shows it")
        quantization = arguments.pop("quantization", None)
        if quantization is not None and not isinstance(quantization, str):
            raise PlanError("quantization", quantization, "the name of a method, or none")
        shape = parse_config(config, quantization=quantization, dtype=arguments.get("dtype", "auto"))
        return engine_memory(shape, **arguments).as_dict()  # pylint: disable=missing-kwoa # checked above
    except PlanError as error:
        raise AnsibleFilterError(f"vllm_memory: {error}") from error


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"vllm_memory": vllm_memory}
