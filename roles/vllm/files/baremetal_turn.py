# SPDX-License-Identifier: GPL-3.0-or-later
"""Lets servers that share GPUs start one after the other, as after a boot.

    baremetal_turn.py URL SECONDS GPU...

vLLM takes what others allocate on its GPU while it loads for its own, and gets a smaller KV cache or none
(vllm-project/vllm#55827); where others release some meanwhile, it stops (vllm-project/vllm#56830). This waits until no
other server starts on these GPUs and returns; a child of it keeps others waiting until the server, which the process that
called this becomes, answers at URL or has ended. After SECONDS it starts all the same, since one that hangs must not keep
all others down.

A GPU's turn is a name that one process can have (abstract Unix socket): no files, and free when its holder ends.
"""

import errno
import os
import socket
import sys
import time
import urllib.error
import urllib.request


def started(pid):
    """When the process started, in the kernel's ticks; None once it has ended. Another one may get its number."""
    try:
        with open("/proc/%s/stat" % pid) as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def answers(url):
    # A proxy for the internet does not know this address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError, ValueError):
        return False


def take(gpu):
    """The turn on a GPU, or None while another one has it."""
    turn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        turn.bind("\0baremetal.vllm/gpu-" + gpu)
    except OSError as error:
        turn.close()
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return turn


def main(url, seconds, gpus):
    pid = os.getppid()
    mine, turns, told = started(pid), [], False
    last = time.monotonic() + float(seconds)
    for gpu in sorted(gpus):  # in one order for all, or two could wait for each other
        turn = take(gpu)
        while turn is None and started(pid) == mine:
            if time.monotonic() > last:
                print(
                    "baremetal: starts beside another server that has been starting on GPU %s for %s s" % (gpu, seconds)
                )
                break
            if not told:
                print("baremetal: waits until another server has started on GPU %s" % gpu, flush=True)
                told = True
            time.sleep(1)
            turn = take(gpu)
        turns.append(turn)
    if os.fork():
        return
    # Its log and its folder are the server's.
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    while started(pid) == mine and not answers(url):
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
