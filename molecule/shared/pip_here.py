#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a test host needs to install Python packages as this machine does.

pip_here.py --run-arguments   arguments for docker run: this machine's certificates, and folders that pip is told of
pip_here.py --conf            content for the host's /etc/pip.conf
pip_here.py --uv-arguments    arguments for docker run: the same settings, as uv reads them
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
KEYS = ("index-url", "extra-index-url", "find-links")
UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
}


def settings() -> dict[str, list[str]]:
    """pip's settings that say where packages come from; those of the environment win, as they do in pip."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    found = {}
    for line in sorted(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines(), reverse=True
    ):
        key, _, value = line.partition("=")
        name = key.removeprefix(":env:.").removeprefix("global.").removeprefix("install.")
        if name in KEYS:
            found[name] = value.strip("'\"").replace("\\n", " ").split()
    return found


def folders(found: dict[str, list[str]]) -> list[str]:
    """Folders of this machine among the values; for an index, the one above it, which holds its files too."""
    paths = []
    for name, values in found.items():
        for path in (Path(value.removeprefix("file://")) for value in values):
            if path.is_absolute() and path.is_dir():
                paths.append(str(path if name == "find-links" else path.parent))
    return sorted(set(paths))


def main() -> None:
    found = settings()
    if sys.argv[1:] == ["--run-arguments"]:
        mounts = [CERTIFICATES] if Path(CERTIFICATES).exists() else []
        print(" ".join(f"--volume {path}:{path}:ro" for path in mounts + folders(found)))
    elif sys.argv[1:] == ["--uv-arguments"]:
        told = {UV[name][0]: UV[name][1].join(values) for name, values in found.items()}
        pairs = {"UV_INDEX_STRATEGY": "unsafe-best-match", "SSL_CERT_FILE": CERTIFICATES, **told}
        print("\n".join(f"--env={name}={value}" for name, value in pairs.items()))
    elif sys.argv[1:] == ["--conf"]:
        lines = [f"{name} = {' '.join(values)}" for name, values in found.items()]
        print("\n".join(["[global]", f"cert = {CERTIFICATES}", *lines]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
