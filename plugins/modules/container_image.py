#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: container_image
short_description: Have a container image on the host, from a registry or from an archive
version_added: 0.1.0
description:
  - Pulls an image that is not there, or loads it from an archive that C(docker save) has made. One that is there is left
    as it is. Needs the program C(docker) and nothing else, unlike modules that need Docker's SDK for Python on the host.
  - Registries that ask for a login take what C(docker login) has kept for the user.
options:
  reference:
    description: The image, with its tag or its digest.
    type: str
    required: true
  archive:
    description: A file on the host that holds the image under this very name.
    type: path
  checksum:
    description: What the archive must be, C(sha256:) and 64 digits.
    type: str
  retries:
    description: How often a pull that fails is tried again. Layers that are there already are kept.
    type: int
    default: 2
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether the image would be fetched.
    support: full
"""

EXAMPLES = r"""
- name: An image from a mirror, pinned by its digest
  baremetal.vllm.container_image:
    reference: registry.example.com/vllm/vllm-openai@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef

- name: A host without a registry
  baremetal.vllm.container_image:
    reference: vllm/vllm-openai:v0.25.1
    archive: /srv/images/vllm-openai-v0.25.1.tar
"""

RETURN = r"""
id:
  description: Id of the image, empty in check mode when it is not there.
  returned: success
  type: str
  sample: sha256:5e1c...
"""

import hashlib
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return "sha256:" + digest.hexdigest()


def docker(module, *arguments):
    """(exit status, output, last line of the errors)."""
    try:
        code, output, errors = module.run_command(["docker"] + list(arguments), handle_exceptions=False)
    except OSError as error:
        module.fail_json(msg="cannot run docker: %s. The role docker installs it" % error.strerror)
    lines = [line for line in errors.splitlines() if line.strip()]
    return code, output, lines[-1] if lines else ""


def identity(module, reference):
    code, output, dummy = docker(module, "image", "inspect", "--format", "{{.Id}}", reference)
    return output.strip() if code == 0 else ""


def load(module, params):
    archive, wanted = params["archive"], params["checksum"]
    if not os.path.isfile(archive):
        module.fail_json(
            msg="archive %s of image %s is not on the host: copy it there" % (archive, params["reference"])
        )
    if wanted:
        found = sha256(archive)
        if found != wanted:
            module.fail_json(
                msg="archive %s is %s, not %s: copy it again, or correct the checksum" % (archive, found, wanted)
            )
    code, output, error = docker(module, "load", "--quiet", "--input", archive)
    if code != 0:
        module.fail_json(msg="docker cannot load %s: %s" % (archive, error))
    found = identity(module, params["reference"])
    if not found:
        names = ", ".join(re.findall(r"Loaded image(?: ID)?: (\S+)", output)) or "nothing"
        module.fail_json(
            msg="archive %s holds %s, not %s: give that as reference, or save the image under its name"
            % (archive, names, params["reference"])
        )
    return found


def pull(module, params):
    for attempt in range(params["retries"] + 1):
        code, dummy, error = docker(module, "pull", "--quiet", params["reference"])
        if code == 0:
            return identity(module, params["reference"])
        # A name that the registry does not have will not be there in a moment.
        if re.search(r"not found|manifest unknown|denied|unauthorized|invalid reference", error):
            break
        time.sleep(5 * (attempt + 1))
    module.fail_json(
        msg="cannot pull %s: %s. Check the name, log in with `docker login`, set vllm_image_mirror to a registry that the host "
        "reaches, or give an archive in vllm_images" % (params["reference"], error)
    )


def main():
    module = AnsibleModule(
        argument_spec={
            "reference": {"type": "str", "required": True},
            "archive": {"type": "path"},
            "checksum": {"type": "str"},
            "retries": {"type": "int", "default": 2},
        },
        supports_check_mode=True,
    )
    params = module.params
    if params["checksum"] and not re.match(r"sha256:[0-9a-f]{64}\Z", params["checksum"]):
        module.fail_json(msg="checksum is %s: give sha256: and 64 hexadecimal digits" % params["checksum"])
    found = identity(module, params["reference"])
    if found or module.check_mode:
        module.exit_json(changed=not found, id=found)
    module.exit_json(changed=True, id=(load if params["archive"] else pull)(module, params))


if __name__ == "__main__":
    main()
