# SPDX-License-Identifier: GPL-3.0-or-later
"""The real argument parser of an installed vLLM, for the tests that must not take the catalog's word."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[5]
QUICKSTART = next((ROOT / ".quickstart/venvs").glob("cpu-*/bin/python"), None)
SCRIPT = """
import contextlib, io, json, sys
from vllm import __version__
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.entrypoints.launchers.cli_args import make_arg_parser
parser = make_arg_parser(FlexibleArgumentParser())
errors = []
for args in json.load(sys.stdin):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(args)
        errors.append(None)
    except SystemExit:
        errors.append(said.getvalue()[-500:])
options = {name: action.nargs for action in parser._actions for name in action.option_strings}
print("ANSWER", json.dumps([__version__.split("+")[0], options, errors]))
"""
Answer = tuple[str, dict[str, object], list[str | None]]


@pytest.fixture(scope="session")
def ask_vllm() -> Callable[[list[list[str]]], Answer]:
    """Parses command lines with the real parser: its version, its options, and an error or None for each line."""
    python = os.environ.get("BAREMETAL_VLLM_PYTHON") or (str(QUICKSTART) if QUICKSTART else None)
    if python is None:
        pytest.skip("NO VLLM HERE: the real parser was not asked. Name an interpreter in BAREMETAL_VLLM_PYTHON")

    @cache
    def asked(lines: str) -> Answer:
        run = subprocess.run(
            [python, "-c", SCRIPT], input=lines, capture_output=True, text=True, timeout=300, check=False
        )
        answer = next((line for line in run.stdout.splitlines() if line.startswith("ANSWER ")), None)
        assert answer, run.stderr[-2000:]
        version, options, errors = json.loads(answer.removeprefix("ANSWER "))
        return version, options, errors

    return lambda lines: asked(json.dumps(lines))
