# SPDX-License-Identifier: GPL-3.0-or-later
"""Models come whole or not at all: against stand-ins for hubs that fail as hubs do."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import HTTPRedirectHandler

import model_jobs
import pytest

from ansible_collections.baremetal.vllm.plugins.filter.peer_certificate import peer_certificate
from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store, model_transfer
from ansible_collections.baremetal.vllm.plugins.module_utils.hubs import Problem
from ansible_collections.baremetal.vllm.plugins.module_utils.model_transfer import Failed
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub, Link
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer, Handler, Server

REPO = "owner/tiny-1.0"
BIG = "model-00001-of-00002.safetensors"
SIZE = 3_000_000
SOURCES = ["huggingface", "modelscope"]


def write(folder: Path, seed: int = 0) -> Path:
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "seed": seed}))
    (folder / BIG).write_bytes(generator.randbytes(SIZE))
    (folder / "model-00002-of-00002.safetensors").write_bytes(random.Random(7).randbytes(500_000))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "extra").mkdir(exist_ok=True)
    (folder / "extra/notes with space.txt").write_text("a" * 10)
    return folder


def same(one: Path, other: Path) -> bool:
    """Whether the first folder has the files of the second, and beside them only what the collection writes."""
    own = {model_store.STAMP, hubs.MANIFEST}
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    return names[0] - own == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names[1]
    )


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    return write(tmp_path / "origin")


@pytest.fixture
def hub(origin: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, origin)
        yield hub


@pytest.fixture(params=SOURCES)
def job(request: pytest.FixtureRequest, hub: Hub, tmp_path: Path) -> Any:
    model = model_jobs.read_model(REPO, hub.url, request.param)
    hub.requests.clear()
    return model_jobs.make_job(model, tmp_path / "models", hub.url)


def final(job: Any) -> Path:
    return Path(model_jobs.place_of(job).final(job["model"]["commit"]))


def at(job: Any) -> str:
    """Where the big file's bytes come from."""
    digest = next(entry["sha256"] for entry in job["model"]["files"] if entry["path"] == BIG)
    return f"/cdn/{digest}" if job["model"]["source"] == "huggingface" else f"/repo/{BIG}"


def asked(hub: Hub) -> list[str]:
    """Where each request for the big file began."""
    return [
        headers.get("Range", "")
        for method, path, headers in hub.requests
        if method == "GET" and (BIG in path or "/cdn/" in path) and headers.get("Range", "").endswith(f"-{SIZE - 1}")
    ]


