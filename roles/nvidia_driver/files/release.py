# SPDX-License-Identifier: GPL-3.0-or-later
"""Stops what uses the GPUs and unloads the driver's modules. Prints what was stopped and what is left, as JSON.

Argument: a JSON object {"users": rows of probe.py, "units": [the driver's own daemons], "stop": consent to stop the
former, "seconds": how long a process may take to end}. Runs with Python 3.6 and the standard library alone.
"""

import json
import os
import signal
import subprocess
import sys
import time

MODULES = "/sys/module"
PROC = "/proc"
# In the order in which they let go of each other.
ORDER = ("nv_peer_mem", "nvidia_fs", "gdrdrv", "nvidia_peermem", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia")
PATHS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*argv):
    """(success, output of both streams)."""
    try:
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,  # noqa: UP021
            env=dict(os.environ, LC_ALL="C", PATH=PATHS),
            check=False,
        )
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.strip()


def alive(pid):
    """Whether a process is still there and no zombie."""
    try:
        with open("%s/%d/stat" % (PROC, pid), encoding="utf-8") as handle:
            return handle.read().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def end(pid, seconds):
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, sign)
        except OSError:
            return
        until = time.time() + seconds
        while alive(pid) and time.time() < until:
            time.sleep(0.2)
        if not alive(pid):
            return


def main():
    asked = json.loads(sys.argv[1])
    stopped, problems = [], []
    wanted = [("unit", name) for name in asked["units"]]
    if asked["stop"]:
        for user in asked["users"]:
            kind = "unit" if user["unit"] else "container" if user["container"] else "process"
            wanted.append((kind, user["unit"] or user["container"] or user["pid"]))
    for kind, name in dict.fromkeys(wanted):
        if kind == "unit":
            if not run("systemctl", "is-active", "--quiet", name)[0]:
                continue
            done, text = run("systemctl", "stop", name)
        elif kind == "container":
            done, text = run("docker", "stop", name)
        else:
            end(name, asked["seconds"])
            done, text = not alive(name), "it does not end"
        if done:
            stopped.append({"kind": kind, "name": name})
        else:
            problems.append("%s %s: %s" % (kind, name, text))
    for name in ORDER:
        if os.path.isdir(os.path.join(MODULES, name)):
            run("rmmod", name)
    left = [name for name in ORDER if os.path.isdir(os.path.join(MODULES, name))]
    print(json.dumps({"stopped": stopped, "problems": problems, "loaded": left}))


if __name__ == "__main__":
    main()
