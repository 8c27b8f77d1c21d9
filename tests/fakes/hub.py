# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for the Hugging Face Hub: serves folders as repositories, and fails in the ways that hubs do.

The same repositories are there by ModelScope's API, with the paths, answers and headers that modelscope-hub 0.5 asks for and
reads (`_legacy_api.py`, `_download.py`): both hubs may hold the same names, and no path of one is a path of the other.

    with Hub() as hub:
        commit = hub.add("owner/name", folder)              # of the branch main
        hub.faults.append(Fault("model.safetensors", cut_at=1000, times=1))
        ...HF_ENDPOINT=hub.url...

Paths, headers and error codes are those that huggingface_hub 1.33 asks for and reads (`hf_api.py`, `file_download.py`,
`utils/_http.py`). Weights are answered as the hub answers LFS files: a redirect to another address that needs no token. With
`hub.xet` they are told to be in Xet storage, too, and are to be had there (`xet.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import xet
from .server import Answer, Handler, Link, Server

LFS = (".safetensors", ".bin", ".pt", ".gguf")


@dataclass
class Fault:
    """What goes wrong with requests whose path `path`, a regular expression, is found in.

    Of the query, only ModelScope's name of a file counts: .../repo?FilePath=x is looked at as .../repo/x.
    """

    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None  # byte of the answer's body
    stall_at: int | None = None
    hang_up: bool = False
    corrupt_at: int | None = None  # one bit of this byte of the answer's body is another
    times: int | None = None  # how many requests it meets; None: all
    method: str = "GET"


@dataclass
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def lfs_facts(self, digest: str) -> dict[str, Any]:
        return {"lfs": {digest: self.sha256, "size": len(self.data), "pointerSize": 135}} if self.lfs else {}


@dataclass
class Repository:
    token: str | None  # what a gated repository asks for
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)


def _error(status: int, code: str, message: str) -> Answer:
    return Answer(status, json.dumps({"error": message}).encode(), {"X-Error-Code": code, "X-Error-Message": message})


def _json(value: Any) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _ranged(file: File, wanted: str | None, headers: dict[str, str]) -> Answer:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if not match:
        return Answer(200, file.data, headers)
    size, start = len(file.data), int(match[1])
    if start >= size:
        return Answer(416, b"", {"Content-Range": f"bytes */{size}"})
    end = min(int(match[2] or size - 1), size - 1)
    return Answer(206, file.data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


class Hub(Server):
    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        super().__init__(port, host)
        self.link: Link | None = None  # what all answers go through
        # Whether weights are told to be in Xet storage, as most are today. They are served by HTTP, too.
        self.xet = False
        self.storage = xet.Storage()
        self.listing_limit = 3000  # entries after which ModelScope ends a listing without a word
        self.direct = False  # whether weights are sent at once, without the redirect to storage
        self.repositories: dict[str, Repository] = {}
        self.faults: list[Fault] = []

    def add(self, name: str, folder: Path, revision: str = "main", token: str | None = None) -> str:
        """Serves the files of a folder as a revision of a repository; returns its commit. With a token, it is gated."""
        files = {
            str(path.relative_to(folder)): File(path.read_bytes(), lfs=path.suffix in LFS)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        commit = hashlib.sha1(repr([(path, file.etag) for path, file in files.items()]).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository(token))
        repository.commits[commit] = files
        repository.revisions.update({revision: commit, commit: commit})
        return commit

    def paths(self, method: str = "GET") -> list[str]:
        """Paths that were asked for, without their queries."""
        return [urlsplit(path).path for asked, path, _ in self.requests if asked == method]

    def respond(self, request: Handler) -> Answer:
        url = urlsplit(request.path)
        query = parse_qs(url.query)
        answer = self._answer(url.path, query, request)
        path = "/".join([unquote(url.path), *query.get("FilePath", [])])
        if self.link is not None and answer.status in (200, 206):
            answer.pace = self.link
        for fault in self.faults:
            if fault.times != 0 and fault.method == request.command and re.search(fault.path, path):
                if fault.times is not None:
                    fault.times -= 1
                if fault.status:
                    return Answer(fault.status, b"{}", fault.headers)
                if fault.corrupt_at is not None and len(answer.body) > fault.corrupt_at:
                    body = bytearray(answer.body)
                    body[fault.corrupt_at] ^= 1
                    answer.body = bytes(body)
                answer.cut_at, answer.stall_at, answer.hang_up = fault.cut_at, fault.stall_at, fault.hang_up
        return answer

    def _answer(self, path: str, query: dict[str, list[str]], request: Handler) -> Answer:
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self._cdn(match[1], request)
        if match := re.fullmatch(r"/cas/(?:v([12])/)?reconstructions/([0-9a-f]{64})", path):
            return self._reconstruction(int(match[1] or 1), match[2], request)
        if match := re.fullmatch(r"/cas/xorbs/default/([0-9a-f]{64})", path):
            return self._xorb(match[1], query.get("X-Xet-Signed", [""])[0], request)
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/(repo|repo/files|revisions)", path):
            return self._modelscope(match[1], match[2], {name: values[0] for name, values in query.items()}, request)
        forms = {
            r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?": self._model,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
            r"/api/models/([^/]+/[^/]+)/xet-read-token/([^/]+)": self._xet_token,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
        }
        for form, method in forms.items():
            if match := re.fullmatch(form, path):
                name, revision, *rest = (unquote(part or "main") for part in match.groups())
                refusal = self._authorized(name, revision, request)
                return refusal or method(name, revision, *rest, query=query, request=request)
        return _error(404, "", "Sorry, we can't find the page you are looking for.")

    def _authorized(self, name: str, revision: str, request: Handler) -> Answer | None:
        """The refusal, if there is one. To strangers, what is not there looks like what they may not see."""
        repository, sent = self.repositories.get(name), request.headers.get("Authorization")
        if repository is None:
            return _error(404 if sent else 401, "RepoNotFound", "Repository not found")
        if repository.token and sent != f"Bearer {repository.token}":
            return _error(403 if sent else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if revision not in repository.revisions:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _files(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        commit = self.repositories[name].revisions[revision]
        return commit, self.repositories[name].commits[commit]

    def _model(self, name: str, revision: str, *, query: dict[str, list[str]], request: Handler) -> Answer:
        commit, files = self._files(name, revision)
        blobs = query.get("blobs", [""])[0] in ("true", "1", "True")
        siblings = [
            {
                "rfilename": path,
                **({"size": len(file.data), "blobId": file.blob_id, **file.lfs_facts("sha256")} if blobs else {}),
            }
            for path, file in files.items()
        ]
        gated = "manual" if self.repositories[name].token else False
        facts = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": gated, "disabled": False}
        return _json({**facts, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def _tree(self, name: str, revision: str, *, query: dict[str, list[str]], request: Handler) -> Answer:
        files = self._files(name, revision)[1]
        return _json(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(file.data),
                    "oid": file.blob_id,
                    **file.lfs_facts("oid"),
                    **({"xetHash": self.storage.add(file.data)} if self.xet and file.lfs else {}),
                }
                for path, file in files.items()
            ]
        )

    def _resolve(self, name: str, revision: str, path: str, *, query: dict[str, list[str]], request: Handler) -> Answer:
        commit, files = self._files(name, revision)
        file = files.get(path)
        if file is None:
            return _error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if not file.lfs or self.direct:
            return _ranged(file, request.headers.get("Range"), headers)
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
        if self.xet:
            linked["X-Xet-Hash"] = self.storage.add(file.data)
            linked["Link"] = f'<{self.url}/api/models/{name}/xet-read-token/{commit}>; rel="xet-auth"'
        # Another host name of the same server: clients do not take their token there.
        location = f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{file.sha256}"
        return Answer(302, b"", {**headers, **linked, "Location": location})

    def _cdn(self, digest: str, request: Handler) -> Answer:
        commits = [files for repository in self.repositories.values() for files in repository.commits.values()]
        file = next((file for files in commits for file in files.values() if file.lfs and file.sha256 == digest), None)
        if file is None:
            return Answer(403)
        headers = {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        return _ranged(file, request.headers.get("Range"), headers)

    # ---- Xet storage ----

    def _xet_token(self, name: str, revision: str, *, query: dict[str, list[str]], request: Handler) -> Answer:
        token, expires = self.storage.token()
        answer = _json({"casUrl": f"{self.url}/cas", "accessToken": token, "exp": expires})
        answer.headers.update({"X-Xet-Cas-Url": f"{self.url}/cas", "X-Xet-Access-Token": token})
        answer.headers["X-Xet-Token-Expiration"] = str(expires)
        return answer

    def _reconstruction(self, version: int, name: str, request: Handler) -> Answer:
        if not self.storage.allowed(request.headers.get("Authorization")):
            return Answer(401)
        if version not in self.storage.versions or name not in self.storage.files:
            return Answer(404)
        wanted = request.headers.get("Range")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "bytes=0-9223372036854775807")
        if not match:
            return Answer(400)
        found = self.storage.reconstruction(version, name, int(match[1]), int(match[2]) + 1, f"{self.url}/cas")
        return _json(found) if found else Answer(416)

    def _xorb(self, name: str, signature: str, request: Handler) -> Answer:
        """The signature is of one range; a token would be refused by the real storage, whose own the address holds."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or "")
        if request.headers.get("Authorization") or not match or name not in self.storage.xorbs:
            return Answer(400)
        if signature != self.storage.signature(name, int(match[1]), int(match[2])):
            return Answer(403)
        return _ranged(File(self.storage.xorbs[name].data, lfs=True), match[0], {})

    # ---- ModelScope ----

    def _modelscope(self, name: str, what: str, query: dict[str, str], request: Handler) -> Answer:
        repository = self.repositories.get(name)
        # Both forms of the token are sent, and either is enough.
        token = repository.token if repository else None
        cookie, bearer = request.headers.get("Cookie") or "", request.headers.get("Authorization") or ""
        allowed = token is None or f"m_session_id={token}" in cookie or bearer == f"Bearer {token}"
        if repository is None or not allowed:
            return _refuse(404 if allowed else 403, 10010205001, "Model not found or access denied")
        if what == "revisions":
            names = [key for key in repository.revisions if key not in repository.commits]
            branches = [{"Revision": key, "CreatedAt": 0} for key in names]
            return _data({"RevisionMap": {"Branches": branches, "Tags": []}})
        revision = query.get("Revision", "master")
        if revision == "master" and "master" not in repository.revisions:
            revision = "main"  # the name that `add` gives if it is given none
        if revision not in repository.revisions:
            return _refuse(404, 10010205003, f"revision {revision} not found")
        commit, files = self._files(name, revision)
        if what == "repo":
            file = files.get(query.get("FilePath", ""))
            if file is None:
                return _refuse(404, 10010205004, "file not found")
            headers = {"ETag": f'"{file.sha256}"', "Accept-Ranges": "bytes", "X-Linked-ETag": f'"{file.sha256}"'}
            return _ranged(file, request.headers.get("Range"), headers)
        folders = {str(parent) for path in files for parent in Path(path).parents if str(parent) != "."}
        entries: list[dict[str, Any]] = [
            {"Path": path, "Name": Path(path).name, "Type": "tree", "Size": 0, "Sha256": "", "Revision": commit}
            for path in sorted(folders)
        ]
        for path, file in files.items():
            facts = {"Path": path, "Name": Path(path).name, "Type": "blob", "Size": len(file.data), "IsLFS": file.lfs}
            entries.append({**facts, "Sha256": file.sha256, "Revision": commit})
        root = query.get("Root", "").strip("/")
        entries = [entry for entry in entries if not root or entry["Path"].startswith(f"{root}/")]
        if query.get("Recursive") != "True":
            entries = [entry for entry in entries if "/" not in entry["Path"][len(root) :].lstrip("/")]
        return _data({"Files": entries[: self.listing_limit]})


def _data(value: Any) -> Answer:
    return _json({"Code": 200, "Data": value, "Message": "success", "RequestId": "stand-in", "Success": True})


def _refuse(status: int, code: int, message: str) -> Answer:
    body = {"Code": code, "Data": None, "Message": message, "RequestId": "stand-in", "Success": False}
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})
