# SPDX-License-Identifier: GPL-3.0-or-later
"""The runtime `container` with real vLLM in real containers: three services on one host, through what happens to a host.

The tests run in the order in which they stand: each starts from what the one before left. They take about 20 minutes on two
cores: a start of an engine takes one.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from host import CACHE, Host, adapter, embedder, out, play, reranker, watched  # noqa: E402

from ansible_collections.baremetal.vllm.tests.fakes.hub import Hub  # noqa: E402

PLANNED = "vllm/vllm-openai-cpu:v0.32.0-x86_64"
LOCAL = "baremetal-test/vllm-cpu:0.32.0"
PORTS = {"chat": 8000, "embed": 8001, "rerank": 8002}
# A few cores serve all of them; the random model needs no more.
SLIM = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
RECAP = re.compile(r"^serving\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)
START_LIMIT_S = 600
HEALTH_LIMIT_S = 180
HUB_TOKEN = "hf_" + secrets.token_hex(17)
GIVEN_KEY = "sk-given-" + secrets.token_hex(16)


class NearHub(Hub):
    """The stand-in for the hub, where containers of this machine reach it."""

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address[:2])


class Site:
    def __init__(self, host: Host, folder: Path, hub: NearHub, archive: Path) -> None:
        self.host, self.folder, self.hub = host, folder, hub
        self.seen: set[str] = set()  # command lines of processes that lived during plays
        self.image: dict[str, str] = {"reference": LOCAL, "archive": f"/srv/images/{archive.name}"}
        self.image["checksum"] = "sha256:" + out("sha256sum", str(archive)).split()[0]
        self.services: dict[str, dict[str, Any]] = {
            "chat": {"model": "random-llama", "source": "generated", "api_key": GIVEN_KEY, "env": {**SLIM},
                     "extra_args": ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]},
            "embed": {"model": "someone/minilm", "served_model_name": "minilm", "env": {**SLIM}},
            "rerank": {"model": "/srv/weights/reranker", "served_model_name": "reranker", "env": {**SLIM}},
        }  # fmt: skip

    def play(self, *arguments: str, playbook: str = "site.yml", ok: bool = True) -> tuple[str, int]:
        """(output, changed). Like a user who wants to see everything: with --diff and -v."""
        limit = int(self.host.run("ulimit -Hn"))
        variables = {
            "vllm_runtime": "container",
            "vllm_services": [{"name": name, **service} for name, service in self.services.items()],
            "vllm_images": {PLANNED: self.image},
            "vllm_container_nofile": limit,
            "vllm_container_shm_size": "256m",
            "vllm_drain_timeout": 60,
            "vllm_verify_client": "always",
            "docker_nofile": limit,
            "model_hub_endpoint": self.hub.url,
        }
        cache = {"ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(self.folder / "facts")}
        with watched(self.seen):
            code, text = play(
                self.folder, [self.host], variables, playbook, "--diff", "-v", *arguments, HF_TOKEN=HUB_TOKEN, **cache
            )
        match = RECAP.search(text)
        assert match, text[-4000:]
        assert (code == 0 and match[2] == "0") == ok, text[-6000:]
        return text, int(match[1])

    def ask(self, service: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What an endpoint of the host says to a client on it that has the key."""
        script = (
            "import json, sys, urllib.request as r; url, key, body = json.load(sys.stdin);"
            "headers = {'Content-Type': 'application/json', 'Authorization': 'Bearer ' + open(key).read().strip()};"
            "data = json.dumps(body).encode() if body else None;"
            "print(r.urlopen(r.Request(url, data, headers), timeout=120).read().decode())"
        )
        asked = [f"http://127.0.0.1:{PORTS[service]}{path}", f"/etc/vllm/{service}/api_key", body]
        return json.loads(
            out("docker", "exec", "-i", self.host.name, "python3", "-c", script, stdin=json.dumps(asked)) or "null"
        )

    def answers(self, service: str) -> bool:
        try:
            return bool(self.ask(service, "/v1/models")["data"])
        except (AssertionError, ValueError):
            return False

    def wait(self, *services: str) -> float:
        """Seconds until all of them answer."""
        begin = time.monotonic()
        for service in services:
            while not self.answers(service):
                assert time.monotonic() - begin < START_LIMIT_S, self.host.run(
                    f"systemctl status vllm-{service}; journalctl -u vllm-{service} -n 40 -o cat", check=False
                )
                time.sleep(2)
        return time.monotonic() - begin

    def container(self, service: str) -> str:
        """The id of the container that runs a service, or nothing."""
        return self.host.run(f"docker ps --quiet --no-trunc --filter name=^vllm-{service}$", check=False)

    def inspect(self, service: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.host.run(f"docker inspect vllm-{service}"))[0]
        return told


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("serving")
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = Path(out(str(ROOT / "molecule/images/vllm-cpu.sh")).splitlines()[-1]).resolve()
    base = out(str(ROOT / "molecule/images/build.sh"), "debian12").splitlines()[-1]
    model = embedder(CACHE)
    reranker(model)
    adapter(CACHE)
    host = Host("serving", folder, base, "--volume", f"{archive.parent}:/srv/images:ro", "--volume",
                f"{CACHE}:/srv/weights:ro", "--shm-size", "1g")  # fmt: skip
    # Asked of the container: the network itself names its gateway only in some releases of Docker.
    gateway = out("docker", "inspect", "--format", "{{.NetworkSettings.Networks.bridge.Gateway}}", host.name)
    with NearHub(host=gateway) as hub:
        hub.direct = True
        hub.add("someone/minilm", model, token=HUB_TOKEN)
        yield Site(host, folder, hub, archive)
    host.remove()


