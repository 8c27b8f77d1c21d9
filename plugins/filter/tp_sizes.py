# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter tp_sizes."""

from __future__ import annotations

DOCUMENTATION = r"""
name: tp_sizes
short_description: Tensor-parallel sizes that vLLM accepts for a model
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Reads a model's C(config.json) and says over how many GPUs vLLM can split each layer, by vLLM's own rules.
  - Attention heads, KV heads (divided or repeated), the padded vocabulary, intermediate sizes, experts, and the blocks
    and groups of quantized weights all have to agree.
options:
  _input:
    description: The content of the model's C(config.json).
    type: dict
    required: true
  max:
    description: Largest size to try, from 1 to 1024.
    type: int
    default: 16
"""

EXAMPLES = r"""
- name: Show over how many GPUs the model can be split
  ansible.builtin.debug:
    msg: "{{ lookup('ansible.builtin.file', 'config.json') | from_json | baremetal.vllm.tp_sizes(max=8) }}"
"""

RETURN = r"""
_value:
  description: The sizes, smallest first.
  type: list
  elements: int
  sample: [1, 2, 4]
"""

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError


def tp_sizes(config: Mapping[str, Any], max: int = 16) -> list[int]:
    """Valid sizes from 1 to ``max`` for the content of a config.json."""
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import model

    try:
        return model.tp_sizes(config, max)
    except PlanError as error:
        raise AnsibleFilterError(f"tp_sizes: {error}") from error


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"tp_sizes": tp_sizes}
