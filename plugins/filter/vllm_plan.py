# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter vllm_plan."""

from __future__ import annotations

DOCUMENTATION = r"""
name: vllm_plan
short_description: Plan which vLLM service runs on which GPUs, with which flags
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Turns what the hosts have and what they should serve into a layout (tensor, pipeline and data parallel sizes, GPUs,
    memory, image, flags), or says with the arithmetic why it cannot run and what nearest thing can.
  - What a service sets is kept and checked; what it leaves out is planned. Nothing is asked of any host.
positional: hosts
options:
  _input:
    description:
      - The services.
      - C(name) and C(model) are needed, and C(config) (the model's config.json) unless the model is in the catalog.
      - Optional are C(model_path), C(served_model_name), C(weights_gib), C(safetensors), C(objective) (V(throughput) or
        V(latency)), C(max_model_len), C(min_concurrency), C(gpus) (a number or a list of indices), C(hosts) (names),
        C(engine_version), C(runtime) (V(container) or V(venv)), C(device) (V(cuda) or V(cpu)), C(port), C(image),
        C(env), C(extra_args), C(tensor_parallel_size), C(pipeline_parallel_size), C(data_parallel_size),
        C(gpu_memory_utilization), C(max_num_seqs), C(max_num_batched_tokens), C(dtype), C(kv_cache_dtype),
        C(quantization), C(enforce_eager), C(executor) (V(ray) or V(mp)), C(trust_remote_code),
        C(enable_expert_parallel) and C(task) (V(generate), V(embed) or V(score); where it is left out, what flags among
        C(extra_args) say, or what the model's architecture is made for).
    type: list
    elements: dict
    required: true
  hosts:
    description:
      - The hosts, each C({name, gpus, links, p2p, network, driver_version, cpu}), as M(baremetal.vllm.gpu_facts) has
        them in C(ansible_facts.gpu), with C(name) added.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Plan for hosts whose facts are known
  ansible.builtin.set_fact:
    plan: "{{ vllm_services | baremetal.vllm.vllm_plan(hosts) }}"
  vars:
    hosts:
      - {name: gpu1, gpus: [{index: 0, name: NVIDIA A10, memory_total_mib: 23028, compute_capability: "8.6"}]}
    vllm_services:
      - {name: chat, model: Qwen/Qwen2.5-7B-Instruct, max_model_len: 8192}

- name: Stop before anything is changed
  ansible.builtin.assert:
    that: plan.fits
    fail_msg: "{{ plan.problems }}"
"""

RETURN = r"""
_value:
  description: The plan.
  type: dict
  contains:
    fits:
      description: Every service can run.
      type: bool
    problems:
      description: What cannot run, why, and what nearest thing can.
      type: list
      elements: str
    services:
      description:
        - For each service C(name), C(fits), C(problems), C(hosts), C(gpus) (indices by host), C(gpu_uuids),
          C(tensor_parallel_size), C(pipeline_parallel_size), C(data_parallel_size),
          C(api_server_count) (none where vLLM decides), C(gpu_memory_utilization), C(max_model_len), C(max_num_seqs),
          C(max_num_batched_tokens), C(dtype), C(enforce_eager), C(executor),
          C(engine_version), C(image), C(command), C(env), C(args), C(port), C(memory) and C(why).
        - C(instances) has the same for each server where there are several. C(node_args) of an instance has the
          arguments of each host where stages span hosts without Ray.
      type: list
      elements: dict
    gpus:
      description: For each GPU where its memory goes, in GiB.
      type: list
      elements: dict
"""

from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError


def vllm_plan(services: Any, hosts: Any) -> dict[str, Any]:
    """Plan the services on the hosts."""
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.plan import make_plan

    try:
        return make_plan(services, hosts)
    except PlanError as error:
        raise AnsibleFilterError(f"vllm_plan: {error}") from error


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"vllm_plan": vllm_plan}
