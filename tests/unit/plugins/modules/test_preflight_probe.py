# SPDX-License-Identifier: GPL-3.0-or-later
"""preflight_probe against servers on this machine, and against stand-ins for apt and dnf that take its calls and no others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import preflight_probe

STATUS = {"/there.deb": 200, "/dir/": 403, "/gone.deb": 404, "/broken": 503, "/login": 407}


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        if self.path == "/slow":
            time.sleep(3)
        path = self.path if self.path.startswith("/") else "/" + self.path.split("/", 3)[3]  # asked as a proxy
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.send_response(STATUS.get(path, 200))
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def url(server: Any) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/there.deb", ""),
        ("/dir/", ""),
        ("/gone.deb", ""),
        ("/broken", "the server fails with HTTP 503"),
        ("/login", "login"),
    ],
)
def test_any_answer_but_a_failure_counts(run_module: Callable[..., Any], url: str, path: str, reason: str) -> None:
    (row,) = run_module(preflight_probe, sources=False, urls=[url + path])["addresses"]
    assert reason in row["reason"] if reason else row["reason"] == ""


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://no-such-host.invalid/", "its name cannot be resolved"),
        ("http://127.0.0.1:9/", "Connection refused"),
        ("not-an-address", "unknown url type"),
    ],
)
def test_what_does_not_answer_is_told(run_module: Callable[..., Any], address: str, reason: str) -> None:
    (row,) = run_module(preflight_probe, sources=False, urls=[address])["addresses"]
    assert reason in row["reason"]


def test_a_slow_server_is_not_waited_for(run_module: Callable[..., Any], url: str) -> None:
    (row,) = run_module(preflight_probe, sources=False, urls=[f"{url}/slow"], timeout=1)["addresses"]
    assert row["reason"] in ("no answer", "timed out")


def test_tls_that_is_none(run_module: Callable[..., Any], url: str) -> None:
    (row,) = run_module(preflight_probe, sources=False, urls=[url.replace("http", "https")])["addresses"]
    assert row["reason"].startswith("TLS: ")


def test_proxies(run_module: Callable[..., Any], server: Any, url: str) -> None:
    """Through one, the name need not be known here; no_proxy goes by it."""
    asked = ["http://mirror.invalid/there.deb", "http://deb.inside.invalid/x"]
    proxies = {"http": url, "no_proxy": "localhost, .inside.invalid"}
    through, past = run_module(preflight_probe, sources=False, urls=asked, proxies=proxies)["addresses"]
    assert (through["reason"], past["reason"]) == ("", "its name cannot be resolved")
    assert server.asked == asked[:1]


@pytest.mark.parametrize("offset", [0, 3600, -3600])
def test_the_clock(run_module: Callable[..., Any], offset: int) -> None:
    result = run_module(preflight_probe, sources=False, reference_time=time.time() - offset)
    assert abs(result["clock_offset_s"] - offset) < 5
    assert run_module(preflight_probe, sources=False)["clock_offset_s"] is None


def test_disks(run_module: Callable[..., Any], tmp_path: Path) -> None:
    result = run_module(preflight_probe, sources=False, paths=[str(tmp_path / "not/yet/there"), "/proc"])
    assert result["free_mib"][str(tmp_path / "not/yet/there")] > 0
    assert result["free_mib"]["/proc"] == 0
    assert not (tmp_path / "not").exists()


APT = """
case "$*" in
  "indextargets --format "*"Created-By: Packages") printf '%s\\n' {url}/dir/ {url}/dir/ cdrom:[Debian]/ file:/srv/x;;
  "-qq download --print-uris linux-headers-1-there") echo "'{url}/there.deb' linux-headers-1-there.deb 5 SHA256:0";;
  "-qq download --print-uris linux-headers-2-gone") echo "'{url}/gone.deb' linux-headers-2-gone.deb 5 SHA256:0";;
  "-qq download --print-uris linux-headers-3-none") echo "E: Unable to locate package linux-headers-3-none" >&2; exit 100;;
  *) echo "E: Command line option is not understood" >&2; exit 100;;
