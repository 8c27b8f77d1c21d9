# SPDX-License-Identifier: GPL-3.0-or-later
"""Role dify with a real git, Docker Engine and compose, and a stand-in for Dify's repository and images.

The stand-in has Dify's names (docker/.env.example, docker-compose.yaml, its variables and the path that answers), and refuses to
run with the example's key. Its container uses the host's network: containers of containers have no other here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
from host import Host, out, play  # noqa: E402

EXAMPLE = """# A comment
CONSOLE_API_URL=
SECRET_KEY=sk-everybody-knows-it
INIT_PASSWORD=
EXPOSE_NGINX_PORT=80
EXPOSE_NGINX_SSL_PORT=443
EXPOSE_PLUGIN_DEBUGGING_PORT=5003
COMPOSE_PROFILES=postgresql
"""
COMPOSE = """
x-shared-env: &shared
  SECRET_KEY: ${SECRET_KEY:?}
  INIT_PASSWORD: ${INIT_PASSWORD:-}
  RELEASE: "RELEASE_HERE"
services:
  api:
    image: dify-standin:1
    restart: always
    network_mode: host
    environment:
      <<: *shared
      ADDRESS: ${EXPOSE_NGINX_PORT:-80}
      DEBUGGING: ${EXPOSE_PLUGIN_DEBUGGING_PORT:-5003}
    volumes: [./volumes/app/storage:/app/api/storage, ./server.py:/server.py:ro]
    command: [python3, /server.py]
  db_postgres:
    image: dify-standin:1
    profiles: [postgresql]
    network_mode: host
    command: [sleep, infinity]
  db_mysql:
    image: dify-standin:1
    profiles: [mysql]
    command: [sleep, infinity]
