# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where fetched models lie on a host, and what says that they are whole. Standard library, Python 3.6 and newer.

ROOT/owner/name/COMMIT/                  the files, MANIFEST.sha256 and the stamp
ROOT/owner/name/main -> COMMIT           the revision that was asked for
ROOT/.staging/owner--name@COMMIT/        what is on its way: files/ checked, parts/ begun, status.json, lock
"""

from __future__ import absolute_import, division, print_function

__metaclass__ = type

import fcntl
import hashlib
import json
import os
import re
import tempfile
from urllib.parse import unquote, urlsplit

from ansible_collections.baremetal.vllm.plugins.module_utils.hubs import MANIFEST, Problem

STAMP = ".baremetal-complete.json"
FORMAT = 1
BLOCK = 256 * 1024  # what stays in a processor's cache between reading and hashing
# Begins the names of files that a killed process may have left half-written.
UNFINISHED = ".new-"


def write_atomically(path, text, mode=0o644):
    """The whole text or, if anything goes wrong, what was there before."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=UNFINISHED)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sync_folder(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def short_name(model):
    """The model's name below the root."""
    if model["source"] != "http":
        return model["model"]
    last = unquote(urlsplit(model["model"]).path.rstrip("/").rsplit("/", 1)[-1])
    return re.sub(r"[^\w.-]", "-", last).lstrip(".-") or "model"


class Place(object):
    """The folders of one model and revision below a root."""

    def __init__(self, root, model):
        self.root, self.model = root, model
        self.name = short_name(model)
        self.base = os.path.join(root, self.name)
        revision = re.sub(r"[^\w.-]", "-", model["revision"]).lstrip(".-") or "-"
        self.link = os.path.join(
            self.base, revision if model["source"] == "huggingface" else model["source"] + "-" + revision
        )

    def final(self, commit):
        return os.path.join(self.base, commit)

    def staging(self, commit):
        return os.path.join(self.root, ".staging", "%s@%s" % (self.name.replace("/", "--"), commit))

    def stamp(self, folder, selected):
        """What the stamp of a folder says, if it is one of this model with this selection of files."""
        try:
            with open(os.path.join(folder, STAMP)) as handle:
                stamp = json.load(handle)
        except (IOError, OSError, ValueError):
            return None
        wanted = {
            "format": FORMAT,
            "source": self.model["source"],
            "model": self.model["model"],
            "selection": selected,
        }
        if not isinstance(stamp, dict) or dict((key, stamp.get(key)) for key in wanted) != wanted:
            return None
        return stamp if os.path.basename(os.path.realpath(folder)) == stamp.get("commit") else None

    def current(self, selected):
        """The stamp of the folder that the revision's link, or the revision itself as a commit, leads to."""
        for folder in (self.link, self.final(self.model["revision"])):
            stamp = self.stamp(folder, selected)
            if stamp:
                return stamp
        return None

    def links_to(self, commit):
        return commit == self.model["revision"] or (os.path.islink(self.link) and os.readlink(self.link) == commit)

    def foreign(self, commit, selected):
        """A folder in the way that this collection did not make, or made of another selection of files; else nothing."""
        if os.path.lexists(self.base) and (
            not os.path.isdir(self.base) or os.path.lexists(os.path.join(self.base, "config.json"))
        ):
            return self.base
        final = self.final(commit)
        if os.path.lexists(final) and not os.path.exists(os.path.join(final, STAMP)):
            return final
        if os.path.lexists(self.link) and not os.path.islink(self.link) and self.link != final:
            return self.link
        return None

    def same_files(self, entries):
        """(entry, path) of files that another revision, or the folder under repair, has by its stamp's hash and by size."""
        known = dict((entry["sha256"], entry) for entry in entries if entry.get("sha256"))
        for name in sorted(os.listdir(self.base)) if os.path.isdir(self.base) else ():
            folder = os.path.join(self.base, name)
            stamp = None if os.path.islink(folder) else any_stamp(folder)
            for old in stamp["files"] if stamp else ():
                entry, path = known.get(old["sha256"]), os.path.join(folder, old["path"])
                if entry and os.path.isfile(path) and os.path.getsize(path) == entry["size"]:
                    yield entry, path

    def linked_bytes(self, commit, entries):
        """Bytes of the commit that will be linked to files that are there, and take no room; without what has come already."""
        checked = os.path.join(self.staging(commit), "files")
        sizes = dict((entry["path"], entry["size"]) for entry, dummy in self.same_files(entries))
        return sum(size for path, size in sizes.items() if not os.path.exists(os.path.join(checked, path)))

    def staged_bytes(self, commit):
        """Bytes of the commit that have come already."""
        total = 0
        for part in ("files", "parts"):
            for parent, folders, names in os.walk(os.path.join(self.staging(commit), part)):
                folders.sort()
                total += sum(os.lstat(os.path.join(parent, name)).st_size for name in names)
        return total


