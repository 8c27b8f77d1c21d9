# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts a command when a Ray cluster has what it needs, and says at once when it never will.

    RAY_ADDRESS=10.0.0.1:6379 baremetal_ray_gate.py --node gpu1=10.0.0.1=2 --node gpu2=10.0.0.2=2 -- COMMAND...

Each node has a name, an address and the number of GPUs that it must give. Without a command it says what the cluster is.

vLLM itself waits half an hour for a placement and then says little. Nodes that are missing are waited for (a host may be
rebooting), and before a command also that nodes leave which are not in the plan (a host that was taken out while it was off
comes back with its old node); when all is so, what the nodes have must do. Exit status 78 (EX_CONFIG), which the unit does
not restart, stands for a placement that cannot be met, 75 (EX_TEMPFAIL) for what did not come within the time given.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import os
import socket
import sys
import time

NEVER, LATER = 78, 75
# How long what is used may take to be given back: the engines of the last start are being ended.
SETTLE_S = 60


def say(text):
    print("placement: " + text, flush=True)


def end(status, text):
    print("PlacementError: " + text, flush=True)
    sys.exit(status)


class Wait:
    """For something that is away, as long as it takes or for so many seconds. What it is, is said when it changes."""

    def __init__(self, limit_s):
        self.start, self.limit_s, self.told = time.monotonic(), limit_s, ""

    def go_on(self, text, late):
        if text != self.told:
            say("waiting" + text)
        self.told = text
        if self.limit_s and time.monotonic() - self.start > self.limit_s:
            end(LATER, late)
        time.sleep(1)


def judge(nodes, expected):
    """(nodes that are missing, nodes that should not be there, what can never be) of a list of ``ray.nodes()``."""
    alive = {node["NodeManagerAddress"]: node.get("Resources", {}).get("GPU", 0) for node in nodes if node["Alive"]}
    missing = ["%s (%s)" % (name, address) for name, address, _ in expected if address not in alive]
    never = [
        "%s (%s) gives Ray %g GPUs and the plan places %d there" % (name, address, alive[address], gpus)
        for name, address, gpus in expected
        if alive.get(address, gpus) < gpus
    ]
    known = {address for _, address, _ in expected}
    strangers = [
        "%s is in the cluster with %g GPUs and not in the plan, so that engines could be placed there: stop its Ray node"
        % (address, gpus)
        for address, gpus in sorted(alive.items())
        if address not in known and gpus
    ]
    return missing, strangers, never


def holders(table):
    """Who holds GPUs, of ``ray.util.placement_group_table()`` (`ray list` needs the dashboard, which is off)."""
    rows = [
        (key[:12], row["state"], sum(bundle.get("GPU", 0) for bundle in row["bundles"].values()))
        for key, row in sorted(table.items())
        if row["state"] != "REMOVED"
    ]
    told = ["placement group %s (%s) with %g GPUs" % row for row in rows if row[2]]
    return ", ".join(told) or "no placement group, so tasks or actors of another program"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node", action="append", required=True, metavar="NAME=ADDRESS=GPUS")
    parser.add_argument("--wait", type=float, default=0, help="seconds for what is missing; 0: as long as it takes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    expected = [(name, address, int(gpus)) for name, address, gpus in (node.split("=") for node in options.node)]
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    import ray

    wait, address = Wait(options.wait), os.environ["RAY_ADDRESS"]
    while True:
        try:
            # Ray itself tries for minutes and says little of it.
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), 5).close()
            ray.init(address=address, logging_level="ERROR", log_to_driver=False)
            break
        except (OSError, RuntimeError) as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
            ray.shutdown()
            wait.go_on(
                " for the Ray cluster at %s: %s" % (address, problem),
                "no Ray cluster at %s after %d s: %s" % (address, options.wait, problem),
            )
    need, busy_since, strange_since = sum(gpus for _, _, gpus in expected), None, None
    while True:
        # Anew each time: a node that is cut off looks alive for half a minute, with GPUs that nobody gives back.
        missing, strangers, never = judge(ray.nodes(), expected)
        # A look ends over a node that somebody has to stop, but not while it may be one that was switched off just now.
        strange_since = (strange_since or time.monotonic()) if strangers and not command else None
        known = strange_since and time.monotonic() - strange_since >= min(options.wait or SETTLE_S, SETTLE_S)
        if never or known:
            end(NEVER, "this placement can never be met: " + "; ".join(never + strangers))
        if missing or strangers:
            busy_since = None
        if missing:
            told = ", ".join(missing)
            wait.go_on(" for " + told, "not in the cluster after %d s: %s" % (options.wait, told))
            continue
        if strangers:
            told = "; ".join(strangers)
            wait.go_on(", since " + told, told)
            continue
        free = ray.available_resources().get("GPU", 0) if command else need
        if free >= need:
            break
        busy_since = busy_since or time.monotonic()
        if time.monotonic() - busy_since > SETTLE_S:
            from ray.util import placement_group_table

            held = holders(placement_group_table())
            end(LATER, "%d GPUs are needed and %g are free: the others are held by %s" % (need, free, held))
        time.sleep(1)
    say("%d node%s with %d GPUs are here" % (len(expected), "s" if len(expected) > 1 else "", need))
    ray.shutdown()
    if command:
        os.execvp(command[0], command)  # noqa: S606 - in containers a name on the PATH


if __name__ == "__main__":
    main()
