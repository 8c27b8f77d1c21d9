# SPDX-License-Identifier: GPL-3.0-or-later
"""`ansible-test sanity` of the ansible-core at hand: no container, and nothing from elsewhere than the package index."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support import ROOT, run

HOME = ROOT / ".cache" / "ansible-test"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
# Of managed hosts, the Pythons that ansible-core 2.19 to 2.21 knows. test_cores.py and the unit tests have the older ones.
PYTHONS = ["3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
ON_EACH_PYTHON = ["--test", "compile", "--test", "import"]


@pytest.fixture(scope="module")
def tree(installed_collection: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection as installed, in a place of its own, since ansible-test writes into it."""
    folder = tmp_path_factory.mktemp("sanity") / "ansible_collections" / "baremetal" / "vllm"
    return shutil.copytree(installed_collection / "ansible_collections" / "baremetal" / "vllm", folder)


def sanity(tree: Path, pythons: dict[str, str], *arguments: str) -> str:
    """What ansible-test printed; errors fail the test. Its environments are kept below .cache for the next time."""
    # ansible-test fetches pip from a site of its own; the one that comes with Python does as well.
    bootstrap = HOME / ".ansible" / "test" / "cache"
    bootstrap.mkdir(parents=True, exist_ok=True)
    for version in ("20_3_4", "21_3_1", "24_2", "25_2", "25_3"):
        (bootstrap / f"get_pip_{version}.py").write_text("import ensurepip\n\nensurepip.bootstrap()\n")
    programs = HOME / "bin"
    programs.mkdir(exist_ok=True)
    for version, path in pythons.items():
        link = programs / f"python{version}"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    settings = {name: os.environ.get(name, str(Path.home() / default)) for name, default in XDG.items()}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(["ansible-test", "sanity", "--color", "no", *arguments], tree, HOME=str(HOME), PATH=path, **settings)
    if done.returncode:
        said = re.findall(r"^(?:ERROR|FATAL|Running sanity).*", done.stdout, re.MULTILINE)
        pytest.fail("\n".join(said) or done.stdout, pytrace=False)
    return done.stdout


# pip's own settings and its cache stay those of the user.
XDG = {"XDG_CONFIG_HOME": ".config", "XDG_CACHE_HOME": ".cache"}


def test_sanity(tree: Path, pythons: dict[str, str]) -> None:
    skipped = ["--skip-test", "compile", "--skip-test", "import"]
    output = sanity(tree, pythons, "--python", HERE, *skipped)
    ran = set(re.findall(r'Running sanity test "([\w-]+)"', output))
    assert {"ansible-doc", "pep8", "pylint", "runtime-metadata", "validate-modules", "yamllint"} <= ran


@pytest.mark.parametrize("version", PYTHONS)
def test_modules_load(tree: Path, pythons: dict[str, str], version: str) -> None:
    """Compiled and imported as managed hosts do. On a controller's Pythons the other plugins are, too."""
    if version not in pythons:
        pytest.skip(f"no Python {version} on this machine: install it (pyenv, apt) or name its folder in TEST_PYTHONS")
    output = sanity(tree, pythons, "--python", version, *ON_EACH_PYTHON)
    for test in ("compile", "import"):
        assert f'Running sanity test "{test}" on Python {version}' in output
