# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter plan_hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: plan_hosts
short_description: Describe hosts that do not exist yet by their GPUs
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Turns a line such as C(4x A10) into hosts as P(baremetal.vllm.vllm_plan#filter) takes them, with memory, compute
    capability and links from the catalog of GPUs.
options:
  _input:
    description:
      - C(4x A10) is one host with four GPUs, C(1x H100 + 2x L4) one with two kinds, C(3x(2x V100-16GB)) three hosts and
        C(3x(2x A10), 1x(8x H100)) four.
      - A kind may be followed by C(nvlink) (bridges are fitted), C(pcie) or C(no-p2p).
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Would it fit on four A10?
  ansible.builtin.debug:
    msg: "{{ (vllm_services | baremetal.vllm.vllm_plan('4x A10' | baremetal.vllm.plan_hosts)).problems }}"
"""

RETURN = r"""
_value:
  description: The hosts, named host1, host2 and so on.
  type: list
  elements: dict
"""

from typing import Any

from ansible.errors import AnsibleFilterError

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.errors import PlanError


def plan_hosts(text: Any) -> list[dict[str, Any]]:
    """Hosts from a line of text."""
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text

    try:
        return hosts_from_text(text)
    except PlanError as error:
        raise AnsibleFilterError(f"plan_hosts: {error}") from error


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"plan_hosts": plan_hosts}