def similarity(a: list[float], b: list[float]) -> float:
    size = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size


def test_three_services_from_an_archive(site: Site) -> None:
    output, _ = site.play()
    for name in PORTS:
        assert site.host.run(f"systemctl is-enabled vllm-{name}") == "enabled"
        assert f"[serving] {name}: " in output, "no stage of its start was shown"
    # The endpoints listen on the host's own address: the SDK asks them through the SSH connection.
    for proof in (
        "models, completion, chat, stream, tool_call, wrong_key",
        "models, embeddings, wrong_key",
        "models, rerank, wrong_key",
    ):
        assert f"from the controller, ssh: {proof}" in output


def test_embeddings_mean_something(site: Site) -> None:
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Shares fell after the quarterly report."]
    rows = site.ask("embed", "/v1/embeddings", {"model": "minilm", "input": texts})["data"]
    cat, kitten, shares = (row["embedding"] for row in rows)
    assert len(cat) == 384
    near, far = similarity(cat, kitten), similarity(cat, shares)
    print(f"\nsimilarity: {near:.3f} of two cats, {far:.3f} of a cat and the stock exchange")
    assert near > 0.5 > 0.2 > far


def test_reranking_gives_each_document_its_score(site: Site) -> None:
    body = {"model": "reranker", "query": "cat", "documents": ["cat", "a long text about shares", "dog"]}
    scores = {row["index"]: row["relevance_score"] for row in site.ask("rerank", "/v1/rerank", body)["results"]}
    again = {row["index"]: row["relevance_score"] for row in site.ask("rerank", "/v1/rerank", body)["results"]}
    assert set(scores) == {0, 1, 2} and len(set(scores.values())) == 3
    assert all(abs(scores[index] - again[index]) < 1e-3 for index in scores)


def test_a_second_run_changes_nothing(site: Site) -> None:
    before = {name: site.container(name) for name in PORTS}
    output, changed = site.play()
    assert changed == 0, re.findall(r"TASK \[(.*?)\].*\n(?:.*\n)??changed:", output)
    assert {name: site.container(name) for name in PORTS} == before
    assert site.play("--check")[1] == 0


