# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Ray cluster over containers, through its life. The tests run in the order in which they stand.

No GPU: each node is told to count two, which is all that Ray's scheduler knows of them.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from conftest import RAY_PYTHON as PYTHON
from fleet import ROOT, Fleet, until

PLAY = ROOT / "tests/cluster/ray.yml"
# Places one task with two GPUs on each node and prints, by address of the node, what it sees there.
WORK = """
import json, os, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
group = placement_group([{"GPU": 2, "CPU": 1}] * int(sys.argv[1]), strategy="STRICT_SPREAD")
ray.get(group.ready(), timeout=60)
@ray.remote(num_gpus=2, num_cpus=1)
def here():
    return ray.util.get_node_ip_address(), {"host": os.uname().nodename, "word": os.environ.get("WORD")}
where = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(int(sys.argv[1]))]
print(json.dumps(dict(ray.get([here.options(scheduling_strategy=one).remote() for one in where], timeout=60))))
"""


class Cluster:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.hosts = fleet, fleet.names[:3]

    @property
    def head(self) -> str:
        return self.hosts[0]

    def settings(self) -> dict[str, Any]:
        return {
            "ray_cluster_network": f"10.{self.fleet.number}.1.0/24",
            "ray_cluster_num_gpus": 2,
            "ray_cluster_num_cpus": 2,
            "ray_cluster_object_store_mib": 128,
            "ray_cluster_environment": {"WORD": "{{ inventory_hostname }}"},
        }

    def play(self, *words: str, **variables: Any) -> tuple[str, dict[str, int]]:
        return self.fleet.play(PLAY, self.hosts, *words, **{**self.settings(), **variables})

    def on_head(self, command: str, check: bool = True) -> str:
        address = f"{self.fleet.address(self.head)}:6379"
        script = f"set -a; . /etc/ray/default/env; cd /tmp; RAY_ADDRESS={address} {command}"
        return self.fleet.sh(self.head, f'runuser -u ray -- sh -c "{script}"', check=check)

    def status(self) -> str:
        return self.on_head(f"timeout 30 {PYTHON} -m ray.scripts.scripts status", check=False)

    def nodes(self) -> int:
        """Active nodes, as `ray status` counts them."""
        active = self.status().partition("Active:")[2].partition("Pending:")[0]
        return active.count("node_")

    def work(self) -> dict[str, Any]:
        self.fleet.sh(self.head, f"cat > /opt/ray/work.py <<'END'\n{WORK}\nEND")
        out = self.on_head(f"timeout 120 {PYTHON} /opt/ray/work.py {len(self.hosts)}")
        return dict(json.loads(out.splitlines()[-1]))

    def processes(self) -> dict[str, str]:
        """By host the process that the node was started as."""
        return {host: self.fleet.sh(host, "systemctl show --property=MainPID ray-default") for host in self.hosts}

    def works_everywhere(self) -> None:
        expected = {self.fleet.address(host): {"host": host, "word": host} for host in self.hosts}
        assert self.work() == expected


@pytest.fixture(scope="module")
def cluster(ray_fleet: Fleet) -> Cluster:
    return Cluster(ray_fleet)


def told(seconds: float, what: str) -> None:
    print(json.dumps({"figure": what, "seconds": round(seconds, 1)}))


def test_hosts_that_do_not_agree_are_named_before_anything_is_changed(cluster: Cluster) -> None:
    one, two, three = cluster.hosts
    python = "/usr/local/bin/standin-python"
    for host in cluster.hosts:
        said = "2.60.0 3.11.9" if host == three else "2.60.0 3.11.2"
        cluster.fleet.sh(host, f"printf '#!/bin/sh\\necho {said}\\n' >{python}; chmod +x {python}")
    faults: list[tuple[dict[str, Any], str]] = [
        (
            {two: {"ray_cluster_head": two}},
            f"two heads in one cluster ({one}, {three}: {one}; {two}: {two}): set ray_cluster_head",
        ),
        ({two: {"ray_cluster_version": "2.59.0"}}, "different releases of Ray in one cluster"),
        ({two: {"ray_cluster_interface": "ib0"}}, f"{two} has no interface ib0 that is up"),
        (
            {host: {"ray_cluster_python": python} for host in cluster.hosts},
            f"Python is 3.11.9 here and 3.11.2 on {one}: Ray takes only nodes of the same one, to the last digit",
        ),
        ({three: {"ray_cluster_python": "/usr/bin/false"}}, "/usr/bin/false has no Ray, and the cluster is Ray 2.60.0"),
    ]
    for each, line in faults:
        output, changed = cluster.fleet.play(PLAY, cluster.hosts, fail=True, each=each, **cluster.settings())
        assert line in " ".join(output.replace("'", "").split()), output[-3000:]
        assert set(changed.values()) == {0}


def test_a_host_without_systemd_is_named_standin(cluster: Cluster) -> None:
    """What tells programs that systemd runs is away for a moment."""
    three = cluster.hosts[2]
    cluster.fleet.sh(three, "mv /run/systemd/system /run/systemd/away")
    try:
        output, changed = cluster.fleet.play(PLAY, cluster.hosts, fail=True, **cluster.settings())
    finally:
        cluster.fleet.sh(three, "mv /run/systemd/away /run/systemd/system")
    assert f"{three} was not booted by systemd, whose units Ray's nodes are" in " ".join(
        output.replace("''", "'").split()
    )
    assert set(changed.values()) == {0}


