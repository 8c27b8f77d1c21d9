# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""Brings the files of a model to a host, from a hub or from its neighbours, and hands them on while they come.

Standard library, Python 3.6 and newer. A file grows in parts/ from its first byte to its last, so that its length says where
to go on after a kill, and how much of it a neighbour may have already. It is hashed as it passes, and moves to files/ only when
the hash is right. All files there, the folder moves to its place in one step.
"""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import ctypes
import errno
import glob
import json
import os
import queue
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from http.client import HTTPException, HTTPSConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import TCPServer, ThreadingMixIn
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store
from ansible_collections.baremetal.vllm.plugins.module_utils.hubs import Problem

BLOCK = 256 * 1024
MIB = 1024 * 1024
STEP = 8 * MIB  # of a copy within the machine
# A request asks for no more than this: some storage refuses to send files above 50 GB in one answer (huggingface_hub 2.4.0,
# constants.MAX_HTTP_DOWNLOAD_SIZE), and no answer then lasts for hours.
SEGMENT = 8 * 1024 * MIB
# Failures in a row, without a byte between them, after which a file is given up.
ATTEMPTS = 8
REFUSALS = 3  # of 401, 403 and 404: the listing has been allowed, so that one of them may be a hiccup
MISMATCHES = 3
# Seconds without a word from any neighbour after which the hub is asked, once one has been heard and before: hosts start one
# after the other. Then until the neighbours are tried again, and until a nearer one is tried that was not there.
PEER_GRACE = 20
PEER_START = 90
# A neighbour that does not answer in a host's first seconds is only about to start, and the ones beyond it have their hands full.
PEER_FIRST = 4
PEER_AGAIN = 60
PEER_NEARER = 5
PEER_CONNECT = 5
PEER_LINGER = 120
NETWORK = (URLError, HTTPException, ssl.SSLError, socket.timeout, ConnectionError, OSError, ValueError)

# What runs in the environment of the official clients: reads one job a line, writes one answer a line. Both libraries are
# asked for one file at a time, since what they make of a whole repository forgets begun files (huggingface_hub since 1.18)
# and cannot be told which commit's listing was checked.
CLIENT_LOOP = """
import json, os, sys
for line in sys.stdin:
    job = json.loads(line)
    try:
        fetch(job)
        answer = {}
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        answer = {"error": " ".join(("%s: %s" % (type(error).__name__, error)).split())[:500], "status": status}
    sys.stdout.write(json.dumps(answer) + "\\n")
    sys.stdout.flush()
"""
CLIENTS = {
    "huggingface": """
from huggingface_hub import constants
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

constants.DOWNLOAD_CHUNK_SIZE = 2**20  # its own 10 MB is what a kill would lose, and what neighbours would wait for

def fetch(job):
    with open(job["part"], "ab", buffering=0) as part:
        http_get(job["url"], part, resume_size=part.tell(), headers=build_hf_headers(), expected_size=job["size"])
""",
    "modelscope": """
from modelscope_hub import HubApi
api = HubApi(endpoint=os.environ["MODELSCOPE_ENDPOINT"], token=os.environ.get("MODELSCOPE_API_TOKEN") or None)

def fetch(job):
    known = {"revision": job["revision"], "local_dir": job["folder"], "file_size": job["size"]}
    api.download_file(job["model"], "model", job["path"], expected_sha256=job["sha256"] or None, **known)
    os.rename(os.path.join(job["folder"], job["path"]), job["part"])
