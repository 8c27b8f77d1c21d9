# SPDX-License-Identifier: GPL-3.0-or-later
"""scripts/controller.sh on a copy of the files it reads, on machines that lack one thing each."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ["awk", "cat", "cksum", "df", "dirname", "grep", "head", "mktemp", "rm", "sed", "sh", "tail"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    checkout = tmp_path / "check out"  # people have blanks in their paths
    (checkout / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/controller.sh", checkout / "scripts")
    (checkout / "requirements.txt").write_text("tinything==1.0\n")
    (checkout / "requirements-dev.txt").write_text("-r requirements.txt\n")
    return checkout


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tinything-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinything-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinything.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinything\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: the tools that every Linux has, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    return folder


def program(machine: Path, name: str, text: str) -> None:
    (machine / name).unlink(missing_ok=True)
    (machine / name).write_text(f"#!/bin/sh\n{text}\n")
    (machine / name).chmod(0o755)


@pytest.fixture
def call(
    checkout: Path, machine: Path, wheels: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(machine),
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
            "PIP_CONFIG_FILE": "/dev/null",
        }
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), **variables}
        command = ["scripts/controller.sh", *(arguments or ("requirements.txt",))]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    return call


@pytest.fixture
def python(machine: Path) -> Callable[..., None]:
    """python(name, before) puts this Python on the machine; `before` may act instead of it, by its arguments."""
    # An environment with a pip of its own takes seconds to make, and one test does: the others borrow one.
    folder = Path(pip.__file__).parents[1]
    shim = rf"""'#!/bin/sh\nPYTHONPATH={folder} exec "${{0%%/*}}/python" -m pip "$@"\n'"""
    quick = f"""if [ "$1 $2" = "-m venv" ]; then
    {sys.executable} -m venv --without-pip "$3" && printf {shim} >"$3/bin/pip" && exec chmod +x "$3/bin/pip"
fi"""
    (machine / "chmod").symlink_to(shutil.which("chmod") or "")

    def python(name: str = "python3", before: str = quick) -> None:
        program(machine, name, f'{before}\nexec {sys.executable} "$@"')

    return python


@pytest.fixture
def refused(call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path) -> Callable[..., str]:
    """refused(**variables) -> the one line of a refusal, after which nothing is left."""

    def refused(**variables: str) -> str:
        before = sorted(path.name for path in checkout.iterdir())
        process = call(**variables)
        assert process.returncode == 1
        lines = process.stderr.splitlines()
        assert len(lines) == 1, process.stderr
        assert lines[0].startswith("baremetal.vllm: ")
        assert sorted(path.name for path in checkout.iterdir()) == before
        return lines[0].removeprefix("baremetal.vllm: ")

    return refused


def test_made_once_then_left_alone(
    call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, machine: Path, python: Callable[..., None]
) -> None:
    python(before="")
    first = call()
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == "Making the controller's environment in .venv (a minute)\n"
    subprocess.run([checkout / ".venv/bin/python", "-c", "import tinything"], check=True)
    (machine / "python3").unlink()  # not even looked for
    second = call()
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_other_requirements_are_added(
    call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, machine: Path, python: Callable[..., None]
) -> None:
    python()
    assert call().returncode == 0
    (checkout / ".venv/mine").touch()
    assert call("requirements-dev.txt").stdout != ""
    assert call("requirements-dev.txt").stdout == ""
    assert call().stdout == ""  # one does not undo the other
    (checkout / "requirements.txt").write_text("tinything==1.0 # pinned\n")
    assert call("requirements-dev.txt").stdout != "", "requirements-dev.txt includes requirements.txt"
    assert (checkout / ".venv/mine").exists(), "a working environment is not made anew"


def test_called_from_elsewhere(
    machine: Path, checkout: Path, wheels: Path, tmp_path: Path, python: Callable[..., None]
) -> None:
    python()
    environment = {
        "PATH": str(machine),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": "/dev/null",
    }
    subprocess.run([checkout / "scripts/controller.sh", "requirements.txt"], cwd=tmp_path, env=environment, check=True)
    assert (checkout / ".venv/bin/pip").exists()


def test_a_broken_environment_is_made_anew(
    call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, machine: Path, python: Callable[..., None]
) -> None:
    """What an upgrade of the distribution leaves behind, or a run that was killed."""
    python()
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to("/nowhere/python3.9")
    (checkout / ".venv/mine").touch()
    assert call().returncode == 0
    assert not (checkout / ".venv/mine").exists()


def test_no_python(refused: Callable[..., str]) -> None:
    assert refused() == (
        "Python 3.10 or newer is needed and no python3 was found: install one (Debian, Ubuntu: apt-get install python3-venv) "
        "or set PYTHON"
    )


def test_an_old_python(refused: Callable[..., str], machine: Path) -> None:
    program(machine, "python3", '[ "$1" = --version ] && { echo Python 3.8.18; exit 0; }\nexit 1')
    assert refused().startswith("Python 3.10 or newer is needed and Python 3.8.18 was found: ")


def test_a_real_old_python(refused: Callable[..., str], machine: Path, pythons: dict[str, str]) -> None:
    if "3.8" not in pythons:
        pytest.skip("NOT TESTED with a real Python 3.8: none here")
    (machine / "python3").symlink_to(pythons["3.8"])
    assert refused().startswith("Python 3.10 or newer is needed and Python 3.8.")


def test_a_newer_one_beside_the_old(
    call: Callable[..., subprocess.CompletedProcess[str]], machine: Path, python: Callable[..., None]
) -> None:
    program(machine, "python3", "exit 1")
    program(machine, "python3.13", "echo 'pyenv: python3.13: command not found' >&2; exit 127")  # a shim
    python("python3.11")
    assert call().returncode == 0


@pytest.mark.parametrize("given", ["/nowhere/python3.12", "old"])
def test_what_the_user_names_is_taken_or_refused(
    refused: Callable[..., str], machine: Path, given: str, python: Callable[..., None]
) -> None:
    python()
    program(machine, "old", '[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1')
    found = "Python 3.9.2" if given == "old" else "nothing that runs"
    assert (
        refused(PYTHON=given) == f"PYTHON is {given}, which is {found}: set it to a Python 3.10 or newer, or unset it"
    )


def test_a_named_python_is_taken(
    call: Callable[..., subprocess.CompletedProcess[str]], python: Callable[..., None]
) -> None:
    python("mine")
    assert call(PYTHON="mine").returncode == 0


def test_no_module_for_environments(refused: Callable[..., str], machine: Path, python: Callable[..., None]) -> None:
    """Debian without python3-venv."""
    python(before="case $2 in *ensurepip*) echo \"No module named 'ensurepip'\" >&2; exit 1;; esac")
    assert refused() == (
        "python3 cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"
    )


def test_an_environment_that_cannot_be_made(
    refused: Callable[..., str], machine: Path, checkout: Path, python: Callable[..., None]
) -> None:
    """A disk that fills up, say: nothing half-made stays, and Python's traceback is one line."""
    python(
        before='[ "$1 $2" = "-m venv" ] && { mkdir -p .venv/bin; echo Traceback; echo "OSError: No space left" >&2; exit 1; }',
    )
    (machine / "mkdir").symlink_to(shutil.which("mkdir") or "")
    assert refused() == (
        f"cannot make .venv with python3 (OSError: No space left): make {checkout} writable with room to spare, or set PYTHON "
        "to another one"
    )


