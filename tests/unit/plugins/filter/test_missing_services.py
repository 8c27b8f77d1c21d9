# SPDX-License-Identifier: GPL-3.0-or-later
"""What verify.yml takes to be missing."""

from __future__ import annotations

from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.missing_services import missing_services

ALL = ["one", "two", "three"]
NOTHING: dict[str, list[str]] = {"answering": [], "configured": [], "spanning": []}
ANSWERS = {"answering": ["chat"], "configured": ["chat"], "spanning": []}
FAILED = {"answering": [], "configured": ["chat"], "spanning": []}
HEAD = {"answering": ["chat"], "configured": ["chat"], "spanning": ["chat"]}
RANK = {"answering": [], "configured": ["chat"], "spanning": ["chat"]}


@pytest.mark.parametrize(
    ("hosts", "found", "missing"),
    [
        # nothing was ever deployed
        (None, {"one": NOTHING, "two": NOTHING, "three": NOTHING}, ["one"]),
        (["two", "three"], {"one": NOTHING, "two": NOTHING, "three": NOTHING}, ["two"]),
        ("three", {"one": NOTHING, "two": NOTHING, "three": NOTHING}, ["three"]),
        # it is somewhere, which is all that one without hosts asks
        (None, {"one": NOTHING, "two": ANSWERS, "three": NOTHING}, []),
        # its first start failed, everywhere or on one host
        (None, {"one": NOTHING, "two": FAILED, "three": NOTHING}, ["two"]),
        (None, {"one": ANSWERS, "two": FAILED, "three": NOTHING}, ["two"]),
        (["one", "two"], {"one": ANSWERS, "two": NOTHING, "three": NOTHING}, ["two"]),
        (["two", "one"], {"one": ANSWERS, "two": ANSWERS, "three": NOTHING}, []),
        # several hosts work for it: the first of the inventory answers
        (["two", "one"], {"one": HEAD, "two": RANK, "three": NOTHING}, []),
        (["two", "one"], {"one": RANK, "two": RANK, "three": NOTHING}, ["one"]),
        # a run that is limited
        (None, {"two": NOTHING}, []),
        (None, {"two": FAILED}, ["two"]),
        (["one"], {"two": NOTHING}, []),
        (["two"], {"two": NOTHING}, ["two"]),
        (["one", "two"], {"two": FAILED}, ["two"]),
        (["one", "two"], {"two": RANK}, []),
        (["one", "two"], {"one": HEAD}, []),
        (["one", "two"], {"one": RANK}, ["one"]),
    ],
)
def test_what_is_missing_where(hosts: Any, found: dict[str, Any], missing: list[str]) -> None:
    service = {"name": "chat", "model": "m", **({"hosts": hosts} if hosts else {})}
    assert [host for host in ALL if host in found and missing_services([service], host, found, ALL)] == missing


def test_through_ansible(render: Any) -> None:
    template = "{{ [{'name': 'chat'}, {'name': 'embed'}] | baremetal.vllm.missing_services('one', found, ['one']) }}"
    assert render(template, found={"one": ANSWERS}) == ["embed"]
