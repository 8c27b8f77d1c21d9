# SPDX-License-Identifier: GPL-3.0-or-later
"""What the stand-ins for HTTP servers share: a server on a free port that lives as long as a `with` block."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """One HTTP answer, or what a broken server makes of one."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None  # sends so many bytes of the body, then closes the connection
    stall_at: int | None = None  # sends so many bytes of the body, then nothing more, and keeps the connection
    pace: Link | None = None  # what the body goes through
    hang_up: bool = False  # closes the connection instead of answering


class Link:
    """A line of so many bytes a second, which all answers share."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at, self.lock = bytes_per_s, time.monotonic(), threading.Lock()

    def wait(self, count: int) -> None:
        """Until so many bytes have gone."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.bytes_per_s
            until = self.free_at
        time.sleep(max(0.0, until - time.monotonic()))


class Server(ThreadingHTTPServer):
    """Answers each request with `respond(request)`; `requests` keeps what was asked."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__((host, port), Handler)
        self.sent_bytes = 0  # of bodies of answers to GET
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def respond(self, request: Handler) -> Answer:
        raise NotImplementedError

    def __enter__(self) -> Any:
        # The default poll of half a second would be most of a test's time.
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()  # lets stalled requests go
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    content: bytes

    def _handle(self) -> None:
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        answer = self.server.respond(self)
        if answer.hang_up:
            self._hang_up()
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        until = next((limit for limit in (answer.cut_at, answer.stall_at) if limit is not None), None)
        body = memoryview(answer.body)[:until]
        for start in range(0, len(body), 65536):
            piece = body[start : start + 65536]
            if answer.pace:
                answer.pace.wait(len(piece))
            self.server.sent_bytes += len(piece)
            self.wfile.write(piece)
        self.wfile.flush()
        if answer.stall_at is not None:
            self.server.closing.wait()
        if until is not None:
            self._hang_up()

    do_GET = do_HEAD = do_POST = _handle

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps quiet: `requests` is the log."""
