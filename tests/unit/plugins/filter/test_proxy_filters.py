# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import datetime
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from ansible_collections.baremetal.vllm.plugins.filter.dify_providers import dify_providers
from ansible_collections.baremetal.vllm.plugins.filter.proxied_services import proxied_services
from ansible_collections.baremetal.vllm.plugins.filter.proxy_problems import proxy_problems
from ansible_collections.baremetal.vllm.plugins.filter.vllm_plan import vllm_plan
from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama

CPU = {"cores": 8, "memory_total_mib": 32000, "memory_available_mib": 30000}
HOSTS = [{"name": name, "device": "cpu", "gpus": [], "links": [], "cpu": CPU} for name in ("one", "two")]
SETTINGS = {"port": 8443, "bind": "127.0.0.1", "config_dir": "/etc/vllm", "key_given": False}
ADDRESSES = {"one": "10.0.0.1", "two": "fd00::2", "lb": "10.0.0.9"}


def service(name: str = "chat", **fields: Any) -> dict[str, Any]:
    read = {"config": random_llama.CONFIG, "model_path": "/srv/m", "weights_gib": 0.003, "runtime": "venv"}
    return {"name": name, "model": "m", "served_model_name": "m", "hosts": ["one"], **read, **fields}


def passed_on(host: str, *services: dict[str, Any], **settings: Any) -> dict[str, Any]:
    asked = list(services)
    return proxied_services(vllm_plan(asked, HOSTS), host, asked, ADDRESSES, {**SETTINGS, **settings})


