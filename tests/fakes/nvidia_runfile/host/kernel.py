#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for modprobe, rmmod and uname on a test host whose kernel is its neighbours', too.

Modules are looked up by the real modinfo among those built for the kernel of the headers here (/etc/nvidia-standin/kernel), which is
what `uname -r` says. Loading one makes what the real one makes below /sys/module and /proc/driver and binds the GPUs on the bus.
A module is in use while a process has a GPU's device file open, or while /etc/nvidia-standin/stuck is there.
"""

import glob
import os
import re
import shutil
import subprocess
import sys

SYS = "/sys/module"
PROC = "/proc/driver/nvidia"
BUS = "/sys/bus/pci/devices"
SWITCHES = "/etc/nvidia-standin/"
DEPENDS = {"nvidia_uvm": ["nvidia"], "nvidia_drm": ["nvidia"], "nvidia": []}


def kernel():
    return open(SWITCHES + "kernel").read().strip()


def field(name, module):
    module = module.replace("_", "-")
    for file in (module, module.replace("nvidia", "nvidia-current", 1)):  # the latter is Debian's, by its modprobe.d
        done = subprocess.run(
            ["/sbin/modinfo", "-k", kernel(), "-F", name, file],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0]
    return ""


def gpus():
    for path in sorted(glob.glob(BUS + "/*")):
        if open(path + "/vendor").read().strip() == "0x10de" and open(path + "/class").read().startswith("0x03"):
            yield path


def in_use(module):
    if os.path.exists(SWITCHES + "stuck"):
        return 1
    if module == "nvidia" and os.path.isdir(SYS + "/nvidia_uvm"):
        return 1
    count = 0
    for path in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            count += bool(re.match(r"/dev/nvidia(\d|ctl|-uvm)", os.readlink(path)))
        except OSError:
            continue
    return count


def load(module):
    for other in DEPENDS.get(module, []):
        load(other)
    folder = os.path.join(SYS, module)
    if os.path.isdir(folder):
        return
    version = field("version", module)
    if not version:
        sys.exit("modprobe: FATAL: Module %s not found in directory /lib/modules/%s" % (module, kernel()))
    if os.path.exists(SWITCHES + "secure-boot"):
        sys.exit("modprobe: ERROR: could not insert '%s': Required key not available" % module)
    if os.path.exists(SWITCHES + "broken-load") and open(SWITCHES + "broken-load").read().strip() in ("", version):
        sys.exit("modprobe: ERROR: could not insert '%s': No such device" % module)
    for path in gpus():
        if os.path.basename(os.path.realpath(path + "/driver")) == "nouveau":
            sys.exit("modprobe: ERROR: could not insert '%s': No such device" % module)
    os.makedirs(folder)
    with open(folder + "/version", "w") as handle:
        handle.write(version + "\n")
    with open(folder + "/refcnt", "w") as handle:
        handle.write("0\n")
    if module == "nvidia":
        os.makedirs(PROC, exist_ok=True)
        kind = "Open Kernel Module for x86_64" if "GPL" in field("license", module) else "x86_64 Kernel Module"
        with open(PROC + "/version", "w") as handle:
            handle.write("NVRM version: NVIDIA UNIX %s  %s  Release Build  (standin)\n" % (kind, version))
        os.makedirs(SYS + "/nvidia/drivers", exist_ok=True)
        for number, path in enumerate(gpus()):
            os.makedirs("/srv/standin/drivers/nvidia", exist_ok=True)
            if not os.path.lexists(path + "/driver"):
                os.symlink("/srv/standin/drivers/nvidia", path + "/driver")
            open("/dev/nvidia%d" % number, "a").close()
        open("/dev/nvidiactl", "a").close()


def unload(module, program):
    folder = os.path.join(SYS, module)
    if not os.path.isdir(folder):
        sys.exit("%s: ERROR: Module %s is not currently loaded" % (program, module))
    if in_use(module):
        sys.exit("%s: ERROR: Module %s is in use" % (program, module))
    shutil.rmtree(folder)
    if module == "nvidia":
        shutil.rmtree(PROC)
        for path in gpus():
            if os.path.basename(os.path.realpath(path + "/driver")) == "nvidia":
                os.unlink(path + "/driver")


def main():
    program = os.path.basename(sys.argv[0])
    words = sys.argv[1:]
    if program == "uname":
        if words == ["-r"]:
            print(kernel())
            return
        os.execv("/usr/bin/uname", ["uname"] + words)
    names = [word.replace("-", "_") for word in words if not word.startswith("-")]
    others = [word for word in words if word.startswith("-")]
    if program == "rmmod" and not others and names:
        for name in names:
            unload(name, program)
    elif program == "modprobe" and set(others) <= {"-a", "--all"} and names:
        for name in names:
            if name.startswith("nvidia"):
                load(name)
            elif not field("filename", name):
                sys.exit("modprobe: FATAL: Module %s not found in directory /lib/modules/%s" % (name, kernel()))
    else:
        sys.exit("%s: the stand-in does not know: %s" % (program, " ".join(words)))


if __name__ == "__main__":
    main()
