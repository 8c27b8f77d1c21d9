# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""How modules look at a host: commands, files, packages, Docker's settings. Only reads. For the host's own Python, 3.6 at the oldest."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess

PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DAEMON_JSON = "/etc/docker/daemon.json"
DRIVER = "/proc/driver/nvidia/version"
PCI = "/sys/bus/pci/devices"
EFI = "sys/firmware/efi"
INFINIBAND = "/sys/class/infiniband"
VERSIONLOCK = "/etc/dnf/plugins/versionlock.list"
SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d/*", "/etc/yum.repos.d/*.repo")


def which(name):
    """Where a program is, empty where it is not."""
    return shutil.which(name, path=PATHS) or ""


def names_of(folder):
    """What links in /proc may call a folder whose path is given.

    The kernel resolves links: a process below /var/lib/vllm works in /data/vllm if the one leads to the other. In a container the
    folder is mounted under the path as it is written, and there no link is.
    """
    return {os.path.normpath(folder), os.path.realpath(folder)}


def execute(argv, timeout, errors=True, path=PATHS):
    """(status, output) of a command. Raises OSError where it cannot be run, TimeoutExpired after C(timeout) seconds.

    C(run_command) of modules has no such limit. Errors are part of the output unless C(errors) is false.
    """
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if errors else subprocess.DEVNULL,
        universal_newlines=True,
        env=dict(os.environ, LC_ALL="C", PATH=path),
    )
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        # Not waited for: a program that is stuck in a driver, as nvidia-smi may be, does not die before the driver lets go of it.
        process.kill()
        raise
    return process.returncode, said


def run(*argv, **options):
    """As C(execute), within 60 seconds unless C(timeout) is given, but with status None where that raises."""
    try:
        return execute(argv, options.get("timeout", 60), options.get("errors", True), PATHS)
    except OSError as error:
        return None, str(error)
    except subprocess.TimeoutExpired:
        return None, ""


def output(*argv):
    """Standard output of a command that succeeds, else nothing."""
    status, text = run(*argv, errors=False)
    return text if status == 0 else ""


def read(path):
    """Content of a text file, empty where it is missing or may not be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def listening_sockets(process="self"):
    """(address as the kernel writes it, port, inode) of each TCP socket that listens in the network of a process."""
    for table in ("tcp", "tcp6"):
        for cells in (line.split() for line in read("/proc/%s/net/%s" % (process, table)).splitlines()[1:]):
            if cells[3] == "0A":  # the state LISTEN
                address, port = cells[1].rsplit(":", 1)
                yield address, int(port, 16), cells[9]


def sha256(path):
    """Content of a file by its checksum, as what it holds may be secret. Empty where there is no file."""
    try:
        with open(path, "rb") as handle:
            return hashlib.sha256(handle.read()).hexdigest()
    except OSError:
        return ""


def packages():
    """{name: version} of everything installed, by the package manager that the host has. An epoch of 0 is left out."""
    return {name: version for name, (version, state) in package_states().items() if state == "installed"}


def package_states():
    """{name: (version, state)} of what the package manager knows, packages that it could not set up included."""
    # On the Debian family rpm may be there as a mere tool.
    if which("rpm") and (not which("dpkg-query") or output("rpm", "-q", "rpm", "--qf", "x")):
        rows = output("rpm", "-qa", "--qf", "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE} installed\\n")
    else:
        rows = output("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\\n")
    found = {}
    for line in rows.splitlines():
        words = line.split()
        if len(words) == 3:
            found[words[0]] = (words[1][2:] if words[1].startswith("0:") else words[1], words[2])
    return found


def package_lists():
    """Whether packages can be looked up. dnf fetches its lists when it needs them, apt only when told to."""
    return not which("apt-get") or bool(glob.glob("/var/lib/apt/lists/*Packages*"))


def held():
    """Names of the packages that updates leave alone."""
    if which("apt-mark"):
        return sorted(output("apt-mark", "showhold").split())
    lines = [line.strip() for line in read(VERSIONLOCK).splitlines()]
    # dnf's list has name-epoch:version-release.arch, or name-version-release.arch.
    return sorted(
        re.sub(r"-[0-9]+:.*$|-[0-9][^-]*-[^-]*$", "", line) for line in lines if line and not line.startswith("#")
    )


def foreign_sources(pattern, own):
    """Package sources that name an address C(pattern), except the file whose name has C(own) in it."""
    found = []
    for path in sorted(path for source in SOURCES for path in glob.glob(source)):
        lines = re.findall(r"^\s*(?:deb\s|URIs:|baseurl\s*=|mirrorlist\s*=).*$", read(path), re.M)
        if own not in os.path.basename(path) and any(re.search(pattern, line) for line in lines):
            found.append(path)
    return found


def no_duplicates(pairs):
    """A JSON object with a key twice is legal to the parser and a mistake to its author."""
    keys = [key for key, _value in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise KeyError(", ".join(twice))
    return dict(pairs)


def daemon_json():
    """{"options", "error"} of Docker's settings; error holds file, line and column of what cannot be read."""
    result = {"options": {}, "error": ""}
    try:
        with open(DAEMON_JSON, encoding="utf-8", errors="replace") as handle:
            text = handle.read()
    except OSError:
        text = ""
        if os.path.lexists(DAEMON_JSON):
            result["error"] = DAEMON_JSON + " is there but cannot be read as a file"
    if not text.strip():  # dockerd, too, takes an empty file for no settings
        return result
    try:
        options = json.loads(text, object_pairs_hook=no_duplicates)
    except ValueError as error:
        where = "line %d column %d" % (error.lineno, error.colno)
        result["error"] = "%s %s is not valid JSON: %s" % (DAEMON_JSON, where, error.msg)
        return result
    except KeyError as error:
        key = error.args[0].split(", ")[0]
        lines = [number for number, line in enumerate(text.splitlines(), 1) if json.dumps(key) in line]
        result["error"] = "%s line %d sets %s a second time" % (DAEMON_JSON, lines[-1] if lines else 1, key)
        return result
    if isinstance(options, dict):
        result["options"] = options
    else:
        kind = type(options).__name__
        result["error"] = "%s line 1 holds a %s where a JSON object {...} is expected" % (DAEMON_JSON, kind)
    return result


def link(path):
    """Name at the end of a symbolic link, empty where there is none."""
    return os.path.basename(os.path.realpath(path)) if os.path.islink(path) else ""


def nvidia_devices():
    """(GPUs, switches): NVIDIA's display controllers (PCI class 03) and NVSwitches (class 0680), with the driver of each."""
    gpus, switches = [], []
    for path in sorted(glob.glob(os.path.join(PCI, "*"))):
        if read(os.path.join(path, "vendor")).strip() != "0x10de":
            continue
        kind = read(os.path.join(path, "class")).strip()
        row = {
            "address": os.path.basename(path),
            "device_id": read(os.path.join(path, "device")).strip().lower(),
            "driver": link(os.path.join(path, "driver")),
        }
        if kind.startswith("0x03"):
            gpus.append(row)
        elif kind.startswith("0x0680"):
            switches.append(row)
    return gpus, switches


def nvlink_switches():
    """Names of the network devices that manage NVSwitches of NVLink 5, which are not on the host's bus themselves.

    Their vital product data says so (NVIDIA/gpu-driver-container asks the same).
    """
    return [path.split("/")[-3] for path in sorted(glob.glob(INFINIBAND + "/*/device/vpd")) if "SW_MNG" in read(path)]


def efi_flag(root, name):
    """Value of an EFI variable of one byte, which follows four bytes of attributes; None where it cannot be read."""
    for path in glob.glob(os.path.join(root, EFI, "efivars", name + "-*")):
        try:
            with open(path, "rb") as handle:
                return bytearray(handle.read())[4]
        except (OSError, IndexError):
            pass
    return None


def signed_modules_only(root="/"):
    """Whether Secure Boot keeps unsigned modules out, None where it cannot be told."""
    if not os.path.isdir(os.path.join(root, EFI)):
        return False
    flag = efi_flag(root, "SecureBoot")
    # With shim's validation switched off the kernel takes unsigned modules.
    return None if flag is None else flag == 1 and efi_flag(root, "MokSBStateRT") != 1


def loaded_driver():
    """(version, C(open) or C(proprietary)) of the driver that says so itself; two empty words without one."""
    text = read(DRIVER)
    found = re.search(r"^NVRM version:.*?(Open Kernel Module)?(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)\s", text, re.M)
    return (found.group(2), "open" if found.group(1) else "proprietary") if found else ("", "")
