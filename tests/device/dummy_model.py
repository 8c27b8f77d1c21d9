#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes a model folder of real shape and no weights, to serve with --load-format dummy.

    PYTHONPATH=collections dummy_model.py CONFIG FOLDER

CONFIG is a name in tests/benchmarks/truth/configs.json or the path of a config.json. The weights are a sparse file of the
size that the planner expects. The tokenizer has a token for every id, so that any answer can be written as text, and any
text made of its tokens is read as the same tokens: prompts of a benchmark keep their length.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config

CONFIGS = Path(__file__).resolve().parents[1] / "benchmarks/truth/configs.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(number: int) -> str:
    """A word for each number, of letters alone: a pre-tokenizer would split any other."""
    digits = ""
    for _ in range(5):
        number, digit = divmod(number, len(LETTERS))
        digits = LETTERS[digit] + digits
    return digits


def tokenizer(vocabulary_size: int) -> dict:
    made = random_llama.tokenizer()
    blank = random_llama.byte_alphabet()[32]
    vocabulary = {token: index for token, index in made["model"]["vocab"].items() if index < 256}
    first = 256 + len(random_llama.SPECIAL)
    vocabulary |= {blank + word(index): index for index in range(first, vocabulary_size)}
    made["model"] |= {"vocab": vocabulary, "ignore_merges": True}
    return made


def write(config: dict, folder: Path) -> None:
    size = parse_config(config).parameters * (4 if config.get("torch_dtype") == "float32" else 2)
    header = json.dumps({"dummy": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": random_llama.SPECIAL[0],
        "eos_token": random_llama.SPECIAL[1],
        "pad_token": random_llama.SPECIAL[1],
        "clean_up_tokenization_spaces": False,
        "chat_template": random_llama.CHAT_TEMPLATE,
    }
    for file, content in {
        "config.json": config,
        "tokenizer.json": tokenizer(config["vocab_size"]),
        "tokenizer_config.json": settings,
    }.items():
        (folder / file).write_text(json.dumps(content))
    with (folder / "model.safetensors").open("wb") as handle:
        handle.write(struct.pack("<Q", len(header)) + header)
        handle.truncate(8 + len(header) + size)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    name = sys.argv[1]
    given = json.loads(Path(name).read_text()) if Path(name).exists() else json.loads(CONFIGS.read_text())[name]
    write(given, Path(sys.argv[2]))
