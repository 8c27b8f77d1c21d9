# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets several hosts compute a sum with the library that vLLM's engines use, with a time limit.

    baremetal_allreduce.py --rank 0 --peer gpu1=10.0.0.1 --peer gpu2=10.0.0.2 --port 29601 --backend nccl --timeout 60

The same command runs on all hosts at about the same time, each with its rank. Prints one JSON object: ``ms`` (the median of
an all-reduce of 1 MiB) and ``mbps`` (all-reduce of 64 MiB, data of one rank by time), or ``whole``, what is wrong with the sum
of all. Then pairs are tried, so that the one that hangs has a name: ``problems``, one line a pair, each said by one of the two.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import contextlib
import json
import re
import subprocess
import sys
import time

SMALL, LARGE, TIMES = 1 << 18, 1 << 24, 5  # numbers of float32
# Parts of the time limit: the sum of all, and then each round of sums of two. A process that hangs is ended KILL_S later.
ALL_PART, PAIR_PART, KILL_S = 0.3, 1 / 6, 2
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
        output, _ = process.communicate(timeout=limit_s + KILL_S)
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


def rounds(world):
    """Pairs of ranks, in rounds in which nobody is in two: all pairs of up to four hosts, neighbours of more."""
    if world > 4:
        return [[(rank, rank + 1) for rank in range(first, world - 1, 2)] for first in (0, 1)]
    pairs = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]
    return [[pair for pair in round_ if max(pair) < world] for round_ in pairs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help="internal")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--peer", action="append", metavar="NAME=ADDRESS")
    parser.add_argument("--port", type=int)
    parser.add_argument("--backend", choices=["gloo", "nccl"])
    parser.add_argument("--timeout", type=int, default=60, help="seconds until a sum that hangs is found and named")
    parser.add_argument("--load", action="store_true", help="only load the library, which takes long from a cold disk")
    options = parser.parse_args()
    if options.load:
        import torch.distributed  # noqa: F401

        return
    if options.child:
        compute(*json.loads(options.child))
        return
    peers = [peer.split("=", 1) for peer in options.peer]
    start, all_limit, pair_limit = time.monotonic(), options.timeout * ALL_PART, options.timeout * PAIR_PART
    figures, wrong = attempt(options.rank, len(peers), peers[0][1], options.port, options, all_limit)
    said = "%s cannot compute together (%s over their interconnect): %s"
    problems = []
    if wrong and len(peers) == 2 and options.rank == 0:
        problems = [said % (" and ".join(name for name, _ in peers), options.backend, wrong)]
    elif wrong and len(peers) > 2:
        # All hosts begin a round at the same time, whatever the one before took them.
        for number, round_ in enumerate(rounds(len(peers))):
            time.sleep(max(0, start + all_limit + KILL_S + number * (pair_limit + KILL_S) - time.monotonic()))
            for first, second in round_:
                if options.rank in (first, second):
                    problem = attempt(
                        int(options.rank == second), 2, peers[first][1], options.port, options, pair_limit
                    )[1]
                    if problem and options.rank == first:  # one line for each pair
                        names = "%s and %s" % (peers[first][0], peers[second][0])
                        problems.append(said % (names, options.backend, problem))
    whole = "%d hosts cannot compute a sum together: %s" % (len(peers), wrong) if wrong else ""
    print(json.dumps({"problems": problems, "whole": whole, **figures}))


if __name__ == "__main__":
    main()
