# SPDX-License-Identifier: GPL-3.0-or-later
"""openai_check against a stand-in for vLLM's server that is broken in each way that a check is there for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import openai_check
from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer, as_events, as_json, chunk
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer

ALL = ["health", "models", "completion", "chat", "stream", "wrong_key", "closed"]
HEALTH, METRICS, MODELS = ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models")
COMPLETION, CHAT = ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with OpenAiServer() as server:
        yield server


@pytest.fixture
def check(
    server: OpenAiServer, run_module: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """check(**params) -> the module's result; the key is never in what it prints."""

    def check(check: bool = False, **params: Any) -> dict[str, Any]:
        if "api_key_file" not in params:
            params.setdefault("api_key", server.key)
        given = {"base_url": f"{server.url}/v1", "model": server.model, "timeout": 2, "closed_paths": ["/metrics"]}
        result = run_module(openai_check, check, **{**given, **params})
        captured = capfd.readouterr()
        assert server.key not in result["text"] + captured.out + captured.err
        return result

    return check


def failing(result: dict[str, Any]) -> list[str]:
    return [one["name"] for one in result["checks"] if not one["ok"]]


def test_all_checks_hold(check: Callable[..., Any], server: OpenAiServer) -> None:
    result = check(closed_paths=["/metrics", "/health", "/tokenize"])
    assert (result["changed"], result["answer"]) == (False, "amber zephyr")
    assert [(one["name"], one["ok"]) for one in result["checks"]] == [(name, True) for name in ALL]
    details = {one["name"]: one["detail"] for one in result["checks"]}
    assert details["models"] == "random-llama"
    assert details["completion"] == "amber anchor"
    assert details["closed"] == "2 paths are closed"  # /health is meant to be open
    assert all(isinstance(one["ms"], int) for one in result["checks"])
    asked = {path for _, path, headers in server.requests if "Authorization" not in headers}
    assert asked == {"/health", "/v1/models", "/metrics", "/tokenize"}


@pytest.mark.parametrize(
    ("broken", "answer", "names", "words"),
    [
        (HEALTH, Answer(500, b"EngineDeadError"), ["health"], "/health: HTTP 500 EngineDeadError"),
        (HEALTH, Answer(hang_up=True), ["health"], "/health: "),
        (HEALTH, Answer(503, b"half of it", cut_at=4), ["health"], "/health: "),
        (MODELS, as_json({"data": [{"id": "gpt"}, {"id": "x"}]}), ["models"], "/models lists gpt, x, not random-llama"),
        (MODELS, as_json({"data": []}), ["models"], "/models lists nothing, not random-llama"),
        (MODELS, Answer(200, b"<html>"), ["models"], "/models: the answer is no JSON: <html>"),
        (MODELS, as_json([]), ["models"], "has not the form of the OpenAI API"),
        (MODELS, as_json({"data": "x"}), ["models"], "has not the form of the OpenAI API"),
        (MODELS, Answer(200, b'{"data": []}', cut_at=5), ["models"], "models: "),
        (COMPLETION, as_json({"choices": [{"text": "  "}]}), ["completion"], "the answer is empty"),
        (COMPLETION, as_json({"choices": []}), ["completion"], "has not the form of the OpenAI API"),
        (COMPLETION, as_json({"choices": ["x"]}), ["completion"], "has not the form of the OpenAI API"),
        (COMPLETION, as_json({"choices": [{"text": ["x"]}]}), ["completion"], "has not the form of the OpenAI API"),
        (COMPLETION, as_json({"error": "CUDA out of memory"}, 500), ["completion"], "HTTP 500 {"),
        (COMPLETION, Answer(200, b"{}", stall_at=1), ["completion"], "completions: "),
        (CHAT, as_json({"choices": [{"message": {"content": None}}]}), ["chat", "stream"], "the answer is empty"),
        (CHAT, as_json({"choices": [{"message": None}]}), ["chat", "stream"], "has not the form of the OpenAI API"),
        (
            METRICS,
            Answer(200, b"vllm:num_requests_running 0"),
            ["closed"],
            "open without the key: GET /metrics: HTTP 200",
        ),
        (METRICS, Answer(422), ["closed"], "GET /metrics: HTTP 422"),
        (("POST", "/metrics"), Answer(405), ["closed"], "open without the key: POST /metrics: HTTP 405"),
        (METRICS, Answer(hang_up=True), ["closed"], "/metrics: "),
    ],
)
def test_what_is_broken_is_seen(
    check: Callable[..., Any],
    server: OpenAiServer,
    broken: tuple[str, str],
    answer: Answer,
    names: list[str],
    words: str,
) -> None:
    server.overrides[broken] = answer
    result = check()
    assert failing(result) == names
    assert result["msg"].startswith(f"{server.url}/v1 does not hold: {names[0]} (")
    assert words in result["msg"]
    assert len(result["checks"]) == len(ALL), "one that fails does not keep the others from being made"


