# SPDX-License-Identifier: GPL-3.0-or-later
"""The official clients at their newest and their oldest supported release, driven as model_fetch drives them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_jobs
import pytest
import yaml
from support import ROOT

from ansible_collections.baremetal.vllm.plugins.module_utils.model_transfer import Failed
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub

REPO = "owner/tiny"
BIG, SIZE = "model.safetensors", 6_000_000
NEWEST = yaml.safe_load((ROOT / "roles/model/vars/main.yml").read_text())["__model_clients"]
# modelscope-hub before 0.5.0 ends well with files missing. hf_xet 1.2.0 is the oldest that huggingface_hub 1.0.0 takes.
OLDEST = {"huggingface": "huggingface_hub==1.0.0 hf_xet==1.2.0", "modelscope": "modelscope-hub==0.5.0"}
REQUIREMENTS = {"newest": NEWEST, "oldest": OLDEST}

pytestmark = pytest.mark.client


@pytest.fixture(params=[(source, which) for source in NEWEST for which in ("newest", "oldest")], ids="-".join)
def client(request: pytest.FixtureRequest, tool_environment: Callable[..., Path]) -> tuple[str, str]:
    source, which = request.param
    return source, str(tool_environment(*REQUIREMENTS[which][source].split()) / "python")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "origin"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub/a file.txt").write_text("a")
    (folder / BIG).write_bytes(os.urandom(SIZE))
    with Hub() as hub:
        hub.add(REPO, folder, token="hf_right")
        hub.xet = True
        yield hub


@pytest.fixture
def job(client: tuple[str, str], hub: Hub, tmp_path: Path) -> Any:
    source, python = client
    model = model_jobs.read_model(REPO, hub.url, source, token="hf_right")
    settings = {"client_python": python, "client_required": True, "timeout": 5, "token": "hf_right"}
    return model_jobs.make_job(model, tmp_path / "models", hub.url, **settings)


def final(job: Any) -> Path:
    return Path(model_jobs.place_of(job).final(job["model"]["commit"]))


def assert_secret(token: str, folder: Path) -> None:
    """In no command line of this machine, and in no file below the folder."""
    for path in [*Path("/proc").glob("[0-9]*/cmdline"), *folder.rglob("*")]:
        try:
            assert not path.is_file() or token.encode() not in path.read_bytes(), path
        except OSError:  # the process has ended
            continue


def test_resume_after_kill_cut_and_flip(job: Any, hub: Hub, tmp_path: Path) -> None:
    """One story, since each start of a client takes its time: killed within the file, then cut, then a flipped bit."""
    storage = "/cdn/" if job["model"]["source"] == "huggingface" else f"/repo/{BIG}"
    hub.faults.append(Fault(storage, stall_at=4_000_000))
    process = model_jobs.spawn({**job, "timeout": 60})
    part = Path(model_jobs.place_of(job).staging(job["model"]["commit"]), "parts", f"{BIG}.incomplete")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size >= 2_000_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert_secret("hf_right", tmp_path)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    time.sleep(0.3)
    kept = part.stat().st_size
    time.sleep(0.3)
    assert part.stat().st_size == kept >= 2_000_000, "the client has died with the process that started it"
    hub.faults[:] = [Fault(storage, cut_at=1_000_000, times=1), Fault("config.json", corrupt_at=0, times=1)]
    hub.requests.clear()
    assert model_jobs.run(job)[0]
    assert (final(job) / BIG).read_bytes() == (tmp_path / "origin" / BIG).read_bytes()
    assert (final(job) / "sub/a file.txt").read_text() == "a"
    asked = [
        headers["Range"]
        for _, path, headers in hub.requests
        if headers.get("Range") and ("/cdn/" in path or BIG in path)
    ]
    assert asked[0].startswith(f"bytes={kept}-"), "goes on where the killed one was"
    assert not list((tmp_path / "models").rglob("*.incomplete"))
    assert_secret("hf_right", tmp_path)


def test_what_cannot_be_had(job: Any, hub: Hub) -> None:
    with pytest.raises(Failed, match=r"is not to be had: .* accept its licence at the hub and give the token"):
        model_jobs.run({**job, "token": "hf_wrong", "backoff": 0.001})
    assert not final(job).exists()


def test_goes_on_without_a_client_that_is_broken(job: Any, hub: Hub) -> None:
    changed, status = model_jobs.run({**job, "client_python": "/bin/false", "client_required": False, "backoff": 0.001})
    assert changed
    assert any("went on without it" in note for note in status["notes"])


@pytest.fixture(params=REQUIREMENTS)
def huggingface(request: pytest.FixtureRequest, tool_environment: Callable[..., Path]) -> str:
    return str(tool_environment(*REQUIREMENTS[request.param]["huggingface"].split()) / "python")


def snapshot(python: str, hub: Hub, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the client does by itself, with Xet, which it installs and uses unless it is told not to."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": f"{folder}-home", "HF_TOKEN": "hf_right", "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = f"import huggingface_hub; huggingface_hub.snapshot_download({REPO!r}, local_dir={str(folder)!r})"
    return subprocess.run([python, "-c", code], env=kept | own, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("versions", [{1}, {1, 2}])
def test_the_standin_speaks_xet(huggingface: str, hub: Hub, tmp_path: Path, versions: set[int]) -> None:
    hub.storage.versions = versions
    done = snapshot(huggingface, hub, tmp_path / "own")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "own" / BIG).read_bytes() == (tmp_path / "origin" / BIG).read_bytes()
    paths = hub.paths()
    assert any(path.startswith("/cas/xorbs/") for path in paths) and not any(path.startswith("/cdn/") for path in paths)


@pytest.mark.parametrize("faults", [[Fault("/cas/", status=503)], [Fault("/cas/xorbs", corrupt_at=5000)]], ids=str)
def test_xet_storage_in_trouble_is_no_trouble(huggingface: str, hub: Hub, tmp_path: Path, faults: list[Fault]) -> None:
    """With the Xet client installed and Xet storage announced: the role's fetch takes the HTTP form and stays whole."""
    hub.faults[:] = faults
    model = model_jobs.read_model(REPO, hub.url, token="hf_right")
    settings = {"client_python": huggingface, "client_required": True, "timeout": 5, "token": "hf_right"}
    job = model_jobs.make_job(model, tmp_path / "models", hub.url, **settings)
    assert model_jobs.run(job)[0]
    assert (final(job) / BIG).read_bytes() == (tmp_path / "origin" / BIG).read_bytes()
    assert not any(path.startswith("/cas/") for path in hub.paths())
