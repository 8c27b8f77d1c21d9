# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""What model hubs hold: files with sizes and hashes, and where each is fetched. Standard library, Python 3.6 and newer."""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import fnmatch
import hashlib
import json
import os
import posixpath
import re
import ssl
import time
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener, url2pathname

# Written by the collection beside the files of a folder that it has fetched: what is there, as sha256sum reads it.
MANIFEST = "MANIFEST.sha256"
# Lists of hashes that a folder on a web server may have, in the order in which they are asked for.
LISTS = (MANIFEST, "SHA256SUMS", "sha256sums.txt")
# ModelScope ends a listing at this number of entries without saying so, and knows no pages; folders below it can be listed by
# themselves (modelscope-hub 0.5.1, constants.py and _legacy_api.py).
MODELSCOPE_LIMIT = 3000
# Weights in formats that vLLM does not read where safetensors lie beside them, and Mistral's second copy of those.
DUPLICATES = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.pt", "*.pth", "consolidated*.safetensors")
# A module of sentence-transformers, such as 2_Dense, is a part of the model, with weights in a format of its own; other folders hold the
# same weights once more (Llama's `original`).
PART = re.compile(r"(?:\d+_\w+/)?")
SECRET_HEADERS = ("Authorization", "Cookie")
AGENT = "baremetal.vllm"


class Problem(Exception):
    """What is wrong, in one line. `unreachable`: the hub could not be asked, so that another host may know more."""

    def __init__(self, message, unreachable=False):
        Exception.__init__(self, message)
        self.unreachable = unreachable


class Redirects(HTTPRedirectHandler):
    """Follows redirects, but takes the token to no other server: a hub may send clients to somebody else's storage."""

    # Python before 3.11 follows no 308, which says the same of a GET as 307 does.
    http_error_308 = HTTPRedirectHandler.http_error_302

    def redirect_request(self, request, answer, code, *arguments):
        new = HTTPRedirectHandler.redirect_request(self, request, answer, 307 if code == 308 else code, *arguments)
        if new is not None:
            if request.get_method() == "HEAD":  # Python before 3.13 would ask for the whole file
                new.method = "HEAD"
            old_url, new_url = urlsplit(request.full_url), urlsplit(new.full_url)
            if new_url.netloc != old_url.netloc or (old_url.scheme == "https" and new_url.scheme != "https"):
                for name in SECRET_HEADERS:
                    new.headers.pop(name, None)
        return new


def open_url(url, headers=None, timeout=20, method=None):
    """The answer, for `with`. Raises what urllib raises."""
    opener = build_opener(Redirects, HTTPSHandler(context=ssl.create_default_context()))
    # identity: hubs compress small text files, and lengths and ranges would be those of the compressed ones.
    sent = dict({"User-Agent": AGENT, "Accept-Encoding": "identity"}, **(headers or {}))
    return opener.open(Request(url, headers=sent, method=method), timeout=timeout)


def token_headers(source, token):
    if not token:
        return {}
    headers = {"Authorization": "Bearer " + token}
    if source == "modelscope":  # its older servers read the cookie, its newer ones the header
        headers["Cookie"] = "m_session_id=" + token
    return headers


def file_url(model, endpoint, path):
    """Address of one file."""
    base, repo = endpoint.rstrip("/"), quote(model["model"])
    if model["source"] == "modelscope":
        return "%s/api/v1/models/%s/repo?Revision=%s&FilePath=%s" % (
            base,
            repo,
            quote(model["revision"], ""),
            quote(path, ""),
        )
    if model["source"] == "http":
        return "%s/%s" % (model["model"].rstrip("/"), quote(path))
    return "%s/%s/resolve/%s/%s" % (base, repo, model["commit"], quote(path))


