# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role has to know of GPUs in containers on this host, read in one go and printed as one JSON object.

Only reads. Runs on the managed host with its own Python (3.6 at the oldest) and the standard library alone.
Argument: a JSON object {"packages": [names whose version is asked for], "files": [paths whose sha256 is asked for],
"note": file that says what the acceptance was seen with}.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PCI = "/sys/bus/pci/devices"
DRIVER = "/proc/driver/nvidia/version"
SPECS = ("/etc/cdi", "/var/run/cdi")
DAEMON_JSON = "/etc/docker/daemon.json"
OWN = "baremetal-nvidia-container-toolkit"


def output(*argv):
    """Output of a command, empty where it is missing, fails or hangs."""
    try:
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            universal_newlines=True,
            timeout=30,
            env=dict(os.environ, LC_ALL="C", PATH=PATHS),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def gpus():
    """How many NVIDIA display controllers are on the bus."""
    return sum(
        read(path + "/vendor").strip() == "0x10de" and read(path + "/class").startswith("0x03")
        for path in glob.glob(PCI + "/*")
    )


def driver():
    """Version of the loaded driver, empty without one."""
    found = re.search(r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", read(DRIVER), re.M)
    return found.group(1) if found else ""


def spec_version(text):
    """The driver that a CDI specification was made for: the version of the libcuda that it mounts."""
    found = re.search(r"libcuda\.so\.(\d+\.\d+(?:\.\d+)?)", text)
    return found.group(1) if found else ""


def specs():
    """{file: driver version} of the CDI specifications that name NVIDIA's GPUs."""
    found = {}
    for folder in SPECS:
        for path in sorted(glob.glob(folder + "/*")):
            text = read(path) if path.endswith((".yaml", ".json")) else ""
            if re.search(r"""kind["']?:\s*["']?nvidia\.com/gpu["']?""", text):
                found[path] = spec_version(text)
    return found


def packages(names):
    found = {}
    if shutil.which("rpm", path=PATHS) and output("rpm", "-q", "rpm", "--qf", "x"):
        rows = output("rpm", "-qa", "--qf", "%{NAME} %{VERSION}-%{RELEASE} installed\\n")
    else:
        rows = output("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\\n")
    for line in rows.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "installed" and words[0] in names:
            found[words[0]] = words[1]
    return found


def held(names):
    if shutil.which("apt-mark", path=PATHS):
        return [name for name in output("apt-mark", "showhold").split() if name in names]
    lines = [line.strip() for line in read("/etc/dnf/plugins/versionlock.list").splitlines()]
    return [name for name in names if any(re.match(re.escape(name) + r"-\d", line) for line in lines)]


def foreign_sources():
    """Package sources of somebody else's making that name the toolkit's repository."""
    found = []
    for path in sorted(glob.glob("/etc/apt/sources.list") + glob.glob("/etc/apt/sources.list.d/*")):
        if OWN not in path and re.search(r"^\s*(deb\s|URIs:).*/libnvidia-container", read(path), re.M):
            found.append(path)
    return found


def daemon_json():
    try:
        options = json.loads(read(DAEMON_JSON) or "{}")
    except ValueError:
        return {}  # the role docker says where it is wrong
    return options if isinstance(options, dict) else {}


def sha256(path):
    try:
        with open(path, "rb") as handle:
            return hashlib.sha256(handle.read()).hexdigest()
    except OSError:
        return ""


def main():
    asked = json.loads(sys.argv[1])
    docker = re.search(r"version ([0-9][0-9.]*)", output("dockerd", "--version"))
    options = daemon_json()
    print(
        json.dumps(
            {
                "gpus": gpus(),
                "driver": driver(),
                "specs": specs(),
                "refresh": "enabled" in output("systemctl", "is-enabled", "nvidia-cdi-refresh.path"),
                "packages": packages(asked["packages"]),
                "held": held(asked["packages"]),
                "foreign_sources": foreign_sources(),
                "docker": docker.group(1) if docker else "",
                "daemon_json": {
                    key: options[key] for key in ("runtimes", "features") if isinstance(options.get(key), dict)
                },
                "accepted": read(asked["note"]).strip(),
                "files": {path: sha256(path) for path in asked["files"]},
            },
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
