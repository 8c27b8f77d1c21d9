# SPDX-License-Identifier: GPL-3.0-or-later
"""vllm_venv with the uv that the role vllm installs, on wheels made here, and with a stand-in where uv must fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.modules import vllm_venv

ROOT = Path(__file__).parents[4]
STAMP = ".baremetal-complete.json"


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    info = f"{name}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "2.0"):
        make_wheel(folder, "tinyvllm", version, "tinytorch>=1")
    make_wheel(folder, "tinytorch", "1.5")
    make_wheel(folder, "wantsmore", "1.0", "tinytorch>=1", "nobodyhasthis>=3")
    return folder


@pytest.fixture
def venv(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """venv(uv, *packages, check=False, **params) -> the module's result, on a host whose pip knows the wheels alone."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\n[install]\nfind-links = {wheels}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))

    def venv(uv: str, *packages: str, check: bool = False, **params: Any) -> dict[str, Any]:
        given = {"path": str(tmp_path / "venv"), "python": sys.executable, "uv": uv}
        told = f"global.no-index='true'\ninstall.find-links='{wheels}'"  # as pip would tell, in a second
        given |= {"pip": ["sh", "-c", 'echo "$0"', told], "packages": list(packages)}
        return run_module(vllm_venv, check, **{**given, **params})

    return venv


@pytest.fixture(scope="session")
def uv(tool_environment: Callable[..., Path]) -> str:
    requirement = yaml.safe_load((ROOT / "roles/vllm/vars/main.yml").read_text())["__vllm_uv"]
    return str(tool_environment(requirement) / "uv")


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[[str], str]:
    """stand_in(body) -> a program in uv's place: writes down how it is called, makes the folder, and runs the body."""

    def make(body: str) -> str:
        path = tmp_path / "uv"
        path.write_text(
            f"""#!{sys.executable}
import json, os, sys, time
with open({str(tmp_path / "calls")!r}, "a") as calls:
    kept = {{name: value for name, value in os.environ.items() if name.startswith(("UV_", "SSL_"))}}
    overrides = open(sys.argv[sys.argv.index("--override") + 1]).read() if "--override" in sys.argv else ""
    print(json.dumps([sys.argv[1:], kept, overrides]), file=calls)
if sys.argv[1] == "venv":
    os.makedirs(os.path.join(sys.argv[-1], "bin"))
    sys.exit(0)
{body}
"""
        )
        path.chmod(0o755)
        return str(path)

    return make


def calls(tmp_path: Path) -> list[tuple[list[str], dict[str, str], str]]:
    return [tuple(json.loads(line)) for line in (tmp_path / "calls").read_text().splitlines()]


def installed(tmp_path: Path) -> str:
    code = "import tinyvllm; print(tinyvllm.VERSION)"
    return subprocess.check_output([tmp_path / "venv/bin/python", "-c", code], text=True).strip()


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("venv"))


