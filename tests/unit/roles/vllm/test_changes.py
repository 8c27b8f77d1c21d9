# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role does when the new configuration of a service does not start: its own tasks, with a stand-in for supervisorctl."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run

from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer

NOBODY = "http://127.0.0.1:9"
OLD = {
    "venv": {"api_key": "sk-old\n", "env": "OLD=1\n", "start.sh": "old venv\n", "plan.json": "{}\n", "unit": "old unit\n"},
    "container": {
        "api_key": "sk-old\n", "env": "OLD=1\n", "start.sh": "old container\n", "serve.sh": "old serve\n", "plan.json": "{}\n",
        "unit": "old unit\n",
    },
}  # fmt: skip


# As the real one, update says nothing and starts nothing where the program is the one that it knows.
SUPERVISORCTL = """#!/bin/sh
echo "$@" >>"$0.log"
case "$1" in
  status) echo RUNNING ;;
  update) [ ! -e {unit} ] || cmp -s {unit} "$0.knows" || {{ cp {unit} "$0.knows"; echo "$2: updated process group"; }} ;;
esac
"""


class Host:
    """A folder that stands for a host, and the role's variables for one service on it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.config = folder, folder / "config/chat"
        self.good = self.config / "good"
        self.arguments: list[str] = []  # of ansible-playbook
        self.good.mkdir(parents=True)
        (folder / "home").mkdir()
        self.unit = folder / "chat.conf"
        supervisorctl = folder / "supervisorctl"
        supervisorctl.write_text(SUPERVISORCTL.format(unit=self.unit))
        supervisorctl.chmod(0o755)
        self.svc: dict[str, Any] = {
            "name": "chat", "unit": "vllm-chat", "runtime": "venv", "venv": None, "standby": {"unit_file": "/nowhere"},
            "span": None, "headless": False, "restart_file": str(self.config / "restart"),
            "config_dir": str(self.config), "state_dir": str(folder / "home/chat"), "unit_file": str(self.unit),
            "api_key_file": str(self.config / "api_key"), "root_url": url, "model_path": "", "start_timeout": 20,
            "pid_command": ["echo", "77"], "log_command": ["echo", "INFO"], "planned": {},
        }  # fmt: skip

    def write(self, folder: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    def tasks(self, name: str, **variables: Any) -> str:
        """Runs a file of the role's tasks; its output in one line."""
        me = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
        given = {
            "svc": self.svc, "vllm_user": me, "__vllm_user_id": me, "__vllm_manager": "supervisor",
            "__vllm_supervisorctl": [str(self.folder / "supervisorctl")], "vllm_state_dir": str(self.folder / "home"),
            "__vllm_records": {"files": {}}, "__vllm_begun": {}, **variables,
        }  # fmt: skip
        begin = {"ansible.builtin.set_fact": {"__vllm_failures": []}}
        end = {"ansible.builtin.debug": {"msg": "failures: {{ __vllm_failures | join(' + ') }}"}}
        include = {"name": "baremetal.vllm.vllm", "tasks_from": name}
        tasks = [begin, {"ansible.builtin.include_role": include, "vars": given}, end]
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
        (self.folder / "play.yml").write_text(json.dumps([play]))
        command = ["ansible-playbook", "-i", "localhost,", self.folder / "play.yml", *self.arguments]
        done = run(command, ROOT, ANSIBLE_NOCOLOR="1", ANSIBLE_PYTHON_INTERPRETER=sys.executable)
        return " ".join(done.stdout.split())


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """What answers works in the service's folder, as its server does."""
    with OpenAiServer() as server:
        host = Host(tmp_path, server.url)
        (tmp_path / "home/chat").mkdir()
        monkeypatch.chdir(tmp_path / "home/chat")
        yield host


