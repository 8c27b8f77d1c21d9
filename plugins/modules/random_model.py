#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: random_model
short_description: Make a small language model with random weights
version_added: 0.1.0
description:
  - Writes a two-layer Llama of about 1.4 million parameters with random weights, a tokenizer and a chat template, in the
    files that a real model has. It proves the path from disk to answer where no hub can be reached; what it says is
    random words.
  - The same O(seed) gives the same bytes on every host.
options:
  path:
    description: Folder of the model. Its parent is made when it is missing.
    type: path
    required: true
  seed:
    description: Seed of the weights.
    type: int
    default: 0
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether the model would be written, and returns its configuration all the same.
    support: full
  diff_mode:
    description: The files are binary.
    support: none
"""

EXAMPLES = r"""
- name: A model to try the server with
  baremetal.vllm.random_model:
    path: /srv/models/random-llama
"""

RETURN = r"""
config:
  description: The model's C(config.json).
  returned: success
  type: dict
weights_bytes:
  description: Size of the weights.
  returned: success
  type: int
  sample: 2755072
"""

import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "seed": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    path, seed = module.params["path"], module.params["seed"]
    if os.path.lexists(path) and not os.path.exists(os.path.join(path, random_llama.MANIFEST)):
        module.fail_json(
            msg="%s exists and is no random model of this module: name another path or move it away" % path
        )
    changed = not random_llama.current(path, seed)
    if changed and not module.check_mode:
        try:
            random_llama.write(path, seed)
        except (IOError, OSError) as error:
            module.fail_json(msg="cannot write the model to %s: %s" % (path, error.strerror))
    module.exit_json(changed=changed, config=random_llama.CONFIG, weights_bytes=random_llama.weights_bytes())


if __name__ == "__main__":
    main()
