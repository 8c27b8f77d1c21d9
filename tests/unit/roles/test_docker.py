# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role docker makes of its variables; on test hosts: molecule/docker, docker_repository and docker_refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

ROLE = Path(__file__).parents[3] / "roles/docker"
LEFT_ALONE = {"docker_log_driver": "", "docker_log_options": {}, "docker_live_restore": None, "docker_nofile": 0}


def test_settings_can_be_left_to_the_engine(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    """As docs/docker.md says, by values that the argument specification takes."""
    assert all(f"`{name}: " in (ROLE.parents[1] / "docs/docker.md").read_text() for name in LEFT_ALONE)
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    checked = ArgumentSpecValidator({name: options[name] for name in LEFT_ALONE}).validate(dict(LEFT_ALONE))
    assert checked.error_messages == []
    assert render("{{ __docker_own_options }}", **role_vars("docker", "main") | LEFT_ALONE) == {}


@pytest.mark.parametrize(
    ("value", "wrong"), [(True, False), ("no", False), (None, False), ("sometimes", True), (5, True)]
)
def test_live_restore(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], value: Any, wrong: bool
) -> None:
    row = next(row for row in role_vars("docker", "main")["__docker_checks"] if "Allowed are true" in row["message"])
    assert render(row["wrong"], docker_live_restore=value) is wrong
