# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter proxy_problems."""

from __future__ import annotations

DOCUMENTATION = r"""
name: proxy_problems
short_description: Why a host cannot run the reverse proxy as it is asked for
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - Judges what is to be passed on against what M(baremetal.vllm.host_probe) saw.
positional: host
options:
  _input:
    description: What is to be passed on, in the form of the role's RV(proxy_services).
    type: list
    elements: dict
    required: true
  host:
    description:
      - C(listeners) and C(init) as the probe saw them, C(running), whether the proxy holds its ports itself, C(root), C(tls),
        C(given), the files of a certificate and its key on the controller, and C(pair), what they hold (PEM; empty where a file
        cannot be read), when both are given. Uses C(cryptography) for these, which ansible-core needs itself.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the problems
  ansible.builtin.debug:
    msg: "{{ proxy_services | baremetal.vllm.proxy_problems(host) }}"
"""

RETURN = r"""
_value:
  description: One line a problem, with the way out.
  type: list
  elements: str
"""

import datetime
import re
from collections import Counter
from typing import Any

from ansible_collections.baremetal.vllm.plugins.filter.certificate_outdated import end_of

UPSTREAM = re.compile(r"(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}")
# A name becomes part of the proxy's configuration.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def _pair_problems(files: list[str], pair: list[str]) -> list[str]:
    """Why nginx would not start with a certificate and its key, or clients would refuse it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    given = [f"proxy_tls_certificate_src ({files[0]})", f"proxy_tls_key_src ({files[1]})"]
    if "" in pair:
        return [f"{given[pair.index('')]} is no file that can be read on the controller, or is empty"]
    try:
        certificate = x509.load_pem_x509_certificate(pair[0].encode())
    except ValueError:
        return [f"{given[0]} holds no certificate: give it as PEM, with those between it and its authority behind it"]
    try:
        key = serialization.load_pem_private_key(pair[1].encode(), password=None)
    except TypeError:
        return [
            f"{given[1]} has a passphrase, which nobody can enter when the proxy starts: take it off (openssl pkey -in FILE -out NEW)"
        ]
    except ValueError:
        return [f"{given[1]} holds no private key: give it as PEM"]
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if certificate.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        return [f"{given[0]} is for another key than {given[1]}: give the key that it was made with"]
    if (end := end_of(certificate)) < datetime.datetime.now(datetime.timezone.utc):
        return [f"{given[0]} ended on {end:%Y-%m-%d}, and clients refuse it: give one that is valid"]
    return []


def proxy_problems(services: list[dict[str, Any]], host: dict[str, Any]) -> list[str]:
    problems = []
    if not services:
        problems.append("proxy_enabled is true and there is no service to pass on: plan some, or give proxy_services")
    if host["init"] != "systemd" or not host["root"]:
        problems.append("the proxy runs under systemd and is set up by root: use a host and a user that have them")
    names = Counter(service["name"] for service in services)
    problems += [f"proxy_services has {name} more than once: names must differ" for name, n in names.items() if n > 1]
    at: dict[tuple[int, str], str] = {}
    for service in services:
        name, port = service["name"], int(service["port"])
        if not NAME.fullmatch(name):
            problems.append(f"proxy_services has the name {name!r}: give letters, digits, '_', '.' and '-'")
        if not service.get("upstreams"):
            problems.append(f"service {name} has no server to pass requests on to")
        problems += [
            f"upstream {upstream!r} of service {name} is no address: give host:port, such as 10.0.0.11:8000"
            for upstream in service.get("upstreams", [])
            if not UPSTREAM.fullmatch(upstream)
        ]
        for server_name in service.get("server_names") or [""]:
            if other := at.get((port, server_name)):
                problems.append(
                    f"services {other} and {name} share port {port} of the proxy: give one of them another proxy_port, or "
                    "each proxy_server_names of its own"
                )
                break
            at[port, server_name] = name
        holder = host["listeners"].get(str(port))
        if holder and not (host["running"] and "nginx" in (holder.get("command") or "nginx")):
            who = f"{holder['command']} (pid {holder['pid']})" if holder.get("pid") else "another process"
            problems.append(f"port {port} of the proxy is taken by {who}: stop it, or take another proxy_port")
    if host["tls"] == "given" and len([path for path in host["given"] if path]) == 1:
        problems.append("proxy_tls_certificate_src and proxy_tls_key_src belong together: give both, or none of them")
    if host["pair"]:
        problems += _pair_problems(host["given"], host["pair"])
    return problems


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"proxy_problems": proxy_problems}
