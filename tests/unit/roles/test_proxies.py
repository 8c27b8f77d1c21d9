# SPDX-License-Identifier: GPL-3.0-or-later
"""baremetal_http_proxy and its like hold for everything that roles fetch on a host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from support import ROOT

ROLES = ["model", "proxy", "ray_cluster", "vllm"]  # the others have blocks with an environment
FETCHING = {
    *(f"ansible.builtin.{name}" for name in ("apt", "dnf", "get_url", "git", "package", "pip", "uri")),
    *(f"baremetal.vllm.{name}" for name in ("model_fetch", "model_info", "vllm_venv")),
}


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    for one in node:
        yield one
        for name in ("block", "rescue", "always"):
            yield from tasks(one.get(name, []))


def fetches(task: dict[str, Any]) -> bool:
    """On the host itself. Who waits for a process fetches nothing, and images are fetched by Docker, which has its own."""
    if task.get("delegate_to") == "localhost":
        return False
    image = task.get("baremetal.vllm.container_image") or {}
    waits = (task.get("baremetal.vllm.model_fetch") or {}).get("state") == "finished"
    return ("packages" in image) or (bool(FETCHING & set(task)) and not waits)


@pytest.mark.parametrize("role", ROLES)
def test_what_fetches_goes_through_the_proxy(role: str) -> None:
    found = [
        (path.name, task)
        for path in sorted((ROOT / "roles" / role / "tasks").glob("*.yml"))
        for task in tasks(yaml.safe_load(path.read_text()))
    ]
    assert any(fetches(task) for _, task in found)
    wanted = f"{{{{ __{role}_proxy }}}}"
    wrong = [f"{name}: {task['name']}" for name, task in found if fetches(task) != (task.get("environment") == wanted)]
    assert wrong == []


def outside(node: Any, wanted: str) -> Iterator[dict[str, Any]]:
    """Tasks that are in no block with that environment."""
    for one in node:
        if one.get("environment") == wanted:
            continue
        yield one
        for name in ("block", "rescue", "always"):
            yield from outside(one.get(name, []), wanted)


def test_dify_is_fetched_through_the_proxy() -> None:
    node = yaml.safe_load((ROOT / "roles/dify/tasks/main.yml").read_text())
    assert [task["name"] for task in outside(node, "{{ __dify_proxy }}") if fetches(task)] == []
    assert any(fetches(task) for task in tasks(node))


@pytest.mark.parametrize("role", [*ROLES, "cuda_toolkit", "dify", "nvidia_container_toolkit", "nvidia_driver"])
def test_the_proxy_is_what_the_variables_say(
    role_vars: Callable[..., dict[str, Any]], render: Callable[..., Any], role: str
) -> None:
    template = role_vars(role, "main")[f"__{role}_proxy"]
    assert render(template) == {}
    given = {
        "baremetal_https_proxy": "http://me:word@proxy:3128",
        "baremetal_no_proxy": "hub.inside",
        "baremetal_http_proxy": "",
    }
    assert render(template, **given) == {"https_proxy": "http://me:word@proxy:3128", "no_proxy": "hub.inside"}