esac
"""


def standin_programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    found = {name.replace("_", "-"): str(folder / name) for name in scripts}
    monkeypatch.setattr(preflight_probe.AnsibleModule, "get_bin_path", lambda _self, name: found.get(name))


def test_apt_standin(run_module: Callable[..., Any], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin_programs(tmp_path, monkeypatch, apt_get=APT.replace("{url}", url), apt_config="exit 0")
    real = preflight_probe.glob.glob
    monkeypatch.setattr(preflight_probe.glob, "glob", lambda path: ["x"] if "apt/lists" in path else real(path))
    result = run_module(preflight_probe, kernels=["1-there", "2-gone", "3-none"])
    assert result["addresses"] == [{"url": f"{url}/dir/", "of": "apt", "reason": ""}]
    states = {kernel: row["state"] for kernel, row in result["headers"].items()}
    assert states == {"1-there": "available", "2-gone": "gone", "3-none": "missing"}
    assert result["headers"]["2-gone"]["detail"] == f"{url}/gone.deb"


def test_apt_standin_without_lists(
    run_module: Callable[..., Any], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin_programs(tmp_path, monkeypatch, apt_get=APT.replace("{url}", url), apt_config="exit 0")
    monkeypatch.setattr(preflight_probe.glob, "glob", lambda path: [])
    row = run_module(preflight_probe, kernels=["3-none"], sources=False)["headers"]["3-none"]
    assert (row["state"], row["detail"]) == ("unknown", "the host has no package lists yet")


@pytest.mark.parametrize(
    ("own", "asked"),
    [
        ("", True),
        ('Acquire::http::Proxy "http://127.0.0.1:9";', False),
        ('Acquire::https::Proxy "http://127.0.0.1:9";', True),
    ],
)
def test_sources_through_the_proxy_that_packages_are_installed_with(
    run_module: Callable[..., Any],
    server: Any,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str,
    asked: bool,
) -> None:
    """What apt has in its settings goes before it. Headers are looked for the same way."""
    mirror = "http://mirror.invalid"
    standin_programs(tmp_path, monkeypatch, apt_get=APT.replace("{url}", mirror), apt_config=f"echo '{own}'")
    monkeypatch.setattr(preflight_probe.glob, "glob", lambda path: ["x"])
    result = run_module(preflight_probe, kernels=["1-there"], proxies={"http": url, "no_proxy": "inside.invalid"})
    (row,) = result["addresses"]
    assert (row["reason"] == "") == asked, row
    assert (result["headers"]["1-there"]["state"] == "available") == asked
    assert server.asked == ([f"{mirror}/dir/", f"{mirror}/there.deb"] if asked else [])


def test_dnf_standin(run_module: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = '"-q -C repoquery kernel-devel-1") echo kernel-devel-0:1.x86_64;; "-q -C repoquery "*) ;;'
    script = f'case "$*" in {known} *) exit 1;; esac'
    standin_programs(tmp_path, monkeypatch, dnf=script)
    monkeypatch.setattr(preflight_probe, "DNF_LISTS", (f"{tmp_path}/repomd.xml",))
    row = run_module(preflight_probe, kernels=["1"], sources=False)["headers"]["1"]
    assert (row["state"], row["detail"]) == ("unknown", "the host has no package lists yet")
    (tmp_path / "repomd.xml").touch()
    result = run_module(preflight_probe, kernels=["1", "2"], sources=False)
    assert {kernel: row["state"] for kernel, row in result["headers"].items()} == {"1": "available", "2": "missing"}


def test_repositories_of_dnf(tmp_path: Path) -> None:
    (tmp_path / "a.repo").write_text(
        "[base]\nmirrorlist=https://mirrors.rockylinux.org/mirrorlist?arch=$basearch\n"
        "[off]\nenabled=0\nbaseurl=http://off.invalid/\n[local]\nbaseurl=file:///srv/x\n"
        "[two]\nenabled=1\nbaseurl=http://a.invalid/$releasever/\n  http://b.invalid/os\n"
    )
    (tmp_path / "broken.repo").write_text("no section\n")
    (tmp_path / "dnf.conf").write_text("[main]\nproxy=http://proxy.invalid:3128\n")
    urls, proxies = preflight_probe.dnf_sources(str(tmp_path), str(tmp_path / "dnf.conf"))
    assert urls == ["http://a.invalid/", "http://b.invalid/", "https://mirrors.rockylinux.org/"]
    assert proxies["http"] == "http://proxy.invalid:3128"


def test_headers_that_are_there(run_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_probe.os.path, "exists", lambda path: path == "/lib/modules/7/build/Makefile")
    row = run_module(preflight_probe, kernels=["7"], sources=False)["headers"]["7"]
    assert row["state"] == "present"
