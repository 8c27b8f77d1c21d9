# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tests share: interpreters, and the collection as a clone has it, built, and installed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT, checked, find_pythons


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
            checked([python, "-m", "venv", folder], ROOT)
            pip = [folder / "bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
            checked([*pip, "install", *requirements], ROOT)
            (folder / "complete").touch()
        return folder / "bin"

    return environment


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder. supervisor's socket lies in vllm_root, and the path of a socket must be short: tmp_path is not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has and of what it would take, in a folder named as an installed collection's."""
    target = tmp_path_factory.mktemp("clone") / "ansible_collections" / "baremetal" / "vllm"
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    for name in listed.split("\0"):
        if name and os.path.lexists(ROOT / name):  # a deleted file is listed until the deletion is committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="session")
def artifact(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ansible-galaxy collection build` makes of the clone."""
    folder = tmp_path_factory.mktemp("artifact")
    checked(["ansible-galaxy", "collection", "build", "--output-path", folder], clone)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="session")
def installed_collection(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ANSIBLE_COLLECTIONS_PATH that holds the collection as installed from its artifact, and no other."""
    folder = tmp_path_factory.mktemp("collections")
    checked(["ansible-galaxy", "collection", "install", artifact, "-p", folder, "--offline", "--no-deps"], folder)
    return folder
