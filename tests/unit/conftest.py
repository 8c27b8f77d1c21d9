# SPDX-License-Identifier: GPL-3.0-or-later
"""How the tests run modules, filters and tools that the project does not itself install."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def render() -> Callable[..., Any]:
    """render(template, **variables) -> the value, by Ansible's templating."""
    if AnsibleCollectionConfig.collection_finder is None:
        init_plugin_loader([str(ROOT / "collections")])

    def render(template: str, **variables: Any) -> Any:
        try:
            from ansible.template import trust_as_template
        except ImportError:  # before ansible-core 2.19 every string was a template
            return Templar(loader=DataLoader(), variables=variables).template(template)
        return Templar(loader=DataLoader(), variables=variables).template(trust_as_template(template))

    return render


def find_pythons() -> dict[str, str]:
    """Minor version -> an interpreter that runs, of TEST_PYTHONS (a folder of installations), of pyenv or on PATH."""
    folders = [os.environ["TEST_PYTHONS"]] if "TEST_PYTHONS" in os.environ else []
    if shutil.which("pyenv"):
        root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout.strip()
        folders.append(f"{root}/versions")
    candidates = [str(path) for folder in folders for path in sorted(Path(folder).glob("*/bin/python3"))]
    candidates += [sys.executable, *(f"python3.{minor}" for minor in range(6, 15))]
    found: dict[str, str] = {}
    for candidate in candidates:
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        with contextlib.suppress(OSError):  # run, not looked up: a name on PATH may be a shim for what is not there
            process = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
            if process.returncode == 0:
                version, path = process.stdout.split()
                found.setdefault(version, path)
    return found


@pytest.fixture(scope="session")
def pythons() -> dict[str, str]:
    return find_pythons()


@pytest.fixture(scope="session")
def tool_environment() -> Callable[..., Path]:
    """environment(requirement, ..., python=) -> bin folder of a virtual environment that holds them, kept in .cache."""

    def environment(*requirements: str, python: str = sys.executable) -> Path:
        digest = hashlib.sha256(repr((requirements, python)).encode()).hexdigest()[:12]
        folder = ROOT / ".cache/tests" / digest
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True)
            pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            process = subprocess.run([*pip, *requirements], capture_output=True, text=True)
            if process.returncode:
                shutil.rmtree(folder)
                pytest.skip(f"cannot install {' '.join(requirements)}: {process.stderr.strip().splitlines()[-1]}")
            (folder / "complete").touch()
        return folder / "bin"

    return environment
