# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter bench_loss."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bench_loss
short_description: How much slower a benchmark run was than the one before it
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Compares the throughput with the latest earlier run of the same load, at each number of clients that both have.
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
    required: true
"""

EXAMPLES = r"""
- name: Stop when the service has become slow
  ansible.builtin.assert:
    that: run | baremetal.vllm.bench_loss(earlier) < 10
"""

RETURN = r"""
_value:
  description: The greatest loss in percent; 0 when nothing was lost or there is nothing to compare with.
  type: float
"""

from typing import Any

from ansible.errors import AnsibleFilterError


def bench_loss(run: Any, others: Any) -> float:
    if not isinstance(run, dict) or not run.get("levels"):
        raise AnsibleFilterError(
            "bench_loss: the input is no run with levels; give it a file that the role bench wrote"
        )
    from ansible_collections.baremetal.vllm.plugins.plugin_utils import bench

    before = bench.previous(run, others)
    changes = bench.changes(run, before) if before else []
    losses: list[float] = [-row["throughput_percent"] for row in changes if row["throughput_percent"] is not None]
    return max([0.0, *losses])


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"bench_loss": bench_loss}
