# SPDX-License-Identifier: GPL-3.0-or-later
"""A real nginx with TLS before stand-ins for vLLM's server."""

import json
import time

import pytest

testinfra_hosts = ["ansible://proxy-debian12"]
CLIENT = """
import json, ssl, sys, threading, time, urllib.error, urllib.request
url, body, many, insecure = json.loads(sys.argv[1])
if isinstance(body, dict) and "padding" in body:
    body["padding"] = "x" * body["padding"]
key = open("/etc/upstream.key").read().strip()
context = ssl.create_default_context(cafile=None if insecure else "/etc/vllm-proxy/tls/certificate.pem")
opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
answers = []
def ask():
    headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    start, pieces = time.monotonic(), []
    try:
        answer = opener.open(urllib.request.Request(url, data, headers), timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    except urllib.error.URLError as error:
        answers.append({"error": str(error.reason)})
        return
    text = b""
    while True:
        piece = answer.read1(65536)
        if not piece:
            break
        pieces.append(time.monotonic() - start)
        text += piece
    answers.append({"status": answer.status if hasattr(answer, "status") else answer.code, "text": text.decode(),
                    "upstream": answer.headers.get("X-Upstream"), "pieces": pieces})
threads = [threading.Thread(target=ask) for _ in range(many)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(answers))
"""
CHAT = {"model": "stand-in", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def ask(host):
    """ask(path, body, many, port) -> what clients on the host were answered, each with the key."""

    def ask(path, body=None, many=1, port=8443, name="127.0.0.1", insecure=False):
        question = json.dumps([f"https://{name}:{port}{path}", body, many, insecure])
        return json.loads(host.check_output("python3 -c %s %s", CLIENT, question))

    return ask


def test_service_and_files(host):
    assert host.service("vllm-proxy").is_running
    assert host.service("vllm-proxy").is_enabled
    key = host.file("/etc/vllm-proxy/tls/key.pem")
    assert (key.user, key.mode) == ("root", 0o600)
    assert not host.service("nginx").is_running
    assert not host.service("nginx").is_enabled
    assert not host.socket("tcp://0.0.0.0:80").is_listening
    told = json.loads(host.file("/etc/vllm-proxy/endpoints.json").content_string)
    assert [entry["base_url"] for entry in told] == ["https://127.0.0.1:8443/v1", "https://other.test:8444/v1"]


def test_answers_over_tls_only(host, ask):
    (answer,) = ask("/v1/chat/completions", CHAT)
    assert answer["status"] == 200
    assert "amber from" in answer["text"]
    (answer,) = ask("/v1/models", insecure=True)
    assert "CERTIFICATE_VERIFY_FAILED" in answer["error"]
    plain = "import urllib.request as r; r.urlopen('http://127.0.0.1:8443/v1/models', timeout=5)"
    assert "HTTP Error 400" in host.run("python3 -c %s", plain).stderr
    assert host.run("openssl s_client -connect 127.0.0.1:8443 -tls1_1 </dev/null").rc != 0


@pytest.mark.parametrize("path", ["/metrics", "/v1/../metrics", "/v1/%2e%2e/metrics", "/", "/v1", "/docs", "/pause"])
def test_everything_else_is_closed(ask, path):
    (answer,) = ask(path)
    assert answer["status"] == 404
    assert json.loads(answer["text"])["error"]["message"] == "Not found"
    assert answer["upstream"] is None


def test_open_paths_and_services_of_their_own(ask):
    assert ask("/health")[0]["status"] == 200
    assert ask("/v1/models", port=8444)[0]["upstream"] == "c"


def test_stream_is_not_buffered(ask):
    (answer,) = ask("/v1/chat/completions", {**CHAT, "stream": True})
    assert answer["text"].rstrip().endswith("data: [DONE]")
    # A busy machine may bring two words in one piece; what is buffered comes at one moment.
    assert len(answer["pieces"]) >= 4, "the words came together"
    assert answer["pieces"][-1] - answer["pieces"][0] > 1


def test_limits(ask):
    assert ask("/v1/chat/completions", {**CHAT, "padding": 900_000})[0]["status"] == 200
    (answer,) = ask("/v1/chat/completions", {**CHAT, "padding": 1_200_000})
    assert answer["status"] == 413
    assert "larger than 1 MiB" in json.loads(answer["text"])["error"]["message"]
    time.sleep(2)
    # So many that a busy machine, which sends 15 a second, goes beyond the limit, too.
    statuses = [answer["status"] for answer in ask("/v1/models", many=200)]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 31, "10 a second and 30 at once"
    assert ask("/health")[0]["status"] == 200, "who watches is not told to wait"
    time.sleep(3)


def test_least_busy_server_is_asked(ask):
    """Eight requests at once, each so long that none ends before the last has come: half go to each server."""
    held = [json.loads(answer["text"])["held_by"] for answer in ask("/v1/hold", {"seconds": 4}, many=8)]
    assert sorted(held) == ["a"] * 4 + ["b"] * 4


def test_server_that_dies_is_left_out_and_taken_back(host, ask):
    time.sleep(2)
    host.check_output("systemctl stop upstream-a")
    answers = ask("/v1/models", many=12)
    assert {(answer["status"], answer["upstream"]) for answer in answers} == {(200, "b")}
    host.check_output("systemctl stop upstream-b")
    (answer,) = ask("/v1/models")
    assert (answer["status"], json.loads(answer["text"])["error"]["message"]) == (502, "No server of chat answers")
    assert ask("/v1/models", port=8444)[0]["status"] == 200
    host.check_output("systemctl start upstream-a upstream-b")
    listening = "import socket; socket.create_connection(('127.0.0.1', {}))"
    for port in (8001, 8002):
        host.check_output(
            "timeout 30 sh -c %s", f'until python3 -c "{listening.format(port)}" 2>/dev/null; do sleep 0.2; done'
        )
    time.sleep(4)
    held = {(answer["status"], answer["upstream"]) for answer in ask("/v1/hold", {"seconds": 1}, many=4)}
    assert held == {(200, "a"), (200, "b")}


def test_server_that_dies_while_it_works(host, ask):
    """What one had not answered is asked of the other; the client sees nothing of it."""
    host.check_output("rm -f /run/held-a")
    stop = "until [ -e /run/held-a ]; do sleep 0.1; done; systemctl kill --signal=KILL upstream-a; sleep 0.2; systemctl start upstream-a"
    host.check_output("systemd-run --collect sh -c %s", stop)
    held = ask("/v1/hold", {"seconds": 2}, many=4)
    assert [answer["status"] for answer in held] == [200] * 4
    assert {json.loads(answer["text"])["held_by"] for answer in held} == {"b"}


def test_reload_does_not_cut_streams(host, ask):
    host.check_output("systemd-run --collect sh -c 'sleep 1; systemctl reload vllm-proxy'")
    (answer,) = ask("/v1/chat/completions", {**CHAT, "stream": True})
    assert answer["text"].rstrip().endswith("data: [DONE]")


def test_no_log_holds_the_key_or_its_owner(host):
    key = host.file("/etc/upstream.key").content_string.strip()
    journal = host.check_output("journalctl --no-pager --output=cat")
    assert '"POST /v1/chat/completions" 200' in journal
    assert key not in journal
    assert key not in host.check_output("ps -eo args")
    assert host.run("grep -rlF %s /etc/vllm-proxy /var/log /tmp /run/vllm-proxy.pid", key).stdout == ""
