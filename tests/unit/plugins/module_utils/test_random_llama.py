# SPDX-License-Identifier: GPL-3.0-or-later
"""The generated model: its files fit each other, and a broken write leaves nothing."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random-llama"
    random_llama.write(str(path), 0)
    return path


def test_the_weights_are_a_safetensors_file_of_the_shapes_that_the_config_asks_for(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert (8 + length) % 8 == 0
    end = 0
    for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"]):
        start, stop = tensor["data_offsets"]
        size = 2
        for side in tensor["shape"]:
            size *= side
        assert (tensor["dtype"], start, stop - start) == ("BF16", end, size)
        end = stop
    assert len(data) - 8 - length == end == random_llama.weights_bytes()
    config = json.loads((model / "config.json").read_text())
    layers = {name.split(".")[2] for name in header if ".layers." in name}
    assert len(layers) == config["num_hidden_layers"]
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], config["hidden_size"]]


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    assert random_llama.bfloat16([1.0, -2.0, 0.0]) == b"\x80\x3f\x00\xc0\x00\x00"


def test_any_text_can_be_read_and_only_words_are_said(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values())[:256] == list(range(256))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert not set(special.values()) & set(vocabulary.values())
    ids = sorted([*vocabulary.values(), *special.values()])
    assert ids == list(range(len(ids)))
    assert len(ids) <= random_llama.CONFIG["vocab_size"]
    assert special[random_llama.SPECIAL[0]] == random_llama.CONFIG["bos_token_id"]
    assert special[random_llama.SPECIAL[1]] == random_llama.CONFIG["eos_token_id"]
    settings = json.loads((model / "tokenizer_config.json").read_text())
    assert {settings["bos_token"], settings["eos_token"]} <= set(special)
    data = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, _ = json.loads(data[8 : 8 + length])["lm_head.weight"]["data_offsets"]
    row = 2 * random_llama.CONFIG["hidden_size"]
    head = data[8 + length + start :]
    speaking = [
        index for index in range(random_llama.CONFIG["vocab_size"]) if any(head[index * row : (index + 1) * row])
    ]
    words = [vocabulary["\u0120" + word] for word in random_llama.WORDS]
    assert speaking == words


def test_it_is_current_until_something_changes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(model, path)
    assert random_llama.current(str(path), 0)
    assert not random_llama.current(str(path), 1)
    (path / "config.json").write_text("{}")
    assert not random_llama.current(str(path), 0)
    (path / "config.json").unlink()
    assert not random_llama.current(str(path), 0)


@pytest.mark.parametrize("manifest", ["", "[]", "null", "{}", '{"files": 3}', b"\xff"])
def test_a_broken_manifest_is_not_current(tmp_path: Path, manifest: str | bytes) -> None:
    content = manifest if isinstance(manifest, bytes) else manifest.encode()
    (tmp_path / random_llama.MANIFEST).write_bytes(content)
    assert not random_llama.current(str(tmp_path), 0)


def test_a_broken_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "random-llama"
    path.mkdir()
    (path / "old").touch()
    monkeypatch.setattr(random_llama, "safetensors", lambda seed: b"")
    monkeypatch.setattr(random_llama.os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(random_llama.os.path, "isdir", lambda path: False)
    with pytest.raises(OSError, match="No space left"):
        random_llama.write(str(path), 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["random-llama"]
    assert [entry.name for entry in path.iterdir()] == ["old"]