def test_containers_get_healthy(site: Site) -> None:
    """Docker asks every half minute; until then it says starting."""
    end = time.monotonic() + HEALTH_LIMIT_S
    for name in PORTS:
        while (status := site.inspect(name)["State"]["Health"]["Status"]) != "healthy":
            assert status == "starting" and time.monotonic() < end, site.inspect(name)["State"]["Health"]
            time.sleep(2)


def test_rights_of_a_container(site: Site) -> None:
    for name in PORTS:
        told = site.inspect(name)
        settings = told["HostConfig"]
        assert settings["ReadonlyRootfs"] is True and settings["Privileged"] is False
        assert settings["CapDrop"] == ["ALL"] and not settings["CapAdd"]
        assert "no-new-privileges" in settings["SecurityOpt"][0]
        assert told["Config"]["User"].split(":")[0] not in ("", "0")
        assert settings["LogConfig"] == {"Type": "json-file", "Config": {"max-file": "3", "max-size": "50m"}}
        assert {mount["Destination"] for mount in told["Mounts"] if mount["RW"]} == {f"/var/lib/vllm/{name}"}
        limit = int(site.host.run("ulimit -Hn"))
        assert settings["ShmSize"] == 256 << 20
        ulimits = {row["Name"]: (row["Hard"], row["Soft"]) for row in settings["Ulimits"]}
        assert ulimits == {"nofile": (limit, limit), "core": (0, 0)}
        # The kernel's own word for it.
        limits = site.host.run(f"cat /proc/{told['State']['Pid']}/limits")
        assert re.search(rf"^Max open files\s+{limit}\s+{limit}\s", limits, re.M), limits
        status = site.host.run(f"cat /proc/{told['State']['Pid']}/status")
        assert re.search(r"CapEff:\s+0+$", status, re.M) and re.search(r"NoNewPrivs:\s+1$", status, re.M)


def test_verify_and_measurements(site: Site) -> None:
    output, _ = site.play(playbook="playbooks/verify.yml")
    assert re.search(r"memory +.*1,?048,?576 .*tokens", output), re.findall(r"memory .*", output)


def test_a_change_touches_its_service_alone(site: Site) -> None:
    before = {name: site.container(name) for name in PORTS}
    site.services["rerank"]["max_num_seqs"] = 32
    failures, stop = [], threading.Event()

    def client() -> None:
        while not stop.wait(0.5):
            try:
                site.ask("rerank", "/v1/models")
            except (AssertionError, ValueError) as error:
                failures.append(str(error)[-200:])

    thread = threading.Thread(target=client)
    thread.start()
    output, _ = site.play("--skip-tags", "verify")
    stop.set()
    thread.join()
    assert "rerank answered all the time: another server stood by" in output, output[-4000:]
    assert len(failures) < 3, failures
    after = {name: site.container(name) for name in PORTS}
    assert [name for name in PORTS if before[name] != after[name]] == ["rerank"]
    assert site.host.run("docker ps --quiet --all | wc -l") == "3", "the one that stood by has gone"
    assert site.play("--skip-tags", "verify")[1] == 0


def test_a_restart_lets_requests_end(site: Site) -> None:
    before, answers = site.container("chat"), []
    body = {"model": "random-llama", "prompt": "x", "max_tokens": 1200, "ignore_eos": True, "temperature": 0}
    thread = threading.Thread(target=lambda: answers.append(site.ask("chat", "/v1/completions", body)))
    thread.start()
    time.sleep(1)
    assert thread.is_alive(), "the request was too short to be cut"
    begin = time.monotonic()
    site.host.run("systemctl restart vllm-chat")
    print(f"\nstopped in {time.monotonic() - begin:.0f} s, back after {site.wait('chat'):.0f} s")
    thread.join()
    assert answers and answers[0]["usage"]["completion_tokens"] == 1200, answers
    assert site.container("chat") not in ("", before)


