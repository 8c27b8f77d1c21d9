# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole path with a real server, as a new user walks it: a fresh clone, and only the README's commands.

The tests run in the order in which they stand: each starts from what the one before left. A server's start takes about
a minute on two cores, so that every restart here is one that a test needs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import openai
import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub

ROOT = Path(__file__).resolve().parents[2]
PORT = 18000
KEY_OF_A_USER = "sk-of-the-user-0123456789abcdef"
RECAP = re.compile(r"^quickstart\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "ANSIBLE_NOCOLOR": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1500,
        check=False,
    )


def succeed(command: list[str], cwd: Path, **environment: str) -> str:
    result = run(command, cwd, **environment)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-6000:]}"
    return result.stdout


def changed(output: str) -> int:
    match = RECAP.search(output)
    assert match, output[-3000:]
    assert match[2] == "0"
    return int(match[1])


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def own_processes(folder: Path) -> dict[int, str]:
    """Process id -> command line of what works below the folder."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink().is_relative_to(folder):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class Checkout:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / ".quickstart"
        self.outputs: list[str] = []

    @property
    def endpoint(self) -> dict[str, str]:
        loaded: dict[str, str] = json.loads((self.data / "endpoint.json").read_text())
        return loaded

    @property
    def key(self) -> str:
        return Path(self.endpoint["api_key_file"]).read_text().strip()

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.endpoint["base_url"], api_key=key or self.key, max_retries=0, timeout=120)

    def quickstart(self, **environment: str) -> str:
        output = succeed(["make", "quickstart", f"PORT={PORT}"], self.path, **environment)
        self.outputs.append(output)
        return output

    def play(self, *arguments: str, **environment: str) -> str:
        extra = ["-e", f"quickstart_port={PORT}"]
        output = succeed([".venv/bin/ansible-playbook", *arguments, *extra], self.path, **environment)
        self.outputs.append(output)
        return output


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory):
    """A fresh clone with what is not yet committed, and a server from `make quickstart` in it."""
    path = tmp_path_factory.mktemp("clone") / "baremetal.vllm"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(path)], check=True)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, names):
        source, target = ROOT / name, path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file() and not source.is_symlink():
            shutil.copy2(source, target)
    made = Checkout(path)
    start = time.monotonic()
    made.quickstart()
    print(f"\nfirst quickstart: {time.monotonic() - start:.0f} s")
    yield made
    run(["make", "quickstart-down", f"PORT={PORT}"], path)
    kill(own_processes(made.data))


def test_first_run_prints_how_to_use_it(checkout: Checkout) -> None:
    output = checkout.outputs[0]
    assert f"base URL   http://127.0.0.1:{PORT}/v1" in output
    assert f"key file   {checkout.endpoint['api_key_file']}" in output
    assert re.search(r"answer     \w+( \w+)+", output)
    curl = re.search(r"try +(curl .*)$", output, re.M)
    assert curl
    answer = json.loads(succeed(["sh", "-c", curl[1]], checkout.path))
    assert answer["choices"][0]["message"]["content"].strip()


def test_endpoint_file(checkout: Checkout) -> None:
    assert {key: checkout.endpoint[key] for key in ("service", "base_url", "api_key_file", "model", "task")} == {
        "service": "quickstart",
        "base_url": f"http://127.0.0.1:{PORT}/v1",
        "api_key_file": str(checkout.data / "config/quickstart/api_key"),
        "model": "random-llama",
        "task": "generate",
    }
    assert Path(checkout.endpoint["api_key_file"]).stat().st_mode & 0o777 == 0o600


def test_openai_sdk(checkout: Checkout) -> None:
    client, model = checkout.client(), checkout.endpoint["model"]
    assert [entry.id for entry in client.models.list()] == [model]
    messages = [{"role": "user", "content": "What is a lantern?"}]
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert chat.choices[0].message.content
    assert chat.usage and chat.usage.completion_tokens == 8
    assert client.completions.create(model=model, prompt="Once", max_tokens=8).choices[0].text
    pieces = list(
        client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0, stream=True)
    )
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == chat.choices[0].message.content
    with pytest.raises(openai.AuthenticationError):
        checkout.client("sk-wrong").models.list()


def test_real_parser_takes_what_the_planner_writes(checkout: Checkout) -> None:
    """Tests of the planner that ask vLLM's own argument parser, with the vLLM that the quickstart has installed."""
    python = next((checkout.data / "venvs").glob("cpu-*/bin/python"))
    command = [
        f"{ROOT}/.venv/bin/pytest",
        "-q",
        "-rs",
        "tests/unit/plugins/plugin_utils/planner",
        "-k",
        "real_parser or installed_vllm",
    ]
    output = succeed(command, ROOT, BAREMETAL_VLLM_PYTHON=str(python))
    assert re.search(r"^\d+ passed", output.splitlines()[-1]), output
    assert "skipped" not in output.splitlines()[-1]


