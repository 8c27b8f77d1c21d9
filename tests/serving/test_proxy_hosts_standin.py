# SPDX-License-Identifier: GPL-3.0-or-later
"""One service on two hosts behind a proxy on each, with a certificate of the user's own: real nginx and systemd, a stand-in for
vLLM (tests/fakes/vllm_standin)."""

from __future__ import annotations

import json
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from host import Host, out, play  # noqa: E402

KEY = "sk-one-for-both-hosts"
RECAP = re.compile(r"^(proxy-[ab])\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)
PROVE = """
- hosts: all
  become: true
  gather_facts: false
  tasks:
    - ansible.builtin.include_role: {name: baremetal.vllm.proxy, tasks_from: verify}
"""


class Site:
    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.trust = ssl.create_default_context(cafile=str(folder / "ca.pem"))

    def play(
        self, playbook: str = "site.yml", *arguments: str, beside: tuple[dict[str, Any], ...] = (), **more: Any
    ) -> tuple[str, dict[str, int]]:
        """(output, changed by host). Services beside the first one make a run that fails."""
        chat = {
            "name": "chat",
            "model": "random-llama",
            "source": "generated",
            "hosts": ["proxy-a", "proxy-b"],
            "bind": "0.0.0.0",
        }
        variables = {
            "vllm_services": [chat, *({**chat, "hosts": ["proxy-a"], **other} for other in beside)],
            "vllm_api_key": KEY,
            "vllm_existing_python": "/srv/python",
            "vllm_verify_client": "never",
            "proxy_enabled": True,
            "proxy_fail_timeout": 2,
            "proxy_tls": "given",
            "proxy_tls_certificate_src": str(self.folder / "certificate.pem"),
            "proxy_tls_key_src": str(self.folder / "key.pem"),
            "proxy_tls_ca_src": str(self.folder / "ca.pem"),
            **more,
        }  # fmt: skip
        code, text = play(self.folder, self.hosts, variables, playbook, "--skip-tags", "verify", "--diff", *arguments)
        assert (code == 0) is not bool(beside), text[-5000:]
        return text, {name: int(changed) for name, changed, _ in RECAP.findall(text)}

    def ask(
        self,
        host: Host,
        key: str = KEY,
        path: str = "/v1/models",
        trust: ssl.SSLContext | None = None,
        port: int = 8443,
    ) -> Any:
        request = urllib.request.Request(
            f"https://{host.address}:{port}{path}", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=10, context=trust or self.trust) as answer:
            return json.load(answer)

    def servers(self, host: Host, count: int = 20) -> Counter[int]:
        """How often each server answered through the proxy of a host."""
        return Counter(self.ask(host)["data"][0]["marker"] for _ in range(count))


def certificate(folder: Path, addresses: list[str]) -> None:
    """An authority that nobody knows, and a certificate of it for the addresses."""
    names = ",".join(f"IP:{address}" for address in addresses)
    (folder / "extensions").write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth\n")
    make = ["-newkey", "rsa:2048", "-nodes", "-days", "2"]
    out("openssl", "req", "-x509", *make, "-subj", "/CN=Authority", "-keyout", f"{folder}/ca.key", "-out", f"{folder}/ca.pem",
        "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    out(
        "openssl", "req", *make, "-subj", "/CN=proxies", "-keyout", f"{folder}/key.pem", "-out", f"{folder}/request.pem"
    )
    out("openssl", "x509", "-req", "-in", f"{folder}/request.pem", "-CA", f"{folder}/ca.pem", "-CAkey", f"{folder}/ca.key",
        "-CAcreateserial", "-days", "2", "-extfile", f"{folder}/extensions", "-out", f"{folder}/certificate.pem")  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("proxies")
    base = out(str(ROOT / "molecule/images/build.sh"), "debian12").splitlines()[-1]
    hosts = [Host(name, folder, base) for name in ("proxy-a", "proxy-b")]
    for host in hosts:
        out("docker", "cp", str(ROOT / "tests/fakes/vllm_standin"), f"{host.name}:/srv/standin")
        # Its answers name the host.
        program = f'#!/bin/sh\\nMARKER={host.name} PYTHONPATH=$PYTHONPATH:/srv/standin exec /usr/bin/python3 "$@"\\n'
        host.run(f"printf '{program}' >/srv/python; chmod 755 /srv/python")
        host.more = {"proxy_address": host.address, "proxy_public_host": host.address}
    certificate(folder, [host.address for host in hosts])
    yield Site(hosts, folder)
    for host in hosts:
        host.remove()


def test_each_proxy_balances_over_both_hosts(site: Site) -> None:
    _, changed = site.play()
    assert set(changed) == {"proxy-a", "proxy-b"}
    for host in site.hosts:
        counts = site.servers(host)
        assert set(counts) == {"proxy-a", "proxy-b"} and min(counts.values()) >= 5, counts
    assert site.play()[1] == {"proxy-a": 0, "proxy-b": 0}


def test_the_certificate_is_the_given_one(site: Site) -> None:
    with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
        site.ask(site.hosts[0], trust=ssl.create_default_context())
    mode = site.hosts[0].run("stat -c '%a %U' /etc/vllm-proxy/tls/key.pem")
    assert mode == "600 root"
    assert (site.folder / "key.pem").read_text().splitlines()[1] not in (site.folder / "plays.log").read_text()


def test_what_is_closed_stays_closed(site: Site) -> None:
    for key, path, status in ((KEY, "/metrics", 404), ("sk-wrong", "/v1/models", 401)):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            site.ask(site.hosts[1], key, path)
        assert refusal.value.code == status


def test_a_host_that_is_gone_is_left_out(site: Site) -> None:
    site.hosts[1].run("systemctl stop vllm-chat")
    for host in site.hosts:
        assert set(site.servers(host, 10)) == {"proxy-a"}
    site.hosts[1].run("systemctl start vllm-chat; sleep 5")
    assert set(site.servers(site.hosts[0])) == {"proxy-a", "proxy-b"}


def test_the_role_proves_it(site: Site) -> None:
    """With the authority that clients are told to trust."""
    (site.folder / "prove.yml").write_text(PROVE)
    output, _ = site.play(str(site.folder / "prove.yml"))
    assert "trust      /etc/vllm-proxy/tls/authority.pem" in output
    told = json.loads(site.hosts[0].run("cat /etc/vllm-proxy/endpoints.json"))
    assert [row["hosts"] for row in told] == [["proxy-a", "proxy-b"]]
    assert told[0]["base_url"] == f"https://{site.hosts[0].address}:8443/v1"


def test_another_certificate_is_taken_without_a_break(site: Site) -> None:
    certificate(site.folder, [host.address for host in site.hosts])
    before = site.hosts[0].run("systemctl show --property=MainPID --value vllm-proxy")
    assert all(site.play()[1].values())
    site.trust = ssl.create_default_context(cafile=str(site.folder / "ca.pem"))
    assert site.servers(site.hosts[0], 5)
    assert site.hosts[0].run("systemctl show --property=MainPID --value vllm-proxy") == before, (
        "nginx was reloaded, not restarted"
    )


def test_a_service_that_does_not_start_keeps_no_other_from_its_proxy(site: Site) -> None:
    site.hosts[0].run("echo 'ValueError: broken on purpose' >/srv/failure")
    beside = (
        {"name": "broken", "port": 8010, "env": {"STANDIN_FAIL": "/srv/failure"}},
        {"name": "second", "port": 8011, "proxy_port": 8555},
    )
    output, _ = site.play(beside=beside)
    assert "broken on purpose" in output
    assert site.ask(site.hosts[0], port=8555)["data"][0]["marker"] == "proxy-a"
    assert set(site.servers(site.hosts[0])) == {"proxy-a", "proxy-b"}
    site.play()
    with pytest.raises(urllib.error.URLError, match="refused"):
        site.ask(site.hosts[0], port=8555)


def gone(site: Site) -> bool:
    left = "ls /etc/systemd/system/vllm-proxy.service /etc/vllm-proxy/endpoints.json; ss -Hltn 'sport = :8443'"
    return [host.run(left, check=False) for host in site.hosts] == ["", ""]


def test_switched_off_it_is_taken_away(site: Site) -> None:
    assert all(site.play("site.yml", "--check", proxy_enabled=False)[1].values())
    assert site.servers(site.hosts[0], 2), "check mode has switched it off"
    assert all(site.play(proxy_enabled=False)[1].values()) and gone(site)
    assert site.play(proxy_enabled=False)[1] == {"proxy-a": 0, "proxy-b": 0}
    assert site.hosts[0].run("systemctl is-active vllm-chat") == "active"


def test_teardown_takes_it_away_where_it_is_switched_off(site: Site) -> None:
    site.play()
    assert not gone(site)
    site.play("playbooks/teardown.yml", proxy_enabled=False)
    assert gone(site)
