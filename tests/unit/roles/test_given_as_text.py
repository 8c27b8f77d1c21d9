# SPDX-License-Identifier: GPL-3.0-or-later
"""Values as -e name=value, a survey of AWX and an INI inventory give them: "false" and "120" are text. Which uses of options would
take them for granted is told by tests/quality/test_roles.py; here is what came of the worst of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, run


def task(file: str, name: str) -> dict[str, Any]:
    """One task of a role."""
    (found,) = [one for one in yaml.safe_load((ROOT / "roles" / file).read_text()) if one["name"] == name]
    return dict(found)


@pytest.mark.parametrize(("said", "kept"), [("false", True), ("no", True), ("true", False), ("yes", False)])
def test_teardown_removes_data_by_consent_alone(tmp_path: Path, said: str, kept: bool) -> None:
    """The role's own task, by the answers that AWX sends, too."""
    folders = {f"vllm_{name}": str(tmp_path / name) for name in ("root", "config_dir", "state_dir", "log_dir")}
    data = [tmp_path / "root/venvs/a", *(tmp_path / name / "a" for name in ("config_dir", "state_dir", "log_dir"))]
    for folder in data:
        folder.mkdir(parents=True)
    play = {
        "hosts": "localhost", "connection": "local", "gather_facts": False, "vars": folders,
        "tasks": [task("vllm/tasks/teardown.yml", "Remove all data")],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = ["ansible-playbook", "-i", "localhost,", tmp_path / "play.yml", "-e", f"vllm_teardown_remove_data={said}"]
    done = run(command, ROOT, ANSIBLE_NOCOLOR="1", ANSIBLE_PYTHON_INTERPRETER=sys.executable)
    assert done.returncode == 0, done.stdout
    assert [folder.exists() for folder in data] == [kept] * len(data)


@pytest.mark.parametrize(("said", "records"), [("false", []), ("true", [{"/etc/vllm/chat/plan.json": "{}"}])])
def test_plans_are_kept_as_asked(render: Callable[..., Any], said: str, records: list[dict[str, str]]) -> None:
    here = {"__vllm_records": {"files": {"/etc/vllm/chat/plan.json": "{}"}}}
    words = task("vllm/tasks/plan.yml", "Plan the services")["vars"]
    given = {"ansible_play_hosts": ["one"], "hostvars": {"one": here}, "vllm_keep_plan": said}
    known = list(render(words["__vllm_known"], **given))
    assert known == [{"/etc/vllm/chat/plan.json": "{}"}]
    assert list(render(words["__vllm_kept"], **given, __vllm_known=known)) == records


@pytest.mark.parametrize(
    ("port", "address"), [(8080, "127.0.0.1:8080"), ("8080", "127.0.0.1:8080"), ("10.0.0.1:8080",) * 2]
)
def test_ports_of_dify_are_numbers_or_text(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], port: Any, address: str
) -> None:
    said = role_vars("dify", "main") | {"dify_http_port": port}
    looked = task("dify/tasks/preflight.yml", "Look at the host")["baremetal.vllm.host_probe"]["ports"]
    assert list(render(looked, **said)) == [8080, 443]
    assert render("{{ __dify_address }}", **said) == f"http://{address}"


@pytest.mark.parametrize("said", [[1, 4], ["1", "4"], "1,4"])
def test_numbers_of_clients(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], said: Any) -> None:
    settings = render("{{ __bench_settings }}", **role_vars("bench", "main") | {"bench_concurrency": said})
    assert settings["concurrency"] == [1, 4]


@pytest.mark.parametrize(("said", "key"), [(123456, "123456"), ("sk-x", "sk-x"), ("", ""), (None, "")])
def test_a_key_of_digits_is_one(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], said: Any, key: str
) -> None:
    given = {"svc": {"name": "chat"}, "vllm_services": [{"name": "chat", "model": "m"}], "vllm_api_key": said}
    assert render("{{ __vllm_given_key }}", **role_vars("vllm", "main") | given) == key


@pytest.mark.parametrize(("said", "tls"), [(False, "off"), ("False", "off"), ("off", "off"), ("given", "given")])
def test_tls_switched_off(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], said: Any, tls: str
) -> None:
    assert render("{{ __proxy_tls }}", **role_vars("proxy", "main") | {"proxy_tls": said}) == tls


@pytest.mark.parametrize("said", [["chat", "embed"], "chat,embed"])
def test_names_of_services(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]], said: Any) -> None:
    assert render("{{ __bench_names }}", **role_vars("bench", "main") | {"bench_services": said}) == ["chat", "embed"]
