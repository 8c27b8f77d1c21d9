# SPDX-License-Identifier: GPL-3.0-or-later
"""The flags that the role nvidia_driver passes, by version, and stand-ins of the installers of those versions that judge them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FAKE = ROOT / "tests" / "fakes" / "nvidia_runfile"
DATA: dict[str, Any] = yaml.safe_load((ROOT / "roles" / "nvidia_driver" / "vars" / "versions.yml").read_text())
VERSIONS = ("470.256.02", "535.309.01", "550.144.03", "575.64.03", "580.159.04")
CONDITIONS = ("always", "without_opengl", "x_consent", "busy", "other_kernel", "signed")


def key(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def flags(version: str, *conditions: str) -> list[str]:
    """What the role's expression picks from its table."""
    return [
        row["flag"].replace("{{", "").replace("}}", "").replace(" ", "")
        for row in DATA["__nvidia_driver_options"]
        if row["for"] in conditions and key(row["since"]) <= key(version) < key(row["until"])
    ]


@pytest.fixture(scope="module")
def runfiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runfiles")
    subprocess.run([sys.executable, FAKE / "build.py", *VERSIONS, "--to", folder], check=True, capture_output=True)
    return folder


def run(runfiles: Path, version: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = runfiles / version / f"NVIDIA-Linux-x86_64-{version}.run"
    return subprocess.run(["sh", path, *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("flavour", ["open", "proprietary"])
def test_every_flag_is_known_to_the_installer_of_that_version(runfiles, tmp_path, version, flavour):
    """--driver-info ends a run that has got past its options, with another status than an unknown option's message."""
    passed = [*flags(version, flavour, *CONDITIONS), f"--log-file-name={tmp_path / 'log'}"]
    done = run(runfiles, version, "--tmpdir", str(tmp_path), *passed, "--driver-info")
    assert "Invalid commandline" not in done.stderr, passed


@pytest.mark.parametrize(
    ("version", "flag", "known"),
    [
        ("470.256.02", "--no-dkms", False),
        ("535.309.01", "--no-dkms", True),
        ("535.309.01", "--no-disable-nouveau", False),
        ("550.144.03", "--no-disable-nouveau", True),
        ("535.309.01", "--allow-installation-with-running-driver", False),
        ("550.144.03", "--kernel-module-type=open", False),
        ("575.64.03", "--kernel-module-type=open", True),
        ("580.159.04", "--no-cc-version-check", True),
        ("580.159.04", "--no-install-32bit", False),
    ],
)
def test_the_standin_knows_the_options_of_its_version(runfiles, tmp_path, version, flag, known):
    done = run(runfiles, version, flag, "--driver-info", f"--log-file-name={tmp_path / 'log'}")
    assert ("Invalid commandline" in done.stderr) is not known
    assert done.returncode == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_flags_by_version(version):
    passed = flags(version, "always", "open", "without_opengl")
    assert ("--no-rebuild-initramfs" in passed) is (key(version) >= [545, 23, 6])
    assert ("-m=kernel-open" in passed) is (version.startswith(("535", "550")))
    assert ("--kernel-module-type=open" in passed) is (key(version) >= [555, 42, 2])
    assert "--no-cc-version-check" not in passed  # does nothing since 515.43.04


def test_the_wrapper_answers_without_installing(runfiles, tmp_path):
    assert run(runfiles, "575.64.03", "--check").returncode == 0
    assert "575.64.03" in run(runfiles, "575.64.03", "--info").stdout
    assert run(runfiles, "575.64.03", "-x", "--target", str(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out" / "kernel-open" / "dkms.conf").is_file()
    assert run(runfiles, "575.64.03", "-x", "--target", str(tmp_path / "out")).returncode == 1
    broken = tmp_path / "broken.run"
    broken.write_bytes((runfiles / "575.64.03" / "NVIDIA-Linux-x86_64-575.64.03.run").read_bytes()[:-9] + b"corrupted")
    assert subprocess.run(["sh", broken, "--check"], check=False, capture_output=True).returncode == 2


def test_pins_are_whole():
    assert all(
        len(value) == 64 and set(value) <= set("0123456789abcdef") for value in DATA["__nvidia_driver_pins"].values()
    )
    assert set(DATA["__nvidia_driver_branches"].values()) <= set(DATA["__nvidia_driver_pins"])
    assert {"575.64.03", "550.144.03"} <= set(DATA["__nvidia_driver_pins"])
    assert all(version.split(".")[0] == branch for branch, version in DATA["__nvidia_driver_branches"].items())


def test_every_diagnosis_is_a_pattern_that_matches_what_logs_say():
    said = {
        "does not know one of its options": "ERROR: Invalid commandline, please run `./nvidia-installer --help` for usage information.",
        "nouveau": "WARNING: The Nouveau kernel driver is currently in use by your system.",
        "nvidia_driver_remove_other": "The NVIDIA driver appears to have been installed previously using a different installer.",
        "nvidia_driver_stop_gpu_users": "ERROR: An NVIDIA kernel module 'nvidia-drm' appears to already be loaded in your kernel.",
        "Secure Boot": "modprobe: ERROR: could not insert 'nvidia': Required key not available",
        "headers of the kernel": "ERROR: Unable to find the kernel source tree for the currently running kernel.",
        "another compiler": "gcc: error: unrecognized command-line option '-ftrivial-auto-var-init=zero'",
        "g++": "make: g++: not found",
        "pahole": "./scripts/pahole-flags.sh: pahole: Permission denied",
        "disk is full": "cp: error writing 'nvidia.ko': No space left on device",
        "DKMS has no working module": "WARNING: Failed to register the NVIDIA kernel modules with DKMS.",
        '"580"': "NVIDIA legacy Linux graphics drivers and will be ignored by the NVIDIA 590.48.01",
        "open modules only": "NVRM: installed in this system requires use of the NVIDIA open kernel modules.",
        "newer than the driver": "nv.c:1: error: implicit declaration of function 'follow_pfn'",
        "does not take it": "ERROR: Unable to load the kernel module 'nvidia.ko'.",
    }
    for means, line in said.items():
        first = next(row["means"] for row in DATA["__nvidia_driver_diagnoses"] if re.search(row["pattern"], line))
        assert means in first, json.dumps({"line": line, "got": first})