@pytest.mark.parametrize(("before", "after"), [("venv", "container"), ("container", "venv"), ("venv", "venv")])
def test_what_the_former_runtime_ran_with_comes_back(host: Host, before: str, after: str) -> None:
    host.write(host.good, OLD[before])
    host.write(host.config, {name: f"new {name}\n" for name in OLD[after] if name not in ("unit", "api_key")})
    host.unit.write_text("new unit\n")
    host.svc["runtime"] = after
    output = host.tasks("restore", __vllm_reason="no such image", __vllm_away_since="1")
    told = "failures: chat did not start with its new configuration; the one from before runs again. The reason: no such image"
    assert told in output, output[-3000:]
    there = {path.name: path.read_text() for path in host.config.iterdir() if path.is_file()}
    assert there == {name: text for name, text in OLD[before].items() if name != "unit"}
    assert host.unit.read_text() == "old unit\n"
    assert oct(host.config.stat().st_mode)[-3:] == ("711" if before == "container" else "700")
    assert "update vllm-chat" in (host.folder / "supervisorctl.log").read_text()


def told_at(host: Host, url: str) -> dict[str, Any]:
    """What a run has read first, on a host whose clients were told of this address."""
    return {"files": {str(host.config / "endpoint.json"): json.dumps({"base_url": f"{url}/v1"}, indent=4) + "\n"}}


def test_what_comes_back_is_asked_and_told_of_at_its_former_address(host: Host) -> None:
    host.write(host.good, OLD["venv"])
    records = told_at(host, host.svc["root_url"])
    (host.config / "endpoint.json").write_text("new\n")
    host.svc |= {"root_url": NOBODY, "start_timeout": 1}
    output = host.tasks("restore", __vllm_reason="no luck", __vllm_away_since="1", __vllm_records=records)
    assert "failures: chat did not start with its new configuration; the one from before runs again." in output, output[
        -3000:
    ]
    assert {str(host.config / "endpoint.json"): (host.config / "endpoint.json").read_text()} == records["files"]


# ---- the whole of a service's change, with files that need no template ----


def change(host: Host, room: bool = False, **variables: Any) -> str:
    start = host.config / "start.sh"
    owner = {"owner": "{{ __vllm_user_id }}", "mode": "0600"}
    given = {
        "__vllm_name": "chat", "__vllm_all": [host.svc], "__vllm_differs": True, "__vllm_runs": True, "__vllm_given_key": "sk-new",
        "__vllm_run_files": [{"path": str(start), "content": "new\n", **owner}],
        "__vllm_unit_file": {"path": str(host.unit), "content": "new unit\n", **owner},
        "__vllm_told_files": [],
        "__vllm_wait_for": {
            "url": f"{host.svc['root_url']}/health", "pid_command": ["echo", "77"], "log_command": ["echo", "ValueError: no luck"],
            "timeout": 1,
        },
        "__vllm_probe": {"fingerprints": {str(host.config / "endpoint.json"): "", str(host.unit): ""}},
        "__vllm_readiness": {"missing": []},
    }  # fmt: skip
    host.svc |= {"room": room, "endpoint_files": [str(host.config / "endpoint.json")]}
    return host.tasks("service", **given | variables)


def test_a_service_that_does_not_start_ends_no_run(host: Host) -> None:
    host.svc["root_url"] = NOBODY
    output = change(host)
    assert (
        "failures: chat did not start, and there is no configuration of it that worked before: vLLM does not answer"
        in output
    )
    assert "stop vllm-chat" in (host.folder / "supervisorctl.log").read_text()
    assert "failed=0" in output and not list(host.good.iterdir())


def test_when_neither_starts_both_reasons_are_told(host: Host) -> None:
    host.svc |= {"root_url": NOBODY, "start_timeout": 1}
    host.write(host.good, OLD["venv"])
    output = change(host)
    assert (
        "failures: chat did not start with its new configuration, and does not run again as before (vLLM does not answer"
        in output
    )
    assert "failed=0" in output


