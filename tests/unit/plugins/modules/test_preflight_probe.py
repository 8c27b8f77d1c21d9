# SPDX-License-Identifier: GPL-3.0-or-later
"""preflight_probe against servers on this machine, and against stand-ins for apt and dnf that take its calls and no others."""

from __future__ import annotations

import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

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
    assert sorted(urls) == ["http://a.invalid/", "http://b.invalid/", "https://mirrors.rockylinux.org/"]
    assert proxies["http"] == "http://proxy.invalid:3128"


def test_servers_that_a_plugin_of_dnf_completes(tmp_path: Path) -> None:
    """As in the sources of RHEL at AWS. Capitals elsewhere are only capitals."""
    (tmp_path / "rhui.repo").write_text(
        "[rhui]\nmirrorlist=https://rhui.REGION.aws.ce.redhat.com/pulp/mirror/$releasever\n[epel]\n"
        "baseurl=https://rhui3.REGION.aws.ce.redhat.com/x\n  https://Mirror.invalid/EPEL/X86.64/\n"
    )
    assert list(preflight_probe.dnf_sources(str(tmp_path), "")[0]) == ["https://Mirror.invalid/"]


class TlsServer(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None:
        pass


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TlsServer]:
    """Its certificate is its own authority, and lacks what only a strict look asks for: Python's own since 3.13, here with all."""
    for name in ("right", "other"):
        made = ["-keyout", f"{tmp_path}/{name}.key", "-out", f"{tmp_path}/{name}.pem"]
        (tmp_path / "openssl.cnf").write_text(
            "[req]\ndistinguished_name=dn\nx509_extensions=own\n[dn]\n[own]\nbasicConstraints=CA:TRUE\n"
        )
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-config",
                f"{tmp_path}/openssl.cnf",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                f"/CN={name}",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                *made,
            ],
            check=True,
            capture_output=True,
        )
    real = ssl.create_default_context

    def strict(**arguments: Any) -> ssl.SSLContext:
        context = real(**arguments)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", strict)
    with TlsServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []  # type: ignore[attr-defined]
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # type: ignore[attr-defined]
        server.context.load_cert_chain(tmp_path / "right.pem", tmp_path / "right.key")  # type: ignore[attr-defined]
        server.context.load_verify_locations(tmp_path / "right.pem")  # type: ignore[attr-defined]
        # By 1.3 it says only after the handshake that it wants a certificate, and a reset may overtake that here.
        server.context.maximum_version = ssl.TLSVersion.TLSv1_2  # type: ignore[attr-defined]
        server.socket = server.context.wrap_socket(  # type: ignore[attr-defined]
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("source", "main", "asks_for_one", "reason"),
    [
        ("", "", False, "TLS: self"),
        ("sslcacert={}/right.pem", "", False, ""),
        ("", "sslcacert = {}/right.pem", False, ""),
        ("sslcacert={}/other.pem", "sslcacert={}/right.pem", False, "TLS: "),
        ("sslcacert={}/none.pem", "", False, "its sslcacert {}/none.pem cannot be used: No such file"),
        ("sslverify=0", "", False, ""),
        ("sslverify=1", "sslverify=False", False, "TLS: self"),
        # The host's own certificate is dnf's to show: that it is asked for says that the server was reached.
        ("sslcacert={}/right.pem\nsslclientcert=/x.pem", "", True, ""),
        ("sslcacert={}/right.pem", "", True, "TLS: "),
        # What dnf does not trust either.
        ("sslcacert={}/other.pem\nsslclientcert=/x.pem", "", True, "TLS: "),
    ],
)
def test_sources_with_certificates_of_their_own(
    run_module: Callable[..., Any],
    tls: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    main: str,
    asks_for_one: bool,
    reason: str,
) -> None:
    """As redhat.repo of a subscribed RHEL has them."""
    if asks_for_one:
        tls.context.verify_mode = ssl.CERT_REQUIRED
    section = f"[a]\nbaseurl=https://127.0.0.1:{tls.server_port}/dist/$basearch\n{source}\n"
    (tmp_path / "redhat.repo").write_text(section.replace("{}", str(tmp_path)))
    (tmp_path / "dnf.conf").write_text(f"[main]\n{main}\n".replace("{}", str(tmp_path)))
    real = preflight_probe.dnf_sources
    monkeypatch.setattr(preflight_probe, "dnf_sources", lambda: real(str(tmp_path), str(tmp_path / "dnf.conf")))
    standin_programs(tmp_path, monkeypatch, dnf="exit 1")
    (row,) = run_module(preflight_probe)["addresses"]
    assert (row["url"], row["of"]) == (f"https://127.0.0.1:{tls.server_port}/", "dnf")
    reason = reason.replace("{}", str(tmp_path))
    assert row["reason"].startswith(reason) if reason else row["reason"] == "", row


def test_headers_that_are_there(run_module: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_probe.os.path, "exists", lambda path: path == "/lib/modules/7/build/Makefile")
    row = run_module(preflight_probe, kernels=["7"], sources=False)["headers"]["7"]
    assert row["state"] == "present"


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", True),
        ("WRONG_VERSION_NUMBER", False),
        ("CERTIFICATE_VERIFY_FAILED", False),
    ],
)
def test_a_server_that_wants_a_certificate(said: str, wanted: bool, wrapped: bool) -> None:
    """By TLS 1.3 such an error is not urllib's but comes by itself."""
    error = ssl.SSLError(1, f"[SSL: {said}] {said.lower().replace('_', ' ')} (_ssl.c:2580)")
    error.reason = said
    told = URLError(error) if wrapped else error
    assert preflight_probe.wants_certificate(told, {"sslclientcert": "/x.pem"}) == wanted
    assert not preflight_probe.wants_certificate(told, {"sslclientcert": ""})
    assert preflight_probe.why_not(told) == f"TLS: {said}"