def test_second_run_changes_nothing_and_takes_seconds(checkout: Checkout) -> None:
    start = time.monotonic()
    output = checkout.quickstart()
    seconds = time.monotonic() - start
    print(f"\nsecond quickstart: {seconds:.1f} s, {len(re.findall(r'^TASK ', output, re.M))} tasks")
    assert changed(output) == 0
    # Not the goal, which docs/performance.md has: the machine that tests may be busy with other things.
    assert seconds < 120


def test_check_mode_agrees(checkout: Checkout) -> None:
    assert changed(checkout.play("site.yml", "-i", "inventories/quickstart", "--check", "--diff")) == 0


def test_verify_fails_when_a_path_is_open(checkout: Checkout) -> None:
    """The proof is one: it must not hold when something is wrong. /health is open, and here it is not meant to be."""
    closed = json.dumps({"__vllm_closed_paths": ["/health"], "__vllm_open_paths": []})
    result = run(
        [".venv/bin/ansible-playbook", "playbooks/verify.yml", "-i", "inventories/quickstart", "-e", closed],
        checkout.path,
    )
    assert result.returncode != 0
    assert "open without the key: GET /health: HTTP 200" in " ".join(result.stdout.split())


def test_literal_command_with_an_inventory_of_the_user(checkout: Checkout) -> None:
    """`ansible-playbook site.yml -i gpu_hosts`, with the settings of the quickstart in an INI file."""
    settings = (checkout.path / "inventories/quickstart/group_vars/all.yml").read_text()
    (checkout.path / "group_vars").mkdir(exist_ok=True)
    (checkout.path / "group_vars/all.yml").write_text(
        settings.replace("(inventory_dir ~ '/../../.quickstart')", "(inventory_dir ~ '/.quickstart')")
    )
    (checkout.path / "gpu_hosts").write_text("[gpu_hosts]\nquickstart ansible_connection=local\n")
    try:
        assert (
            changed(
                checkout.play(
                    "site.yml", "-i", "gpu_hosts", "-e", "ansible_python_interpreter={{ansible_playbook_python}}"
                )
            )
            == 0
        )
    finally:
        shutil.rmtree(checkout.path / "group_vars")
        (checkout.path / "gpu_hosts").unlink()


def test_installed_collection(checkout: Checkout, tmp_path: Path) -> None:
    """The same server, brought to the same state by the collection that was built, installed and called by its name."""
    galaxy = str(checkout.path / ".venv/bin/ansible-galaxy")
    succeed([galaxy, "collection", "build", "--output-path", str(tmp_path)], checkout.path)
    artifact = next(tmp_path.glob("baremetal-vllm-*.tar.gz"))
    succeed(
        [galaxy, "collection", "install", str(artifact), "-p", str(tmp_path / "collections"), "--no-deps"], tmp_path
    )
    output = succeed(
        [
            str(checkout.path / ".venv/bin/ansible-playbook"),
            "baremetal.vllm.site",
            "-i",
            str(checkout.path / "inventories/quickstart"),
            "-e",
            f"quickstart_port={PORT}",
        ],
        tmp_path,
        ANSIBLE_COLLECTIONS_PATH=str(tmp_path / "collections"),
        ANSIBLE_INJECT_FACT_VARS="false",
    )
    assert changed(output) == 0


