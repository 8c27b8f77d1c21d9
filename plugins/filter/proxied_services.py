# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter proxied_services."""

# pylint: disable=disallowed-name # _ is a value that nothing reads
from __future__ import annotations

DOCUMENTATION = r"""
name: proxied_services
short_description: What a reverse proxy passes on, for a plan
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - For each service of a plan its port on the proxy, and the address of each of its servers as the proxy's host reaches it.
positional: host, services, addresses, settings
options:
  _input:
    description: What P(baremetal.vllm.vllm_plan#filter) returned.
    type: dict
    required: true
  host:
    description: Name of the proxy's host.
    type: str
    required: true
  services:
    description:
      - RV(vllm_services). C(proxy_port) is the port on the proxy, C(proxy_server_names) the host names that mean this
        service, and C(proxy) set to false leaves it out.
    type: list
    elements: dict
    required: true
  addresses:
    description: Name of each host, and how others reach it.
    type: dict
    required: true
  settings:
    description: C(port), the first one for services that name none, C(bind), C(config_dir) and C(key_given).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what is passed on
  ansible.builtin.debug:
    msg: "{{ vllm_plan_result | baremetal.vllm.proxied_services('lb', vllm_services, addresses, settings) }}"
"""

RETURN = r"""
_value:
  description: C(services) in the form of the role's RV(proxy_services), and C(problems), one line each.
  type: dict
"""

import ipaddress
from typing import Any


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _is_any(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def _reached_at(server: str, bind: str, host: str, addresses: dict[str, str]) -> str | None:
    """Address of a server's host as `host` reaches it; None when it listens for its own host alone."""
    if server == host:
        return ("::1" if bind == "::" else "127.0.0.1") if _is_any(bind) else bind
    if _is_loopback(bind):
        return None
    return addresses.get(server, server) if _is_any(bind) else bind


def proxied_services(
    plan: dict[str, Any], host: str, services: list[dict[str, Any]], addresses: dict[str, str], settings: dict[str, Any]
) -> dict[str, Any]:
    users = {service["name"]: service for service in services}
    taken = {service["proxy_port"] for service in services if service.get("proxy_port")}
    following = int(settings["port"])
    found, problems = [], []
    for planned in plan["services"]:
        user = users.get(planned["name"], {})
        if not user.get("proxy", True) or not planned["instances"]:
            continue
        port = user.get("proxy_port")
        if not port:
            while following in taken:
                following += 1
            port = following
            taken.add(port)
        bind = user.get("bind", settings["bind"])
        servers = [(instance["hosts"][0], instance["port"]) for instance in planned["instances"]]
        upstreams = []
        for server, at in servers:
            address = _reached_at(server, bind, host, addresses)
            if address is None:
                problems.append(
                    f"service {planned['name']} listens on {bind} of {server}, which the proxy on {host} does not reach: "
                    "give the service a bind address of the network between them, or run the proxy on its host"
                )
            else:
                upstreams.append(f"[{address}]:{at}" if ":" in address else f"{address}:{at}")
        if len({server for server, _ in servers}) > 1 and not (user.get("api_key") or settings["key_given"]):
            problems.append(
                f"service {planned['name']} runs on {', '.join(server for server, _ in servers)}, and each would make a key "
                "of its own: set vllm_api_key, so that the proxy's clients have one for all"
            )
        found.append(
            {
                "name": planned["name"],
                "port": int(port),
                "server_names": user.get("proxy_server_names", []),
                "upstreams": upstreams,
                "hosts": [server for server, _ in servers],
                "model": user.get("served_model_name") or planned.get("served_model_name") or planned["model"],
                "task": planned["instances"][0]["task"],
                "max_model_len": planned["instances"][0]["max_model_len"],
                "vision": "vision_config" in user.get("config", {}),
                "tool_calls": "--enable-auto-tool-choice" in planned["args"],
                "api_key_file": f"{settings['config_dir']}/{planned['name']}/api_key",
            }
        )
    return {"services": found, "problems": problems}


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"proxied_services": proxied_services}
