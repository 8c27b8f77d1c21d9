#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: model_fetch
short_description: Bring a model to a host, whole, from a hub or from its neighbours
version_added: 0.1.0
description:
  - Starts a process that fetches the files of a model, and says how far it is. The process goes on when Ansible is gone;
    whoever starts it again meets it. Killed at any moment, the next start takes up what has come, within a file, too.
  - Every file is hashed. The model is moved to its place in one step when all files are right.
  - While it comes, and for a short while after, the process hands the model on to neighbours that have the same
    certificate and key, so that a site fetches it once and all hosts have it at nearly the same time.
  - The action plugin of the same name shows the progress while it waits.
options:
  state:
    description:
      - V(started) starts the work unless it goes on already.
      - V(finished) waits for its end and shows how far it is.
    type: str
    choices: [started, finished]
    required: true
  model:
    description: What M(baremetal.vllm.model_info) returned of the model.
    type: dict
    required: true
  root:
    description: Folder below which models lie.
    type: path
    required: true
  endpoint:
    description: Address of the hub.
    type: str
  token:
    description: Token for the hub.
    type: str
  include:
    description: The patterns that O(model) was read with.
    type: list
    elements: str
    default: ["*"]
  exclude:
    description: The patterns that O(model) was read with.
    type: list
    elements: str
    default: []
  duplicates:
    description: As O(model) was read with.
    type: bool
    default: false
  client_python:
    description: Interpreter of an environment that holds the official client. Without one, files are fetched by this module.
    type: path
  client_required:
    description: Give up, rather than go on without the official client, when that fails again and again.
    type: bool
    default: false
  jobs:
    description: How many files come at once.
    type: int
    default: 4
  timeout:
    description: Seconds without a byte after which a connection is given up and made anew.
    type: int
    default: 30
  reserve_mib:
    description: MiB that stay free on the file system.
    type: int
    default: 2048
  verify:
    description: Hash a model that is there already.
    type: bool
    default: false
  repair:
    description: Fetch again what is not as it was fetched.
    type: bool
    default: false
  keep_revisions:
    description: Number of old revisions that stay; negative for all.
    type: int
    default: -1
  in_use:
    description: Folders of models that stay whatever O(keep_revisions) says.
    type: list
    elements: str
    default: []
  used_by:
    description:
      - Files that name folders of models in use, also as patterns such as C(/etc/vllm/*/start.sh). Revisions that one of them
        names stay whatever O(keep_revisions) says, and all do if one cannot be read.
    type: list
    elements: str
    default: []
  peers:
    description: How the model goes from host to host; P(baremetal.vllm.model_routes#filter) makes it.
    type: dict
    suboptions:
      upstreams:
        description: Neighbours that are asked before the hub, in this order.
        type: list
        elements: dict
        default: []
        suboptions:
          host:
            description: Address.
            type: str
            required: true
          port:
            description: Port.
            type: int
            required: true
      name:
        description: Name of this host.
        type: str
      downstream:
        description: Name of the neighbour that asks this host first. Until that has the model, it is handed on.
        type: str
      port:
        description: Port on which this host hands the model on.
        type: int
      hub:
        description: Whether this host may ask the hub when no neighbour answers.
        type: bool
        default: true
      start:
        description: Seconds for which the hub is not asked at first while no neighbour answers, as hosts start one by one.
        type: int
        default: 90
      grace:
        description: Seconds without a word from any neighbour after which the hub is asked, once one has been heard.
        type: int
        default: 20
      linger:
        description: Seconds without a request after which a host that has the model stops handing it on.
        type: int
        default: 120
      certificate:
        description: PEM of the certificate that all hosts of this run have.
        type: str
      key:
        description: PEM of its key.
        type: str
  interval:
    description: Seconds between two lines of progress. Read by the action plugin.
    type: int
    default: 10
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether the model would be brought.
    support: full
"""

EXAMPLES = r"""
- name: Start
  baremetal.vllm.model_fetch:
    state: started
    model: "{{ info.models.chat }}"
    root: /srv/models
    endpoint: https://huggingface.co

- name: Wait
  baremetal.vllm.model_fetch:
    state: finished
    model: "{{ info.models.chat }}"
    root: /srv/models
"""

RETURN = r"""
progress:
  description:
    - C(state) (V(starting), V(fetching), V(verifying), V(placing), V(done) or V(failed)), C(done_bytes), C(total_bytes),
      C(hub_bytes) and C(peer_bytes) that came over the network, C(notes) about what was not as it should be, C(message).
  returned: success
  type: dict
"""

import json
import os
import time

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store, model_transfer

RUNNING = ("starting", "fetching", "verifying", "placing")


def read(path):
    try:
        with open(path) as handle:
            return json.load(handle)
    except (IOError, OSError, ValueError):
        return {"state": "", "message": "", "notes": [], "changed": False}


def detach(keep):
    """Leaves the caller behind: the process gets a session of its own and none of the caller's files but `keep`."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(3, keep)
    os.closerange(keep + 1, 65536 if os.sysconf("SC_OPEN_MAX") < 0 else min(os.sysconf("SC_OPEN_MAX"), 65536))


def start(module, place, status_path):
    params, model = module.params, module.params["model"]
    model_store.check_writable(params["root"])
    # Another run may make it at the same moment.
    os.makedirs(os.path.join(params["root"], ".staging"), 0o755, exist_ok=True)
    lock = model_store.Lock(place.staging(model["commit"]) + ".lock")
    if not lock.take():
        return dict(read(status_path), attached=True)
    before = read(status_path)
    job = dict(
        (name, params[name]) for name in ("root", "endpoint", "token", "client_python", "jobs", "timeout", "verify")
    )
    job.update(client_required=params["client_required"])
    job.update(model=model, repair=params["repair"], keep_revisions=params["keep_revisions"])
    job.update(in_use=params["in_use"], used_by=params["used_by"])
    job.update(reserve_bytes=params["reserve_mib"] * model_transfer.MIB, peers=params["peers"] or {}, backoff=0.5)
    job["selected"] = hubs.selection(params["include"], params["exclude"], params["duplicates"])
    status = model_transfer.Status(status_path, sum(entry["size"] for entry in model["files"]))
    if before.get("state") in RUNNING:
        status.note(
            "an earlier run (process %s) ended without saying why; what it has brought is taken up" % before.get("pid")
        )
    status.set()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        lock.release()
        return dict(read(status_path), attached=False)
    try:
        detach(lock.handle)
        status.facts["pid"] = os.getpid()
        model_transfer.work(job, lock, status)
    finally:
        os._exit(0)


def main():
    peers = {
        "upstreams": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {"host": {"type": "str", "required": True}, "port": {"type": "int", "required": True}},
        },
        "name": {"type": "str"},
        "downstream": {"type": "str"},
        "port": {"type": "int"},
        "hub": {"type": "bool", "default": True},
        "start": {"type": "int", "default": 90},
        "grace": {"type": "int", "default": 20},
        "linger": {"type": "int", "default": 120},
        "certificate": {"type": "str"},
        "key": {"type": "str", "no_log": True},
    }
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "required": True, "choices": ["started", "finished"]},
            "model": {"type": "dict", "required": True},
            "root": {"type": "path", "required": True},
            "endpoint": {"type": "str"},
            "token": {"type": "str", "no_log": True},
            "include": {"type": "list", "elements": "str", "default": ["*"]},
            "exclude": {"type": "list", "elements": "str", "default": []},
            "duplicates": {"type": "bool", "default": False},
            "client_python": {"type": "path"},
            "client_required": {"type": "bool", "default": False},
            "jobs": {"type": "int", "default": 4},
            "timeout": {"type": "int", "default": 30},
            "reserve_mib": {"type": "int", "default": 2048},
            "verify": {"type": "bool", "default": False},
            "repair": {"type": "bool", "default": False},
            "keep_revisions": {"type": "int", "default": -1},
            "in_use": {"type": "list", "elements": "str", "default": []},
            "used_by": {"type": "list", "elements": "str", "default": []},
            "peers": {"type": "dict", "options": peers},
            "interval": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    model = module.params["model"]
    place = model_store.Place(module.params["root"], model)
    status_path = place.staging(model["commit"]) + ".json"
    if module.check_mode:
        module.exit_json(changed=not model["present"], progress=dict(read(status_path), state="done"))
    try:
        if module.params["state"] == "started":
            progress = start(module, place, status_path)
            if progress["state"] in RUNNING:  # what fails at once, or is there already, need not be waited for
                time.sleep(0.2)
                progress = dict(progress, **read(status_path))
        else:
            progress = read(status_path)
    except (hubs.Problem, model_transfer.Failed) as problem:
        module.fail_json(msg=str(problem))
    except (IOError, OSError) as error:
        module.fail_json(msg="cannot work in %s: %s" % (module.params["root"], error.strerror))
    if progress["state"] in RUNNING and not model_store.held(place.staging(model["commit"]) + ".lock"):
        progress = dict(progress, **read(status_path))
        if progress["state"] in RUNNING:
            progress.update(
                state="failed",
                died=True,
                message="the process (%s) that fetched %s has ended without saying why; the kernel's log may tell (killed for "
                "want of memory?). What has come is kept: run again to go on" % (progress.get("pid"), model["model"]),
            )
    if module.params["state"] == "finished" and not progress["state"]:
        module.fail_json(
            msg="%s tells nothing of the fetch of %s, which may have had no room for it: %d MiB are free there. Make room, or set "
            "model_root to a larger disk"
            % (status_path, model["model"], model_store.free_bytes(module.params["root"]) // model_transfer.MIB)
        )
    if progress["state"] == "failed":
        module.fail_json(msg=progress["message"], progress=progress)
    # Who starts the work has changed nothing yet, even where it ends at once; who waits for its end has.
    ended = module.params["state"] == "finished" and progress["state"] == "done"
    module.exit_json(changed=ended and bool(progress["changed"]), progress=progress)


if __name__ == "__main__":
    main()
