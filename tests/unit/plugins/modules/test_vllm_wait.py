# SPDX-License-Identifier: GPL-3.0-or-later
"""vllm_wait with a stand-in for the server, real processes, and what vLLM's logs hold when it cannot start."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.modules import vllm_wait
from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer

CAPTURES = Path(__file__).parent / "captures"


class Clock:
    """Time that passes only while the module sleeps, `speed` times as fast; `at` says what happens when."""

    def __init__(self) -> None:
        self.now, self.speed = 1000.0, 4
        self.at: list[tuple[float, Callable[[], Any]]] = []

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += self.speed * seconds
        while self.at and self.at[0][0] <= self.now - 1000:
            self.at.pop(0)[1]()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(vllm_wait, "time", clock)
    return clock


@pytest.fixture
def wait(run_module: Callable[..., dict[str, Any]], clock: Clock, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """wait(url, **params); the pid and the log are what the files pid and log hold."""
    (tmp_path / "log").write_text("INFO starting\n\n")

    def wait(url: str, check: bool = False, **params: Any) -> dict[str, Any]:
        commands = {"pid_command": ["cat", str(tmp_path / "pid")], "log_command": ["cat", str(tmp_path / "log")]}
        return run_module(vllm_wait, check, **{"url": url, "timeout": 60, **commands, **params})

    return wait


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/health"


def test_healthy_at_once(wait: Callable[..., Any]) -> None:
    with OpenAiServer() as server:
        result = wait(f"{server.url}/health")
    assert (result["changed"], result["seconds"]) == (False, 0.0)


def test_the_folder_of_the_server_may_be_a_link(
    wait: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells the real path of the folder that the server works in, here the one of this process."""
    for folder in ("disk/chat", "disk/other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "state").symlink_to("disk")
    (tmp_path / "pid").write_text("77\n")
    monkeypatch.chdir(tmp_path / "state/chat")
    with OpenAiServer() as server:
        assert "msg" not in wait(f"{server.url}/health", folder=f"{tmp_path}/state/chat", timeout=1)
        assert "does not answer" in wait(f"{server.url}/health", folder=f"{tmp_path}/state/other", timeout=1)["msg"]


def test_healthy_after_a_while(wait: Callable[..., Any], clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("77\n")
    with OpenAiServer() as server:
        server.overrides["GET", "/health"] = Answer(503)
        clock.at = [(6, server.overrides.clear)]
        assert wait(f"{server.url}/health")["seconds"] == 6.0


def test_a_late_start_is_waited_for(wait: Callable[..., Any], clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("0\n")
    with OpenAiServer() as server:
        server.overrides["GET", "/health"] = Answer(503)
        clock.at = [(20, lambda: (tmp_path / "pid").write_text("77\n")), (40, server.overrides.clear)]
        assert wait(f"{server.url}/health")["seconds"] == 40.0


@pytest.mark.parametrize("then", ["0\n", "", "78\n"])
def test_a_process_that_ends_ends_the_wait(
    wait: Callable[..., Any], clock: Clock, closed_port: str, tmp_path: Path, then: str
) -> None:
    """Whether the supervisor has not yet, or has already, started another one."""

    def end() -> None:
        (tmp_path / "pid").write_text(then)
        (tmp_path / "log").write_text("INFO starting\nRuntimeError: no luck\n")

    (tmp_path / "pid").write_text("77\n")
    clock.at = [(4, end)]
    result = wait(closed_port)
    assert result["msg"] == f"vLLM has ended after 4 s instead of answering {closed_port}: RuntimeError: no luck"
    assert result["log"] == ["INFO starting", "RuntimeError: no luck"]


@pytest.mark.parametrize("earlier", ["", "baremetal: start of vllm-chat\nValueError: of a start before\n"])
def test_the_cause_is_not_lost_when_a_supervisor_has_begun_the_next_start(
    wait: Callable[..., Any], clock: Clock, closed_port: str, tmp_path: Path, earlier: str
) -> None:
    start = "baremetal: start of vllm-chat\n"

    def end() -> None:
        (tmp_path / "pid").write_text("78\n")
        (tmp_path / "log").write_text(f"{earlier}{start}INFO starting\nRuntimeError: no luck\n{start}")

    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text(f"{earlier}{start}")
    clock.at = [(36, end)]
    result = wait(closed_port)
    assert result["msg"] == f"vLLM has ended after 36 s instead of answering {closed_port}: RuntimeError: no luck"
    assert result["log"] == ["INFO starting", "RuntimeError: no luck"]


def test_a_real_process_that_dies(
    run_module: Callable[..., dict[str, Any]], closed_port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    script = (
        "import os, sys, time; print('x.py: error: no such flag', flush=True)\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        "raise SystemExit(2)"
    )
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(["python3", "-c", script, str(seen)], stdout=log)
    state = f"grep -qs ^State:.[^Z] /proc/{process.pid}/status"
    alive = ["sh", "-c", f"{state} && echo {process.pid} && touch {seen} || echo 0"]
    result = run_module(
        vllm_wait, url=closed_port, timeout=20, pid_command=alive, log_command=["cat", str(tmp_path / "log")]
    )
    process.wait()
    assert result["msg"].startswith("vLLM has ended after ")
    assert result["msg"].endswith("x.py: error: no such flag")


def test_never_started(wait: Callable[..., Any], closed_port: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    result = wait(closed_port, timeout=600)
    assert result["msg"] == f"vLLM does not run, nobody answers {closed_port}: the log is empty"


def test_a_supervisor_that_does_not_know_it(wait: Callable[..., Any], closed_port: str, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("No such process vllm-chat\n")
    assert wait(closed_port)["msg"].startswith("vLLM does not run, ")


def test_a_timeout(wait: Callable[..., Any], closed_port: str, tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text("INFO Loading weights: 10%\n")
    result = wait(closed_port, timeout=42)
    assert result["msg"] == (
        f"vLLM does not answer {closed_port} after 42 s (vllm_start_timeout): INFO Loading weights: 10%"
    )


def test_another_protocol_on_the_port(wait: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("77\n")
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet() -> None:
            while True:
                try:
                    connection = other.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        result = wait(f"http://127.0.0.1:{other.getsockname()[1]}/health", timeout=1)
        other.shutdown(socket.SHUT_RDWR)
    assert "(vllm_start_timeout)" in result["msg"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000/health", "", "file:///etc/hostname"])
def test_an_address_that_is_none(wait: Callable[..., Any], url: str) -> None:
    assert wait(url)["msg"] == f"url is {url!r}: give the address of /health, such as http://127.0.0.1:8000/health"


def test_the_log_that_is_kept_is_short(wait: Callable[..., Any], closed_port: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(f"line {number}\n" for number in range(500)))
    result = wait(closed_port)
    assert result["log"] == [f"line {number}" for number in range(460, 500)]


def test_check_mode_does_not_wait(wait: Callable[..., Any], closed_port: str) -> None:
    assert wait(closed_port, check=True)["skipped"] is True


# What two workers said last before they hung, vllm-project/vllm#8058.
NCCL = """(VllmWorkerProcess pid=1927518) INFO 08-31 09:50:45 multiproc_worker_utils.py:215] Worker ready; awaiting tasks
DEBUG 08-31 09:50:46 parallel_state.py:845] world_size=2 rank=0 local_rank=0 distributed_init_method=tcp://127.0.0.1:39423 backend=nccl
INFO 08-31 09:50:46 utils.py:975] Found nccl from library libnccl.so.2
INFO 08-31 09:50:46 pynccl.py:63] vLLM is using nccl==2.20.5
"""
STAGES = yaml.safe_load((Path(__file__).parents[4] / "roles/vllm/vars/main.yml").read_text())["__vllm_stages"]


def test_gpus_that_never_connect_are_given_up(
    wait: Callable[..., Any], clock: Clock, closed_port: str, tmp_path: Path
) -> None:
    """Long before the limit, since the log stands still where NCCL is known to hang."""
    clock.speed = 10
    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text(NCCL)
    message = wait(closed_port, timeout=3600, stages=STAGES)["msg"]
    assert message.startswith("vLLM hangs while connecting the GPUs (NCCL): nothing new in its log for 42")
    assert "set env NCCL_P2P_DISABLE to 1 and add --disable-custom-all-reduce" in message


def test_a_start_that_failed_and_hangs_is_given_up(wait: Callable[..., Any], closed_port: str, tmp_path: Path) -> None:
    """One of two processes ran out of memory, the other waits for it in an all-reduce: nothing ends by itself."""
    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text((CAPTURES / "vllm_0.25.1_worker_out_of_memory.txt").read_text())
    causes = [{"pattern": "CUDA out of memory", "cause": "the GPU's memory ran out", "advice": "less"}]
    result = wait(closed_port, timeout=3600, stages=STAGES, causes=causes)
    assert result["msg"].startswith("vLLM has failed after 0 s and hangs instead of ending: ")
    assert "CUDA out of memory. Tried to allocate 432.00 MiB" in result["msg"]
    assert result["msg"].endswith(" = the GPU's memory ran out. less")


def test_a_failure_that_ends_by_itself_is_not_called_a_hang(
    wait: Callable[..., Any], clock: Clock, closed_port: str, tmp_path: Path
) -> None:
    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text((CAPTURES / "vllm_0.25.1_worker_out_of_memory.txt").read_text())
    clock.at = [(15, lambda: (tmp_path / "pid").write_text("0\n"))]
    assert wait(closed_port, timeout=3600, stages=STAGES)["msg"].startswith("vLLM has ended after 1")


def test_weights_that_take_long_are_waited_for(
    wait: Callable[..., Any], clock: Clock, closed_port: str, tmp_path: Path
) -> None:
    """A silent log is no hang elsewhere: a slow disk says nothing for long."""
    clock.speed = 100
    (tmp_path / "pid").write_text("77\n")
    (tmp_path / "log").write_text(NCCL + "INFO 08-31 09:50:50 model_runner.py:879] Starting to load model m...\n")
    assert "does not answer" in wait(closed_port, timeout=3000, stages=STAGES)["msg"]


MEMORY = (
    "ValueError: Free memory on device cuda:0 (3.22/79.1 GiB) on startup is less than desired GPU memory utilization "
    "(0.92, 72.77 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
ECHO = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': 1}"
)
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 224.00 MiB. GPU 0 has a total capacity of 11 GiB"
)
WORKER = "WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        # one GPU: the engine core says why, the API server repeats that something was wrong
        (
            f"""
(EngineCore_DP0 pid=17374) ERROR 09-28 15:47:24 [core.py:718] EngineCore failed to start.
(EngineCore_DP0 pid=17374) ERROR 09-28 15:47:24 [core.py:718]     raise ValueError(
(EngineCore_DP0 pid=17374) ERROR 09-28 15:47:24 [core.py:718] {MEMORY}
(EngineCore_DP0 pid=17374) Process EngineCore_DP0:
(EngineCore_DP0 pid=17374) Traceback (most recent call last):
(EngineCore_DP0 pid=17374)     raise ValueError(
(EngineCore_DP0 pid=17374) {MEMORY}
(APIServer pid=17200) Traceback (most recent call last):
(APIServer pid=17200)     raise RuntimeError("Engine core initialization failed. "
(APIServer pid=17200) {ECHO}
""",
            MEMORY,
        ),
        # several GPUs: a worker says why, the engine core and the API server repeat
        (
            f"""
(VllmWorker rank=0 pid=39261) ERROR 08-12 01:36:10 [multiproc_executor.py:511] {MEMORY}
(EngineCore_DP0 pid=4) ERROR 08-12 01:36:12 [core.py:632] EngineCore failed to start.
(EngineCore_DP0 pid=4) ERROR 08-12 01:36:12 [core.py:632] Exception: {WORKER}
(APIServer pid=1) {ECHO}
""",
            MEMORY,
        ),
        # workers below the engine core, as an executor that forwards their output prints them
        (f"(EngineCore_DP0 pid=4) (RayWorkerWrapper pid=9, ip=10.0.0.2) {OUT_OF_MEMORY}\n{ECHO}", OUT_OF_MEMORY),
        (f"[rank0]: Traceback (most recent call last):\n[rank0]: {OUT_OF_MEMORY}\n", OUT_OF_MEMORY),
        # the first engine, V0
        (
            f"ERROR 12-29 10:00:00 engine.py:366] {OUT_OF_MEMORY}\nTraceback (most recent call last):\n"
            "RuntimeError: Engine process failed to start. See stack trace for the root cause.\n",
            OUT_OF_MEMORY,
        ),
        (
            f"{OUT_OF_MEMORY}\nINFO Shutting down\n[rank0]:[W] Warning: destroy_process_group() was not called\n",
            OUT_OF_MEMORY,
        ),
        # an engine that died later
        (
            f"(EngineCore pid=1) ERROR 05-05 12:36:59 [core.py:1131] {OUT_OF_MEMORY}\n"
            "(APIServer pid=1) ERROR 05-05 12:36:59 [serving.py:1173] vllm.v1.engine.exceptions.EngineDeadError: "
            "EngineCore encountered an issue. See stack trace (above) for the root cause.\n",
            OUT_OF_MEMORY,
        ),
        (ECHO, ECHO),  # when nothing else is left of the log
        (
            "usage: vllm serve [-h]\nvllm serve: error: unrecognized arguments: --x",
            "vllm serve: error: unrecognized arguments: --x",
        ),
        # Python 3.14 names the program by how it was called
        (
            "python3.14 -m vllm.entrypoints.openai.api_server: error: unrecognized arguments: --x\nINFO exited\n",
            "python3.14 -m vllm.entrypoints.openai.api_server: error: unrecognized arguments: --x",
        ),
        (
            "Traceback (most recent call last):\nOSError: [Errno 98] Address already in use\n",
            "OSError: [Errno 98] Address already in use",
        ),
        (
            "Traceback (most recent call last):\nModuleNotFoundError: No module named 'vllm'\n",
            "ModuleNotFoundError: No module named 'vllm'",
        ),
        (
            "WARNING: fd limit errors like `OSError: [Errno 24]`\n/bin/sh: 3: cannot open /x: No such file",
            "/bin/sh: 3: cannot open /x: No such file",
        ),
        ("", "the log is empty"),
    ],
)
def test_the_cause_of_a_log(log: str, cause: str) -> None:
    assert vllm_wait.cause(log) == cause


@pytest.mark.parametrize(
    ("capture", "cause"),
    [
        ("vllm_0.32.0_unrecognized.txt", "api_server.py: error: unrecognized arguments: --no-such-flag"),
        (
            "vllm_0.32.0_max_model_len.txt",
            "Value error, User-specified max_model_len (999999) is greater than the derived max_model_len",
        ),
        ("vllm_0.32.0_port_in_use.txt", "OSError: [Errno 98] Address already in use"),
        ("vllm_0.32.0_custom_code.txt", "Value error, The repository /models/coded contains custom code"),
    ],
)
def test_the_cause_of_a_real_log(capture: str, cause: str) -> None:
    """Logs of vLLM 0.32.0, CPU build, on Python 3.11."""
    said = vllm_wait.cause((CAPTURES / capture).read_text())
    assert said.startswith(cause)
    assert "input_value" not in said