def any_stamp(folder):
    """What the stamp of a folder says, whatever model it is of."""
    try:
        with open(os.path.join(folder, STAMP)) as handle:
            stamp = json.load(handle)
        return stamp if stamp["format"] == FORMAT else None
    except (IOError, OSError, ValueError, KeyError, TypeError):
        return None


def differences(folder, files):
    """What is not as the stamp says, by name and size: costs one look at each name, and reads nothing."""
    found = []
    for entry in files:
        try:
            size = os.stat(os.path.join(folder, entry["path"])).st_size
        except OSError as error:
            found.append("%s: %s" % (entry["path"], error.strerror))
            continue
        if size != entry["size"]:
            found.append("%s has %d bytes and not %d" % (entry["path"], size, entry["size"]))
    return found


class Digests(object):
    """The hashes of a file while it passes by."""

    def __init__(self, entry):
        self.entry = entry
        self.sha256 = hashlib.sha256()
        # Small files have git's own hash on the Hugging Face hub.
        self.git = hashlib.sha1(("blob %d\0" % entry["size"]).encode("ascii")) if entry.get("git") else None  # noqa: S324

    def update(self, data):
        self.sha256.update(data)
        if self.git:
            self.git.update(data)

    def wrong(self):
        """What differs from what the hub said, or nothing."""
        if self.entry.get("sha256") and self.sha256.hexdigest() != self.entry["sha256"]:
            return "sha256 %s and not %s" % (self.sha256.hexdigest(), self.entry["sha256"])
        if self.git and self.git.hexdigest() != self.entry["git"]:
            return "git hash %s and not %s" % (self.git.hexdigest(), self.entry["git"])
        return ""


def hash_file(path, digests, count=None, limit=None):
    """Reads a file, or its first `limit` bytes, into the digests; `count` is told how many bytes each step had."""
    left, buffer = limit, memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as handle:
        while left is None or left > 0:
            size = handle.readinto(buffer if left is None else buffer[: min(BLOCK, left)])
            if not size:
                break
            digests.update(buffer[:size])
            left = None if left is None else left - size
            if count:
                count(size)


class Lock(object):
    """A lock that ends with its holder, however that ends: the kernel keeps it."""

    def __init__(self, path):
        self.path, self.handle = path, None

    def take(self):
        """Whether nobody else has it. The file goes with the staging folder, so that a name may come to mean another file."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_ino == os.stat(self.path).st_ino:
                    self.handle = handle
                    return True
            except (IOError, OSError) as error:
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    return False
                if not isinstance(error, FileNotFoundError):
                    raise
                continue
            os.close(handle)

    def release(self):
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


def held(path):
    """Whether somebody holds the lock."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except (IOError, OSError):
        return True
    finally:
        os.close(handle)


def existing_parent(path):
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def free_bytes(path):
    facts = os.statvfs(existing_parent(path))
    return facts.f_bavail * facts.f_frsize


def check_writable(root):
    parent = existing_parent(root)
    if not os.access(parent, os.W_OK | os.X_OK):
        readonly = os.statvfs(parent).f_flag & os.ST_RDONLY
        raise Problem(
            "%s cannot be written (%s): mount it writable, or set model_root to another folder"
            % (parent, "its file system is mounted read-only" if readonly else "no permission")
        )


def manifest_text(files):
    return "".join("%s  %s\n" % (entry["sha256"], entry["path"]) for entry in files)


def finish(folder, place, commit, selected, files):
    """Writes what says that the folder is whole; the stamp comes last."""
    for name in os.listdir(folder):
        if name.startswith(UNFINISHED):
            os.unlink(os.path.join(folder, name))
    write_atomically(os.path.join(folder, MANIFEST), manifest_text(files))
    stamp = {
        "format": FORMAT,
        "source": place.model["source"],
        "model": place.model["model"],
        "commit": commit,
        "selection": selected,
        "files": [{"path": entry["path"], "size": entry["size"], "sha256": entry["sha256"]} for entry in files],
    }
    write_atomically(os.path.join(folder, STAMP), json.dumps(stamp, indent=1, sort_keys=True) + "\n")
    sync_folder(folder)


def flip(place, commit):
    """Lets the revision's link lead to the commit. Returns whether it did not before."""
    if place.links_to(commit):
        return False
    temporary = place.link + ".new-%d" % os.getpid()
    os.symlink(commit, temporary)
    os.rename(temporary, place.link)
    sync_folder(place.base)
    return True
