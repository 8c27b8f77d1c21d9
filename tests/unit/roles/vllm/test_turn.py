# SPDX-License-Identifier: GPL-3.0-or-later
"""Servers that share a GPU start one after the other: real processes, with a small web server as vLLM."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TURN = Path(__file__).parents[4] / "roles/vllm/files/baremetal_turn.py"
NOWHERE = "http://127.0.0.1:9/health"


@pytest.fixture
def gpu() -> str:
    """A name that no other run of the tests has."""
    return uuid.uuid4().hex


@contextmanager
def start(url: str, *gpus: str, seconds: int = 60) -> Iterator[subprocess.Popen[str]]:
    """A start script that waits for its turn, says so, and becomes the server."""
    words = [sys.executable, str(TURN), url, str(seconds), *gpus]
    script = f"{' '.join(words)} || exit 1; echo its turn; exec sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def line(server: subprocess.Popen[str]) -> str:
    assert server.stdout
    return server.stdout.readline().rstrip()


@contextmanager
def answering() -> Iterator[tuple[str, list[int]]]:
    """A server's address, and the status that it answers with."""
    status = [503]

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/health", status
        finally:
            server.shutdown()
            thread.join()


def waits(gpu: str) -> str:
    return f"baremetal: waits until another server has started on GPU {gpu}"


def test_the_second_waits_until_the_first_answers(gpu: str) -> None:
    with answering() as (url, status), start(url, gpu) as first:
        assert line(first) == "its turn"
        with start(NOWHERE, gpu) as second:
            assert line(second) == waits(gpu)
            time.sleep(2.5)
            status[0] = 200
            ready = time.monotonic()
            assert line(second) == "its turn"
            assert time.monotonic() - ready < 10
            assert first.poll() is None


def test_the_second_starts_when_the_first_has_ended(gpu: str) -> None:
    with start(NOWHERE, gpu) as first:
        assert line(first) == "its turn"
        with start(NOWHERE, gpu) as second:
            assert line(second) == waits(gpu)
            first.kill()
            assert line(second) == "its turn"


def test_one_that_hangs_does_not_keep_others_down_for_ever(gpu: str) -> None:
    with start(NOWHERE, gpu) as first:
        assert line(first) == "its turn"
        with start(NOWHERE, gpu, seconds=2) as second:
            assert line(second) == waits(gpu)
            assert (
                line(second) == f"baremetal: starts beside another server that has been starting on GPU {gpu} for 2 s"
            )
            assert line(second) == "its turn"


def test_one_that_is_stopped_while_it_waits_takes_no_turn(gpu: str) -> None:
    with start(NOWHERE, gpu) as first:
        assert line(first) == "its turn"
        with start(NOWHERE, gpu) as second:
            assert line(second) == waits(gpu)
            second.kill()
            second.wait()
            # What waited for it gives up as well: its end of the pipe closes.
            assert second.stdout and second.stdout.read() == ""


def test_servers_on_other_gpus_do_not_wait(gpu: str) -> None:
    with start(NOWHERE, f"{gpu}-0") as first, start(NOWHERE, f"{gpu}-1") as second:
        assert line(first) == line(second) == "its turn"


def test_several_gpus_are_taken_in_one_order(gpu: str) -> None:
    """Else each of two could have one and wait for the other."""
    a, b = f"{gpu}-0", f"{gpu}-1"
    with start(NOWHERE, a) as first:
        assert line(first) == "its turn"
        with start(NOWHERE, b, a) as second:
            assert line(second) == waits(a)
            with start(NOWHERE, b) as third:
                assert line(third) == "its turn"


def test_the_server_has_no_part_of_it(gpu: str) -> None:
    """No file of the one that holds the turn is open in the server, and its output ends with the server's."""
    with start(NOWHERE, gpu) as server:
        assert line(server) == "its turn"
        server.kill()
        assert server.stdout and server.stdout.read() == ""