def read_bytes() -> int:
    """What this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_model(job: Any, hub: Hub, origin: Path) -> None:
    changed, status = model_jobs.run(job)
    assert changed
    assert same(final(job), origin)
    link = Path(model_jobs.place_of(job).link)
    assert link.name == {"huggingface": "main", "modelscope": "modelscope-master"}[job["model"]["source"]]
    assert link.resolve() == final(job)
    assert status["done_bytes"] == status["total_bytes"] == status["hub_bytes"]
    subprocess.run(["sha256sum", "--quiet", "-c", hubs.MANIFEST], cwd=final(job), check=True)
    assert not Path(model_jobs.place_of(job).staging(job["model"]["commit"])).exists()
    requests = len(hub.requests)
    before = read_bytes()
    assert model_jobs.run(job)[0] is False
    assert len(hub.requests) == requests
    assert read_bytes() - before < 100_000, "a second run reads the stamp, not the model"


FAULTS = {
    "cut": Fault("", cut_at=1_000_000, times=1),
    "cut soon": Fault("", cut_at=0, times=3),
    "stall": Fault("", stall_at=1_000_000, times=1),
    "hang up": Fault("", hang_up=True, times=2),
    "one bit": Fault("", corrupt_at=12345, times=1),
    "429": Fault("", status=429, headers={"Retry-After": "1"}, times=1),
    "503": Fault("", status=503, times=3),
    "401 once": Fault("", status=401, times=1),
    "403 twice": Fault("", status=403, times=2),
    "404 once": Fault("", status=404, times=1),
    "416": Fault("", status=416, times=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_in_trouble_for_a_while(job: Any, hub: Hub, origin: Path, name: str) -> None:
    fault = FAULTS[name]
    path = at(job)
    hub.faults.append(Fault(**{**vars(fault), "path": path}))
    changed, status = model_jobs.run(job)
    assert changed and same(final(job), origin)
    assert status["discarded_bytes"] == (SIZE if name == "one bit" else 0) or name in ("one bit", "416")
    if name == "cut":
        offsets = [int(text.split("=")[1].split("-")[0]) for text in asked(hub)]
        assert max(offsets) > 0, "what had come was asked for again"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("", status=403), "is not to be had: HTTP 403 from .* accept its licence at the hub and give the token"),
        (Fault("", status=404), "is not to be had: HTTP 404"),
        (Fault("", status=503), "gave up .* after 8 tries without a byte: HTTP 503 .* is kept: run again to go on"),
        (Fault("", corrupt_at=5), "came 3 times with sha256 .*: the hub sends other bytes than it lists"),
        (Fault("", hang_up=True), "gave up"),
    ],
)
def test_a_hub_that_does_not_come_back(job: Any, hub: Hub, fault: Fault, said: str) -> None:
    path = at(job)
    hub.faults.append(Fault(**{**vars(fault), "path": path}))
    with pytest.raises(Failed, match=said):
        model_jobs.run({**job, "backoff": 0.001})
    assert not final(job).exists()
    assert not os.path.lexists(model_jobs.place_of(job).link)


def test_a_killed_run_is_taken_up_within_a_file(job: Any, hub: Hub, origin: Path) -> None:
    hub.faults.append(Fault(at(job), stall_at=2_000_000))
    process = model_jobs.spawn({**job, "timeout": 30})
    part = Path(model_jobs.place_of(job).staging(job["model"]["commit"]), "parts", f"{BIG}.incomplete")
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 1_500_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    kept = part.stat().st_size
    hub.faults.clear()
    hub.requests.clear()
    status = model_jobs.run(job)[1]
    assert same(final(job), origin)
    assert kept > 1_500_000
    assert set(asked(hub)) == {f"bytes={kept}-{SIZE - 1}"}
    assert status["hub_bytes"] <= status["total_bytes"] - kept, "finished bytes came once"


def test_what_was_begun_and_is_wrong(job: Any, origin: Path) -> None:
    """A begun file with a flipped bit, one that is too long, and a finished one of another size."""
    staging = Path(model_jobs.place_of(job).staging(job["model"]["commit"]))
    (staging / "parts").mkdir(parents=True)
    (staging / "files").mkdir()
    (staging / "parts" / f"{BIG}.incomplete").write_bytes(b"x" * 1000)
    (staging / "parts/model-00002-of-00002.safetensors.incomplete").write_bytes(b"x" * 600_000)
    (staging / "files/config.json").write_text("{")
    status = model_jobs.run(job)[1]
    assert same(final(job), origin)
    assert status["done_bytes"] == status["total_bytes"]
    assert any(BIG in note and "fetched again" in note for note in status["notes"])


def test_a_hub_whose_files_change_after_the_listing(hub: Hub, tmp_path: Path) -> None:
    """ModelScope's branches have no commits to ask for: what comes is another model than the listing's."""
    job = model_jobs.make_job(model_jobs.read_model(REPO, hub.url, "modelscope"), tmp_path / "models", hub.url)
    newer = write(tmp_path / "newer", seed=1)
    hub.add(REPO, newer)
    moved = (
        "it has moved on since another host fetched it: open the port between the hosts%s, or give model_update=true$"
    )
    with pytest.raises(Failed, match="the hub sends other bytes than it lists.*" + moved % ""):
        model_jobs.run(job)
    upstream = {"upstreams": [{"host": "127.0.0.1", "port": 9}], "start": 0}
    with pytest.raises(Failed, match=moved % r" \(9\)"):
        model_jobs.run({**job, "peers": {**peer_certificate("test"), **upstream}})
    job = model_jobs.make_job(model_jobs.read_model(REPO, hub.url, "modelscope"), tmp_path / "models", hub.url)
    model_jobs.run(job)
    assert same(final(job), newer)


def test_a_commit_does_not_move_on(hub: Hub, tmp_path: Path) -> None:
    job = model_jobs.make_job(model_jobs.read_model(REPO, hub.url), tmp_path / "models", hub.url)
    hub.faults.append(Fault(at(job), corrupt_at=5))
    with pytest.raises(Failed, match=r"or give another mirror$"):
        model_jobs.run(job)


def test_a_new_revision_takes_what_is_the_same(hub: Hub, job: Any, tmp_path: Path) -> None:
    model_jobs.run(job)
    newer = write(tmp_path / "newer", seed=1)  # the second file of weights is as it was
    hub.add(REPO, newer)
    again = {**job, "model": model_jobs.read_model(REPO, hub.url, job["model"]["source"])}
    status = model_jobs.run(again)[1]
    assert same(final(again), newer)
    assert Path(model_jobs.place_of(again).link).resolve() == final(again)
    assert final(job).is_dir()
    assert status["hub_bytes"] <= SIZE + 200


def revisions(hub: Hub, job: Any, folder: Path, number: int) -> list[Any]:
    """As many revisions of a model, fetched one after the other."""
    jobs = []
    for seed in range(number):
        hub.add(REPO, write(folder / f"v{seed}", seed=seed))
        jobs.append({**job, "model": model_jobs.read_model(REPO, hub.url, job["model"]["source"])})
        model_jobs.run(jobs[-1])
        os.utime(final(jobs[-1]) / model_store.STAMP, (seed, seed))
    return jobs


def test_old_revisions_go_by_choice(hub: Hub, job: Any, tmp_path: Path) -> None:
    jobs = revisions(hub, job, tmp_path, 4)
    foreign = tmp_path / "models" / REPO / "mine"
    foreign.mkdir()
    cut_short = tmp_path / "models/.staging" / f"gone-{jobs[1]['model']['commit']}"
    cut_short.mkdir()
    (cut_short / "model.safetensors").write_bytes(b"half")
    model_jobs.run({**jobs[-1], "keep_revisions": 1, "in_use": [str(final(jobs[0]))]})
    assert [final(each).exists() for each in jobs] == [True, False, True, True]
    assert foreign.exists() and not cut_short.exists()


def test_revisions_that_services_run_with_stay(hub: Hub, job: Any, tmp_path: Path) -> None:
    """Whatever the new plan is: until it runs, and if it does not start, they are what there is."""
    jobs = revisions(hub, job, tmp_path, 5)
    for script, used in {"one/start.sh": jobs[0], "two/good/serve.sh": jobs[1]}.items():
        path = tmp_path / "etc" / script
        path.parent.mkdir(parents=True)
        # The folder of models may have had another name then.
        path.write_bytes(
            f"exec python --model '/other/{REPO}/{used['model']['commit']}' \\\n  --x ".encode() + b"\xff\n"
        )
    (tmp_path / "etc/two/start.sh").symlink_to("nowhere")
    last = {
        **jobs[-1],
        "keep_revisions": 0,
        "used_by": [f"{tmp_path}/etc/{pattern}" for pattern in ("*/start.sh", "*/good/serve.sh")],
    }
    status = model_jobs.run(last)[1]
    assert all(final(each).exists() for each in jobs), "who can tell what that service runs with?"
    assert f"old revisions stay, as {tmp_path}/etc/two/start.sh cannot be read: No such file" in status["notes"][0]
    (tmp_path / "etc/two/start.sh").unlink()
    model_jobs.run(last)
    assert [final(each).exists() for each in jobs] == [True, True, False, False, True]


def test_a_full_disk_is_seen_before(job: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(Failed, match=r"has 0 MiB free, and 4 MiB are needed for owner/tiny-1.0 and the reserve"):
        model_jobs.run(job)
    assert not hub.requests


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_linked_needs_no_room(
    hub: Hub, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    job = model_jobs.make_job(model_jobs.read_model(REPO, hub.url, source), tmp_path / "models", hub.url)
    model_jobs.run(job)
    monkeypatch.setattr(model_store, "free_bytes", lambda path: 1_000_000)
    (final(job) / "model-00002-of-00002.safetensors").write_bytes(b"x")
    assert model_jobs.run({**job, "repair": True})[0] and same(final(job), origin)
    (origin / "model-00002-of-00002.safetensors").write_bytes(b"y" * 600_000)
    hub.add(REPO, origin)
    again = {**job, "model": model_jobs.read_model(REPO, hub.url, source)}
    assert model_jobs.run(again)[0] and same(final(again), origin)


def test_a_file_system_without_links(
    job: Any, hub: Hub, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_jobs.run(job)
    hub.add(REPO, write(tmp_path / "newer", seed=1))
    again = {**job, "model": model_jobs.read_model(REPO, hub.url, job["model"]["source"])}

    def link(source: str, target: str) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(model_transfer.os, "link", link)
    status = model_jobs.run(again)[1]
    assert same(final(again), tmp_path / "newer")
    assert (
        "model-00002-of-00002.safetensors is fetched, as it cannot be linked: Operation not permitted"
        in status["notes"]
    )


def test_a_disk_that_fills_up(job: Any, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [1_000_000]

    def full(handle: int, data: Any) -> int:
        if len(data) > 1000:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    with monkeypatch.context() as patch:
        patch.setattr(model_transfer.os, "write", full)
        with pytest.raises(Failed, match=r"No space left on device .* is kept in .*: make room and run again"):
            model_jobs.run(job)
    assert not final(job).exists()
    status = model_jobs.run(job)[1]
    assert same(final(job), origin)
    assert status["hub_bytes"] < status["total_bytes"]


def test_full_verification(job: Any, hub: Hub, origin: Path) -> None:
    model_jobs.run(job)
    hub.requests.clear()
    assert model_jobs.run({**job, "verify": True})[0] is False
    damaged = final(job) / BIG
    data = bytearray(damaged.read_bytes())
    data[1000] ^= 1
    facts = damaged.stat()
    damaged.write_bytes(data)
    os.utime(damaged, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert model_jobs.run(job)[0] is False, "size and time are as they were: only reading it shows"
    with pytest.raises(Failed, match=f"is not as it was fetched \\({BIG}: sha256 .*\\): give model_repair=true"):
        model_jobs.run({**job, "verify": True})
    assert not hub.requests
    changed, status = model_jobs.run({**job, "verify": True, "repair": True})
    assert changed and same(final(job), origin)
    assert status["hub_bytes"] == SIZE, "what was right is not fetched again"
    assert any(note.startswith(f"repaired: {BIG}") for note in status["notes"])


def test_a_changed_folder_is_not_overwritten_unless_asked(job: Any, origin: Path) -> None:
    model_jobs.run(job)
    (final(job) / "config.json").write_text("{}")
    with pytest.raises(Failed, match=r"config.json has 2 bytes and not \d+\): give model_repair=true"):
        model_jobs.run(job)
    assert (final(job) / "config.json").read_text() == "{}"
    assert model_jobs.run({**job, "repair": True})[0]
    assert same(final(job), origin)


def test_git_hashes_of_small_files(hub: Hub, origin: Path, tmp_path: Path) -> None:
    hub.faults.append(Fault("/resolve/.*config.json", corrupt_at=3))
    job = model_jobs.make_job(model_jobs.read_model(REPO, hub.url), tmp_path / "models", hub.url)
    with pytest.raises(Failed, match=r"config.json of .* with git hash"):
        model_jobs.run(job)


def test_a_gated_model(hub: Hub, origin: Path, tmp_path: Path) -> None:
    hub.add("meta/gated", origin, token="hf_right")
    for source in SOURCES:
        model = model_jobs.read_model("meta/gated", hub.url, source, token="hf_right")
        job = model_jobs.make_job(model, tmp_path / source, hub.url, token="hf_right")
        model_jobs.run(job)
        assert same(final(job), origin)
    for _, path, headers in hub.requests:
        if path.startswith("/cdn/"):
            assert not {"authorization", "cookie"} & {name.lower() for name in headers}


def test_more_files_than_modelscope_lists_at_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3000 in truth: such a listing is asked for folder by folder, and a single folder of that size is refused."""
    monkeypatch.setattr(hubs, "MODELSCOPE_LIMIT", 7)
    hub.listing_limit = 7
    folder = write(tmp_path / "many")
    for name in ("a/1", "a/b/1", "a/b/2", "a/b/3", "a/c/1", "d/1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "empty.txt").unlink()
    hub.add("owner/many", folder)
    job = model_jobs.make_job(model_jobs.read_model("owner/many", hub.url, "modelscope"), tmp_path / "models", hub.url)
    model_jobs.run(job)
    assert same(final(job), folder)
    for number in range(4):
        (folder / f"a/b/more-{number}").write_text("")
    hub.add("owner/many", folder)
    with pytest.raises(Problem, match=r"lists 7 files or more in the folder /a/b of model owner/many"):
        model_jobs.read_model("owner/many", hub.url, "modelscope")


# ---- folders on web servers and shares ----


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, origin: Path) -> Iterator[str]:
    """Python's own web server, which knows no ranges."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/origin"
    server.shutdown()
    server.server_close()


def manifest(folder: Path) -> None:
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    text = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / hubs.MANIFEST).write_text(text)


@pytest.mark.parametrize("kind", ["web", "share"])
def test_a_folder_with_a_manifest(web: str, origin: Path, tmp_path: Path, kind: str) -> None:
    manifest(origin)
    model = model_jobs.read_model(web if kind == "web" else f"file://{origin}", "", "http")
    if kind == "web":
        assert {entry["sha256"] for entry in model["files"]} >= {hashlib.sha256(b"").hexdigest()}
    job = model_jobs.make_job(model, tmp_path / "models")
    staging = Path(model_jobs.place_of(job).staging(model["commit"]))
    (staging / "parts").mkdir(parents=True)
    (staging / "parts" / f"{BIG}.incomplete").write_bytes((origin / BIG).read_bytes()[:1_000_000])
    model_jobs.run(job)
    (origin / hubs.MANIFEST).unlink()
    assert same(final(job), origin)
    assert final(job).parent == tmp_path / "models/origin"


def test_a_folder_with_an_index_page(web: str, origin: Path, tmp_path: Path) -> None:
    """Names and sizes are all that there is to check, and files of the folder itself all that is fetched."""
    model = model_jobs.read_model(web, "", "http")
    assert [entry["path"] for entry in model["files"]] == [
        "config.json",
        "empty.txt",
        BIG,
        "model-00002-of-00002.safetensors",
    ]
    job = model_jobs.make_job(model, tmp_path / "models")
    model_jobs.run(job)
    assert (final(job) / BIG).read_bytes() == (origin / BIG).read_bytes()
    (origin / BIG).write_bytes(b"y" * SIZE)
    os.utime(origin / BIG, (1, 1))
    assert model_jobs.read_model(web, "", "http")["commit"] != model["commit"]


class Moved(Server):
    """Sends whoever comes to another server."""

    def __init__(self, target: str, status: int) -> None:
        super().__init__()
        self.target, self.status = target, status

    def respond(self, request: Handler) -> Answer:
        return Answer(self.status, b"", {"Location": self.target + request.path})


def test_sizes_behind_a_redirect_cost_no_download(origin: Path) -> None:
    class Files(Server):
        def respond(self, request: Handler) -> Answer:
            path = origin / unquote(request.path).lstrip("/")
            return Answer(200, path.read_bytes()) if path.is_file() else Answer(404)

    manifest(origin)
    with Files() as files, Moved(files.url, 302) as moved:
        model = model_jobs.read_model(f"{moved.url}/", "", "http")
        asked = {(method, path) for method, path, _ in files.requests}
    assert {entry["path"]: entry["size"] for entry in model["files"]}[BIG] == SIZE
    assert asked >= {("HEAD", f"/{BIG}"), ("GET", f"/{hubs.MANIFEST}")}
    assert ("GET", f"/{BIG}") not in asked


def test_a_permanent_redirect_with_an_old_python(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """308 is in urllib since Python 3.11: what is there before is put in its place."""
    real = HTTPRedirectHandler.redirect_request

    def before(self: Any, request: Any, answer: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if code == 308:
            raise HTTPError(request.full_url, code, message, headers, answer)
        return real(self, request, answer, code, message, headers, url)

    monkeypatch.setattr(HTTPRedirectHandler, "redirect_request", before)
    monkeypatch.delattr(HTTPRedirectHandler, "http_error_308", raising=False)
    with Moved(hub.url, 308) as moved:
        assert model_jobs.read_model(REPO, moved.url)["commit"] == hub.repositories[REPO].revisions["main"]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "a//b", "", "a\\b"])
def test_paths_that_leave_the_folder(path: str) -> None:
    with pytest.raises(Problem, match="is not to be trusted"):
        hubs.check_path(path, "http://hub")


def test_a_list_that_is_none(web: str, origin: Path) -> None:
    (origin / hubs.MANIFEST).write_text("hello\n")
    with pytest.raises(Problem, match="'hello', which is none of sha256sum"):
        model_jobs.read_model(web, "", "http")


# ---- from host to host ----


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def line(hub: Hub, tmp_path: Path, port: int) -> Callable[..., list[Any]]:
    """line(count) -> jobs of hosts, each of which takes the model from the one before it."""
    credentials = peer_certificate("test")
    model = model_jobs.read_model(REPO, hub.url)
    hub.requests.clear()
    hub.sent_bytes = 0

    def line(count: int, **changes: Any) -> list[Any]:
        ports = [port + number for number in range(count)]
        return [
            model_jobs.make_job(
                model,
                tmp_path / f"host{number}",
                hub.url,
                peers={
                    **credentials,
                    "upstreams": [{"host": "127.0.0.1", "port": ports[before]} for before in reversed(range(number))],
                    "name": f"host{number}",
                    "downstream": f"host{number + 1}" if number + 1 < count else None,
                    "port": ports[number] if number + 1 < count else None,
                    "grace": 3,
                    "linger": 5,
                    **changes,
                },
            )
            for number in range(count)
        ]

    return line


def test_a_line_of_hosts(hub: Hub, origin: Path, line: Callable[..., list[Any]]) -> None:
    jobs = line(4)
    processes = [model_jobs.spawn(job) for job in reversed(jobs)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0] * 4
    for job in jobs:
        assert same(final(job), origin)
    total = sum(entry["size"] for entry in jobs[0]["model"]["files"])
    assert hub.sent_bytes == total, "the hub has sent the model once"


def test_a_proxy_is_for_the_hub_alone(
    hub: Hub, origin: Path, line: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's name is known to the proxy only, and the proxy for https, which hosts talk to each other by, is none."""
    jobs = line(2)
    for job in jobs:
        job["endpoint"] = "http://hub.invalid"
    monkeypatch.setenv("http_proxy", hub.url)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    processes = [model_jobs.spawn(job) for job in reversed(jobs)]
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    assert all(same(final(job), origin) for job in jobs)
    assert any(path.startswith("http://hub.invalid/") for _, path, _ in hub.requests)
    assert hub.sent_bytes == sum(entry["size"] for entry in jobs[0]["model"]["files"])


