# SPDX-License-Identifier: GPL-3.0-or-later
"""An interface by its address, on this machine's own interfaces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[4] / "roles/vllm/files/baremetal_interface.py"


def places() -> set[tuple[str, str]]:
    """(address, interface) of this machine."""
    shown = json.loads(subprocess.check_output(["ip", "-json", "address"]) or "[]")
    return {(place["local"], one["ifname"]) for one in shown for place in one.get("addr_info", [])}


def found(address: str) -> str:
    return subprocess.check_output([sys.executable, str(SCRIPT), address, "eth7"], text=True).strip()


def test_all_that_ip_shows() -> None:
    before = places()
    answers = {address: found(address) for address, _ in before}
    stayed = before & places()  # containers come and go, and interfaces with them
    assert ("127.0.0.1", "lo") in stayed
    for address, _ in stayed:
        # The same link-local address may be on several interfaces.
        assert (address, answers[address]) in before, address


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7", "gpu1.example", "10.0.0"])
def test_what_no_interface_has(address: str) -> None:
    assert found(address) == "eth7"