def test_little_disk(refused: Callable[..., str], machine: Path, checkout: Path, python: Callable[..., None]) -> None:
    python()
    program(
        machine,
        "df",
        "echo 'Filesystem 1048576-blocks Used Available Capacity Mounted on'; echo '/dev/vda 100 90 10 90% /'",
    )
    assert refused() == f"{checkout} has 10 MiB free and the controller needs 1024: make room"


@pytest.mark.parametrize(
    "variables",
    [{}, {"PIP_NO_INDEX": "", "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "1"}],
)
def test_no_network(
    refused: Callable[..., str], machine: Path, tmp_path: Path, variables: dict[str, str], python: Callable[..., None]
) -> None:
    python()
    said = refused(**{"PIP_FIND_LINKS": str(tmp_path / "empty"), **variables})
    assert said.startswith("cannot install requirements.txt (ERROR: No matching distribution found for tinything==1.0")
    assert said.endswith("): check the network, or name a package mirror in pip's configuration")


def test_a_failed_addition_keeps_what_works(
    call: Callable[..., subprocess.CompletedProcess[str]], checkout: Path, machine: Path, python: Callable[..., None]
) -> None:
    python()
    assert call().returncode == 0
    (checkout / "requirements-dev.txt").write_text("-r requirements.txt\nnobody-has-this\n")
    process = call("requirements-dev.txt")
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert call().stdout == ""
    assert not list((checkout / ".venv").glob(".baremetal-requirements-dev*"))


def test_nothing_stays_in_the_temporary_folder(
    call: Callable[..., subprocess.CompletedProcess[str]], machine: Path, tmp_path: Path, python: Callable[..., None]
) -> None:
    python()
    before = set(tmp_path.iterdir())
    call()
    call("requirements-dev.txt")
    assert set(tmp_path.iterdir()) - before == set()


def test_a_file_that_is_not_there(
    call: Callable[..., subprocess.CompletedProcess[str]], machine: Path, python: Callable[..., None]
) -> None:
    python()
    process = call("requirements-missing.txt")
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert "requirements-missing.txt" in process.stderr
