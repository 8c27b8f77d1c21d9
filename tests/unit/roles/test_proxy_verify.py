# SPDX-License-Identifier: GPL-3.0-or-later
"""What the proof of the proxy tells of each endpoint, by the role's own task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from support import ROOT

ROOT_URL = "https://gpu1:8443/v1"


@pytest.fixture
def told(render: Callable[..., Any]) -> Callable[[Any, Any], list[str]]:
    """told(proof of the host, proof of the controller) -> the lines of both"""
    (block,) = yaml.safe_load((ROOT / "roles/proxy/tasks/verify.yml").read_text())
    (task,) = [one for one in block["block"] if one["name"] == "Show what clients use"]

    def told(here: Any, client: Any) -> list[str]:
        item = {"base_url": ROOT_URL, "model": "m", "api_key_file": "/k", "hosts": [], "ca_file": ""}
        given = {"__proxy_here": here, "__proxy_client": client, "item": item, "inventory_hostname": "gpu1"}
        proofs = render(task["vars"]["__proxy_proofs"], **given)
        return str(render(task["ansible.builtin.debug"]["msg"], __proxy_proofs=proofs, **given)).splitlines()[-2:]

    return told


def proof(url: str = ROOT_URL, **result: Any) -> dict[str, Any]:
    return {"__proxy_endpoint": {"base_url": url}, **result}


def test_what_was_proved_and_why_not(told: Callable[[Any, Any], list[str]]) -> None:
    here = {"results": [proof("https://gpu1:8444/v1", told="of another"), proof(told="health, closed")]}
    refused = {"results": [proof(told="it does not let us in", skipped=True)]}
    assert told(here, refused) == ["host       health, closed", "client     it does not let us in"]
    assert told(refused, here) == ["host       it does not let us in", "client     health, closed"]


@pytest.mark.parametrize("client", [{"results": [proof(skipped=True)]}, {"results": []}, {"skipped": True}])
def test_a_proof_that_was_not_asked_for(told: Callable[[Any, Any], list[str]], client: Any) -> None:
    here = {"results": [proof(told="health, closed")]}
    assert told(here, client) == ["host       health, closed", "client     not asked from the controller"]