def test_an_upgrade_by_digest_from_a_registry(site: Site) -> None:
    site.host.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends docker-registry", check=False)
    # Debian's asks for a password that nobody has set.
    site.host.run(
        "sed -i '/^auth:/,/path:/d' /etc/docker/registry/config.yml; systemctl restart docker-registry; sleep 2"
    )
    new = "localhost:5000/vllm/newer:1"
    site.host.run(f"printf 'FROM {LOCAL}\\nLABEL newer=1\\n' | docker build --quiet --tag {new} -")
    site.host.run(f"docker push --quiet {new}")
    digest = site.host.run(f"docker inspect --format '{{{{index .RepoDigests 0}}}}' {new}").split("@")[1]
    site.host.run(f"docker rmi --force {new} localhost:5000/vllm/newer@{digest}")
    assert "localhost" not in site.host.run("docker images --digests")
    former = site.image
    # One that the registry does not have: nothing is touched.
    before = {name: site.container(name) for name in PORTS}
    site.image = {"reference": new, "digest": "sha256:" + "0" * 64}
    output, _ = site.play("--skip-tags", "verify", ok=False)
    assert "cannot pull localhost:5000/vllm/newer@sha256:0000" in output
    assert {name: site.container(name) for name in PORTS} == before
    # Only chat's version has the new image; the others keep the archive's.
    site.services["chat"]["image"] = "vllm/newer:1"
    site.image = former
    site.services["chat"]["image"] = f"localhost:5000/vllm/newer@{digest}"
    output, _ = site.play("--skip-tags", "verify")
    assert site.inspect("chat")["Config"]["Image"] == f"localhost:5000/vllm/newer@{digest}"
    assert site.inspect("chat")["Config"]["Labels"]["newer"] == "1"
    assert {name: site.container(name) for name in ("embed", "rerank")} == {
        name: before[name] for name in ("embed", "rerank")
    }
    assert site.answers("chat")


def test_an_upgrade_that_does_not_start_leaves_the_one_before(site: Site) -> None:
    before = {name: site.container(name) for name in PORTS}
    broken = "localhost:5000/vllm/broken:1"
    # Its Python is another, which has no vLLM.
    site.host.run(f"printf 'FROM {LOCAL}\\nENV PATH=/usr/bin:/bin\\n' | docker build --quiet --tag {broken} -")
    former = site.services["chat"]["image"]
    site.services["chat"]["image"] = broken
    output = " ".join(site.play("--skip-tags", "verify", ok=False)[0].split())
    assert "chat did not start with its new configuration; the one from before runs again. The reason:" in output
    assert "No module named 'vllm'" in output, "the reason is shown"
    assert {name: site.container(name) for name in PORTS} == before, "no container has even restarted"
    assert site.answers("chat")
    site.services["chat"]["image"] = former
    assert site.play("--skip-tags", "verify")[1] == 0


def secrets_of(site: Site) -> dict[str, str]:
    return {"hub token": HUB_TOKEN} | {
        f"key of {name}": site.host.run(f"cat /etc/vllm/{name}/api_key").strip() for name in site.services
    }


