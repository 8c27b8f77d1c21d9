# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Filter dify_providers."""

from __future__ import annotations

DOCUMENTATION = r"""
name: dify_providers
short_description: Settings of Dify's OpenAI-API-compatible plugin for endpoints of this collection
version_added: 0.1.0
author: baremetal.vllm maintainers (@baremetal-vllm)
description:
  - One model of Dify for each endpoint, with the variables of the plugin's own form
    (U(https://github.com/langgenius/dify-official-plugins), models/openai_api_compatible/provider/openai_api_compatible.yaml).
  - Holds no key; C(api_key_file) says where it lies.
options:
  _input:
    description:
      - What the roles C(vllm) and C(proxy) tell clients, one entry an endpoint (endpoint.json, endpoints.json). A service that
        the proxy passes on is shown as the proxy has it.
    type: list
    elements: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what to enter
  ansible.builtin.debug:
    msg: "{{ endpoints | baremetal.vllm.dify_providers }}"
"""

RETURN = r"""
_value:
  description:
    - One entry an endpoint, with C(model_type) (V(llm), V(text-embedding) or V(rerank)), C(model), C(credentials),
      C(api_key_file) and C(note), which is empty or says why Dify will not reach it.
  type: list
  elements: dict
"""

from typing import Any
from urllib.parse import urlsplit

from ansible.errors import AnsibleFilterError

MODEL_TYPES = {"generate": "llm", "embed": "text-embedding", "score": "rerank"}
OWN = ("127.", "localhost", "::1")
# Texts that Dify sends in one request for embeddings.
CHUNKS = 32


def _credentials(endpoint: dict[str, Any]) -> dict[str, str]:
    """The form's variables; it takes texts alone."""
    length = str(endpoint.get("max_model_len") or 4096)
    common = {
        "endpoint_url": endpoint["base_url"],
        "endpoint_model_name": endpoint["model"],
        "context_size": length,
    }
    if endpoint["task"] == "embed":
        return {**common, "max_chunks": str(CHUNKS)}
    if endpoint["task"] == "score":
        return common
    return {
        **common,
        "mode": "chat",
        "max_tokens_to_sample": length,
        "function_calling_type": "tool_call" if endpoint.get("tool_calls") else "no_call",
        "stream_function_calling": "supported" if endpoint.get("tool_calls") else "not_supported",
        "vision_support": "support" if endpoint.get("vision") else "no_support",
    }


def dify_providers(endpoints: Any) -> list[dict[str, Any]]:
    # Entries of the proxy name hosts.
    proxied = [endpoint for endpoint in endpoints if "hosts" in endpoint]
    names = {endpoint.get("service") for endpoint in proxied}
    found = []
    for endpoint in [*proxied, *(one for one in endpoints if "hosts" not in one and one.get("service") not in names)]:
        if endpoint.get("task") not in MODEL_TYPES:
            raise AnsibleFilterError(
                f"dify_providers: task is {endpoint.get('task')!r}: give entries of endpoint.json, whose task is one of "
                f"{', '.join(MODEL_TYPES)}"
            )
        host = urlsplit(endpoint["base_url"]).hostname or ""
        found.append(
            {
                "plugin": "langgenius/openai_api_compatible",
                "model_type": MODEL_TYPES[endpoint["task"]],
                "model": endpoint["model"].rstrip("/").rsplit("/", 1)[-1],
                "credentials": _credentials(endpoint),
                "api_key_file": endpoint["api_key_file"],
                "note": f"{host} is the container's own address for Dify: set proxy_enabled, or bind the service to an "
                "address of the network"
                if host.startswith(OWN)
                else "",
            }
        )
    return found


class FilterModule:
    """The filter."""

    def filters(self) -> dict[str, Any]:
        return {"dify_providers": dify_providers}
