# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for vLLM's API server, to test how servers are started, watched and replaced. It serves no model.

Like the real one it refuses flags that it does not know, claims its port without sharing it, listens only when it is
ready, wants the key of VLLM_API_KEY, logs the lines that vLLM 0.25 logs, and ends its requests before it ends on SIGTERM.
STANDIN_START_S is how long a start takes; STANDIN_FAIL names a file of tests/unit/plugins/modules/captures that it prints
before it fails, which gives what a real one prints.

With --distributed-executor-backend ray it places as many actors as there would be engines in the Ray cluster of RAY_ADDRESS,
with a GPU each, tells of their hosts in /v1/models, and ends when one of them does.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

engines: list[list[str]] = []
BEGIN = """INFO 11-21 02:32:24 [api_utils.py:286] non-default args: {'port': %d}
(EngineCore pid=77) INFO 11-21 02:32:25 [core.py:115] Initializing a V1 LLM engine (v0.25.1) with config: model='m'
(EngineCore pid=77) INFO 11-21 02:32:26 [gpu_model_runner.py:5210] Starting to load model m..."""
END = """(EngineCore pid=77) INFO 11-21 02:32:27 [gpu_model_runner.py:5307] Model loading took 0.5 GiB memory and 0.1 seconds
(EngineCore pid=77) INFO 11-21 02:32:27 [gpu_worker.py:539] Available KV cache memory: 1.0 GiB
(EngineCore pid=77) INFO 11-21 02:32:27 [kv_cache_utils.py:2146] GPU KV cache size: 131,072 tokens
(EngineCore pid=77) INFO 11-21 02:32:27 [kv_cache_utils.py:2148] Maximum concurrency for 2,048 tokens per request: 64.00x
INFO 11-21 02:32:28 [api_server.py:697] Starting vLLM API server 0 on http://127.0.0.1:%d"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("model", "served-model-name", "dtype", "host", "middleware", "max-model-len", "max-num-seqs"):
        parser.add_argument(f"--{flag}")
    for flag in ("distributed-executor-backend", "gpu-memory-utilization"):
        parser.add_argument(f"--{flag}")
    for flag in ("tensor-parallel-size", "pipeline-parallel-size"):
        parser.add_argument(f"--{flag}", type=int, default=1)
    for flag in ("port", "max-num-batched-tokens", "shutdown-timeout"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--enforce-eager", action="store_true")
    return parser.parse_args()


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        # Old and new server share the port: who keeps a connection would never see the other.
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {})
        elif self.path != "/v1/models":
            self.answer(404, {})
        elif self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, {})
        else:
            told = {"id": options.served_model_name, "pid": os.getpid(), "marker": os.environ.get("MARKER", "")}
            told["engines"] = engines
            self.answer(200, {"data": [told]})

    def log_message(self, format: str, *values: object) -> None:
        pass


def place_engines(number: int) -> Callable[[], None]:
    """Fills `engines` with the node of each and ends this process when one of them ends. Returns what gives them back."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
    group = placement_group([{"GPU": 1}] * number, strategy="PACK")
    ray.get(group.ready(), timeout=120)

    class Engine:
        def where(self) -> list[str]:
            return [ray.util.get_node_ip_address(), os.environ.get("VLLM_HOST_IP", "")]

    remote = ray.remote(num_gpus=1, num_cpus=0)(Engine)
    actors = [
        remote.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle)).remote()
        for bundle in range(number)
    ]
    engines.extend(ray.get([actor.where.remote() for actor in actors], timeout=120))

    leaving = threading.Event()

    def watch() -> None:
        while not leaving.wait(1):
            try:
                ray.get([actor.where.remote() for actor in actors], timeout=20)
            except Exception as error:
                print(f"vllm.v1.engine.exceptions.EngineDeadError: {type(error).__name__}", flush=True)
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()

    def give_back() -> None:
        # A call after ray.shutdown() would connect anew, with a job that nobody ends.
        leaving.set()
        watcher.join()
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
        ray.shutdown()

    return give_back


def main() -> None:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((options.host, options.port))
    print(BEGIN % options.port, flush=True)
    time.sleep(float(os.environ.get("STANDIN_START_S", "1")))
    if failure := os.environ.get("STANDIN_FAIL"):
        print(Path(failure).read_text(), flush=True)
        sys.exit(1)
    give_back: Callable[[], None] = lambda: None  # noqa: E731
    if options.distributed_executor_backend == "ray":
        give_back = place_engines(options.tensor_parallel_size * options.pipeline_parallel_size)
    print(END % options.port, flush=True)
    server = ThreadingHTTPServer((options.host, options.port), Requests, bind_and_activate=False)
    server.socket.close()
    server.socket = bound
    server.server_activate()
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(0.1)
    server.server_close()
    give_back()


if __name__ == "__main__":
    options = arguments()
    main()
