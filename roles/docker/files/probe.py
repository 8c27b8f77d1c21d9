# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role has to know of Docker on this host, read in one go and printed as one JSON object.

Only reads: nothing is started, written or waited for longer than a few seconds. Runs on the managed
host with its own Python (3.6 at the oldest) and the standard library alone.

Argument: a JSON object {"packages": [names whose installed version is asked for],
"files": [paths whose sha256 is asked for], "nofile": open files that a container shall be allowed}.
"""

import hashlib
import http.client
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

DAEMON_JSON = "/etc/docker/daemon.json"
ENGINE_ENV = "/etc/docker/engine.env"
DROP_INS = Path("/etc/systemd/system/docker.service.d")
SOCKETS = ("/run/docker.sock", "/var/run/docker.sock")
PIDFILES = ("/run/docker.pid", "/var/run/docker.pid")
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*argv):
    """Standard output of a command, or an empty string where it is missing, fails or hangs."""
    try:
        done = subprocess.run(  # noqa: UP022 - Python 3.6 has no capture_output
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            universal_newlines=True,  # noqa: UP021 - nor text
            timeout=20,
            env=dict(os.environ, LC_ALL="C", PATH=PATHS),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def read(path):
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def no_duplicates(pairs):
    """A JSON object with a key twice is legal to the parser and a mistake to its author."""
    keys = [key for key, _value in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise KeyError(", ".join(twice))
    return dict(pairs)


def daemon_json():
    """{"options", "error"}; error holds file, line and column of what cannot be read."""
    result = {"options": {}, "error": ""}
    text = read(DAEMON_JSON)
    if text is None and os.path.lexists(DAEMON_JSON):
        result["error"] = DAEMON_JSON + " is there but cannot be read as a file"
    if not (text or "").strip():  # dockerd, too, takes an empty file for no settings
        return result
    try:
        options = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as err:
        where = f"line {err.lineno} column {err.colno}"
        result["error"] = f"{DAEMON_JSON} {where} is not valid JSON: {err.msg}"
        return result
    except KeyError as err:
        key = err.args[0].split(", ")[0]
        lines = [number for number, line in enumerate(text.splitlines(), 1) if json.dumps(key) in line]
        result["error"] = f"{DAEMON_JSON} line {lines[-1] if lines else 1} sets {key} a second time"
        return result
    if isinstance(options, dict):
        result["options"] = options
    else:
        kind = type(options).__name__
        result["error"] = f"{DAEMON_JSON} line 1 holds a {kind} where a JSON object {{...}} is expected"
    return result


class DockerConnection(http.client.HTTPConnection):
    """HTTP to the engine's socket; five seconds are enough for an engine that is well."""

    def __init__(self, path):
        http.client.HTTPConnection.__init__(self, "localhost", timeout=5)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(5)
        self.sock.connect(self.path)


def engine_info():
    """What the running engine says of itself (GET /info), cut to what the role compares; {} where none answers."""
    for path in SOCKETS:
        if not Path(path).exists():
            continue
        try:
            connection = DockerConnection(path)
            connection.request("GET", "/info")
            info = json.loads(connection.getresponse().read().decode("utf-8"))
        except (OSError, ValueError, http.client.HTTPException):
            continue
        if isinstance(info, dict) and info.get("ServerVersion"):
            return {
                "version": info["ServerVersion"],
                "data_root": info.get("DockerRootDir", ""),
                "live_restore": info.get("LiveRestoreEnabled", False),
                "log_driver": info.get("LoggingDriver", ""),
                "registry_mirrors": (info.get("RegistryConfig") or {}).get("Mirrors") or [],
                "runtimes": sorted(info.get("Runtimes") or {}),
                "swarm": (info.get("Swarm") or {}).get("LocalNodeState") == "active",
                "containers": info.get("Containers", 0),
                "images": info.get("Images", 0),
            }
    return {}


def engine_pid():
    """Process id of the running dockerd, 0 where there is none. A stale pid file is not believed."""
    for path in PIDFILES:
        pid = (read(path) or "").strip()
        if pid.isdigit() and (read(f"/proc/{pid}/comm") or "").strip() == "dockerd":
            return int(pid)
    return 0


