# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets several hosts compute a sum with the library that vLLM's engines use, with a time limit.

    baremetal_allreduce.py --rank 0 --peer gpu1=10.0.0.1 --peer gpu2=10.0.0.2 --port 29602 --backend nccl --timeout 60

The same command runs on all hosts, each with its rank. They meet first: who is started later, or loads the library more slowly,
takes no time from the sum. Prints one JSON object: ``ms`` (the median of an all-reduce of 1 MiB) and ``mbps`` (all-reduce of
64 MiB, data of one rank by time), or ``whole``, what is wrong with the sum of all, and ``problems``. Those are hosts that did
not come; where all have met, pairs are tried, so that the one that hangs has a name: one line a pair, said by one of the two.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import contextlib
import json
import re
import subprocess
import sys
import threading
import time

SMALL, LARGE, TIMES = 1 << 18, 1 << 24, 5  # numbers of float32
# Parts of the time limit, once all have met: the sum of all, and then each round of sums of two, which load the library again.
# A process that hangs is ended KILL_S later.
ALL_PART, PAIR_PART, KILL_S = 0.25, 0.2, 2
MET = "all have met"
CAUSE = re.compile(r"(?:[\w.]+(?:Error|Exception|Interrupt)|NCCL WARN)\S*:? ?\S.*")


def compute(rank, world, address, port, backend, timeout_s, meet_until):
    """One rank of one sum, in a process of its own. ``meet_until``: of the monotonic clock, which processes of a host share."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")

    def left():
        return timedelta(seconds=max(1, meet_until - time.monotonic()))

    store = dist.TCPStore(address, port, world, rank == 0, left(), wait_for_workers=False)
    keys = ["rank%d" % other for other in range(world)]
    store.set(keys[rank], "here")
    try:
        store.wait(keys, left())
    except RuntimeError:
        # Rank 0, which keeps the list, says who is away; it may have ended by now.
        away = [other for other in range(world) if not store.check([keys[other]])] if rank == 0 else []
        print(json.dumps({"away": away}), flush=True)
        return
    print(MET, flush=True)
    dist.init_process_group(backend, store=store, timeout=limit, world_size=world, rank=rank)

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


def attempt(rank, world, address, port, options, limit_s, meet_until, end=float("inf")):
    """(figures, what went wrong, ranks that did not come or None where it is something else, when all had met)."""
    words = [rank, world, address, port, options.backend, limit_s, meet_until]
    command = [sys.executable, __file__, "--child", json.dumps(words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end_after(seconds):
        timer = threading.Timer(max(0, seconds) + KILL_S, process.kill)
        timer.daemon = True
        timer.start()
        return timer

    timer, met, lines, found = end_after(meet_until - time.monotonic()), None, [], {}
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace").strip()
        if line == MET:
            timer.cancel()
            met = time.monotonic()
            timer = end_after(min(limit_s, end - met))
        elif line:
            lines.append(line)
    status = process.wait()
    timer.cancel()
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and "away" in found:
                return {}, "not all have come", found["away"], met
            if isinstance(found, dict) and status == 0:
                return found, "", None, met
    causes = [match.group(0) for match in map(CAUSE.search, lines) if match]
    if status == -9 and not causes:
        return {}, "no sum within %d s" % limit_s if met else "the library was not loaded in time", None, met
    return {}, (causes or lines or ["status %d" % status])[-1][:300], None, met


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
    names, rank = [name for name, _ in peers], options.rank
    where = "%s port %d" % (peers[0][1], options.port)
    figures, wrong, away, met = attempt(
        rank, len(peers), peers[0][1], options.port, options, all_limit, start + options.timeout
    )
    said = "%s cannot compute together (%s over their interconnect): %s"
    problems = []
    if wrong and met is None:
        came = "%s did not come to %s (%s) within %d s: a firewall closes that port, or its library loads too slowly"
        problems = [came % (names[other], names[0], where, options.timeout) for other in away or ()]
        if away is None:
            problems = ["%s cannot begin a sum at %s (%s): %s" % (names[rank], names[0], where, wrong)]
    elif wrong and len(peers) == 2 and rank == 0:
        problems = [said % (" and ".join(names), options.backend, wrong)]
    elif wrong and len(peers) > 2:
        # All hosts begin a round at the same time, counted from when they met, whatever the one before took them.
        for number, round_ in enumerate(rounds(len(peers))):
            begin = met + all_limit + KILL_S + number * (pair_limit + KILL_S)
            time.sleep(max(0, begin - time.monotonic()))
            for first, second in round_:
                if rank in (first, second):
                    end, place = begin + pair_limit, peers[first][1]
                    problem = attempt(int(rank == second), 2, place, options.port, options, pair_limit, end, end)[1]
                    if problem and rank == first:  # one line for each pair
                        pair = "%s and %s" % (names[first], names[second])
                        problems.append(said % (pair, options.backend, problem))
    whole = "%d hosts cannot compute a sum together: %s" % (len(peers), wrong) if wrong else ""
    print(json.dumps({"problems": problems, "whole": whole, **figures}))


if __name__ == "__main__":
    main()
