#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: model_info
short_description: What a model is, read from its folder or from a hub, before anything is fetched
version_added: 0.1.0
description:
  - Reads C(config.json) and the size of the weights of models. Never changes anything.
  - A model that is not there, or that cannot be read, is no failure of the module but a C(problem) of that model, so that
    a preflight can collect what is wrong on every host.
options:
  models:
    description:
      - The models, each with C(name) (of the entry), C(model), and optionally C(source) and C(revision).
      - C(source) is V(huggingface) for C(owner/name) (the default), V(path) for an absolute path (the default for one) or
        V(generated) for what M(baremetal.vllm.random_model) makes. Other keys are not read.
    type: list
    elements: dict
    required: true
  root:
    description: Folder below which fetched and generated models lie, or will lie.
    type: path
    required: true
  endpoint:
    description: Address of the hub or of a mirror.
    type: str
    default: https://huggingface.co
  token:
    description: Token for gated models.
    type: str
  timeout:
    description: Seconds for one request.
    type: int
    default: 20
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
attributes:
  check_mode:
    description: Runs the same in check mode, as it only reads.
    support: full
  diff_mode:
    description: There is nothing to compare.
    support: none
  platform:
    description: Target platforms.
    platforms: posix
    support: full
"""

EXAMPLES = r"""
- name: What would be fetched
  baremetal.vllm.model_info:
    root: /srv/models
    models:
      - name: chat
        model: Qwen/Qwen2.5-0.5B-Instruct
  register: info
"""

RETURN = r"""
models:
  description: Facts about each model, by the name of its entry.
  returned: success
  type: dict
  contains:
    commit:
      description: Commit that the revision stands for; empty for a local folder.
      type: str
    config:
      description: The C(config.json), empty when there is a problem.
      type: dict
    model:
      description: The model as it was given.
      type: str
    path:
      description: Folder where the model lies, or will lie once it is fetched.
      type: str
    present:
      description: Whether the model lies complete in C(path).
      type: bool
    problem:
      description: One line that says what is wrong and how to go on, or nothing.
      type: str
    revision:
      description: Branch, tag or commit as it was given.
      type: str
    source:
      description: V(huggingface), V(path) or V(generated).
      type: str
    weights_bytes:
      description: Size of the weight files.
      type: int
"""

import json
import os
import re
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama

# Written by the role `model` next to the files once all of them are there.
COMPLETE = ".baremetal-complete.json"
# What a model is called, for each source.
FORMS = {"huggingface": r"[A-Za-z0-9][\w.-]*/\w[\w.-]*\Z", "path": r"/", "generated": r"[\w-]+\Z"}


class Problem(Exception):
    """What is wrong with the model, in one line."""


class Redirects(HTTPRedirectHandler):
    """Follows redirects, but takes the token to no other server: a hub may send clients to somebody else's storage."""

    def redirect_request(self, request, *arguments):
        new = HTTPRedirectHandler.redirect_request(self, request, *arguments)
        old_url, new_url = urlsplit(request.full_url), urlsplit(new.full_url)
        if new_url.netloc != old_url.netloc or (old_url.scheme == "https" and new_url.scheme != "https"):
            new.headers.pop("Authorization", None)
        return new


def weight_size(sizes):
    """Bytes of the weights, given name -> bytes: safetensors where there are any, else what older models have."""
    for suffix in (".safetensors", ".bin", ".pt"):
        found = [size or 0 for name, size in sizes.items() if name.endswith(suffix) and "/" not in name]
        if found:
            return sum(found)
    return 0


def parse_config(data, where):
    try:
        config = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise Problem("%s is no JSON (%s): fetch the model again" % (where, error))
    if not isinstance(config, dict) or not config:
        raise Problem("%s is no model's configuration: it must be an object with architectures" % where)
    return config


def from_folder(path):
    where = os.path.join(path, "config.json")
    try:
        with open(where, "rb") as handle:
            config = parse_config(handle.read(), where)
        sizes = dict((name, os.path.getsize(os.path.join(path, name))) for name in os.listdir(path))
    except (IOError, OSError) as error:
        raise Problem(
            "no model in %s: %s (%s): give the folder that holds config.json and the weights"
            % (path, error.strerror, error.filename)
        )
    weights = weight_size(sizes)
    if weights == 0:
        raise Problem("%s has config.json and no weights (*.safetensors): finish the download of the model" % path)
    return {"config": config, "weights_bytes": weights, "commit": "", "present": True}