ROLE, WORD, END = chunk(role="assistant", content=""), chunk(content=" amber"), chunk("stop")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (as_events(ROLE, WORD, WORD, END, done=False), "[DONE]"),
        (as_events(ROLE, WORD, {"error": {"message": "engine died", "code": 500}}), "engine died"),
        (as_events({"error": {"message": "engine died"}}), "engine died"),
        (as_events(ROLE, END), "the answer is empty"),
        (as_events(), "the answer is empty"),
        (as_json({"choices": [{"message": {"content": "not a stream"}}]}), "[DONE]"),
        (as_json({"error": "no"}, 400), "HTTP 400"),
        (Answer(200, b"data: {\n\ndata: x\n\ndata: [DONE]\n\n"), "has not the form of the OpenAI API"),
        (Answer(200, as_events(ROLE, WORD, WORD, END).body, cut_at=300), "/chat/completions: "),
    ],
)
def test_a_broken_stream_is_seen(check: Callable[..., Any], server: OpenAiServer, answer: Answer, words: str) -> None:
    server.overrides[CHAT] = answer
    result = check(checks=["stream"])
    assert failing(result) == ["stream"]
    assert words in result["msg"]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_model_that_only_thinks_has_answered(check: Callable[..., Any], server: OpenAiServer, field: str) -> None:
    """vLLM up to 0.11.0 knows reasoning_content alone (vllm/entrypoints/openai/protocol.py)."""
    server.overrides[CHAT] = as_json({"choices": [{"message": {"content": None, field: "Hm."}}]})
    assert check(checks=["chat"])["answer"] == "Hm."
    server.overrides[CHAT] = as_events(chunk(role="assistant"), chunk(**{field: "Hm"}), END)
    assert check(checks=["stream"])["changed"] is False


def test_a_usage_event_has_no_choice(check: Callable[..., Any], server: OpenAiServer) -> None:
    server.overrides[CHAT] = as_events(ROLE, WORD, END, {"choices": [], "usage": {"total_tokens": 3}})
    assert check(checks=["stream"])["changed"] is False


def test_a_server_that_takes_any_key(check: Callable[..., Any], server: OpenAiServer) -> None:
    server.check_key = False
    result = check()
    assert failing(result) == ["wrong_key"]
    assert "/v1/models with a wrong key: HTTP 200, not 401" in result["msg"]


def test_a_server_that_asks_for_no_key(check: Callable[..., Any], server: OpenAiServer) -> None:
    class Odd(OpenAiServer):
        def respond(self, request: Any) -> Answer:
            self.check_key = "Authorization" in request.headers
            return super().respond(request)

    with Odd() as odd:
        result = check(base_url=f"{odd.url}/v1", checks=["wrong_key"])
    assert "/v1/models with no key: HTTP 200, not 401" in result["msg"]


def test_a_server_that_a_host_header_leads_round_the_key(check: Callable[..., Any]) -> None:
    class Old(OpenAiServer):
        def respond(self, request: Any) -> Answer:
            self.check_key = "?" not in request.headers["Host"]
            return super().respond(request)

    with Old() as old:
        result = check(base_url=f"{old.url}/v1", checks=["wrong_key"])
    assert "/v1/models with no key and the Host header 'x?': HTTP 200, not a refusal" in result["msg"]


def test_our_key_is_refused(check: Callable[..., Any]) -> None:
    result = check(api_key="sk-another")
    assert failing(result) == ["models", "completion", "chat", "stream"]
    assert "HTTP 401" in result["msg"]
    assert "sk-another" not in result["text"]


def test_a_server_that_repeats_the_key(check: Callable[..., Any], server: OpenAiServer, tmp_path: Path) -> None:
    for answer in (
        as_json({"error": f"no Bearer {server.key}"}, 500),
        as_json({"choices": [{"message": {"content": server.key}}]}),
    ):
        server.overrides[CHAT] = answer
        check(checks=["chat"])
        (tmp_path / "key").write_text(f"{server.key}\n")
        check(checks=["chat"], api_key_file=str(tmp_path / "key"))  # `check` looks for the key in the output


