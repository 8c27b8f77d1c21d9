# SPDX-License-Identifier: GPL-3.0-or-later
"""The one exception of the planner."""

from __future__ import annotations


class PlanError(ValueError):
    """Input that cannot be planned with. ``str()`` of it is one sentence for the person who wrote the input.

    Attributes:
        field: name of the input that is wrong, such as ``gpu_memory_utilization`` or ``config.hidden_size``.
        value: what was given.
        allowed: what would be right, or the way out.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(f"{field} is {shown}; {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed
