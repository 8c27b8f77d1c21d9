# SPDX-License-Identifier: GPL-3.0-or-later
"""cuda_toolkit_info with compilers that answer as nvcc does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import cuda_toolkit_info


def test_toolkits_side_by_side(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, says in (
        ("cuda-12.9", "12.9, V12.9.86"),
        ("cuda-13.0", "13.0, V13.0.48"),
        ("cuda-12.1", "11.8, V11.8.89"),
    ):
        (tmp_path / folder / "bin").mkdir(parents=True)
        nvcc = tmp_path / folder / "bin/nvcc"
        nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {says}"\n')
        nvcc.chmod(0o755)
    (tmp_path / "cuda-11.0/bin").mkdir(parents=True)
    (tmp_path / "cuda-11.0/bin/nvcc").write_text("left over, and not to be run")
    (tmp_path / "cuda-12.9/version.json").write_text(json.dumps({"cuda": {"version": "12.9.1"}}))
    (tmp_path / "cuda").symlink_to("cuda-12.9")
    monkeypatch.setattr(cuda_toolkit_info, "COMPILERS", f"{tmp_path}/cuda-*/bin/nvcc")
    monkeypatch.setattr(cuda_toolkit_info, "LINK", str(tmp_path / "cuda"))
    result = run_module(cuda_toolkit_info, files=[str(tmp_path / "none")])
    assert result["toolkits"] == {"12.9": "12.9.1", "13.0": "13.0"}
    assert result["link"] == str(tmp_path / "cuda-12.9")
    assert result["files"] == {str(tmp_path / "none"): ""}
    assert result["link_blocked"] is False


@pytest.mark.parametrize(
    ("made", "blocked"), [("nothing", False), ("empty folder", False), ("folder", True), ("file", True)]
)
def test_what_is_in_the_place_of_the_link(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, blocked: bool
) -> None:
    path = tmp_path / "cuda"
    if "folder" in made:
        path.mkdir()
    if made == "folder":
        (path / "bin").mkdir()
    if made == "file":
        path.write_text("")
    monkeypatch.setattr(cuda_toolkit_info, "LINK", str(path))
    monkeypatch.setattr(cuda_toolkit_info, "output", lambda *argv: "12.2.0\n" if argv[0] == "g++" else "")
    result = run_module(cuda_toolkit_info)
    assert (result["link"], result["link_blocked"], result["compiler"]) == ("", blocked, "12.2.0")
