# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Waits for a model with one line of progress every few seconds; everything else is the module's."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

GIB = 1024**3
MIB = 1024**2
POLL_S = 2  # at most so long between two looks


def seconds(number: float) -> str:
    minutes, rest = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def line(name: str, progress: dict[str, Any], rate: float | None) -> str:
    """Percent, amount, rate in MiB/s and time left, as plain text. rate: bytes a second, None before it is known."""
    total, done = progress["total_bytes"], max(0, progress["done_bytes"])
    percent = 100 * done // total if total else 100
    text = f"{name}: {progress['state']} {percent} %, {done / GIB:.2f} of {total / GIB:.2f} GiB"
    if rate:
        text += f", {rate / MIB:.1f} MiB/s, {seconds((total - done) / rate)} left"
    elif rate is not None:
        text += ", nothing comes at the moment"
    return text


class ActionModule(ActionBase):
    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        arguments = self._task.args
        result = self._poll(task_vars)
        if arguments.get("state") != "finished":
            return result
        interval = max(1, int(arguments.get("interval", 10)))
        host = "controller" if self._task.delegate_to else task_vars.get("inventory_hostname", "")
        name = f"{host} {arguments['model']['model']}".strip()
        started = shown = time.monotonic()
        seen: list[tuple[float, int]] = []
        while result.get("progress", {}).get("state") in ("starting", "fetching", "verifying", "placing"):
            progress, now = result["progress"], time.monotonic()
            # Over the last half minute, so that a stall shows and a hiccup does not.
            seen = [*(entry for entry in seen if now - entry[0] < 30), (now, progress["done_bytes"])]
            if now - shown >= interval:
                span = now - seen[0][0]
                rate = max(0, progress["done_bytes"] - seen[0][1]) / span if span > 1 else None
                Display().display(line(name, progress, rate))
                shown = now
            time.sleep(min(POLL_S, interval, 0.3 + (now - started) / 10))
            result = self._poll(task_vars)
        if not result.get("failed") and result.get("changed") and not self._task.check_mode:
            result["msg"] = self._summary(result["progress"], time.monotonic() - started)
            Display().display(f"{name}: {result['msg']}")
        return result

    def _poll(self, task_vars: dict[str, Any]) -> dict[str, Any]:
        return self._execute_module(module_name="baremetal.vllm.model_fetch", task_vars=task_vars)

    @staticmethod
    def _summary(progress: dict[str, Any], elapsed: float) -> str:
        parts = [
            f"{progress[key] / GIB:.2f} GiB from {where}"
            for key, where in (("hub_bytes", "the hub"), ("peer_bytes", "neighbours"))
            if progress.get(key)
        ]
        return "; ".join(
            [f"{', '.join(parts) or 'nothing to fetch'} in {seconds(elapsed)}", *progress.get("notes", [])]
        )