@pytest.mark.parametrize(("kernel", "address"), [("both", "127.0.0.1"), ("both", "::1"), ("no IPv6", "127.0.0.1")])
def test_neighbours_by_each_protocol(
    hub: Hub, origin: Path, line: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, kernel: str, address: str
) -> None:
    real = socket.socket

    def old(family: int = -1, *arguments: Any, **named: Any) -> Any:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *arguments, **named)

    if kernel == "no IPv6":
        monkeypatch.setattr(model_transfer.socket, "socket", old)
    elif model_transfer.listening_family() != socket.AF_INET6:
        pytest.skip("this kernel has no IPv6")
    first, second = line(2, hub=False)
    first["peers"]["hub"] = True
    second["peers"]["upstreams"][0]["host"] = address
    second["peers"]["start"] = 10
    process = model_jobs.spawn(first)
    monkeypatch.setattr(model_transfer.socket, "socket", real)
    status = model_jobs.run(second)[1]
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert same(final(second), origin)
    assert status["peer_bytes"] == status["total_bytes"]


def test_a_host_of_the_line_dies(hub: Hub, origin: Path, line: Callable[..., list[Any]]) -> None:
    hub.link = Link(1_500_000)
    jobs = line(3)
    processes = [model_jobs.spawn(job) for job in jobs]
    time.sleep(1)
    os.kill(processes[1], signal.SIGKILL)
    assert os.waitpid(processes[2], 0)[1] == 0
    os.waitpid(processes[1], 0)
    os.waitpid(processes[0], 0)
    assert same(final(jobs[2]), origin) and same(final(jobs[0]), origin)
    assert not final(jobs[1]).exists()


