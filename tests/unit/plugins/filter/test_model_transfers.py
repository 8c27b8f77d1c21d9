# SPDX-License-Identifier: GPL-3.0-or-later
"""Who has which model, who needs it, and from whom it comes."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.model_known import model_known
from ansible_collections.baremetal.vllm.plugins.filter.model_transfers import model_transfers
from ansible_collections.baremetal.vllm.plugins.filter.models_here import models_here
from ansible_collections.baremetal.vllm.plugins.filter.peer_certificate import peer_certificate


def info(present: bool = False, model: str = "a/b", commit: str = "c1", **facts: Any) -> dict[str, Any]:
    return {
        "model": model,
        "source": "huggingface",
        "revision": "main",
        "commit": commit,
        "path": f"/srv/models/{model}/{commit}",
        "present": present,
        "problem": "",
        "unreachable": False,
        "files": [],
        "config": {"x": 1},
        **facts,
    }


def hosts(*having: bool | None) -> list[dict[str, Any]]:
    """Hosts that have the model, need it, or have nothing to do with it."""
    return [
        {
            "name": f"h{number}",
            "address": f"10.0.0.{number}",
            "port": 18670,
            "models": [] if has is None else [info(has)],
        }
        for number, has in enumerate(having)
    ]


def upstreams(transfer: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [peer["host"] for peer in route["upstreams"]] for name, route in transfer["hosts"].items()}


def test_a_line_from_the_hub() -> None:
    (transfer,) = model_transfers(hosts(False, None, False, False))
    assert upstreams(transfer) == {"h0": [], "h2": ["10.0.0.0"], "h3": ["10.0.0.2", "10.0.0.0"]}
    assert [transfer["hosts"][name]["port"] for name in ("h0", "h2", "h3")] == [18670, 18670, None]
    assert [transfer["hosts"][name]["downstream"] for name in ("h0", "h2", "h3")] == ["h2", "h3", None]
    assert transfer["shared"]


def test_one_host_alone_opens_no_port() -> None:
    (transfer,) = model_transfers(hosts(False))
    assert transfer["shared"] is False
    assert transfer["hosts"]["h0"]["port"] is None


def test_a_host_that_joins_takes_it_from_a_neighbour() -> None:
    (transfer,) = model_transfers(hosts(True, True, False))
    assert upstreams(transfer) == {"h0": [], "h2": ["10.0.0.0"]}
    assert transfer["hosts"]["h0"]["downstream"] == "h2"


def test_several_that_have_it_make_several_lines() -> None:
    (transfer,) = model_transfers(hosts(True, False, True, False, False))
    assert upstreams(transfer) == {
        "h0": [],
        "h2": [],
        "h1": ["10.0.0.0"],
        "h3": ["10.0.0.2"],
        "h4": ["10.0.0.1", "10.0.0.0"],
    }


def test_without_sharing_each_asks_the_hub() -> None:
    (transfer,) = model_transfers(hosts(False, False, True), share=False)
    assert upstreams(transfer) == {"h0": [], "h1": []}
    assert transfer["shared"] is False


def test_the_controller_stands_first_for_what_no_host_has() -> None:
    controller = {"name": "the controller", "address": "10.9.9.9", "port": 7, "models": [info()]}
    (transfer,) = model_transfers(hosts(False, False), controller=controller)
    assert upstreams(transfer) == {"the controller": [], "h0": ["10.9.9.9"], "h1": ["10.0.0.0", "10.9.9.9"]}
    (transfer,) = model_transfers(hosts(True, False), controller=controller)
    assert upstreams(transfer) == {"h0": [], "h1": ["10.0.0.0"]}
    assert model_transfers(hosts(True, True), controller=controller) == []
    controller["models"] = [info(model="no/body")]
    assert set(upstreams(model_transfers(hosts(False), controller=controller)[0])) == {"h0"}


def test_all_there_is_nothing_to_do_unless_it_is_to_be_verified() -> None:
    assert model_transfers(hosts(True, True)) == []
    (transfer,) = model_transfers(hosts(True, True), verify=True)
    assert upstreams(transfer) == {"h0": [], "h1": []}


def test_each_model_has_a_port_of_its_own() -> None:
    models = [info(), info(model="c/d", commit="c2"), info(commit="", source="path"), info(problem="no", model="e/f")]
    there = [{"name": name, "address": name, "port": 7, "models": models} for name in ("x", "y")]
    assert [(each["model"], each["hosts"]["x"]["port"]) for each in model_transfers(there)] == [
        ("a/b", 7),
        ("c/d", 8),
    ]


def test_models_of_services_elsewhere_are_not_here() -> None:
    plan = {"services": [{"name": "one", "instances": [{"hosts": ["h1", "h2"]}]}, {"name": "two", "instances": []}]}
    infos = {"one": info(), "two": info(model="c/d"), "three": info(), "bad": info(problem="no")}

    def models(host: str, plan: Any = plan) -> list[str]:
        return [each["model"] + each["problem"] for each in models_here(infos, host, plan)]

    assert models("h1") == ["a/b", "a/bno"], "two services of one model share it"
    assert models("h3") == ["a/b", "a/bno"], "three is in no plan"
    assert models("h3", None) == ["a/b", "c/d", "a/bno"]
    del infos["three"], infos["bad"]
    assert models("h3") == []


def test_who_knows_better() -> None:
    lost = info(commit="", problem="cannot reach", unreachable=True)
    assert model_known({"x": lost}, [{"x": lost}]) == {}
    assert model_known({"x": lost}, [{"x": lost}, {"x": info()}])["x"]["commit"] == "c1"
    assert model_known({"x": info()}, [{"x": info()}]) == {}
    # The branch has moved on between two hosts' questions, or since one fetched it.
    assert model_known({"x": info(commit="c2")}, [{"x": info()}, {"x": info(commit="c2")}])["x"]["commit"] == "c1"
    there = [{"x": info(commit="c2")}, {"x": info(present=True)}]
    assert [bool(model_known(own, there)) for own in there] == [True, False]
    assert model_known({"x": info(commit="c2")}, [{"x": info(model="other/one")}]) == {}
    refused = info(commit="", problem="HTTP 403")
    assert model_known({"x": refused}, [{"x": info()}]) == {}


def test_a_certificate(tmp_path: Path) -> None:
    one, other = peer_certificate("models"), peer_certificate("models")
    assert one != other
    (tmp_path / "pem").write_text(one["certificate"] + one["key"])
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "pem")
    with pytest.raises(ssl.SSLError):
        (tmp_path / "pem").write_text(one["certificate"] + other["key"])
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "pem")
