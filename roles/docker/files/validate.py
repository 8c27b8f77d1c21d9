# SPDX-License-Identifier: GPL-3.0-or-later
"""Asks this host's dockerd whether it would start with a daemon.json, without starting or writing anything.

Standard input: the JSON text. Arguments: dockerd's path, its version, then the arguments that the service
gives it, so that a setting made both there and in the file is found (dockerd refuses that at its start).
Prints dockerd's objection and exits 1, or exits 0. Python 3.6 and the standard library.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# dockerd has --validate since 23.0. An older one reads and judges the file first and this flag afterwards,
# so that the complaint about the flag, and no other, says that the file is good.
NO_SUCH_LEVEL = "validate-only"


def main():
    dockerd, version = sys.argv[1:3]
    arguments = sys.argv[3:]
    text = sys.stdin.read()
    old = int(version.split(".")[0]) < 23
    if old:
        options = json.loads(text)
        options.pop("log-level", None)  # would be said twice: here and by the flag
        text = json.dumps(options)
    handle, path = tempfile.mkstemp(suffix=".json")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        command = [dockerd, *arguments, "--config-file", path]
        command += ["--log-level", NO_SUCH_LEVEL] if old else ["--validate"]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,  # noqa: UP021 - 3.6
            timeout=30,
            check=False,
        )
    finally:
        Path(path).unlink()
    said = done.stdout.strip()
    if done.returncode == 0 or (old and "unable to parse logging level: " + NO_SUCH_LEVEL in said):
        return 0
    print(said.replace(path, "/etc/docker/daemon.json"))
    return 1


if __name__ == "__main__":
    sys.exit(main())
