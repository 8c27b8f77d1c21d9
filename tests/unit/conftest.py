# SPDX-License-Identifier: GPL-3.0-or-later
"""How the tests run modules and filters."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from ansible.module_utils import basic
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar
from ansible.utils.collection_loader import AnsibleCollectionConfig

ROOT = Path(__file__).parents[2]
# Before any test imports the collection: what Python's own importer has loaded, Ansible's does not take over.
if AnsibleCollectionConfig.collection_finder is None:
    init_plugin_loader([str(ROOT / "collections")])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "client: runs a real client of another project, installed for the tests")


@pytest.fixture
def run_module(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """run(module, check=False, **params) -> what the module printed, and `text`: all of it, as Ansible receives it."""

    def run(module: ModuleType, check: bool = False, **params: Any) -> dict[str, Any]:
        internal = {"_ansible_check_mode": check, "_ansible_remote_tmp": str(tmp_path / "ansible-tmp")}
        args = json.dumps({"ANSIBLE_MODULE_ARGS": {**params, **internal}}).encode()
        output = io.StringIO()
        with (
            mock.patch.object(basic, "_ANSIBLE_ARGS", args),
            # ansible-core 2.19 and later ask for it
            mock.patch.object(basic, "_ANSIBLE_PROFILE", "legacy", create=True),
            contextlib.redirect_stdout(output),
            pytest.raises(SystemExit) as stop,
        ):
            module.main()
        text = output.getvalue()
        result: dict[str, Any] = json.loads(text)
        assert bool(result.get("failed")) == (stop.value.code != 0), text
        return {**result, "text": text}

    return run


@cache
def _role_file(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = DataLoader().load_from_file(str(path), trusted_as_template=True)
    except TypeError:  # before ansible-core 2.19 every string was a template
        found = DataLoader().load_from_file(str(path))
    return found


@pytest.fixture
def role_vars() -> Callable[..., dict[str, Any]]:
    """role_vars(role, *names of its vars files, from general to exact) -> defaults and those of them that are there"""

    def role_vars(role: str, *names: str) -> dict[str, Any]:
        folder = ROOT / "roles" / role
        files = [folder / "defaults/main.yml", *(folder / f"vars/{name}.yml" for name in names)]
        return {key: value for file in files if file.exists() for key, value in _role_file(file).items()}

    return role_vars


@pytest.fixture
def render() -> Callable[..., Any]:
    """render(template, **variables) -> the value, by Ansible's templating."""

    def render(template: str, **variables: Any) -> Any:
        try:
            from ansible.template import trust_as_template
        except ImportError:  # before ansible-core 2.19 every string was a template
            return Templar(loader=DataLoader(), variables=variables).template(template)
        return Templar(loader=DataLoader(), variables=variables).template(trust_as_template(template))

    return render
