# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter bench_html."""

from __future__ import annotations

DOCUMENTATION = r"""
name: bench_html
short_description: Show benchmark runs as one self-contained page with plots
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Throughput and latency over the number of clients, one colour a run, then each run's table.
  - Each table says how much higher its figures are than those of the run of the same load before it, as
    P(baremetal.vllm.bench_text#filter) does. Runs of other loads than the first one's are left out.
positional: heading, shown
options:
  _input:
    description: Runs as the role C(bench) keeps them. The page is about the first one.
    type: list
    elements: dict
    required: true
  heading:
    description: Heading of the page.
    type: str
    default: vLLM benchmark
  shown:
    description: How many of the other runs are shown, the latest ones. Left out, all of them are.
    type: int
"""

EXAMPLES = r"""
- name: Write the page
  ansible.builtin.copy:
    content: "{{ [run, earlier] | baremetal.vllm.bench_html }}"
    dest: report.html
    mode: "0644"
"""

RETURN = r"""
_value:
  description: The page.
  type: str
"""

from typing import Any

from ansible.errors import AnsibleFilterError


def bench_html(runs: Any, heading: str = "vLLM benchmark", shown: int | None = None) -> str:
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) and run.get("levels") for run in runs):
        raise AnsibleFilterError(
            "bench_html: the input is no list of runs with levels; give it files that the role bench wrote"
        )
    from ansible_collections.baremetal.vllm.plugins.plugin_utils import bench

    return bench.as_html(runs, heading, shown)


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"bench_html": bench_html}
