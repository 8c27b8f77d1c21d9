# SPDX-License-Identifier: GPL-3.0-or-later
"""The script by which the role docker asks dockerd what it thinks of settings, with stand-ins for old and new engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parents[3] / "roles" / "docker" / "files"

DOCKERD = """#!/bin/sh
[ "{version}" = new ] && for word; do [ "$word" = --validate ] && exit 0; done
echo "{says}" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("version", "says", "code"),
    [
        ("28.1", "", 0),
        ("20.10.24", "unable to parse logging level: validate-only", 0),
        ("20.10.24", "the following directives don't match any configuration option: x", 1),
    ],
)
def test_validate_speaks_to_old_and_new_engines(tmp_path, version, says, code):
    dockerd = tmp_path / "dockerd"
    dockerd.write_text(DOCKERD.format(version="new" if version.startswith("28") else "old", says=says))
    dockerd.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(FILES / "validate.py"), str(dockerd), version, "-H", "fd://"],
        input=json.dumps({"log-level": "info"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (code, says if code else "")
