# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role has to know of the NVIDIA driver on this host, read in one go and printed as one JSON object.

Only reads: nothing is loaded, started or waited for longer than the time limit of nvidia-smi. Runs on the managed
host with its own Python (3.6 at the oldest) and the standard library alone.

Argument: a JSON object {"kernel": release that modules are built for, empty for the running one, "module": its name
in the module tree, "packages": [names whose installed version is asked for, beside the kernel's], "foreign": regular expression of packages
that bring a driver, "files": [paths whose sha256 is asked for], "units": [units asked about], "folders": {path: MiB
that it needs}, "smi_timeout": seconds}.
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
MODULES = "/sys/module"
PROC = "/proc"
DRIVER = "/proc/driver/nvidia/version"
NVSWITCH = "/proc/driver/nvidia-nvswitch/devices"
EFI = "/sys/firmware/efi/efivars"
KERNELS = "/lib/modules"
BOOT = "/boot"
LIBRARIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")
INSTALLER_LOG = "/var/lib/nvidia/log"
ALTERNATE = "/usr/lib/nvidia/alternate-install-present"
CONTAINER = r"(?:docker[-/]|cri-containerd-|libpod-)([0-9a-f]{64})"
KERNEL_PACKAGES = re.compile(r"linux-(headers|image)-|kernel(-core|-devel|-modules)?$")
# One key a distribution: the pair that its dkms signs with.
KEYS = (
    ("/var/lib/shim-signed/mok/MOK.priv", "/var/lib/shim-signed/mok/MOK.der"),
    ("/var/lib/dkms/mok.key", "/var/lib/dkms/mok.pub"),
)


def run(*argv, **options):
    """(status, output of both streams); status None where the command is missing or hangs."""
    try:
        done = subprocess.run(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,  # noqa: UP021
            timeout=options.get("timeout", 60),
            env=dict(os.environ, LC_ALL="C", PATH=PATHS),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, done.stdout


def output(*argv):
    """Output of a command that succeeds, else nothing."""
    status, text = run(*argv)
    return text if status == 0 else ""


def read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def link(path):
    """Name at the end of a symbolic link, empty where there is none."""
    return os.path.basename(os.path.realpath(path)) if os.path.islink(path) else ""


def pci():
    """NVIDIA's display controllers (PCI class 03) and NVSwitches (bridges, class 0680) with the driver they are bound to."""
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


def loaded():
    """Version and flavour of the module that runs, {} where none does."""
    text = read(DRIVER)
    found = re.search(r"^NVRM version:.*?(Open Kernel Module)?(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)\s", text, re.M)
    if not found:
        version = read(os.path.join(MODULES, "nvidia/version")).strip()
        return {"version": version, "flavour": ""} if version else {}
    return {"version": found.group(2), "flavour": "open" if found.group(1) else "proprietary"}


def on_disk(kernel):
    """Version, flavour and path of the module built for a kernel, {} where there is none."""
    fields = {}
    for name in ("nvidia", "nvidia-current"):  # the latter is Debian's name
        for line in output("modinfo", "-k", kernel, name).splitlines():
            key, _colon, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        if fields.get("version"):
            break
    if not fields.get("version"):
        return {}
    return {
        "version": fields["version"],
        "flavour": "open" if "GPL" in fields.get("license", "") else "proprietary",
        "path": fields.get("filename", ""),
        "signer": fields.get("signer", ""),
    }


def dkms_rows(text, module):
    """[{version, kernel, state}] of what dkms status prints; both its old and its new separator of name and version."""
    rows = []
    for line in text.splitlines():
        found = re.match(r"(\S+?)(?:/|, )([^,:\s]+)(?:, ([^,]+), [^:]+)?: (\S+)", line.strip())
        if found and found.group(1) in (module, "nvidia-current", "nvidia-open"):
            rows.append(
                {
                    "module": found.group(1),
                    "version": found.group(2),
                    "kernel": found.group(3) or "",
                    "state": found.group(4),
                }
            )
    return rows


def broken_dkms(module):
    """Versions whose tree is left below /var/lib/dkms without the source it points to: they break `dkms status`."""
    return sorted(
        os.path.basename(os.path.dirname(path))
        for path in glob.glob("/var/lib/dkms/%s/*/source" % module)
        if os.path.islink(path) and not os.path.exists(os.path.join(path, "dkms.conf"))
    )


def userspace():
    """Version of the libraries, by the file that libnvidia-ml.so.1 leads to."""
    for folder in LIBRARIES:
        found = re.match(r"libnvidia-ml\.so\.(\d+\.\d+(?:\.\d+)?)$", link(os.path.join(folder, "libnvidia-ml.so.1")))
        if found:
            return found.group(1)
    return ""


def smi(timeout):
    """What nvidia-smi says of the driver: {version, gpus, error}. A hang is an answer, too."""
    if not shutil.which("nvidia-smi", path=PATHS):
        return {"version": "", "gpus": 0, "error": "nvidia-smi is not there"}
    status, text = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", timeout=timeout)
    versions = re.findall(r"^\s*(\d+\.\d+(?:\.\d+)?)\s*$", text, re.M)
    if status in (0, 14) and versions:
        return {"version": versions[0], "gpus": len(versions), "error": ""}
    error = "no answer within %d seconds" % timeout if status is None else text.strip() or "exit status %d" % status
    return {"version": "", "gpus": 0, "error": " ".join(error.split())}


def compiler(kernel):
    """The compiler that built a kernel, by its own configuration: {text, command, path, source}."""
    for path in (
        "%s/%s/build/.config" % (KERNELS, kernel),
        "%s/config-%s" % (BOOT, kernel),
        "%s/%s/config" % (KERNELS, kernel),
    ):
        found = re.search(r'^CONFIG_CC_VERSION_TEXT="([^"]*)"', read(path), re.M)
        if found:
            text = found.group(1)
            command = text.split(" ")[0]
            return {"text": text, "command": command, "path": shutil.which(command, path=PATHS) or "", "source": path}
    return {"text": "", "command": "", "path": "", "source": ""}


def headers(kernel):
    return os.path.exists("%s/%s/build/Makefile" % (KERNELS, kernel))


def version_key(text):
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|[^\d.\-_]+", text)]


def next_kernel(running):
    """Release that the next boot takes: what grubby says, else the newest image in /boot."""
    default = output("grubby", "--default-kernel").strip() if shutil.which("grubby", path=PATHS) else ""
    if default:
        return re.sub(r"^.*/vmlinuz-", "", default)
    releases = [os.path.basename(path)[len("vmlinuz-") :] for path in glob.glob(BOOT + "/vmlinuz-*")]
    releases = [name for name in releases if os.path.isdir(os.path.join(KERNELS, name))]
    return max(releases, key=version_key) if releases else running


def secure_boot():
    """Whether the firmware lets only signed modules in: the last byte of the EFI variable of that name."""
    for path in glob.glob(os.path.join(EFI, "SecureBoot-*")):
        try:
            with open(path, "rb") as handle:
                return handle.read()[-1:] == b"\x01"
        except OSError:
            return False
    return False


def signing_key():
    """The key pair that dkms signs with, and whether the firmware knows it: {key, certificate, enrolled}."""
    for key, certificate in KEYS:
        if os.path.exists(key) and os.path.exists(certificate):
            text = run("mokutil", "--test-key", certificate)[1]
            return {"key": key, "certificate": certificate, "enrolled": "already enrolled" in text}
    return {"key": "", "certificate": "", "enrolled": False}


def groups(pid):
    """Paths of a process's control groups."""
    return [line.rpartition(":")[2] for line in read("%s/%s/cgroup" % (PROC, pid)).splitlines()]


def owner(pid):
    """What started a process, by its control group: {unit, container}."""
    # This host may be a container itself: what is above it is not its own.
    above = [found.group(0) for found in (re.match(r".*" + CONTAINER, path) for path in groups("self")) if found]
    for path in groups(pid):
        for folder in above:
            if path.startswith(folder):
                path = path[len(folder) :]
        container = re.search(CONTAINER, path)
        if container:
            return {"unit": "", "container": container.group(1)[:12]}
        unit = re.findall(r"/([^/]+\.service)", path)
        if unit and not unit[-1].startswith(("user@", "ssh", "sshd")):
            return {"unit": unit[-1], "container": ""}
    return {"unit": "", "container": ""}


def users():
    """Processes that hold a GPU's device file or its modules' libraries open."""
    found = {}
    for path in glob.glob(PROC + "/[0-9]*/fd/*"):
        try:
            target = os.readlink(path)
        except OSError:
            continue
        if re.match(r"/dev/(nvidia(\d|ctl|-uvm|-modeset|-caps|-nvswitch)|dri/card)", target):
            if target.startswith("/dev/dri/") and not os.path.isdir(os.path.join(MODULES, "nvidia_drm")):
                continue
            found.setdefault(int(path.split("/")[2]), target)
    rows = []
    for pid in sorted(found):
        command = read("%s/%d/cmdline" % (PROC, pid)).replace("\0", " ").strip()
        rows.append(dict(owner(pid), pid=pid, command=command[:120] or read("%s/%d/comm" % (PROC, pid)).strip()))
    return rows


def x_servers():
    """Display servers by their lock files, as the installer looks for them."""
    found = []
    for path in sorted(glob.glob("/tmp/.X[0-7]-lock")):  # noqa: S108 - read, not made
        pid = read(path).strip()
        if pid.isdigit() and os.path.isdir(os.path.join(PROC, pid)):
            found.append(int(pid))
    return found


def modules():
    """{loaded module of the driver: how often it is in use}."""
    found = {}
    for name in ("nvidia", "nvidia_uvm", "nvidia_drm", "nvidia_modeset", "nvidia_peermem", "nvidia_fs", "gdrdrv"):
        path = os.path.join(MODULES, name)
        if os.path.isdir(path):
            count = read(os.path.join(path, "refcnt")).strip()
            found[name] = int(count) if count.lstrip("-").isdigit() else 0
    return found


def packages():
    """({name: version}, package manager): everything installed, by the manager that the host has."""
    if shutil.which("rpm", path=PATHS) and output("rpm", "-q", "rpm", "--qf", "x"):
        rows = output("rpm", "-qa", "--qf", "%{NAME} %{VERSION}-%{RELEASE} installed\\n")
    else:
        rows = output("dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\\n")
    found = {}
    for line in rows.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "installed":
            found[words[0]] = words[1]
    return found


def held():
    """Packages that updates leave alone."""
    if shutil.which("apt-mark", path=PATHS):
        return sorted(output("apt-mark", "showhold").split())
    return sorted(
        line.strip()
        for line in read("/etc/dnf/plugins/versionlock.list").splitlines()
        if line.strip()[:1] not in ("", "#")
    )


def units(names):
    """{unit: {active, enabled, exists}} by one call to systemd."""
    found = {}
    text = output("systemctl", "show", "-p", "Id,LoadState,ActiveState,UnitFileState", *names) if names else ""
    for block in text.split("\n\n"):
        fields = dict(line.partition("=")[::2] for line in block.splitlines())
        if fields.get("Id"):
            found[fields["Id"]] = {
                "exists": fields.get("LoadState") == "loaded",
                "active": fields.get("ActiveState") == "active",
                "enabled": fields.get("UnitFileState") == "enabled",
            }
    return found


def sha256(path):
    try:
        with open(path, "rb") as handle:
            return hashlib.sha256(handle.read()).hexdigest()
    except OSError:
        return ""


def short_of_space(folders):
    """One line for each folder, there or to be made, that has less room than it needs."""
    lines = []
    for path, needed in sorted(folders.items()):
        state = os.statvfs(existing(path))
        free = state.f_bavail * state.f_frsize // 1048576
        if free < needed:
            lines.append("%s has %d MiB free of %d needed" % (path, free, needed))
    return lines


def existing(path):
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path


def main():
    asked = json.loads(sys.argv[1])
    running = output("uname", "-r").strip()
    kernel = asked["kernel"] or running
    following = next_kernel(running)
    gpus, switches = pci()
    installed = packages()
    status = dkms_rows(output("dkms", "status"), asked["module"]) if shutil.which("dkms", path=PATHS) else []
    print(
        json.dumps(
            {
                "running_kernel": running,
                "kernel": kernel,
                "next_kernel": following,
                "gpus": gpus,
                "nvswitches": len(switches) or len(glob.glob(NVSWITCH + "/*")),
                "loaded": loaded(),
                "modules": modules(),
                "module": on_disk(kernel),
                "next_module": on_disk(following) if following != kernel else {},
                "dkms": status,
                "broken_dkms": broken_dkms(asked["module"]),
                "userspace": userspace(),
                "smi": smi(asked["smi_timeout"]) if gpus else {"version": "", "gpus": 0, "error": "there is no GPU"},
                "uninstaller": shutil.which("nvidia-uninstall", path=PATHS) or "",
                "runfile_version": (read(INSTALLER_LOG).splitlines() or [""])[0].strip(),
                "alternate": os.path.exists(ALTERNATE),
                "foreign": sorted(name for name in installed if re.match(asked["foreign"], name)),
                "compiler": compiler(kernel),
                "headers": headers(kernel),
                "next_headers": headers(following),
                "secure_boot": secure_boot(),
                "signing_key": signing_key(),
                "users": users(),
                "x_servers": x_servers(),
                "packages": {
                    name: version
                    for name, version in installed.items()
                    if name in asked["packages"] or KERNEL_PACKAGES.match(name)
                },
                "held": held(),
                "units": units(asked["units"]),
                "files": {path: sha256(path) for path in asked["files"]},
                "short": short_of_space(asked["folders"]),
                "noexec": [path for path in asked["folders"] if os.statvfs(existing(path)).f_flag & os.ST_NOEXEC],
                # dnf fetches its lists when it needs them, apt only when told to.
                "package_lists": not shutil.which("apt-get", path=PATHS)
                or bool(glob.glob("/var/lib/apt/lists/*Packages*")),
            },
            sort_keys=True,
        )
    )


if __name__ == "__main__":
    main()
