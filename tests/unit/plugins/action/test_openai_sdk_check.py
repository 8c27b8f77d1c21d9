# SPDX-License-Identifier: GPL-3.0-or-later
"""openai_sdk_check: the real openai SDK against a stand-in for vLLM's server, through ansible-playbook and on its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support import ROOT, run

from ansible_collections.baremetal.vllm.plugins.action.openai_sdk_check import CHECKS, Proof, is_own, told
from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer, as_events, as_json, chunk
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer

CHAT = ("POST", "/v1/chat/completions")


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


def prove(
    server: OpenAiServer, task: str = "generate", tool_calls: bool = True, timeout: int = 5
) -> dict[str, tuple[bool, str]]:
    """Name of a check -> whether it held, and what was seen."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, timeout=timeout)
    proof = Proof(client, server.model, tool_calls)
    return {check["name"]: (check["ok"], check["detail"]) for check in map(proof.check, CHECKS[task])}


def failing(server: OpenAiServer, task: str = "generate", tool_calls: bool = True) -> list[str]:
    return [name for name, (ok, _) in prove(server, task, tool_calls).items() if not ok]


@pytest.mark.parametrize("task", list(CHECKS))
def test_standin_that_does_it_all(server: OpenAiServer, task: str) -> None:
    server.task = task
    seen = prove(server, task)
    assert all(ok for ok, _ in seen.values()), seen
    assert seen["wrong_key"] == (True, "refused")
    if task == "generate":
        assert seen["tool_call"][1] == "get_weather(Oslo), then 'amber zephyr'"
    if task == "embed":
        assert seen["embeddings"][1].startswith("8 dimensions; equal texts 1.000")


def test_tool_calls_that_are_none(server: OpenAiServer) -> None:
    server.arguments = "{"
    assert "no JSON" in prove(server)["tool_call"][1]
    server.arguments = '{"city": "Paris"}'
    assert failing(server) == ["tool_call"]
    server.overrides[CHAT] = as_json({"error": {"message": "requires --tool-call-parser to be set"}}, 400)
    seen = prove(server, tool_calls=False)
    assert seen["tool_call"][0]
    assert seen["tool_call"][1].startswith("not offered: ")
    assert not prove(server, tool_calls=True)["tool_call"][0]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize(
    ("thoughts", "room", "seen"),
    [
        (100, 8192, "get_weather(Oslo), then"),
        (1000, 8192, "get_weather(Oslo), then"),
        (1000, 2048, "get_weather(Oslo), then"),
        (3000, 2048, "not judged: the model was still thinking after 1948 tokens"),
        (9000, 16384, "not judged: the model was still thinking after 4096 tokens"),
    ],
)
def test_standin_that_thinks_before_it_calls(
    server: OpenAiServer, thoughts: int, room: int, seen: str, name: str, fails: bool
) -> None:
    """A cut-off among its thoughts is no failure, whichever way the release shows it, and more tokens are given first."""
    server.thoughts, server.thoughts_as, server.max_model_len, server.fails_in_thought = thoughts, name, room, fails
    ok, detail = prove(server)["tool_call"]
    assert ok and detail.startswith(seen), detail
    assert told({"name": "tool_call", "detail": detail}) == "tool_call" + " (not judged)" * detail.startswith("not")


def test_standin_that_thinks_for_longer_than_a_request_may_take(server: OpenAiServer) -> None:
    server.thoughts, server.answers_up_to = 1000, 300
    assert prove(server, timeout=1)["tool_call"] == (
        True,
        "not judged: the model was still thinking after the time that a request has",
    )


def cut_off(**message: Any) -> Answer:
    return as_json({"choices": [{"index": 0, "finish_reason": "length", "message": {"content": None, **message}}]})


def test_other_cut_offs_are_failures(server: OpenAiServer) -> None:
    """Without thoughts, or in the call that came after them. A server that fails at any call is no thinker either."""
    called = [{"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "'}}]
    for answer, words in (
        (cut_off(content=" "), "no tool call"),
        (cut_off(), "no tool call"),
        (cut_off(reasoning="hmm", tool_calls=called), "no JSON"),
        (Answer(500, b"EngineDeadError"), "500"),
    ):
        server.overrides[CHAT] = answer
        ok, detail = prove(server)["tool_call"]
        assert not ok and words in detail, detail


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (as_events(chunk(role="assistant", content=""), chunk(content="amber")), ["chat", "stream", "tool_call"]),
        (as_events(chunk(content="amber"), {"error": {"message": "engine died"}}), ["chat", "stream", "tool_call"]),
        (as_json({"choices": [{"message": {"content": None}}]}), ["chat", "stream", "tool_call"]),
        (Answer(500, b"EngineDeadError"), ["chat", "stream", "tool_call"]),
        (Answer(hang_up=True), ["chat", "stream", "tool_call"]),
    ],
)
def test_broken_chats_are_seen(server: OpenAiServer, answer: Answer, names: list[str]) -> None:
    server.overrides[CHAT] = answer
    assert failing(server) == names


