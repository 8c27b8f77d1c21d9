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
      - C(root), C(config_dir), C(state_dir), C(log_dir), C(user), C(bind), C(start_timeout), C(drain_timeout), C(open_paths),
        C(python) (an existing environment, or empty), C(host_python) (Ansible's own), C(manager), C(supervisor_dir) and
        C(supervisorctl) of the role.
      - C(container), with C(mirror), C(images), C(gpus), C(shm_size), C(nofile), C(log_options) and C(options).
      - C(gpu), the host's fact of that name, and C(architecture), as Ansible names it.
      - For services over several hosts also C(hosts) (names in the order of the inventory), C(network) (address and
        interface by host, as P(baremetal.vllm.interconnect#filter) chose them), C(peer_timeout) (seconds) and
        C(ray_version), which images get.
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

import json
import re
from typing import Any

from ansible.errors import AnsibleFilterError

MIB = 1024  # of a GiB
# Settings of every service. The usage report would tell strangers what the host serves; models lie on disk already.
ENVIRONMENT = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Starts vLLM's API server through the module that every version has; the program `vllm` needs metadata that builds of
# other names lack.
SERVER = ["-m", "baremetal_serve"]
# Addresses that mean "all interfaces" are no addresses to ask.
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
# A server that is told to stop gets this much longer than its requests.
STOP_MARGIN_S = 30
# A model in the hub's cache: its files are links to the folder `blobs` beside `snapshots`.
SNAPSHOT = re.compile(r"(.*/models--[^/]+)/snapshots/.+")
# Their values look like paths of files and are none.
NO_FILES = ("--served-model-name", "--root-path", "--disable-access-log-for-endpoints")
# Starts wait for each other through it.
TURN = "baremetal_turn.py"
# Seconds after which one that waits for it starts all the same, where the service says nothing: what it takes is known on its host alone.
TURN_S = 1800
# Memory that a server's start takes beyond what was planned for it.
ROOM_SLACK = 1.05


def _places(plan: dict[str, Any], host: str) -> list[str]:
    """A server's GPUs by index, since not every release reads UUIDs, or its slices by UUID, since they have no index."""
    slices = [uuid for uuid in plan["gpu_uuids"].get(host, []) if uuid.startswith("MIG-")]
    return slices or [str(gpu) for gpu in plan["gpus"].get(host, [])]


def _visible(places: list[str]) -> dict[str, str]:
    """Environment that shows a server its own GPUs and no others."""
    if not places:
        return {}
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order in which nvidia-smi, and so the plan, counts
        "CUDA_VISIBLE_DEVICES": ",".join(places),
    }


def image_reference(image: str, settings: dict[str, Any]) -> dict[str, str]:
    """What a planned image is run as, and where it comes from: C(reference), C(archive) and C(checksum)."""
    if settings["architecture"] == "aarch64":
        image = re.sub(r"-x86_64$", "-arm64", image)  # as images for CPUs are named; the others are for both
    options = settings["container"]
    pin = options["images"].get(image, {})
    unknown = set(pin) - {"reference", "digest", "archive", "checksum"}
    if unknown:
        raise AnsibleFilterError(
            f"vllm_images[{image}] has {', '.join(sorted(unknown))}: give reference, digest, archive or checksum"
        )
    reference = pin.get("reference", image)
    name, first = re.sub(r"(@.*|:[^/:]*)$", "", reference), reference.split("/", 1)[0]
    digest = pin.get("digest", "")
    if digest:
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            raise AnsibleFilterError(f"vllm_images[{image}].digest is {digest}: give sha256: and 64 hexadecimal digits")
        reference = f"{name}@{digest}"
    # A name that holds a registry already is taken as it is, and an archive holds the name that it was saved under.
    own_registry = "/" in reference and (re.search(r"[.:]", first) or first == "localhost")
    if options["mirror"] and not own_registry and not pin.get("archive"):
        reference = f"{options['mirror'].rstrip('/')}/{reference}"
    return {"reference": reference, "archive": pin.get("archive", ""), "checksum": pin.get("checksum", "")}


def _room(plan: dict[str, Any], host: str, device: str, facts: dict[str, Any]) -> bool:
    """Whether the host can run the server a second time beside all that run there now."""
    need = plan["memory"]["footprint_gib"] * MIB * ROOM_SLACK
    if device == "cpu":
        cpu = facts["cpu"]
        return bool(cpu["memory_available_mib"] - cpu.get("memory_own_mib", 0) > need)

    def held(uuid: str) -> float:
        return sum(
            (process["memory_used_mib"] or 0) / len(process["gpus"])
            for process in facts.get("processes", [])
            if process["own"] and uuid in process["gpus"]
        )

    mine = [gpu for gpu in facts["gpus"] if gpu["index"] in plan["gpus"].get(host, []) and not gpu["mig"]]
    return bool(mine) and all(
        gpu["memory_total_mib"] - gpu["memory_used_mib"] - held(gpu["uuid"]) > need for gpu in mine
    )


def _shared(plan: dict[str, Any], host: str) -> set[str]:
    """GPUs and slices that several servers of the host use. Those over several hosts are left out: two of them could wait
    for each other, each on another host."""
    seen: set[str] = set()
    found: set[str] = set()
    for planned in plan["services"]:
        for instance in planned["instances"]:
            if instance["hosts"] == [host]:
                mine = set(_places(instance, host))
                found |= seen & mine
                seen |= mine
    return found


def _files(value: Any) -> list[str]:
    """Absolute paths in an argument: alone or several with commas, behind NAME= (LoRA adapters), or as values of JSON. A
    template that stands there itself, instead of its file, is none."""
    if isinstance(value, dict | list):
        return [path for one in (value.values() if isinstance(value, dict) else value) for path in _files(one)]
    if not isinstance(value, str):
        return []
    if re.match(r"\s*[{\[]", value):
        try:
            return _files(json.loads(value))
        except ValueError:
            return []
    if re.search(r"[{}\n]", value):
        return []
    return [path for path in re.sub(r"^[^/=]+=", "", value).split(",") if path.startswith("/")]


def _named(args: list[str]) -> list[str]:
    """Files that arguments name."""
    found, option = [], ""
    for arg in args:
        value = arg
        if arg.startswith("--"):
            option, value = arg.partition("=")[::2]
        if option not in NO_FILES:
            found += _files(value)
    return found


def _container(
    svc: dict[str, Any], plan: dict[str, Any], host: str, lib: str, model: str, settings: dict[str, Any]
) -> dict[str, list[str]]:
    """Arguments of C(docker run) for every container that works for a service: C(closed), what it may not do, C(devices),
    C(marks) and C(mounts). Secrets are in files that the container reads."""
    options = settings["container"]
    own = [f"{settings[key]}/{svc['name']}" for key in ("config_dir", "state_dir")]
    # A path below one that is there already would be a mount on a read-only file system.
    seen: list[str] = []
    named = [SNAPSHOT.sub(r"\1", path.rstrip("/")) for path in (model, *_named(plan["args"]))]
    for path in sorted({lib, own[0], *named} - {""}):
        if not any(path == other or path.startswith(f"{other}/") for other in [*seen, own[1]]):
            seen.append(path)
    gpus = plan["gpu_uuids"].get(host) or plan["gpus"].get(host, [])
    devices = []
    if gpus and options["gpus"] == "cdi":
        devices = [f"--device=nvidia.com/gpu={gpu}" for gpu in gpus]
    elif gpus and options["gpus"] == "runtime":
        devices = ["--runtime=nvidia", f"--env=NVIDIA_VISIBLE_DEVICES={','.join(map(str, gpus))}"]
    elif gpus:
        devices = ["--gpus", f'"device={",".join(map(str, gpus))}"']  # the quotes are Docker's own, for the commas
    if gpus:
        # As NCCL's manual asks for: network cards lock the buffers that they read, and Docker's limit is some MiB.
        devices.append("--ulimit=memlock=-1")
    checksum = image_reference(plan["image"], settings)["checksum"]
    return {
        "closed": [
            "--init",
            "--network=host",
            "--read-only",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
            "--tmpfs=/tmp:rw,exec,nosuid,nodev,mode=1777",
            f"--shm-size={options['shm_size']}",
            "--ulimit=core=0",  # a dump would hold the API key
            f"--ulimit=nofile={options['nofile']}:{options['nofile']}",
        ],
        "devices": devices,
        # Another archive may hold another image under the same name, for which the service has to be started anew.
        "marks": [f"--label=baremetal.vllm.archive={checksum}"] if checksum else [],
        "mounts": [
            *(f"--mount=type=bind,src={path},dst={path},readonly" for path in seen),
            f"--mount=type=bind,src={own[1]},dst={own[1]}",
        ],
        "log": [
            "--log-driver=json-file",
            *(f"--log-opt={key}={value}" for key, value in sorted(options["log_options"].items())),
        ],
        "user": [*map(str, options["options"])],
    }


def _run_options(svc: dict[str, Any], parts: dict[str, list[str]], stop: int) -> list[str]:
    """Arguments of C(docker run) up to the image, without the user."""
    health = f"from urllib import request; request.build_opener(request.ProxyHandler({{}})).open('{svc['root_url']}/health', timeout=9)"
    return [
        f"--name={svc['unit']}",
        f"--label=baremetal.vllm.service={svc['name']}",
        "--rm",
        *parts["closed"],
        f"--stop-timeout={stop}",
        *parts["log"],
        f'--health-cmd=python3 -c "{health}"',
        "--health-interval=30s",
        "--health-timeout=10s",
        "--health-retries=3",
        "--health-start-period=1h",
        *parts["devices"],
        *parts["marks"],
        *parts["mounts"],
        f"--workdir={svc['state_dir']}",
        *parts["user"],
        "--entrypoint=/bin/sh",
    ]


def _service(
    plan: dict[str, Any],
    host: str,
    row: dict[str, Any],
    user: dict[str, Any],
    settings: dict[str, Any],
    shared: set[str],
    stand_by: bool = False,
) -> dict[str, Any]:
    """One server; with C(stand_by) the one that serves on the same port while the server itself is restarted."""
    name, version, device = user["name"], plan["engine_version"], row["device"]
    container = row["runtime"] == "container"
    folder = f"{name}/standby" if stand_by else name
    unit = f"vllm-{name}{'-standby' if stand_by else ''}"
    config_dir, state_dir = f"{settings['config_dir']}/{folder}", f"{settings['state_dir']}/{folder}"
    cache_dir = f"{settings['state_dir']}/{name}/cache"
    log_file = f"{settings['log_dir']}/{unit.removeprefix('vllm-')}.log"
    bind, port = user.get("bind", settings["bind"]), plan["port"]
    address = ANY.get(bind, bind)
    root_url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
    venv = f"{settings['root']}/venvs/{device}-{version}"
    python = "python3" if container else settings["python"] or f"{venv}/bin/python"
    lib = f"{settings['root']}/lib"
    systemd = settings["manager"] == "systemd"
    environment = {
        **ENVIRONMENT,
        "BAREMETAL_OPEN_PATHS": " ".join(settings["open_paths"]),
        "PYTHONPATH": lib,
        "XDG_CACHE_HOME": cache_dir,
        "VLLM_CACHE_ROOT": f"{cache_dir}/vllm",
        # A container sees its own GPUs only, and its user is not in the image's list of users.
        **(
            {
                "HOME": state_dir,
                "USER": settings["user"],
                "LOGNAME": settings["user"],
                # The image is read-only: without it, every start would compile all of Python's files again.
                "PYTHONPYCACHEPREFIX": f"{cache_dir}/pycache",
            }
            if container
            else _visible(_places(plan, host))
        ),
        **plan["env"],
    }
    # The guard and the start lie there.
    environment["PYTHONPATH"] = ":".join(dict.fromkeys([lib, *filter(None, str(environment["PYTHONPATH"]).split(":"))]))
    unit_file = f"/etc/systemd/system/{unit}.service" if systemd else f"{settings['supervisor_dir']}/conf.d/{unit}.conf"
    endpoint_files = [f"{config_dir}/endpoint.json", *([user["endpoint_file"]] if user.get("endpoint_file") else [])]
    args = plan["args"]
    if not args[0].startswith("-"):  # the model stands alone, as `vllm serve` takes it
        args = ["--model", *args]
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import engine as engines

    drain = engines.option(version, "--shutdown-timeout", settings["drain_timeout"])
    scripts = ["env", "serve.sh", "start.sh"] if container else ["env", "start.sh"]
    start_timeout = user.get("start_timeout", settings["start_timeout"])
    places = [] if len(plan["hosts"]) > 1 else [place for place in _places(plan, host) if place in shared]
    # On the host, where all of its servers see each other.
    turn = [
        settings["host_python"] if container else python,
        f"{lib}/{TURN}",
        f"{root_url}/health",
        str(start_timeout or TURN_S),
    ]
    svc: dict[str, Any] = {
        "name": name,
        "unit": unit,
        "device": device,
        "runtime": row["runtime"],
        "version": version,
        "venv": None if container or settings["python"] else {"path": venv, "device": device, "version": version},
        "python": python,
        "inside": "",  # name of a container of Ray that the server is started in
        # What endpoint.json says: where and how to ask, for clients, for the proof and for the benchmark.
        "told": {
            "service": name,
            "base_url": f"{root_url}/v1",
            "api_key_file": f"{settings['config_dir']}/{name}/api_key",
            "model": user["served_model_name"],
            "task": plan["task"],
            "max_model_len": plan["max_model_len"],
            "tool_calls": "--enable-auto-tool-choice" in args,
            # Where it is written a second time, to be taken away there once it is not.
            **({"endpoint_file": user["endpoint_file"]} if user.get("endpoint_file") else {}),
            "vision": "vision_config" in user.get("config", {}),
            "gpus": plan["gpus"].get(host, []),
            "python": ["docker", "exec", "--interactive", "--env", "OPENAI_API_KEY", unit, python]
            if container
            else [python],
        },
        "config_dir": config_dir,
        "restart_file": f"{config_dir}/restart",  # there while it does not run by what lies beside it
        "state_dir": state_dir,
        "log_file": log_file,
        "api_key_file": f"{settings['config_dir']}/{name}/api_key",
        "unit_file": unit_file,
        "endpoint_files": endpoint_files,
        "watched": [
            unit_file,
            *endpoint_files,
            *(f"{config_dir}/{file}" for file in ("api_key", "plan.json", *scripts)),
        ],
        "bind": bind,
        "port": port,
        "root_url": root_url,
        "base_url": f"{root_url}/v1",
        "served_model_name": user["served_model_name"],
        "model_path": user.get("model_path", ""),
        "env": {key: str(value) for key, value in environment.items()},
        "command": [python, *SERVER, *args, *drain, "--host", bind, "--middleware", "baremetal_guard.PathGuard"],
        # ansible-core before 2.19 makes text of a template's number.
        "stop_timeout": int(settings["drain_timeout"]) + STOP_MARGIN_S,
        "start_timeout": start_timeout,
        "turn": [*turn, *places] if places else [],  # what waits until no other server starts on its GPUs
        "span": None,  # multi_host.py fills these for a service over several hosts
        "headless": False,
        "room": _room(plan, host, device, settings["gpu"]),
        "planned": (row.get("record") or {}).get("planned", {}),
        "record": row.get("record"),
        # What an explanation of a failed start may name.
        "values": {
            key: plan.get(key)
            for key in (
                "gpu_memory_utilization",
                "max_model_len",
                "max_num_seqs",
                "max_num_batched_tokens",
                "engine_version",
            )
        }
        | {"port": port, "name": name, "bind": bind},
        "pid_command": ["systemctl", "show", "--property=MainPID", "--value", unit]
        if systemd
        else [*settings["supervisorctl"], "pid", unit],
        "log_command": ["journalctl", f"--unit={unit}", "--lines=4000", "--output=cat", "--no-pager"]
        if systemd
        else ["tail", "--lines=4000", log_file],
    }
    if container:
        svc["image"] = image_reference(plan["image"], settings)
        svc["container"] = _container(svc, plan, host, lib, user.get("model_path", ""), settings)
        svc["run_options"] = _run_options(svc, svc["container"], svc["stop_timeout"])
    if not stand_by:
        svc["standby"] = _service(plan, host, row, user, settings, shared, stand_by=True)
        svc["watched"] += [svc["restart_file"], svc["standby"]["unit_file"]]
    return svc


def host_services(
    plan: dict[str, Any], host: str, services: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    from ansible_collections.baremetal.vllm.plugins.plugin_utils.multi_host import spans, spread

    users = {service["name"]: service for service in services}
    spanning = {span["service"]: span for span in spans(plan, settings.get("hosts") or []) if host in span["hosts"]}
    shared, found = _shared(plan, host), []
    for planned in plan["services"]:
        for instance in planned["instances"]:
            if host in instance["hosts"]:
                service = _service(instance, host, planned, users[planned["name"]], settings, shared)
                if len(instance["hosts"]) > 1:
                    # A server over several hosts has no second one to stand by for it.
                    service["room"] = False
                    service = spread(service, spanning[planned["name"]], host, instance["args"], settings)
                found.append(service)
    return found


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"host_services": host_services}
