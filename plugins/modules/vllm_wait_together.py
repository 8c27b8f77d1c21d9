#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

# The documentation of the action plugin of this name; on the host runs the module vllm_wait.

DOCUMENTATION = r"""
module: vllm_wait_together
short_description: Wait until each of several vLLM servers answers or has failed
version_added: 0.1.0
description:
  - Does what M(baremetal.vllm.vllm_wait) does, for servers that start at the same time. It shows the stages of all, and ends when the
    last one answers or has failed.
  - It does not fail itself where a server does; RV(servers) says which one did, and why.
options:
  servers:
    description:
      - The options of M(baremetal.vllm.vllm_wait) for each server, by its name. Their O(baremetal.vllm.vllm_wait#module:timeout) are added
        up, as the servers share the host's disk and processors, and the sum holds for each.
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Can run in check mode.
    details: The task is skipped.
    support: none
"""

EXAMPLES = r"""
- name: Wait for two servers
  baremetal.vllm.vllm_wait_together:
    servers:
      chat:
        url: http://127.0.0.1:8000/health
        pid_command: [systemctl, show, --property=MainPID, --value, vllm-chat]
        log_command: [journalctl, --unit=vllm-chat, --lines=4000, --output=cat]
      embed:
        url: http://127.0.0.1:8001/health
        pid_command: [systemctl, show, --property=MainPID, --value, vllm-embed]
        log_command: [journalctl, --unit=vllm-embed, --lines=4000, --output=cat]
"""

RETURN = r"""
servers:
  description:
    - What M(baremetal.vllm.vllm_wait) returns for each server, by its name. C(failed) and C(msg) of a server that did not start. C(seconds)
      may be some seconds too high, as one server is looked at after another, and counts from the call, or from what its C(begun) says.
  returned: success
  type: dict
  sample: {chat: {seconds: 83.2, starting: false}, embed: {failed: true, msg: "vLLM has ended after 12 s instead of answering"}}
"""
