# SPDX-License-Identifier: GPL-3.0-or-later
"""Stands in for vLLM, see api_server.py."""
