# SPDX-License-Identifier: GPL-3.0-or-later
"""Starts a command when a Ray cluster has what it needs, and says at once when it never will.

    RAY_ADDRESS=10.0.0.1:6379 baremetal_ray_gate.py --node gpu1=10.0.0.1=2 --node gpu2=10.0.0.2=2 -- COMMAND...

Each node has a name, an address and the number of GPUs that it must give. Without a command it says what the cluster is.

vLLM itself waits half an hour for a placement and then says little. Nodes that are missing are waited for (a host may be
rebooting); when all are there, what they have must do. Exit status 78 (EX_CONFIG), which the unit does not restart, stands
for a placement that cannot be met, 75 (EX_TEMPFAIL) for nodes that did not come.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import os
import sys
import time

NEVER, LATER = 78, 75
# How long what is used may take to be given back: the engines of the last start are being ended.
SETTLE_S = 60


def say(text):
    print("placement: " + text, flush=True)


def judge(nodes, expected):
    """(what is missing for now, what can never be) of a list of ``ray.nodes()``."""
    alive = {node["NodeManagerAddress"]: node.get("Resources", {}).get("GPU", 0) for node in nodes if node["Alive"]}
    missing = ["%s (%s)" % (name, address) for name, address, _ in expected if address not in alive]
    never = [
        "%s (%s) gives Ray %g GPUs and the plan places %d there" % (name, address, alive[address], gpus)
        for name, address, gpus in expected
        if alive.get(address, gpus) < gpus
    ]
    known = {address for _, address, _ in expected}
    never += [
        "%s is in the cluster with %g GPUs and not in the plan, so that engines could be placed there: stop its Ray node"
        % (address, gpus)
        for address, gpus in sorted(alive.items())
        if address not in known and gpus
    ]
    return missing, never


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
    parser.add_argument("--wait", type=float, default=600, help="seconds for nodes that are missing")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    expected = [(name, address, int(gpus)) for name, address, gpus in (node.split("=") for node in options.node)]
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    import ray

    try:
        ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        print("PlacementError: no Ray cluster at %s: %s" % (os.environ["RAY_ADDRESS"], error), flush=True)
        sys.exit(LATER)
    start, told = time.monotonic(), None
    while True:
        missing, never = judge(ray.nodes(), expected)
        if never:
            print("PlacementError: this placement can never be met: " + "; ".join(never), flush=True)
            sys.exit(NEVER)
        if not missing:
            break
        if missing != told:
            say("waiting for " + ", ".join(missing))
            told = missing
        if time.monotonic() - start > options.wait:
            print("PlacementError: not in the cluster after %d s: %s" % (options.wait, ", ".join(missing)), flush=True)
            sys.exit(LATER)
        time.sleep(1)
    start, need = time.monotonic(), sum(gpus for _, _, gpus in expected)
    while command and ray.available_resources().get("GPU", 0) < need:
        if time.monotonic() - start > SETTLE_S:
            from ray.util import placement_group_table

            free = ray.available_resources().get("GPU", 0)
            print("PlacementError: %d GPUs are needed and %g are free: the others are held by %s"
                  % (need, free, holders(placement_group_table())), flush=True)  # fmt: skip
            sys.exit(LATER)
        time.sleep(1)
    say("%d nodes with %d GPUs are here" % (len(expected), need))
    ray.shutdown()
    if command:
        os.execvp(command[0], command)  # noqa: S606 - in containers a name on the PATH


if __name__ == "__main__":
    main()
