# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama
from ansible_collections.baremetal.vllm.plugins.modules import random_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights take seconds, and their bytes are looked at elsewhere."""
    monkeypatch.setattr(random_llama, "tensor_bytes", lambda name, shape, generator: random_llama.bfloat16([0.5]) * 64)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_made_once(run_module: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "models/random-llama"
    first = run_module(random_model, path=str(path))
    assert first["changed"] is True
    assert first["config"] == json.loads((path / "config.json").read_text())
    assert first["weights_bytes"] == random_llama.weights_bytes()
    made = digests(path)
    assert run_module(random_model, path=str(path))["changed"] is False
    assert digests(path) == made


def test_made_anew_when_a_file_was_cut(run_module: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "random-llama"
    run_module(random_model, path=str(path))
    made = digests(path)
    (path / "model.safetensors").write_bytes(b"half")
    assert run_module(random_model, path=str(path))["changed"] is True
    assert digests(path) == made


def test_another_seed(run_module: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "random-llama"
    run_module(random_model, path=str(path))
    assert run_module(random_model, path=str(path), seed=1)["changed"] is True
    assert run_module(random_model, path=str(path), seed=1)["changed"] is False


def test_what_a_killed_run_left_is_no_hindrance(run_module: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "random-llama.partial").mkdir()
    (tmp_path / "random-llama.partial/model.safetensors").write_bytes(b"half")
    assert run_module(random_model, path=f"{tmp_path}/random-llama/")["changed"] is True
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith("ansible")] == ["random-llama"]


def test_runs_at_the_same_moment(tmp_path: Path) -> None:
    path = tmp_path / "models/random-llama"
    made = []
    for seed in range(8):
        children = []
        for _ in range(3):
            child = os.fork()
            if not child:
                try:
                    random_llama.write(str(path), seed)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        made.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
        assert random_llama.current(path, seed)
    assert made == [[0, 0, 0]] * 8
    assert [entry.name for entry in path.parent.iterdir()] == ["random-llama"]


def test_check_mode_writes_nothing(run_module: Callable[..., Any], tmp_path: Path) -> None:
    result = run_module(random_model, True, path=f"{tmp_path}/random-llama")
    assert (result["changed"], result["config"]) == (True, random_llama.CONFIG)
    assert not (tmp_path / "random-llama").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_something_else_is_kept(run_module: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
        (path / "precious").touch()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to("nowhere")
    for check in (False, True):
        assert run_module(random_model, check, path=str(path))["msg"] == (
            f"{path} exists and is no random model of this module: name another path or move it away"
        )
    assert path.is_symlink() or path.exists()


def test_a_place_that_cannot_be_written(run_module: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run_module(random_model, path=f"{tmp_path}/file/random-llama")
    assert result["msg"] == f"cannot write the model to {tmp_path}/file/random-llama: Not a directory"


@pytest.mark.parametrize("seed", ["x", 1.5])
def test_a_seed_that_is_none(run_module: Callable[..., Any], tmp_path: Path, seed: Any) -> None:
    assert "seed" in run_module(random_model, path=f"{tmp_path}/x", seed=seed)["msg"]
