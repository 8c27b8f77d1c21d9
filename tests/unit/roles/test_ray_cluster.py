# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role ray_cluster makes of its variables; on hosts: tests/cluster."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

OLD, NEW, ODD = ({"path": f"/usr/bin/{name}", "version": version, "venv": True, "headers": True}
                 for name, version in (("python3.11", "3.11.2"), ("python3", "3.12.3"), ("python3.14", "3.14.0")))  # fmt: skip


def stamp(path: str) -> str:
    return json.dumps({"python": [path, "3.11"], "packages": ["ray[default]==2.60.0"], "without": [], "torch": None})


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (None, NEW),  # no environment yet
        ("", NEW),  # written before the power went
        (stamp("/usr/bin/python3.11"), OLD),  # another Python comes first since it was made
        (stamp("/usr/bin/python3.10"), NEW),  # its own has gone
    ],
)
def test_an_environment_stays_with_its_python(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], text: str | None, first: dict[str, Any]
) -> None:
    said = role_vars("ray_cluster", "main")
    place = render("{{ __ray_cluster_stamp }}", **said)
    probe = {"pythons": [ODD, NEW, OLD], "files": {} if text is None else {place: text}}
    usable = render("{{ __ray_cluster_usable }}", **said, __ray_cluster_probe=probe)
    assert [python["path"] for python in usable] == [first["path"], (OLD if first is NEW else NEW)["path"]]


@pytest.mark.parametrize(
    ("lost", "anew"),
    [
        ({}, False),
        ({"here": "settings"}, True),
        ({"here": "token"}, True),
        ({"head": "token"}, True),  # all get another
        ({"other": "token"}, False),
        ({"here": "noted"}, True),  # a run ended before the restart
        ({"other": "noted"}, False),
    ],
)
def test_what_makes_a_node_start_anew(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], lost: dict[str, str], anew: bool
) -> None:
    said = role_vars("ray_cluster", "main") | {
        "ray_cluster_head": "head",
        "__ray_cluster_files": [{"path": "/s", "mode": "0600", "owner": "ray", "content": "settings"}],
    }
    names = {"settings": "/s", "token": render("{{ __ray_cluster_token }}", **said)}
    noted = render("{{ __ray_cluster_restart_file }}", **said)
    right = f"{hashlib.sha256(b'settings').hexdigest()} 0600 ray"
    probes = {
        host: {names["settings"]: right, names["token"]: "sum 0600 ray", noted: ""}
        for host in ("head", "here", "other")
    }
    for host, what in lost.items():
        probes[host] |= {noted: "sum 0600 root"} if what == "noted" else {names[what]: ""}
    hostvars = {host: {"__ray_cluster_probe": {"fingerprints": prints}} for host, prints in probes.items()}
    assert render("{{ __ray_cluster_starts_anew }}", **said, **hostvars["here"], hostvars=hostvars) is anew
