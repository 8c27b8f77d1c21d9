# SPDX-License-Identifier: GPL-3.0-or-later
"""An interface by its address, on this machine's own interfaces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[4] / "roles/vllm/files/baremetal_interface.py"
PLACES = [
    (place["local"], interface["ifname"])
    for interface in json.loads(subprocess.check_output(["ip", "-json", "address"]) or "[]")
    for place in interface["addr_info"]
]


def found(address: str) -> str:
    return subprocess.check_output([sys.executable, str(SCRIPT), address, "eth7"], text=True).strip()


def test_all_that_ip_shows() -> None:
    assert ("127.0.0.1", "lo") in PLACES
    for address, name in PLACES:
        # The same link-local address may be on several interfaces.
        assert found(address) in {other for place, other in PLACES if place == address}, (address, name)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::7", "gpu1.example", "10.0.0"])
def test_what_no_interface_has(address: str) -> None:
    assert found(address) == "eth7"
