#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vllm_wait
short_description: Wait until a vLLM server answers, or until it has failed
version_added: 0.1.0
description:
  - Asks C(/health) until it says 200. A process that dies while it starts ends the wait at once, with the error that its
    log holds; a supervisor would try again and again.
options:
  url:
    description: Address of C(/health).
    type: str
    required: true
  pid_command:
    description: Command that prints the server's process id, 0 or nothing while it does not run.
    type: list
    elements: str
    required: true
  log_command:
    description: Command that prints the end of the server's log.
    type: list
    elements: str
    required: true
  timeout:
    description: Seconds to wait.
    type: int
    default: 900
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
attributes:
  check_mode:
    description: Can run in check mode.
    details: Does not wait in check mode, as the server need not be there yet.
    support: partial
  diff_mode:
    description: There is nothing to compare.
    support: none
  platform:
    description: Target platforms.
    platforms: posix
    support: full
"""

EXAMPLES = r"""
- name: Wait for the server
  baremetal.vllm.vllm_wait:
    url: http://127.0.0.1:8000/health
    pid_command: [systemctl, show, --property=MainPID, --value, vllm-chat]
    log_command: [journalctl, --unit=vllm-chat, --lines=200, --output=cat]
"""

RETURN = r"""
seconds:
  description: How long it took until the server answered.
  returned: success
  type: float
"""

import re
import time
from http.client import HTTPException
from urllib.request import ProxyHandler, build_opener

from ansible.module_utils.basic import AnsibleModule

# The line that says why: an exception at the end of a traceback, the argument parser's complaint, or what pydantic found
# (its exception only counts errors). Before it, which processes pass it on.
CAUSE = re.compile(
    r"^(?:\([^)]*\)\s*|\[rank\d+\]:\s*)*(?:ERROR .*?\] )?"
    r"((?:[\w.]+(?:Error|Exception|Exit|Interrupt)|[\w./ -]+: error): ?\S.*|Value error, .*?)(?: \[type=value_error,.*)?$"
)
# vLLM ends with these when another process of it has said why.
ECHO = (
    "Engine core initialization failed",
    "Engine process failed to start",
    "EngineCore encountered an issue",
    "WorkerProc initialization failed",
)


def healthy(opener, url):
    try:
        return opener.open(url, timeout=5).getcode() == 200
    except (IOError, OSError, HTTPException):
        return False


def cause(log):
    """The line of a log that names the error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    found = [match.group(1) for match in map(CAUSE.match, lines) if match]
    first_hand = [line for line in found if not any(echo in line for echo in ECHO)]
    return (first_hand or found or lines or ["the log is empty"])[-1]


def main():
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "pid_command": {"type": "list", "elements": "str", "required": True},
            "log_command": {"type": "list", "elements": "str", "required": True},
            "timeout": {"type": "int", "default": 900},
        },
        supports_check_mode=True,
    )
    params = module.params
    if not re.match(r"https?://[^/\s]", params["url"]):
        module.fail_json(
            msg="url is %r: give the address of /health, such as http://127.0.0.1:8000/health" % params["url"]
        )
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, seconds=0.0)
    opener = build_opener(ProxyHandler({}))
    start, first_pid = time.time(), None

    def give_up(what):
        log = module.run_command(params["log_command"])[1]
        module.fail_json(msg="%s: %s" % (what, cause(log)), log=log.splitlines()[-40:])

    while not healthy(opener, params["url"]):
        waited = time.time() - start
        pid = module.run_command(params["pid_command"])[1].strip()
        running = pid.isdigit() and pid != "0"
        if running and first_pid is None:
            first_pid = pid
        if first_pid and pid != first_pid:
            give_up("vLLM has ended after %d s instead of answering %s" % (waited, params["url"]))
        if first_pid is None and waited > 30:
            give_up("vLLM does not run, nobody answers %s" % params["url"])
        if waited > params["timeout"]:
            give_up("vLLM does not answer %s after %d s (vllm_start_timeout)" % (params["url"], params["timeout"]))
        time.sleep(0.5)
    module.exit_json(changed=False, seconds=round(time.time() - start, 1))


if __name__ == "__main__":
    main()
