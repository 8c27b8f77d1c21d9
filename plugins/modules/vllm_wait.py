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
  - On the way it says which stage the start is in. At the end it returns what the engine measured.
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
  folder:
    description:
      - Working folder of the server. An answer counts only if a process that works there listens on the port of O(url),
        since another server may share it. May be a link. Needs the right to see the server's processes.
    type: path
  model_path:
    description: Folder of the weights, for O(timeout=0).
    type: path
  timeout:
    description:
      - Seconds to wait. V(0) is ten minutes, and the time that the weights of O(model_path) take from their disk as fast
        as 64 MiB of them were read, three times over.
    type: int
    default: 0
  stages:
    description:
      - Stages of a start in their order, each with C(name), C(pattern) of the log line that begins it and, where a
        server can hang, C(stall_s), seconds without a new line after which it is given up, and C(advice).
    type: list
    elements: dict
    default: []
  causes:
    description:
      - Why starts fail. Each has C(pattern), C(cause) and C(advice); the first that is found explains the failure. Cause
        and advice may name groups of the pattern and O(values), in braces.
    type: list
    elements: dict
    default: []
  values:
    description: What the server was planned with.
    type: dict
    default: {}
  slice:
    description:
      - Return at the end of a stage, and after this many seconds, although the server is still starting. V(0) waits to
        the end. The action plugin of this name calls the module with slices and shows the stages.
    type: int
    default: 0
  begun:
    description: What the call before returned as RV(begun).
    type: dict
    default: {}
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Can run in check mode.
    details: Does not wait in check mode, as the server need not be there yet.
    support: partial
"""

EXAMPLES = r"""
- name: Wait for the server
  baremetal.vllm.vllm_wait:
    url: http://127.0.0.1:8000/health
    pid_command: [systemctl, show, --property=MainPID, --value, vllm-chat]
    log_command: [journalctl, --unit=vllm-chat, --lines=4000, --output=cat]
    stages:
      - {name: loading weights, pattern: Starting to load model}
    causes:
      - pattern: CUDA out of memory
        cause: the GPU's memory ran out
        advice: set gpu_memory_utilization below {gpu_memory_utilization}
    values: {gpu_memory_utilization: 0.9}
"""

RETURN = r"""
seconds:
  description: How long it took until the server answered.
  returned: success
  type: float
stage:
  description: The stage that the start is in.
  returned: success
  type: str
stages:
  description: Seconds that each stage took, by its name.
  returned: success
  type: dict
measured:
  description:
    - What the engine says of itself, as far as its log holds it. C(kv_cache_tokens) and C(max_concurrency) of the smallest
      of C(engines) (replicas), C(weights_gib), C(kv_cache_gib), C(cuda_graph_gib) of the first GPU.
  returned: success
  type: dict
  sample: {kv_cache_tokens: 845104, max_concurrency: 25.79, weights_gib: 14.25, kv_cache_gib: 45.13, engines: 1}
starting:
  description: The server has not answered yet; only with O(slice).
  returned: success
  type: bool
begun:
  description: What the next call needs to go on.
  returned: when RV(starting)
  type: dict
limit:
  description: Seconds after which the wait is given up.
  returned: success
  type: int
