# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: host_services
short_description: The planned services of one host, with the names and paths that the role vllm gives them
version_added: 0.1.0
description:
  - Joins the result of P(baremetal.vllm.vllm_plan#filter) with what the role C(vllm) needs to run each service on a host.
  - Holds no secret, so that it may be kept as a fact.
positional: host, services, settings
options:
  _input:
    description: A plan.
    type: dict
    required: true
  host:
    description: Name of the host.
    type: str
    required: true
  services:
    description: The services as they were planned.
    type: list
    elements: dict
    required: true
  settings:
    description:
      - C(root), C(config_dir), C(state_dir), C(log_dir), C(bind), C(start_timeout), C(open_paths), C(python) (an existing
        environment, or empty), C(manager), C(supervisor_dir) and C(supervisorctl) of the role.
      - For services over several hosts also C(hosts) (names in the order of the inventory), C(network) (address and
        interface by host, as P(baremetal.vllm.interconnect#filter) chose them) and C(peer_timeout) (seconds).
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Show what runs here
  ansible.builtin.debug:
    msg: "{{ vllm_plan_result | baremetal.vllm.host_services(inventory_hostname, vllm_services, settings) }}"
"""

RETURN = r"""
_value:
  description: One entry a service.
  type: list
  elements: dict
"""

from typing import Any

from ansible_collections.baremetal.vllm.plugins.plugin_utils.multi_host import spans, spread

# Settings of every service. The usage report would tell strangers what the host serves; models lie on disk already.
ENVIRONMENT = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Older engines are asked through the module for every version alike; the program `vllm` needs metadata that builds of
# other names lack.
SERVER = ["-m", "vllm.entrypoints.openai.api_server"]
# Addresses that mean "all interfaces" are no addresses to ask.
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def _visible(gpus: list[int], uuids: list[str]) -> dict[str, str]:
    """Environment that shows a server its own GPUs and no others. Slices have no index;
    not every release reads UUIDs."""
    if not gpus:
        return {}
    slices = [uuid for uuid in uuids if uuid.startswith("MIG-")]
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which nvidia-smi, and so the plan, counts
        "CUDA_VISIBLE_DEVICES": ",".join(slices or map(str, gpus)),
    }


def _service(
    plan: dict[str, Any], host: str, device: str, user: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    name, version = user["name"], plan["engine_version"]
    unit = f"vllm-{name}"
    config_dir, state_dir = f"{settings['config_dir']}/{name}", f"{settings['state_dir']}/{name}"
    log_file = f"{settings['log_dir']}/{name}.log"
    bind, port = user.get("bind", settings["bind"]), plan["port"]
    address = ANY.get(bind, bind)
    root_url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    venv = f"{settings['root']}/venvs/{device}-{version}"
    python = settings["python"] or f"{venv}/bin/python"
    systemd = settings["manager"] == "systemd"
    environment = {
        **ENVIRONMENT,
        "BAREMETAL_OPEN_PATHS": " ".join(settings["open_paths"]),
        "PYTHONPATH": f"{settings['root']}/lib",
        "XDG_CACHE_HOME": f"{state_dir}/cache",
        "VLLM_CACHE_ROOT": f"{state_dir}/cache/vllm",
        **_visible(plan["gpus"].get(host, []), plan["gpu_uuids"].get(host, [])),
        **plan["env"],
    }
    unit_file = f"/etc/systemd/system/{unit}.service" if systemd else f"{settings['supervisor_dir']}/conf.d/{unit}.conf"
    endpoint_files = [f"{config_dir}/endpoint.json", *([user["endpoint_file"]] if user.get("endpoint_file") else [])]
    args = plan["args"]
    if not args[0].startswith("-"):  # the model stands alone, as `vllm serve` takes it
        args = ["--model", *args]
    return {
        "name": name,
        "unit": unit,
        "device": device,
        "version": version,
        "venv": None if settings["python"] else {"path": venv, "device": device, "version": version},
        "python": python,
        # What endpoint.json says: where and how to ask, for clients, for the proof and for the benchmark.
        "told": {
            "service": name,
            "base_url": f"{root_url}/v1",
            "api_key_file": f"{config_dir}/api_key",
            "model": user["served_model_name"],
            "task": plan["task"],
            "max_model_len": plan["max_model_len"],
            "tool_calls": "--enable-auto-tool-choice" in args,
            "vision": "vision_config" in user.get("config", {}),
            "gpus": plan["gpus"].get(host, []),
            "python": [python],
        },
        "config_dir": config_dir,
        "state_dir": state_dir,
        "log_file": log_file,
        "api_key_file": f"{config_dir}/api_key",
        "unit_file": unit_file,
        "endpoint_files": endpoint_files,
        "watched": [unit_file, *endpoint_files, *(f"{config_dir}/{name}" for name in ("api_key", "env", "start.sh"))],
        "bind": bind,
        "port": port,
        "root_url": root_url,
        "base_url": f"{root_url}/v1",
        "served_model_name": user["served_model_name"],
        "env": {key: str(value) for key, value in environment.items()},
        "command": [python, *SERVER, *args, "--host", bind, "--middleware", "baremetal_guard.PathGuard"],
        "start_timeout": user.get("start_timeout", settings["start_timeout"]),
        "span": None,  # multi_host.py fills these for a service over several hosts
        "headless": False,
        "pid_command": ["systemctl", "show", "--property=MainPID", "--value", unit]
        if systemd
        else [*settings["supervisorctl"], "pid", unit],
        "log_command": ["journalctl", f"--unit={unit}", "--lines=200", "--output=cat", "--no-pager"]
        if systemd
        else ["tail", "--lines=200", log_file],
    }


def host_services(
    plan: dict[str, Any], host: str, services: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    users = {service["name"]: service for service in services}
    spanning = {span["service"]: span for span in spans(plan, settings.get("hosts") or []) if host in span["hosts"]}
    found = []
    for planned in plan["services"]:
        for instance in planned["instances"]:
            if host in instance["hosts"]:
                service = _service(instance, host, planned["device"], users[planned["name"]], settings)
                if len(instance["hosts"]) > 1:
                    service = spread(service, spanning[planned["name"]], host, instance["args"], settings)
                found.append(service)
    return found


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"host_services": host_services}