@pytest.mark.client
def test_made_once_and_anew_for_another_version(uv: str, venv: Callable[..., Any], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    first = venv(uv, "tinyvllm==1.0", pip=pip)
    assert (first["changed"], first["python"]) == (True, f"{tmp_path}/venv/bin/python")
    assert installed(tmp_path) == "1.0"
    (tmp_path / "venv/mine").touch()
    second = venv(uv, "tinyvllm==1.0")
    assert (second["changed"], second["python"]) == (False, first["python"])
    assert (tmp_path / "venv/mine").exists()
    assert venv(uv, "tinyvllm==2.0", check=True)["changed"] is True
    assert installed(tmp_path) == "1.0"
    assert venv(uv, "tinyvllm==2.0")["changed"] is True
    assert installed(tmp_path) == "2.0"
    assert not (tmp_path / "venv/mine").exists()
    assert left_over(tmp_path) == ["venv"]  # the cache has gone


@pytest.mark.client
def test_python_files_are_compiled(uv: str, venv: Callable[..., Any], tmp_path: Path) -> None:
    """The servers' user may not write there, so that nothing else would ever do it."""
    venv(uv, "tinyvllm==1.0")
    packages = next((tmp_path / "venv/lib").glob("python*")) / "site-packages"
    assert sorted(path.name.partition(".")[0] for path in packages.glob("__pycache__/tiny*.pyc")) == [
        "tinytorch",
        "tinyvllm",
    ]


@pytest.mark.client
def test_another_name_of_the_same_python_changes_nothing(
    stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path
) -> None:
    uv = stand_in("")
    other = tmp_path / "python3"
    other.symlink_to(sys.executable)
    assert venv(uv, "tinyvllm==1.0")["changed"]
    assert not venv(uv, "tinyvllm==1.0", python=str(other))["changed"]
    # host_readiness looks for the name that the host's probe gives it.
    assert json.loads((tmp_path / "venv" / STAMP).read_text())["python"][0] == sys.executable


def test_what_cannot_be_installed_leaves_nothing(uv: str, venv: Callable[..., Any], tmp_path: Path) -> None:
    result = venv(uv, "tinyvllm==9.0")
    assert result["msg"].startswith("cannot install tinyvllm==9.0 (nothing is left of it): error: No solution found")
    assert result["msg"].endswith("Check the network, or name a package mirror in pip's configuration on this host")
    assert "\n" not in result["msg"]
    assert left_over(tmp_path) == []


def test_the_former_one_comes_back_where_its_successor_cannot_be_installed(
    uv: str, venv: Callable[..., Any], tmp_path: Path
) -> None:
    assert venv(uv, "tinyvllm==1.0")["changed"] is True
    # Also where a run was killed while it made the successor.
    (tmp_path / "venv").rename(tmp_path / "venv.former")
    (tmp_path / "venv/bin").mkdir(parents=True)
    for _ in range(2):
        assert venv(uv, "tinyvllm==9.0")["msg"].endswith("The environment from before is back")
        assert installed(tmp_path) == "1.0" and left_over(tmp_path) == ["venv"]
        assert venv(uv, "tinyvllm==1.0")["changed"] is False
    assert venv(uv, "tinyvllm==2.0")["changed"] is True
    assert installed(tmp_path) == "2.0" and left_over(tmp_path) == ["venv"]


@pytest.mark.client
def test_a_dependency_that_is_not_wanted(uv: str, venv: Callable[..., Any], tmp_path: Path) -> None:
    assert "nobodyhasthis" in venv(uv, "wantsmore==1.0")["msg"]
    assert venv(uv, "wantsmore==1.0", without=["nobodyhasthis"])["changed"] is True
    assert venv(uv, "wantsmore==1.0", without=["nobodyhasthis"])["changed"] is False
    assert venv(uv, "wantsmore==1.0", without=["nobodyhasthis", "other"], check=True)["changed"] is True


@pytest.mark.client
def test_a_killed_run_is_repaired(
    uv: str, venv: Callable[..., Any], stand_in: Callable[..., str], tmp_path: Path
) -> None:
    slow = stand_in("open(os.environ['UV_CACHE_DIR'] + '.half', 'w'); time.sleep(60)")
    params = {"path": str(tmp_path / "venv"), "python": sys.executable, "uv": slow, "packages": ["tinyvllm==1.0"]}
    params["pip"] = [sys.executable, "-m", "pip"]
    process = subprocess.Popen(
        [sys.executable, "-m", vllm_venv.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
        start_new_session=True,
    )
    assert process.stdin
    process.stdin.write(json.dumps({"ANSIBLE_MODULE_ARGS": params}).encode())
    process.stdin.close()
    deadline = time.monotonic() + 30
    while not (tmp_path / "venv.cache.half").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / "venv/bin").is_dir(), "it was in the middle of its work"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "venv" / STAMP).exists()
    (tmp_path / "venv.cache.half").unlink()
    assert venv(uv, "tinyvllm==1.0")["changed"] is True
    assert installed(tmp_path) == "1.0"
    assert left_over(tmp_path) == ["venv"]


@pytest.mark.parametrize("stamp", ["", "{", "null", '{"packages": []}', b"\xff"])
def test_a_stamp_that_is_none(
    stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path, stamp: str | bytes
) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / STAMP).write_bytes(stamp if isinstance(stamp, bytes) else stamp.encode())
    assert venv(stand_in(""), "x")["changed"] is True
    assert venv(stand_in(""), "x")["changed"] is False


