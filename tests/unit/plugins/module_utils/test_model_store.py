# SPDX-License-Identifier: GPL-3.0-or-later
"""What lies in a model's folder."""

from __future__ import annotations

from pathlib import Path

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store


def test_what_a_killed_process_began_is_not_part_of_the_model(tmp_path: Path) -> None:
    """A process killed while it wrote the manifest left a temporary file, which came along with the next run's rename."""
    place = model_store.Place(str(tmp_path), {"source": "http", "model": "a/b", "revision": "main"})
    folder = tmp_path / "staging"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / f"{model_store.UNFINISHED}x1").write_text("half a man")
    entry = {"path": "config.json", "size": 2, "sha256": "0" * 64}
    model_store.finish(str(folder), place, "c0", {}, [entry])
    assert {path.name for path in folder.iterdir()} == {"config.json", hubs.MANIFEST, model_store.STAMP}