def test_nothing_leaks(site: Site) -> None:
    """After full runs with --diff and -v: what others may read, what is kept, and what was shown. A failed upgrade, just before,
    and a benchmark say more than a run that goes well."""
    # What has to be seen, so that a look that sees nothing is none: it stands in for a key in an argument.
    canary = "canary-" + secrets.token_hex(16)
    stand_in = threading.Thread(target=lambda: site.host.run(f": {canary}; sleep 5"))
    stand_in.start()
    bench = ("-e", "bench_preset=quick", "-e", f"bench_output_dir={site.folder / 'bench'}")
    site.play(*bench, playbook="playbooks/bench.yml")
    stand_in.join()
    site.play("-e", f"dify_output={site.folder / 'dify.json'}", playbook="playbooks/dify.yml")
    found = secrets_of(site)
    assert found["key of chat"] == GIVEN_KEY
    assert len(set(found.values())) == len(found) and all(len(value) > 30 for value in found.values())
    commands = {
        "process lists": "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done",
        "journal": "journalctl --no-pager --output=export",
        "units": "systemctl cat 'vllm-*'; systemctl show 'vllm-*'; cat /etc/systemd/system/vllm-*",
        "docker inspect": "docker inspect $(docker ps -aq) $(docker images -q | sort -u)",
        "docker logs": "for c in $(docker ps -aq); do docker logs $c 2>&1; done; docker events --since 2h --until 0s",
    }
    text = {name: site.host.run(command) for name, command in commands.items()}
    assert all(len(said) > 500 for said in text.values()), "a command said nothing"
    text["output"] = (site.folder / "plays.log").read_text()
    text["command lines during the plays"] = "\n".join(["", *site.seen])
    for sign in (
        f"\nsh -c : {canary}",
        "ansible-playbook -i ",
        "docker run --user",
        "-m baremetal_serve",
        "docker exec --interact",
    ):
        assert sign in text["command lines during the plays"], f"{sign} was not seen"
    text["fact cache"] = "".join(path.read_text() for path in (site.folder / "facts").iterdir())
    assert "ansible_distribution" in text["fact cache"] and "gpu" in text["fact cache"]
    text["Dify"] = (site.folder / "dify.json").read_text()
    leaks = [f"{secret} in {where}" for where, said in text.items() for secret, value in found.items() if value in said]
    # Files: the secrets' own, and no others. Image layers hold what the image's maker put in.
    for secret, value in found.items():
        own = {f"/etc/vllm/{secret.split()[-1]}/api_key", f"/etc/vllm/{secret.split()[-1]}/good/api_key"}
        listed = out("docker", "exec", "-i", site.host.name, "sh", "-c",
                     "grep -rlsFf - /etc /opt /root /run /srv/models /tmp /var/lib/vllm /var/log /var/tmp /home /dev/shm || true",
                     stdin=value + "\n").splitlines()  # fmt: skip
        leaks += [f"{secret} in {name}" for name in listed if name not in own]
        here = subprocess.run(
            ["grep", "-rlsF", "--exclude=hosts.json", value, str(site.folder), str(Path.home() / ".ansible")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        leaks += [f"{secret} in {name} of the controller" for name in here.stdout.splitlines()]
    modes = site.host.run("stat -c '%n %a %U' /etc/vllm/*/api_key /etc/vllm/*/env /etc/vllm/*/good/*").splitlines()
    leaks += [row for row in modes if re.search(r"(api_key|env) (?!600)", row)]
    assert leaks == []


def test_an_adapter_and_speculation(site: Site) -> None:
    """Of a real engine: the adapter answers otherwise than its model, whose answers speculation leaves as they were."""
    body = {"prompt": "amber anchor amber anchor amber anchor", "max_tokens": 48, "ignore_eos": True, "temperature": 0}

    def text(model: str) -> str:
        said: str = site.ask("chat", "/v1/completions", {"model": model, **body})["choices"][0]["text"]
        return said

    before, former = text("random-llama"), site.services["chat"]["extra_args"]
    # Its folder is mounted because an argument names it.
    site.services["chat"]["extra_args"] = [
        *former, "--enable-lora", "--max-lora-rank", "8", "--lora-modules", "poet=/srv/weights/adapter",
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}',
    ]  # fmt: skip
    site.play("--skip-tags", "verify")
    assert {row["id"] for row in site.ask("chat", "/v1/models")["data"]} == {"random-llama", "poet"}
    assert text("random-llama") == before != text("poet")
    end = time.monotonic() + 60
    said = re.compile(
        r"SpecDecoding metrics: .*Accepted: [1-9]\d* tokens"
    )  # every ten seconds in which there was something
    while not said.search(site.host.run("docker logs vllm-chat 2>&1")):
        assert time.monotonic() < end, site.host.run("docker logs --tail 40 vllm-chat 2>&1")
        text("random-llama")


def test_what_is_not_listed_any_more_is_removed(site: Site) -> None:
    before = {name: site.container(name) for name in ("chat", "embed")}
    del site.services["rerank"]
    site.play("--skip-tags", "verify")
    assert {name: site.container(name) for name in before} == before
    assert site.container("rerank") == ""
    left = site.host.run(
        "ls -d /etc/vllm/rerank /var/lib/vllm/rerank /etc/systemd/system/vllm-rerank.service", check=False
    )
    assert left == ""


def test_daemon_reload_does_nothing(site: Site) -> None:
    before = {name: site.container(name) for name in site.services}
    site.host.run("systemctl daemon-reload")
    time.sleep(5)
    assert {name: site.container(name) for name in site.services} == before
    assert all(map(site.answers, site.services))


def test_the_oom_killer(site: Site) -> None:
    before = site.container("embed")
    # Nearly what it holds, since no engine sets less; then somebody else in there wants more, and the kernel ends the largest.
    usage, unit = re.match(
        r"([\d.]+)([MG])iB", site.host.run("docker stats --no-stream --format '{{.MemUsage}}' vllm-embed")
    ).groups()
    limit = int(float(usage) * (1024 if unit == "G" else 1)) + 150
    begin = site.host.run("date +%s")
    site.host.run(f"docker update --memory {limit}m --memory-swap {limit}m vllm-embed")
    site.host.run("docker exec vllm-embed python3 -c 'x = bytearray(600 << 20)'", check=False)
    end = time.monotonic() + 120
    while site.container("embed") == before:
        assert time.monotonic() < end, site.host.run("docker stats --no-stream", check=False)
        time.sleep(1)
    print(f"\nback after {site.wait('embed'):.0f} s")
    assert site.container("embed") != before
    assert "container oom" in site.host.run(f"docker events --since {begin} --until $(date +%s) --filter event=oom")


def test_the_docker_daemon_restarts(site: Site) -> None:
    site.host.run("systemctl restart docker")
    print(f"\nback after {site.wait(*site.services):.0f} s")
    assert site.play("--skip-tags", "verify")[1] == 0


def test_the_host_reboots(site: Site) -> None:
    site.host.reboot()
    print(f"\nback after {site.wait(*site.services):.0f} s")
    output, changed = site.play()
    assert changed == 0, output[-4000:]


def test_the_preset_of_the_seeds(site: Site) -> None:
    """50, 100 and 200 requests at once, with short ones: two cores serve them. The second run is compared with the first."""
    small = {"bench_preset": "seeds", "bench_services": ["chat"], "bench_prompts_per_client": 1, "bench_input_len": 32}
    arguments = ("-e", json.dumps({**small, "bench_output_len": 4, "bench_output_dir": str(site.folder / "seeds")}))
    output, _ = site.play(*arguments, playbook="playbooks/bench.yml")
    assert "no earlier run of the same load to compare with" in output
    output, _ = site.play(*arguments, playbook="playbooks/bench.yml")
    assert "compared with 20" in output
    first, second = sorted((site.folder / "seeds/serving-chat").glob("*.json"))
    for path in (first, second):
        levels = json.loads(path.read_text())["levels"]
        assert [row["concurrency"] for row in levels] == [50, 100, 200]
        assert [row["completed"] for row in levels] == [50, 100, 200], "every request was answered"
        print("", *(f"{row['concurrency']}: {row['output_tokens_per_s']:.0f} tokens/s" for row in levels))
    assert (site.folder / "seeds/serving-chat/report.html").read_text().count("<svg") >= 2


def test_teardown(site: Site) -> None:
    site.play(playbook="playbooks/teardown.yml")
    assert site.host.run("docker ps --all --quiet") == ""
    assert site.host.run("ls /etc/systemd/system/vllm-*", check=False) == ""
