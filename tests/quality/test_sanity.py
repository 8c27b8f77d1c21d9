# SPDX-License-Identifier: GPL-3.0-or-later
"""`ansible-test sanity` of the ansible-core at hand: no container, and nothing from elsewhere than the package index."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import sys
from pathlib import Path

import ansible_test
import pytest
from ansible_test._util.target.common import constants
from support import ROOT, checked, run

HOME = ROOT / ".cache" / "ansible-test"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# Those of managed hosts and of controllers. Hosts with older ones are for older cores: the unit tests have those.
PYTHONS = [*constants.REMOTE_ONLY_PYTHON_VERSIONS, *constants.CONTROLLER_PYTHON_VERSIONS]
ON_EACH_PYTHON = ["--test", "compile", "--test", "import"]


@pytest.fixture(scope="module")
def tree(installed_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection as installed, in a place of its own, since ansible-test writes into it."""
    folder = tmp_path_factory.mktemp("sanity") / "ansible_collections" / "baremetal" / "vllm"
    return shutil.copytree(installed_collection / "ansible_collections" / "baremetal" / "vllm", folder)


@pytest.fixture(scope="module")
def home(pythons: dict[str, str]) -> Path:
    """A home for ansible-test, which keeps its environments there for the next time and asks nothing but pip's index."""
    text = (Path(ansible_test.__file__).parent / "_internal" / "python_requirements.py").read_text()
    versions = re.findall(r"pip='([\d.]+)'", text)
    assert versions, "ansible-test names the pip that it wants in another way than before"
    (HOME / ".ansible/test/cache").mkdir(parents=True, exist_ok=True)
    for version in versions:
        # It would fetch pip from a site of its own; the one that comes with Python does as well.
        script = HOME / ".ansible/test/cache" / f"get_pip_{version.replace('.', '_')}.py"
        script.write_text("import ensurepip\n\nensurepip.bootstrap()\n")
    # It hands on no variables for pip (a mirror, say); files it cannot keep from pip.
    settings = configparser.RawConfigParser()
    listed = checked([sys.executable, "-m", "pip", "config", "list"], ROOT).splitlines()
    for name, text in (line.split("=", 1) for line in sorted(listed, key=lambda line: line.startswith(":env:"))):
        section, option = name.replace(":env:", "global").split(".", 1)
        settings.read_dict({section: {option: ast.literal_eval(text)}})
    (HOME / ".config/pip").mkdir(parents=True, exist_ok=True)
    with (HOME / ".config/pip/pip.conf").open("w") as file:
        settings.write(file)
    (HOME / "bin").mkdir(exist_ok=True)
    for version, path in pythons.items():
        link = HOME / "bin" / f"python{version}"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    return HOME


def sanity(tree: Path, home: Path, *arguments: str) -> str:
    """What ansible-test printed; errors fail the test."""
    path = f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(["ansible-test", "sanity", "--color", "no", *arguments], tree, HOME=str(home), PATH=path)
    if done.returncode:
        said = re.findall(r"^(?:ERROR|FATAL|Running sanity).*", done.stdout, re.MULTILINE)
        pytest.fail("\n".join(said) or done.stdout, pytrace=False)
    return done.stdout


def test_sanity(tree: Path, home: Path) -> None:
    skipped = ["--skip-test", "compile", "--skip-test", "import"]
    output = sanity(tree, home, "--python", HERE, *skipped)
    ran = set(re.findall(r'Running sanity test "([\w-]+)"', output))
    assert {"ansible-doc", "pep8", "pylint", "runtime-metadata", "validate-modules", "yamllint"} <= ran


@pytest.mark.parametrize("version", PYTHONS)
def test_modules_load(tree: Path, home: Path, pythons: dict[str, str], version: str) -> None:
    """Compiled and imported as managed hosts do. On a controller's Pythons the other plugins are, too."""
    if version not in pythons:
        pytest.skip(f"no Python {version} on this machine: install it (pyenv, apt) or name its folder in TEST_PYTHONS")
    output = sanity(tree, home, "--python", version, *ON_EACH_PYTHON)
    for test in ("compile", "import"):
        assert f'Running sanity test "{test}" on Python {version}' in output
