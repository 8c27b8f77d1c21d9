#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""One model for many hosts: which way from host to host is the fastest, and how near the limit is it?

    tests/benchmarks/model_distribution.py                               the line with 1, 2, 4, 8 and 16 hosts
    tests/benchmarks/model_distribution.py --ways hub,line,tree,torrent --hosts 8
    tests/benchmarks/model_distribution.py --plot docs/images/model-distribution.svg results.json

Each host is a container, and each has a link of its own of so many Mbit/s in each direction (tc tbf on both ends of its veth
pair); so has the hub. The limit is the size divided by the bandwidth. What Ansible needs to start the work is not in it.

    line      as the role model does it: each takes the files from the one before it while that one gets them, over TLS
    hub       every host fetches from the hub
    tree      one host fetches, then rsync (its daemon, nothing encrypted) doubles the hosts that have it in each round
    torrent   aria2 on every host, local peer discovery, the hub as web seed of the first host

Root and Docker Engine are needed, and for tree and torrent an image with rsync and aria2 (--image); for the others that of the
molecule scenarios does. The load of the machine is given with each figure: what is meant to be measured is links.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "collections")]
FILES = 8
PORT, HUB_PORT = 18670, 8080
LABEL = "baremetal-model-benchmark"
REPO = "owner/big"

HUB = f"""
import sys, time
sys.path[:0] = ["/src/collections"]
from pathlib import Path
from ansible_collections.baremetal.vllm.tests.fakes.hub import Hub
hub = Hub({HUB_PORT}, "0.0.0.0")
hub.direct = True
hub.add({REPO!r}, Path("/model"))
with hub:
    print("ready", flush=True)
    time.sleep(100000)
"""
WORK = """
import json, sys
sys.path[:0] = ["/src/tests", "/src/collections"]
import model_jobs
job = json.load(sys.stdin)
status = model_jobs.work_here(job)
print(json.dumps({key: status[key] for key in ("state", "message", "hub_bytes", "peer_bytes", "notes")}))
"""


