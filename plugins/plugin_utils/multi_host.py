# SPDX-License-Identifier: GPL-3.0-or-later
"""What a service that spans hosts runs on each of them.

Executor ``mp``: vLLM runs on every host, kept together by ``baremetal_ranks.py``; the first host serves the API. Executor
``ray``: vLLM runs on the first host alone, and its engines are placed by a Ray cluster of exactly these hosts.

The first host is the first one of the inventory. Values that differ between hosts (address, interface) are in the
environment of each host's own unit and never in the one that Ray copies from the first host to the others.

Both run in virtual environments or in containers, by the same commands. Of ``mp`` each rank is a container like that of a
service on one host. Of ``ray`` each node is a container, and vLLM's server is started inside the first one: it talks to its
node by shared memory and by process ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from .planner.settle import node_arguments

# Of one service that spans hosts; the next one of the same hosts has the next block. Below the ephemeral ports, beside vLLM's own 29500.
FIRST_PORT = 29600
BLOCK = 10
# Ray's: its usual port for the cluster's state (GCS), and workers below the ephemeral ports.
RAY_FIRST_PORT = 6379
RAY_BLOCK = 20
RAY_FIRST_WORKER_PORT = 10002
RAY_WORKER_PORTS = 200
# Beyond it Ray's ports would be those of APIs, from 8000 on.
MOST_BLOCKS = 80
# Linux' own; what a host has is read before its firewall is set.
USUAL_EPHEMERAL = "32768-60999"
# Names that differ between hosts: each host has its own, or that of the service, from its own unit.
PER_HOST = (
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "UCX_NET_DEVICES",
    "VLLM_HOST_IP",
)
# Names that are the server's own or the system's: no engine elsewhere needs them.
OF_THE_SERVER = (
    "BAREMETAL_OPEN_PATHS",
    "HF_TOKEN",
    "HOME",
    "HOSTNAME",
    "HUGGING_FACE_HUB_TOKEN",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LOGNAME",
    "NVIDIA_VISIBLE_DEVICES",
    "PATH",
    "PWD",
    "RAY_AUTH_TOKEN",
    "SHELL",
    "SYSTEMD_EXEC_PID",
    "USER",
    "VLLM_API_KEY",
    "VLLM_CONFIG_ROOT",
)
SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "ACCESS_KEY")


def _secret(name: str) -> bool:
    return any(word in name.upper() for word in SECRET_WORDS) and name != "RAY_AUTH_TOKEN_PATH"


def _loopback(bind: str) -> bool:
    return bind == "localhost" or bind == "::1" or bind.startswith("127.")


def ray_ports(number: int) -> dict[str, int]:
    """Every port of the ``number``-th Ray cluster, so that a firewall can list them."""
    base = RAY_FIRST_PORT + RAY_BLOCK * number
    names = (
        "gcs",
        "node_manager",
        "object_manager",
        "dashboard_agent_listen",
        "dashboard_agent_grpc",
        "runtime_env_agent",
        "metrics_export",
        "client_server",
        "allreduce",
    )
    first = RAY_FIRST_WORKER_PORT + RAY_WORKER_PORTS * number
    return {
        **{name: base + offset for offset, name in enumerate(names)},
        "min_worker": first,
        "max_worker": first + RAY_WORKER_PORTS - 1,
    }


def rank_ports(number: int) -> dict[str, int]:
    """The same of executor ``mp``. The all-reduce before a start has a port of its own: ``master`` is held by a rank that runs."""
    first = FIRST_PORT + BLOCK * number
    return {"ranks": first, "master": first + 1, "allreduce": first + 2}


def blocks(services: Sequence[Mapping[str, Any]], kept: Mapping[str, object]) -> dict[str, int]:
    """Which block of ports each service over several hosts has: what it has had, else the first that is free on its hosts.

    Blocks follow neither from the order of the services nor from which of them are in a run: a service whose ports change has
    to start anew.

    Args:
        services: those of a plan.
        kept: blocks of earlier runs by the name of the service; what is none is passed over.
    """
    hosts = {
        service["name"]: set(instance["hosts"])
        for service in services
        for instance in service["instances"]
        if len(instance["hosts"]) > 1
    }
    found: dict[str, int] = {}

    def taken(name: str) -> set[int]:
        return {number for other, number in found.items() if hosts[other] & hosts[name]}

    for name in hosts:
        number = kept.get(name)
        if isinstance(number, int) and 0 <= number < MOST_BLOCKS and number not in taken(name):
            found[name] = number
    for name in hosts:
        if name not in found:
            found[name] = next(number for number in count() if number not in taken(name))
    return found


def _firewall_ports(ports: Mapping[str, int], ephemeral: str) -> list[str]:
    """Ports and ranges for a firewall: the pinned ones, and those that the host gives to programs that ask for none."""
    first, last = map(int, ephemeral.split("-"))
    pinned = [str(port) for name, port in ports.items() if not name.endswith("_worker") and not first <= port <= last]
    workers = [f"{ports['min_worker']}-{ports['max_worker']}"] if "min_worker" in ports else []
    return [*pinned, *workers, ephemeral]


def spans(plan: Mapping[str, Any], order: Sequence[str]) -> list[dict[str, Any]]:
    """Every server of a plan that several hosts work for, with its hosts in the order of their ranks.

    Args:
        plan: what ``vllm_plan`` returned.
        order: names of all hosts, in the order of the inventory.
    """
    found: list[dict[str, Any]] = []
    kept = {service["name"]: (service.get("record") or {}).get("block") for service in plan["services"]}
    numbers = blocks(plan["services"], kept)
    for service in plan["services"]:
        for instance in service["instances"]:
            if len(instance["hosts"]) < 2:
                continue
            executor = instance["executor"]
            number = numbers[service["name"]]
            found.append(
                {
                    "service": service["name"],
                    "executor": executor,
                    "device": service["device"],
                    "engine_version": instance["engine_version"],
                    "hosts": [name for name in order if name in instance["hosts"]] or instance["hosts"],
                    "gpus": instance["gpus"],
                    "ranks_a_host": instance["tensor_parallel_size"]
                    * instance["pipeline_parallel_size"]
                    // len(instance["hosts"]),
                    "ports": rank_ports(number) if executor == "mp" else ray_ports(number),
                }
            )
    return found


def span_of(plan: Mapping[str, Any], order: Sequence[str], service: str, host: str) -> dict[str, Any] | None:
    """The span of a service that a host is part of, or None."""
    return next((span for span in spans(plan, order) if span["service"] == service and host in span["hosts"]), None)


def ray_image(reference: str, version: str) -> str:
    """Name of the image with Ray that is made on the host from an image: ``vllm/x:v1`` -> ``baremetal/x:v1-ray2.60.0``."""
    name, digest = [*reference.rsplit("/", 1)[-1].split("@sha256:"), ""][:2]
    name, tag = [*name.split(":"), ""][:2]
    return f"baremetal/{name}:{digest[:12] or tag or 'latest'}-ray{version}"


def _contained(service: dict[str, Any], environment: Mapping[str, str], lib: str, ray_version: str) -> dict[str, Any]:
    """What is different where the service runs in containers.

    ``run_python``: arguments that run Python as the service does, for a moment, with ``environment``, which whoever calls
    them has to have. Executor ``ray``: one container on each host, of the Ray node; the server is started inside the first one.
    """
    parts, image = service["container"], service["image"]["reference"]
    if ray_version:
        image = ray_image(image, ray_version)
        node = f"ray-{service['name']}"
        told = service["told"]
        service = {
            **service,
            "inside": node,
            "image": {**service["image"], "ray": image},
            "node_options": [
                word for part in ("closed", "log", "devices", "marks", "mounts", "user") for word in parts[part]
            ],
            "told": {**told, "python": [node if word == service["unit"] else word for word in told["python"]]},
        }
    else:
        health = ["--no-healthcheck"] if "--headless" in service["command"] else []
        options = [word for word in service["run_options"] if not health or not word.startswith("--health-")]
        service = {**service, "run_options": [*health, *options]}
    return {
        **service,
        "run_python": [
            *("docker", "run", "--rm", "--pull=never", *parts["closed"], "--workdir=/tmp", "--env=HOME=/tmp"),
            *(f"--env={name}" for name in sorted(environment)),
            *(*parts["devices"], *[word for word in parts["mounts"] if f"src={lib}," in word], *parts["user"]),
            *("--entrypoint=python3", image),
        ],
    }


def spread(
    service: dict[str, Any],
    span: Mapping[str, Any],
    host: str,
    args: Sequence[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``service`` (as host_services makes it for one host) is on one host of a span."""
    network = ((settings.get("network") or {}).get(service["name"]) or {}).get("hosts") or {}
    addresses = {name: (network.get(name) or {}).get("address") or name for name in span["hosts"]}
    interface = (network.get(host) or {}).get("interface")
    rank = span["hosts"].index(host)
    lib, config_dir = f"{settings['root']}/lib", service["config_dir"]
    token_file = f"{config_dir}/cluster_token"
    here = {
        "VLLM_HOST_IP": addresses[host],
        **({"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}),
    }
    env = {**here, **service["env"]}
    environment = {name: value for name, value in env.items() if name not in OF_THE_SERVER and not _secret(name)}
    ports = span["ports"]
    details = {
        **span,
        "rank": rank,
        "addresses": addresses,
        "address": addresses[host],
        "interface": interface or "",
        "token_file": token_file,
        # What engines of this host run with, wherever they are started: by Ray, which takes it from the unit of its node.
        "environment": environment,
        "firewall_ports": _firewall_ports(ports, (network.get(host) or {}).get("ephemeral") or USUAL_EPHEMERAL),
    }
    contained = service["runtime"] == "container"
    if span["executor"] == "ray" and service["venv"]:
        # An environment of its own, so that services without Ray, and with another version of it, keep theirs.
        ray = settings["ray_version"]
        venv = {**service["venv"], "path": f"{service['venv']['path']}-ray-{ray}", "ray": ray}
        python = f"{venv['path']}/bin/python"
        told = {**service["told"], "python": [python]}
        service = {**service, "venv": venv, "python": python, "told": told}
        service["command"] = [python, *service["command"][1:]]
    python = service["python"]
    # Commands that print what a boot may change: an interface gets another name, and keeps its address.
    look = [python, f"{lib}/baremetal_interface.py", addresses[host], interface]
    details["found_at_start"] = {name: look for name, value in here.items() if env[name] == value == interface}
    service = {**service, "run_python": [python]}
    if span["executor"] == "ray":
        if contained:
            service = _contained(service, environment, lib, str(settings["ray_version"]))
        address = f"{addresses[span['hosts'][0]]}:{ports['gcs']}"
        env |= {
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": token_file,
            "RAY_USAGE_STATS_ENABLED": "0",
            # holds ray_non_carry_over_env_vars.json
            "VLLM_CONFIG_ROOT": f"{config_dir}/vllm",
        }
        gate = [python, f"{lib}/baremetal_ray_gate.py"]
        for name in span["hosts"]:
            gate += ["--node", f"{name}={addresses[name]}={span['ranks_a_host']}"]
        return {
            **service,
            "span": details,
            "headless": rank > 0,
            # Networks that the Ray node may talk to beside its own. systemd knows no ports: where the server is started
            # inside the node and listens for clients elsewhere, what keeps the node to its network would keep them out.
            "node_networks": ["any"] if service["inside"] and rank == 0 and not _loopback(service["bind"]) else [],
            "env": env,
            "command": [*gate, "--", *service["command"]],
            "kept_home": kept_home(env),
        }
    serve = [python, f"{lib}/baremetal_vllm_main.py", "serve", *args]
    serve += node_arguments(rank, len(span["hosts"]), addresses[span["hosts"][0]], ports["master"])
    if rank == 0:
        serve += service["command"][service["command"].index("--host") :]
    keeper = [python, f"{lib}/baremetal_ranks.py", "--name", service["name"], "--rank", str(rank)]
    for name in span["hosts"]:
        keeper += ["--peer", f"{name}={addresses[name]}"]
    keeper += ["--port", str(ports["ranks"]), "--patience", str(settings.get("peer_timeout", 20))]
    keeper += ["--token-file", token_file, "--folder", service["state_dir"]]
    service = {**service, "command": [*keeper, "--", *serve]}
    if contained:
        service = _contained(service, environment, lib, "")
    return {
        **service,
        "span": details,
        "headless": rank > 0,
        "env": env,
        # The engine's, which changes when it ends: the keeper lives on.
        "pid_command": ["cat", f"{service['state_dir']}/engine.pid"],
    }


def kept_home(env: Mapping[str, str]) -> list[str]:
    """Names for ray_non_carry_over_env_vars.json: what Ray must not copy from the first host to the others."""
    return sorted({*PER_HOST, *OF_THE_SERVER, *filter(_secret, env)})