"""

import glob
import mmap
import os
import re
import time
from http.client import HTTPException
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import listening_sockets, names_of

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
# What vLLM's processes write when a start has failed. Most end then; of several GPUs' processes some may wait for the others
# for good (all-reduce), and the server with them.
FATAL = re.compile(
    r"EngineCore failed to start|Engine core initialization failed|WorkerProc (?:initialization failed|failed to start|hit an)"
)
FATAL_GRACE_S = 20  # to end in order and to say why
# Written by start.sh: what stands before it is of an earlier start.
START = re.compile(r"baremetal: start.*\n?")
RESTART_S = 0.5  # within which a server that a supervisor has started anew has written that line
# Each line of interest, and how its groups are called.
MEASURED = (
    (re.compile(r"KV cache size: (?P<kv_cache_tokens>[\d,]+) tokens"), "least"),
    (re.compile(r"Maximum concurrency for [\d,]+ tokens per request: (?P<max_concurrency>[\d.]+)x"), "least"),
    (re.compile(r"Available KV cache memory: (?P<kv_cache_gib>[\d.]+) GiB"), "first"),
    (re.compile(r"Model loading took (?P<weights_gib>[\d.]+) Gi?B"), "first"),
    (re.compile(r"Graph capturing finished in [\d.]+ secs, took (?P<cuda_graph_gib>[\d.]+) GiB"), "first"),
    # The V0 core counts blocks.
    (re.compile(r"# (?:GPU|cuda|cpu) blocks: (?P<blocks>\d+)"), "least"),
)
# Tokens in a block, as the server names its arguments; else the V0 core's own number.
BLOCK = re.compile(r"\bblock_size'?[=:] ?(\d+)")
V0_BLOCK = 16
# Until anything is loaded: Python, the engine's processes, compiling, and what a busy machine adds.
BASE_S = 600
PATIENCE = 3  # times what the disk needs
SAMPLE = 64 << 20
SLOWEST = 20 << 20  # bytes a second that no disk is taken to fall short of
LOG_EVERY_S = 2


def healthy(opener, url):
    try:
        return opener.open(url, timeout=5).getcode() == 200
    except (IOError, OSError, HTTPException):
        return False


def listens(folder, port):
    """Whether a process that works in the folder listens on the port."""
    names = names_of(folder)
    inodes = {"socket:[%s]" % inode for dummy, its_port, inode in listening_sockets() if its_port == port}
    for link in glob.glob("/proc/[0-9]*/cwd") if inodes else []:
        try:
            if os.readlink(link) in names:
                sockets = glob.glob(os.path.dirname(link) + "/fd/*")
                if any(os.readlink(socket) in inodes for socket in sockets):
                    return True
        except (IOError, OSError):
            continue  # it has gone, or is another user's
    return False


def errors(log):
    """The lines of a log that name an error."""
    return [match.group(1) for match in map(CAUSE.match, map(str.strip, log.splitlines())) if match]


def cause(log):
    """The line of a log that names the error, or its last line."""
    found = errors(log)
    first_hand = [line for line in found if not any(echo in line for echo in ECHO)]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (first_hand or found or lines or ["the log is empty"])[-1]


def explain(log, causes, values):
    """What a known cause means and what to do, or an empty text. The first row of the table that is found counts."""
    for row in causes:
        found = list(re.finditer(row["pattern"], log))
        if found:
            known = dict(values, **found[-1].groupdict())
            return " = %s. %s" % tuple(row[key].format(**known) for key in ("cause", "advice"))
    return ""


def stage_of(log, stages):
    """The last stage of the table that the log has reached."""
    reached = [stage for stage in stages if re.search(stage["pattern"], log)]
    return reached[-1] if reached else {"name": "starting"}


def measured(log):
    """What the engine says of its memory."""
    found = {}
    for pattern, which in MEASURED:
        rows = [match.groupdict() for match in pattern.finditer(log)]
        for name in rows[0] if rows else {}:
            numbers = [float(row[name].replace(",", "")) for row in rows]
            found[name] = min(numbers) if which == "least" else numbers[0]
            if name in ("kv_cache_tokens", "blocks"):
                found["engines"] = len(numbers)
    if "blocks" in found:
        size = BLOCK.search(log)
        found.setdefault("kv_cache_tokens", found.pop("blocks") * (int(size.group(1)) if size else V0_BLOCK))
    if "kv_cache_tokens" in found:
        found["kv_cache_tokens"] = int(found["kv_cache_tokens"])
    return found


def disk_rate(path, size):
    """Bytes a second of a file's disk, past the cache of the system; 0 where that cannot be told."""
    sample = min(SAMPLE, size) // mmap.PAGESIZE * mmap.PAGESIZE
    if not sample or not hasattr(os, "O_DIRECT"):
        return 0
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (IOError, OSError):
        return 0
    try:
        with os.fdopen(handle, "rb", 0) as stream, mmap.mmap(-1, 4 << 20) as page:  # memory that is aligned
            begin, done = time.time(), 0
            while done < sample:
                read = stream.readinto(page)
                if not read:
                    break
                done += read
            return int(done / max(time.time() - begin, 1e-6))
    except (IOError, OSError, ValueError):
        return 0


def limit_for(folder):
    """Seconds that the start of a model in this folder may take."""
    sizes = {}
    for name in glob.glob(os.path.join(folder or "", "*")) if folder else []:
        if name.endswith((".safetensors", ".bin", ".pt", ".gguf")):
            sizes[name] = os.path.getsize(name)
    if not sizes:
        return BASE_S
    rate = disk_rate(max(sizes, key=lambda name: sizes[name]), max(sizes.values()))
    return int(BASE_S + PATIENCE * sum(sizes.values()) / max(rate or 5 * SLOWEST, SLOWEST))


def main():
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "pid_command": {"type": "list", "elements": "str", "required": True},
            "log_command": {"type": "list", "elements": "str", "required": True},
            "folder": {"type": "path"},
            "model_path": {"type": "path"},
            "timeout": {"type": "int", "default": 0},
            "stages": {"type": "list", "elements": "dict", "default": []},
            "causes": {"type": "list", "elements": "dict", "default": []},
            "values": {"type": "dict", "default": {}},
            "slice": {"type": "int", "default": 0},
            "begun": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    params = module.params
    if not re.match(r"https?://[^/\s]", params["url"]):
        module.fail_json(
            msg="url is %r: give the address of /health, such as http://127.0.0.1:8000/health" % params["url"]
        )
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, seconds=0.0, stages={}, measured={}, limit=0)
    Wait(module).run()