def test_hosts_that_start_late_and_out_of_order(hub: Hub, origin: Path, line: Callable[..., list[Any]]) -> None:
    """The one between comes when the others have long begun: nobody asks the hub twice, nobody is left alone."""
    hub.link = Link(2_000_000)
    jobs = line(4)
    processes = {}
    for number in (3, 0, 2):
        processes[number] = model_jobs.spawn(jobs[number])
    time.sleep(2.5)
    processes[1] = model_jobs.spawn(jobs[1])
    assert [os.waitpid(process, 0)[1] for process in processes.values()] == [0] * 4
    for job in jobs:
        assert same(final(job), origin)
    assert hub.sent_bytes == sum(entry["size"] for entry in jobs[0]["model"]["files"])


def test_strangers_are_turned_away(hub: Hub, origin: Path, line: Callable[..., list[Any]]) -> None:
    """Who has another key gets nothing from the line, and goes to the hub."""
    first, second = line(2)
    second["peers"].update(peer_certificate("stranger"), start=1)
    process = model_jobs.spawn(first)
    status = model_jobs.run(second)[1]
    os.waitpid(process, 0)
    assert status["peer_bytes"] == 0
    assert same(final(second), origin)
    assert "asked the hub" in status["notes"][0]


def test_no_neighbour_and_no_hub(line: Callable[..., list[Any]]) -> None:
    second = line(2, hub=False)[1]
    second["peers"]["start"] = 1
    with pytest.raises(Failed, match=r"no neighbour can be reached .* open port \d+ between the hosts"):
        model_jobs.run(second)


# ---- locks ----


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = str(tmp_path / "x.lock")
    first, second = model_store.Lock(path), model_store.Lock(path)
    assert not model_store.held(path)
    child = os.fork()
    if child == 0:
        model_store.Lock(path).take()
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert not model_store.held(path)
    assert first.take()
    assert model_store.held(path)
    assert not second.take()
    first.release()
    assert second.take()
    second.release()