def test_a_proxy_beside_its_service() -> None:
    result = passed_on("one", service(extra_args=["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]))
    assert result["problems"] == []
    (chat,) = result["services"]
    assert (chat["name"], chat["port"], chat["upstreams"]) == ("chat", 8443, ["127.0.0.1:8000"])
    assert (chat["task"], chat["tool_calls"], chat["hosts"]) == ("generate", True, ["one"])
    assert chat["api_key_file"] == "/etc/vllm/chat/api_key"


def test_ports_of_several_services() -> None:
    services = [service("a"), service("b", proxy_port=8443), service("c", proxy=False), service("d")]
    found = passed_on("one", *services)["services"]
    assert [(one["name"], one["port"]) for one in found] == [("a", 8444), ("b", 8443), ("d", 8445)]


def test_a_proxy_on_another_host() -> None:
    (problem,) = passed_on("lb", service())["problems"]
    assert "chat listens on 127.0.0.1 of one, which the proxy on lb does not reach: give the service a bind" in problem
    assert passed_on("lb", service(bind="0.0.0.0"))["services"][0]["upstreams"] == ["10.0.0.1:8000"]
    assert passed_on("lb", service(bind="192.168.0.1"))["services"][0]["upstreams"] == ["192.168.0.1:8000"]
    assert passed_on("lb", service(bind="::", hosts=["two"]))["services"][0]["upstreams"] == ["[fd00::2]:8000"]


def test_replicas_on_two_hosts_need_one_key() -> None:
    asked = [service(hosts=["one"], bind="0.0.0.0")]
    plan = vllm_plan(asked, HOSTS)
    plan["services"][0]["instances"] += [{**plan["services"][0]["instances"][0], "hosts": ["two"]}]
    result = proxied_services(plan, "lb", asked, ADDRESSES, SETTINGS)
    assert result["services"][0]["upstreams"] == ["10.0.0.1:8000", "[fd00::2]:8000"]
    assert "set vllm_api_key" in result["problems"][0]
    assert proxied_services(plan, "lb", asked, ADDRESSES, {**SETTINGS, "key_given": True})["problems"] == []


def problems(*services: dict[str, Any], **host: Any) -> list[str]:
    state = {
        "listeners": {},
        "running": False,
        "init": "systemd",
        "root": True,
        "tls": "self_signed",
        "given": ["", ""],
        "pair": [],
    }
    return proxy_problems(list(services), {**state, **host})


ONE = {"name": "chat", "port": 8443, "upstreams": ["10.0.0.1:8000"]}


def test_no_problem() -> None:
    named = [{**ONE, "name": name, "server_names": [f"{name}.test"]} for name in ("a", "b")]
    assert problems(ONE) == problems(*named) == []
    taken = {"8443": {"pid": 1, "command": "nginx: master process", "cwd": "/"}}
    assert problems(ONE, running=True, listeners=taken) == []


@pytest.mark.parametrize(
    ("services", "host", "words"),
    [
        ([], {}, "no service to pass on"),
        ([ONE], {"init": "tini"}, "runs under systemd"),
        ([ONE], {"root": False}, "set up by root"),
        ([ONE, {**ONE, "name": "b"}], {}, "services chat and b share port 8443"),
        ([ONE, ONE], {}, "has chat more than once"),
        ([{**ONE, "upstreams": []}], {}, "has no server"),
        ([{**ONE, "upstreams": ["10.0.0.1"]}], {}, "'10.0.0.1' of service chat is no address"),
        ([{**ONE, "upstreams": ["a:1; }"]}], {}, "is no address"),
        ([{**ONE, "name": "a{"}], {}, "has the name 'a{'"),
        (
            [ONE],
            {"listeners": {"8443": {"pid": 7, "command": "apache2", "cwd": "/"}}, "running": True},
            "port 8443 of the proxy is taken by apache2 (pid 7)",
        ),
        ([ONE], {"listeners": {"8443": {"pid": 7, "command": "nginx", "cwd": "/"}}}, "is taken by nginx (pid 7)"),
        ([ONE], {"tls": "given", "given": ["/c.pem", ""]}, "belong together"),
    ],
)
def test_problems(services: list[dict[str, Any]], host: dict[str, Any], words: str) -> None:
    assert any(words in problem for problem in problems(*services, **host)), problems(*services, **host)


def pem(days: int = 2, password: str = "") -> tuple[str, str]:
    """A certificate that lasts so many days from now, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gpu1.test")])
    end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=days)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(end - datetime.timedelta(days=10)).not_valid_after(end)
    encryption = BestAvailableEncryption(password.encode()) if password else NoEncryption()
    told = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM).decode(), told.decode()


def test_a_certificate_that_was_given() -> None:
    (certificate, key), (_, other), (_, secret), (past, past_key) = pem(), pem(), pem(password="hush"), pem(days=-1)

    def told(*pair: str) -> list[str]:
        return problems(ONE, tls="given", given=["/c.pem", "/k.pem"], pair=list(pair))

    assert told(certificate, key) == told(certificate + past, key) == []
    for pair, words in (
        ((certificate, other), "proxy_tls_certificate_src (/c.pem) is for another key than proxy_tls_key_src (/k.pem)"),
        ((certificate, ""), "proxy_tls_key_src (/k.pem) is no file that can be read"),
        ((key, key), "(/c.pem) holds no certificate"),
        ((certificate, certificate), "(/k.pem) holds no private key"),
        ((certificate, secret), "has a passphrase"),
        ((past, past_key), "(/c.pem) ended on 20"),
    ):
        (line,) = told(*pair)
        assert words in line
        assert "PRIVATE" not in line


def test_dify_is_told_of_what_the_proxy_leaves_out() -> None:
    """The proxy's word comes first, and a service with `proxy: false` has its own."""
    own = {"api_key_file": "/k", "model": "m", "task": "generate"}
    told = [
        {**own, "service": "chat", "base_url": "http://127.0.0.1:8000/v1"},
        {**own, "service": "inner", "base_url": "http://10.0.0.1:8001/v1"},
        {**own, "service": "chat", "base_url": "https://gpu1:8443/v1", "hosts": ["gpu1"]},
    ]
    assert [row["credentials"]["endpoint_url"] for row in dify_providers(told)] == [
        "https://gpu1:8443/v1",
        "http://10.0.0.1:8001/v1",
    ]
    assert len(dify_providers(told[:2])) == 2


def test_dify() -> None:
    told = {"base_url": "https://gpu1:8443/v1", "api_key_file": "/etc/vllm/chat/api_key", "max_model_len": 8192}
    chat, embed, rank = dify_providers(
        [
            {**told, "model": "Qwen/Qwen2.5-7B-Instruct", "task": "generate", "tool_calls": True, "vision": False},
            {**told, "model": "BAAI/bge-m3", "task": "embed"},
            {**told, "model": "BAAI/bge-reranker-base", "task": "score", "base_url": "http://127.0.0.1:8002/v1"},
        ]
    )
    assert (chat["model_type"], chat["model"]) == ("llm", "Qwen2.5-7B-Instruct")
    assert chat["credentials"]["endpoint_model_name"] == "Qwen/Qwen2.5-7B-Instruct"
    assert chat["credentials"]["function_calling_type"] == "tool_call"
    assert embed["model_type"] == "text-embedding"
    assert embed["credentials"]["max_chunks"] == "32"
    assert (rank["model_type"], chat["note"]) == ("rerank", "")
    assert "127.0.0.1 is the container's own address" in rank["note"]
    assert all(isinstance(value, str) for one in (chat, embed, rank) for value in one["credentials"].values())
    with pytest.raises(AnsibleFilterError, match="task is None"):
        dify_providers([{**told, "model": "m"}])
