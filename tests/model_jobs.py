# SPDX-License-Identifier: GPL-3.0-or-later
"""What tests and benchmarks of the model transfer share: a model as model_info reads it, and the work on it as model_fetch starts it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store, model_transfer

EVERYTHING: dict[str, Any] = {"include": ["*"], "exclude": [], "duplicates": False}


def read_model(name: str, endpoint: str, source: str = "huggingface", revision: str = "", token: str = "") -> Any:
    revision = revision or {"modelscope": "master"}.get(source, "main")
    model = {"model": name, "source": source, "revision": revision, "present": False}
    commit, files = hubs.Hub(model, {"endpoint": endpoint, "token": token, "timeout": 5}).listing()
    return {**model, "commit": commit, "files": hubs.select(files, **EVERYTHING)}


def make_job(model: Any, root: Path, endpoint: str = "", **changes: Any) -> Any:
    return {
        "model": model,
        "root": str(root),
        "endpoint": endpoint,
        "token": "",
        "client_python": None,
        "client_required": False,
        "jobs": 3,
        "timeout": 2,
        "verify": False,
        "repair": False,
        "keep_revisions": -1,
        "in_use": [],
        "used_by": [],
        "reserve_bytes": 0,
        "peers": {},
        "backoff": 0.02,
        "selected": hubs.selection(**EVERYTHING),
        **changes,
    }


def place_of(job: Any) -> model_store.Place:
    return model_store.Place(job["root"], job["model"])


def run(job: Any) -> tuple[bool, Any]:
    """(changed, status) of the work, in this process. Raises what it raises."""
    staging = place_of(job).staging(job["model"]["commit"])
    Path(staging).parent.mkdir(parents=True, exist_ok=True)
    status = model_transfer.Status(f"{staging}.json", sum(entry["size"] for entry in job["model"]["files"]))
    lock = model_store.Lock(f"{staging}.lock")
    assert lock.take()
    try:
        fetch = model_transfer.Fetch(job, lock, status)
        changed = fetch.run()
        status.set(state="done")
        return changed, status.facts
    finally:
        lock.release()


def work_here(job: Any) -> Any:
    """The status of the work, done in this process from start to end, neighbours included."""
    staging = place_of(job).staging(job["model"]["commit"])
    Path(staging).parent.mkdir(parents=True, exist_ok=True)
    status = model_transfer.Status(f"{staging}.json", sum(entry["size"] for entry in job["model"]["files"]))
    lock = model_store.Lock(f"{staging}.lock")
    assert lock.take()
    model_transfer.work(job, lock, status)
    return status.facts


def spawn(job: Any) -> int:
    """Process id of the work in a process of its own, which a test may kill."""
    staging = place_of(job).staging(job["model"]["commit"])
    Path(staging).parent.mkdir(parents=True, exist_ok=True)
    status = model_transfer.Status(f"{staging}.json", sum(entry["size"] for entry in job["model"]["files"]))
    status.set()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        lock = model_store.Lock(f"{staging}.lock")
        if lock.take():
            model_transfer.work(job, lock, status)
            code = 0
    finally:
        os._exit(code)
