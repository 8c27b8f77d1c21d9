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
  - Reads C(config.json) and the size of the weights of a model. Never changes anything.
  - A model that is not there, or that cannot be read, is no failure of the module but a RV(problem), so that a preflight
    can collect what is wrong on every host.
options:
  path:
    description: Folder where the model lies, or will lie once it is fetched.
    type: path
    required: true
  repo:
    description: Repository on the hub, C(owner/name). Without it the model must lie in O(path).
    type: str
  revision:
    description: Branch, tag or commit.
    type: str
    default: main
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
  - baremetal.vllm maintainers
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
    path: /srv/models/Qwen/Qwen2.5-0.5B-Instruct
    repo: Qwen/Qwen2.5-0.5B-Instruct
  register: info
"""

RETURN = r"""
commit:
  description: Commit that O(revision) stands for; empty for a local folder.
  returned: success
  type: str
config:
  description: The C(config.json), empty when there is a problem.
  returned: success
  type: dict
present:
  description: Whether the model lies complete in O(path).
  returned: success
  type: bool
problem:
  description: One line that says what is wrong and how to go on, or nothing.
  returned: success
  type: str
weights_bytes:
  description: Size of the weight files.
  returned: success
  type: int
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule

try:
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError
    from urllib.parse import quote
    from urllib.request import Request, urlopen
except ImportError:  # pragma: no cover - Python 2 only meets this file when ansible-test compiles it
    HTTPException = HTTPError = URLError = Exception

# Written by the role `model` next to the files once all of them are there.
COMPLETE = ".baremetal-complete.json"


class Problem(Exception):
    """What is wrong with the model, in one line."""


def weight_size(sizes):
    """Bytes of the weights, given name -> bytes: safetensors where there are any, else what older models have."""
    for suffix in (".safetensors", ".bin", ".pt"):
        found = [size or 0 for name, size in sizes.items() if name.endswith(suffix) and "/" not in name]
        if found:
            return sum(found)
    return 0


def parse_config(text, where):
    try:
        config = json.loads(text)
    except ValueError as error:
        raise Problem("%s is no JSON (%s): fetch the model again" % (where, error))
    if not isinstance(config, dict) or not config:
        raise Problem("%s is no model's configuration: it must be an object with architectures" % where)
    return config


def from_folder(path):
    where = os.path.join(path, "config.json")
    try:
        with open(where) as handle:
            config = parse_config(handle.read(), where)
        sizes = dict((name, os.path.getsize(os.path.join(path, name))) for name in os.listdir(path))
    except (IOError, OSError) as error:
        raise Problem(
            "no model in %s: %s (%s): give the folder that holds config.json and the weights"
            % (path, error.strerror, error.filename)
        )
    return {"config": config, "weights_bytes": weight_size(sizes), "commit": "", "present": True}


def get(url, params):
    headers = {"Authorization": "Bearer " + params["token"]} if params["token"] else {}
    try:
        return urlopen(Request(url, headers=headers), timeout=params["timeout"]).read().decode("utf-8", "replace")
    except HTTPError as error:
        if error.code in (401, 403, 404):
            # The hub says 401 for what does not exist, too, so as not to tell strangers what does.
            raise Problem(
                "model %s (revision %s) is not to be had from %s: HTTP %d. Check the name, and for a gated model accept "
                "its licence there and give model_token" % (params["repo"], params["revision"], params["endpoint"], error.code)
            )
        raise Problem("%s answers HTTP %d: try again later, or give another model_hub_endpoint" % (url, error.code))
    except (URLError, HTTPException, OSError) as error:
        raise Problem(
            "cannot reach the hub %s for model %s (%s): give model_hub_endpoint of a mirror, or the path of a local folder"
            % (params["endpoint"], params["repo"], getattr(error, "reason", error))
        )


def from_hub(params):
    endpoint, repo = params["endpoint"].rstrip("/"), quote(params["repo"])
    answer = get("%s/api/models/%s/revision/%s?blobs=true" % (endpoint, repo, quote(params["revision"], "")), params)
    try:
        information = json.loads(answer)
        sizes = dict((entry["rfilename"], entry.get("size")) for entry in information["siblings"])
        commit = information["sha"]
    except (ValueError, KeyError, TypeError):
        raise Problem("%s is no model hub: its answer has no list of files. Check model_hub_endpoint" % endpoint)
    if "config.json" not in sizes:
        raise Problem("model %s holds no config.json: vLLM cannot serve it" % params["repo"])
    where = "%s/%s/resolve/%s/config.json" % (endpoint, repo, commit)
    config = parse_config(get(where, params), where)
    return {"config": config, "weights_bytes": weight_size(sizes), "commit": commit, "present": False}


def complete(path, params):
    """Whether the folder holds the wanted repository and revision."""
    try:
        with open(os.path.join(path, COMPLETE)) as handle:
            stamp = json.load(handle)
    except (IOError, OSError, ValueError):
        return None
    wanted = {"repo": params["repo"], "revision": params["revision"]}
    return stamp if dict((key, stamp.get(key)) for key in wanted) == wanted else None


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "repo": {"type": "str"},
            "revision": {"type": "str", "default": "main"},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "token": {"type": "str", "no_log": True},
            "timeout": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    params, path = module.params, module.params["path"]
    result = {"config": {}, "weights_bytes": 0, "commit": "", "present": False, "problem": ""}
    try:
        if not params["repo"]:
            result.update(from_folder(path))
        else:
            stamp = complete(path, params)
            if stamp:
                result.update(from_folder(path), commit=stamp.get("commit", ""))
            else:
                result.update(from_hub(params))
    except Problem as problem:
        result["problem"] = str(problem)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
