# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter bench_text."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bench_text
short_description: Show a benchmark run as a table of plain text
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - One line for each number of clients, with what changed since the latest earlier run of the same load.
positional: others
options:
  _input:
    description: A run as the role C(bench) keeps it.
    type: dict
    required: true
  others:
    description: Runs that may be the one before it.
    type: list
    elements: dict
    default: []
"""

EXAMPLES = r"""
- name: Show the run
  ansible.builtin.debug:
    msg: "{{ run | baremetal.vllm.bench_text(earlier) }}"
"""

RETURN = r"""
_value:
  description: The table.
  type: str
"""

from typing import Any

from ansible.errors import AnsibleFilterError


def bench_text(run: Any, others: Any = ()) -> str:
    if not isinstance(run, dict) or not run.get("levels"):
        raise AnsibleFilterError(
            "bench_text: the input is no run with levels; give it a file that the role bench wrote"
        )
    from ansible_collections.baremetal.vllm.plugins.plugin_utils import bench

    return bench.as_text(run, bench.previous(run, others))


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"bench_text": bench_text}
