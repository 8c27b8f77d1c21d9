#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: docker_engine_info
short_description: What the role docker has to know of Docker on a host, in one task
version_added: 0.1.0
description:
  - The engine that is installed and the one that runs, their settings, unit and packages. Never changes or starts anything.
options:
  data_root:
    description: Folder that the engine is to keep its data in, or nothing.
    type: str
    default: ""
  engines:
    description: Packages that bring an engine.
    type: list
    elements: str
    default: []
  nofile:
    description: Open files that a container is to be allowed.
    type: int
    default: 0
  settings:
    description: Text of a daemon.json that the engine is asked to judge, without being started or anything being written.
    type: str
    default: ""
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
  - baremetal.vllm.attributes.look
"""

EXAMPLES = r"""
- name: Look at the engine
  baremetal.vllm.docker_engine_info:
    packages: [docker-ce]
    files: [/etc/docker/daemon.json]
    nofile: 1048576
  register: docker

- name: Ask the engine whether it would start with other settings
  baremetal.vllm.docker_engine_info:
    settings: '{"live-restore": true}'
  register: asked
"""

RETURN = r"""
data_roots:
  description:
    - C(path) behind all links, and whether it C(exists), of O(data_root) and of the folder that daemon.json names. The engine tells of the
      first alone.
  returned: success
  type: dict
  sample: {/data/docker: {path: /mnt/disk/docker, exists: true}}
daemon_json:
  description: C(options) of daemon.json, or C(error), which names file, line and column of what cannot be read.
  returned: success
  type: dict
dockerd:
  description: Path of the engine's program, empty where there is none.
  returned: success
  type: str
engine_package:
  description: First of O(engines) that is installed, empty where none is.
  returned: success
  type: str
files:
  description: SHA-256 of each of O(files), empty where it is missing.
  returned: success
  type: dict
foreign_sources:
  description: Package sources of somebody else's making that name Docker's repository.
  returned: success
  type: list
  elements: str
info:
  description:
    - What the running engine says of itself, cut to what the role compares; empty where none answers. Its C(settings) have the
      names of daemon.json.
  returned: success
  type: dict
newer_files:
  description: Settings that changed after the engine's start, and so are not in force yet.
  returned: success
  type: list
  elements: str
nofile_limit:
  description: Open files that this host allows.
  returned: success
  type: int
nofile_possible:
  description: Whether O(nofile) is within what this host allows.
  returned: success
  type: bool
objection:
  description: Why the engine would not start with O(settings), empty where it would or none is there to ask.
  returned: success
  type: str
package_lists:
  description: Whether packages can be looked up already.
  returned: success
  type: bool
packages:
  description: Version of each of O(packages) that is installed.
  returned: success
  type: dict
  sample: {docker-ce: "5:29.1.3-1~debian.12~bookworm"}
pid:
  description: Process id of the running engine, 0 where none runs.
  returned: success
  type: int
pid1:
  description: Name of process 1.
  returned: success
  type: str
unit:
  description: C(exists), C(enabled), C(needs_reload) of docker.service, and the C(arguments) that it gives dockerd.
  returned: success
  type: dict
version:
  description: Version of the engine's program.
  returned: success
  type: str
"""

import glob
import http.client
import json
import os
import re
import resource
import socket
import tempfile

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import (
    DAEMON_JSON,
    daemon_json,
    foreign_sources,
    output,
    package_lists,
    packages,
    read,
    run,
    sha256,
    which,
)

ENGINE_ENV = "/etc/docker/engine.env"
DROP_INS = "/etc/systemd/system/docker.service.d/*.conf"
SOCKETS = ("/run/docker.sock", "/var/run/docker.sock")
PIDFILES = ("/run/docker.pid", "/var/run/docker.pid")
# dockerd has --validate since 23.0. An older one reads and judges the file first and this flag afterwards, so that the complaint about
# the flag, and no other, says that the file is good.
NO_SUCH_LEVEL = "validate-only"
REPOSITORY = r"download\.docker\.com/linux|docker-ce/linux"


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
        if not os.path.exists(path):
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
                "settings": {
                    "data-root": info.get("DockerRootDir", ""),
                    "live-restore": info.get("LiveRestoreEnabled", False),
                    "log-driver": info.get("LoggingDriver", ""),
                    "registry-mirrors": (info.get("RegistryConfig") or {}).get("Mirrors") or [],
                },
                "runtimes": sorted(info.get("Runtimes") or {}),
                "swarm": (info.get("Swarm") or {}).get("LocalNodeState") == "active",
                "containers": info.get("Containers", 0),
                "images": info.get("Images", 0),
            }
    return {}


def engine_pid():
    """Process id of the running dockerd, 0 where there is none. A stale pid file is not believed, nor one of a process that has ended
    and was not waited for, as under a process 1 that waits for none."""
    for path in PIDFILES:
        pid = read(path).strip()
        if pid.isdigit() and re.match(r"Name:\tdockerd\n(.*\n)*?State:\t[^ZX]", read("/proc/%s/status" % pid)):
            return int(pid)
    return 0


def started_at(pid):
    """When a process started, in seconds since the epoch."""
    stat = read("/proc/%s/stat" % pid)
    boot = re.search(r"^btime (\d+)$", read("/proc/stat"), re.M)
    if not stat or not boot:
        return 0.0
    ticks = int(stat.rpartition(")")[2].split()[19])
    return int(boot.group(1)) + float(ticks) / os.sysconf("SC_CLK_TCK")


def unit():
    """The systemd unit's state and the arguments that it gives dockerd besides the binary."""
    text = output("systemctl", "show", "docker.service", "-p", "LoadState,UnitFileState,NeedDaemonReload,ExecStart")
    fields = dict(line.partition("=")[::2] for line in text.splitlines() if "=" in line)
    argv = re.search(r"argv\[\]=(.*?) ;", fields.get("ExecStart", ""))
    return {
        "exists": fields.get("LoadState") == "loaded",
        "enabled": fields.get("UnitFileState") == "enabled",
        "needs_reload": fields.get("NeedDaemonReload") == "yes",
        # $VARIABLES of environment files are not expanded by systemctl show.
        "arguments": [word for word in argv.group(1).split()[1:] if not word.startswith("$")] if argv else [],
    }


