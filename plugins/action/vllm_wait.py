# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Shows the stages of an engine's start while the module of this name waits."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# Seconds after which a stage that goes on is shown again.
SLICE_S = 60
display = Display()


class ActionModule(ActionBase):  # type: ignore[misc] # Ansible has no types
    """Calls the module in slices."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        arguments = {**self._task.args}
        if "slice" in arguments:  # somebody wants to do this himself
            answer: dict[str, Any] = self._execute_module(module_args=arguments, task_vars=task_vars)
            return answer
        name = (arguments.get("values") or {}).get("name") or arguments.get("url")
        host = (task_vars or {}).get("inventory_hostname", "")
        shown = ""
        while True:
            answer = self._execute_module(module_args={**arguments, "slice": SLICE_S}, task_vars=task_vars)
            if answer.get("failed") or not answer.get("starting"):
                return answer
            again = " still" if answer["stage"] == shown else ""
            shown = answer["stage"]
            display.display(
                f"  [{host}] {name}:{again} {shown} ({answer['seconds']:.0f} of at most {answer['limit']} s)"
            )
            arguments["begun"] = answer["begun"]
