# SPDX-License-Identifier: GPL-3.0-or-later
"""Ansible imports all filters of a collection, in each of its processes anew, where a task uses one of them."""

from __future__ import annotations

import os
import subprocess
import sys

from support import ROOT

LOAD = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module("ansible_collections.baremetal.vllm.plugins.filter." + name)
ours = [name.partition(".plugin_utils.")[2] for name in sys.modules if ".vllm.plugins.plugin_utils." in name]
print(*sorted(ours), *(["cryptography"] if "cryptography.x509" in sys.modules else []))
"""


def test_a_filter_imports_what_is_large_when_it_is_called() -> None:
    names = [path.stem for path in (ROOT / "plugins" / "filter").glob("[!_]*.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, *names], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert loaded.split() == ["planner", "planner.errors"]