def started_at(pid):
    """When a process started, in seconds since the epoch."""
    stat = read(f"/proc/{pid}/stat") or ""
    boot = re.search(r"^btime (\d+)$", read("/proc/stat") or "", re.M)
    if not stat or not boot:
        return 0.0
    ticks = int(stat.rpartition(")")[2].split()[19])
    return int(boot.group(1)) + float(ticks) / os.sysconf("SC_CLK_TCK")


def unit():
    """The systemd unit's state and the arguments that it gives dockerd besides the binary."""
    text = run("systemctl", "show", "docker.service", "-p", "LoadState,UnitFileState,NeedDaemonReload,ExecStart")
    fields = dict(line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    argv = re.search(r"argv\[\]=(.*?) ;", fields.get("ExecStart", ""))
    return {
        "exists": fields.get("LoadState") == "loaded",
        "enabled": fields.get("UnitFileState") == "enabled",
        "needs_reload": fields.get("NeedDaemonReload") == "yes",
        # $VARIABLES of environment files are not expanded by systemctl show.
        "arguments": [word for word in argv.group(1).split()[1:] if not word.startswith("$")] if argv else [],
    }


def sha256(path):
    """Content of a file by its checksum: what it holds may be secret. Empty where there is no file."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return ""


def nofile_possible(wanted):
    """Whether this host lets a process have so many open files; a container host itself confined may not."""
    if wanted <= 0:
        return True
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (ValueError, OSError):
        return False
    return True


def packages(names):
    """{name: version} of those that are installed, by the package manager that the host has."""
    found = {}
    if not names:
        return found
    if shutil.which("rpm", path=PATHS) and run("rpm", "-q", "rpm", "--qf", "x"):
        for line in run("rpm", "-qa", "--qf", "%{NAME} %{EPOCHNUM}:%{VERSION}-%{RELEASE}\\n").splitlines():
            name, _space, version = line.partition(" ")
            if name in names:
                found[name] = version[2:] if version.startswith("0:") else version
        return found
    # One name at a time would be slow, and dpkg-query fails as a whole when one name is unknown to it.
    for line in run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\\n").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "installed" and words[1] in names:
            found[words[1]] = words[2]
    return found


def foreign_sources():
    """Package sources of somebody else's making that also name Docker's repository."""
    found = []
    etc = Path("/etc")
    lists = [etc / "apt/sources.list", *etc.glob("apt/sources.list.d/*"), *etc.glob("yum.repos.d/*.repo")]
    for path in sorted(lists):
        if path.stem == "baremetal-docker":
            continue
        for line in (read(path) or "").splitlines():
            if re.match(r"\s*(deb\s|URIs:|baseurl\s*=|mirrorlist\s*=)", line) and re.search(
                r"download\.docker\.com/linux|docker-ce/linux", line
            ):
                found.append(str(path))
                break
    return found


def main():
    asked = json.loads(sys.argv[1])
    pid = engine_pid()
    start = started_at(pid) if pid else 0.0
    dockerd = shutil.which("dockerd", path=PATHS) or ""
    version = re.search(r"version ([0-9][^,\s]*)", run(dockerd, "--version")) if dockerd else None
    nofile_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # What the engine reads once, when it starts: newer than the engine means not in force yet.
    read_at_start = [Path(DAEMON_JSON), Path(ENGINE_ENV), *DROP_INS.glob("*.conf")]
    print(
        json.dumps(
            {
                "pid1": (read("/proc/1/comm") or "").strip(),
                "dockerd": dockerd,
                "version": version.group(1) if version else "",
                "unit": unit(),
                "pid": pid,
                # A second of grace: file times and process times come from clocks of different steps.
                "newer_files": [
                    str(path) for path in read_at_start if pid and path.exists() and path.stat().st_mtime > start + 1
                ],
                "info": engine_info() if pid else {},
                "daemon_json": daemon_json(),
                "packages": packages(asked["packages"]),
                "foreign_sources": foreign_sources(),
                # dnf fetches its lists when it needs them, apt only when told to.
                "package_lists": not shutil.which("apt-get", path=PATHS)
                or any(Path("/var/lib/apt/lists").glob("*Packages*")),
                "files": {path: sha256(path) for path in asked["files"]},
                "nofile_limit": nofile_limit,
                "nofile_possible": nofile_possible(int(asked["nofile"])),
            },
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
