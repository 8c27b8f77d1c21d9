# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans vLLM engines from plain dictionaries; imports nothing of Ansible."""
