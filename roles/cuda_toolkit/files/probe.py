# SPDX-License-Identifier: GPL-3.0-or-later
"""Which CUDA toolkits are on this host, printed as one JSON object. Only reads; Python 3.6 and its standard library.

Argument: a JSON object {"files": [paths whose sha256 is asked for]}.
"""

import glob
import hashlib
import json
import os
import re
import subprocess
import sys


def toolkits():
    """{series: full version} of the folders whose nvcc answers."""
    found = {}
    for path in sorted(glob.glob("/usr/local/cuda-*/bin/nvcc")):
        try:
            done = subprocess.run(
                [path, "--version"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                universal_newlines=True,
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        release = re.search(r"release (\d+\.\d+)", done.stdout)
        folder = os.path.dirname(os.path.dirname(path))
        if done.returncode == 0 and release and folder.endswith("-" + release.group(1)):
            try:
                with open(folder + "/version.json", encoding="utf-8") as handle:
                    full = json.load(handle)["cuda"]["version"]
            except (OSError, ValueError, KeyError, TypeError):
                full = release.group(1)
            found[release.group(1)] = full
    return found


def sha256(path):
    try:
        with open(path, "rb") as handle:
            return hashlib.sha256(handle.read()).hexdigest()
    except OSError:
        return ""


def main():
    asked = json.loads(sys.argv[1])
    link = "/usr/local/cuda"
    print(
        json.dumps(
            {
                "toolkits": toolkits(),
                "link": os.path.realpath(link) if os.path.islink(link) else "",
                "files": {path: sha256(path) for path in asked["files"]},
            },
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
