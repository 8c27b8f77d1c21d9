# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""A small Llama with random weights, written byte for byte the same on every Python from 3.6 on.

Uses the standard library alone, so that a managed host needs nothing to make it.
"""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import contextlib
import fcntl
import json
import os
import random
import shutil
import struct

# Which bytes a seed gives. Raise it with every change of the generator, so that older folders are made anew.
FORMAT = 1
MANIFEST = "baremetal-random-model.json"
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WORDS = (
    "amber anchor apple arrow autumn basket beacon birch bottle bridge candle canyon castle cedar clover cobalt copper "
    "coral cotton crater dawn desert ember falcon feather fern flint forest garden ginger glacier granite harbor hazel "
    "honey island ivory jasmine juniper kettle lagoon lantern laurel lemon linen magnet maple marble meadow mirror "
    "mountain nectar north oasis olive orchard otter pebble pepper pine planet quartz quiet rain raven ribbon river "
    "saddle saffron sailor satin shadow silver sparrow spring stone summer sunset thistle thunder tiger timber topaz "
    "tulip valley velvet violet walnut willow winter wonder yarrow zephyr"
).split()
# max_position_embeddings is what the quickstart can ask for; the rest is as small as real kernels accept.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 256,
    "eos_token_id": 257,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 384,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_alphabet():
    """The printable character that byte-level tokenizers write for each of the 256 byte values, in byte order."""
    plain = set(range(33, 127)) | set(range(161, 173)) | set(range(174, 256))
    shifted = iter(range(256, 512))
    return [chr(byte if byte in plain else next(shifted)) for byte in range(256)]


def tokenizer():
    """One token a byte, so that any text can be read, then the special tokens, then words that only output uses."""
    alphabet = byte_alphabet()
    vocabulary = dict((character, byte) for byte, character in enumerate(alphabet))
    words = 256 + len(SPECIAL)
    vocabulary.update((alphabet[32] + word, words + index) for index, word in enumerate(WORDS))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(flags, id=256 + index, content=token) for index, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def shapes():
    """Name -> shape of every tensor of the model."""
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    tensors = {
        "lm_head.weight": [vocabulary, hidden],
        "model.embed_tokens.weight": [vocabulary, hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }.items():
            tensors["model.layers.%d.%s.weight" % (layer, name)] = shape
    return tensors


def bfloat16(values):
    """Bytes of the values as bfloat16: the upper half of each little-endian float32."""
    single = struct.pack("<%df" % len(values), *values)
    return b"".join(single[start + 2 : start + 4] for start in range(0, len(single), 4))


def tensor_bytes(name, shape, generator):
    if len(shape) == 1:
        return bfloat16([1.0] * shape[0])
    count, scale = shape[0] * shape[1], shape[1] ** -0.5
    values = [generator.gauss(0, scale) for dummy in range(count)]
    if name == "lm_head.weight":
        # Only the rows of words may win, so that the answer is readable: zero rows give zero logits.
        first, width = 256 + len(SPECIAL), shape[1]
        for row in range(shape[0]):
            if not first <= row < first + len(WORDS):
                values[row * width : (row + 1) * width] = [0.0] * width
    return bfloat16(values)


def safetensors(seed):
    """The model as one safetensors file: length of the header, header, tensors."""
    generator = random.Random(seed)  # noqa: S311 - the same weights for the same seed are wanted
    header, body, offset = {"__metadata__": {"format": "pt"}}, [], 0
    for name, shape in sorted(shapes().items()):
        data = tensor_bytes(name, shape, generator)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        body.append(data)
    text = json.dumps(header, sort_keys=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(body)


def weights_bytes():
    return 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes().values())


def current(path, seed):
    """Whether the folder holds what this format and seed give. Sizes stand for contents: a second look costs nothing."""
    try:
        with open(os.path.join(path, MANIFEST)) as handle:
            manifest = json.load(handle)
        sizes = dict((name, os.path.getsize(os.path.join(path, name))) for name in manifest["files"])
    except (IOError, OSError, ValueError, KeyError, TypeError):
        return False
    return manifest == {"format": FORMAT, "seed": seed, "files": sizes}


def write(path, seed):
    def as_json(value):
        return json.dumps(value, indent=1, sort_keys=True).encode("ascii")

    files = {
        "config.json": as_json(CONFIG),
        "generation_config.json": as_json({"bos_token_id": 256, "eos_token_id": 257}),
        "model.safetensors": safetensors(seed),
        "tokenizer.json": as_json(tokenizer()),
        "tokenizer_config.json": as_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[0],
                "eos_token": SPECIAL[1],
                "pad_token": SPECIAL[1],
                "clean_up_tokenization_spaces": False,
                "model_max_length": CONFIG["max_position_embeddings"],
                "chat_template": CHAT_TEMPLATE,
            }
        ),
    }
    manifest = {"format": FORMAT, "seed": seed, "files": dict((name, len(data)) for name, data in files.items())}
    path = path.rstrip("/")
    parent, staging, former = os.path.dirname(path), path + ".partial", path + ".former"
    if not os.path.exists(parent):
        os.makedirs(parent, exist_ok=True)
    turn = os.open(parent, os.O_RDONLY)
    try:
        # Another run may make the same model at the same moment. Some file systems of the network lock no folders.
        with contextlib.suppress(OSError):
            fcntl.flock(turn, fcntl.LOCK_EX)
        if current(path, seed):
            return
        shutil.rmtree(staging, ignore_errors=True)
        os.makedirs(staging)
        for name, data in sorted(files.items()) + [(MANIFEST, as_json(manifest))]:
            with open(os.path.join(staging, name), "wb") as handle:
                handle.write(data)
        shutil.rmtree(former, ignore_errors=True)
        # In one step: what is half removed would be taken for somebody else's folder.
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, former)
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
        os.close(turn)
