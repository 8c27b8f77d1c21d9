#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: cuda_toolkit_info
short_description: Which CUDA toolkits are on a host
version_added: 0.1.0
description:
  - Toolkits whose nvcc answers, the compiler that it calls, and where C(/usr/local/cuda) leads. Never changes anything.
options:
  files:
    description: Files whose checksum is wanted.
    type: list
    elements: path
    default: []
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
  - baremetal.vllm.attributes.reader
"""

EXAMPLES = r"""
- name: Look at the toolkits
  baremetal.vllm.cuda_toolkit_info:
  register: cuda
"""

RETURN = r"""
compiler:
  description: Version of g++, empty without one.
  returned: success
  type: str
files:
  description: SHA-256 of each of O(files), empty where it is missing.
  returned: success
  type: dict
link:
  description: Where C(/usr/local/cuda) leads, empty where it is no link.
  returned: success
  type: str
link_blocked:
  description: Whether C(/usr/local/cuda) is a file or a folder that is not empty, which no link replaces.
  returned: success
  type: bool
toolkits:
  description: Full version of the toolkit of each series.
  returned: success
  type: dict
  sample: {"12.9": 12.9.1}
"""

import glob
import json
import os
import re

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import output, read, run, sha256

COMPILERS = "/usr/local/cuda-*/bin/nvcc"
LINK = "/usr/local/cuda"


def toolkits():
    """{series: full version} of the folders whose nvcc answers."""
    found = {}
    for path in sorted(glob.glob(COMPILERS)):
        status, text = run(path, "--version")
        release = re.search(r"release (\d+\.\d+)", text)
        folder = os.path.dirname(os.path.dirname(path))
        if status == 0 and release and folder.endswith("-" + release.group(1)):
            try:
                full = json.loads(read(folder + "/version.json"))["cuda"]["version"]
            except (ValueError, KeyError, TypeError):
                full = release.group(1)
            found[release.group(1)] = full
    return found


def link_blocked():
    """Whether something other than a link is in its place; an empty folder gives way."""
    return os.path.lexists(LINK) and not os.path.islink(LINK) and not (os.path.isdir(LINK) and not os.listdir(LINK))


def main():
    module = AnsibleModule(
        argument_spec={"files": {"type": "list", "elements": "path", "default": []}},
        supports_check_mode=True,
    )
    module.exit_json(
        changed=False,
        toolkits=toolkits(),
        compiler=output("g++", "-dumpfullversion", "-dumpversion").strip(),
        link=os.path.realpath(LINK) if os.path.islink(LINK) else "",
        link_blocked=link_blocked(),
        files={path: sha256(path) for path in module.params["files"]},
    )


if __name__ == "__main__":
    main()
