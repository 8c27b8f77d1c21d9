# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: host_readiness
short_description: Whether a host can take its planned services, from one look at it
version_added: 0.1.0
description:
  - Compares the services of a host with what M(baremetal.vllm.host_probe) saw there, and picks the Python that vLLM's
    environment is made with.
positional: probe, settings
options:
  _input:
    description: The services, as P(baremetal.vllm.host_services#filter) gives them.
    type: list
    elements: dict
    required: true
  probe:
    description: Result of M(baremetal.vllm.host_probe), with the stamps of tools and environments among its RV(ignore:files).
    type: dict
    required: true
  settings:
    description:
      - C(root) (where the environments lie), C(builds), C(image_disk_mib) (by device),
        C(tools) (their requirements), C(tools_dir), C(manager),
        C(supervisor_dir), C(supervisor_pid) (the file of its process), C(other_units) (of systemd, where a supervisor is to keep
        them), C(os_family), C(venv_package) (by family), C(may_install) (whether packages can be
        installed) and C(gone) (state folders of services that are removed before any is started).
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Judge the host
  ansible.builtin.set_fact:
    readiness: "{{ services | baremetal.vllm.host_readiness(probe, settings) }}"
"""

RETURN = r"""
_value:
  description:
    - C(problems), one line each; C(python), the interpreter to use, empty where none is needed or none will do;
      C(packages), those of the distribution that have to be installed; C(tools), whether the tools are to be made;
      C(missing), folders of environments that are to be made; and C(prepared), whether neither tools nor packages are needed.
  type: dict
"""

import json
from pathlib import Path
from typing import Any

STAMP = ".baremetal-complete.json"  # as vllm_venv writes it
# A unix socket's address has 108 bytes (man 7 unix), and supervisor adds its process id to the name while it starts.
SOCKET_PATH_MAX = 95


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _python(
    services: list[dict[str, Any]], probe: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """(the first interpreter that every build accepts, what is wrong when there is none)."""
    # Here, as it loads the planner, which a host that lacks nothing need not wait for.
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.engine import newest_python

    limits = [settings["builds"][service["device"]]["python"] for service in services] or [["3.9", "3.14"]]
    limits += [["3.0", newest_python(s["venv"]["version"])] for s in services if s["device"] == "cuda"]
    low = max(_minor(limit) for limit, dummy in limits)
    high = min(_minor(limit) for dummy, limit in limits)
    for python in probe["pythons"]:
        if low <= _minor(python["version"]) <= high:
            return python, ""
    seen = ", ".join(f"{python['path']} {python['version']}" for python in probe["pythons"]) or "no Python"
    wanted = f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return None, f"vLLM needs {wanted} and the host has {seen}: install one and give its path as vllm_python"


def _stamp(probe: dict[str, Any], folder: str) -> list[str] | None:
    """Packages of an environment; None when it is not there, or was made with a Python that has gone or changed."""
    try:
        stamp = json.loads(probe["files"].get(f"{folder}/{STAMP}", ""))
        packages: list[str] = stamp["packages"]
        path, version = stamp["python"]
    except (ValueError, KeyError, TypeError):
        return None
    alive = any(path == seen["path"] and f"{seen['version']}.".startswith(f"{version}.") for seen in probe["pythons"])
    return packages if alive else None


def _packages(
    python: dict[str, Any] | None, devices: set[str], probe: dict[str, Any], settings: dict[str, Any]
) -> dict[str, str]:
    """Package of the distribution -> what is missing without it."""
    family = settings["os_family"]
    needed = {}
    version = ".".join(map(str, _minor(python["version"]))) if python else ""
    if python and not python["venv"]:
        package = settings["venv_package"].get(family, "python3").format(version=version)
        needed[package] = f"{python['path']} cannot make virtual environments"
    for build in (settings["builds"][device] for device in devices):
        for kind in ("libraries", "programs"):
            for name, names in build[kind].items():
                if name not in probe[kind]:
                    needed[names.get(family, name)] = f"{name} is missing"
        if build["headers"] and python and not python["headers"]:
            package = build["headers"].get(family, "python{version}-devel")
            needed[package.format(version=version)] = f"{python['path']} has no headers, which Triton compiles with"
    return needed


def _images(services: list[dict[str, Any]], probe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What is in the way of containers."""
    images = {service["image"]["reference"]: service["device"] for service in services if service.get("image")}
    if not images:
        return []
    docker, problems = probe["docker"], []
    if not settings["may_install"] and not docker["version"]:
        problems.append(
            "runtime container needs Docker, and only root can install it: run as root, or set vllm_runtime: venv"
        )
    missing = {image: device for image, device in images.items() if image not in docker["images"]}
    need = sum(settings["image_disk_mib"][device] for device in missing.values())
    if docker["free_mib"] < need:
        problems.append(
            f"Docker's folder has {docker['free_mib']} MiB free and {', '.join(missing)} needs {need}: make room or set "
            "docker_data_root to a larger disk"
        )
    return problems


def _ports(services: list[dict[str, Any]], listeners: dict[str, Any], gone: list[str]) -> list[str]:
    """Ports that a service is to have and another process has."""
    problems, holders = [], {}
    own = {service["state_dir"]: service for service in services}
    for service in services:
        name, listener = service["name"], listeners.get(str(service["port"]))
        # vLLM renames its process, so that the working folder is what tells it from others. One that is headless answers nobody.
        if (
            service.get("headless")
            or not listener
            or listener["cwd"]
            in (
                service["state_dir"],
                f"{service['state_dir']}/standby",  # a run has ended beside it
                *gone,
            )
        ):
            continue
        if listener["cwd"] in own:
            holders[name] = own[listener["cwd"]]["name"]
            continue
        who = f"{listener['command']} (pid {listener['pid']})" if listener["pid"] else "another user's process"
        problems.append(
            f"port {service['port']} of service {name} is taken by {who}: stop it, or give the service another port"
        )
    # Both could listen on it at once, and each would get requests that are the other's.
    for name, other in holders.items():
        port = next(service["port"] for service in services if service["name"] == name)
        steps = f"with {other} at its new port and {name} as it was"
        circle = [name]
        while (follows := holders.get(circle[-1])) and follows not in circle:
            circle.append(follows)
        if follows == name:
            if name != min(circle):  # said once
                continue
            steps = f"with {other} at a port that nobody has and {name} as it was, then with {name} at {port} and {other} as then"
        problems.append(
            f"port {port} of service {name} is still that of service {other}, and passes on run by run, so that what does not "
            f"start can go back: run site.yml {steps}, then with all as they are to be"
        )
    return problems


def _manager(probe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Servers that the other manager of services keeps: with two, each ends what the other starts."""
    way = "run playbooks/teardown.yml with vllm_service_manager={other} first (models, settings and keys stay)"
    if settings["manager"] == "supervisor":
        units = [path for path in settings["other_units"] if probe["fingerprints"].get(path)]
        there = f"systemd has {', '.join(units)}" if units else ""
        other = "systemd"
    else:
        pid, other = probe["pids"].get(settings["supervisor_pid"], 0), "supervisor"
        there = f"a supervisor keeps servers here (pid {pid}, {settings['supervisor_dir']})" if pid else ""
    return [f"{there} and vllm_service_manager is {settings['manager']}: {way.format(other=other)}"] if there else []


def _hidden(services: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Folders that units of systemd do not see: they have a /tmp of their own (PrivateTmp)."""
    if settings["manager"] != "systemd":
        return []
    found = {}
    for service in services:
        if service["runtime"] == "venv":
            for key in ("model_path", "python", "state_dir", "config_dir"):
                if service[key].startswith(("/tmp/", "/var/tmp/")):  # noqa: S108
                    found[service[key]] = service["name"]
    return [
        f"{path} of service {name} is not seen by its unit, which has a /tmp of its own: take a folder elsewhere"
        for path, name in found.items()
    ]


def _told(services: list[dict[str, Any]], probe: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Second places for what tells the address, which are of use to others: their folders are made by those."""
    problems = []
    for service in services:
        for path in service["endpoint_files"][1:]:
            folder = str(Path(path).parent)
            if not Path(path).is_absolute():
                problems.append(f"endpoint_file {path} of service {service['name']} is no absolute path: give one")
            # The collection's own root is made on the way.
            elif not service.get("headless") and folder not in (settings["root"], *probe["writable"]):
                problems.append(
                    f"endpoint_file {path} of service {service['name']} needs a folder {folder} that is there and can be written to: "
                    "make it, or name another place"
                )
    return problems


def host_readiness(services: list[dict[str, Any]], probe: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    problems = []
    builds = settings["builds"]
    venvs = {service["venv"]["path"]: service["venv"]["device"] for service in services if service["venv"]}
    missing = {path: device for path, device in venvs.items() if _stamp(probe, path) is None}
    tools_needed = bool(services) and (settings["manager"] == "supervisor" or bool(venvs))
    tools = tools_needed and _stamp(probe, settings["tools_dir"]) != sorted(settings["tools"])
    python: dict[str, Any] | None = None
    if missing or tools:
        python, problem = _python([service for service in services if service["venv"]], probe, settings)
        problems += [problem] if problem else []
    packages = _packages(python, set(venvs.values()), probe, settings)
    if packages and not settings["may_install"]:
        names = " ".join(packages)
        problems.append(f"{' and '.join(packages.values())}: install {names} as root (apt-get or dnf install {names})")
    need = sum(builds[device]["disk_mib"] for device in missing.values())
    free = probe["free_mib"][settings["root"]]
    if free < need:
        problems.append(
            f"{settings['root']} has {free} MiB free and vLLM needs {need}: make room or set vllm_root to a larger disk"
        )
    problems += _images(services, probe, settings)
    problems += _ports(services, probe["listeners"], settings["gone"])
    problems += _manager(probe, settings) if services else []
    problems += _hidden(services, settings)
    problems += _told(services, probe, settings)
    folder = settings["supervisor_dir"]
    if settings["manager"] == "supervisor" and len(folder) > SOCKET_PATH_MAX - len("/supervisor.sock"):
        problems.append(f"{folder} is too long for the address of a socket: set a shorter vllm_root")
    return {
        "problems": problems,
        "prepared": not tools and not packages,
        "tools": tools,
        "missing": sorted(missing),
        "python": python["path"] if python else "",
        "packages": list(packages),
    }


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"host_readiness": host_readiness}
