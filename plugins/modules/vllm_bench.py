#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vllm_bench
short_description: Measure an OpenAI endpoint with vLLM's own benchmark, at one number of clients
version_added: 0.1.0
description:
  - Runs C(vllm bench serve) with random prompts of one length and returns its figures as one row.
  - The benchmark comes from the environment that serves the model, so that nothing has to be installed. Releases from 0.8.5
    on have it.
options:
  base_url:
    description: The endpoint, up to and with C(/v1).
    type: str
    required: true
  api_key_file:
    description: A file on this host that holds the key. It reaches the benchmark through its environment.
    type: path
    required: true
  model:
    description: Name under which the model is served.
    type: str
    required: true
  tokenizer:
    description: Folder with the tokenizer. Left out, it is the folder that the server says it serves from.
    type: str
  command:
    description:
      - Python that holds vLLM, as the beginning of a command. In a container this is
        C([docker, exec, --interactive, --env, OPENAI_API_KEY, NAME, python3]).
    type: list
    elements: str
    required: true
  task:
    description: What the service does.
    type: str
    choices: [generate, embed, score]
    default: generate
  concurrency:
    description: How many requests are open at once.
    type: int
    required: true
  num_prompts:
    description: How many requests are sent in all.
    type: int
    required: true
  processes:
    description:
      - Over how many processes the clients are spread, at most one for each client. One process is a limit of its own from
        some 15000 output tokens a second on.
      - With more than one, means and medians are those of the processes weighted by their requests, and the 99th
        percentile is the highest of theirs.
    type: int
    default: 1
  input_len:
    description: Length of each prompt in tokens.
    type: int
    default: 512
  output_len:
    description: Length of each answer in tokens. Embedding and scoring have none.
    type: int
    default: 128
  seed:
    description: The same seed gives the same prompts.
    type: int
    default: 0
  extra_args:
    description: More arguments of C(vllm bench serve).
    type: list
    elements: str
    default: []
  gpus:
    description: Indices of the GPUs whose use is averaged, as nvidia-smi counts them. Empty means all.
    type: list
    elements: int
    default: []
  timeout:
    description: Seconds until the benchmark must have ended.
    type: int
    default: 1800
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
- name: Measure with 50 clients
  baremetal.vllm.vllm_bench:
    base_url: http://127.0.0.1:8000/v1
    api_key_file: /etc/vllm/chat/api_key
    model: qwen2.5-7b
    command: [/opt/vllm/venvs/cuda-0.25.1/bin/python]
    concurrency: 50
    num_prompts: 250
  register: measured
"""

RETURN = r"""
row:
  description:
    - C(concurrency), C(num_prompts), C(completed), C(duration_s), C(requests_per_s), C(output_tokens_per_s),
      C(total_tokens_per_s), for each of C(ttft), C(tpot), C(itl) and C(e2el) the C(mean_..._ms), C(median_..._ms) and
      C(p99_..._ms), and C(gpu_utilization_percent), null where there is no nvidia-smi.
    - C(ttft) is the time to the first token, C(tpot) the time for each further one, C(itl) the time between two, and
      C(e2el) the time of a whole request.
  returned: success
  type: dict
"""

import json
import os
import re
import shutil
import signal
import tempfile
import time
from http.client import HTTPException
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.bench_processes import READY, Client, Utilization

MARK = "BAREMETAL_BENCH_RESULT "
# What `vllm bench serve` runs, which prints its result file as well, so that nothing has to be copied out of a container. Not by
# vLLM's command line, which asks for a package named vllm that builds of other names lack. It begins to send when it is told to,
# so that several of them measure the same seconds, and ends with all that it started when its standard input does: what is
# killed outside of a container is `docker exec` alone. The thread reads the bare descriptor, as a lock of sys.stdin that a
# thread holds at the end of Python is an error.
LAUNCHER = """
import argparse, os, signal, sys, tempfile, threading
told = threading.Event()
def listen():
    while os.read(0, 64):
        told.set()
    os.killpg(0, signal.SIGKILL)
if os.getpgrp() != os.getpid():
    os.setpgid(0, 0)
threading.Thread(target=listen, daemon=True).start()
import vllm.benchmarks.serve as serve
benchmark = serve.benchmark
async def wait_and_benchmark(*positional, **named):
    print("\\n%s", flush=True)
    told.wait()
    return await benchmark(*positional, **named)
