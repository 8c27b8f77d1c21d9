# SPDX-License-Identifier: GPL-3.0-or-later
"""The oldest ansible-core that meta/runtime.yml allows, and the newest there is, run the playbooks from a clone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support import ROOT, checked

OLDEST = re.fullmatch(r">=(\d+\.\d+)\.0", yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["requires_ansible"])
assert OLDEST, "meta/runtime.yml: requires_ansible must name a series, as in '>=2.16.0'"
# Series -> what pip is asked for, and the Pythons that it runs on, the wanted one first.
CORES = {
    OLDEST[1]: (f"ansible-core~={OLDEST[1]}.0", ["3.10", "3.11", "3.12"]),
    "newest": ("ansible-core", ["3.14", "3.13", "3.12"]),
}
PLAYBOOKS = ["site.yml", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "playbooks").glob("*.yml"))]


@pytest.fixture(scope="module", params=CORES)
def programs(
    request: pytest.FixtureRequest, pythons: dict[str, str], tool_environment: Callable[..., Path]
) -> tuple[str, Path]:
    """The series, and the folder of the programs of this ansible-core."""
    requirement, able = CORES[request.param]
    if not (present := [version for version in able if version in pythons]):
        pytest.skip(f"{requirement} needs Python {' or '.join(able)}, none of which this machine has")
    folder = tool_environment(requirement, python=pythons[present[0]])
    return re.findall(r"core (\d+\.\d+)", checked([folder / "ansible", "--version"], ROOT))[0], folder


def test_it_is_that_core(programs: tuple[str, Path], request: pytest.FixtureRequest) -> None:
    asked = request.node.callspec.params["programs"]
    found = tuple(map(int, programs[0].split(".")))
    assert programs[0] == asked if asked != "newest" else found >= (2, 20)


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_syntax(programs: tuple[str, Path], clone: Path, playbook: str) -> None:
    checked(
        [programs[1] / "ansible-playbook", playbook, "-i", "inventories/quickstart", "--syntax-check"],
        clone,
        PATH=str(programs[1]) + ":/usr/bin:/bin",
    )


def test_check_mode(programs: tuple[str, Path], clone: Path, short_path: Path) -> None:
    """Through facts, plan, preflight and every role; warnings of the core about what it will drop fail, too."""
    output = checked(
        [
            programs[1] / "ansible-playbook",
            "site.yml",
            "-i",
            "inventories/quickstart",
            "--check",
            "-e",
            "quickstart_port=18124",
        ],
        clone,
        PATH=str(programs[1]) + ":/usr/bin:/bin",
        QUICKSTART_DIR=str(short_path / "quickstart"),
    )
    assert re.search(r"^quickstart +: ok=[1-9].* unreachable=0 +failed=0 ", output, re.MULTILINE)
    assert not re.findall(r"^\[(?:DEPRECATION )?WARNING\].*", output, re.MULTILINE)
    assert not (short_path / "quickstart").exists(), "check mode made something"


@pytest.mark.parametrize(("method", "expected"), [("runfile", r"580\.\d+\.\d+"), ("package", "")])
def test_the_driver_that_a_host_is_going_to_have(
    programs: tuple[str, Path], clone: Path, tmp_path: Path, method: str, expected: str
) -> None:
    """The host of the check mode above has no GPU, so that most of this role's expressions are not asked there."""
    gpu = {"pci": [{"device_id": "0x2335"}], "state": "no_driver", "gpus": []}
    play = {
        "hosts": "localhost", "connection": "local", "vars": {"nvidia_driver_method": method},
        "tasks": [
            {"ansible.builtin.set_fact": {"gpu": gpu, "cacheable": True}},
            {"ansible.builtin.include_role": {"name": "baremetal.vllm.nvidia_driver", "tasks_from": "wanted"}},
            {"ansible.builtin.debug": {"msg": "to be: <{{ nvidia_driver_to_be }}>"}},
        ],
    }  # fmt: skip
    (tmp_path / "play.json").write_text(json.dumps([play]))
    output = checked(
        [programs[1] / "ansible-playbook", "-i", "localhost,", tmp_path / "play.json"],
        clone,
        PATH=str(programs[1]) + ":/usr/bin:/bin",
        ANSIBLE_COLLECTIONS_PATH=str(clone / "collections"),
    )
    assert re.search(f"to be: <{expected}>", output), output
