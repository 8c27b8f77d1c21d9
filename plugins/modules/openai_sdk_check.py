#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

# The documentation of the action plugin of this name; there is no code for the host.

DOCUMENTATION = r"""
module: openai_sdk_check
short_description: Prove an OpenAI endpoint from the controller, with the official openai SDK
version_added: 0.1.0
description:
  - Does what a user's program does, with the client that such programs use, on the controller. All checks run; the action
    fails at the end if one did not hold.
  - An endpoint that listens on the host's own address only (127.0.0.1, ::1), or that the controller does not reach, is asked
    through the SSH connection of the play (a forwarding of its shared connection, C(ControlPersist)). With any other
    connection it cannot be asked from the controller, and RV(via) is empty; M(baremetal.vllm.openai_check) proves it on the
    host.
  - The key is read from the host and stays in memory.
options:
  base_url:
    description: The endpoint, up to and with C(/v1), as the host or the network knows it.
    type: str
    required: true
  api_key_file:
    description: A file on the host that holds the key.
    type: path
    required: true
  model:
    description: Name under which the model is served.
    type: str
    required: true
  task:
    description: What the service does; decides what is asked.
    type: str
    choices: [generate, embed, score]
    default: generate
  tool_calls:
    description:
      - Whether a tool call must work. Without it a server that refuses one has passed, as it does not offer any.
    type: bool
    default: false
  ca_pem:
    description: Certificates (PEM) that the endpoint's own is checked with. Left out, the controller's are taken.
    type: str
  refusal:
    description:
      - The message with which a proxy before the endpoint refuses the address that asks (HTTP 403). Such an endpoint cannot be
        reached from here. Any other 403 is judged as an answer of the endpoint.
    type: str
    default: ""
  required:
    description: Whether it is a failure when openai is not installed on the controller, or the endpoint cannot be reached from it.
    type: bool
    default: false
  timeout:
    description: Seconds for one request.
    type: int
    default: 120
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Can run in check mode.
    details: Sends nothing in check mode.
    support: partial
"""

EXAMPLES = r"""
- name: Prove the endpoint as a user's program sees it
  baremetal.vllm.openai_sdk_check:
    base_url: http://127.0.0.1:8000/v1
    api_key_file: /etc/vllm/chat/api_key
    model: qwen2.5-7b
"""

RETURN = r"""
checks:
  description: Each check with C(name), C(ok), C(detail) and C(ms).
  returned: always
  type: list
  elements: dict
sdk:
  description: Version of the openai package; empty when it is not there.
  returned: always
  type: str
told:
  description: The checks in one line, or why there are none.
  returned: success
  type: str
  sample: models, completion, chat, stream, tool_call (not judged), wrong_key
via:
  description: V(direct) or V(ssh), or nothing when the endpoint was not asked.
  returned: always
  type: str
"""
