# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible finds this collection's plugins as it does in a play."""

from __future__ import annotations

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

init_plugin_loader([str(Path(__file__).parents[4] / "collections")])
