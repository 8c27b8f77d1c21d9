# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type


class ModuleDocFragment(object):
    """What modules say of themselves in the same words."""

    DOCUMENTATION = r"""
options: {}
attributes:
  diff_mode:
    description: There is nothing to compare.
    support: none
  platform:
    description: Target platforms.
    platforms: posix
    support: full
"""

    READER = r"""
options: {}
attributes:
  check_mode:
    description: Runs the same in check mode, as it only reads.
    support: full
"""

    LOOK = r"""
options:
  packages:
    description: Names of packages whose version is wanted.
    type: list
    elements: str
    default: []
  files:
    description: Files whose checksum is wanted.
    type: list
    elements: path
    default: []
"""