def get(url, params, model):
    """Bytes of the answer."""
    if not re.match(r"https?://[^/\s]", params["endpoint"]):
        raise Problem("model_hub_endpoint is %r: give an address such as https://huggingface.co" % params["endpoint"])
    headers = {"Authorization": "Bearer " + params["token"]} if params["token"] else {}
    try:
        return build_opener(Redirects).open(Request(url, headers=headers), timeout=params["timeout"]).read()
    except HTTPError as error:
        if error.code in (401, 403, 404):
            # The hub says 401 for what does not exist, too, so as not to tell strangers what does.
            raise Problem(
                "model %s (revision %s) is not to be had from %s: HTTP %d. Check the name, and for a gated model accept "
                "its licence there and give model_token"
                % (model["model"], model["revision"], params["endpoint"], error.code)
            )
        raise Problem("%s answers HTTP %d: try again later, or give another model_hub_endpoint" % (url, error.code))
    except (URLError, HTTPException, OSError, ValueError) as error:  # ValueError: a bad certificate on Python 3.6
        raise Problem(
            "cannot reach the hub %s for model %s (%s): give model_hub_endpoint of a mirror, or the path of a local folder"
            % (params["endpoint"], model["model"], getattr(error, "reason", error))
        )


def from_hub(params, model):
    stamp = complete(model)
    if stamp:
        return dict(from_folder(model["path"]), commit=stamp.get("commit", ""))
    if os.path.lexists(model["path"]):
        raise Problem(
            "%s is there and is not revision %s of %s as this collection fetched it: move it away, or serve it as it is by "
            "giving its path as the model" % (model["path"], model["revision"], model["model"])
        )
    endpoint, repo = params["endpoint"].rstrip("/"), quote(model["model"])
    answer = get(
        "%s/api/models/%s/revision/%s?blobs=true" % (endpoint, repo, quote(model["revision"], "")), params, model
    )
    try:
        information = json.loads(answer.decode("utf-8"))
        sizes = dict((entry["rfilename"], entry.get("size")) for entry in information["siblings"])
        commit = information["sha"]
    except (ValueError, KeyError, TypeError):
        raise Problem("%s is no model hub: its answer has no list of files. Check model_hub_endpoint" % endpoint)
    if "config.json" not in sizes:
        raise Problem("model %s holds no config.json: vLLM cannot serve it" % model["model"])
    where = "%s/%s/resolve/%s/config.json" % (endpoint, repo, commit)
    config = parse_config(get(where, params, model), where)
    return {"config": config, "weights_bytes": weight_size(sizes), "commit": commit, "present": False}


def complete(model):
    """The stamp of a folder that holds the wanted repository and revision, else None."""
    try:
        with open(os.path.join(model["path"], COMPLETE)) as handle:
            stamp = json.load(handle)
    except (IOError, OSError, ValueError):
        return None
    wanted = {"repo": model["model"], "revision": model["revision"]}
    return stamp if isinstance(stamp, dict) and dict((key, stamp.get(key)) for key in wanted) == wanted else None


def from_generator(path):
    foreign = os.path.lexists(path) and not os.path.exists(os.path.join(path, random_llama.MANIFEST))
    if foreign:
        raise Problem("%s exists and is no generated model: name the model otherwise or move it away" % path)
    present = random_llama.current(path, 0)
    return {"config": random_llama.CONFIG, "weights_bytes": random_llama.weights_bytes(), "present": present}


def describe(entry, params):
    """Facts about one entry of `models`."""
    name = entry.get("model")
    result = {"model": name, "revision": str(entry.get("revision") or "main"), "path": "", "problem": ""}
    result.update(config={}, weights_bytes=0, commit="", present=False)
    try:
        if not isinstance(name, str) or not name:
            raise Problem("service %s has no model: give owner/name or the path of a folder" % entry.get("name"))
        source = entry.get("source") or ("path" if name.startswith("/") else "huggingface")
        result["source"] = source
        if source not in list(FORMS):
            raise Problem(
                "source %s of model %s is not known: give one of %s" % (source, name, ", ".join(sorted(FORMS)))
            )
        if not re.match(FORMS[source], name):
            raise Problem(
                "model %s is no name for source %s: give owner/name for huggingface, an absolute path for path, and letters, "
                "digits, - and _ for generated" % (name, source)
            )
        result["path"] = name if source == "path" else os.path.join(params["root"], name)
        if source == "path":
            result.update(from_folder(name))
        elif source == "generated":
            result.update(from_generator(result["path"]))
        else:
            result.update(from_hub(params, result))
    except Problem as problem:
        result["problem"] = " ".join(str(problem).split())
    return result


def main():
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "root": {"type": "path", "required": True},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "token": {"type": "str", "no_log": True},
            "timeout": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    models = dict((str(entry.get("name")), describe(entry, module.params)) for entry in module.params["models"])
    module.exit_json(changed=False, models=models)


if __name__ == "__main__":
    main()
