# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: models_here
short_description: The models that a host must have
version_added: 0.1.0
description:
  - All that were read on it, less those of services that are planned for other hosts alone. One model that several services
    use stands there once.
positional: host, plan
options:
  _input:
    description: RV(ignore:models) of M(baremetal.vllm.model_info).
    type: dict
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
  plan:
    description: Result of P(baremetal.vllm.vllm_plan#filter), or nothing.
    type: dict
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Show them
  ansible.builtin.debug:
    msg: "{{ model_infos | baremetal.vllm.models_here(inventory_hostname, vllm_plan_result) }}"
"""

RETURN = r"""
_value:
  description: The facts about each model.
  type: list
  elements: dict
"""

from typing import Any


def models_here(infos: dict[str, Any], host: str, plan: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    placed = {
        service["name"]: {name for instance in service["instances"] for name in instance["hosts"]}
        for service in (plan or {}).get("services", [])
    }
    here: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, info in infos.items():
        if host in placed.get(name, {host}):
            here.setdefault((info["path"], info["revision"], info["problem"]), info)
    return list(here.values())


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"models_here": models_here}
