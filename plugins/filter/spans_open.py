# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: spans_open
short_description: Services over several hosts that not all of their hosts name
version_added: 0.1.0
description:
  - Each host says of which services its part is done, or runs. What one of the hosts does not name concerns all of them.
positional: said
options:
  _input:
    description: Services over several hosts, each with C(service) (its name) and C(hosts).
    type: list
    elements: dict
    required: true
  said:
    description: For each host the names that it says.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Show what does not run on all of its hosts
  ansible.builtin.debug:
    msg: "{{ spans | baremetal.vllm.spans_open({'gpu1': ['chat'], 'gpu2': []}) }}"
"""

RETURN = r"""
_value:
  description: The services that at least one of their hosts does not name.
  type: list
  elements: dict
"""

from collections.abc import Mapping
from typing import Any


def spans_open(spans: list[dict[str, Any]], said: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    return [span for span in spans if not all(span["service"] in said[host] for host in span["hosts"])]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"spans_open": spans_open}
