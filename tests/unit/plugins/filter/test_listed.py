# SPDX-License-Identifier: GPL-3.0-or-later
"""Lists as they come: from YAML, by -e, from a survey."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.listed import listed


@pytest.mark.parametrize(
    ("value", "elements"),
    [
        (["12.9", "13.0"], ["12.9", "13.0"]), ((1, 2), [1, 2]), ([], []), (None, []), ("", []), (" ", []), (12.9, [12.9]),
        ("12.9", ["12.9"]), ("12.9, 13.0,", ["12.9", "13.0"]), ('["a,b", "c"]', ["a,b", "c"]), ("['a']", ["a"]), ("[]", []),
        ("[fe80::1]:80", ["[fe80::1]:80"]), ("[a", ["[a"]),
    ],
)  # fmt: skip
def test_elements(value: Any, elements: list[Any]) -> None:
    assert listed(value) == elements


@pytest.mark.parametrize(
    ("role", "name", "said", "used", "value"),
    [
        ("cuda_toolkit", "cuda_toolkit_versions", "12.9,13.0", "__cuda_toolkit_series", ["12.9", "13.0"]),
        ("cuda_toolkit", "cuda_toolkit_versions", 12.9, "__cuda_toolkit_series", ["12.9"]),
        ("docker", "docker_registry_mirrors", "https://a.example", "__docker_bad_mirrors", []),
        ("proxy", "proxy_open_paths", "/health,/version", "__proxy_open_paths", ["/health", "/version"]),
    ],
)
def test_in_roles(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], role: str, name: str, said: Any, used: str,
    value: list[str],
) -> None:  # fmt: skip
    assert list(render(f"{{{{ {used} }}}}", **role_vars(role, "main") | {name: said})) == value
