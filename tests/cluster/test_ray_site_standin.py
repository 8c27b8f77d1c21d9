# SPDX-License-Identifier: GPL-3.0-or-later
"""site.yml with executor ray: a real Ray cluster, the real gate and units; GPUs and vLLM are stand-ins.

The stand-in for vLLM places an actor with a GPU for each engine and ends when one of them does, as vLLM does. The tests run in
the order in which they stand.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from fleet import ROOT, Fleet, until


class Service:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.size, self.first, self.marker = fleet, 3, 0, "a"
        self.release: dict[str, str] = {}

    @property
    def head(self) -> str:
        return self.fleet.names[self.first]

    def play(
        self, *words: str, fail: bool = False, playbook: str = "site.yml", hosts: int = 3, **more: Any
    ) -> tuple[str, dict[str, int]]:
        service = {
            "name": "chat",
            "model": "/opt/models/six",
            "hosts": self.fleet.names[: self.size],
            "tensor_parallel_size": 2,
            "pipeline_parallel_size": self.size,
            "executor": "ray",
            "max_model_len": 512,
            "env": {"MARKER": self.marker},
            **self.release,
        }
        settings = {
            "vllm_existing_python": "/opt/standin/python",
            "vllm_interconnect_network": f"10.{self.fleet.number}.1.0/24",
            "vllm_interconnect_check": False,  # the stand-in has no PyTorch; test_preflight.py has it
            "vllm_verify_client": "never",
            "vllm_api_key": "",
            "vllm_services": [service],
            "preflight_allow_untested_distribution": True,
        }
        words = (*words, "--skip-tags", "verify")
        names = sorted(self.fleet.names[:hosts], key=lambda name: name != self.head)
        return self.fleet.play(ROOT / playbook, names, *words, fail=fail, **{**settings, **more})

    def engines(self) -> list[Any]:
        """[address that Ray says, address of its environment] of each engine; none while there is no answer."""
        code = (
            "import json, urllib.request as r; key = open('/etc/vllm/chat/api_key').read().strip(); "
            "q = r.Request('http://127.0.0.1:8000/v1/models', headers={'Authorization': 'Bearer ' + key}); "
            "print(json.dumps(json.load(r.urlopen(q, timeout=5))['data'][0]['engines']))"
        )
        out = self.fleet.sh(self.head, f'python3 -c "{code}" 2>/dev/null', check=False)
        return list(json.loads(out)) if out.startswith("[") else []

    def serves(self) -> bool:
        addresses = [self.fleet.address(host) for host in self.fleet.names[: self.size]]
        return Counter(map(tuple, self.engines())) == Counter({(address, address): 2 for address in addresses})

    def show(self, key: str) -> str:
        return self.fleet.sh(self.head, f"systemctl show --property={key} --value vllm-chat")

    def log(self) -> str:
        return self.fleet.sh(self.head, "journalctl -u vllm-chat -o cat --no-pager")


@pytest.fixture(scope="module")
def service(ray_fleet: Fleet) -> Service:
    for host in ray_fleet.names[:3]:
        # Where test_ray.py has cut the network, Docker has named the interface anew: as of a boot it is eth1 again.
        if not ray_fleet.sh(host, "ls -d /sys/class/net/eth1", check=False):
            ray_fleet.reboot(host)
        ray_fleet.sh(host, "ln -sf /opt/standin/nvidia-smi /usr/local/bin/nvidia-smi")
    return Service(ray_fleet)


def told(seconds: float, what: str) -> None:
    print(json.dumps({"figure": what, "seconds": round(seconds, 1)}))


def test_check_mode_on_fresh_hosts(service: Service) -> None:
    output, changed = service.play("--check", "--diff")
    assert all(changed[host] for host in service.fleet.names[:3]), changed
    assert "+Description=Ray node of cluster chat" in output
    assert "+Description=vLLM chat" in output
    for host in service.fleet.names[:3]:
        assert service.fleet.sh(host, "ls -d /etc/ray/chat /etc/vllm /etc/systemd/system/*-chat*", check=False) == ""


def test_a_host_without_systemd_is_named_in_the_preflight(service: Service) -> None:
    worker = service.fleet.names[1]
    words = ("--tags", "preflight")
    output, changed = service.play(*words, fail=True, each={worker: {"vllm_service_manager": "supervisor"}})
    line = f"service chat has executor ray, whose nodes are units of systemd, and services of {worker} run under supervisor"
    assert line in " ".join(output.split())
    assert set(changed.values()) == {0}


def test_engines_are_placed_as_planned_and_a_second_run_changes_nothing(service: Service) -> None:
    output, _ = service.play()
    assert "3 nodes with 6 GPUs are here" in output
    assert service.serves(), service.engines()
    for worker in service.fleet.names[1:3]:
        assert service.fleet.sh(worker, "ls /etc/systemd/system/vllm-*", check=False) == "", "Ray places the engines"
    for host in service.fleet.names[:3]:
        # By which gpu_facts knows whose GPU memory it is.
        folders = service.fleet.sh(host, "for pid in $(pgrep -f ^ray::); do readlink /proc/$pid/cwd || true; done")
        assert set(folders.split()) == {"/var/lib/ray/chat"}
    output, changed = service.play()
    assert set(changed.values()) == {0}, output


def test_a_changed_service_is_restarted(service: Service) -> None:
    began = service.show("MainPID")
    service.marker = "b"
    _, said = service.play("--check")
    assert service.show("MainPID") == began
    _, changed = service.play()
    assert changed[service.head] > 0
    assert [host for host in said if said[host]] == [host for host in changed if changed[host]]
    assert service.serves(), service.engines()


def test_what_the_service_sets_is_in_the_environment_of_every_node(service: Service) -> None:
    for host in service.fleet.names[:3]:
        environment = service.fleet.sh(host, "tr '\\0' '\\n' </proc/$(pgrep -of raylet/raylet)/environ")
        assert "MARKER=b" in environment.split()
        assert f"VLLM_HOST_IP={service.fleet.address(host)}" in environment.split()


def test_an_upgrade_of_all_hosts(service: Service) -> None:
    """To the next release of the stand-in; a host that was left behind is named while the engines of before still serve."""
    before = service.show("MainPID")
    service.release = {"engine_version": "0.26.0"}
    pythons = {host: {"vllm_existing_python": "/opt/standin/python-next"} for host in service.fleet.names[:2]}
    output, _ = service.play(fail=True, each=pythons)
    one, _, three = service.fleet.names[:3]
    line = f"service chat: vllm is 0.26.0 on {one} and 0.25.1 on {three}: install the same on both"
    assert line in " ".join(output.split())
    assert service.show("MainPID") == before and service.serves()
    pythons[three] = {"vllm_existing_python": "/opt/standin/no-such-python"}
    output, _ = service.play(fail=True, each=pythons)
    assert f"service chat: Python of {three} does not say which software it has" in " ".join(output.split())
    assert service.show("MainPID") == before and service.serves()
    began = time.monotonic()
    service.play(vllm_existing_python="/opt/standin/python-next")
    told(time.monotonic() - began, "ray: site.yml with an upgrade of three hosts")
    assert service.serves(), service.engines()
    output, changed = service.play(vllm_existing_python="/opt/standin/python-next")
    assert set(changed.values()) == {0}, output
    service.release = {}
    service.play()
    assert service.serves()


def test_the_network_is_cut_for_a_minute(service: Service) -> None:
    worker = service.fleet.names[1]
    service.fleet.cut(worker)
    until(lambda: not service.engines(), 120, "the end of the server")
    time.sleep(60)
    restarts = service.show("NRestarts")
    service.fleet.mend(worker)
    started = time.monotonic()
    until(service.serves, 240)
    told(time.monotonic() - started, "ray: served again after the network of a worker was cut for a minute")
    assert service.show("NRestarts") == restarts, "the start that waited for the node is the one that serves"
    assert f"placement: waiting for {worker} ({service.fleet.address(worker)})" in service.log()
    service.fleet.reboot(worker)  # which gives the interface its name again
    until(lambda: not service.engines(), 90, "the end of the server")
    until(service.serves, 240)


def test_a_server_waits_for_ray_as_long_as_it_takes(service: Service) -> None:
    service.fleet.sh(service.head, "systemctl stop ray-chat")
    until(lambda: "placement: waiting for the Ray cluster at" in service.log(), 90, "the gate")
    restarts = service.show("NRestarts")
    time.sleep(45)
    assert (service.show("ActiveState"), service.show("NRestarts")) == ("active", restarts)
    service.fleet.sh(service.head, "systemctl start ray-chat")
    started = time.monotonic()
    until(service.serves, 240)
    told(time.monotonic() - started, "ray: served again after the node of the first host was away")


def test_a_worker_host_reboots(service: Service) -> None:
    service.fleet.pull_the_plug(service.fleet.names[1])
    until(lambda: not service.engines(), 90, "the end of the server")
    service.fleet.power(service.fleet.names[1])
    started = time.monotonic()
    until(service.serves, 180)
    told(time.monotonic() - started, "ray: served again after the boot of a worker host")


def test_the_head_host_reboots(service: Service) -> None:
    service.fleet.reboot(service.head)
    started = time.monotonic()
    until(service.serves, 240)
    told(time.monotonic() - started, "ray: served again after the boot of the head host")
    output, changed = service.play()
    assert set(changed.values()) == {0}, output


def test_with_rules_only_hosts_of_the_service_reach_ports(service: Service) -> None:
    """A stranger on both networks: on the engines' own one, it reaches Ray without rules, which its token alone guards."""
    fleet, stranger = service.fleet, service.fleet.names[4]
    address, manage = fleet.address(service.head), fleet.manage(service.head)
    assert fleet.reaches(stranger, address, 6379)
    assert not fleet.reaches(stranger, manage, 6379)
    service.play(vllm_interconnect_firewall="nftables")
    until(service.serves, 60)
    ports = sorted(fleet.listening(service.head))
    assert {6379, 6380, 6381} <= set(ports)
    for place in (address, manage):
        assert [port for port in ports if fleet.reaches(stranger, place, port)] == []
    assert [port for port in ports if not fleet.reaches(fleet.names[1], address, port)] == []
    _, changed = service.play(vllm_interconnect_firewall="nftables")
    assert set(changed.values()) == {0}
    service.play()
    assert fleet.reaches(stranger, address, 6379)