class Wait:
    """One wait, or a slice of it. What goes from slice to slice is in `begun`."""

    def __init__(self, module):
        self.module, self.params = module, module.params
        self.opener = build_opener(ProxyHandler({}))
        self.now = time.time()
        begun = self.params["begun"]
        self.start = float(begun.get("start", self.now))
        self.first_pid = begun.get("pid")
        self.stage = begun.get("stage", "starting")
        self.stage_since = float(begun.get("stage_since", self.now))
        self.stages = dict(begun.get("stages", {}))
        self.lines = int(begun.get("lines", 0))
        self.lines_since = float(begun.get("lines_since", self.now))
        self.fatal_since = begun.get("fatal_since")
        self.limit = int(begun.get("limit") or self.params["timeout"] or limit_for(self.params["model_path"]))
        parts = urlsplit(self.params["url"])
        self.port = parts.port or {"https": 443}.get(parts.scheme, 80)

    def answers(self):
        folder = self.params["folder"]
        return (not folder or listens(folder, self.port)) and healthy(self.opener, self.params["url"])

    def log(self):
        return self.starts()[-1]

    def starts(self):
        """What each start has written, the last one last."""
        return START.split(self.module.run_command(self.params["log_command"])[1])

    def give_up(self, what, advice="", restarted=False):
        starts = self.starts()
        log = starts[-1]
        if restarted and not errors(log) and len(starts) > 1:
            log = starts[-2]
        said = explain(log, self.params["causes"], self.params["values"]) or advice
        self.module.fail_json(
            msg="%s: %s%s" % (what, cause(log), said),
            stage=self.stage,
            log=[line for line in log.splitlines() if line.strip()][-40:],
        )

    def look(self):
        """Reads the log: the stage, and whether anything moves. True at the end of a stage."""
        log = self.log()
        stage = stage_of(log, self.params["stages"])
        if FATAL.search(log):
            self.fatal_since = self.fatal_since or self.now
            if self.now - self.fatal_since > FATAL_GRACE_S:
                self.give_up("vLLM has failed after %d s and hangs instead of ending" % (self.fatal_since - self.start))
        if len(log) != self.lines:
            self.lines, self.lines_since = len(log), self.now
        elif stage.get("stall_s") and self.now - self.lines_since > int(stage["stall_s"]):
            self.give_up(
                "vLLM hangs while %s: nothing new in its log for %d s" % (stage["name"], self.now - self.lines_since),
                ". " + stage.get("advice", "").format(**self.params["values"]),
            )
        if stage["name"] == self.stage:
            return False
        self.end_stage(stage["name"])
        return True

    def end_stage(self, following):
        self.stages[self.stage] = round(self.stages.get(self.stage, 0) + self.now - self.stage_since, 1)
        self.stage, self.stage_since = following, self.now

    def result(self, **more):
        return dict(
            changed=False,
            seconds=round(self.now - self.start, 1),
            stage=self.stage,
            stages=self.stages,
            limit=self.limit,
            **more,
        )

    def run(self):
        params, began, looked = self.params, self.now, 0
        while not self.answers():
            self.now = time.time()
            waited = self.now - self.start
            pid = self.module.run_command(params["pid_command"])[1].strip()
            running = pid.split(" ")[0].isdigit() and pid != "0"
            if running and self.first_pid is None:
                self.first_pid = pid
            if self.first_pid and pid != self.first_pid:
                if running:
                    time.sleep(RESTART_S)
                what = "vLLM has ended after %d s instead of answering %s" % (waited, params["url"])
                self.give_up(what, restarted=running)
            if self.first_pid is None and waited > 30:
                self.give_up("vLLM does not run, nobody answers %s" % params["url"])
            if waited > self.limit:
                self.give_up("vLLM does not answer %s after %d s (vllm_start_timeout)" % (params["url"], self.limit))
            new_stage = False
            if self.now - looked >= LOG_EVERY_S:
                looked, new_stage = self.now, self.look()
            if params["slice"] and (new_stage or self.now - began >= params["slice"]):
                begun = {
                    "start": self.start,
                    "pid": self.first_pid,
                    "stage": self.stage,
                    "stage_since": self.stage_since,
                    "stages": self.stages,
                    "lines": self.lines,
                    "lines_since": self.lines_since,
                    "fatal_since": self.fatal_since,
                    "limit": self.limit,
                }
                self.module.exit_json(starting=True, begun=begun, measured={}, **self.result())
            time.sleep(0.5)
        self.now = time.time()
        self.end_stage("answering")
        self.module.exit_json(starting=False, measured=measured(self.log()), **self.result())


if __name__ == "__main__":
    main()
