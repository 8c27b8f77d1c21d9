# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Waits for several servers of one host."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ansible_collections.baremetal.vllm.plugins.action.vllm_wait import ActionModule as Wait


class ActionModule(Wait):
    """Looks at one after the other, again and again."""

    _supports_check_mode = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        ActionBase.run(self, tmp, task_vars)
        arguments = self.validate_argument_spec({"servers": {"type": "dict", "required": True}})[1]
        wrong = [name for name, wait in arguments["servers"].items() if not isinstance(wait, dict)]
        if wrong:
            raise AnsibleActionFail(f"servers[{wrong[0]}] is no dictionary: give the options of vllm_wait")
        return {"changed": False, "servers": self.wait_for_all(arguments["servers"], task_vars)}