def call(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout.strip()


class Site:
    """A hub and hosts, each behind a link of its own."""

    def __init__(self, image: str, count: int, mbit: float, mtu: int, model: Path) -> None:
        self.mbit = mbit
        self.close()
        call("docker", "network", "create", "--label", LABEL, "--opt", f"com.docker.network.driver.mtu={mtu}", LABEL)
        self.hub = self.start(image, "hub", "-v", f"{model}:/model:ro")
        self.hosts = [self.start(image, f"host{number}") for number in range(count)]
        for weight, most in (("cpu/{}/cpu.shares", "262144"), ("{}/cpu.weight", "10000")):  # cgroups version 1 and 2
            path = Path("/sys/fs/cgroup", weight.format(LABEL))
            if path.exists():
                path.write_text(most)
        self.addresses = {name: self.address(name) for name in [self.hub, *self.hosts]}
        for name in self.addresses:
            self.limit(name)
        process = subprocess.Popen(
            ["docker", "exec", "-i", self.hub, "python3", "-c", HUB], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout and process.stdout.readline() == "ready\n"
        self.url = f"http://{self.addresses[self.hub]}:{HUB_PORT}"

    def start(self, image: str, name: str, *options: str) -> str:
        full = f"{LABEL}-{name}"
        # Before everything else that the machine may be doing: what is measured is links.
        parent = ["--cgroup-parent", f"/{LABEL}"]
        mounts = ["-v", f"{ROOT}:/src:ro", "--tmpfs", "/tmp:exec"]
        run = [
            "docker",
            "run",
            "-d",
            "--init",
            "--network",
            LABEL,
            "--label",
            LABEL,
            "--cap-add",
            "NET_ADMIN",
            "--name",
            full,
        ]
        call(*run, *parent, *mounts, *options, "--entrypoint", "sleep", image, "infinity")
        return full

    def address(self, name: str) -> str:
        return call("docker", "inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)

    def limit(self, name: str) -> None:
        """Both directions: what leaves the container, and what leaves this machine for it."""
        shape = ["root", "tbf", "rate", f"{self.mbit}mbit", "burst", "64kb", "latency", "100ms"]
        call("docker", "exec", name, "tc", "qdisc", "replace", "dev", "eth0", *shape)
        index = call("docker", "exec", name, "cat", "/sys/class/net/eth0/iflink")
        device = next(
            path.parent.name for path in Path("/sys/class/net").glob("*/ifindex") if path.read_text().strip() == index
        )
        call("tc", "qdisc", "replace", "dev", device, *shape)

    def sent(self, name: str) -> int:
        return int(call("docker", "exec", name, "cat", "/sys/class/net/eth0/statistics/tx_bytes"))

    def spawn(self, name: str, *command: str, text: str = "") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["docker", "exec", "-i", name, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin
        process.stdin.write(text)
        process.stdin.close()
        return process

    def cpu_s(self) -> float:
        """Processor time of all containers so far."""
        first, second = (
            Path("/sys/fs/cgroup", name.format(LABEL)) for name in ("cpuacct/{}/cpuacct.usage", "{}/cpu.stat")
        )
        return int(first.read_text()) / 1e9 if first.exists() else int(second.read_text().split()[1]) / 1e6

    def clean(self) -> None:
        for name in self.hosts:
            call("docker", "exec", name, "sh", "-c", "pkill aria2c; pkill rsync; rm -rf /tmp/*; true")

    def close(self) -> None:
        names = call("docker", "ps", "-aq", "--filter", f"label={LABEL}").split()
        if names:
            call("docker", "rm", "-f", *names)
        subprocess.run(["docker", "network", "rm", LABEL], capture_output=True, check=False)


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = []
    for process in processes:
        assert process.stdout and process.stderr
        output, errors = process.stdout.read(), process.stderr.read()
        if process.wait():
            raise SystemExit(f"a host failed: {output}{errors}")
        outputs.append(output)
    return outputs


def fetch(site: Site, hosts: list[str], model: Any, line: bool) -> list[Any]:
    """Every host at once, as model_fetch does it."""
    import model_jobs

    from ansible_collections.baremetal.vllm.plugins.filter.model_transfers import model_transfers
    from ansible_collections.baremetal.vllm.plugins.filter.peer_certificate import peer_certificate

    credentials = peer_certificate("benchmark")
    there = [
        {"name": host, "address": site.addresses[host], "port": PORT, "models": [{**model, "problem": ""}]}
        for host in hosts
    ]
    (transfer,) = model_transfers(there, share=line)
    processes = []
    for host in hosts:
        route = {key: value for key, value in transfer["hosts"][host].items() if key != "model"}
        peers = {**credentials, **route, "name": host} if line else {}
        job = model_jobs.make_job(model, Path("/tmp/models"), site.url, jobs=4, timeout=30, backoff=0.5, peers=peers)
        processes.append(site.spawn(host, "python3", "-c", WORK, text=json.dumps(job)))
    results = [json.loads(output) for output in finish(processes)]
    assert all(result["state"] == "done" for result in results), results
    return results


def tree(site: Site, hosts: list[str], model: Any) -> None:
    fetch(site, hosts[:1], model, line=False)
    configuration = "[models]\npath=/tmp/models\nuid=root\ngid=root\nuse chroot=no\n"
    for host in hosts:
        call(
            "docker", "exec", "-i", host, "sh", "-c",
            "mkdir -p /tmp/models; cat > /tmp/rsyncd.conf; rsync --daemon --config=/tmp/rsyncd.conf", text=configuration,
        )  # fmt: skip
    have, need = hosts[:1], hosts[1:]
    while need:
        pairs = list(zip(have, need, strict=False))
        copy = ["rsync", "-a", "--inplace", "--partial", "--whole-file"]
        finish([site.spawn(new, *copy, f"rsync://{site.addresses[old]}/models/", "/tmp/models/") for old, new in pairs])
        have, need = have + need[: len(pairs)], need[len(pairs) :]


def bencode(value: Any) -> bytes:
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, (bytes, str)):
        data = value.encode() if isinstance(value, str) else value
        return b"%d:%s" % (len(data), data)
    if isinstance(value, list):
        return b"l" + b"".join(map(bencode, value)) + b"e"
    return b"d" + b"".join(bencode(key) + bencode(value[key]) for key in sorted(value)) + b"e"


def torrent(site: Site, hosts: list[str], model: Any, folder: Path) -> None:
    piece = 1024 * 1024
    names = [entry["path"] for entry in model["files"]]
    data = b"".join((folder / name).read_bytes() for name in names)
    pieces = b"".join(hashlib.sha1(data[start : start + piece]).digest() for start in range(0, len(data), piece))
    files = [{"length": entry["size"], "path": [entry["path"]]} for entry in model["files"]]
    info = {"name": "main", "piece length": piece, "pieces": pieces, "files": files}
    processes = []
    for number, host in enumerate(hosts):
        # A web seed's address is followed by the torrent's name and the file's path.
        seeds = {"url-list": [f"{site.url}/{REPO}/resolve/"]} if number == 0 else {}
        body = bencode({"info": info, **seeds})
        subprocess.run(["docker", "exec", "-i", host, "sh", "-c", "cat > /tmp/m.torrent"], input=body, check=True)
        options = [
            "--dir=/tmp/models",
            "--bt-enable-lpd=true",
            "--enable-dht=false",
            "--seed-time=0.01",
            "--seed-ratio=0",
        ]
        options += [
            "--bt-require-crypto=true",
            "--bt-min-crypto-level=arc4",
            "--file-allocation=none",
            "--summary-interval=0",
        ]
        options += ["--max-upload-limit=0", "--quiet=true", "--bt-max-peers=16", "--bt-request-peer-speed-limit=100M"]
        # aria2 keeps its control file while it seeds; the hook tells when all is there.
        hook = "printf '#!/bin/sh\\ntouch /tmp/done\\n' > /tmp/hook; chmod +x /tmp/hook"
        call = f"aria2c {' '.join(options)} --seed-time=60 --on-bt-download-complete=/tmp/hook /tmp/m.torrent"
        wait = f"{hook}; {call} & while [ ! -e /tmp/done ]; do sleep 0.1; done"
        processes.append(site.spawn(host, "sh", "-c", wait))
    for process in processes:
        process.wait()


def measure(way: str, site: Site, hosts: list[str], model: Any, folder: Path) -> dict[str, Any]:
    site.clean()
    size = sum(entry["size"] for entry in model["files"])
    load, before, started = os.getloadavg()[0], site.sent(site.hub), time.monotonic()
    cpu = site.cpu_s()
    if way == "tree":
        tree(site, hosts, model)
    elif way == "torrent":
        torrent(site, hosts, model, folder)
    else:
        fetch(site, hosts, model, line=way == "line")
    elapsed = time.monotonic() - started
    limit = size * 8 / (site.mbit * 1e6)
    result = {
        "way": way,
        "hosts": len(hosts),
        "seconds": round(elapsed, 1),
        "limit_s": round(limit, 1),
        "ratio": round(elapsed / limit, 2),
        "hub_models": round((site.sent(site.hub) - before) / size, 2),
        "mib": round(size / 2**20),
        "cpu_s": round(site.cpu_s() - cpu, 1),
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
    }
    print(
        f"{way:8} {len(hosts):3} hosts {elapsed:7.1f} s = {result['ratio']:5.2f} x the limit of {limit:.1f} s, "
        f"the hub sent {result['hub_models']:.2f} x the model, load {load:.1f} to {result['load'][1]:.1f}, "
        f"{result['cpu_s']} s of processor time",
        flush=True,
    )
    return result


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Ratio to the limit over the number of hosts, as SVG by hand: one picture is no reason for a library."""
    width, height, left, bottom = 560, 330, 60, 50
    names = {
        "hub": "all from the hub",
        "tree": "rsync, doubling tree",
        "torrent": "BitTorrent (aria2)",
        "line": "line (the role)",
    }
    colours = {"hub": "#888888", "tree": "#c77d0a", "torrent": "#7a4fbf", "line": "#1769aa"}
    most, top = max(result["hosts"] for result in results), max(result["ratio"] for result in results) * 1.1

    def x(hosts: float) -> float:
        return left + (width - left - 150) * (hosts / most)

    def y(ratio: float) -> float:
        return height - bottom - (height - bottom - 20) * (ratio / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{x(0)} 20V{y(0)}H{x(most)}" fill="none" stroke="#333"/>',
        f'<path d="M{x(0)} {y(1)}H{x(most)}" stroke="#333" stroke-dasharray="4"/>',
        f'<text x="{x(most) + 6}" y="{y(1) + 14}" fill="#333">limit</text>',
        f'<text x="{x(most / 2)}" y="{height - 12}" text-anchor="middle">hosts</text>',
        f'<text transform="translate(16 {y(top / 2)}) rotate(-90)" text-anchor="middle">time / (size / bandwidth)</text>',
    ]
    for hosts in sorted({result["hosts"] for result in results}):
        parts.append(f'<text x="{x(hosts)}" y="{y(0) + 18}" text-anchor="middle">{hosts}</text>')
    for tick in range(0, int(top) + 1, max(1, int(top / 6))):
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{tick}</text>')
    for way in ("hub", "tree", "torrent", "line"):
        points = sorted((result["hosts"], result["ratio"]) for result in results if result["way"] == way)
        if points:
            parts.append(
                f'<polyline fill="none" stroke="{colours[way]}" stroke-width="2" '
                f'points="{" ".join(f"{x(hosts):.1f},{y(ratio):.1f}" for hosts, ratio in points)}"/>'
            )
            parts += [f'<circle cx="{x(h):.1f}" cy="{y(r):.1f}" r="3" fill="{colours[way]}"/>' for h, r in points]
            hosts, ratio = points[-1]
            parts.append(
                f'<text x="{x(hosts) + 6:.1f}" y="{y(ratio) + 4:.1f}" fill="{colours[way]}">{names[way]}</text>'
            )
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", help="default: debian12 of molecule/images")
    parser.add_argument("--ways", default="line")
    parser.add_argument("--hosts", default="1,2,4,8,16")
    parser.add_argument("--mbit", type=float, default=100)
    parser.add_argument(
        "--mtu", type=int, default=9000, help="larger packets: this machine's kernel plays all the switches"
    )
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("results", nargs="?", type=Path, help="JSON that results are added to")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results and arguments.results.exists() else []
    if arguments.plot:
        plot(results, arguments.plot)
        return
    import random
    import tempfile

    import model_jobs

    counts = [int(text) for text in arguments.hosts.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text("{}")
        for number in range(FILES):
            part = random.Random(number).randbytes(arguments.mib * 1024 * 1024 // FILES)
            (folder / f"model-{number + 1:05}-of-{FILES:05}.safetensors").write_bytes(part)
        folder.chmod(0o755)
        image = arguments.image or call(str(ROOT / "molecule/images/build.sh"), "debian12").splitlines()[-1]
        site = Site(image, max(counts), arguments.mbit, arguments.mtu, folder)
        try:
            model = model_jobs.read_model(REPO, site.url)
            for way in arguments.ways.split(","):
                for count in counts:
                    results.append(measure(way, site, site.hosts[:count], model, folder))
        finally:
            site.close()
    if arguments.results:
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