def test_hosts_that_do_not_reach_each_other_are_named_before_anything_is_started(cluster: Cluster) -> None:
    two, three = cluster.hosts[1:3]
    peer = cluster.fleet.address(three)
    name = cluster.fleet.sh(two, f"ip -o -4 addr | awk '/{cluster.fleet.address(two)}/ {{print $2}}'")
    # What host two sends to three goes to nobody: silence, as a firewall that drops.
    cluster.fleet.sh(two, f"ip neigh replace {peer} lladdr 02:00:00:00:00:99 dev {name} nud permanent")
    try:
        began = time.monotonic()
        output, changed = cluster.fleet.play(PLAY, cluster.hosts, fail=True, **cluster.settings())
    finally:
        cluster.fleet.sh(two, f"ip neigh del {peer} dev {name}")
    told(time.monotonic() - began, "ray_cluster: a host that does not reach another named")
    silence = "no answer within the time limit: a firewall or a wrong route drops it"
    assert f"{two} cannot reach {three} at {peer}: {silence}" in " ".join(output.split())
    assert set(changed.values()) == {0}


def test_check_mode_says_what_it_would_do_and_does_nothing(cluster: Cluster) -> None:
    output, changed = cluster.play("--check", "--diff", ray_cluster_root="/opt/elsewhere")
    assert all(changed[host] for host in cluster.hosts), changed
    for line in (
        "+Description=Ray node of cluster default",
        f"+  --node-ip-address={cluster.fleet.address(cluster.head)} ",
    ):
        assert line in output
    places = "/etc/ray /var/lib/ray /opt/elsewhere /etc/systemd/system/ray-default.service"
    for host in cluster.hosts[1:]:  # Ray was installed on the first one
        assert cluster.fleet.sh(host, f"ls -d {places} 2>/dev/null; id -u ray 2>/dev/null", check=False) == ""


def test_check_mode_with_an_environment_that_is_yet_to_come(cluster: Cluster) -> None:
    third = cluster.hosts[2]
    cluster.play("--check", ray_cluster_python=PYTHON, each={third: {"ray_cluster_python": "/opt/to_come/bin/python"}})


def test_it_is_formed_and_a_second_run_changes_nothing(cluster: Cluster) -> None:
    output, _ = cluster.play()
    assert "3 nodes with 6 GPUs are here" in output
    until(lambda: cluster.nodes() == 3, 30)  # the head counts them for it every few seconds
    assert "0.0/6.0 GPU" in cluster.status()
    output, changed = cluster.play()
    assert changed == dict.fromkeys(cluster.hosts, 0), output
    cluster.works_everywhere()


def test_check_mode_on_a_cluster_that_runs(cluster: Cluster) -> None:
    before = cluster.processes()
    output, changed = cluster.play("--check", "--diff")
    assert changed == dict.fromkeys(cluster.hosts, 0), output
    output, changed = cluster.play(
        "--check", "--diff", ray_cluster_num_cpus=3, each={cluster.head: {"ray_cluster_num_cpus": 2}}
    )
    assert [host for host in cluster.hosts if changed[host]] == cluster.hosts[1:]
    assert "-  --num-cpus=2\n+  --num-cpus=3" in output
    assert cluster.fleet.sh(cluster.head, "cat /etc/ray/default/token") not in output
    assert cluster.processes() == before


def test_a_token_is_asked_for(cluster: Cluster) -> None:
    def ask(word: str) -> str:
        script = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={word} timeout 30 {PYTHON} -m ray.scripts.scripts status"
        return cluster.on_head(script, check=False)

    assert "Active:" not in ask("x" * 48)
    good = cluster.fleet.sh(cluster.head, "cat /etc/ray/default/token")
    assert "Active:" in ask(good)
    for host in cluster.hosts:
        mode = cluster.fleet.sh(host, "stat -c '%a %U' /etc/ray/default/token")
        assert mode == "600 ray"
        seen = cluster.fleet.sh(host, "ps -eo args; cat /proc/[0-9]*/environ; systemctl show ray-default", check=False)
        assert good not in seen
        # A core dump would hold it. The kernel's columns: name, soft limit, hard limit, unit.
        limits = cluster.fleet.sh(host, "cat /proc/$(systemctl show --property=MainPID --value ray-default)/limits")
        assert re.search(r"^Max core file size +0 +0 +bytes", limits, re.M), limits


def test_nobody_else_reaches_its_ports(cluster: Cluster) -> None:
    worker, stranger = cluster.hosts[1], cluster.fleet.names[4]
    manage, fabric = cluster.fleet.manage(cluster.head), cluster.fleet.address(cluster.head)
    ports = cluster.fleet.listening(cluster.head)
    assert {6379, 6380, 6381} <= ports
    assert 8265 not in ports  # the dashboard
    assert cluster.fleet.reaches(stranger, manage, 22)
    assert cluster.fleet.reaches(worker, fabric, 6379)
    assert [port for port in sorted(ports) if cluster.fleet.reaches(stranger, manage, port)] == []