def test_broken_pooling_is_seen(server: OpenAiServer) -> None:
    server.task = "embed"
    flat = [{"index": index, "embedding": [1.0, 1.0]} for index in range(3)]
    for data in (flat, flat[:2], [*flat[:2], {"index": 2, "embedding": [1.0]}]):
        server.overrides[("POST", "/v1/embeddings")] = as_json({"data": data, "model": "m"})
        assert failing(server, "embed") == ["embeddings"]
    server.task = "score"
    for scores in ([(0, 0.1), (1, 0.9)], [(0, 0.5)], [(0, 0.5), (0, 0.4)]):
        results = [{"index": index, "relevance_score": score} for index, score in scores]
        server.overrides[("POST", "/v1/rerank")] = as_json({"results": results})
        assert failing(server, "score") == ["rerank"]


def test_a_server_that_takes_any_key(server: OpenAiServer) -> None:
    server.check_key = False
    assert failing(server) == ["wrong_key"]


def test_own_addresses() -> None:
    assert [is_own(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost")] == [True] * 4
    assert [is_own(host) for host in ("10.0.0.1", "0.0.0.0", "gpu1", "fe80::1")] == [False] * 4


def play(tmp_path: Path, server: OpenAiServer, *arguments: str, connection: str = "local", **params: Any) -> str:
    """Output of a playbook that asks the server, as verbose as it gets. The key is never in it."""
    (tmp_path / "key").write_text(f"{server.key}\n")
    given = {"base_url": f"{server.url}/v1", "api_key_file": str(tmp_path / "key"), "model": server.model, **params}
    tasks = [{"baremetal.vllm.openai_sdk_check": given, "register": "seen"}, {"ansible.builtin.debug": {"var": "seen"}}]
    host = {"ansible_connection": connection, "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
    play = {"hosts": "all", "gather_facts": False, "vars": host, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = ["ansible-playbook", "-i", "one,", tmp_path / "play.yml", *arguments]
    done = run(command, ROOT, ANSIBLE_CONFIG=str(ROOT / "ansible.cfg"), ANSIBLE_NOCOLOR="1")
    assert server.key not in done.stdout
    return done.stdout


def test_through_ansible(tmp_path: Path, server: OpenAiServer) -> None:
    output = play(tmp_path, server, "-vvvv", "--diff")
    assert "failed=0" in output
    assert "via: direct" in output
    assert "told: models, completion, chat, stream, tool_call, wrong_key" in output
    assert f"sdk: {openai.__version__}" in output
    server.overrides[CHAT] = as_json({"error": f"no Bearer {server.key}"}, 500)
    assert "does not hold for the openai SDK: chat (" in " ".join(play(tmp_path, server).split())


REFUSAL = "Your address is not allowed"


def test_a_proxy_that_refuses_this_address_is_not_judged(tmp_path: Path, server: OpenAiServer) -> None:
    """By its own message, where that may come: any other refusal is a failure, and so is this one with required."""
    server.refusal = as_json({"error": {"message": REFUSAL, "type": "PermissionError", "code": 403}}, 403)
    output = play(tmp_path, server, refusal=REFUSAL)
    assert "skipped=1" in output and "failed=0" in output
    assert f"{server.url}/v1 was not asked: it does not let the address in" in " ".join(output.split())
    for params in ({}, {"refusal": "another"}, {"refusal": REFUSAL, "required": True}):
        assert "failed=1" in play(tmp_path, server, **params)


def test_nothing_is_asked_in_check_mode(tmp_path: Path, server: OpenAiServer) -> None:
    assert "skipped=1" in play(tmp_path, server, "--check")
    assert server.requests == []


def test_bad_input(tmp_path: Path, server: OpenAiServer) -> None:
    assert "give the address up to and with /v1" in " ".join(play(tmp_path, server, base_url=server.url).split())
    assert "cannot read /no/such/file" in " ".join(play(tmp_path, server, api_key_file="/no/such/file").split())
