# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Gives the module gpu_facts the controller's catalog of GPUs, so that a GPU has a name before there is a driver."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import pci_catalog


class ActionModule(ActionBase):
    """Runs the module on the host."""

    _supports_async = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        result: dict[str, Any] = super().run(tmp, task_vars)
        args = {"catalog": pci_catalog(), **self._task.args}
        result.update(
            self._execute_module("baremetal.vllm.gpu_facts", args, task_vars=task_vars, wrap_async=self._task.async_val)
        )
        return result
