# SPDX-License-Identifier: GPL-3.0-or-later
"""What vLLM's launcher starts, with a package that stands in for vLLM and tells how it was called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = Path(__file__).resolve().parents[3] / "roles/vllm/files"
TELL = "import json, sys\ndef main():\n    print(json.dumps([{name!r}, *sys.argv[1:]]))\nif __name__ == '__main__':\n    main()\n"
ARGUMENTS = ["--model", "/srv/m", "--served-model-name", "m", "--port", "8000"]


@pytest.fixture
def standin(tmp_path: Path, role_vars: Callable[..., dict[str, Any]]) -> Path:
    """vLLM's stand-in, and beside it what the role brings to every host, no more."""
    for file in role_vars("vllm", "main")["__vllm_server_files"]:
        shutil.copy(FILES / Path(file["path"]).name, tmp_path)
    for name in ("openai.api_server", "cli.main"):
        path = tmp_path / "vllm/entrypoints" / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True)
        path.write_text(TELL.format(name=name))
        (path.parent / "__init__.py").touch()
    for folder in ("vllm", "vllm/entrypoints"):
        (tmp_path / folder / "__init__.py").touch()
    return tmp_path


def started(standin: Path, *more: str) -> list[str]:
    """The module that was run, and its arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "baremetal_serve", *ARGUMENTS, *more],
        env={**os.environ, "PYTHONPATH": str(standin)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: list[str] = json.loads(done.stdout)
    return told


def test_one_engine_has_one_api_server(standin: Path) -> None:
    assert started(standin) == ["openai.api_server", *ARGUMENTS]


@pytest.mark.parametrize("more", [["--data-parallel-size", "4"], ["--api-server-count", "2"], ["--api-server-count=2"]])
def test_replicas_and_several_api_servers_are_started_by_the_program(standin: Path, more: list[str]) -> None:
    assert started(standin, *more) == ["cli.main", "serve", "/srv/m", *ARGUMENTS[2:], *more]
