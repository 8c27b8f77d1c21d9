#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""honest.py LOG: names the hosts that converge changed although check mode, just before it, said that nothing would change."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

changed: dict[str, dict[str, int]] = defaultdict(dict)
step = ""
for line in Path(sys.argv[1]).read_text().splitlines():
    if found := re.search(r"\[\S+ > (\w+)\] Executing", line):
        step = found[1]
    elif found := re.match(r"(\S+)\s+: ok=\d+\s+changed=(\d+)", line):
        changed[step].setdefault(found[1], int(found[2]))
silent = [host for host, count in changed["converge"].items() if count and changed["check"].get(host) == 0]
if silent:
    sys.exit(f"check mode said nothing of what converge then changed on {', '.join(silent)}")
