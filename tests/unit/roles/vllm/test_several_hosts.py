# SPDX-License-Identifier: GPL-3.0-or-later
"""Services over several hosts beside other services: the role's own tasks on folders that stand for hosts, which have to work at
the same time. Stand-ins: engines' Python, supervisorctl, the role ray_cluster, and a server that answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run

from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer

FIREWALL = "/etc/systemd/system/vllm-interconnect-firewall.service"
# Says which software there is. A sum needs all of its hosts at the same moment, as that of NCCL does.
PYTHON = """#!{python}
import json, sys, time
from pathlib import Path
words = sys.argv[1:]
if words[0] == "-c":
    print(json.dumps({{"service": words[2], "vllm": "0.25.1", "ray": "2.60.0"}}))
elif words[1] != "--load":
    given = dict(zip(words[1::2], words[2::2]))
    here = Path("{folder}/sum" + given["--port"])
    here.mkdir(exist_ok=True)
    (here / given["--rank"]).touch()
    end = time.monotonic() + 30
    while len(list(here.iterdir())) < words.count("--peer") and time.monotonic() < end:
        time.sleep(0.05)
    alone = len(list(here.iterdir())) < words.count("--peer")
    print(json.dumps({{"problems": ["rank %s is alone" % given["--rank"]] * alone, "whole": "", "ms": 1, "mbps": 1}}))
"""
# Reads of the other hosts what each has of this very cluster, as the role does.
RAY_CLUSTER = [
    {"ansible.builtin.set_fact": {"__standin_node": "{{ ray_cluster_name }}"}},
    {
        "ansible.builtin.assert": {
            "that": "ray_cluster_hosts | map('extract', hostvars, '__standin_node') | unique == [ray_cluster_name]"
        }
    },
]


class Hosts:
    """Folders that stand for hosts, each with the services that it has, in the order of the plan."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url, self.log = folder, url, folder / "starts.log"
        self.has: dict[str, list[dict[str, Any]]] = {}
        self.rounds: dict[str, int] = {}  # those that are not changed in the first one
        self.up: list[str] = []  # services that run as they should
        self.left: dict[str, dict[str, str]] = {}  # files of earlier runs, by host
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable, folder=folder))
        python.chmod(0o755)
        collection = folder / "ansible_collections/baremetal/vllm"
        ray_cluster = collection / "roles/ray_cluster/tasks/main.yml"
        ray_cluster.parent.mkdir(parents=True)
        ray_cluster.write_text(json.dumps(RAY_CLUSTER))
        for name in ("galaxy.yml", "meta", "plugins", "roles/vllm"):
            (collection / name).symlink_to(ROOT / name)

    def add(self, name: str, *hosts: str, executor: str = "mp") -> None:
        for rank, host in enumerate(hosts):
            config = self.folder / host / "config" / name
            config.mkdir(parents=True)
            control = self.folder / host / "supervisorctl"
            control.write_text(f'#!/bin/sh\necho "{host} $@" >>{self.log}\necho RUNNING\n')
            control.chmod(0o755)
            span = {
                "service": name, "rank": rank, "executor": executor, "hosts": list(hosts), "address": "127.0.0.1",
                "addresses": {one: f"10.0.0.{one}" for one in hosts}, "environment": {}, "gpus": {},
                "ports": {"allreduce": f"29602{name}", "node_manager": 6380}, "token_file": str(config / "cluster_token"),
            }  # fmt: skip
            self.has.setdefault(host, []).append({
                "name": name, "unit": f"vllm-{name}", "runtime": "venv", "device": "cpu", "venv": None,
                "standby": {"unit_file": "/nowhere"},
                "inside": "", "room": False, "headless": rank > 0, "span": span if len(hosts) > 1 else None,
                "python": str(self.folder / "python"), "run_python": [str(self.folder / "python")], "node_networks": [],
                "kept_home": [], "config_dir": str(config), "restart_file": str(config / "restart"),
                "state_dir": str(self.folder / host / name), "watched": [],
                "unit_file": str(self.folder / host / f"{name}.conf"), "api_key_file": str(config / "api_key"),
                "endpoint_files": [str(config / "endpoint.json")], "root_url": self.url, "model_path": "/models/m", "port": 8000,
            })  # fmt: skip

    def names(self) -> list[str]:
        return sorted({svc["name"] for one in self.has.values() for svc in one})

    def play(self) -> str:
        me = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
        owner = {"owner": me, "mode": "0600"}
        place = f"{self.folder}/{{{{ inventory_hostname }}}}"
        files = {host: self.left.get(host, {}) for host in self.has}
        given = {
            "vllm_user": me, "__vllm_user_id": me, "__vllm_manager": "supervisor", "vllm_config_dir": f"{place}/config",
            "__vllm_supervisorctl": [f"{place}/supervisorctl"], "vllm_interconnect_firewall": "none",
            "vllm_services": [{"name": name, "model": "m"} for name in self.names()],
            "vllm_plan_result": {"services": [{"name": name, "round": self.rounds.get(name, 0)} for name in self.names()]},
            "__vllm_images": [], "__vllm_by_plan": "{{ standin_has[inventory_hostname] }}", "__vllm_installed": True,
            "__vllm_records": {"files": "{{ standin_files[inventory_hostname] }}"}, "__vllm_measure_later": False,
            "__vllm_probe": {
                "pids": {}, "listeners": {},
                "fingerprints": "{{ standin_files[inventory_hostname] | combine({'" + FIREWALL + "': ''}) }}",
            },
            "__vllm_rank_current": "{{ svc.span.executor == 'ray' or svc.name in standin_up }}",
            "__vllm_server_current": "{{ svc.name in standin_up }}", "__vllm_differs": True, "__vllm_runs": False,
            "__vllm_given_key": "sk-new", "__vllm_told_files": [],
            "__vllm_run_files": [{"path": "{{ svc.config_dir }}/start.sh", "content": "new\n", **owner}],
            "__vllm_unit_file": {"path": "{{ svc.unit_file }}", "content": "new unit\n", **owner},
            "__vllm_measured_file": {"path": "{{ svc.config_dir }}/measured.json", "content": "{}", **owner},
            "__vllm_wait_for": {
                "url": "{{ svc.root_url }}/health", "log_command": ["true"], "timeout": 5, "pid_command": ["echo", "77"],
            },
        }  # fmt: skip
        up = [{"ansible.builtin.set_fact": {"__vllm_spans_up": "{{ standin_up }}", "__vllm_spans_settled": []}}]
        role = {"ansible.builtin.include_role": {"name": "baremetal.vllm.vllm"}, "vars": given}
        play = {
            "hosts": "all", "connection": "local", "gather_facts": False, "tasks": [*up, role],
            "vars": {"standin_has": self.has, "standin_up": self.up, "standin_files": files},
        }  # fmt: skip
        (self.folder / "play.yml").write_text(json.dumps([play]))
        words = {"ANSIBLE_NOCOLOR": "1", "ANSIBLE_PYTHON_INTERPRETER": sys.executable}
        words["ANSIBLE_COLLECTIONS_PATH"] = str(self.folder)
        command = ["ansible-playbook", "-i", ",".join([*self.has, ""]), self.folder / "play.yml"]
        done = run(command, ROOT, **words)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