""",
}


class Failed(Exception):
    """The work cannot go on; one line says why and what to do."""


class Again(Exception):
    """Worth another try, after so many seconds if somebody said so. `refused`: the answer was 401, 403 or 404."""

    def __init__(self, message, wait=0, refused=False):
        Exception.__init__(self, message)
        self.wait, self.refused = wait, refused


class Status(object):
    """How far the work is, kept in a file that anybody may read while it goes on."""

    def __init__(self, path, total):
        self.path = path
        self.lock = threading.Lock()
        self.facts = {
            "state": "starting",
            "pid": os.getpid(),
            "total_bytes": total,
            "done_bytes": 0,
            "hub_bytes": 0,
            "peer_bytes": 0,
            "discarded_bytes": 0,
            "message": "",
            "changed": False,
            "notes": [],
        }
        self.ended = threading.Event()
        self.measure = None  # says how many bytes there are, where another process writes them

    def add(self, **numbers):
        with self.lock:
            for name, number in numbers.items():
                self.facts[name] += number

    def note(self, text):
        with self.lock:
            if text not in self.facts["notes"] and len(self.facts["notes"]) < 20:
                self.facts["notes"].append(text)

    def set(self, **facts):
        with self.lock:
            self.facts.update(facts)
        self.write()

    def write(self):
        measured = self.measure() if self.measure else None
        with self.lock:
            if measured is not None and self.facts["state"] == "fetching":
                self.facts["done_bytes"] = measured
            text = json.dumps(dict(self.facts, updated=time.time()))
        try:
            model_store.write_atomically(self.path, text)
        except OSError:
            self._write_in_place(text.encode("utf-8"))

    def _write_in_place(self, data):
        """On a full disk, the block that the last text has takes this one, too: somebody waits to be told what is wrong."""
        try:
            handle = os.open(self.path, os.O_WRONLY)
            try:
                os.pwrite(handle, data, 0)
                os.ftruncate(handle, len(data))
            finally:
                os.close(handle)
        except OSError:
            pass

    def keep(self):
        while not self.ended.wait(1):
            self.write()


class Client(object):
    """A process of the official client, which fetches one file after the other."""

    def __init__(self, job):
        source = job["model"]["source"]
        environment = dict(
            (name, value) for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))
        )
        timeout = str(job["timeout"])
        if source == "huggingface":
            environment.update(
                HF_ENDPOINT=job["endpoint"], HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1"
            )
            environment.update(
                HF_HUB_DOWNLOAD_TIMEOUT=timeout, HF_TOKEN=job["token"] or "", HF_HUB_DISABLE_IMPLICIT_TOKEN=""
            )
        else:
            # Its limit of an hour a file would end big files on slow lines.
            environment.update(MODELSCOPE_ENDPOINT=job["endpoint"], MODELSCOPE_API_TOKEN=job["token"] or "")
            environment.update(MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT=str(7 * 86400), MODELSCOPE_DOWNLOAD_TIMEOUT=timeout)
        environment.update(HOME=job["staging"], NO_COLOR="1", TQDM_DISABLE="1", PYTHONUNBUFFERED="1")
        libc = ctypes.CDLL(None)

        def die_with_the_worker():
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

        self.process = subprocess.Popen(
            [job["client_python"], "-c", "import os\n" + CLIENTS[source] + CLIENT_LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            universal_newlines=True,
            preexec_fn=die_with_the_worker,  # noqa: PLW1509
        )

    def fetch(self, **job):
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise Again("the client has ended (status %s)" % self.process.wait())
        told = json.loads(answer)
        if told.get("error"):
            if "No space left" in told["error"]:
                raise OSError(errno.ENOSPC, "No space left on device")
            raise Again(told["error"], refused=told.get("status") in (401, 403, 404))

    def close(self):
        self.process.kill()
        self.process.wait()


def copy_range(origin, target, offset, count):
    """Bytes that the kernel has copied from one open file, at an offset, to where the other one is; 0 at the end."""
    if hasattr(os, "copy_file_range"):  # Python 3.8 and newer
        try:
            copied = os.copy_file_range(origin, target, count, offset)
            if copied:  # some file systems say 0 for what they cannot
                return copied
        except OSError as error:
            # Between two file systems on kernels before 5.3, and on file systems that cannot.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
    return os.sendfile(target, origin, offset, count)


class Patient(object):
    """Reads an answer of known length, and is not woken for each packet: on slow links that costs more than TLS and hashing."""

    # What a process waits for at once; and what of an answer may be in the TLS library's hands, and so will never be seen waiting.
    WORTH, HELD = 64 * 1024, 32 * 1024

    def __init__(self, answer, sock, length):
        self.answer, self.sock, self.left, self.low = answer, sock, length, 0

    def readinto(self, view):
        done = 0
        while done < len(view):
            low = max(1, min(self.WORTH, self.left - self.HELD))
            if low != self.low:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
                self.low = low
            data = self.answer.read1(len(view) - done)
            if not data:
                break
            view[done : done + len(data)] = data
            done += len(data)
            self.left -= len(data)
        return done


class Fetch(object):
    """Brings one model. `job`: see DOCUMENTATION of the module model_fetch; `lock` is held."""

    def __init__(self, job, lock, status):
        self.job, self.lock, self.status = job, lock, status
        self.model = job["model"]
        self.commit = self.model["commit"]
        self.place = model_store.Place(job["root"], self.model)
        self.final = self.place.final(self.commit)
        self.staging = job["staging"] = self.place.staging(self.commit)
        self.entries = [dict(entry) for entry in self.model["files"]]
        self.stop = threading.Event()
        self.own = threading.local()
        self.clients = []
        self.server = None
        self.source, self.source_since = 0, time.time()
        self.source_lock = threading.Lock()
        # When the hub is asked if no neighbour is heard until then, and until when the nearest alone is.
        start = self.job["peers"].get("start", PEER_START)
        self.peer_deadline = time.time() + start
        self.peer_first = time.time() + min(PEER_FIRST, start)
        self.context = None

    # ---- the whole ----

    def run(self):
        """Returns whether anything was changed. Raises Failed or Problem."""
        stamp = self.place.stamp(self.final, self.job["selected"])
        if stamp:
            self.entries = stamp["files"]
        if self.job["peers"].get("port"):
            self.server = Server(self)
        if stamp and not self._damaged():
            changed = model_store.flip(self.place, self.commit)
            self.status.set(done_bytes=self.status.facts["total_bytes"])
        else:
            self._bring()
            changed = True
        self._prune()
        if os.path.isdir(self.staging) and not os.listdir(self.staging):  # made for the key's moment on disk
            os.rmdir(self.staging)
        return changed

    def _bring(self):
        self._prepare()
        self._adopt()
        self._check_room()
        self.status.set(state="fetching")
        waiting = sorted(self.entries, key=lambda entry: (-entry["size"], entry["path"]))
        waiting.reverse()
        errors, lock = [], threading.Lock()

        def work():
            try:
                while not self.stop.is_set():
                    with lock:
                        if not waiting:
                            return
                        entry = waiting.pop()
                    self._file(entry)
            except BaseException as error:  # told by the thread that waits
                errors.append(error)
                self.stop.set()

        threads = [threading.Thread(target=work) for dummy in range(max(1, min(self.job["jobs"], len(waiting))))]
        try:
            for thread in threads:
                thread.daemon = True
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for client in self.clients:
                client.close()
        if errors:
            raise errors[0]
        self.status.measure = None
        self.status.set(state="placing", done_bytes=self.status.facts["total_bytes"])
        self._put()

    def _put(self):
        """All files are there and right: one rename makes them the model."""
        files = os.path.join(self.staging, "files")
        model_store.finish(files, self.place, self.commit, self.job["selected"], self.entries)
        old = None
        if os.path.lexists(self.final):  # a model that is repaired: what is right has been linked, what was wrong goes
            old = os.path.join(self.staging, "old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.final, old)
        try:
            os.rename(files, self.final)
        except OSError:
            if old:
                os.rename(old, self.final)
            raise
        model_store.sync_folder(self.place.base)
        model_store.flip(self.place, self.commit)
        shutil.rmtree(self.staging, ignore_errors=True)

    # ---- what is there already ----

    def _damaged(self):
        """Whether the model in its place is not as it was fetched, and is to be repaired. Raises Failed if it is not to be."""
        wrong = model_store.differences(self.final, self.entries)
        if (self.job["verify"] or (wrong and self.job["repair"])) and self.entries:
            self.status.set(state="verifying")
            wrong = self._rehash()
        if wrong and not self.job["repair"]:
            raise Failed(
                "%s is not as it was fetched (%s): give model_repair=true to have it right again, or move the folder away "
                "and serve it as it is by giving its path as the model"
                % (self.final, "; ".join(wrong[:3]) + ("; ..." if wrong[3:] else ""))
            )
        for text in wrong:
            self.status.note("repaired: " + text)
        self.status.set(done_bytes=0)
        return bool(wrong)

    def _rehash(self):
        """Reads every file; what is right is linked into the staging folder if there is to be a repair."""
        wrong, waiting, lock = [], list(self.entries), threading.Lock()

        def work():
            while True:
                with lock:
                    if not waiting:
                        return
                    entry = waiting.pop()
                path, digests = os.path.join(self.final, entry["path"]), model_store.Digests(entry)
                try:
                    model_store.hash_file(path, digests, lambda count: self.status.add(done_bytes=count))
                    text = digests.wrong()
                except (IOError, OSError) as error:
                    text = error.strerror
                if text:
                    wrong.append("%s: %s" % (entry["path"], text))

        threads = [threading.Thread(target=work) for dummy in range(self.job["jobs"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(wrong)

    def _prepare(self):
        for name in ("files", "parts"):
            for entry in self.entries:
                os.makedirs(os.path.dirname(os.path.join(self.staging, name, entry["path"])), exist_ok=True)
        os.makedirs(self.place.base, exist_ok=True)

    def _check_room(self):
        """Once all is linked that can be: that has come already, and takes no room."""
        have = self.place.staged_bytes(self.commit)
        need = sum(entry["size"] for entry in self.entries) - have + self.job["reserve_bytes"]
        free = model_store.free_bytes(self.job["root"])
        if need > free:
            raise Failed(
                "%s has %d MiB free, and %d MiB are needed for %s and the reserve: make room or set model_root to a larger disk"
                % (self.job["root"], free // MIB, -(-need // MIB), self.model["model"])
            )

    def _adopt(self):
        """Links files that another revision, or the folder under repair, has with the right bytes."""
        for entry, source in self.place.same_files(self.entries):
            target = os.path.join(self.staging, "files", entry["path"])
            if os.path.exists(target):
                continue
            digests = model_store.Digests(entry)
            try:
                model_store.hash_file(source, digests)
                if not digests.wrong():
                    os.link(source, target)
            except OSError as error:  # some file systems (CIFS, exFAT) know no hard links
                self.status.note("%s is fetched, as it cannot be linked: %s" % (entry["path"], error.strerror))

    def _prune(self):
        """Removes old revisions beyond those that are to be kept; what a link leads to, and what is in use, stays."""
        keep = self.job["keep_revisions"]
        if keep < 0:
            return
        base = self.place.base
        names = os.listdir(base)
        try:
            scripts = "".join(self._scripts())
        except OSError as error:
            self.status.note("old revisions stay, as %s cannot be read: %s" % (error.filename, error.strerror))
            return
        wanted = {os.readlink(os.path.join(base, name)) for name in names if os.path.islink(os.path.join(base, name))}
        wanted.update([self.commit], (os.path.basename(path) for path in self.job["in_use"]))
        # However the root was written when a service was set up: the end of the path says which revision it is.
        wanted.update(name for name in names if "/%s/%s" % (self.place.name, name) in scripts)
        old = []
        for name in names:
            folder = os.path.join(base, name)
            if name not in wanted and not os.path.islink(folder) and model_store.any_stamp(folder):
                old.append((os.path.getmtime(os.path.join(folder, model_store.STAMP)), folder))
        staging = os.path.join(self.job["root"], ".staging")
        for name in os.listdir(staging):  # a removal that was cut short
            if name.startswith("gone-"):
                shutil.rmtree(os.path.join(staging, name), ignore_errors=True)
        for folder in [folder for dummy, folder in sorted(old, reverse=True)][keep:]:
            gone = os.path.join(staging, "gone-" + os.path.basename(folder))
            os.rename(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)
            self.status.note("removed the old revision %s" % folder)

    def _scripts(self):
        """What services of this host are started with, now and in what they go back to if their next start fails."""
        for pattern in self.job["used_by"]:
            for path in glob.glob(pattern):
                with open(path, errors="replace") as handle:
                    yield handle.read()

    # ---- one file ----

    def _file(self, entry):
        target = os.path.join(self.staging, "files", entry["path"])
        part = os.path.join(self.staging, "parts", entry["path"] + ".incomplete")
        if os.path.exists(target):
            if os.path.getsize(target) == entry["size"]:
                if not entry.get("sha256"):
                    digests = model_store.Digests(entry)
                    model_store.hash_file(target, digests)
                    entry["sha256"] = digests.sha256.hexdigest()
                self.status.add(done_bytes=entry["size"])
                return
            os.unlink(target)
        mismatches = 0
        while True:
            if os.path.exists(part) and os.path.getsize(part) > entry["size"]:
                os.unlink(part)
            open(part, "ab").close()
            digests = self._fill(entry, part)
            wrong = digests.wrong()
            if not wrong:
                break
            self._discard(part, entry["size"])
            mismatches += 1
            self.status.note("%s came with %s and was fetched again" % (entry["path"], wrong))
            if mismatches == MISMATCHES:
                raise Failed(
                    "%s of %s came %d times with %s: the hub sends other bytes than it lists. Run again later, or give another "
                    "mirror%s" % (entry["path"], self.model["model"], mismatches, wrong, self._moved_on())
                )
        entry["sha256"] = digests.sha256.hexdigest()
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.rename(part, target)

    def _moved_on(self):
        """What else it may be where no commit can be asked for, and the listing may be another host's, from long ago."""
        if self.model["source"] == "huggingface":
            return ""
        return (
            "; or it has moved on since another host fetched it: open the port between the hosts%s, or give model_update=true"
            % "".join(" (%d)" % peer["port"] for peer in (self.job["peers"].get("upstreams") or [])[:1])
        )

    def _discard(self, part, size):
        os.unlink(part)
        self.status.add(done_bytes=-size, discarded_bytes=size)

    def _fill(self, entry, part):
        """Appends until the file has its size. Returns its hashes."""
        size = os.path.getsize(part)
        digests = model_store.Digests(entry)
        model_store.hash_file(part, digests, lambda count: self.status.add(done_bytes=count), limit=size)
        failures, refusals = 0, 0
        while size < entry["size"]:
            if self.stop.is_set():
                raise Failed("stopped")
            before, error = size, None
            number, source = self._source()
            try:
                if source is not None:
                    self._from_peer(source, entry, size, part, digests)
                    self.peer_deadline = time.time() + self.job["peers"].get("grace", PEER_GRACE)
                elif self.job["client_python"]:
                    self._from_client(entry, part)
                else:
                    self._from_hub(entry, size, part, digests)
            except Again as again:
                error = again
            except OSError as problem:
                if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                    raise Failed(self._disk_message(problem))
                raise
            size = os.path.getsize(part)
            if source is None and self.job["client_python"]:
                # Another process has written: what it wrote is read once more. It may have begun anew, too.
                digests = model_store.Digests(entry)
                model_store.hash_file(part, digests, limit=size)
                self.status.add(done_bytes=size - before, hub_bytes=max(0, size - before))
            if size < before:
                digests = model_store.Digests(entry)
            if error is None:
                failures = 0
                continue
            failures = 0 if size > before else failures + 1
            refusals += error.refused
            if source is not None:
                self._peer_failed(number, error)
                self.stop.wait(min(error.wait or 0.3, 5))
                continue
            if refusals >= REFUSALS:
                raise Failed(
                    "%s of model %s is not to be had: %s. For a gated model accept its licence at the hub and give the token"
                    % (entry["path"], self.model["model"], error)
                )
            if self.job["client_python"] and not self.job["client_required"] and failures * 2 >= ATTEMPTS:
                self.status.note(
                    "the official client does not get %s (%s): went on without it" % (entry["path"], error)
                )
                self.job["client_python"], failures = None, 0
                self.status.measure = None
            if failures >= ATTEMPTS:
                raise Failed(
                    "gave up %s of %s after %d tries without a byte: %s. What has come is kept: run again to go on"
                    % (entry["path"], self.model["model"], failures, error)
                )
            pause = min(30, error.wait or self.job["backoff"] * 2 ** min(failures, 6))
            self.stop.wait(pause * random.uniform(0.7, 1))  # noqa: S311 - hosts must not come back all at once
        return digests

    def _disk_message(self, error):
        free = model_store.free_bytes(self.job["root"]) // MIB
        return "%s: %s (%d MiB free). What has come is kept in %s: make room and run again" % (
            self.job["root"],
            error.strerror,
            free,
            self.staging,
        )

    def _append(self, part, view, digests, kind):
        handle = os.open(part, os.O_WRONLY | os.O_APPEND)
        try:
            while view:
                written = os.write(handle, view)
                digests.update(view[:written])
                self.status.add(**{"done_bytes": written, kind: written})
                view = view[written:]
        finally:
            os.close(handle)

    def _copy(self, read_into, left, part, digests, kind):
        """Appends up to `left` bytes of what `read_into` gives; Again if they end too soon."""
        buffer = memoryview(bytearray(min(BLOCK, left)))
        while left > 0:
            try:
                size = read_into(buffer[: min(BLOCK, left)])
            except NETWORK as error:
                raise Again("the connection broke off (%s)" % error)
            if not size:
                raise Again("the connection ended %d bytes too soon" % left)
            self._append(part, buffer[:size], digests, kind)
            left -= size
            if self.stop.is_set():
                raise Failed("stopped")

    def _copy_file(self, source, offset, left, part, digests):
        """As `_copy`, of a file: the kernel copies, or shares blocks where it can, while a thread hashes what has arrived."""
        steps, errors = queue.Queue(maxsize=4), []

        def hash_what_has_come():
            try:
                with open(part, "rb", buffering=0) as handle:
                    handle.seek(offset)
                    buffer = memoryview(bytearray(BLOCK))
                    for size in iter(steps.get, 0):
                        while size > 0 and not errors:
                            count = handle.readinto(buffer[: min(BLOCK, size)])
                            if not count:
                                raise OSError(errno.EIO, "%s has become shorter" % part)
                            digests.update(buffer[:count])
                            size -= count
            except OSError as error:
                errors.append(error)
                while steps.get():  # nobody must wait for room
                    continue

        thread = threading.Thread(target=hash_what_has_come)
        thread.start()
        try:
            with open(source, "rb", buffering=0) as origin, open(part, "r+b", buffering=0) as target:
                target.seek(offset)
                position = offset
                while left > 0 and not errors:
                    size = copy_range(origin.fileno(), target.fileno(), position, min(STEP, left))
                    if not size:
                        raise Again("%s ends %d bytes too soon" % (source, left))
                    position, left = position + size, left - size
                    self.status.add(done_bytes=size, hub_bytes=size)
                    steps.put(size)
                    if self.stop.is_set():
                        raise Failed("stopped")
        finally:
            steps.put(0)
            thread.join()
        if errors:
            raise errors[0]

    # ---- sources ----

    def _source(self):
        """(number, neighbour); None for the hub. The nearest that answers is the best, as each of them has one uplink."""
        upstreams = self.job["peers"].get("upstreams") or []
        with self.source_lock:
            patience = PEER_NEARER if self.source < len(upstreams) else PEER_AGAIN
            if self.source and time.time() - self.source_since > patience:
                self.source, self.source_since = 0, time.time()
            return self.source, upstreams[self.source] if self.source < len(upstreams) else None

    def _peer_failed(self, number, error):
        """Goes on to the next one; from the last to the first again until it is time for the hub."""
        upstreams = self.job["peers"]["upstreams"]
        with self.source_lock:
            if number != self.source or (number == 0 and time.time() < self.peer_first):
                return
            self.source, self.source_since = number + 1, time.time()
            if self.source < len(upstreams):
                return
            if time.time() < self.peer_deadline:
                self.source = 0
                return
            if not self.job["peers"].get("hub", True):
                raise Failed(
                    "no neighbour can be reached for %s (%s), and this host does not ask the hub: open port %d between the "
                    "hosts" % (self.model["model"], error, upstreams[number]["port"])
                )
        self.status.note("no neighbour gives %s (%s): asked the hub" % (self.model["model"], error))

    def _from_peer(self, peer, entry, offset, part, digests):
        connection = getattr(self.own, "connection", None)
        if connection is None or (connection.host, connection.port) != (peer["host"], peer["port"]):
            if self.context is None:
                self.context = tls_context(self.job["peers"], self.staging, False)
            connection = HTTPSConnection(peer["host"], peer["port"], timeout=PEER_CONNECT, context=self.context)
            self.own.connection = connection
        try:
            if connection.sock is None:
                connection.connect()
                connection.sock.settimeout(self.job["timeout"])
            connection.request(
                "GET", "/%s/%s" % (self.commit, quote(entry["path"])), headers={"Range": "bytes=%d-" % offset}
            )
            answer = connection.getresponse()
            if answer.status == 206:
                length = int(answer.headers["Content-Length"])
                self._copy(Patient(answer, connection.sock, length).readinto, length, part, digests, "peer_bytes")
                answer.close()  # read1 does not; the connection stays
                return
            answer.read()
            if answer.status != 202:  # 202: alive, and has not got further itself
                raise Again("HTTP %d" % answer.status)
        except NETWORK as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._close_connection()
            raise Again("%s" % error)
        except (Again, Failed):
            self._close_connection()
            raise

    def _close_connection(self):
        connection, self.own.connection = getattr(self.own, "connection", None), None
        if connection is not None:
            connection.close()

    def _from_client(self, entry, part):
        client = getattr(self.own, "client", None)
        if client is None or client.process.poll() is not None:
            client = self.own.client = Client(self.job)
            self.clients.append(client)
            self.status.measure = lambda: self.place.staged_bytes(self.commit)
        client.fetch(
            url=hubs.file_url(self.model, self.job["endpoint"] or "", entry["path"]),
            model=self.model["model"],
            revision=self.model["revision"],
            path=entry["path"],
            size=entry["size"],
            sha256=entry.get("sha256"),
            part=part,
            folder=os.path.join(self.staging, "parts"),
        )

    def _from_hub(self, entry, offset, part, digests):
        url = hubs.file_url(self.model, self.job["endpoint"] or "", entry["path"])
        if url.startswith("file:"):
            self._copy_file(url2pathname(urlsplit(url).path), offset, entry["size"] - offset, part, digests)
            return
        end = min(offset + SEGMENT, entry["size"])
        headers = hubs.token_headers(self.model["source"], self.job["token"])
        headers["Range"] = "bytes=%d-%d" % (offset, end - 1)
        try:
            answer = hubs.open_url(url, headers, self.job["timeout"])
        except HTTPError as error:
            if error.code == 416 and offset:
                self._discard(part, offset)
                open(part, "ab").close()
            raise Again(
                "HTTP %d from %s" % (error.code, urlsplit(error.geturl() or url).netloc),
                hubs.retry_after(error.headers),
                error.code in (401, 403, 404),
            )
        except NETWORK as error:
            raise Again("%s" % getattr(error, "reason", error))
        with answer:
            told, length = answer.headers.get("Content-Range", ""), answer.headers.get("Content-Length", "")
            if answer.getcode() == 206:
                if not told.startswith("bytes %d-" % offset) or not told.endswith(("/%d" % entry["size"], "/*")):
                    raise Again("the answer has %r and not the bytes from %d of %d" % (told, offset, entry["size"]))
            else:
                if length.isdigit() and int(length) != entry["size"]:
                    raise Again("the answer has %s bytes and the listing %d" % (length, entry["size"]))
                end = entry["size"]
                if offset:  # a server that knows no ranges: what there is is skipped, as it has been hashed already
                    self._skip(answer, offset)
            self._copy(answer.readinto, end - offset, part, digests, "hub_bytes")

    @staticmethod
    def _skip(answer, left):
        while left > 0:
            try:
                data = answer.read(min(BLOCK, left))
            except NETWORK as error:
                raise Again("the connection broke off (%s)" % error)
            if not data:
                raise Again("the connection ended too soon")
            left -= len(data)

    # ---- neighbours ----

    def say_done(self):
        """Tells the neighbour that waits for it that this host needs nothing more. That it has gone already is no harm."""
        if self.context is None:
            return
        peer = self.job["peers"]["upstreams"][0]
        connection = HTTPSConnection(peer["host"], peer["port"], timeout=PEER_CONNECT, context=self.context)
        try:
            connection.request("POST", "/" + quote(self.job["peers"]["name"]), headers={"Content-Length": "0"})
            connection.getresponse().read()
        except NETWORK:
            pass
        finally:
            connection.close()

    def find(self, path):
        """(path on disk, bytes that a neighbour may have now) of a file of the model."""
        for name in (
            os.path.join(self.final, path),
            os.path.join(self.staging, "files", path),
            os.path.join(self.staging, "parts", path + ".incomplete"),
        ):
            try:
                return name, os.path.getsize(name)
            except OSError:
                continue
        return "", 0


