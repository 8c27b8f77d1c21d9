# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.certificate_outdated import certificate_outdated


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[..., str]:
    """certificate(names, days, by) -> one that openssl has made, signed by itself or by somebody."""

    def certificate(names: str = "DNS:gpu1.example.org,IP:10.0.0.1,IP:fd00::1", days: int = 3650, by: str = "") -> str:
        target = ["-keyout", f"{tmp_path}/key.pem", "-out", f"{tmp_path}/certificate.pem"]
        if by:
            authority = ["-keyout", f"{tmp_path}/ca.key", "-out", f"{tmp_path}/ca.pem"]
            make(["-x509", "-subj", f"/CN={by}", *authority])
            target += ["-CA", f"{tmp_path}/ca.pem", "-CAkey", f"{tmp_path}/ca.key"]
        alternative = ["-addext", f"subjectAltName={names}"] if names else []
        make(["-x509", "-subj", "/CN=gpu1", "-days", str(days), *alternative, *target])
        return (tmp_path / "certificate.pem").read_text()

    def make(arguments: list[str]) -> None:
        new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        subprocess.run(["openssl", "req", *new, *arguments], check=True, capture_output=True)

    return certificate


def test_one_that_is_right(certificate: Callable[..., str]) -> None:
    pem = certificate()
    assert certificate_outdated(pem, ["gpu1.example.org"]) == ""
    assert certificate_outdated(pem, ["GPU1.example.org", "10.0.0.1", "fd00:0::1"]) == "", "the same in other letters"
    assert certificate_outdated(pem, []) == ""


def test_names_that_clients_use_now(certificate: Callable[..., str]) -> None:
    pem = certificate()
    assert certificate_outdated(pem, ["gpu1.example.org", "gpu2", "10.0.0.2"]) == "is not for gpu2, 10.0.0.2"
    assert certificate_outdated(certificate(names=""), ["gpu1"]) == "is not for gpu1"


def test_one_that_ends_soon(certificate: Callable[..., str]) -> None:
    assert certificate_outdated(certificate(days=29), ["10.0.0.1"]).startswith("ends on 20")
    assert certificate_outdated(certificate(days=32), ["10.0.0.1"]) == ""


def test_one_of_an_authority_is_not_ours(certificate: Callable[..., str]) -> None:
    assert certificate_outdated(certificate(days=1, by="Authority"), ["gpu2"]) == ""


def test_what_is_none() -> None:
    assert certificate_outdated("", ["x"]) == certificate_outdated("-----BEGIN", ["x"]) == "is no certificate"
