# SPDX-License-Identifier: GPL-3.0-or-later
"""What users are told of the failures that they report: one line of the installer's, of DKMS's or of the kernel's log each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

VARS = Path(__file__).parents[3] / "roles/nvidia_driver/vars/versions.yml"
# As nvidia-installer, make, dkms and modprobe print them.
LINES = {
    "ERROR: Invalid commandline, please run `./nvidia-installer --help` for usage information.": "does not know one of its options",
    "WARNING: The Nouveau kernel driver is currently in use by your system.": "Run the role nouveau",
    "The NVIDIA driver appears to have been installed previously using a different installer.": "nvidia_driver_remove_other",
    "ERROR: An NVIDIA kernel module 'nvidia-uvm' appears to already be loaded in your kernel.": "nvidia_driver_stop_gpu_users",
    "ERROR: An NVIDIA kernel module 'nvidia' appears to be already loaded in your kernel.": "nvidia_driver_stop_gpu_users",
    "ERROR: You appear to be running an X server.  Please exit X before installing.": "display manager",
    "modprobe: ERROR: could not insert 'nvidia': Required key not available": "Secure Boot",
    "modprobe: ERROR: could not insert 'nvidia': Key was rejected by service": "mokutil --import",
    "ERROR: Unable to find the kernel source tree for the currently running kernel.": "headers of the kernel are missing",
    "Error! Your kernel headers for kernel 6.8.0-87-generic cannot be found.": "headers of the kernel are missing",
    "gcc: error: unrecognized command-line option '-ftrivial-auto-var-init=zero'": "another compiler than the kernel",
    "fatal error: gelf.h: No such file or directory": "libelf-dev",
    "/bin/sh: 1: g++: not found": "g++ (gcc-c++)",
    "gcc: fatal error: cannot execute 'cc1plus': execvp: No such file or directory": "g++ (gcc-c++)",
    "/bin/sh: 1: /var/lib/dkms/nvidia/595.71.05/build/pahole.sh: Permission denied": "pahole",
    "cp: error writing 'nvidia.ko': No space left on device": "disk is full",
    "WARNING: Failed to register the NVIDIA kernel modules with DKMS.": "DKMS has no working module",
    "WARNING: ... supported through NVIDIA legacy Linux graphics drivers and will be ignored by": 'nvidia_driver_branch to "580"',
    "NVRM: installed in this system requires use of the NVIDIA open kernel modules.": "nvidia_driver_module_type to open",
    "nvidia/nv.c:12:5: error: implicit declaration of function 'follow_pfn'": "does not fit this kernel",
    "modprobe: ERROR: could not insert 'nvidia': Exec format error": "the kernel does not take it",
    "ERROR: Unable to load the kernel module 'nvidia.ko'.": "the kernel does not take it",
}


@pytest.fixture(scope="module")
def diagnoses() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load(VARS.read_text())["__nvidia_driver_diagnoses"]
    return rows


@pytest.mark.parametrize("line", LINES)
def test_the_first_that_fits_tells_the_way_out(diagnoses: list[dict[str, Any]], line: str) -> None:
    means = next((" ".join(row["means"].split()) for row in diagnoses if re.search(row["pattern"], line)), "")
    assert LINES[line] in means


def test_each_row_has_a_line_here(diagnoses: list[dict[str, Any]]) -> None:
    first = [next((row["pattern"] for row in diagnoses if re.search(row["pattern"], line)), "") for line in LINES]
    assert {row["pattern"] for row in diagnoses} == set(first)


def test_a_good_log_means_nothing(diagnoses: list[dict[str, Any]]) -> None:
    good = (
        "Installation of the NVIDIA Accelerated Graphics Driver for Linux-x86_64 (version: 580.159.04) is now complete."
    )
    assert not [row for row in diagnoses if re.search(row["pattern"], good)]
