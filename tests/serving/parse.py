# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in an environment with vLLM: reads argument lists as JSON from stdin, gives each to vLLM's own parser, and prints
as JSON what it said to each: nothing where it took the list."""

import contextlib
import importlib
import io
import json
import os
import sys

# Where it was moved to in 0.32, and where it was before.
FRONTEND = ("vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.openai.cli_args")


def first(name, *modules):
    """The first module's that has it."""
    for module in modules:
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(name)


def parser():
    """What the API server of this release parses its command line with."""
    try:
        FlexibleArgumentParser = first("FlexibleArgumentParser", "vllm.utils.argparse_utils", "vllm.utils")
        make_arg_parser = first("make_arg_parser", *FRONTEND)
    except ImportError:  # before 0.4
        from vllm.entrypoints.openai import api_server

        def old(args):
            sys.argv[1:] = args
            api_server.parse_args()

        return old
    try:
        validate = first("validate_parsed_serve_args", *FRONTEND)
    except ImportError:  # before 0.7
        validate = bool

    def parse(args):
        validate(make_arg_parser(FlexibleArgumentParser()).parse_args(args))

    return parse


def main():
    lists = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    parse, told = parser(), []
    for args in lists:
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parse(list(args))
            told.append("")
        except SystemExit:
            told.append(errors.getvalue().strip().splitlines()[-1])
        except Exception as error:
            told.append(repr(error))
    import vllm

    json.dump({"version": vllm.__version__, "told": told}, answers)


if __name__ == "__main__":
    main()