def nofile_possible(wanted):
    """Whether this host lets a process have so many open files; a container host itself confined may not."""
    if wanted <= 0:
        return True
    # In a process of its own: the limit is passed on to children, and without CAP_SYS_RESOURCE it never rises again.
    return run("sh", "-c", 'ulimit -n "$0"', str(wanted))[0] == 0


def objection(dockerd, version, arguments, text):
    """What this dockerd, called as its unit calls it, has against a daemon.json; a setting made in both places is found, too."""
    old = int(version.split(".")[0]) < 23
    if old:
        options = json.loads(text)
        options.pop("log-level", None)  # would be said twice: here and by the flag
        text = json.dumps(options)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as settings:
        settings.write(text)
        settings.flush()
        command = [dockerd] + arguments + ["--config-file", settings.name]
        status, said = run(*(command + (["--log-level", NO_SUCH_LEVEL] if old else ["--validate"])), timeout=30)
    if status == 0 or (old and "unable to parse logging level: " + NO_SUCH_LEVEL in said):
        return ""
    return said.strip().replace(settings.name, DAEMON_JSON) or "dockerd gave no answer within 30 seconds"


def look(asked):
    pid = engine_pid()
    start = started_at(pid) if pid else 0.0
    dockerd = which("dockerd")
    version = re.search(r"version ([0-9][^,\s]*)", output(dockerd, "--version")) if dockerd else None
    nofile_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    installed = packages()
    service = unit()
    settings = daemon_json()
    roots = [asked["data_root"], settings["options"].get("data-root")]
    # What the engine reads once, when it starts: newer than the engine means not in force yet.
    read_at_start = [DAEMON_JSON, ENGINE_ENV] + sorted(glob.glob(DROP_INS))
    return {
        "pid1": read("/proc/1/comm").strip(),
        "dockerd": dockerd,
        "version": version.group(1) if version else "",
        "unit": service,
        "pid": pid,
        # A second of grace: file times and process times come from clocks of different steps.
        "newer_files": [
            path for path in read_at_start if pid and os.path.exists(path) and os.path.getmtime(path) > start + 1
        ],
        "info": engine_info() if pid else {},
        "daemon_json": settings,
        "data_roots": {
            root: {"path": os.path.realpath(root), "exists": os.path.isdir(root)}
            for root in roots
            if root and isinstance(root, str)
        },
        "packages": {name: installed[name] for name in asked["packages"] if name in installed},
        "engine_package": next((name for name in asked["engines"] if name in installed), ""),
        "objection": objection(dockerd, version.group(1), service["arguments"], asked["settings"])
        if version and asked["settings"]
        else "",
        "foreign_sources": foreign_sources(REPOSITORY, "baremetal-docker"),
        "package_lists": package_lists(),
        "files": {path: sha256(path) for path in asked["files"]},
        "nofile_limit": nofile_limit,
        "nofile_possible": nofile_possible(asked["nofile"]),
    }


def main():
    module = AnsibleModule(
        argument_spec={
            "packages": {"type": "list", "elements": "str", "default": []},
            "data_root": {"type": "str", "default": ""},
            "engines": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "nofile": {"type": "int", "default": 0},
            "settings": {"type": "str", "default": "", "no_log": True},  # proxies may have passwords
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **look(module.params))


if __name__ == "__main__":
    main()
