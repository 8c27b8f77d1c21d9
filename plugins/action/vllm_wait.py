# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Shows the stages of an engine's start while the module of this name waits."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

# Seconds after which a stage that goes on is shown again.
SLICE_S = 60
# Of several servers, each is looked at for so long before the next one is.
SHARED_SLICE_S = 3
MODULE = "baremetal.vllm.vllm_wait"
display = Display()


class ActionModule(ActionBase):  # type: ignore[misc] # Ansible has no types
    """Calls the module in slices."""

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        arguments = {**self._task.args}
        if "slice" in arguments:  # somebody wants to do this himself
            return self.wait(arguments, task_vars)
        name = (arguments.get("values") or {}).get("name") or arguments.get("url")
        return self.wait_for_all({name: arguments}, task_vars)[name]

    def wait(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module(module_name=MODULE, module_args=arguments, task_vars=task_vars)
        return answer

    def wait_for_all(
        self, waits: dict[str, dict[str, Any]], task_vars: dict[str, Any] | None
    ) -> dict[str, dict[str, Any]]:
        """Name -> the module's answer. Each in turn has a slice until all have answered or failed."""
        host, answers = (task_vars or {}).get("inventory_hostname", ""), {}
        shown: dict[str, tuple[str, float]] = {}
        left = {name: {**arguments} for name, arguments in waits.items()}
        limits: dict[str, int] = {}
        elapsed, limit = 0.0, 0
        while left:
            before = len(left)
            for name, arguments in list(left.items()):
                arguments["slice"] = SHARED_SLICE_S if len(left) > 1 else SLICE_S
                answer = self.wait(arguments, task_vars)
                elapsed = max(elapsed, answer.get("seconds", 0.0))
                if answer.get("failed") or not answer.get("starting"):
                    answers[name] = answer
                    del left[name]
                    continue
                arguments["begun"] = answer["begun"]
                limits.setdefault(name, answer["limit"])
                stage, since = shown.get(name, ("", 0.0))
                if answer["stage"] != stage or time.monotonic() - since >= SLICE_S:
                    still = " still" if answer["stage"] == stage else ""
                    display.display(
                        f"  [{host}] {name}:{still} {answer['stage']} ({answer['seconds']:.0f} of at most {answer['limit']} s)"
                    )
                    shown[name] = answer["stage"], time.monotonic()
            # They share the host's disk and processors: each may take as long as all would one after another, and no longer than those
            # that are left would from now on.
            if not limit:
                limit = sum(limits[name] for name in left)
            elif len(left) < before:
                limit = min(limit, int(elapsed) + sum(limits[name] for name in left))
            for arguments in left.values():
                arguments["begun"]["limit"] = limit
        return answers
