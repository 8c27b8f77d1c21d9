# SPDX-License-Identifier: GPL-3.0-or-later
"""vllm_bench against a stand-in for `vllm bench serve` that takes the flags of the real one (0.32.0) and no others."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import vllm_bench
from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer, as_json

SERVE = """
import argparse, asyncio, json, os, sys, time
if os.environ.get("STANDIN") == "load":
    time.sleep(60)
def add_cli_args(parser):
    for flag in ("dataset-name", "percentile-metrics", "backend", "endpoint", "base-url", "model", "served-model-name",
                 "tokenizer", "seed", "num-prompts", "max-concurrency", "random-input-len", "random-output-len",
                 "metric-percentiles", "result-dir", "result-filename", "burstiness"):
        parser.add_argument("--" + flag)
    for flag in ("ignore-eos", "disable-tqdm", "save-result"):
        parser.add_argument("--" + flag, action="store_true")
def main(args):
    assert os.environ["OPENAI_API_KEY"] == "sk-the-right-key" and "sk-the-right-key" not in sys.argv
    assert args.save_result
    result = asyncio.run(benchmark(args))
    with open(os.path.join(args.result_dir, args.result_filename), "w") as handle:
        json.dump(result, handle)
async def benchmark(args):
    if os.environ.get("STANDIN") == "raise":
        raise ValueError("Initial test run failed")
    if os.environ.get("STANDIN") == "hang":
        time.sleep(60)
    count = int(args.num_prompts)
    done = count - 1 if os.environ.get("STANDIN") == "lose" else count
    open(os.environ["STANDIN_SEEN"], "a").write("%s %s %s %s\\n" % (args.tokenizer, args.max_concurrency, count, args.seed))
    return {"completed": done, "duration": 2.0, "total_output_tokens": done * 10, "total_input_tokens": done * 30,
            "mean_e2el_ms": 100.0 * int(args.max_concurrency), "p99_e2el_ms": 200.0 * int(args.max_concurrency),
            "errors": ["Connection refused"] if done < count else []}
"""


@pytest.fixture
def measure(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    path = tmp_path / "vllm/benchmarks/serve.py"
    path.parent.mkdir(parents=True)
    path.write_text(SERVE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STANDIN_SEEN", str(tmp_path / "seen"))
    with OpenAiServer() as server:
        (tmp_path / "key").write_text(f"{server.key}\n")
        given = {
            "base_url": f"{server.url}/v1",
            "api_key_file": str(tmp_path / "key"),
            "model": server.model,
            "command": [sys.executable],
            "concurrency": 4,
            "num_prompts": 10,
        }

        def measure(standin: str = "", root: str | None = "/srv/models/m", **params: Any) -> dict[str, Any]:
            monkeypatch.setenv("STANDIN", standin)
            server.overrides[("GET", "/v1/models")] = as_json({"data": [{"id": server.model, "root": root}]})
            result = run_module(vllm_bench, **{**given, **params})
            assert server.key not in result["text"]
            seen = tmp_path / "seen"
            result["seen"] = sorted(seen.read_text().splitlines()) if seen.exists() else []
            seen.unlink(missing_ok=True)
            return result

        yield measure


def test_standin_one_process(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure()
    row = result["row"]
    assert result["seen"] == ["/srv/models/m 4 10 0"]
    assert (row["concurrency"], row["completed"], row["requests_per_s"]) == (4, 10, 5.0)
    assert (row["output_tokens_per_s"], row["total_tokens_per_s"]) == (50.0, 200.0)
    assert (row["mean_e2el_ms"], row["p99_e2el_ms"]) == (400.0, 800.0)


def test_standin_several_processes(measure: Callable[..., dict[str, Any]]) -> None:
    result = measure(processes=3, seed=7)
    assert result["seen"] == ["/srv/models/m 1 3 8", "/srv/models/m 1 3 9", "/srv/models/m 2 4 7"]
    assert result["row"]["completed"] == 10
    assert result["row"]["mean_e2el_ms"] == pytest.approx((200 * 4 + 100 * 6) / 10)
    assert result["row"]["p99_e2el_ms"] == 400.0
    assert len(measure(processes=9)["seen"]) == 4, "no process without a client"


# What `docker exec --interactive` is to what it starts: it passes standard input on, and when it is killed, that lives on.
EXEC_STANDIN = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)
open({pid!r}, "w").write(str(process.pid))
sys.exit(process.wait())
"""


@pytest.mark.parametrize("standin", ["hang", "load"])
def test_standin_nothing_goes_on_in_a_container(
    measure: Callable[..., dict[str, Any]], tmp_path: Path, standin: str
) -> None:
    program, pid = tmp_path / "exec.py", tmp_path / "pid"
    program.write_text(EXEC_STANDIN.format(pid=str(pid)))
    command = [sys.executable, str(program)]
    assert measure(command=command)["row"]["completed"] == 10
    assert "has not ended after 3 s" in measure(standin, command=command, timeout=3)["msg"]
    inside = Path(f"/proc/{pid.read_text()}/stat")
    end = time.monotonic() + 5
    with contextlib.suppress(OSError):  # it has gone
        while inside.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < end, "the benchmark goes on"
            time.sleep(0.1)


@pytest.mark.parametrize("task", ["embed", "score"])
def test_standin_pooling(measure: Callable[..., dict[str, Any]], task: str) -> None:
    assert measure(task=task, tokenizer="/t")["seen"] == ["/t 4 10 0"]


@pytest.mark.parametrize(
    ("standin", "params", "words"),
    [
        ("raise", {}, "ended with status 1: ValueError: Initial test run failed"),
        ("hang", {"timeout": 3}, "has not ended after 3 s (bench_timeout)"),
        ("lose", {}, "only 9 of 10 requests were answered at concurrency 4 (Connection refused)"),
        ("", {"extra_args": ["--no-such"]}, "unrecognized arguments: --no-such"),
        ("", {"command": ["/no/such/python"]}, "cannot run /no/such/python"),
        ("", {"model": "other"}, "serves random-llama, not other"),
        ("", {"base_url": "http://127.0.0.1:9/v1"}, "bring the service up first"),
        ("", {"api_key_file": "/no/such/file"}, "cannot read the API key from /no/such/file"),
        ("", {"concurrency": 0}, "concurrency is 0: give 1 or more"),
    ],
)
def test_refusals(measure: Callable[..., dict[str, Any]], standin: str, params: dict[str, Any], words: str) -> None:
    result = measure(standin, **params)
    assert result.get("failed")
    assert words in result["msg"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (132, "was ended by SIGILL"),
        (-9, "was ended by SIGKILL"),
        (1, "ended with status 1"),
        (255, "ended with status 255"),
    ],
)
def test_a_signal_is_named(status: int, words: str) -> None:
    """A processor that a build was not made for gives no other word."""
    assert vllm_bench.ended(status) == words
