# SPDX-License-Identifier: GPL-3.0-or-later
"""What the roles cuda_toolkit and nvidia_container_toolkit make of a host: their expressions, with a look at a host that is written here.
The same on test hosts: molecule/cuda_toolkit_standin and nvidia_container_toolkit_standin."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
FACTS = {
    "Debian": {"distribution": "Debian", "distribution_version": "12.11", "distribution_major_version": "12", "os_family": "Debian"},
    "Ubuntu": {"distribution": "Ubuntu", "distribution_version": "22.04", "distribution_major_version": "22", "os_family": "Debian"},
    "Rocky": {"distribution": "Rocky", "distribution_version": "9.6", "distribution_major_version": "9", "os_family": "RedHat"},
}  # fmt: skip
DRIVER = "580.159.04"


@pytest.fixture
def ask(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """ask(role, expression, distribution, what the look finds, what the user says) -> its value"""

    def ask(role: str, name: str, distribution: str, found: dict[str, Any], **said: Any) -> Any:
        facts = {**FACTS[distribution], "architecture": "x86_64"}
        variables = role_vars(role, "main", facts["os_family"], facts["distribution"])
        return render(
            f"{{{{ __{role}_{name} }}}}",
            **variables | {"ansible_facts": facts, f"__{role}_probe": found, "ansible_check_mode": False} | said,
        )

    return ask


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


# ---- cuda_toolkit ----


@pytest.fixture
def cuda(ask: Callable[..., Any]) -> Callable[..., Any]:
    """cuda(expression, compiler now, compiler of the proof that is noted) of a host that has what is asked for"""

    def cuda(
        name: str,
        compiler: str = "12.2.0",
        noted: str = "",
        distribution: str = "Debian",
        blocked: bool = False,
        **said: Any,
    ) -> Any:
        said = {"cuda_toolkit_versions": ["12.9"], "cuda_toolkit_method": "runfile", **said}
        found = {
            "toolkits": {"12.9": "12.9.1"},
            "link": "/usr/local/cuda-12.9",
            "link_blocked": blocked,
            "compiler": compiler,
        }
        written = dict.fromkeys(("profile_file", "note", "source_file", "preferences"), "")
        paths = {key: ask("cuda_toolkit", key, distribution, {}, **said).strip() for key in written}
        written["profile_file"] = digest(ask("cuda_toolkit", "profile_content", distribution, {}, **said))
        written["note"] = digest(f"CUDA 12.9.1 compile with g++ {noted}\n") if noted else ""
        found["files"] = {paths[key]: text for key, text in written.items()}
        return ask("cuda_toolkit", name, distribution, found, **said)

    return cuda


@pytest.mark.parametrize(
    ("compiler", "noted", "settled"), [("12.2.0", "", False), ("12.2.0", "12.2.0", True), ("15.1.0", "12.2.0", False)]
)
def test_what_was_not_seen_to_compile_is_not_settled(
    cuda: Callable[..., Any], compiler: str, noted: str, settled: bool
) -> None:
    assert cuda("settled", compiler, noted) is settled


@pytest.mark.parametrize("distribution", FACTS)
def test_a_network_repository_that_is_not_as_asked_is_not_settled(cuda: Callable[..., Any], distribution: str) -> None:
    assert cuda("settled", noted="12.2.0", distribution=distribution, cuda_toolkit_method="network") is False
    assert cuda("source_stale", noted="12.2.0", distribution=distribution, cuda_toolkit_method="local") is False


@pytest.mark.parametrize(
    ("distribution", "folder"), [("Debian", "debian12"), ("Ubuntu", "ubuntu2204"), ("Rocky", "rhel9")]
)
def test_the_network_repository_of_each_distribution(cuda: Callable[..., Any], distribution: str, folder: str) -> None:
    text = cuda("source", distribution=distribution)
    assert f"/compute/cuda/repos/{folder}/x86_64" in text
    assert ("excludepkgs = nvidia-driver*" in text) is (distribution == "Rocky")
    assert "Package: nvidia-driver* " in cuda("preferences_content", distribution=distribution)
    open_to_drivers = cuda("source", distribution=distribution, cuda_toolkit_block_drivers=False)
    assert "excludepkgs" not in open_to_drivers


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cuda_toolkit_versions": ["newest"]}, "cuda_toolkit_versions holds newest. Allowed: versions such as 12.9"),
        ({"cuda_toolkit_versions": ["11.0.1"]}, "of 11.0.1 this collection has no address and checksum"),
        ({"cuda_toolkit_versions": ["13.0.2"], "cuda_toolkit_default": "12.9"}, "cuda_toolkit_default is 12.9"),
        ({"cuda_toolkit_files": {"12.9": {"url": "file:///x", "checksum": "md5:1"}}}, "without a usable checksum"),
        ({"blocked": True}, "/usr/local/cuda is a folder or a file"),
    ],
)
def test_what_cannot_work_is_said(cuda: Callable[..., Any], said: dict[str, Any], message: str) -> None:
    said = {"cuda_toolkit_versions": ["13.0.2"], **said}
    assert [text for text in cuda("problems", **said) if message in " ".join(text.split())]


def test_what_can_work_is_not_refused(cuda: Callable[..., Any]) -> None:
    assert cuda("problems", cuda_toolkit_versions=["13.0.2", "13.2.1"]) == []
    assert cuda("problems", cuda_toolkit_method="network", cuda_toolkit_versions=["12.9"]) == []
    files = {12.9: {"url": "file:///x", "checksum": "none"}}  # what YAML makes of 12.9 without quotes
    assert cuda("problems", cuda_toolkit_method="local", cuda_toolkit_versions=[12.9], cuda_toolkit_files=files) == []


def test_a_profile_script_that_is_not_wanted_goes(cuda: Callable[..., Any]) -> None:
    """What the look finds is the script of a host that wants it."""
    assert cuda("settled", noted="12.2.0") is True
    assert cuda("settled", noted="12.2.0", cuda_toolkit_profile=False) is False


# ---- nvidia_container_toolkit ----

PACKAGES = (
    "nvidia-container-toolkit",
    "nvidia-container-toolkit-base",
    "libnvidia-container-tools",
    "libnvidia-container1",
)


def look(**other: Any) -> dict[str, Any]:
    """A host where all is well, with what is said otherwise."""
    spec = "/var/run/cdi/nvidia.yaml"
    return {
        "gpus": 2, "driver": DRIVER, "specs": {spec: {"driver": DRIVER, "slices": True}}, "refresh": True,
        "packages": dict.fromkeys(PACKAGES, "1.20.0-1"),
        "held": list(PACKAGES), "foreign_sources": [], "docker": "26.1.5", "accepted": "", "files": {},
        "daemon_json": {"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}, "features": {"cdi": True}}, **other,
    }  # fmt: skip


@pytest.fixture
def toolkit(ask: Callable[..., Any]) -> Callable[..., Any]:
    def toolkit(name: str, distribution: str = "Debian", said: dict[str, Any] | None = None, **other: Any) -> Any:
        path = ask("nvidia_container_toolkit", "source_file", distribution, look()).strip()
        found = look(**other)
        found["files"] = {path: digest(ask("nvidia_container_toolkit", "source", distribution, found))}
        return ask("nvidia_container_toolkit", name, distribution, found, **said or {})

    return toolkit


@pytest.mark.parametrize("distribution", FACTS)
def test_a_host_that_is_well_is_left_alone(toolkit: Callable[..., Any], distribution: str) -> None:
    for name in ("install_needed", "cdi_problems", "problems"):
        assert toolkit(name, distribution) == []
    assert toolkit("engine_needed", distribution) is False


@pytest.mark.parametrize(
    ("docker", "feature", "option"),
    [
        ("20.10.24", False, "--runtime=nvidia"),
        ("26.1.5", True, "--device=nvidia.com/gpu=all"),
        ("29.2.0", False, "--device=nvidia.com/gpu=all"),
    ],
)
def test_each_engine_gives_gpus_by_its_own_way(
    toolkit: Callable[..., Any], docker: str, feature: bool, option: str
) -> None:
    assert ("features" in toolkit("daemon_options", docker=docker)) is feature
    assert option in toolkit("run_options", docker=docker)


def test_check_mode_before_there_is_an_engine(toolkit: Callable[..., Any]) -> None:
    assert "there is no Docker Engine" in toolkit("problems", docker="")[0]
    assert toolkit("problems", docker="", said={"nvidia_container_toolkit_engine": "none"}) == []
    for said in ({"ansible_check_mode": True}, {"preflight_collects": True}):
        assert toolkit("problems", docker="", said=said) == []
        assert toolkit("engine_needed", docker="", daemon_json={}, said=said) is True


def test_packages_are_let_go_where_they_are_not_to_be_held(toolkit: Callable[..., Any]) -> None:
    said = {"nvidia_container_toolkit_hold": False}
    assert sorted(toolkit("to_release", said=said)) == sorted(PACKAGES)
    assert toolkit("to_hold", said=said) == [] and toolkit("install_needed", said=said)
    assert toolkit("install_needed", said=said, held=[]) == []
    assert sorted(toolkit("to_hold", held=[])) == sorted(PACKAGES)


def test_four_packages_move_together(toolkit: Callable[..., Any]) -> None:
    said = {"nvidia_container_toolkit_version": "1.19.1-1"}
    assert sorted(toolkit("to_release", said=said)) == sorted(PACKAGES)
    assert toolkit("specs", "Rocky", said=said)[0] == "nvidia-container-toolkit-1.19.1-1"
    assert toolkit("specs", said=said)[0] == "nvidia-container-toolkit=1.19.1-1"


@pytest.mark.parametrize(
    ("specs", "problem"),
    [
        ({}, "there is no /var/run/cdi/nvidia.yaml"),
        ({"/var/run/cdi/nvidia.yaml": ("550.144.03", True)}, f"/var/run/cdi/nvidia.yaml is not of driver {DRIVER}"),
        (
            {"/var/run/cdi/nvidia.yaml": (DRIVER, False)},
            "/var/run/cdi/nvidia.yaml is not of the MIG slices that there are now",
        ),
        (
            {"/var/run/cdi/nvidia.yaml": (DRIVER, True), "/etc/cdi/nvidia.yaml": (DRIVER, True)},
            "/etc/cdi/nvidia.yaml names the same",
        ),
    ],
)
def test_a_specification_that_is_not_the_drivers(
    toolkit: Callable[..., Any], specs: dict[str, tuple[str, bool]], problem: str
) -> None:
    found = {path: {"driver": driver, "slices": slices} for path, (driver, slices) in specs.items()}
    assert [text for text in toolkit("cdi_problems", specs=found) if text.startswith(problem)]


def test_containers_see_the_gpus_that_the_user_lives_with(toolkit: Callable[..., Any]) -> None:
    assert toolkit("expected") == "2"
    assert toolkit("expected", said={"preflight_accept": "gpu, clock"}) == "listed"


@pytest.mark.parametrize(
    ("wanted", "host", "container", "good"),
    [("2", 2, 2, True), ("2", 1, 1, False), ("listed", 1, 1, True), ("listed", 2, 1, False), ("listed", 0, 0, False)],
)
def test_the_acceptance_counts_what_a_container_sees(
    tmp_path: Path, wanted: str, host: int, container: int, good: bool
) -> None:
    def lines(count: int) -> str:
        return "\n".join(f"echo 'GPU {n}: NVIDIA H200 (UUID: GPU-{n})'" for n in range(count)) or ":"

    programs = {"nvidia-smi": lines(host), "systemctl": ":"}
    programs["docker"] = f"case $1 in import) cat > /dev/null ;; exec) {lines(container)} ;; esac"
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = ROOT / "roles/nvidia_container_toolkit/files/acceptance.sh"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", script, wanted, "--device=x"], env={**os.environ, **path}, capture_output=True, text=True
    )
    assert (done.returncode == 0) is good, done.stderr