def tls_context(peers, folder, server):
    """Both sides have the same certificate and key, made for this run alone, and trust nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=peers["certificate"])
    # The library reads the key from a file only; nobody else can open this one, and it is gone at once.
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(peers["certificate"] + peers["key"])
        context.load_cert_chain(path)
    finally:
        os.unlink(path)
    return context


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self):
        fetch = self.server.fetch
        self.server.heard = time.time()
        commit, dummy, path = unquote(self.path).lstrip("/").partition("/")
        entry = next((entry for entry in fetch.entries if entry["path"] == path), None)
        wanted = self.headers.get("Range", "")
        if commit != fetch.commit or entry is None or not wanted[6:-1].isdigit():
            self._answer(404)
            return
        offset = int(wanted[6:-1])
        # Waits for a worthwhile piece, but not for long: the neighbour wants to know that there is somebody.
        piece, deadline = min(entry["size"], offset + BLOCK), time.time() + 2
        name, size = fetch.find(path)
        while size < piece and time.time() < deadline:
            time.sleep(0.02)
            name, size = fetch.find(path)
        try:
            with open(name, "rb", buffering=0) as handle:
                end = min(os.fstat(handle.fileno()).st_size, offset + 8 * MIB)
                if end <= offset:
                    self._answer(202)
                    return
                self._answer(206, end - offset, "bytes %d-%d/%d" % (offset, end - 1, entry["size"]))
                handle.seek(offset)
                while offset < end:
                    data = handle.read(min(BLOCK, end - offset))
                    if not data:  # discarded meanwhile
                        self.close_connection = True
                        return
                    self.wfile.write(data)
                    offset += len(data)
        except FileNotFoundError:
            self._answer(202)

    def do_POST(self):
        self.server.heard = time.time()
        self.server.done.add(unquote(self.path).lstrip("/"))
        self._answer(200)

    def _answer(self, status, length=0, content_range=None):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *dummy):
        """There is nobody to read it."""


def listening_family():
    """IPv6, which hears IPv4 as well, where the kernel has it."""
    try:
        probe = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        try:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            probe.bind(("::", 0))
        finally:
            probe.close()
    except OSError:
        return socket.AF_INET
    return socket.AF_INET6


class Server(ThreadingMixIn, HTTPServer):
    """Hands the model on to neighbours while it comes."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, fetch):
        self.fetch, self.peers = fetch, fetch.job["peers"]
        self.heard, self.done = time.time(), set()
        self.context = tls_context(self.peers, fetch.staging, True)
        self.address_family = listening_family()
        HTTPServer.__init__(self, ("", self.peers["port"]), Handler, bind_and_activate=False)
        thread = threading.Thread(target=self._serve)
        thread.daemon = True
        thread.start()

    def server_bind(self):
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer's asks DNS for a name that nobody needs

    def _serve(self):
        # An earlier run may still be handing on what it has.
        while True:
            try:
                self.server_bind()
                self.server_activate()
                break
            except OSError as error:
                self.fetch.status.note("port %d for the neighbours: %s" % (self.peers["port"], error.strerror))
                time.sleep(1)
        self.serve_forever()

    def finish_request(self, request, client_address):
        request.settimeout(Handler.timeout)
        request = self.context.wrap_socket(request, server_side=True)
        try:
            HTTPServer.finish_request(self, request, client_address)
        finally:
            try:
                request.close()
            except OSError:
                pass

    def handle_error(self, request, client_address):
        """Neighbours come and go, and strangers are turned away."""

    def linger(self):
        """Until the neighbour behind this host has what it needs, or nobody has asked for a while."""
        self.heard = time.time()
        while self.peers["downstream"] not in self.done:
            if time.time() - self.heard > self.peers.get("linger", PEER_LINGER):
                break
            time.sleep(0.1)


def work(job, lock, status):
    """The work from start to end, in a process of its own; the status file says how it went."""
    thread = threading.Thread(target=status.keep)
    thread.daemon = True
    thread.start()
    fetch = Fetch(job, lock, status)
    try:
        changed = fetch.run()
        status.set(state="done", changed=changed)
    except (Failed, Problem) as error:
        status.set(state="failed", message=" ".join(str(error).split()))
    except OSError as error:
        message = fetch._disk_message(error) if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) else str(error)
        status.set(state="failed", message=message)
    except Exception as error:
        status.set(state="failed", message="%s: %s" % (type(error).__name__, error))
    finally:
        status.ended.set()
        lock.release()
    if status.facts["state"] == "done":
        fetch.say_done()
        if fetch.server is not None:
            fetch.server.linger()
