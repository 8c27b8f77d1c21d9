# SPDX-License-Identifier: GPL-3.0-or-later
"""Random faults of hubs and kills of the fetching process, over both sources, with and without the official clients.

    pytest -s tests/integration/test_model_soak.py                       about a minute, the same faults each time
    make soak                                                            200 faults and more
    BAREMETAL_SOAK_FAULTS=1000 BAREMETAL_SOAK_SEED=7 pytest -s ...       as many as you like

At the end of each model it is complete and equal to its origin, and no run on the way said so when it was not.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_jobs
import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub, Link

FAULTS = int(os.environ.get("BAREMETAL_SOAK_FAULTS", "40"))
SEED = int(os.environ.get("BAREMETAL_SOAK_SEED", "1"))
REPO = "owner/soak"
CLIENTS = {"huggingface": "huggingface_hub==2.4.0", "modelscope": "modelscope-hub==0.5.1"}
# Sizes that lie on both sides of the blocks in which files are read.
SIZES = [0, 1, 1000, 262_143, 262_144, 262_145, 700_000, 1_500_000, 2_000_000]
KINDS = [
    "cut", "cut", "stall", "corrupt", "hang_up", "status", "status", "elsewhere", "changed", "kill", "kill", "kill", "part",
]  # fmt: skip


class Soak:
    def __init__(self, hub: Hub, folder: Path, client: Callable[[str], str], seed: int) -> None:
        self.hub, self.folder, self.client = hub, folder, client
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.runs = self.successes = self.models = 0

    def origin(self, number: int, version: int) -> Path:
        folder = self.folder / f"origin-{number}-{version}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model": number, "version": version}))
        for index in range(self.random.randint(2, 5)):
            (folder / f"model-{index}.safetensors").write_bytes(self.random.randbytes(self.random.choice(SIZES)))
        (folder / "tokenizer.json").write_bytes(self.random.randbytes(self.random.choice(SIZES[:4])))
        return folder

    def spoil(self, kind: str, job: Any) -> bool:
        """Something that goes wrong with one of the next requests, or has gone wrong with what is staged: whether it has."""
        path = self.random.choice(["/cdn/|/repo/", "/cdn/|/repo/", "/resolve/|/repo/"])
        place = self.random.randrange(max(2, max(entry["size"] for entry in job["model"]["files"])))
        times = self.random.randint(1, 2)
        if kind == "cut":
            self.hub.faults.append(Fault(path, cut_at=place, times=times))
        elif kind == "stall":
            self.hub.faults.append(Fault(path, stall_at=place, times=1))
        elif kind == "corrupt":
            self.hub.faults.append(Fault(path, corrupt_at=self.random.randrange(1000), times=times))
        elif kind == "hang_up":
            self.hub.faults.append(Fault(path, hang_up=True, times=times))
        elif kind == "status":
            status = self.random.choice([401, 403, 404, 416, 429, 500, 503])
            self.hub.faults.append(Fault(path, status=status, times=times))
        elif kind == "elsewhere":  # a redirect to what is no file
            self.hub.faults.append(Fault(path, status=302, headers={"Location": f"{self.hub.url}/lost"}, times=times))
        elif kind == "part":  # what an unlucky crash leaves: a begun file with wrong bytes, or too many of them
            staging = Path(model_jobs.place_of(job).staging(job["model"]["commit"]), "parts")
            begun = list(staging.rglob("*.incomplete"))[:1]
            for part in begun:
                part.write_bytes(self.random.randbytes(self.random.choice([1, 5000, 3_000_000])))
            return bool(begun)
        return False

    def wait(self, process: int, seconds: float | None) -> bool:
        """Whether the process had to be killed when the time was over."""
        deadline = None if seconds is None else time.monotonic() + seconds
        while os.waitpid(process, os.WNOHANG)[0] == 0:
            if deadline is not None and time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
                return bool(os.WIFSIGNALED(os.waitpid(process, 0)[1]))
            time.sleep(0.005)
        return False

    def check(self, job: Any, origin: Path) -> bool:
        """Whether the run said that the model is there; what it then must be."""
        place = model_jobs.place_of(job)
        status = json.loads(Path(place.staging(job["model"]["commit"]) + ".json").read_text())
        final = Path(place.final(job["model"]["commit"]))
        if status["state"] == "done" or os.path.lexists(final):
            names = {str(path.relative_to(final)) for path in final.rglob("*") if path.is_file()}
            assert names - {model_store.STAMP, hubs.MANIFEST} == {path.name for path in origin.iterdir()}
            for path in origin.iterdir():
                assert (final / path.name).read_bytes() == path.read_bytes(), (
                    f"{path.name} is wrong and was called right"
                )
        if status["state"] == "done":
            assert Path(place.link).resolve() == final
        return status["state"] == "done"

    def model(self, number: int) -> None:
        source = self.random.choice(["huggingface", "modelscope"])
        official = self.random.random() < 0.3
        root, version = self.folder / "models", 0
        origin = self.origin(number, version)
        name = f"{REPO}-{number}"
        self.hub.add(name, origin)
        self.hub.xet = self.random.random() < 0.5  # what most weights are told to be in

        def new_job() -> Any:
            model = model_jobs.read_model(name, self.hub.url, source)
            python = self.client(CLIENTS[source]) if official else None
            changes = {"client_python": python, "timeout": 1, "backoff": 0.01, "jobs": self.random.randint(1, 4)}
            return model_jobs.make_job(model, root, self.hub.url, **changes)

        self.hub.faults.clear()
        job = new_job()
        kinds = [self.random.choice(KINDS) for _ in range(self.random.randint(2, 6))]
        for _ in range(40):
            kind = kinds.pop() if kinds else ""
            hit = self.spoil(kind, job)
            if kind == "changed":  # between the listing and the files
                version, hit = version + 1, True
                origin = self.origin(number, version)
                self.hub.add(name, origin)
                if source == "huggingface":  # commits stay what they are
                    job = new_job()
            self.runs += 1
            # Killed at a moment between nothing done and everything in its place.
            seconds = self.random.uniform(0.0, 1.2 if official else 0.5) if kind == "kill" else None
            hit |= self.wait(model_jobs.spawn(job), seconds)
            hit |= any(fault.times == 0 for fault in self.hub.faults)
            self.hub.faults = [fault for fault in self.hub.faults if fault.times]
            if kind and hit:  # what met nobody is no fault
                self.counts[kind] += 1
            stale = source == "modelscope" and job["model"]["commit"] != self.commit(name, source)
            if stale:  # the branch has moved on: what was listed is not to be had any more
                job = new_job()
            elif self.check(job, origin):
                self.successes += 1
                break
        else:
            status = Path(model_jobs.place_of(job).staging(job["model"]["commit"]) + ".json").read_text()
            pytest.fail(f"model {number} is not there after 40 runs: {status}")
        self.models += 1

    def commit(self, name: str, source: str) -> str:
        faults, self.hub.faults = self.hub.faults, []
        try:
            commit: str = model_jobs.read_model(name, self.hub.url, source)["commit"]
            return commit
        finally:
            self.hub.faults = faults


def test_soak(tmp_path: Path, tool_environment: Callable[..., Path]) -> None:
    with Hub() as hub:
        hub.link = Link(5_000_000)
        soak = Soak(hub, tmp_path, lambda requirement: str(tool_environment(requirement) / "python"), SEED)
        number = 0
        while sum(soak.counts.values()) < FAULTS:
            soak.model(number)
            number += 1
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.counts.items()))
    print(
        f"\nsoak: {sum(soak.counts.values())} faults ({counts}) in {soak.runs} runs of {soak.models} models, "
        f"{soak.successes} successes, all of them right; seed {SEED}"
    )
