# SPDX-License-Identifier: GPL-3.0-or-later
"""The role model on a site of several hosts, as site.yml uses it. The hosts are folders of this machine with ports of their own."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ansible_collections.baremetal.vllm.tests.fakes.hub import Hub, Link

REPO, TOKEN = "owner/tiny", "hf_right_0123456789"
PLAY = """
- hosts: all
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - ansible.builtin.setup:
        gather_subset: ['!all', '!min', python]
    - ansible.builtin.include_role: {name: baremetal.vllm.model, tasks_from: info}
    - ansible.builtin.set_fact:
        preflight_problems: []
    - ansible.builtin.include_role: {name: baremetal.vllm.model, tasks_from: preflight}
    - ansible.builtin.assert:
        that: preflight_problems | length == 0
        fail_msg: "{{ preflight_problems | join('; ') }}"
    - ansible.builtin.include_role: {name: baremetal.vllm.model}
"""


class Site:
    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        (folder / "play.yml").write_text(PLAY)

    def root(self, host: str) -> Path:
        return self.folder / host

    def model(self, host: str) -> Path:
        return self.root(host) / REPO / "main"

    def command(self, hosts: str, **variables: Any) -> list[str]:
        names = hosts.split()
        own = {
            name: {"model_peer_port": 28670 + 10 * number, "model_peer_address": "127.0.0.1"}
            for number, name in enumerate(names)
        }
        for name, settings in variables.pop("host_vars", {}).items():
            own[name].update(settings)
        inventory = {"all": {"hosts": {name: {**own[name], "model_root": str(self.root(name))} for name in names}}}
        (self.folder / "hosts.json").write_text(json.dumps(inventory))
        settings = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "vllm_services": [{"name": "chat", "model": REPO}, {"name": "again", "model": REPO}],
            "model_client": "builtin",
            "model_reserve_mib": 1,
            "model_progress_interval": 1,
            **variables,
        }
        (self.folder / "extra.json").write_text(json.dumps(settings))
        playbook = str(Path(sys.executable).with_name("ansible-playbook"))
        return [
            playbook,
            "-i",
            f"{self.folder}/hosts.json",
            f"{self.folder}/play.yml",
            "-e",
            f"@{self.folder}/extra.json",
        ]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"),
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "tmp"),
            "ANSIBLE_REMOTE_TEMP": str(self.folder / "remote"),
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": TOKEN,
        }

    def play(self, hosts: str, fails: bool = False, arguments: tuple[str, ...] = (), **variables: Any) -> str:
        command = [*self.command(hosts, **variables), *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=300
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "PRIVATE KEY" not in done.stdout + done.stderr
        return done.stdout


def changed(output: str) -> dict[str, int]:
    return {host: int(count) for host, count in re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", output, re.M)}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for number in range(3):
        (origin / f"model-{number}.safetensors").write_bytes(os.urandom(4_000_000))
    (origin / "pytorch_model.bin").write_bytes(b"x" * 100_000)
    with Hub() as hub:
        hub.add(REPO, origin, token=TOKEN)
        yield Site(tmp_path, hub)


def same(site: Site, host: str) -> None:
    for path in (site.folder / "origin").glob("*.[js]*"):
        assert (site.model(host) / path.name).read_bytes() == path.read_bytes()


def test_one_fetch_for_a_site_and_for_who_joins_it(site: Site) -> None:
    site.hub.link = Link(800_000)
    output = site.play("a b c", arguments=("-vvv",))
    assert changed(output) == {"a": 1, "b": 1, "c": 1}
    for host in "abc":
        same(site, host)
        assert not (site.model(host) / "pytorch_model.bin").exists()
    size = 12_000_000 + 40
    assert size <= site.hub.sent_bytes < size * 1.01, "the hub has sent the model once"
    assert re.search(r"^a owner/tiny: fetching \d+ %, 0\.0\d of 0\.01 GiB(, [\d.]+ MiB/s, \d+ s left)?$", output, re.M)
    assert re.search(r"^b owner/tiny: 0\.01 GiB from neighbours in \d+ s$", output, re.M)
    assert "\x1b" not in output and "\r" not in output
    site.hub.link = None
    # A second run asks the hub nothing and changes nothing.
    asked = len(site.hub.requests)
    assert changed(site.play("a b c")) == {"a": 0, "b": 0, "c": 0}
    assert changed(site.play("a b c", arguments=("--check", "--diff"))) == {"a": 0, "b": 0, "c": 0}
    assert len(site.hub.requests) == asked
    # One that joins when the hub is gone and the branch has moved on takes what its neighbours have.
    sent = site.hub.sent_bytes
    (site.folder / "origin/new.json").write_text("{}")
    site.hub.add(REPO, site.folder / "origin", token=TOKEN)
    (site.folder / "origin/new.json").unlink()
    lost = {"host_vars": {"d": {"model_hub_endpoint": "http://127.0.0.1:9"}}}
    assert changed(site.play("a b c d", **lost)) == {"a": 0, "b": 0, "c": 0, "d": 1}
    same(site, "d")
    assert site.hub.sent_bytes == sent


def test_the_controller_fetches(site: Site) -> None:
    """Hosts ask no hub at all; the controller keeps what it has for those that come later."""
    own = {
        "model_controller": True,
        "model_controller_port": 28770,
        "model_controller_root": str(site.folder / "controller"),
    }
    assert changed(site.play("a b", arguments=("--check",), **own)) == {"a": 4, "b": 2}
    assert not (site.folder / "controller").exists()
    asked = len(site.hub.requests)
    site.hub.link = Link(2_000_000)
    output = site.play("a b", **own)
    assert re.search(r"^controller owner/tiny: 0\.01 GiB from the hub in \d+ s$", output, re.M), output
    assert len(re.findall(r"^[ab] owner/tiny: 0\.01 GiB from neighbours in \d+ s$", output, re.M)) == 2
    same(site, "a")
    same(site, "b")
    size = 12_000_000 + 40
    assert size <= site.hub.sent_bytes < size * 1.01, "the hub has sent the model once"
    assert sum("/api/models/" in path for _, path, _ in site.hub.requests[asked:]) == 2, "one for each service"
    asked = len(site.hub.requests)
    assert changed(site.play("a b", **own)) == {"a": 0, "b": 0}
    shutil.rmtree(site.root("a"))
    shutil.rmtree(site.root("b"))
    site.play("a b", **own)
    same(site, "b")
    assert len(site.hub.requests) == asked, "from what the controller has kept"


def test_check_mode_on_an_empty_host(site: Site) -> None:
    assert changed(site.play("a", arguments=("--check", "--diff"))) == {"a": 2}
    assert not site.root("a").exists()


def test_changed_by_hand_verified_and_repaired(site: Site) -> None:
    site.play("a b")
    flipped = site.model("b") / "model-1.safetensors"
    data = bytearray(flipped.read_bytes())
    data[5] ^= 4
    flipped.write_bytes(data)
    assert changed(site.play("a b")) == {"a": 0, "b": 0}
    output = " ".join(site.play("a b", fails=True, model_verify="full").split())
    assert "is not as it was fetched (model-1.safetensors: sha256" in output
    assert changed(site.play("a b", model_verify="full", model_repair=True)) == {"a": 0, "b": 1}
    same(site, "b")
    (site.model("b") / "config.json").write_text("{}")
    output = " ".join(site.play("a b", fails=True).split())
    assert "config.json has 2 bytes and not" in output and "give model_repair=true" in output
    assert "TASK [baremetal.vllm.model : Start" not in output, "before anything is changed"
    site.play("a b", model_repair=True)
    same(site, "b")


def test_two_playbooks_at_once(site: Site) -> None:
    site.hub.link = Link(3_000_000)
    first = subprocess.Popen(
        site.command("a"), env=site.environment, cwd=site.folder, stdout=subprocess.PIPE, text=True
    )
    output = site.play("a")
    told, _ = first.communicate(timeout=120)
    assert first.returncode == 0, told
    same(site, "a")
    assert site.hub.sent_bytes < 12_200_000
    assert sum(changed(told).values()) + sum(changed(output).values()) >= 1


def test_gated_without_a_token_is_a_preflight_failure(site: Site) -> None:
    output = " ".join(site.play("a", fails=True, model_token="").split())
    assert "for a gated model accept its licence there and give model_token" in output
    assert not site.root("a").exists()


def test_too_small_a_disk_is_a_preflight_failure(site: Site) -> None:
    output = " ".join(site.play("a", fails=True, model_reserve_mib=10**9).split())
    assert "are needed for owner/tiny and the reserve: make room or set model_root to a larger disk" in output
    assert not site.root("a").exists()


def test_an_old_host(site: Site, pythons: dict[str, str], tool_environment: Callable[..., Path]) -> None:
    """Python 3.6, as on EL 8: fetched without the official client, and told so where only that is wanted."""
    own = next((pythons[version] for version in ("3.11", "3.12", "3.10") if version in pythons), None)
    if not own or "3.6" not in pythons:
        pytest.skip("NOT TESTED on Python 3.6: it needs that, and one of 3.10 to 3.12 for ansible-core 2.16")
    core = tool_environment("ansible-core==2.16.*", python=own)
    old = {"ansible_python_interpreter": pythons["3.6"], "model_client": "auto"}
    for settings, code in (({**old, "model_client": "official"}, 2), (old, 0)):
        command = site.command("a b", **settings)
        command[0] = str(core / "ansible-playbook")
        done = subprocess.run(
            command, env=site.environment, cwd=site.folder, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == code, done.stdout + done.stderr
        if code:
            assert "the official clients need Python 3.10 where this host has 3.6" in " ".join(done.stdout.split())
    same(site, "a")
    same(site, "b")


def test_progress_as_awx_shows_it(site: Site) -> None:
    """Through ansible-runner: lines of plain text, one at most in each interval."""
    site.hub.link = Link(600_000)
    command = site.command("a")
    private = site.folder / "runner"
    for name in ("env", "inventory", "project"):
        (private / name).mkdir(parents=True)
    shutil.copy(site.folder / "play.yml", private / "project/play.yml")
    shutil.copy(site.folder / "hosts.json", private / "inventory/hosts.json")
    shutil.copy(site.folder / "extra.json", private / "env/extravars")
    runner = Path(command[0]).with_name("ansible-runner")
    path = f"{runner.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(runner), "run", str(private), "-p", "play.yml"],
        env={**site.environment, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (stdout,) = (private / "artifacts").glob("*/stdout")
    events = list((private / "artifacts").glob("*/job_events/*.json"))
    assert events and not any(TOKEN in path.read_text() for path in [stdout, *events])
    lines = [line for line in stdout.read_text().splitlines() if "owner/tiny: fetching" in line]
    assert 2 <= len(lines) <= 30
    assert all(re.fullmatch(r"a owner/tiny: fetching \d+ %, [\d.]+ of [\d.]+ GiB(, .*)?", line) for line in lines), (
        lines
    )


def test_progress_in_a_terminal(site: Site) -> None:
    """The lines are the same: plain text that scrolls, whatever else colours its own."""
    site.hub.link = Link(600_000)
    command = shlex.join(site.command("a"))
    environment = {**site.environment, "TERM": "xterm"}
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env=environment,
        cwd=site.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.split("\n") if "owner/tiny: fetching" in line]
    assert len(lines) >= 2
    assert all(
        re.fullmatch(r"a owner/tiny: fetching \d+ %, [\d.]+ of [\d.]+ GiB(, [^\x1b\r]*)?\r?", line) for line in lines
    )