serve.benchmark = wait_and_benchmark
parser = getattr(serve, "FlexibleArgumentParser", argparse.ArgumentParser)(prog="vllm bench serve")
serve.add_cli_args(parser)
with tempfile.TemporaryDirectory() as folder:
    serve.main(parser.parse_args([*sys.argv[1:], "--save-result", "--result-dir", folder, "--result-filename", "r.json"]))
    print("\\n%s" + open(folder + "/r.json").read().replace("\\n", " "), flush=True)
""" % (READY, MARK)
ENVIRONMENT = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Dataset and backend for each task; completions are both vLLM's default and the path with the least around the engine.
TASKS = {
    "generate": ["--dataset-name", "random", "--percentile-metrics", "ttft,tpot,itl,e2el", "--ignore-eos"],
    "embed": ["--dataset-name", "random", "--backend", "openai-embeddings", "--endpoint", "/v1/embeddings"],
    "score": ["--dataset-name", "random-rerank", "--backend", "vllm-rerank", "--endpoint", "/v1/rerank"],
}
METRICS = ("ttft", "tpot", "itl", "e2el")


class Problem(Exception):
    """Why nothing was measured, in one line."""


def served_from(base_url, key, model):
    """The folder that the server loaded the model from, by what it says itself."""
    request = Request(base_url + "/models", headers={"Authorization": "Bearer " + key})
    try:
        answer = build_opener(ProxyHandler({})).open(request, timeout=30).read().decode("utf-8")
        served = dict((entry["id"], entry.get("root")) for entry in json.loads(answer)["data"])
    except (URLError, HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(
            "%s/models does not answer (%s): bring the service up first" % (base_url, getattr(error, "reason", error))
        )
    if model not in served:
        raise Problem("%s serves %s, not %s" % (base_url, ", ".join(sorted(served)) or "nothing", model))
    return served[model] or model


def arguments(params, tokenizer, clients, prompts, seed):
    root = params["base_url"].rstrip("/")[: -len("/v1")]
    words = list(TASKS[params["task"]])
    words += ["--base-url", root, "--model", params["model"], "--served-model-name", params["model"]]
    words += ["--tokenizer", tokenizer, "--seed", str(seed)]
    words += ["--num-prompts", str(prompts), "--max-concurrency", str(clients)]
    words += ["--random-input-len", str(params["input_len"])]
    if params["task"] == "generate":
        words += ["--random-output-len", str(params["output_len"])]
    return words + ["--metric-percentiles", "99", "--disable-tqdm"] + params["extra_args"]


def measure(commands, environment, timeout):
    """The result that each command told. All are ended, with all that they started, when one fails or takes too long."""
    until = time.time() + timeout
    clients = []
    try:
        for command in commands:
            clients.append(Client(command, environment))
            clients[-1].start()
        for client in clients:
            client.ready.wait(max(0, until - time.time()))
        for client in clients:
            client.begin()
        for client in clients:
            client.join(max(0, until - time.time()))
        if any(client.is_alive() for client in clients):
            raise Problem("the benchmark has not ended after %d s (bench_timeout): take fewer requests" % timeout)
    finally:
        for client in clients:
            client.kill()
    results = []
    for client in clients:
        told = [line[len(MARK) :] for line in client.lines if line.startswith(MARK)]
        if client.process.returncode or not told:
            raise Problem("vllm bench serve %s: %s" % (ended(client.process.returncode), why(client.lines)))
        results.append(json.loads(told[-1]))
    return results


def ended(status):
    """How a program ended. A shell and docker exec tell of a signal by a status above 128."""
    try:
        return "was ended by " + signal.Signals(-status if status < 0 else status - 128).name
    except ValueError:
        return "ended with status %d" % status


def why(output):
    """The line that says what went wrong, of what the benchmark printed."""
    lines = [line.strip() for line in output if line.strip()]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b|.*: error: ", line)]
    return (errors or lines or ["it printed nothing"])[-1][:400]


def to_row(params, results, percent):
    """One row of the results of all processes, which ran at the same time."""
    completed = sum(result["completed"] for result in results)
    if completed != params["num_prompts"]:
        errors = [error.strip().splitlines()[-1] for result in results for error in result.get("errors") or [] if error]
        raise Problem(
            "only %d of %d requests were answered at concurrency %d%s: look into the server's log, or take fewer clients"
            % (completed, params["num_prompts"], params["concurrency"], " (%s)" % errors[0] if errors else "")
        )
    duration = max(result["duration"] for result in results)
    output = sum(result.get("total_output_tokens") or 0 for result in results)
    tokens = output + sum(result.get("total_input_tokens") or result.get("total_input") or 0 for result in results)
    row = {
        "concurrency": params["concurrency"],
        "num_prompts": params["num_prompts"],
        "completed": completed,
        "duration_s": round(duration, 3),
        "requests_per_s": round(completed / duration, 3),
        "output_tokens_per_s": round(output / duration, 2),
        "total_tokens_per_s": round(tokens / duration, 2),
        "gpu_utilization_percent": percent,
    }
    for metric in METRICS:
        for kind in ("mean", "median", "p99"):
            name = "%s_%s_ms" % (kind, metric)
            values = [(result[name], result["completed"]) for result in results if result.get(name) is not None]
            if values and kind == "p99":
                row[name] = round(max(value for value, dummy in values), 2)
            elif values:
                row[name] = round(
                    sum(value * count for value, count in values) / sum(count for dummy, count in values), 2
                )
    return row


def shares(total, parts):
    """Whole numbers that sum up to the total and differ by one at most."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def run(module):
    params = module.params
    if not re.match(r"https?://[^/\s]+(/\S*)?/v1/?\Z", params["base_url"]):
        raise Problem("base_url is %r: give the address up to and with /v1" % params["base_url"])
    for name in ("concurrency", "num_prompts", "processes", "input_len", "output_len"):
        if params[name] < 1:
            raise Problem("%s is %d: give 1 or more" % (name, params[name]))
    try:
        with open(params["api_key_file"]) as handle:
            key = handle.read().strip()
    except (IOError, OSError) as error:
        raise Problem("cannot read the API key from %s: %s" % (params["api_key_file"], error.strerror))
    if not key:
        raise Problem("%s is empty: it must hold the API key" % params["api_key_file"])
    module.no_log_values.add(key)
    tokenizer = params["tokenizer"] or served_from(params["base_url"].rstrip("/"), key, params["model"])
    processes = min(params["processes"], params["concurrency"])
    commands = [
        params["command"] + ["-c", LAUNCHER] + arguments(params, tokenizer, clients, prompts, params["seed"] + index)
        for index, (clients, prompts) in enumerate(
            zip(shares(params["concurrency"], processes), shares(params["num_prompts"], processes))
        )
    ]
    home = tempfile.mkdtemp(dir=module.tmpdir)
    environment = dict(os.environ, OPENAI_API_KEY=key, HOME=home, **ENVIRONMENT)
    try:
        with Utilization(params["gpus"]) as use:
            results = measure(commands, environment, params["timeout"])
        return to_row(params, results, use.percent)
    except (IOError, OSError) as error:
        raise Problem("cannot run %s: %s" % (params["command"][0], error.strerror))
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(
            "vllm bench serve wrote a result that is not understood (%r): give bench_python a newer vLLM" % error
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)


def main():
    module = AnsibleModule(
        argument_spec={
            "base_url": {"type": "str", "required": True},
            "api_key_file": {"type": "path", "required": True, "no_log": False},
            "model": {"type": "str", "required": True},
            "tokenizer": {"type": "str", "no_log": False},
            "command": {"type": "list", "elements": "str", "required": True},
            "task": {"type": "str", "choices": ["generate", "embed", "score"], "default": "generate"},
            "concurrency": {"type": "int", "required": True},
            "num_prompts": {"type": "int", "required": True},
            "processes": {"type": "int", "default": 1},
            "input_len": {"type": "int", "default": 512},
            "output_len": {"type": "int", "default": 128},
            "seed": {"type": "int", "default": 0},
            "extra_args": {"type": "list", "elements": "str", "default": []},
            "gpus": {"type": "list", "elements": "int", "default": []},
            "timeout": {"type": "int", "default": 1800},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, row={})
    try:
        module.exit_json(changed=False, row=run(module))
    except Problem as problem:
        module.fail_json(msg=str(problem))


if __name__ == "__main__":
    main()
