# SPDX-License-Identifier: GPL-3.0-or-later
"""Changes of services on one host, with a stand-in for vLLM (tests/fakes/vllm_standin) under the real supervisor.

The tests run in the order in which they stand: each starts from what the one before left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
STANDIN = ROOT / "tests/fakes/vllm_standin"
FAILURE = ROOT / "tests/unit/plugins/modules/captures/vllm_0.32.0_max_model_len.txt"
RECAP = re.compile(r"^here\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)
PORTS = {"one": 18110, "two": 18111}
START_S = 40  # far more than what lies between two starts on a busy machine


class Site:
    """An inventory of one host, this machine, below a folder with a short path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: dict[str, dict[str, Any]] = {
            name: {"port": port, "env": {"MARKER": "a", "STANDIN_START_S": str(START_S)}}
            for name, port in PORTS.items()
        }
        # A disk for data, as hosts have it: the kernel tells the real paths of what works there.
        (folder / "disk").mkdir()
        (folder / "v").mkdir()
        (folder / "v/state").symlink_to("../disk")
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH=$PYTHONPATH:{STANDIN} exec /usr/bin/python3 "$@"\n')
        python.chmod(0o755)

    def variables(self) -> dict[str, Any]:
        entries = [
            {"name": name, "model": "random-llama", "source": "generated", **more}
            for name, more in self.services.items()
        ]
        return {
            "vllm_services": entries,
            "vllm_existing_python": str(self.folder / "python"),
            "vllm_service_manager": "supervisor",
            "vllm_user": "{{ ansible_facts['user_id'] }}",
            **{f"vllm_{name}": str(self.folder / "v" / part) for name, part in
               (("root", ""), ("config_dir", "config"), ("state_dir", "state"), ("log_dir", "log"))},
            "model_root": str(self.folder / "models"),
        }  # fmt: skip

    def command(self, playbook: str, *arguments: str) -> list[str]:
        inventory = self.folder / "hosts.yml"
        host = {
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        inventory.write_text(json.dumps({"all": {"hosts": {"here": host}, "vars": self.variables()}}))
        program = str(ROOT / ".venv/bin/ansible-playbook")
        return [program, playbook, "-i", str(inventory), "--skip-tags", "verify", *arguments]

    def break_off(self, when: Callable[[], bool], *arguments: str) -> None:
        """A run whose every process is killed as soon as this holds."""
        process = subprocess.Popen(
            self.command("site.yml", *arguments),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not when():
            assert process.poll() is None, "the run has ended"
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def play(self, playbook: str = "site.yml", *arguments: str) -> tuple[str, int]:
        """(output, changed); -1 is of a run that failed, whose output has the word failed=1."""
        done = subprocess.run(
            self.command(playbook, *arguments),
            cwd=ROOT,
            env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        match = RECAP.search(done.stdout)
        assert match, done.stdout[-4000:]
        return done.stdout, -1 if int(match[2]) else int(match[1])

    def ask(self, name: str) -> dict[str, Any]:
        key = (self.folder / "v/config" / name / "api_key").read_text().strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.services[name]['port']}/v1/models", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            told: dict[str, Any] = json.load(answer)["data"][0]
        return told


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="bm-") as folder:
        site = Site(Path(folder))
        yield site
        site.play("playbooks/teardown.yml")


def began(pid: int) -> float:
    """Seconds after the boot."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")


def test_services_that_share_nothing_start_together(site: Site) -> None:
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    one, two = (began(site.ask(name)["pid"]) for name in PORTS)
    assert abs(one - two) < START_S, "one waited for the other to answer"
    for name in PORTS:
        took = json.loads((site.folder / "v/config" / name / "measured.json").read_text())["seconds"]
        # What is taken from it is the time that a busy machine needs between a start and the first look at it.
        assert 0.4 * START_S <= took <= 4 * START_S, "from its own start"
    for service in site.services.values():
        del service["env"]["STANDIN_START_S"]
    site.play()


def test_a_second_run_changes_nothing(site: Site) -> None:
    assert json.loads((site.folder / "v/config/one/measured.json").read_text())["measured"]["kv_cache_tokens"] == 131072
    assert site.play()[1] == 0


def test_only_what_changed_restarts_and_another_stands_by(site: Site) -> None:
    before = {name: site.ask(name) for name in PORTS}
    site.services["one"]["env"]["MARKER"] = "b"
    failures, stop = [], threading.Event()

    def client() -> None:
        while not stop.wait(0.05):
            try:
                site.ask("one")
            except OSError as error:
                failures.append(str(error))

    thread = threading.Thread(target=client)
    thread.start()
    output, _ = site.play()
    stop.set()
    thread.join()
    assert "one answered all the time: another server stood by" in output, output[-4000:]
    # A connection that waits in the queue of a socket that is closed is reset; a server that is away fails for seconds.
    assert len(failures) < 5, failures
    assert site.ask("one")["marker"] == "b"
    assert site.ask("two") == before["two"]
    assert not (site.folder / "v/config/one/standby").exists()
    assert site.play()[1] == 0


def test_a_configuration_that_does_not_start_leaves_the_one_before(site: Site) -> None:
    before = {name: site.ask(name) for name in PORTS}
    site.services["two"]["env"] |= {"MARKER": "c", "STANDIN_FAIL": str(FAILURE)}
    output = " ".join(site.play()[0].split())
    assert "failed=1" in output
    assert "two did not start with its new configuration; the one from before runs again. The reason:" in output
    assert "the model's own context is 2048 tokens. Set max_model_len: 2048 of the service" in output
    assert {name: site.ask(name) for name in PORTS} == before, "neither server has even restarted"
    site.services["two"]["env"] = {"MARKER": "a"}
    assert site.play()[1] == 0


# A host with no room for a second server; this machine may have it.
NO_ROOM = ("-e", '{"__vllm_stands_by": false}')


def test_without_room_the_one_before_comes_back(site: Site) -> None:
    before = {name: site.ask(name) for name in PORTS}
    site.services["two"]["env"] = {"MARKER": "d", "STANDIN_FAIL": str(FAILURE)}
    output = " ".join(site.play("site.yml", *NO_ROOM)[0].split())
    assert "failed=1" in output
    assert "two did not start with its new configuration; the one from before runs again. The reason:" in output
    after = {name: site.ask(name) for name in PORTS}
    assert after["one"] == before["one"]
    assert after["two"]["marker"] == "a" and after["two"]["pid"] != before["two"]["pid"]
    site.services["two"]["env"] = {"MARKER": "e"}
    output = " ".join(site.play("site.yml", *NO_ROOM)[0].split())
    assert re.search(r"two was away for \d+ s: the host has no room for a second server beside it", output)
    assert site.ask("two")["marker"] == "e"


def test_a_port_changes_without_a_gap(site: Site) -> None:
    before = site.ask("two")
    site.services["one"]["port"] = 18112
    output = " ".join(site.play()[0].split())
    told = "Until then at http://127.0.0.1:18110, from now on at http://127.0.0.1:18112"
    assert f"one answered all the time: another server stood by. {told}" in output, output[-4000:]
    assert site.ask("one")["marker"] == "b" and site.ask("two") == before
    assert site.play()[1] == 0


def test_a_port_that_cannot_change_stays(site: Site) -> None:
    former = dict(site.services["two"])
    site.services["two"] = {"port": 18113, "env": {"MARKER": "f", "STANDIN_FAIL": str(FAILURE)}}
    output = " ".join(site.play("site.yml", *NO_ROOM)[0].split())
    assert "failed=1" in output
    assert "two did not start with its new configuration; the one from before runs again. The reason:" in output
    site.services["two"] = former
    assert site.ask("two")["marker"] == "e"
    assert site.play()[1] == 0


def test_a_run_that_is_killed_while_another_server_stands_by(site: Site) -> None:
    key, standby = site.folder / "v/config/one/api_key", site.folder / "v/config/one/standby"
    former = key.read_text()
    site.services["one"] |= {"api_key": "sk-rotated", "env": {"MARKER": "g", "STANDIN_START_S": "6"}}
    site.break_off((standby / "env").exists)
    assert (key.read_text(), site.ask("two")["marker"]) == ("sk-rotated\n", "e")
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    assert site.ask("one")["marker"] == "g"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        key.write_text(former)
        site.ask("one")
    key.write_text("sk-rotated\n")
    assert not standby.exists() and not (key.parent / "restart").exists()
    assert (key.parent / "good/api_key").read_text() == "sk-rotated\n"
    assert site.play()[1] == 0


def test_a_run_that_is_killed_before_the_restart(site: Site) -> None:
    site.services["two"]["env"] = {"MARKER": "h"}
    start = site.folder / "v/config/two/env"
    site.break_off(lambda: "MARKER=h" in start.read_text().replace("'", ""), *NO_ROOM)
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    assert site.ask("two")["marker"] == "h"
    site.services["two"]["env"] = {"MARKER": "e"}
    site.play()
    assert site.play()[1] == 0


def test_services_do_not_exchange_their_ports_in_one_run(site: Site) -> None:
    before = {name: site.ask(name) for name in PORTS}
    former = {name: service["port"] for name, service in site.services.items()}
    site.services["one"]["port"], site.services["two"]["port"] = former["two"], former["one"]
    output = " ".join(site.play()[0].split())
    told = "port 18111 of service one is still that of service two, and passes on run by run"
    assert told in output and "failed=1" in output, output[-4000:]
    for name, port in former.items():
        site.services[name]["port"] = port
    assert {name: site.ask(name) for name in PORTS} == before


def test_what_is_not_listed_any_more_is_removed(site: Site) -> None:
    before = site.ask("one")
    site.services["two"]["endpoint_file"] = str(site.folder / "none/first.json")
    output, changed = site.play()
    assert changed == -1 and f"of service two needs a folder {site.folder}/none" in " ".join(output.split())
    copies = [site.folder / "first.json", site.folder / "second.json"]
    for copy in copies:
        site.services["two"]["endpoint_file"] = str(copy)
        assert site.play()[1] > 0
    assert [copy.exists() for copy in copies] == [False, True], "it is told of in one place"
    assert json.loads(copies[1].read_text())["service"] == "two"
    assert site.play()[1] == 0
    del site.services["two"]
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    assert site.ask("one") == before
    assert not (site.folder / "v/config/two").exists() and not copies[1].exists()
    with pytest.raises(OSError):
        site.ask("two")


def test_another_name_on_the_same_port(site: Site) -> None:
    site.services = {"uno": site.services["one"]}
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    assert site.ask("uno")["marker"] == "g"
    assert not (site.folder / "v/config/one").exists()
    assert site.play()[1] == 0


def test_of_several_new_services_one_does_not_start(site: Site) -> None:
    before = site.ask("uno")
    site.services |= {
        "three": {"port": 18114, "env": {"STANDIN_FAIL": str(FAILURE)}},
        "four": {"port": 18115, "env": {"STANDIN_START_S": str(START_S)}},
    }
    output = " ".join(site.play()[0].split())
    assert "failed=1" in output
    assert "three did not start, and there is no configuration of it that worked before: vLLM has ended after" in output
    assert "the model's own context is 2048 tokens. Set max_model_len: 2048 of the service" in output
    assert site.ask("four")["id"] and site.ask("uno") == before
    with pytest.raises(OSError):
        site.ask("three")
    site.services["three"]["env"] = {"MARKER": "g"}
    output, changed = site.play()
    assert changed > 0 and site.ask("three")["marker"] == "g", output[-4000:]
    assert site.play()[1] == 0
