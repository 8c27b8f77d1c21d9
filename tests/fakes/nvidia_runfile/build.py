# SPDX-License-Identifier: GPL-3.0-or-later
"""Builds a stand-in of NVIDIA's installer: a self-extracting archive that behaves as nvidia-installer of that version.

    build.py VERSION... --to FOLDER     makes FOLDER/VERSION/NVIDIA-Linux-x86_64-VERSION.run and prints their sha256

Options that it knows, by branch, are in options.json, taken from option_table.h at the tags 470.256.02, 535.216.01, 550.144.03,
575.64.03 and 580.119.02 of NVIDIA/nvidia-installer. What it refuses, logs and returns is in payload/nvidia-installer.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def payload(version: str) -> bytes:
    """The compressed archive behind the script: same bytes each time for the same content."""
    options = json.loads((HERE / "options.json").read_text())
    branch = version.split(".")[0]
    known = {name: row[branch] for name, row in options.items() if branch in row}
    if not known:
        raise SystemExit(f"no options are known of branch {branch}")
    files = {
        str(path.relative_to(HERE / "payload")): path.read_bytes()
        for path in sorted((HERE / "payload").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files["standin.json"] = json.dumps({"version": version, "options": known}).encode()
    files["scene-smi.py"] = (HERE.parent / "nvidia_smi.py").read_bytes()
    if int(branch) >= 515:  # the branch that brought the open modules
        files.update(
            {
                name.replace("kernel/", "kernel-open/", 1): data
                for name, data in files.items()
                if name.startswith("kernel/")
            }
        )
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, data in sorted(files.items()):
            if name.startswith("kernel"):
                licence = b"Dual MIT/GPL" if name.startswith("kernel-open") else b"NVIDIA"
                data = data.replace(b"@VERSION@", version.encode()).replace(b"@LICENSE@", licence)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = (
                0o755
                if name in ("nvidia-installer", "nvidia-smi", "nvidia-persistenced") or name.endswith(".sh")
                else 0o644
            )
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def build(version: str, folder: Path) -> Path:
    data = payload(version)
    script = (HERE / "wrapper.sh").read_text()
    script = script.replace("@VERSION@", version).replace("@MD5@", hashlib.md5(data).hexdigest())
    script = script.replace("@SKIP@", str(len(script.splitlines()) + 1))
    path = folder / version / f"NVIDIA-Linux-x86_64-{version}.run"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(script.encode() + data)
    path.chmod(0o755)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    for version in arguments.versions:
        path = build(version, arguments.to)
        print(version, hashlib.sha256(path.read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