def test_a_placement_that_cannot_be_met_ends_at_once(service: Service) -> None:
    worker = service.fleet.names[1]
    start = "/etc/ray/chat/start.sh"
    service.fleet.sh(worker, f"sed -i s/--num-gpus=2/--num-gpus=1/ {start} && systemctl restart ray-chat")
    until(lambda: service.show("ActiveState") == "failed", 120, "the end of the unit")
    assert service.show("ExecMainStatus") == "78"
    log = service.log()
    reason = f"{worker} ({service.fleet.address(worker)}) gives Ray 1 GPUs and the plan places 2 there"
    assert f"PlacementError: this placement can never be met: {reason}" in log
    # From the start of the gate to the end of the unit, and no further try.
    service.fleet.sh(service.head, "systemctl reset-failed vllm-chat; systemctl start vllm-chat")
    began = time.monotonic()
    until(lambda: service.show("ActiveState") == "failed", 60)
    told(time.monotonic() - began, "ray: a placement that can never be met ends the start")
    restarts = service.show("NRestarts")
    time.sleep(12)
    assert (service.show("ActiveState"), service.show("NRestarts")) == ("failed", restarts)
    # site.yml sees the node that is not as it should be, and mends it.
    service.play()
    until(service.serves, 60)


def test_a_host_leaves(service: Service) -> None:
    service.size = 2
    leaving = service.fleet.names[2]
    service.play()
    until(service.serves, 60)
    assert service.fleet.sh(leaving, "ls /etc/systemd/system/ray-*; pgrep -f [r]aylet", check=False) == ""
    output, changed = service.play()
    assert set(changed.values()) == {0}, output