def test_killed_server_comes_back(checkout: Checkout) -> None:
    before = own_processes(checkout.data)
    main = next(pid for pid, command in before.items() if "baremetal_serve" in command)
    assert len(before) > 1, "the engine runs in processes of its own"
    os.kill(main, signal.SIGKILL)
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        try:
            checkout.client().models.list()
            break
        except openai.APIConnectionError:
            time.sleep(1)
    after = own_processes(checkout.data)
    assert not set(before) & set(after), "processes of the killed server are left"
    assert checkout.client().models.list()


def test_after_a_boot_a_run_starts_what_is_there(checkout: Checkout) -> None:
    """Nobody starts the supervisor of a machine without systemd at boot. Nothing is to be installed for it."""
    kill(own_processes(checkout.data))
    stamps = {path: path.stat().st_mtime_ns for path in checkout.data.rglob(".baremetal-complete.json")}
    assert len(stamps) == 2, "tools and one environment"
    checkout.quickstart()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "an environment was made anew"
    assert checkout.client().models.list()


def test_ansible_runner_as_awx_calls_it(checkout: Checkout, tmp_path: Path) -> None:
    """A private data directory in AWX's form; the key comes from the job's environment and replaces the old one."""
    for folder in ("env", "inventory"):
        (tmp_path / folder).mkdir()
    (tmp_path / "project").symlink_to(checkout.path)
    settings = {
        "QUICKSTART_DIR": str(checkout.data),
        "VLLM_API_KEY": KEY_OF_A_USER,
        "ANSIBLE_CONFIG": str(checkout.path / "ansible.cfg"),
    }
    (tmp_path / "env/envvars").write_text(json.dumps(settings))
    (tmp_path / "env/extravars").write_text(json.dumps({"quickstart_port": PORT}))
    inventory = {
        "all": {"hosts": ["quickstart"], "vars": {"ansible_connection": "local"}},
        "_meta": {"hostvars": {"quickstart": {"ansible_python_interpreter": "{{ ansible_playbook_python }}"}}},
    }
    # AWX hands inventories over as a script that prints JSON; group variables come from the project's own inventory.
    script = tmp_path / "inventory/hosts"
    script.write_text(f"#!/usr/bin/env python3\nprint({json.dumps(inventory)!r})\n")
    script.chmod(0o700)
    shutil.copytree(checkout.path / "inventories/quickstart/group_vars", tmp_path / "inventory/group_vars")
    runner = shutil.which("ansible-runner", path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
    assert runner
    path = f"{checkout.path / '.venv/bin'}:{os.environ['PATH']}"
    output = succeed([runner, "run", str(tmp_path), "-p", "site.yml"], tmp_path, PATH=path)
    checkout.outputs.append(output)
    assert checkout.key == KEY_OF_A_USER
    assert checkout.client(KEY_OF_A_USER).models.list()
    status = next((tmp_path / "artifacts").iterdir()) / "status"
    assert status.read_text() == "successful"
    for artifact in (tmp_path / "artifacts").rglob("*"):
        # ansible-runner's own record of the job's environment, which env/envvars beside it holds, too.
        if artifact.is_file() and artifact.name != "command":
            assert KEY_OF_A_USER not in artifact.read_text(errors="replace"), f"{artifact} holds the key"


def test_nothing_leaks_however_verbose(checkout: Checkout, tmp_path: Path) -> None:
    """A run with a new key and a hub's token, as verbose and with as many records as Ansible keeps, then the benchmark."""
    key, token = "sk-another-of-the-user-0123456789", "hf_token-of-the-user-0123456789"
    for name in ("local", "remote", "facts"):
        (tmp_path / name).mkdir()
    environment = {
        "VLLM_API_KEY": key,
        "HF_TOKEN": token,
        "ANSIBLE_LOG_PATH": str(tmp_path / "ansible.log"),
        "ANSIBLE_CACHE_PLUGIN": "jsonfile",
        "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(tmp_path / "facts"),
        "ANSIBLE_LOCAL_TEMP": str(tmp_path / "local"),
        "ANSIBLE_REMOTE_TMP": str(tmp_path / "remote"),
        "ANSIBLE_PIPELINING": "false",
    }
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        """Everybody may read everybody's command line while it runs."""
        while not done.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    command = path.read_bytes()
                    if key.encode() in command or token.encode() in command:
                        seen.append(command.decode(errors="replace"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        runs = [["site.yml", "-i", "inventories/quickstart", "-vvv", "--diff"]]
        bench = ["-e", "bench_preset=quick", "-e", f"bench_output_dir={tmp_path}/bench"]
        runs.append(["playbooks/bench.yml", "-i", "inventories/quickstart", "-vvv", *bench])
        outputs = [checkout.play(*arguments, **environment) for arguments in runs]
    finally:
        done.set()
        watcher.join()
    assert checkout.key == key, "the key was replaced"
    assert not seen
    assert (tmp_path / "ansible.log").stat().st_size > 100_000
    assert list((tmp_path / "facts").iterdir())
    assert json.loads(next((tmp_path / "bench").glob("*/*.json")).read_text())["levels"][1]["completed"] == 16
    records = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (key, token, base64.b64encode(f"{key}\n".encode()).decode()):
        for output in outputs:
            assert secret not in output
        assert not [path for path in records if secret.encode() in path.read_bytes()]
    own = [path for path in checkout.data.rglob("*") if path.is_file() and "venvs" not in path.parts]
    assert not [path for path in own if token.encode() in path.read_bytes()]


def test_key_is_nowhere_but_in_its_file(checkout: Checkout) -> None:
    """In its file, and beside the last configuration that worked, which a failed start goes back to."""
    key = checkout.key
    for output in checkout.outputs:
        assert key not in output
    for command in own_processes(Path("/")).values():
        assert key not in command
    holders = {
        path for path in checkout.data.rglob("*")
        if path.is_file() and "venvs" not in path.parts and key.encode() in path.read_bytes()
    }  # fmt: skip
    file = Path(checkout.endpoint["api_key_file"])
    assert holders == {file, file.parent / "good" / file.name}
    assert {path.stat().st_mode & 0o777 for path in holders} == {0o600}


def test_model_of_a_hub(checkout: Checkout, tmp_path: Path) -> None:
    """`make quickstart MODEL=owner/name`: a whole model by way of a stand-in for the hub that breaks off once, served."""
    random_llama.write(str(tmp_path / "tiny"), seed=1)
    (tmp_path / "tiny" / random_llama.MANIFEST).unlink()
    with Hub() as hub:
        commit = hub.add("acme/tiny-llama", tmp_path / "tiny")
        hub.faults.append(Fault("/cdn/", cut_at=1_000_000, times=1))
        command = ["make", "quickstart", f"PORT={PORT}", "MODEL=acme/tiny-llama"]
        output = succeed(command, checkout.path, HF_ENDPOINT=hub.url)
        assert re.search(r"answer     \w+( \w+)+", output)
        asked = len(hub.requests)
        assert changed(succeed(command, checkout.path, HF_ENDPOINT=hub.url)) == 0
        assert len(hub.requests) == asked, "a second run asks the hub nothing"
    model = checkout.endpoint["model"]
    assert [entry.id for entry in checkout.client().models.list()] == [model] == ["acme/tiny-llama"]
    messages = [{"role": "user", "content": "What is a lantern?"}]
    chat = checkout.client().chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0)
    assert chat.choices[0].message.content
    weights = next((checkout.data / "models").glob("acme/tiny-llama/**/model.safetensors"))
    assert weights.read_bytes() == (tmp_path / "tiny/model.safetensors").read_bytes()
    assert any(commit in path for path in hub.paths()), "the files of the commit, not of the branch"


def test_down_stops_everything_and_keeps_the_model(checkout: Checkout) -> None:
    succeed(["make", "quickstart-down", f"PORT={PORT}"], checkout.path)
    assert not is_open(PORT)
    assert not own_processes(checkout.data / "state")
    assert not (checkout.data / "endpoint.json").exists()
    assert (checkout.data / "models/random-llama/config.json").exists()
    assert (checkout.data / "venvs").is_dir()