class Hub(object):
    """One source of models, asked for what it holds. `settings`: endpoint, token, timeout."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        self.variable = {"modelscope": "model_modelscope_endpoint", "http": "the address"}.get(
            model["source"], "model_hub_endpoint"
        )
        if model["source"] == "http":
            return
        if not re.match(r"https?://[^/\s]", settings["endpoint"]):
            raise Problem(
                "%s is %r: give an address such as https://huggingface.co" % (self.variable, settings["endpoint"])
            )

    @property
    def endpoint(self):
        return self.model["model"] if self.model["source"] == "http" else self.settings["endpoint"].rstrip("/")

    def get(self, url, method=None, missing=False, attempts=2):
        """(bytes, headers) of the answer; None for what is not there, if it may be `missing`."""
        headers = token_headers(self.model["source"], self.settings.get("token"))
        for attempt in range(attempts):
            last = attempt == attempts - 1
            try:
                with open_url(url, headers, self.settings.get("timeout", 20), method) as answer:
                    return b"" if method == "HEAD" else answer.read(), answer.headers
            except HTTPError as error:
                if error.code == 404 and missing:
                    return None
                if error.code in (429, 500, 502, 503, 504) and not last:
                    time.sleep(min(retry_after(error.headers) or attempt + 1, 5))
                    continue
                raise self._refused(url, error.code)
            except (
                URLError,
                HTTPException,
                OSError,
                ValueError,
            ) as error:  # ValueError: a bad certificate on Python 3.6
                if last or isinstance(getattr(error, "reason", None), (ConnectionRefusedError, ssl.SSLError)):
                    raise Problem(
                        "cannot reach the hub %s for model %s (%s): give %s of a mirror, or the path of a local folder"
                        % (self.endpoint, self.model["model"], getattr(error, "reason", error), self.variable),
                        unreachable=True,
                    )

    def _refused(self, url, code):
        if code in (401, 403, 404):
            # Hubs say 401 for what does not exist, too, so as not to tell strangers what does.
            return Problem(
                "model %s (revision %s) is not to be had from %s: HTTP %d. Check the name, and for a gated model accept "
                "its licence there and give %s"
                % (
                    self.model["model"],
                    self.model["revision"],
                    self.endpoint,
                    code,
                    "model_modelscope_token" if self.model["source"] == "modelscope" else "model_token",
                )
            )
        return Problem(
            "%s answers HTTP %d: try again later, or give another %s" % (url, code, self.variable), unreachable=True
        )

    def json(self, url, read):
        """`read` of the answer's JSON."""
        answer = self.get(url)[0]
        try:
            return read(json.loads(answer.decode("utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Problem(
                "%s is no model hub: its answer has no list of files. Check %s" % (self.endpoint, self.variable)
            )

    def listing(self):
        """(commit, files): what the revision stands for, and each file's path, size and, where known, hashes."""
        commit, files = {"modelscope": self._modelscope, "http": self._http}.get(
            self.model["source"], self._huggingface
        )()
        for entry in files:
            check_path(entry["path"], self.endpoint)
        return commit, sorted(files, key=lambda entry: entry["path"])

    def _huggingface(self, name=None):
        url = "%s/api/models/%s/revision/%s?blobs=true" % (
            self.endpoint,
            quote(name or self.model["model"]),
            quote(self.model["revision"], ""),
        )

        def read(answer):
            files = [
                {
                    "path": entry["rfilename"] + "",
                    "size": entry.get("size"),
                    "sha256": (entry.get("lfs") or {}).get("sha256", ""),
                    "git": "" if entry.get("lfs") else entry.get("blobId") or "",
                }
                for entry in answer["siblings"]
            ]
            return answer["sha"] + "", files, answer.get("id")

        commit, files, own_name = self.json(url, read)
        if name is None and own_name and any(entry["size"] is None for entry in files):
            # A redirect to the name that a model has now may lose the question for sizes.
            return self._huggingface(own_name)
        return commit, files

    def _modelscope(self):
        files = self._modelscope_folder("")
        return digest(files), files

    def _modelscope_folder(self, root):
        """Files of a folder and of those below it."""
        count, files, dummy = self._modelscope_entries(root, True)
        if count < MODELSCOPE_LIMIT:
            return files
        count, files, folders = self._modelscope_entries(root, False)
        if count >= MODELSCOPE_LIMIT:
            raise Problem(
                "%s lists %d files or more in the folder /%s of model %s and does not say the rest: fetch it by other means and "
                "give the path of the folder" % (self.endpoint, MODELSCOPE_LIMIT, root, self.model["model"])
            )
        for folder in folders:
            files += self._modelscope_folder(folder)
        return files

    def _modelscope_entries(self, root, recursive):
        """(number of entries, files, names of folders) of one listing."""
        url = "%s/api/v1/models/%s/repo/files?Revision=%s&Recursive=%s" % (
            self.endpoint,
            quote(self.model["model"]),
            quote(self.model["revision"], ""),
            recursive,
        )

        def read(answer):
            entries = answer["Data"]["Files"] or []
            files = [
                {"path": entry["Path"] + "", "size": entry["Size"], "sha256": entry.get("Sha256") or "", "git": ""}
                for entry in entries
                if entry.get("Type") != "tree"
            ]
            return len(entries), files, [entry["Path"] + "" for entry in entries if entry.get("Type") == "tree"]

        return self.json(url + ("&Root=" + quote(root, "") if root else ""), read)

    def _http(self):
        base = self.model["model"].rstrip("/") + "/"
        if base.startswith("file:"):
            files = list(local_files(url2pathname(urlsplit(base).path)))
            return digest(files), files
        for name in LISTS:
            found = self.get(base + name, missing=True)
            if found:
                hashes = dict(parse_list(found[0].decode("utf-8", "replace"), base + name))
                break
        else:
            page = self.get(base)[0].decode("utf-8", "replace")
            hashes = dict((path, "") for path in links(page, base))
        files = []
        for path in sorted(hashes):
            answer = self.get(base + quote(path), "HEAD")
            size = answer[1].get("Content-Length", "")
            if not size.isdigit():
                raise Problem("%s does not say how large %s is: serve the folder by a server that does" % (base, path))
            tag = "" if hashes[path] else answer[1].get("ETag", "") + answer[1].get("Last-Modified", "")
            files.append({"path": path, "size": int(size), "sha256": hashes[path], "git": "", "tag": tag})
        return digest(files), files


def retry_after(headers):
    """Seconds that a server asks to wait; 0 if it does not say."""
    value = (headers.get("Retry-After") or "") if headers else ""
    return int(value) if value.isdigit() else 0


def digest(files):
    """What stands for a commit where a hub has none: 40 hexadecimal digits that change with any file."""
    text = json.dumps(sorted([entry["path"], entry["size"], entry["sha256"], entry.get("tag", "")] for entry in files))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:40]


def check_path(path, where):
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in parts):
        raise Problem(
            "%s lists a file named %r, which is no path inside a folder: it is not to be trusted" % (where, path)
        )