"""
SERVER = """
import http.server, json, os
assert not os.environ['SECRET_KEY'].startswith('sk-everybody')
open('/app/api/storage/runs', 'a').write(os.environ['RELEASE'] + chr(10))
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = self.path == '/console/api/setup'
        told = json.dumps(dict(step='not_started', release=os.environ['RELEASE'], debugging=os.environ['DEBUGGING']))
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(told.encode())
http.server.HTTPServer(('127.0.0.1', int(os.environ['ADDRESS'].split(':')[-1])), H).serve_forever()
"""
RECAP = re.compile(r"^dify\s*:.*?changed=(\d+).*?failed=(\d+)", re.M)


class Site:
    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.commits = {release: self.release(release) for release in ("1.0.0", "1.1.0")}

    def release(self, release: str) -> str:
        """A commit of the stand-in's repository on the host."""
        source = self.folder / "source/docker"
        source.mkdir(parents=True, exist_ok=True)
        (source / ".env.example").write_text(EXAMPLE)
        (source / "server.py").write_text(SERVER)
        (source / "docker-compose.yaml").write_text(COMPOSE.replace("RELEASE_HERE", release))
        out("docker", "cp", f"{source.parent}/.", f"{self.host.name}:/srv/dify")
        git = "git -C /srv/dify -c user.name=x -c user.email=x@example.com"
        self.host.run(f"git init -q /srv/dify; {git} add -A; {git} commit -qm {release}; {git} tag {release}")
        return self.host.run(f"{git} rev-parse HEAD")

    def play(self, *arguments: str, version: str = "1.0.0", commit: str | None = None) -> tuple[str, int]:
        variables = {
            "dify_version": version,
            "dify_commit": self.commits.get(version, "") if commit is None else commit,
            "dify_repository": "/srv/dify",
            "dify_http_port": "127.0.0.1:8090",
            "dify_https_port": "127.0.0.1:8453",
            "dify_start_timeout": 60,
        }
        _, text = play(self.folder, [self.host], variables, "playbooks/dify_server.yml", "--diff", *arguments)
        match = RECAP.search(text)
        assert match, text[-4000:]
        return text, int(match[1]) if match[2] == "0" else -1

    def ask(self) -> str:
        code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8090/console/api/setup').read().decode())"
        return self.host.run(f'python3 -c "{code}"', check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("dify")
    base = out(str(ROOT / "molecule/images/build.sh"), "debian13").splitlines()[-1]
    host = Host("dify", folder, base)
    packages = "docker.io docker-cli docker-compose git iptables"
    host.run(
        f"apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends {packages}"
    )
    # No bridge: it would need more rights than a test host has.
    host.run(
        'mkdir -p /etc/docker; echo \'{"bridge": "none", "iptables": false}\' >/etc/docker/daemon.json; systemctl restart docker'
    )
    out("sh", "-c", f"docker save {base} | docker exec -i dify docker load -q")
    host.run(f"docker tag {base} dify-standin:1")
    yield Site(host, folder)
    host.remove()


@pytest.mark.parametrize(
    ("version", "commit", "told"),
    [
        ("", "", "dify_version is empty and dify_commit is empty: give a tag and the 40 digits"),
        ("1.0.0", "1.0.0", "dify_commit is 1.0.0: give a tag and the 40 digits"),
    ],
)
def test_a_release_that_is_not_pinned_is_refused(site: Site, version: str, commit: str, told: str) -> None:
    output, changed = site.play(version=version, commit=commit)
    assert changed == -1 and told in " ".join(output.split())
    assert site.host.run("ls /opt/dify", check=False) == ""


def test_it_comes_up_once(site: Site) -> None:
    assert site.play("--check")[1] >= 0
    output, changed = site.play()
    assert changed > 0, output[-4000:]
    assert '"release": "1.0.0", "debugging": "127.0.0.1:5003"' in site.ask()
    env = site.host.run("cat /opt/dify/docker/.env")
    assert "CONSOLE_API_URL=\n" in env and env.count("SECRET_KEY=") == 1
    assert site.host.run("stat -c %a /opt/dify/docker/.env") == "600"
    key = site.host.run("cat /opt/dify/.baremetal-secret-key")
    assert len(key) == 42 and key not in (site.folder / "plays.log").read_text()
    assert site.host.run("docker ps --format '{{.Names}}' | sort").split() == ["docker-api-1", "docker-db_postgres-1"]
    assert site.host.run("git -C /opt/dify -c safe.directory='*' status --porcelain --untracked-files=no") == ""
    assert site.play("--check")[1] == 0
    output, changed = site.play()
    assert changed == 0, output[-4000:]
    assert site.host.run("wc -l </opt/dify/docker/volumes/app/storage/runs") == "1", "it has not restarted"


def test_check_mode_tells_of_containers_that_do_not_run(site: Site) -> None:
    site.host.run("docker stop -t 1 docker-api-1")
    assert site.play("--check")[1] > 0
    assert site.ask() == "", "check mode has started it"
    assert site.play()[1] > 0
    assert '"release": "1.0.0"' in site.ask()


def test_another_release_upgrades_it(site: Site) -> None:
    runs = site.host.run("cat /opt/dify/docker/volumes/app/storage/runs")
    assert site.play("--check", version="1.1.0")[1] > 0
    assert '"release": "1.0.0"' in site.ask(), "check mode has upgraded it"
    key = site.host.run("cat /opt/dify/.baremetal-secret-key")
    output, changed = site.play(version="1.1.0")
    assert changed > 0, output[-4000:]
    assert '"release": "1.1.0"' in site.ask()
    assert site.host.run("cat /opt/dify/.baremetal-secret-key") == key
    assert site.host.run("cat /opt/dify/docker/volumes/app/storage/runs") == f"{runs}\n1.1.0"
    assert site.play(version="1.1.0")[1] == 0


def test_it_is_stopped_and_its_data_stay(site: Site) -> None:
    assert site.play("--check", "-e", "dify_state=absent", version="1.1.0")[1] > 0
    assert '"release": "1.1.0"' in site.ask(), "check mode has stopped it"
    assert site.play("-e", "dify_state=absent", version="1.1.0")[1] > 0
    assert site.host.run("docker ps -q") == "" and site.ask() == ""
    assert site.host.run("ls /opt/dify/docker/volumes/app/storage") == "runs"
    assert site.play("-e", "dify_state=absent", version="1.1.0")[1] == 0


def test_an_engine_without_compose_is_refused(site: Site) -> None:
    site.host.run("apt-get remove -qy docker-compose")
    output, changed = site.play(version="1.1.0")
    assert changed == -1 and "docker compose is missing, and 2.17 is needed" in " ".join(output.split())