def test_what_works_is_kept(host: Host) -> None:
    host.write(host.good, {"serve.sh": "of the runtime before\n"})
    output = change(host)
    assert "failed=0" in output and "did not start" not in output, output[-3000:]
    assert {path.name: path.read_text() for path in host.good.iterdir()} == {
        "api_key": "sk-new\n", "start.sh": "new\n", "unit": "new unit\n",
    }  # fmt: skip


def test_what_a_start_measured_is_kept_while_the_server_goes_on(host: Host) -> None:
    """Whatever else of its host differs: by then its log holds the lines of requests alone."""
    path, figures = host.config / "measured.json", "INFO GPU KV cache size: 845,104 tokens"

    def measured(differs: bool, log: str, changed: str = "") -> Any:
        wait = {"url": f"{host.svc['root_url']}/health", "pid_command": ["echo", "77"], "log_command": ["echo", log]}
        output = change(host, __vllm_differs=differs, __vllm_wait_for=wait)
        assert "failed=0" in output and "did not start" not in output and changed in output, output[-3000:]
        return json.loads(path.read_text()) if path.exists() else None

    started = measured(True, figures)
    assert started["measured"]["kv_cache_tokens"] == 845104 and "seconds" in started
    assert measured(False, "INFO GET /health", "changed=0") == started
    path.unlink()
    assert measured(False, "INFO GET /health", "changed=0") is None
    assert measured(False, figures) == {"service": "chat", "planned": {}, "measured": started["measured"]}
    assert measured(True, "INFO GET /health")["measured"] == {}


def test_of_a_service_over_several_hosts_nothing_is_put_back(host: Host) -> None:
    """What it was on one host before is not started in its place, and the message says how to get it back."""
    host.svc |= {"root_url": NOBODY, "span": {"hosts": ["one", "two"]}}
    host.write(host.good, OLD["venv"])
    record = {"pins": {"engine_version": "0.25.1", "hosts": ["one", "two"]}}
    output = change(
        host,
        __vllm_probe={"fingerprints": {str(host.config / "endpoint.json"): "sum 0644 root"}},
        __vllm_records={"files": {str(host.config / "plan.json"): json.dumps(record)}},
    )
    assert (
        "failures: chat did not start with its new configuration and is stopped, and nothing was put back" in output
    ), output[-3000:]
    assert '\\"engine_version\\": \\"0.25.1\\"' in output or '"engine_version": "0.25.1"' in output
    assert (
        "undo the change in the inventory and run site.yml, and it runs so again. The reason: vLLM does not answer"
        in output
    )
    assert not host.good.exists()
    assert (host.config / "start.sh").read_text() == "new\n"


def test_a_server_that_hangs_is_restarted_by_what_comes_back(host: Host) -> None:
    """Its program is the same, so that the supervisor sees nothing to update."""
    host.write(host.good, {**OLD["venv"], "unit": "new unit\n"})
    host.unit.write_text("new unit\n")
    (host.folder / "supervisorctl.knows").write_text("new unit\n")
    host.svc |= {"start_timeout": 5}
    wait = {"url": f"{NOBODY}/health", "pid_command": ["echo", "77"], "log_command": ["true"], "timeout": 1}
    output = change(host, __vllm_wait_for=wait)
    assert "the one from before runs again" in output, output[-3000:]
    assert (host.folder / "supervisorctl.log").read_text().splitlines().count("restart vllm-chat") == 2
    assert not (host.config / "restart").exists()


def test_a_run_that_ends_leaves_a_note_for_the_next(host: Host) -> None:
    """Here it ends as one that is killed: nothing is put back, and nothing is told."""
    note = host.config / "restart"
    host.write(host.config, {"env": "OLD=1\n"})
    # Before the restart, when the settings lie there: what the start is asked by is no program.
    supervisorctl = [str(host.folder / "kill"), "{{ lookup('ansible.builtin.pipe', 'echo $PPID') }}"]
    (host.folder / "kill").write_text("#!/bin/sh\nkill -KILL $1\n")
    (host.folder / "kill").chmod(0o755)
    output = change(host, __vllm_supervisorctl=supervisorctl)
    assert (host.config / "start.sh").read_text() == "new\n" and note.exists(), output[-3000:]
    prints = {
        str(note): "sum 0600 root",
        str(host.config / "endpoint.json"): "sum 0644 root",
        host.svc["api_key_file"]: "sum",
    }
    output = change(host, __vllm_differs="{{ __vllm_noted }}", __vllm_probe={"fingerprints": prints})
    assert "failures: chat" not in output and "failed=0" in output, output[-3000:]
    assert not note.exists()


