# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import annotations

DOCUMENTATION = r"""
name: files_match
short_description: Whether files on a host are as they should be
version_added: 0.1.0
description:
  - Compares content, mode and owner with the fingerprints that M(baremetal.vllm.host_probe) took, so that a second run
    needs one task for all files instead of one or two for each.
positional: fingerprints
options:
  _input:
    description: Files, each with C(path), C(content), C(mode) and C(owner).
    type: list
    elements: dict
    required: true
  fingerprints:
    description: RV(baremetal.vllm.host_probe#module:fingerprints).
    type: dict
    required: true
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
"""

EXAMPLES = r"""
- name: Write the files
  ansible.builtin.include_tasks: write.yml
  when: not files | baremetal.vllm.files_match(probe.fingerprints)
"""

RETURN = r"""
_value:
  description: True when every file is as it should be.
  type: bool
"""

import hashlib
from typing import Any


def files_match(files: list[dict[str, str]], fingerprints: dict[str, str]) -> bool:
    def wanted(file: dict[str, str]) -> str:
        return f"{hashlib.sha256(file['content'].encode()).hexdigest()} {file['mode']} {file['owner']}"

    return all(fingerprints.get(file["path"]) == wanted(file) for file in files)


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"files_match": files_match}