def test_the_stamp_is_written_last(stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "venv"
    assert venv(stand_in(f"sys.exit(os.path.exists({str(path / STAMP)!r}))"), "x")["changed"] is True
    assert json.loads((path / STAMP).read_text())["packages"] == ["x"]


def test_where_pip_looks_uv_looks(
    stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are what pip 23 prints; it lists general sources first."""
    (tmp_path / "there").mkdir()
    pip = tmp_path / "pip"
    pip.write_text(
        f"""#!/bin/sh
[ "$*" = "config list" ] || exit 2
cat <<'END'
global.cert='/etc/ssl/ours.pem'
global.extra-index-url='https://a.example/simple file://{tmp_path}/there file://{tmp_path}/gone'
global.find-links='\\n{tmp_path}/there\\n{tmp_path}/gone\\nhttps://w.example/whl'
global.index-url='https://general.example/simple'
global.no-index='0'
global.timeout='60'
:env:.index-url='https://me:secret@exact.example/simple?a=b'
END
"""
    )
    pip.chmod(0o755)
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/mine.pem")
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/ours")
    assert venv(stand_in(""), "x", pip=[str(pip)])["changed"] is True
    arguments, environment, _ = calls(tmp_path)[-1]
    assert environment == {
        "SSL_CERT_DIR": "/etc/ssl/ours",
        "SSL_CERT_FILE": "/etc/ssl/mine.pem",  # what is set for uv itself wins
        "UV_CACHE_DIR": f"{tmp_path}/venv.cache",
        "UV_DEFAULT_INDEX": "https://me:secret@exact.example/simple?a=b",
        "UV_FIND_LINKS": f"{tmp_path}/there,https://w.example/whl",
        "UV_INDEX": f"https://a.example/simple file://{tmp_path}/there",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_NO_PROGRESS": "1",
        "UV_PYTHON_DOWNLOADS": "never",
    }
    assert "--no-index" not in arguments


def test_a_host_that_uses_no_index(stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path) -> None:
    venv(stand_in(""), "x")
    assert calls(tmp_path)[-1][0][-2:] == ["--no-index", "x"]


def test_without_a_configuration(stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path) -> None:
    venv(stand_in(""), "b", "a", without=["torchvision", "triton"], pip=["true"])
    (made, _, _), (arguments, environment, overrides) = calls(tmp_path)
    assert made == ["venv", "--python", sys.executable, f"{tmp_path}/venv"]
    assert [name for name in environment if "INDEX" in name or "LINKS" in name] == ["UV_INDEX_STRATEGY"]
    assert arguments[:4] == ["pip", "install", "--python", f"{tmp_path}/venv/bin/python"]
    assert arguments[-2:] == ["b", "a"]
    assert overrides == "torchvision; sys_platform == 'never'\ntriton; sys_platform == 'never'\n"


TORCH_NEEDS_ITS_INDEX = """
if os.environ.get("UV_TORCH_BACKEND") != "cpu":
    print("error: No solution found when resolving dependencies", file=sys.stderr)
    sys.exit("  cause: Because torch==2.9+cpu was not found")
"""


def test_pytorch_from_its_own_index_only_when_needed(
    stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path
) -> None:
    uv = stand_in(TORCH_NEEDS_ITS_INDEX)
    assert "cause: Because torch==2.9+cpu was not found. Check" in venv(uv, "x")["msg"]
    assert venv(uv, "x", torch_backend="cpu")["changed"] is True
    assert [environment.get("UV_TORCH_BACKEND") for _, environment, _ in calls(tmp_path)] == [None] * 4 + ["cpu"]
    (tmp_path / "calls").unlink()
    assert "another" in venv(stand_in("sys.exit('error: another reason')"), "x", torch_backend="cu130")["msg"]
    assert len(calls(tmp_path)) == 2


@pytest.mark.parametrize("python", ["/nowhere/python", ""])
def test_without_an_interpreter_nothing_is_removed(
    uv: str, venv: Callable[..., Any], tmp_path: Path, python: str
) -> None:
    """Servers may run from the environment that is there."""
    assert venv(uv, "tinyvllm==1.0")["changed"]
    before = sorted(tmp_path.rglob("*"))
    for check in (True, False):
        result = venv(uv, "tinyvllm==1.0", python=python, _ansible_check_mode=check)
        assert result["msg"].startswith(f"python {python!r} does not run ("), result
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", ["uv", "pip"])
def test_no_tools(stand_in: Callable[..., str], venv: Callable[..., Any], tmp_path: Path, missing: str) -> None:
    params = {"pip": ["/nowhere/pip"]} if missing == "pip" else {}
    result = venv("/nowhere/uv" if missing == "uv" else stand_in(""), "x", **params)
    assert result["msg"].startswith(f"cannot run /nowhere/{missing}: No such file or directory")
    assert left_over(tmp_path) == []