def test_a_server_that_stood_by_when_a_run_ended_goes_with_the_next(host: Host) -> None:
    (host.config / "standby").mkdir()
    host.svc["standby"] = {
        "unit": "vllm-chat-standby", "unit_file": str(host.folder / "standby.conf"), "config_dir": str(host.config / "standby"),
        "state_dir": str(host.folder / "home/chat/standby"), "log_file": str(host.folder / "standby.log"),
    }  # fmt: skip
    prints = {host.svc["standby"]["unit_file"]: "sum 0644 root", host.svc["api_key_file"]: "sum"}
    output = change(host, __vllm_differs=False, __vllm_probe={"fingerprints": prints})
    assert "failures: chat" not in output and "failed=0" in output, output[-3000:]
    assert not (host.config / "standby").exists()
    assert "restart vllm-chat" not in (host.folder / "supervisorctl.log").read_text()


def test_a_failure_of_one_of_several_items_is_told(host: Host) -> None:
    """A task with a loop says of itself that one or more items failed."""
    told = {
        "path": str(host.folder / "nowhere/dd.json"),
        "content": "{}",
        "owner": "{{ __vllm_user_id }}",
        "mode": "0644",
    }
    output = change(host, __vllm_told_files=[told])
    assert "failures: chat did not start" in output and "Destination directory" in output and "does not exist" in output
    assert (
        "failures: chat did not start, and there is no configuration of it that worked before: One or more"
        not in output
    )


def stand_by(host: Host, log: str) -> str:
    """A change with room for a second server, which says this and does not start; its service itself would."""
    host.svc |= {"room": True, "standby": {
        **host.svc, "unit": "vllm-chat-standby", "config_dir": str(host.config / "standby"), "root_url": NOBODY,
        "log_file": str(host.folder / "standby.log"), "log_command": ["echo", log],
    }}  # fmt: skip
    del host.svc["standby"]["standby"]
    wait = {
        "url": "{{ svc.root_url }}/health",
        "pid_command": ["echo", "77"],
        "log_command": "{{ svc.log_command }}",
        "timeout": 1,
    }
    (host.config / "standby").mkdir()
    return change(host, room=True, __vllm_by_plan=[{"name": "chat", "room": True}], __vllm_wait_for=wait)