def test_a_worker_that_is_killed_comes_back(cluster: Cluster) -> None:
    worker = cluster.hosts[1]
    cluster.fleet.sh(worker, "systemctl kill --signal=KILL ray-default")
    started = time.monotonic()
    until(lambda: cluster.fleet.sh(worker, "systemctl is-active ray-default", check=False) == "active", 60)
    until(lambda: cluster.nodes() == 3, 120)
    told(time.monotonic() - started, "node killed")
    cluster.works_everywhere()


def test_a_worker_that_loses_power_comes_back(cluster: Cluster) -> None:
    worker = cluster.hosts[2]
    cluster.fleet.pull_the_plug(worker)
    until(lambda: cluster.nodes() == 2, 120, "a cluster without it")
    started = time.monotonic()
    cluster.fleet.power(worker)
    until(lambda: cluster.nodes() == 3, 120)
    told(time.monotonic() - started, "worker host lost power: back after its start")
    cluster.works_everywhere()


def test_the_head_reboots(cluster: Cluster) -> None:
    cluster.fleet.reboot(cluster.head)
    started = time.monotonic()
    until(lambda: cluster.nodes() == 3, 240)
    told(time.monotonic() - started, "head rebooted: all nodes back")
    cluster.works_everywhere()
    output, changed = cluster.play()
    assert set(changed.values()) == {0}, output


def test_the_network_is_cut_for_a_minute(cluster: Cluster) -> None:
    worker = cluster.hosts[1]
    cluster.fleet.cut(worker)
    until(lambda: cluster.nodes() == 2, 90, "a cluster without it")
    time.sleep(30)
    cluster.fleet.mend(worker)
    started = time.monotonic()
    until(lambda: cluster.nodes() == 3, 180)
    told(time.monotonic() - started, "network back: all nodes back")
    cluster.works_everywhere()


def test_a_worker_is_added_and_the_others_go_on(cluster: Cluster) -> None:
    before = cluster.processes()
    cluster.hosts = cluster.fleet.names[:4]
    _, said = cluster.play("--check")
    output, changed = cluster.play()
    assert "4 nodes with 8 GPUs are here" in output
    assert before.items() <= cluster.processes().items()
    for hosts in (said, changed):
        assert [host for host in hosts if hosts[host]] == [cluster.hosts[3]]
    cluster.works_everywhere()


def test_a_run_that_ended_before_the_restart_is_finished_by_the_next(cluster: Cluster) -> None:
    second = cluster.hosts[1]
    before, systemctl = cluster.processes(), "/usr/local/bin/systemctl"
    changed_on_second = {second: {"ray_cluster_environment": {"WORD": "{{ inventory_hostname }}", "OTHER": "word"}}}
    cluster.fleet.sh(second, f"printf '#!/bin/sh\\nexit 1\\n' >{systemctl}; chmod +x {systemctl}")
    try:
        cluster.fleet.play(PLAY, cluster.hosts, fail=True, each=changed_on_second, **cluster.settings())
    finally:
        cluster.fleet.sh(second, f"rm {systemctl}")
    cluster.fleet.sh(second, "grep -q OTHER /etc/ray/default/env")
    assert cluster.processes() == before
    cluster.play(each=changed_on_second)
    after = cluster.processes()
    assert [host for host in cluster.hosts if after[host] != before[host]] == [second]
    output, changed = cluster.play(each=changed_on_second)
    assert set(changed.values()) == {0}, output
    cluster.play()


def test_a_token_that_was_lost_is_made_anew_and_used(cluster: Cluster) -> None:
    cluster.fleet.sh(cluster.head, "rm /etc/ray/default/token")
    before = cluster.processes()
    cluster.play()
    after = cluster.processes()
    assert all(after[host] != before[host] for host in cluster.hosts)
    cluster.works_everywhere()
    output, changed = cluster.play()
    assert set(changed.values()) == {0}, output


def test_a_worker_leaves(cluster: Cluster) -> None:
    leaving = cluster.hosts.pop()
    cluster.fleet.play(PLAY, [leaving], entry_point="teardown", ray_cluster_hosts=[leaving])
    assert cluster.fleet.sh(leaving, "systemctl is-active ray-default", check=False) != "active"
    cluster.fleet.sh(leaving, "! pgrep -u ray")
    until(lambda: cluster.nodes() == 3, 60)
    output, changed = cluster.play()
    assert set(changed.values()) == {0}, output
    cluster.works_everywhere()


def test_teardown_leaves_nothing(cluster: Cluster) -> None:
    cluster.play(entry_point="teardown")
    for host in cluster.hosts:
        places = "/etc/ray/default /var/lib/ray/default /etc/systemd/system/ray-default*"
        left = cluster.fleet.sh(host, f"ls -d {places} 2>/dev/null; pgrep -u ray", check=False)
        assert left == ""
    _, changed = cluster.play(entry_point="teardown")
    assert set(changed.values()) == {0}
