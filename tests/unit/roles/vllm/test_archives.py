# SPDX-License-Identifier: GPL-3.0-or-later
"""When the role vllm asks container_image again about an image that is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


@pytest.mark.parametrize(
    ("checksum", "kept", "installed"),
    [
        ("", {}, True),
        (ONE, {}, False),
        (ONE, {"v:1": {"id": "sha256:a", "checksum": ONE}, "v:2": {"id": "sha256:b", "checksum": TWO}}, True),
        (TWO, {"v:1": {"id": "sha256:a", "checksum": ONE}}, False),
        (ONE, {"v:1": {"id": "sha256:somebodys", "checksum": ONE}}, False),
    ],
)
def test_an_image_of_an_archive(
    render: Callable[..., Any],
    role_vars: Callable[..., dict[str, Any]],
    checksum: str,
    kept: dict[str, dict[str, str]],
    installed: bool,
) -> None:
    variables = role_vars("vllm", "main") | {
        "__vllm_all": [
            {"image": {"reference": "v:1", "archive": "/a.tar", "checksum": checksum}},
            {"image": {"reference": "v:3", "archive": "", "checksum": ""}},
            {"venv": None},
        ],
        "__vllm_engine": {
            "docker": {"images": {"v:1": "sha256:a", "v:3": "sha256:c"}},
            "files": {"/var/lib/baremetal/images.json": json.dumps(kept)} if kept else {},
        },
        "__vllm_readiness": {"prepared": True, "missing": []},
        "__vllm_host_files": [],
        "__vllm_probe": {"fingerprints": {}, "users": ["vllm"]},
        "__vllm_manager": "systemd",
    }
    assert render("{{ __vllm_installed }}", **variables) is installed


def test_a_user_that_is_missing_is_something_to_install(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    known = {
        "__vllm_readiness": {"prepared": True, "missing": []}, "__vllm_all": [], "__vllm_images": [], "__vllm_archives": [],
        "__vllm_host_files": [], "__vllm_manager": "systemd",
    }  # fmt: skip
    variables = {**role_vars("vllm", "main"), **known}
    for users, installed in ((["vllm"], True), ([], False)):
        seen = {"fingerprints": {}, "users": users}
        assert render("{{ __vllm_installed }}", **variables, __vllm_probe=seen) is installed