def test_a_second_server_without_room_is_done_without(host: Host) -> None:
    output = stand_by(host, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB")
    assert (
        "chat is restarted with no other server to stand by, for which there was no room: vLLM does not answer"
        in output
    ), output[-3000:]
    assert "CUDA out of memory" in output and "chat was away for" in output
    assert "failures: chat" not in output and "failed=0" in output
    assert (host.good / "start.sh").read_text() == "new\n" and not (host.config / "standby").exists()


@pytest.mark.parametrize(
    "log",
    [
        "error: unrecognized arguments: --no-such",
        "ValueError: To serve at least one request with the models's max seq len (131072), (7.00 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (2.10 GiB).",
    ],
    ids=["flag", "cache"],
)
def test_a_second_server_that_cannot_start_anywhere_leaves_the_first_alone(host: Host, log: str) -> None:
    host.write(host.good, OLD["venv"])
    output = stand_by(host, log)
    assert (
        "failures: chat did not start with its new configuration; the one from before runs again. The reason:" in output
    ), output[-3000:]
    asked = (host.folder / "supervisorctl.log").read_text().splitlines()
    assert asked and not [line for line in asked if line.endswith(" vllm-chat")]


def test_another_address_is_told_with_the_time_away(host: Host) -> None:
    output = change(host, __vllm_records=told_at(host, NOBODY))
    told = f"room for a second server beside it. Until then at {NOBODY}, from now on at {host.svc['root_url']}"
    assert "chat was away for" in output and told in output, output[-3000:]


FORMER, LATTER = "daemon", "nobody"  # users that every distribution has


def owners(host: Host) -> dict[str, str]:
    paths = [
        path
        for path in [host.config, *host.config.rglob("*"), *(host.folder / "home").rglob("*")]
        if host.good not in path.parents
    ]
    return {str(path.relative_to(host.folder)): pwd.getpwuid(path.lstat().st_uid).pw_name for path in paths}


@pytest.fixture
def former(host: Host) -> dict[str, str]:
    """Whose everything is, before a change: FORMER's, but for what others have put there."""
    home, cache = host.folder / "home", host.folder / "home/chat/cache"
    for folder in (cache, home / ".triton", home / "other"):
        folder.mkdir(parents=True, exist_ok=True)
    host.write(host.good, OLD["venv"])
    host.write(host.config, {**OLD["venv"], "cluster_token": "1\n"})
    for path in (
        cache / "kernel",
        home / ".triton/kernel",
        home / "other/kernel",
        host.folder / "models",
        cache / "roots",
    ):
        path.touch()
    (cache / "link").symlink_to(host.folder / "models")
    everything = [host.config, *host.config.rglob("*"), home, *home.rglob("*"), host.folder / "models"]
    for path in everything:
        if path.name not in ("good", "roots", "plan.json"):
            os.lchown(path, pwd.getpwnam(FORMER).pw_uid, -1)
    return owners(host)


def of_another_user(host: Host, user: str = LATTER, there: bool = True) -> str:
    fingerprints = {str(host.unit): "sum 0644 root", str(host.config / "env"): f"sum 0600 {FORMER}"}
    owner = {"owner": "{{ __vllm_owner }}", "mode": "0600"}
    files = [{"path": str(host.config / name), "content": "new\n", **owner} for name in ("start.sh", "env")]
    fingerprints[str(host.config / "endpoint.json")] = ""
    return change(
        host,
        room=True,
        vllm_user=user,
        __vllm_given_key="",
        __vllm_run_files=files,
        __vllm_probe={"fingerprints": fingerprints, "users": [user] if there else []},
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_another_user_gets_what_the_former_one_had(host: Host, former: dict[str, str]) -> None:
    output = of_another_user(host)
    assert "another user runs it now" in output and "failures: chat" not in output, output[-3000:]
    assert "stop vllm-chat" in (host.folder / "supervisorctl.log").read_text().splitlines()[0]
    new = {path: LATTER if owner == FORMER and "other" not in path else owner for path, owner in former.items()}
    assert owners(host) == {**new, "config/chat/measured.json": "root"}
    assert (host.folder / "models").owner() == FORMER
    assert (host.good / "env").owner() == LATTER


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_the_former_user_gets_it_back(host: Host, former: dict[str, str]) -> None:
    host.svc |= {"root_url": NOBODY, "start_timeout": 1}
    output = of_another_user(host)
    assert "failures: chat did not start with its new configuration, and does not run again as before" in output
    assert owners(host) == {**former, "config/chat/restart": "root"}  # it does not run, so that the next run starts it
    assert (host.folder / "home").owner() == FORMER and (host.good / "env").owner() == FORMER


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
def test_check_mode_tells_of_a_user_that_is_still_to_be_made(host: Host, former: dict[str, str]) -> None:
    host.unit.write_text("old unit\n")
    host.arguments = ["--check"]
    output = of_another_user(host, "nobody-has-this-name", there=False)
    assert "failed=0" in output and "rescued=0" in output and "failures: chat" not in output, output[-3000:]
    assert re.search(r"Write the unit of vllm-chat\] \*+ changed", output)
    assert owners(host) == former
