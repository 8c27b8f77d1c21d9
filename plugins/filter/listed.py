# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: listed
short_description: A list that may have come as text
version_added: 0.1.0
description:
  - By C(-e name=a,b), in an INI inventory and from a survey of AWX a list comes as text, which the specification of a role accepts and
    does not convert. Used as it is, each of its letters would be an element.
options:
  _input:
    description: A list, text with commas, text that is a list in YAML or JSON, one value, or nothing.
    type: raw
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Install toolkits
  ansible.builtin.include_tasks: toolkit.yml
  loop: "{{ cuda_toolkit_versions | baremetal.vllm.listed }}" # also with -e cuda_toolkit_versions=12.9,13.0
"""

RETURN = r"""
_value:
  description: The elements as they were given; those of text are text without blanks around them, and none is empty.
  type: list
  elements: raw
"""

import contextlib
from typing import Any

import yaml


def listed(value: Any) -> list[Any]:
    """Raises nothing: what is no list in YAML is taken apart at its commas."""
    if isinstance(value, str) and value.strip().startswith("["):
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(value)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"listed": listed}
