#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: initramfs
short_description: Rebuild the initramfs of each kernel by the distribution's own tool, when it is out of date
version_added: 0.1.0
description:
  - Compares the age of each kernel's initramfs with that of files that go into it, and rebuilds those that are older, by
    C(update-initramfs) or C(dracut). A run that was cut off between the change of a file and the rebuild is made good by the
    next one.
  - A kernel without an initramfs, and a host without any, as containers are, is left alone.
options:
  newer_than:
    description: Files that go into the initramfs. One that is missing is not looked at.
    type: list
    elements: path
    required: true
  force:
    description: Rebuild all of them, whatever their age, as after a file was removed.
    type: bool
    default: false
  timeout:
    description: Seconds that one kernel's initramfs may take.
    type: int
    default: 900
  root:
    description: Where F(/boot) and F(/lib/modules) are.
    type: path
    default: /
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says what would be rebuilt.
    support: full
  diff_mode:
    description: Names the files that would be made anew.
    support: full
"""

EXAMPLES = r"""
- name: Rebuild what was made before the denylist
  baremetal.vllm.initramfs:
    newer_than: [/etc/modprobe.d/baremetal-nouveau.conf]
"""

RETURN = r"""
images:
  description: The initramfs of each kernel that has one.
  returned: success
  type: dict
  sample: {6.1.0-13-amd64: /boot/initrd.img-6.1.0-13-amd64}
rebuilt:
  description: Kernels whose initramfs was made anew, or would be in check mode.
  returned: success
  type: list
  elements: str
tool:
  description: Program that makes them, empty where nothing had to be made.
  returned: success
  type: str
"""

import glob
import os
from subprocess import TimeoutExpired

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.baremetal.vllm.plugins.module_utils.host_look import execute

NAMES = ("boot/initrd.img-%s", "boot/initramfs-%s.img")  # of the Debian and of the RHEL family
# Program -> arguments for one kernel. The first one that is there is the distribution's: Debian's dracut brings its own
# update-initramfs, and the RHEL family has none.
TOOLS = (("update-initramfs", ["-u", "-k", "%s"]), ("dracut", ["--force", "--kver", "%s"]))


def images(root):
    """Kernel release -> path of its initramfs."""
    found = {}
    for folder in sorted(glob.glob(os.path.join(root, "lib/modules/*"))):
        kernel = os.path.basename(folder)
        for name in NAMES:
            path = os.path.join(root, name % kernel)
            if os.path.isfile(path):
                found[kernel] = path
    return found


def newest(paths):
    """Time of the last change of content or name, whichever is later, of the newest of these files; 0 without any."""
    times = [0]
    for path in paths:
        try:
            status = os.stat(path)
            times.append(max(status.st_mtime, status.st_ctime))
        except OSError:
            pass
    return max(times)


def main():
    module = AnsibleModule(
        argument_spec={
            "newer_than": {"type": "list", "elements": "path", "required": True},
            "force": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 900},
            "root": {"type": "path", "default": "/"},
        },
        supports_check_mode=True,
    )
    there = images(module.params["root"])
    limit = newest(module.params["newer_than"])
    stale = [kernel for kernel in sorted(there) if module.params["force"] or os.stat(there[kernel]).st_mtime < limit]
    paths = [there[kernel] for kernel in stale]
    result = {"images": there, "rebuilt": stale, "tool": "", "changed": bool(stale)}
    if module._diff:
        lines = "".join("%s: made before the change\n" % path for path in paths)
        result["diff"] = {"before": lines, "after": lines.replace("before", "after")}
    if not stale:
        module.exit_json(**result)
    found = [(module.get_bin_path(name), arguments) for name, arguments in TOOLS]
    found = [(path, arguments) for path, arguments in found if path]
    if not found:
        module.fail_json(
            msg="%s is older than the change, and neither update-initramfs nor dracut is here: make it anew by the "
            "distribution's own tool" % ", ".join(paths)
        )
    tool, arguments = found[0]
    result["tool"] = tool
    if module.check_mode:
        module.exit_json(**result)
    for kernel in stale:
        command = [tool] + [argument.replace("%s", kernel) for argument in arguments]
        try:
            # On a full or broken /boot it may hang.
            status, output = execute(command, module.params["timeout"])
        except TimeoutExpired:
            module.fail_json(msg="%s did not end within %d s" % (" ".join(command), module.params["timeout"]))
        if status != 0 or os.stat(there[kernel]).st_mtime < limit:
            said = "\n".join(output.strip().splitlines()[-15:])
            problem = "failed (exit status %d)" % status if status else "left %s as it was" % there[kernel]
            module.fail_json(msg="%s %s: %s" % (" ".join(command), problem, said or "no output"))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
