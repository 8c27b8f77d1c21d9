# SPDX-License-Identifier: GPL-3.0-or-later
"""Dify's settings as the role dify writes them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any


def test_settings(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> None:
    """Dify's own scripts ask for the words true and false."""

    def text(words: str) -> dict[str, str]:
        return {"content": base64.b64encode(words.encode()).decode()}

    written = render(
        "{{ __dify_env_file }}",
        **role_vars("dify", "main")
        | {
            "__dify_example": text("LOG_LEVEL=INFO\nNGINX_HTTPS_ENABLED=false\n"),
            "__dify_key": text("secret\n"),
            "dify_env": {"NGINX_HTTPS_ENABLED": True, "MIGRATION_ENABLED": False, "WORKERS": 4, "NAME": "True North"},
        },
    ).split("\n")
    assert "LOG_LEVEL=INFO" in written and "NGINX_HTTPS_ENABLED=false" not in written
    for line in ("NGINX_HTTPS_ENABLED='true'", "MIGRATION_ENABLED='false'", "WORKERS='4'", "NAME='True North'"):
        assert line in written
