# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter plan_text."""

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_text
short_description: Show a plan as text, with a bar for each GPU
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Show a plan as text, with a bar for each GPU, and for each service its flags, its command line and what decided.
options:
  _input:
    description: What P(baremetal.vllm.vllm_plan#filter) returned.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the plan
  ansible.builtin.copy:
    content: "{{ vllm_services | baremetal.vllm.vllm_plan(hosts) | baremetal.vllm.plan_text }}"
    dest: plan.text
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The plan for people.
  type: str
"""

from typing import Any

from ansible.errors import AnsibleFilterError


def plan_text(plan: Any) -> str:
    """Render what vllm_plan returned."""
    if not isinstance(plan, dict) or not {"fits", "problems", "services", "gpus"} <= set(plan):
        raise AnsibleFilterError(f"plan_text: the input is {type(plan).__name__}; give it what vllm_plan returned")
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.render import as_text

    return as_text(plan)


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"plan_text": plan_text}