def local_files(folder):
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name == MANIFEST or name.startswith("."):
                continue
            try:
                facts = os.stat(path)
            except (IOError, OSError) as error:
                raise Problem("%s cannot be read: %s. Put it right, or take it away" % (path, error.strerror))
            # Where nobody has said what is right, at least a change is noticed.
            tag = "%d" % facts.st_mtime
            yield {"path": os.path.relpath(path, folder), "size": facts.st_size, "sha256": "", "git": "", "tag": tag}


def parse_list(text, where):
    """(path, sha256) of each line of what sha256sum writes."""
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.match(r"([0-9a-fA-F]{64}) [ *](?:\./)?(\S.*)\Z", line.rstrip())
            if not match:
                raise Problem("%s has the line %r, which is none of sha256sum: make it anew" % (where, line[:80]))
            yield match.group(2), match.group(1).lower()


def links(page, base):
    """Files that an index page of a web server names, in its own folder."""
    found = set()
    for target in re.findall(r'href\s*=\s*["\']([^"\'?#]+)["\']', page, re.I):
        url = urljoin(base, target)
        if url.startswith(base) and posixpath.dirname(urlsplit(url).path) + "/" == urlsplit(base).path:
            found.add(unquote(url[len(base) :]))
    found = {name for name in found if name and "/" not in name and not name.startswith(".")}
    if "config.json" not in found:
        raise Problem(
            "%s has neither a list of hashes (%s) nor an index page that names config.json: put a list there with "
            "`sha256sum * > %s`" % (base, ", ".join(LISTS), MANIFEST)
        )
    return found


def select(files, include, exclude, duplicates):
    """The files that are fetched: shell patterns on the whole path; second copies of weights go unless `duplicates`."""

    def match(path, patterns):
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    kept = [entry for entry in files if match(entry["path"], include) and not match(entry["path"], exclude)]

    def part(path):
        return PART.match(path).group()

    usual = {
        part(entry["path"])
        for entry in kept
        if entry["path"].endswith(".safetensors") and not match(entry["path"], DUPLICATES)
    }
    return [
        entry
        for entry in kept
        if duplicates or not match(entry["path"], DUPLICATES) or part(entry["path"]) not in usual
    ]


def selection(include, exclude, duplicates):
    """Which files of a commit were asked for, in short."""
    text = json.dumps([sorted(include), sorted(exclude), bool(duplicates)])
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
