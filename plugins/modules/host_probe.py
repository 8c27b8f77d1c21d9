#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: host_probe
short_description: Look at what the preflight of this collection needs to know, in one task
version_added: 0.1.0
description:
  - Disk space, taken ports, Python interpreters that really run, readable files. Never changes anything.
options:
  paths:
    description: Folders whose file system is measured. A missing one is measured where it would be made.
    type: list
    elements: path
    default: []
  ports:
    description: TCP ports to look for.
    type: list
    elements: int
    default: []
  folders:
    description: Working folders that a C(cwd) of RV(listeners) is compared with. One that is a link is told by the name that it has here.
    type: list
    elements: path
    default: []
  pythons:
    description: Names or paths of interpreters to try, in order of preference.
    type: list
    elements: str
    default: []
  files:
    description: Small text files to read, also as patterns such as C(/etc/vllm/*/plan.json). A missing one is left out of RV(files).
    type: list
    elements: path
    default: []
  fingerprints:
    description: Files whose content, mode and owner are compared with what they should be.
    type: list
    elements: path
    default: []
  programs:
    description: Programs to look for on PATH.
    type: list
    elements: str
    default: []
  libraries:
    description: Shared libraries to look for, by the name that the loader uses.
    type: list
    elements: str
    default: []
  pid_files:
    description:
      - Files that hold the process id of a daemon whose command line holds the file's name without its ending, or, behind
        it, where it may run in a container, the inode of its PID namespace, in which the id counts.
    type: list
    elements: path
    default: []
  users:
    description: Names of users to look for.
    type: list
    elements: str
    default: []
  writable:
    description: Folders that this user is to write to.
    type: list
    elements: path
    default: []
  images:
    description: Container images to look for. Given, also as an empty list, Docker is asked what it is.
    type: list
    elements: str
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
"""

EXAMPLES = r"""
- name: Look before leaping
  baremetal.vllm.host_probe:
    paths: [/srv/models]
    ports: [8000]
    pythons: [python3.12, python3]
  register: probe
"""

RETURN = r"""
fingerprints:
  description: For each file, C(<sha256> <mode> <owner>), or nothing where it is missing or may not be read.
  returned: success
  type: dict
  sample: {/etc/vllm/chat/env: "e3b0c442... 0600 vllm"}
docker:
  description:
    - C(version) of a Docker Engine that answers, empty without one; C(cdi), whether it knows NVIDIA's GPUs as CDI
      devices; C(nvidia_runtime), whether it knows NVIDIA's runtime; C(images), the id of each of O(images) that is there;
      C(free_mib) where images lie.
  returned: when O(images) is given
  type: dict
  sample: {version: 29.0.1, cdi: true, nvidia_runtime: true, images: {"vllm/vllm-openai:v0.25.1": "sha256:..."}, free_mib: 81920}
free_mib:
  description: MiB that are free for this user below each path.
  returned: success
  type: dict
  sample: {/srv/models: 81920}
files:
  description: Content of each file that could be read.
  returned: success
  type: dict
init:
  description: Name of process 1, such as V(systemd).
  returned: success
  type: str
libraries:
  description: Those of O(libraries) that can be loaded.
  returned: success
  type: list
  elements: str
listeners:
  description:
    - For each port that is taken, C(pid), C(command) and C(cwd) of a listener; empty where this user may not see them.
    - The working folder tells one's own server from another; vLLM changes its command line. It is the real path, or that of O(folders)
      which leads there.
  returned: success
  type: dict
  sample: {"8000": {"pid": 12, "command": "nginx: master process", "cwd": "/"}}
pids:
  description: For each file of O(pid_files), the id of a living process as this host knows it, or 0.
  returned: success
  type: dict
programs:
  description: Those of O(programs) that are there.
  returned: success
  type: list
  elements: str
users:
  description: Those of O(users) that are there.
  returned: success
  type: list
  elements: str
writable:
  description: Those of O(writable) that are there and can be written to.
  returned: success
  type: list
  elements: str
pythons:
  description:
    - Interpreters that ran, with C(path), C(version), whether they can make a virtual environment (C(venv)) and whether
      their C headers are there (C(headers)).
  returned: success
  type: list
  elements: dict
"""

import ctypes
import glob
import hashlib
import json
import os
import pwd
import re

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import listening_sockets, names_of

ASK_PYTHON = (
    "import json, os, sys, importlib.util as u, sysconfig as c;"
    "print(json.dumps([sys.executable, '.'.join(map(str, sys.version_info[:3])), bool(u.find_spec('ensurepip')),"
    "os.path.exists(os.path.join(c.get_paths()['include'], 'Python.h'))]))"
)


def free_mib(path):
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize // (1 << 20)


def read(path):
    with open(path, "rb") as handle:
        return handle.read().decode("utf-8", "replace")


def fingerprint(path):
    try:
        status = os.stat(path)
        with open(path, "rb") as handle:
            digest = hashlib.sha256(handle.read()).hexdigest()
    except (IOError, OSError):
        return ""
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = str(status.st_uid)
    return "%s %04o %s" % (digest, status.st_mode & 0o7777, owner)


def exists(user):
    try:
        return bool(pwd.getpwnam(user))
    except KeyError:
        return False


def docker(module, images):
    """What the engine says of itself; all empty without one."""

    def ask(*arguments):
        try:
            code, output, dummy = module.run_command(["docker"] + list(arguments), handle_exceptions=False)
        except OSError:  # there is no docker
            return None
        return output if code == 0 else None

    try:
        info = json.loads(ask("info", "--format", "{{json .}}") or "{}")
    except ValueError:
        info = {}
    specs = [name for folder in info.get("CDISpecDirs") or [] for name in glob.glob(folder + "/*")]
    found = {}
    for image in images if info.get("ServerVersion") else []:
        identity = ask("image", "inspect", "--format", "{{.Id}}", image)
        if identity:
            found[image] = identity.strip()
    return {
        "version": info.get("ServerVersion", ""),
        "cdi": any("nvidia.com/gpu" in read(name) for name in specs),
        "nvidia_runtime": "nvidia" in (info.get("Runtimes") or {}),
        "images": found,
        "free_mib": free_mib(info.get("DockerRootDir") or "/var/lib/docker"),
    }


def loadable(library):
    try:
        ctypes.CDLL(library)
        return True
    except OSError:
        return False


def living_pid(path):
    try:
        numbers = [int(word) for word in read(path).split()]
        pid = numbers[0]
    except (IOError, OSError, ValueError, IndexError):
        return 0
    if len(numbers) == 1:
        # After a boot another process may have its number.
        program = os.path.splitext(os.path.basename(path))[0]
        try:
            return pid if program in read("/proc/%d/cmdline" % pid) else 0
        except (IOError, OSError):
            return 0
    for link in glob.glob("/proc/[0-9]*/ns/pid"):
        try:
            if os.readlink(link) == "pid:[%d]" % numbers[1]:
                process = link.split("/")[2]
                row = re.search(r"^NSpid:.*?(\d+)$", read("/proc/%s/status" % process), re.M)
                if row and int(row.group(1)) == pid:
                    return int(process)
        except (IOError, OSError):
            continue  # it has gone, or is another user's
    return 0


def listening_inodes(ports):
    """Port -> inodes of the sockets that listen on it: servers may share it."""
    found = {}
    for _address, port, inode in listening_sockets():
        if port in ports:
            found.setdefault(port, []).append(inode)
    return found


def owners(inodes, folders=()):
    """Inode -> pid, command line and working folder of a process that holds the socket. Named as in C(folders) where it is one of these:
    what compares it is on the controller, where the links of this host cannot be resolved."""
    wanted, found = set(inodes), {}
    asked = {name: folder for folder in folders for name in names_of(folder)}
    for link in glob.glob("/proc/[0-9]*/fd/*") if wanted else []:
        try:
            match = re.match(r"socket:\[(\d+)\]$", os.readlink(link))
            if match and match.group(1) in wanted:
                pid = link.split("/")[2]
                cwd = os.readlink("/proc/%s/cwd" % pid)
                found[match.group(1)] = {
                    "pid": int(pid),
                    "command": " ".join(read("/proc/%s/cmdline" % pid).split("\0")).strip(),
                    "cwd": asked.get(cwd, cwd),
                }
        except (IOError, OSError):
            continue  # the process has gone, or is another user's
    return found


def interpreters(module, candidates):
    found = []
    for candidate in candidates:
        try:
            # Run, not looked up: a name on PATH may be a version manager's shim for a version that is not there.
            command = [candidate, "-c", ASK_PYTHON]
            dummy, output, dummy = module.run_command(command, handle_exceptions=False, expand_user_and_vars=False)
            path, version, venv, headers = json.loads(output)
        except (OSError, TypeError, ValueError):  # it does not run, or is no Python
            continue
        if path not in [python["path"] for python in found]:
            found.append({"path": path, "version": version, "venv": venv, "headers": headers})
    return found


def main():
    module = AnsibleModule(
        argument_spec={
            "paths": {"type": "list", "elements": "path", "default": []},
            "folders": {"type": "list", "elements": "path", "default": []},
            "ports": {"type": "list", "elements": "int", "default": []},
            "pythons": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "fingerprints": {"type": "list", "elements": "path", "default": []},
            "images": {"type": "list", "elements": "str"},
            "programs": {"type": "list", "elements": "str", "default": []},
            "libraries": {"type": "list", "elements": "str", "default": []},
            "pid_files": {"type": "list", "elements": "path", "default": []},
            "users": {"type": "list", "elements": "str", "default": []},
            "writable": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    inodes = listening_inodes(set(module.params["ports"]))
    holders = owners(sum(inodes.values(), []), module.params["folders"])
    unknown = {"pid": None, "command": "", "cwd": ""}
    # Of several, one that works in a folder that was asked for.
    listeners = dict(
        (
            str(port),
            sorted(
                (holders.get(inode, unknown) for inode in those), key=lambda one: one["cwd"] in module.params["folders"]
            )[-1],
        )
        for port, those in inodes.items()
    )
    files = {}
    for path in sum((sorted(glob.glob(name)) if "*" in name else [name] for name in module.params["files"]), []):
        try:
            files[path] = read(path)
        except (IOError, OSError):
            pass
    asked = module.params["images"]
    module.exit_json(
        changed=False,
        docker=docker(module, asked) if asked is not None else {},
        free_mib=dict((path, free_mib(path)) for path in module.params["paths"]),
        files=files,
        fingerprints=dict((path, fingerprint(path)) for path in module.params["fingerprints"]),
        init=read("/proc/1/comm").strip(),
        libraries=[library for library in module.params["libraries"] if loadable(library)],
        listeners=listeners,
        pids=dict((path, living_pid(path)) for path in module.params["pid_files"]),
        programs=[program for program in module.params["programs"] if module.get_bin_path(program)],
        pythons=interpreters(module, module.params["pythons"]),
        users=[user for user in module.params["users"] if exists(user)],
        writable=[
            path for path in module.params["writable"] if os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)
        ],
    )


if __name__ == "__main__":
    main()
