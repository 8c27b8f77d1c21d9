# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.files_match import files_match
from ansible_collections.baremetal.vllm.plugins.modules.host_probe import fingerprint

OWNER = pwd.getpwuid(os.getuid()).pw_name


@pytest.fixture
def file(tmp_path: Path) -> dict[str, str]:
    """A file that is as it should be."""
    path = tmp_path / "env"
    path.write_text("A=gr\u00fc\u00df\n")
    path.chmod(0o600)
    return {"path": str(path), "content": "A=gr\u00fc\u00df\n", "mode": "0600", "owner": OWNER}


def test_what_the_probe_sees_is_what_is_compared(file: dict[str, str]) -> None:
    seen = {file["path"]: fingerprint(file["path"])}
    assert files_match([file], seen) is True
    for field, other in (("content", "A=2\n"), ("mode", "0644"), ("owner", "nobody"), ("path", "/nowhere")):
        assert files_match([file, {**file, field: other}], seen) is False, field


@pytest.mark.parametrize("fingerprints", [{}, {"/x": ""}])
def test_a_missing_file_does_not_match(fingerprints: dict[str, str]) -> None:
    assert files_match([{"path": "/x", "content": "", "mode": "0600", "owner": OWNER}], fingerprints) is False


def test_no_files_match() -> None:
    assert files_match([], {}) is True


def test_in_a_template(render: Callable[..., Any], file: dict[str, str]) -> None:
    seen = {file["path"]: fingerprint(file["path"])}
    assert render("{{ files | baremetal.vllm.files_match(seen) }}", files=[file], seen=seen) is True