def together(output: str, name: str) -> set[tuple[str, ...]]:
    """(hosts) for each time that hosts went through included tasks for a service."""
    found = re.findall(rf"^included: \S+ for (.+) => \(item={name}\)$", output, re.M)
    return {tuple(sorted(hosts.split(", "))) for hosts in found}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with OpenAiServer() as server:
        yield Hosts(tmp_path, server.url)


def test_beside_another_service_and_another_cluster(hosts: Hosts) -> None:
    hosts.add("embed", "two")
    hosts.add("chat", "one", "two")
    hosts.add("code", "two", "three")
    output = hosts.play()
    assert together(output, "chat") == {("one", "two")}
    assert together(output, "code") == {("three", "two")}
    assert len({path.read_text() for path in hosts.folder.glob("*/config/chat/cluster_token")}) == 1
    started = [line for line in hosts.log.read_text().splitlines() if " update " in line]
    assert sorted(started) == [
        "one update vllm-chat", "three update vllm-code", "two update vllm-chat", "two update vllm-code", "two update vllm-embed",
    ]  # fmt: skip


def test_a_cluster_comes_to_a_host_of_one_that_runs(hosts: Hosts) -> None:
    """The other host of that one has nothing to do, and takes no part."""
    hosts.add("chat", "one", "two")
    hosts.add("code", "two", "three")
    hosts.up = ["chat"]
    output = hosts.play()
    assert together(output, "chat") == set()
    assert together(output, "code") == {("three", "two")}


def test_ray_beside_another_service(hosts: Hosts) -> None:
    hosts.add("embed", "two")
    hosts.add("chat", "one", "two", executor="ray")
    output = hosts.play()
    assert together(output, "chat") == {("one", "two"), ("one",)}  # the server runs on the first host alone
    assert output.count("included: baremetal.vllm.ray_cluster for ") == 1
    assert "two update vllm-chat" not in hosts.log.read_text()
    assert (hosts.folder / "two/config/chat/vllm/model_path").read_text() == "/models/m\n"


def test_a_worker_of_ray_keeps_no_record_of_its_time_before(hosts: Hosts) -> None:
    """As a rank of executor mp, or as the first host: it would disagree for good with the one that the first host renews."""
    hosts.add("chat", "one", "two", executor="ray")
    for host in ("one", "two"):
        config = hosts.folder / host / "config/chat"
        hosts.left[host] = {str(config / name): "{}" for name in ("plan.json", "env", "start.sh")}
        for path in hosts.left[host]:
            Path(path).write_text("{}")
    hosts.up = ["chat"]
    hosts.play()
    assert (hosts.folder / "one/config/chat/plan.json").exists()
    assert not [path for path in (hosts.folder / "two/config/chat").iterdir() if path.is_file()]


def test_what_gives_memory_up_is_changed_before_what_takes_it_on_all_hosts(hosts: Hosts) -> None:
    hosts.add("embed", "one")
    hosts.add("code", "two")
    hosts.add("chat", "two", "one")
    hosts.rounds = {"embed": 1, "code": 1}
    output = hosts.play()
    assert together(output, "chat") == {("one", "two")}
    started = [line.split()[-1] for line in hosts.log.read_text().splitlines() if " update " in line]
    assert started[:2] == ["vllm-chat", "vllm-chat"] and sorted(started[2:]) == ["vllm-code", "vllm-embed"]
