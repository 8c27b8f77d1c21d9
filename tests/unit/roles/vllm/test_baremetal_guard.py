# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard as an ASGI middleware, and in front of the kind of application and server that vLLM is."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GUARD = Path(__file__).parents[4] / "roles/vllm/files/baremetal_guard.py"
OPEN_PATHS = "/health /ping"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("BAREMETAL_OPEN_PATHS", OPEN_PATHS)
    spec = importlib.util.spec_from_file_location("baremetal_guard", GUARD)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(guard: ModuleType) -> Callable[..., tuple[bool, list[dict[str, Any]]]]:
    """call(**scope) -> (whether the application was reached, what was sent)."""

    def call(**scope: Any) -> tuple[bool, list[dict[str, Any]]]:
        reached: list[Any] = []
        sent: list[dict[str, Any]] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {}

        asyncio.run(guard.PathGuard(application)(scope, receive, send))
        return reached == [scope], sent

    return call


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/v1/", "/health", "/ping"])
def test_open(call: Callable[..., Any], path: str) -> None:
    assert call(type="http", path=path) == (True, [])


CLOSED = [
    "/",
    "",
    "/metrics",
    "/tokenize",
    "/v1",
    "/v2/rerank",
    "/v10/models",
    "/V1/models",
    "//v1/models",
    "v1/models",
    "/inference/v1/generate",
    "/health/",
    "/health/../metrics",
    "/healthz",
    "/HEALTH",
    "/ping /metrics",
    "/health /ping",
    "http://x/v1/models",
]


@pytest.mark.parametrize("path", CLOSED)
def test_closed(call: Callable[..., Any], path: str) -> None:
    reached, (start, body) = call(type="http", path=path)
    assert not reached
    assert start["status"] == 404
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"])["error"]["code"] == 404


@pytest.mark.parametrize("host", [b"h", b"h:8000", b"10.0.0.1:8000", b"[::1]:8000", b"[fe80::1%eth0]", b"a_b.c-d", b""])
def test_a_host(call: Callable[..., Any], host: bytes) -> None:
    assert call(type="http", path="/v1/models", headers=[(b"host", host)]) == (True, [])


@pytest.mark.parametrize("host", [b"x?", b"x#", b"x/y?", b"x/", b"a@b", b"x\\y", b"x y", b"x\n", "ä".encode()])
def test_a_host_that_is_none(call: Callable[..., Any], host: bytes) -> None:
    reached, (start, body) = call(type="http", path="/v1/models", headers=[(b"host", b"x"), (b"host", host)])
    assert not reached
    assert start["status"] == json.loads(body["body"])["error"]["code"] == 400
    assert call(type="websocket", path="/v1/realtime", headers=[(b"host", host)])[0] is False


def test_a_websocket_is_closed_but_below_v1(call: Callable[..., Any]) -> None:
    assert call(type="websocket", path="/control") == (False, [{"type": "websocket.close", "code": 1008}])
    assert call(type="websocket", path="/v1/realtime") == (True, [])


def test_the_start_of_the_server_passes(call: Callable[..., Any]) -> None:
    assert call(type="lifespan") == (True, [])


