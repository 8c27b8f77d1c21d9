# SPDX-License-Identifier: GPL-3.0-or-later
"""The same proxy without TLS."""

import json

testinfra_hosts = ["ansible://proxy-plain-debian12"]
ASK = (
    "import urllib.request as r; "
    "print(r.urlopen(r.Request('http://127.0.0.1:{}{}', headers={{'Authorization': 'Bearer {}'}})).read().decode())"
)


def test_answers_without_tls(host):
    key = host.file("/etc/upstream.key").content_string.strip()
    for port in (8443, 8444):
        answer = host.check_output("python3 -c %s", ASK.format(port, "/v1/models", key))
        assert json.loads(answer)["data"][0]["id"] == "stand-in"
    assert "HTTP Error 404" in host.run("python3 -c %s", ASK.format(8443, "/metrics", key)).stderr
    assert host.run("openssl s_client -connect 127.0.0.1:8443 </dev/null").rc != 0


def test_clients_are_told_so(host):
    told = json.loads(host.file("/etc/vllm-proxy/endpoints.json").content_string)
    assert [(entry["base_url"], entry["ca_file"]) for entry in told] == [
        ("http://127.0.0.1:8443/v1", ""),
        ("http://other.test:8444/v1", ""),
    ]
    assert "ssl" not in host.file("/etc/vllm-proxy/nginx.conf").content_string
    assert not host.file("/etc/vllm-proxy/tls/certificate.pem").exists


def test_selinux_standin_is_asked_for_what_it_lacks(host):
    """8443 is nginx's in its policy."""
    state = json.loads(host.file("/usr/local/sbin/selinux.json").content_string)
    assert state["calls"] == [
        ["setsebool", "-P", "httpd_can_network_connect", "on"],
        ["semanage", "port", "-a", "-t", "http_port_t", "-p", "tcp", "8444"],
    ]
    assert json.loads(host.file("/etc/vllm-proxy/selinux_ports").content_string) == [8444]