def test_a_host_comes(service: Service) -> None:
    service.size = 3
    service.play()
    until(service.serves, 60)


def test_a_host_that_was_off_when_it_left_comes_back(service: Service) -> None:
    leaving = service.fleet.names[2]
    service.fleet.pull_the_plug(leaving)
    service.size = 2
    service.play(hosts=2)
    until(service.serves, 60)
    service.fleet.power(leaving)
    address = service.fleet.address(leaving)
    until(lambda: service.fleet.sh(leaving, "pgrep -f raylet/raylet", check=False), 60)
    time.sleep(10)
    assert service.serves(), "what runs is not disturbed"
    service.fleet.sh(service.head, "systemctl restart vllm-chat")
    said = f"placement: waiting, since {address} is in the cluster with 2 GPUs and not in the plan"
    until(lambda: said in service.log(), 90, "the gate")
    assert service.show("ActiveState") == "active"
    service.play()
    until(service.serves, 60)
    assert service.fleet.sh(leaving, "ls /etc/systemd/system/ray-*; pgrep -f [r]aylet", check=False) == ""


def test_another_host_comes_first(service: Service) -> None:
    """Clients keep their key, and the former first host tells nobody any more that it answers."""
    one, two = service.fleet.names[:2]
    key = service.fleet.sh(one, "cat /etc/vllm/chat/api_key")
    service.first = 1
    service.play(hosts=2)
    assert service.head == two
    until(service.serves, 60)
    assert (
        service.fleet.sh(two, "cat /etc/vllm/chat/api_key; stat -c '%a %U' /etc/vllm/chat/api_key")
        == f"{key}\n600 vllm"
    )
    assert (
        service.fleet.sh(one, "cd /etc/vllm/chat && ls api_key endpoint.json measured.json 2>/dev/null", check=False)
        == ""
    )
    output, changed = service.play(hosts=2)
    assert set(changed.values()) == {0}, output
    service.first = 0
    service.play(hosts=2)
    until(service.serves, 60)
    assert service.fleet.sh(one, "cat /etc/vllm/chat/api_key") == key


def test_teardown_leaves_nothing(service: Service) -> None:
    service.play(playbook="playbooks/teardown.yml")
    for host in service.fleet.names[:3]:
        assert service.fleet.sh(host, "ls /etc/systemd/system | grep -E 'ray-|vllm-'; pgrep -u vllm", check=False) == ""
    output, changed = service.play(playbook="playbooks/teardown.yml")
    assert set(changed.values()) == {0}, output
    # Of a host without services nothing is removed: its owner's units are none of ours.
    service.fleet.sh(service.head, "printf '[Service]\\nExecStart=/bin/true\\n' >/etc/systemd/system/owners.service")
    service.play(playbook="playbooks/teardown.yml", vllm_services=[])
    service.fleet.sh(service.head, "test -e /etc/systemd/system/owners.service")