def test_without_its_setting_the_server_does_not_start(guard: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAREMETAL_OPEN_PATHS")
    with pytest.raises(KeyError, match="BAREMETAL_OPEN_PATHS"):
        guard.PathGuard(None)


SERVER = """
import sys
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from baremetal_guard import PathGuard

async def answer(request):
    return PlainTextResponse("reached " + request.scope["path"])

class Key:
    # As vLLM before 0.22 asks for the key.
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        guarded = scope["type"] == "http" and URL(scope=scope).path.startswith("/v1/keyed")
        if guarded and b"Bearer right" not in dict(scope["headers"]).get(b"authorization", b""):
            await PlainTextResponse("no key", 401)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

async def talk(socket):
    await socket.accept()
    await socket.send_text("reached")
    await socket.close()

paths = ["/metrics", "/health", "/v1/models", "/v1/keyed", "/v1", "/pause/{rest:path}", "/"]
routes = [Route(path, answer, methods=["GET", "POST"]) for path in paths]
application = Starlette(routes=[*routes, WebSocketRoute("/control", talk), WebSocketRoute("/v1/realtime", talk)])
application.add_middleware(Key)
application.add_middleware(PathGuard)
uvicorn.run(application, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture(scope="module")
def port(tool_environment: Callable[..., Path]) -> Iterator[int]:
    """Port of a real server, with the parser that vLLM's has, and with routes which must not be reached."""
    # A Starlette that reads a path out of the Host header.
    python = tool_environment("starlette==0.46.2", "uvicorn[standard]>=0.30") / "python"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(GUARD.parent), "BAREMETAL_OPEN_PATHS": OPEN_PATHS}
    process = subprocess.Popen([python, "-B", "-c", SERVER, str(port)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        time.sleep(0.05)
    yield port
    process.terminate()
    errors = process.communicate()[1].decode()
    assert "Error" not in errors, errors


def ask(port: int, target: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """The target goes over the wire as it is: clients that clean it up are not those to fear."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, "/", skip_host="Host" in headers)
    connection._buffer[0] = f"{method} {target} HTTP/1.1".encode("latin-1")  # type: ignore[attr-defined]
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.mark.client
class TestBehindARealServer:
    @pytest.mark.parametrize("target", ["/v1/models", "/health", "/v1/models?path=/metrics", "/%76%31/models"])
    def test_open(self, port: int, target: str) -> None:
        status, text = ask(port, target)
        assert status == 200
        assert text.startswith("reached ")

    @pytest.mark.parametrize(
        "target",
        [
            "/",
            "/metrics",
            "/metrics?x=/v1/",
            "/metrics#/v1/",
            "/metrics;/v1/models",
            "/%6detrics",
            "/v1",
            "//metrics",
            "//v1/models",
            "/V1/models",
            "/v1/../metrics",
            "/v1/%2e%2e/metrics",
            "/v1/..%2fmetrics",
            "/v1%2f..%2fmetrics",
            "/v1/..\\metrics",
            "/v1/;/../metrics",
            "/health/../metrics",
            "/health%2f..%2fmetrics",
            "/pause/v1/models",
            "/pause/%2fv1/",
            "http://127.0.0.1/metrics",
            "http://v1/metrics",
            "/nobody-has-this",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_closed(self, port: int, target: str, method: str) -> None:
        status, text = ask(port, target, method)
        assert status in (400, 404), text
        assert "reached" not in text

    @pytest.mark.parametrize("header", ["X_Forwarded_Prefix", "X_Original_URL", "X_Rewrite_URL", "X_Forwarded_Path"])
    def test_headers_do_not_change_the_path(self, port: int, header: str) -> None:
        assert ask(port, "/metrics", **{header: "/v1/models"})[0] == 404

    @pytest.mark.parametrize("host", ["x?", "x#", "x/y?", "x/y#", "x/"])
    def test_no_host_leads_round_the_key(self, port: int, host: str) -> None:
        assert ask(port, "/v1/keyed") == (401, "no key")
        assert ask(port, "/v1/keyed", Authorization="Bearer right", Host="api.example.org:8000")[0] == 200
        status, text = ask(port, "/v1/keyed", Host=host)
        assert (status, "reached" in text) == (400, False)

    @pytest.mark.parametrize(("path", "status"), [("/control", 403), ("/v1/realtime", 101)])
    def test_websockets(self, port: int, path: str, status: int) -> None:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
        upgrade["Sec_WebSocket_Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        headers = {name.replace("_", "-"): value for name, value in upgrade.items()}
        connection.request("GET", path, headers=headers)
        assert connection.getresponse().status == status
        connection.close()
