# SPDX-License-Identifier: GPL-3.0-or-later
"""A real vLLM as a systemd service."""

import json
import time

UNIT = "vllm-chat"
USER = "llm"  # since side_effect.yml; vllm before


def healthy(host, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/health', timeout=5).status)"
        if host.run(f'python3 -c "{code}"').stdout.strip() == "200":
            return True
        time.sleep(1)
    return False


def main_pid(host):
    return int(host.check_output(f"systemctl show --property=MainPID --value {UNIT}"))


def ask(host, path, key=None, body=None):
    """(status, text) of a request that runs on the host."""
    script = (
        "import json, sys, urllib.request as r, urllib.error as e\n"
        "path, key, body = json.load(sys.stdin)\n"
        "headers = {'Content-Type': 'application/json', **({'Authorization': 'Bearer ' + key} if key else {})}\n"
        "request = r.Request('http://127.0.0.1:8000' + path, json.dumps(body).encode() if body else None, headers)\n"
        "try:\n    answer = r.urlopen(request, timeout=60); print(answer.status, answer.read().decode())\n"
        "except e.HTTPError as error:\n    print(error.code, error.read().decode())\n"
    )
    result = host.backend.run(f"echo '{json.dumps([path, key, body])}' | python3 -c \"$(cat <<'END'\n{script}END\n)\"")
    status, _, text = result.stdout.partition(" ")
    return int(status), text


def key_of(host):
    return host.file("/etc/vllm/chat/api_key").content_string.strip()


def test_unit_runs_at_boot_as_its_own_user(host):
    service = host.service(UNIT)
    assert service.is_running
    assert service.is_enabled
    assert host.process.get(pid=main_pid(host)).user == USER
    assert host.user(USER).shell == "/usr/sbin/nologin"


def test_nothing_is_left_to_its_former_user(host):
    assert host.check_output("find /etc/vllm /var/lib/vllm -user vllm") == ""
    assert host.file("/var/lib/vllm/chat/cache").user == USER
    assert host.run("pgrep --euid vllm").rc == 1


def test_teardown_before_left_the_owners_unit_alone(host):
    """It once took an empty list of services for a pattern that finds all units."""
    assert host.service("owners").is_running
    assert host.service("owners").is_enabled


def test_secrets_are_for_the_service_alone(host):
    for name in ("api_key", "env"):
        file = host.file(f"/etc/vllm/chat/{name}")
        assert (file.user, file.mode) == (USER, 0o600)
    key = key_of(host)
    assert key.startswith("sk-")
    assert len(key) > 40
    for seen in (
        "ps -eo args",
        f"systemctl show {UNIT}",
        f"systemctl cat {UNIT}",
        "journalctl --no-pager --output=cat",
    ):
        assert key not in host.check_output(seen)


def test_its_processes_may_not_dump_core(host):
    """A core dump would hold the key."""
    for process in host.check_output(f"pgrep --euid {USER}").split():
        limit = host.check_output(f"grep 'Max core file size' /proc/{process}/limits").split()
        assert limit[-3:-1] == ["0", "0"], "limits that a process may not raise again"


def test_answers_with_the_key_only(host):
    assert healthy(host, 120)
    body = {"model": "random-llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    status, text = ask(host, "/v1/chat/completions", key_of(host), body)
    assert status == 200
    assert json.loads(text)["choices"][0]["message"]["content"].strip()
    assert ask(host, "/v1/models")[0] == 401
    assert ask(host, "/v1/models", "sk-wrong")[0] == 401
    assert ask(host, "/metrics", key_of(host))[0] == 404
    assert host.socket("tcp://127.0.0.1:8000").is_listening
    assert not host.socket("tcp://0.0.0.0:8000").is_listening


def test_killed_server_comes_back_and_leaves_nothing(host):
    before = main_pid(host)
    children = host.check_output(f"pgrep --euid {USER}").split()
    assert len(children) > 1
    host.check_output(f"kill -KILL {before}")
    time.sleep(2)
    assert healthy(host, 240)
    assert main_pid(host) not in (0, before)
    for child in children:
        assert not host.file(f"/proc/{child}").exists, "an engine of the killed server still runs"
