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
      - C(source) is V(huggingface) for C(owner/name) (the default), V(modelscope), V(http) for the address of a folder
        (C(https://), C(http://) or C(file://), the default for one), V(path) for an absolute path (the default for one) or
        V(generated) for what M(baremetal.vllm.random_model) makes. Other keys are not read.
    type: list
    elements: dict
    required: true
  root:
    description: Folder below which fetched and generated models lie, or will lie.
    type: path
    required: true
  endpoint:
    description: Address of the Hugging Face hub or of a mirror.
    type: str
    default: https://huggingface.co
  modelscope_endpoint:
    description: Address of ModelScope or of a mirror.
    type: str
    default: https://www.modelscope.cn
  token:
    description: Token for gated models of O(endpoint).
    type: str
  modelscope_token:
    description: Token for gated models of O(modelscope_endpoint).
    type: str
  include:
    description: Shell patterns of the files that are wanted, matched against the whole path in the repository.
    type: list
    elements: str
    default: ["*"]
  exclude:
    description: Shell patterns of files that are not wanted.
    type: list
    elements: str
    default: []
  duplicates:
    description: Also have weights in other formats (C(*.bin), C(*.pt) and the like) where there are safetensors.
    type: bool
    default: false
  update:
    description: Ask the hub what the revision stands for, even if it is there already.
    type: bool
    default: false
  repair:
    description: A fetched model that was changed by hand is no problem, but not V(present).
    type: bool
    default: false
  known:
    description:
      - What another host has read, RV(models) of this module. Taken instead of asking the hub, so that all hosts mean the
        same commit and hosts without a way to the hub know what there is.
    type: dict
    default: {}
  timeout:
    description: Seconds for one request.
    type: int
    default: 20
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
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
      description: Commit that the revision stands for, or what stands for one; empty for a local folder.
      type: str
    bytes:
      description: Size of all files that are fetched.
      type: int
    files:
      description: What is fetched, each with C(path), C(size) and, as far as the hub says so, C(sha256) or C(git) hash.
      type: list
      elements: dict
    config:
      description:
        - The C(config.json), empty when there is a problem.
        - Of a model for sentence-transformers, C(sentence_max_seq_length) is added, the context that vLLM gives it.
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
      description: V(huggingface), V(modelscope), V(http), V(path) or V(generated).
      type: str
    staged_bytes:
      description:
        - Bytes of a model that is not V(present) that need no room any more, as an earlier run has brought them already, or as
          another revision or the folder under repair has the same file.
      type: int
    unreachable:
      description: Whether the RV(models.problem) is that the hub cannot be asked from this host.
      type: bool
    weights_bytes:
      description: Size of the weight files.
      type: int
"""

import json
import os
import re

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store, random_llama
from ansible_collections.baremetal.vllm.plugins.module_utils.hubs import Problem

# What a model is called, for each source.
REPOSITORY = r"[A-Za-z0-9][\w.-]*/\w[\w.-]*\Z"
FORMS = {
    "generated": r"[\w-]+\Z",
    "http": r"(https?://[^/\s]+|file://)/[^\s?#]*[^\s?#/]/?\Z",
    "huggingface": REPOSITORY,
    "modelscope": REPOSITORY,
    "path": r"/",
}
BRANCH = {"huggingface": "main", "modelscope": "master"}
# The first of these that a model has says how long its inputs may be, whatever config.json says.
# Source: get_sentence_transformer_tokenizer_config in vLLM 0.25.1 (transformers_utils/config.py), as old as 0.7.2.
SENTENCE_CONFIGS = [
    "sentence_%s_config.json" % kind
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]


INDEX = "model.safetensors.index.json"


def weight_size(sizes):
    """Bytes of the weights, given name -> bytes: safetensors where there are any, else what older models have."""
    for suffix in (".safetensors", ".bin", ".pt"):
        names = [name for name in sizes if name.endswith(suffix) and "/" not in name]
        # Mistral's second copy counts where it is the only one.
        names = [name for name in names if not name.startswith("consolidated")] or names
        if names:
            return sum(sizes[name] or 0 for name in names)
    return 0


def parse_config(data, where):
    try:
        config = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise Problem("%s is no JSON (%s): fetch the model again" % (where, error))
    if not isinstance(config, dict) or not config:
        raise Problem("%s is no model's configuration: it must be an object with architectures" % where)
    return config


def with_sentence_length(config, names, read):
    """The configuration, with the length that a file of sentence-transformers gives. read(name) is its content."""
    for name in SENTENCE_CONFIGS:
        if name in names:
            found = parse_config(read(name), name)
            if "do_lower_case" in found and isinstance(found.get("max_seq_length"), int):
                return dict(config, sentence_max_seq_length=found["max_seq_length"])
            break
    return config


def from_folder(path):
    def read(name):
        with open(os.path.join(path, name), "rb") as handle:
            return handle.read()

    where = os.path.join(path, "config.json")
    try:
        config = parse_config(read("config.json"), where)
        sizes = dict((name, os.path.getsize(os.path.join(path, name))) for name in os.listdir(path))
        config = with_sentence_length(config, sizes, read)
        shards = set((parse_config(read(INDEX), INDEX).get("weight_map") or {}).values()) if INDEX in sizes else set()
    except (IOError, OSError) as error:
        raise Problem(
            "no model in %s: %s (%s): give the folder that holds config.json and the weights"
            % (path, error.strerror, error.filename)
        )
    weights = weight_size(sizes)
    if weights == 0:
        raise Problem("%s has config.json and no weights (*.safetensors): finish the download of the model" % path)
    missing = sorted(shards - set(sizes))
    # An index of files of which none is there is not that of the weights beside it.
    if missing and (len(missing) < len(shards) or any(name.startswith("model-") for name in sizes)):
        raise Problem(
            "%s lacks %d of the %d files that %s names (%s): finish the download of the model"
            % (path, len(missing), len(shards), INDEX, ", ".join(missing[:3]) + (", ..." if missing[3:] else ""))
        )
    return {"config": config, "weights_bytes": weights, "present": True}


def hub_settings(params, source):
    """Endpoint, token and timeout for a source."""
    prefix = "modelscope_" if source == "modelscope" else ""
    token = None if source == "http" else params[prefix + "token"]
    return {"endpoint": params[prefix + "endpoint"], "token": token, "timeout": params["timeout"]}


def fetched(place, stamp, params):
    """Facts about a model that a run has brought before."""
    folder = place.final(stamp["commit"])
    changed = model_store.differences(folder, stamp["files"])
    facts = {"commit": stamp["commit"], "path": folder, "files": stamp["files"]}
    if not changed:
        return dict(from_folder(folder), present=place.links_to(stamp["commit"]), **facts)
    if not params["repair"]:
        raise Problem(
            "%s is not as it was fetched (%s): give model_repair=true to have it right again, or move the folder away and "
            "serve it as it is by giving its path as the model"
            % (folder, "; ".join(changed[:3]) + ("; ..." if changed[3:] else ""))
        )
    try:
        config = from_folder(folder)["config"]
    except Problem:
        config = {}
    return dict(facts, config=config, present=False)


def from_hub(params, model, known):
    place = model_store.Place(params["root"], model)
    selected = hubs.selection(params["include"], params["exclude"], params["duplicates"])
    stamp = None if params["update"] else place.current(selected)
    settings = hub_settings(params, model["source"])
    if stamp is None:
        commit, files = (known["commit"], known["files"]) if known else hubs.Hub(model, settings).listing()
        stamp = place.stamp(place.final(commit), selected)
    if stamp is not None:
        facts = fetched(place, stamp, params)
        commit, files = stamp["commit"], stamp["files"]
    else:
        facts = {"present": False, "path": place.final(commit), "commit": commit}
        facts["files"] = files = hubs.select(files, params["include"], params["exclude"], params["duplicates"])
        sizes = dict((entry["path"], entry["size"]) for entry in files)
        if "config.json" not in sizes:
            raise Problem("model %s holds no config.json: vLLM cannot serve it" % model["model"])
        if not all(isinstance(size, int) and size >= 0 for size in sizes.values()):
            raise Problem(
                "%s does not say how large each file of %s is: give another mirror"
                % (settings["endpoint"], model["model"])
            )
        foreign = place.foreign(commit, selected)
        if foreign:
            raise Problem(
                "%s is there and is not revision %s of %s as this collection fetched it: move it away, or serve it as it is "
                "by giving its path as the model" % (foreign, model["revision"], model["model"])
            )
        model_store.check_writable(place.base)
    if not facts.get("config"):
        if known and known["config"]:
            facts["config"] = known["config"]
        else:

            def address(name):
                return hubs.file_url(dict(model, commit=commit), settings["endpoint"], name)

            def read(name):
                return hubs.Hub(model, settings).get(address(name))[0]

            config = parse_config(read("config.json"), address("config.json"))
            facts["config"] = with_sentence_length(config, [entry["path"] for entry in files], read)
    facts["weights_bytes"] = weight_size(dict((entry["path"], entry["size"]) for entry in files))
    facts["bytes"] = sum(entry["size"] for entry in files)
    if not facts["present"]:
        facts["staged_bytes"] = place.staged_bytes(commit) + place.linked_bytes(commit, files)
    return facts


def from_generator(path):
    foreign = os.path.lexists(path) and not os.path.exists(os.path.join(path, random_llama.MANIFEST))
    if foreign:
        raise Problem("%s exists and is no generated model: name the model otherwise or move it away" % path)
    present = random_llama.current(path, 0)
    return {"config": random_llama.CONFIG, "weights_bytes": random_llama.weights_bytes(), "present": present}


def default_source(name):
    if name.startswith("/"):
        return "path"
    return "http" if re.match(r"(https?|file)://", name) else "huggingface"


def describe(entry, params):
    """Facts about one entry of `models`."""
    name = entry.get("model")
    result = {"model": name, "revision": str(entry.get("revision") or "main"), "path": "", "problem": ""}
    result.update(
        config={}, weights_bytes=0, commit="", present=False, files=[], bytes=0, staged_bytes=0, unreachable=False
    )
    try:
        if not isinstance(name, str) or not name:
            raise Problem("service %s has no model: give owner/name or the path of a folder" % entry.get("name"))
        source = entry.get("source") or default_source(name)
        result["source"] = source
        if source not in list(FORMS):
            raise Problem(
                "source %s of model %s is not known: give one of %s" % (source, name, ", ".join(sorted(FORMS)))
            )
        result["revision"] = str(entry.get("revision") or BRANCH.get(source, "main"))
        if not re.match(FORMS[source], name):
            raise Problem(
                "model %s is no name for source %s: give owner/name for huggingface and modelscope, the address of a folder "
                "for http, an absolute path for path, and letters, digits, - and _ for generated" % (name, source)
            )
        result["path"] = name if source == "path" else os.path.join(params["root"], name)
        if source == "path":
            result.update(from_folder(name))
        elif source == "generated":
            result.update(from_generator(result["path"]))
        else:
            result.update(from_hub(params, result, (params["known"] or {}).get(str(entry.get("name")))))
    except Problem as problem:
        result["problem"] = " ".join(str(problem).split())
        result["unreachable"] = problem.unreachable
    return result


def main():
    module = AnsibleModule(
        argument_spec={
            "models": {"type": "list", "elements": "dict", "required": True},
            "root": {"type": "path", "required": True},
            "endpoint": {"type": "str", "default": "https://huggingface.co"},
            "modelscope_endpoint": {"type": "str", "default": "https://www.modelscope.cn"},
            "token": {"type": "str", "no_log": True},
            "modelscope_token": {"type": "str", "no_log": True},
            "include": {"type": "list", "elements": "str", "default": ["*"]},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "duplicates": {"type": "bool", "default": False},
            "update": {"type": "bool", "default": False},
            "repair": {"type": "bool", "default": False},
            "known": {"type": "dict", "default": {}},
            "timeout": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    models = dict((str(entry.get("name")), describe(entry, module.params)) for entry in module.params["models"])
    module.exit_json(changed=False, models=models)


if __name__ == "__main__":
    main()
