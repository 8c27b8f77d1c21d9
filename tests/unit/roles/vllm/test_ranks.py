# SPDX-License-Identifier: GPL-3.0-or-later
"""baremetal_ranks.py with real processes, each on an address of its own of this machine; engines are small programs."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[4] / "roles" / "vllm" / "files" / "baremetal_ranks.py"
# An engine that runs, with a child of its own, until it is ended.
ENGINE = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"


class Rank:
    """One host: its keeper and the folder that it works in."""

    def __init__(self, folder: Path, rank: int, peers: list[str], port: int, token: str, engine: str) -> None:
        self.folder = folder / f"rank{rank}"
        self.folder.mkdir(exist_ok=True)
        token_file = self.folder / "token"
        token_file.write_text(token)
        self.log = self.folder / "log"
        self.command = [sys.executable, str(PROGRAM), "--name", "chat", "--rank", str(rank), "--port", str(port)]
        for peer in peers:
            self.command += ["--peer", peer]
        self.command += ["--patience", "4", "--token-file", str(token_file), "--folder", str(self.folder)]
        self.command += ["--", sys.executable, "-c", engine]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, start_new_session=True)

    def engine(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "engine.pid").read_text().partition(" ")[0])
        return 0

    def said(self, text: str) -> bool:
        return self.log.exists() and text in self.log.read_text()

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """make(number, engine, tokens) -> ranks that are ended after the test."""
    made: list[Rank] = []

    def make(number: int = 2, engine: str = ENGINE, tokens: tuple[str, ...] = ()) -> list[Rank]:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        peers = [f"host{rank}=127.0.0.{rank + 1}" for rank in range(number)]
        words = tokens or ("secret",) * number
        made.extend(Rank(tmp_path, rank, peers, port, words[rank], engine) for rank in range(number))
        return made

    yield make
    for rank in made:
        rank.stop()


def test_engines_start_when_all_hosts_are_there_and_stop_together(ranks: Callable[..., list[Rank]]) -> None:
    first, second, third = ranks(3)
    third.start()
    second.start()
    first.start()
    until(lambda: first.engine() and second.engine() and third.engine())
    engine = first.engine()
    until(lambda: children(engine))
    below = children(engine)
    # One host's engine is killed: all end, with what they started, and all start again.
    os.kill(second.engine(), signal.SIGKILL)
    until(lambda: first.engine() not in (0, engine) and second.engine() and third.engine(), 30)
    assert not alive(engine) and not alive(below[0])
    assert first.said("RankError: rank 1 (host1, 127.0.0.2) ended: status -9: ")
    # The unit of the first host is stopped: engines end everywhere, and the other hosts wait.
    engines = [rank.engine() for rank in (first, second, third)]
    assert first.process
    first.process.terminate()
    assert first.process.wait(30) == 0
    until(lambda: not any(map(alive, engines)))
    until(lambda: second.said("waiting for rank 0 (host0, 127.0.0.1 port"))
    assert third.process and third.process.poll() is None


def test_no_engine_starts_alone(ranks: Callable[..., list[Rank]]) -> None:
    first, _ = ranks()
    first.start()
    until(lambda: first.said("waiting for rank 1 (host1, 127.0.0.2)"))
    time.sleep(1)
    assert first.engine() == 0


def test_a_host_that_falls_silent_ends_all_engines(ranks: Callable[..., list[Rank]]) -> None:
    first, second = ranks()
    first.start()
    second.start()
    until(lambda: first.engine() and second.engine())
    engine = first.engine()
    assert second.process
    os.kill(second.process.pid, signal.SIGSTOP)  # as if the network were cut: connected, and silent
    until(lambda: first.engine() == 0)
    assert first.said("stopping all engines: rank 1 (host1, 127.0.0.2): not heard of for 4 s")
    os.kill(second.process.pid, signal.SIGCONT)
    until(lambda: first.engine() not in (0, engine) and second.engine(), 40)


FAILS = "import time; time.sleep(0.5); raise SystemExit('ValueError: no room for the model')"
TALKS = """
import os, signal, time
signal.signal(15, lambda *_: (print('RuntimeError: asked to end', end='', flush=True), os._exit(1)))
time.sleep(600)
"""


@pytest.mark.parametrize("engine", [FAILS, TALKS])
def test_engines_that_end_again_and_again_are_left_alone(ranks: Callable[..., list[Rank]], engine: str) -> None:
    first, second = ranks(engine=FAILS)
    first.command[-1] = engine  # what it says as it is ended does not hide the reason
    first.start()
    second.start()
    assert first.process
    assert first.process.wait(60) == 78
    lines = first.log.read_text().splitlines()
    assert lines[-1].endswith("ended: status 1: ValueError: no room for the model")
    assert lines[-1].startswith("RankError: rank ")
    assert second.process and second.process.poll() is None


# Stands in for a driver that lets no process go: none is killed before a file is there.
HUNG = """
import os, sys
sys.path.insert(0, {folder!r})
import baremetal_ranks
baremetal_ranks.STOP_S, baremetal_ranks.STUCK_S = 1, 2
kill = os.kill
os.kill = lambda pid, number: kill(pid, number) if number != 9 or os.path.exists({free!r}) else None
baremetal_ranks.main()
"""


def hang(rank: Rank, free: Path) -> None:
    program = rank.folder / "hung.py"
    program.write_text(HUNG.format(folder=str(PROGRAM.parent), free=str(free)))
    rank.command[rank.command.index(str(PROGRAM))] = str(program)


@pytest.mark.parametrize("by_itself", [True, False])
def test_an_engine_that_cannot_be_killed_is_waited_for_and_named_standin(
    ranks: Callable[..., list[Rank]], tmp_path: Path, by_itself: bool
) -> None:
    first, second = ranks()
    for rank in (first, second):  # the engines of the first one can be killed
        hang(rank, tmp_path / "free" if rank is second else tmp_path)
        rank.start()
    until(lambda: first.engine() and second.engine())
    engine = second.engine()
    until(lambda: children(engine))
    (below,) = children(engine)
    os.kill(engine if by_itself else first.engine(), signal.SIGKILL)
    # The others are ended, whatever hangs there.
    until(lambda: first.engine() == 0)
    waits = "waiting for the engine of rank 1 (host1, 127.0.0.2) to end"
    until(lambda: first.said(waits) and second.said(f"{waits}: killed, and still there: process {below}"))
    time.sleep(3)
    assert alive(below) and first.engine() == 0
    assert [rank.log.read_text().count(waits) for rank in (first, second)] == [1, 1]
    (tmp_path / "free").touch()
    until(lambda: first.engine() and second.engine() not in (0, engine))
    assert not alive(below)


def test_another_token_is_refused(ranks: Callable[..., list[Rank]]) -> None:
    first, second = ranks(tokens=("secret", "wrong"))
    first.start()
    second.start()
    until(lambda: first.said("a connection from 127.0.0.1 is refused: it does not know the token"))
    assert first.engine() == second.engine() == 0

    time.sleep(8)
    assert len(second.log.read_text().splitlines()) <= 4, "it tries again and again, and says so once"


def taken_out(ranks: Callable[..., list[Rank]]) -> list[Rank]:
    """Three hosts, of which host1 has left the service without knowing: host2 has its rank now."""
    first, former, third = ranks(3)
    for rank in (first, third):
        place = rank.command.index("host1=127.0.0.2")
        del rank.command[place - 1 : place + 1]
    third.command[third.command.index("--rank") + 1] = "1"
    return [first, former, third]


def test_a_host_that_left_and_comes_back_does_not_disturb_the_others(ranks: Callable[..., list[Rank]]) -> None:
    first, former, third = taken_out(ranks)
    first.start()
    third.start()
    until(lambda: first.engine() and third.engine())
    engines = [first.engine(), third.engine()]
    former.start()
    advice = "run site.yml with host1, which gives it its place or removes its part"
    until(lambda: former.said(advice) and first.said(advice))
    time.sleep(8)
    assert [first.engine(), third.engine()] == engines
    assert former.process and former.process.poll() is None and former.engine() == 0
    assert first.said("it is host1 (127.0.0.2), rank 1 of 3, and chat has host2 (127.0.0.3) as rank 1 of 2")
    for rank in (first, former):
        assert len(rank.log.read_text().splitlines()) <= 8, rank.log.read_text()


def test_a_host_that_left_is_refused_whatever_its_software(ranks: Callable[..., list[Rank]], tmp_path: Path) -> None:
    first, former, third = taken_out(ranks)
    other_software(former, tmp_path)
    former.start()
    first.start()
    until(lambda: former.said("run site.yml with host1"))
    third.start()
    until(lambda: first.engine() and third.engine())


def test_a_rank_that_there_is_none_of_is_told_so(ranks: Callable[..., list[Rank]]) -> None:
    first, second, former = ranks(3)
    for rank in (first, second):
        place = rank.command.index("host2=127.0.0.3")
        del rank.command[place - 1 : place + 1]
    for rank in (first, second, former):
        rank.start()
    until(lambda: former.said("it is host2 (127.0.0.3), rank 2 of 3, and chat has 2 hosts: run site.yml with host2"))
    until(lambda: first.engine() and second.engine())


def without_its_address(first: Rank) -> str:
    first.command[first.command.index("host0=127.0.0.1")] = "host0=203.0.113.7"
    return "waiting for the address of this host: cannot listen on 203.0.113.7"


def test_an_address_that_the_host_does_not_have(ranks: Callable[..., list[Rank]]) -> None:
    first, _ = ranks()
    waits = without_its_address(first)
    first.start()
    until(lambda: first.said(waits))
    time.sleep(2)
    assert len(first.log.read_text().splitlines()) == 1, "it says so once"
    assert first.process and first.process.poll() is None
    first.process.terminate()
    assert first.process.wait(30) == 0


OWN_NETWORK = ["unshare", "--map-root-user", "--net"]


@pytest.mark.skipif(
    subprocess.run([*OWN_NETWORK, "ip", "address"], capture_output=True, check=False).returncode != 0,
    reason="there is no ip, or no network of one's own",
)
def test_an_address_that_comes_late(ranks: Callable[..., list[Rank]], tmp_path: Path) -> None:
    (first,) = ranks(1)
    waits = without_its_address(first)
    late = f"until [ -e {tmp_path}/up ]; do sleep 0.1; done; ip address add 203.0.113.7/32 dev lo"
    first.command = [*OWN_NETWORK, "sh", "-c", f'ip link set lo up; ({late}) & exec "$@"', "sh", *first.command]
    first.start()
    until(lambda: first.said(waits))
    assert first.engine() == 0
    (tmp_path / "up").touch()
    until(first.engine)


def other_software(rank: Rank, folder: Path) -> None:
    package = folder / "site" / "vllm-9.9.9.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.9\n")
    rank.command = ["env", f"PYTHONPATH={package.parent}", *rank.command]


def test_other_software_is_refused_before_anything_starts(ranks: Callable[..., list[Rank]], tmp_path: Path) -> None:
    first, second = ranks()
    first.start()
    other_software(second, tmp_path)
    second.start()
    assert first.process and second.process
    assert (first.process.wait(30), second.process.wait(20)) == (78, 78)
    assert first.said("RankError: rank 1 (host1, 127.0.0.2) differs: vllm 9.9.9 there and missing on host0")


def test_a_host_that_is_upgraded_later_than_the_first_is_waited_for(
    ranks: Callable[..., list[Rank]], tmp_path: Path
) -> None:
    first, second = ranks()
    upgraded = list(second.command)
    first.start()
    other_software(second, tmp_path)
    second.start()
    until(lambda: first.said("differs: vllm 9.9.9 there"))
    second.stop()
    second.command = upgraded
    second.start()
    until(lambda: first.engine() and second.engine())
