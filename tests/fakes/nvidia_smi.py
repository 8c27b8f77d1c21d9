#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for nvidia-smi: answers from a scene, and refuses what the real one refuses.

NVIDIA_SMI_SCENE names a JSON file:
  gpus    list of {field: value}, the values as `--query-gpu --format=csv` prints them with units
  apps    list of {gpu_uuid, pid, used_memory}, used_memory with its unit
  topo    {"-m": text, "-p2p r": text}
  xml     what `-q -x` prints
  list    what `-L` prints
  fail    [exit status, text]: all that a call does
  warn    [exit status, text]: how a call ends that has done its work
  hang    seconds that every call takes

Exit statuses and wordings: NVIDIA's page of nvidia-smi, "Return value", and users' reports; 2 is a bad option or field.
"""

import json
import os
import sys
import time
from pathlib import Path


def stop(status, text):
    print(text)
    sys.exit(status)


def table(rows, query, formats):
    fields = query.split(",")
    if "csv" not in formats:
        stop(2, "--format= option must be specified and include csv.")
    for field in fields:
        if any(field not in row for row in rows):
            stop(2, f'Field "{field}" is not a valid field to query.')
    if "noheader" not in formats:
        print(", ".join(fields))
    for row in rows:
        values = [row[field] for field in fields]
        if "nounits" in formats:
            values = [value[: -len(" MiB")] if value.endswith(" MiB") else value for value in values]
        print(", ".join(values))


def main():
    scene = json.loads(Path(os.environ["NVIDIA_SMI_SCENE"]).read_text())
    time.sleep(scene.get("hang", 0))
    if "fail" in scene:
        stop(*scene["fail"])
    arguments = sys.argv[1:]
    if arguments[:1] == ["topo"]:
        text = scene.get("topo", {}).get(" ".join(arguments[1:]))
        if text is None:
            stop(2, "Invalid combination of input arguments. Please run 'nvidia-smi topo -h' for help.")
        sys.stdout.write(text)
        return
    for name, call in (("xml", ["-q", "-x"]), ("list", ["-L"])):
        if arguments == call:
            sys.stdout.write(scene[name])
            return
    options = dict(argument.partition("=")[::2] for argument in arguments)
    for option in options:
        if option not in ("--query-gpu", "--query-compute-apps", "--format"):
            stop(2, f"ERROR: Option {option} is not recognized. Please run 'nvidia-smi -h'.")
    formats = options.get("--format", "").split(",")
    if "--query-gpu" in options and "--query-compute-apps" not in options:
        if not scene["gpus"]:
            stop(6, "No devices were found")
        table(scene["gpus"], options["--query-gpu"], formats)
    elif "--query-compute-apps" in options and "--query-gpu" not in options:
        table(scene.get("apps", []), options["--query-compute-apps"], formats)
    else:
        stop(2, "Invalid combination of input arguments. Please run 'nvidia-smi -h' for help.")
    if "warn" in scene:
        stop(*scene["warn"])


main()
