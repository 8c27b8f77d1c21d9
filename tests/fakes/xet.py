# SPDX-License-Identifier: GPL-3.0-or-later
"""Hugging Face's Xet storage, as far as reading goes: files as terms of xorbs, xorbs as chunks with headers, signed addresses.

By the protocol's specification (huggingface.co/docs/xet: api, auth, download-protocol, xorb) and for the clients that read it:
hf_xet 1.2.0 (the first reconstruction API, at an address without its number) to 1.8.0 (which asks for the second one first).
Chunks are not compressed, which the format allows; hashes are made here, as clients take them as names.
"""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass
from typing import Any

CHUNK = 64 * 1024  # the aimed-at size; 128 KiB are the most that clients take
XORB_CHUNKS = 16  # far below the 64 MiB of the real ones, so that files of tests have more than one
TOKEN_S = 3600


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join((b"xet", *parts))).hexdigest()


def chunk_header(length: int) -> bytes:
    """Version, compressed length, compression scheme (0: none), length; the lengths have three bytes, little end first."""
    three = struct.pack("<I", length)[:3]
    return b"\0" + three + b"\0" + three


@dataclass
class Xorb:
    data: bytes
    edges: list[int]  # where each chunk begins, and the end of the last
    lengths: list[int]  # of the chunks' content

    @property
    def hash(self) -> str:
        return digest(b"xorb", self.data)


def make_xorbs(content: bytes) -> list[Xorb]:
    xorbs = []
    for start in range(0, len(content), CHUNK * XORB_CHUNKS):
        part = content[start : start + CHUNK * XORB_CHUNKS]
        chunks = [part[at : at + CHUNK] for at in range(0, len(part), CHUNK)]
        edges, data = [0], b""
        for chunk in chunks:
            data += chunk_header(len(chunk)) + chunk
            edges.append(len(data))
        xorbs.append(Xorb(data, edges, [len(chunk) for chunk in chunks]))
    return xorbs


class Storage:
    """What is stored, and who may read it."""

    def __init__(self) -> None:
        self.versions = {1, 2}  # of the reconstruction API
        self.files: dict[str, list[Xorb]] = {}
        self.xorbs: dict[str, Xorb] = {}
        self.tokens: dict[str, float] = {}  # token -> when it expires, in seconds since 1970

    def add(self, content: bytes) -> str:
        name = digest(b"file", content)
        if name not in self.files:
            self.files[name] = make_xorbs(content)
            self.xorbs.update((xorb.hash, xorb) for xorb in self.files[name])
        return name

    def token(self) -> tuple[str, int]:
        """A new one for reading, and when it expires."""
        expires = int(time.time()) + TOKEN_S
        token = digest(b"token", str((len(self.tokens), expires)).encode())
        self.tokens[token] = expires
        return token, expires

    def allowed(self, authorization: str | None) -> bool:
        return self.tokens.get((authorization or "").removeprefix("Bearer "), 0) > time.time()

    def signature(self, xorb: str, start: int, end: int) -> str:
        return digest(b"signature", f"{xorb} {start} {end}".encode())

    def reconstruction(self, version: int, name: str, start: int, end: int, endpoint: str) -> dict[str, Any] | None:
        """How the bytes from start up to, and not with, end are put together; None where the file ends before them."""
        position, offset, terms, fetches = 0, None, [], []
        for xorb in self.files[name]:
            first = last = None
            for index, length in enumerate(xorb.lengths):
                if position < end and position + length > start:
                    if offset is None:
                        offset = start - position
                    first, last = index if first is None else first, index + 1
                position += length
            if first is not None and last is not None:
                chunks = {"start": first, "end": last}
                terms.append({"hash": xorb.hash, "unpacked_length": sum(xorb.lengths[first:last]), "range": chunks})
                fetches.append((xorb.hash, chunks, {"start": xorb.edges[first], "end": xorb.edges[last] - 1}))
        if offset is None:
            return None
        found: dict[str, list[dict[str, Any]]] = {}
        for xorb_hash, chunks, place in fetches:
            url = f"{endpoint}/xorbs/default/{xorb_hash}?X-Xet-Signed={self.signature(xorb_hash, place['start'], place['end'])}"
            found.setdefault(xorb_hash, []).append(
                {"url": url, "range": chunks, "url_range": place}
                if version == 1
                else {"url": url, "ranges": [{"chunks": chunks, "bytes": place}]}
            )
        return {"offset_into_first_range": offset, "terms": terms, {1: "fetch_info", 2: "xorbs"}[version]: found}