def test_key_from_a_file(check: Callable[..., Any], server: OpenAiServer, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{server.key}\n")
    assert check(api_key_file=str(tmp_path / "key"))["answer"] == "amber zephyr"


def test_a_key_file_that_is_not_there(check: Callable[..., Any], tmp_path: Path) -> None:
    result = check(api_key_file=str(tmp_path / "key"))
    assert result["msg"] == f"cannot read the API key from {tmp_path}/key: No such file or directory"


@pytest.mark.parametrize("content", ["", "\n", "sk-two\nsk-lines", "sk-two words", "sk-\u2026", b"sk-\xff"])
def test_a_key_that_is_none(
    check: Callable[..., Any], server: OpenAiServer, tmp_path: Path, content: str | bytes
) -> None:
    """HTTP headers hold printable ASCII; an empty key would also blot out the whole output."""
    (tmp_path / "key").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = check(api_key_file=str(tmp_path / "key"))
    assert result["msg"] == f"the API key in {tmp_path}/key is no key: give printable ASCII characters without spaces"
    assert "sk-" not in result["text"]
    assert server.requests == []


def test_a_given_key_that_is_none(check: Callable[..., Any]) -> None:
    result = check(api_key="sk-two words")
    assert result["msg"] == "the API key in api_key is no key: give printable ASCII characters without spaces"


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1:8000/v1", "file:///v1", "/v1", ""])
def test_an_address_that_is_none(check: Callable[..., Any], url: str) -> None:
    assert check(base_url=url)["msg"] == (
        f"base_url is {url!r}: give the address up to and with /v1, such as http://127.0.0.1:8000/v1"
    )


def test_nobody_there(check: Callable[..., Any]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        result = check(base_url=url)
    assert failing(result) == ALL
    assert "Connection refused" in result["msg"]


def test_somebody_else_there(check: Callable[..., Any]) -> None:
    """A port on which no HTTP is spoken."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)

        def greet() -> None:
            for _ in range(2):
                with other.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        result = check(base_url=f"http://127.0.0.1:{other.getsockname()[1]}/v1", checks=["health", "chat"])
    assert failing(result) == ["health", "chat"]


def test_a_proxy_is_not_asked(check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert check()["changed"] is False


def test_check_mode_asks_nothing(check: Callable[..., Any], server: OpenAiServer) -> None:
    assert check(check=True)["skipped"] is True
    assert server.requests == []


def test_both_keys_or_none(run_module: Callable[..., Any]) -> None:
    given = {"base_url": "http://x/v1", "model": "m"}
    assert "one of the following is required: api_key, api_key_file" in run_module(openai_check, **given)["msg"]
    both = run_module(openai_check, **given, api_key="sk-1", api_key_file="/x")
    assert "mutually exclusive" in both["msg"]


def test_what_an_embedder_and_a_reranker_offer(check: Callable[..., Any], server: OpenAiServer) -> None:
    for task, name, words in (("embed", "embeddings", "8 dimensions"), ("score", "rerank", "scores 0.900, 0.800")):
        server.task = task
        result = check(task=task)
        assert [one["name"] for one in result["checks"]] == ["health", "models", name, "wrong_key", "closed"]
        assert {one["name"]: one["detail"] for one in result["checks"]}[name] == words
        assert failing(check(task="generate")) == ["completion", "chat", "stream"]


@pytest.mark.parametrize(
    ("task", "path", "answer"),
    [
        ("embed", "/v1/embeddings", as_json({"data": [{"embedding": [0.5]}]})),
        ("embed", "/v1/embeddings", as_json({"data": [{"embedding": [0.5]}, {"embedding": [0.5, 1]}]})),
        ("embed", "/v1/embeddings", as_json({"data": [{"embedding": [0, 0]}, {"embedding": [0, 0]}]})),
        ("embed", "/v1/embeddings", as_json({"data": [{}, {}]})),
        ("score", "/v1/rerank", as_json({"results": [{"index": 0, "relevance_score": 0.5}]})),
        (
            "score",
            "/v1/rerank",
            as_json({"results": [{"index": 0, "relevance_score": 0.1}, {"index": 1, "relevance_score": 0.5}]}),
        ),
    ],
)
def test_broken_pooling(check: Callable[..., Any], server: OpenAiServer, task: str, path: str, answer: Answer) -> None:
    server.task, server.overrides[("POST", path)] = task, answer
    assert failing(check(task=task)) == ["embeddings" if task == "embed" else "rerank"]


def test_a_model_without_a_chat_template(check: Callable[..., Any], server: OpenAiServer) -> None:
    """A base model completes and does not chat; the words are vLLM's."""
    words = "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat template"
    server.overrides[CHAT] = as_json({"error": {"message": words, "code": 400}}, 400)
    result = check()
    assert result["answer"] == "amber anchor"
    details = {one["name"]: one["detail"] for one in result["checks"]}
    assert details["chat"] == details["stream"] == "not offered: the model has no chat template"


REFUSAL = "Your address is not allowed"


def refused(message: str = REFUSAL, status: int = 403) -> Answer:
    return as_json({"error": {"message": message, "type": "PermissionError", "code": status}}, status)


def test_a_proxy_that_refuses_this_address_is_not_judged(check: Callable[..., Any], server: OpenAiServer) -> None:
    server.refusal = refused()
    result = check(refusal=REFUSAL)
    assert (result["skipped"], result["checks"]) == (True, [])
    assert (
        result["msg"] == result["told"] == f"{server.url}/v1 was not asked: it does not let the address of this host in"
    )
    assert failing(check()), "nobody has said that it may refuse"


@pytest.mark.parametrize(
    "answer",
    [
        refused("The key may not do this"),
        refused(status=404),
        Answer(403, b"<html><h1>403 Forbidden</h1> Your address is not allowed</html>"),
        as_json({"error": REFUSAL}, 403),
        as_json([], 403),
        Answer(hang_up=True),
    ],
)
def test_any_other_refusal_is_a_failure(check: Callable[..., Any], server: OpenAiServer, answer: Answer) -> None:
    server.refusal = answer
    assert {"health", "models"} <= set(failing(check(refusal=REFUSAL)))


def test_with_a_refusal_that_does_not_come(check: Callable[..., Any]) -> None:
    assert check(refusal=REFUSAL)["told"] == ", ".join(ALL)
