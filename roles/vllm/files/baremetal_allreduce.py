# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets several hosts compute a sum with the library that vLLM's engines use, with a time limit.

    baremetal_allreduce.py --rank 0 --peer gpu1=10.0.0.1 --peer gpu2=10.0.0.2 --port 29601 --backend nccl --timeout 60

The same command runs on all hosts at about the same time, each with its rank. Prints one JSON object: ``problems`` (one line
each), ``ms`` (the median of an all-reduce of 1 MiB) and ``mbps`` (all-reduce of 64 MiB, data of one rank by time). Where all
hosts together fail, pairs of them are tried, so that the one that hangs has a name.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
import time

SMALL, LARGE, TIMES = 1 << 18, 1 << 24, 5  # numbers of float32
PAIR_LIMIT_S = 20
CAUSE = re.compile(r"(?:[\w.]+(?:Error|Exception|Interrupt)|NCCL WARN)\S*:? ?\S.*")


def compute(rank, world, address, port, backend, timeout_s):
    """One rank of one sum, in a process of its own."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, "tcp://%s:%d" % (address, port), limit, world, rank)

    def measure(numbers):
        data = torch.full((numbers,), float(rank + 1), device=device)
        start = time.monotonic()
        dist.all_reduce(data)
        if backend == "nccl":
            torch.cuda.synchronize()
        seconds = time.monotonic() - start
        if data[-1].item() != world * (world + 1) / 2:
            raise ValueError("the sum is wrong: %r" % data[-1].item())
        return seconds

    measure(SMALL)  # the first one makes the connections
    times = sorted(measure(SMALL) for _ in range(TIMES))
    large = measure(LARGE)
    print(json.dumps({"ms": round(times[TIMES // 2] * 1000, 2), "mbps": int(LARGE * 32 / large / 1e6)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def attempt(rank, world, address, port, options, limit_s):
    """(figures, what went wrong)."""
    command = [sys.executable, __file__, "--child", json.dumps([rank, world, address, port, options.backend, limit_s])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = process.communicate(timeout=limit_s + 15)  # torch itself takes some of it
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {}, "no sum within %d s" % limit_s
    text = output.decode("utf-8", "replace")
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and process.returncode == 0:
                return found, ""
    causes = [match.group(0) for match in map(CAUSE.search, text.splitlines()) if match]
    lines = [line for line in text.splitlines() if line.strip()]
    return {}, (causes or lines or ["status %d" % process.returncode])[-1][:300]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help="internal")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--peer", action="append", metavar="NAME=ADDRESS")
    parser.add_argument("--port", type=int)
    parser.add_argument("--backend", choices=["gloo", "nccl"])
    parser.add_argument("--timeout", type=int, default=60)
    options = parser.parse_args()
    if options.child:
        compute(*json.loads(options.child))
        return
    peers = [peer.split("=", 1) for peer in options.peer]
    figures, wrong = attempt(options.rank, len(peers), peers[0][1], options.port, options, options.timeout)
    problems = []
    if wrong:
        start = time.time()
        pairs = list(itertools.combinations(range(len(peers)), 2))
        pairs = pairs if len(pairs) <= 6 else [(rank, rank + 1) for rank in range(len(peers) - 1)]
        failed = []
        for first, second in pairs:
            if options.rank in (first, second):
                limit = PAIR_LIMIT_S
                problem = attempt(options.rank - first and 1, 2, peers[first][1], options.port, options, limit)[1]
                if problem:
                    failed.append("%s and %s cannot compute together (%s over their interconnect): %s"
                                  % (peers[first][0], peers[second][0], options.backend, problem))  # fmt: skip
        if failed:
            problems = failed
        elif options.rank == 0 or time.time() - start < 1:
            problems = ["%s: %d hosts cannot compute a sum together: %s" % (peers[options.rank][0], len(peers), wrong)]
    print(json.dumps({"problems": problems, **figures}))


if __name__ == "__main__":
    main()
