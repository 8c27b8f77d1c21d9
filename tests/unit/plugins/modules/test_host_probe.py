# SPDX-License-Identifier: GPL-3.0-or-later
"""host_probe on this machine: real sockets, files, file systems and interpreters."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import host_probe


@pytest.fixture
def probe(run_module: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    def probe(**params: Any) -> dict[str, Any]:
        result = run_module(host_probe, **params)
        assert result["changed"] is False, result
        return result

    return probe


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_nothing_asked(probe: Callable[..., Any]) -> None:
    result = probe()
    assert result["init"] == Path("/proc/1/comm").read_text().strip()
    for name in ("free_mib", "files", "fingerprints", "listeners", "pids"):
        assert result[name] == {}
    assert result["pythons"] == result["libraries"] == []


def test_free_space_where_a_folder_would_be_made(probe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    paths = [str(tmp_path), f"{tmp_path}/not/there/yet", f"{tmp_path}/file/x", "/proc"]
    free = probe(paths=paths)["free_mib"]
    here = shutil.disk_usage(tmp_path).free // 2**20
    assert free["/proc"] == 0
    assert all(abs(free[path] - here) < 1024 for path in paths[:3])


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_who_listens(probe: Callable[..., Any], family: int, address: str) -> None:
    try:
        taken = socket.create_server((address, 0), family=family)
    except OSError as error:
        pytest.skip(f"no {address} on this machine: {error}")
    with taken, socket.create_server(("127.0.0.1", 0)) as other:
        port, free = taken.getsockname()[1], other.getsockname()[1]
        other.close()
        listeners = probe(ports=[port, free])["listeners"]
    assert list(listeners) == [str(port)]
    assert listeners[str(port)]["pid"] == os.getpid()
    assert listeners[str(port)]["cwd"] == str(Path.cwd())
    assert "python" in listeners[str(port)]["command"]


def test_a_listener_behind_a_link_has_the_name_that_was_asked(probe: Callable[..., Any], tmp_path: Path) -> None:
    """The controller compares the names, and cannot resolve links of the host."""
    (tmp_path / "disk/chat").mkdir(parents=True)
    (tmp_path / "state").symlink_to("disk")
    code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path / "state/chat", stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout
        port = server.stdout.readline().strip()
        asked = [f"{tmp_path}/state/other", f"{tmp_path}/state/chat"]
        told = [probe(ports=[int(port)], folders=folders)["listeners"][port]["cwd"] for folders in (asked, asked[:1])]
        server.kill()
    assert told == [f"{tmp_path}/state/chat", f"{tmp_path}/disk/chat"]


def test_a_connection_is_no_listener(probe: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        port = client.getsockname()[1]
        with client, server.accept()[0]:
            assert probe(ports=[port])["listeners"] == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_listener_of_another_user() -> None:
    """Its port is known to be taken; whose it is, is not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            server.close()  # the child's copy
            os.setuid(65534)
            inodes = host_probe.listening_inodes({port})
            os.write(writer, f"{len(inodes)} {len(host_probe.owners(inodes[port]))}".encode())
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with os.fdopen(reader) as answer:
            assert answer.read() == "1 0"


def test_of_servers_that_share_a_port_the_one_asked_for(probe: Callable[..., Any], tmp_path: Path) -> None:
    listen = (
        "import socket, sys, time; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); "
        "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(600)"
    )
    folders, processes, port = [tmp_path / "chat", tmp_path / "chat/standby"], [], "0"
    try:
        for folder in folders:
            folder.mkdir()
            process = subprocess.Popen(
                [sys.executable, "-c", listen, port], cwd=folder, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
            assert process.stdout
            port = process.stdout.readline().strip()
        for folder in folders:
            assert probe(ports=[port], folders=[str(folder)])["listeners"][port]["cwd"] == str(folder)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_files(probe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("gr\u00fc\u00df")
    (tmp_path / "bytes").write_bytes(b"\xff\n")
    paths = [f"{tmp_path}/{name}" for name in ("text", "bytes", "missing", "")]
    files = probe(files=paths)["files"]
    assert files == {f"{tmp_path}/text": "gr\u00fc\u00df", f"{tmp_path}/bytes": "\ufffd\n"}


def test_fingerprints(probe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "env").write_text("A=1\n")
    (tmp_path / "env").chmod(0o640)
    paths = [f"{tmp_path}/env", f"{tmp_path}/missing", str(tmp_path)]
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert probe(fingerprints=paths)["fingerprints"] == {
        f"{tmp_path}/env": f"{hashlib.sha256(b'A=1' + bytes([10])).hexdigest()} 0640 {owner}",
        f"{tmp_path}/missing": "",
        str(tmp_path): "",
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_owner_of_a_file_may_have_no_name(probe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "env").touch()
    os.chown(tmp_path / "env", 54321, -1)
    assert probe(fingerprints=[f"{tmp_path}/env"])["fingerprints"][f"{tmp_path}/env"].endswith(" 54321")


def test_libraries(probe: Callable[..., Any]) -> None:
    assert probe(libraries=["libc.so.6", "libnobodyhasthis.so.1"])["libraries"] == ["libc.so.6"]


def test_pids(probe: Callable[..., Any], tmp_path: Path) -> None:
    contents = {
        "pytest.pid": f"{os.getpid()}\n",
        "supervisord.pid": f"{os.getpid()}\n",  # another process has its number since a boot
        "dead": "999999999",
        "odd": "x",
        "empty": "",
        "none": "0",
        "negative": "-1",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    pids = probe(pid_files=[f"{tmp_path}/{name}" for name in [*contents, "missing"]])["pids"]
    assert {path.rsplit("/", 1)[1]: pid for path, pid in pids.items() if pid} == {"pytest.pid": os.getpid()}
    assert len(pids) == 8


def test_pids_of_another_namespace(probe: Callable[..., Any], tmp_path: Path) -> None:
    """As the keeper of ranks writes them: in a container, process 1 is another one than the host's."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    script = "import os, sys; print(os.getpid(), os.stat('/proc/self/ns/pid').st_ino, flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [*unshare, sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    written = process.stdout.readline().decode()
    if not written:
        pytest.skip("this machine makes no PID namespaces for this user")
    here, child = Path("/proc/self/ns/pid").stat().st_ino, Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (tmp_path / "there").write_text(written)
    (tmp_path / "own").write_text(f"{os.getpid()} {here}")
    (tmp_path / "mixed").write_text(f"{os.getpid()} {written.split()[1]}")
    files = {name: f"{tmp_path}/{name}" for name in ("there", "own", "mixed")}
    pids = probe(pid_files=list(files.values()))["pids"]
    assert written.startswith("1 ")
    assert [pids[files[name]] for name in files] == [int(child.read_text()), os.getpid(), 0]
    process.communicate()
    assert probe(pid_files=[files["there"]])["pids"] == {files["there"]: 0}


def test_pythons_that_run(probe: Callable[..., Any], tmp_path: Path) -> None:
    candidates = [
        executable(tmp_path / "shim", "#!/bin/sh\necho 'python3.9: command not found' >&2\nexit 127\n"),
        executable(tmp_path / "liar", "#!/bin/sh\necho 3.12\n"),
        executable(tmp_path / "not-elf", "rubbish"),
        f"{tmp_path}/missing",
        sys.executable,
        executable(tmp_path / "again", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),  # the same, by another name
    ]
    version = ".".join(map(str, sys.version_info[:3]))
    (found,) = probe(pythons=candidates)["pythons"]
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    assert found == {"path": sys.executable, "version": version, "venv": True, "headers": headers}


def test_a_python_that_cannot_make_environments(probe: Callable[..., Any], tmp_path: Path) -> None:
    """Debian splits ensurepip off."""
    (tmp_path / "hide").mkdir()
    hook = (
        "import importlib.util as util; real = util.find_spec;"
        "util.find_spec = lambda name, *more: None if name == 'ensurepip' else real(name, *more)"
    )
    (tmp_path / "hide/sitecustomize.py").write_text(hook)
    python = executable(tmp_path / "python", f'#!/bin/sh\nPYTHONPATH={tmp_path}/hide exec {sys.executable} "$@"\n')
    assert [found["venv"] for found in probe(pythons=[python])["pythons"]] == [False]


@pytest.mark.parametrize(
    ("dirs", "runtimes", "cdi", "runtime"),
    [
        (["{specs}"], {"runc": {}, "nvidia": {}}, True, True),
        (None, {"runc": {}, "nvidia": {}}, False, True),  # Docker 20.10, whatever specifications there are
        (["{specs}/none"], {"runc": {}}, False, False),
    ],
)
def test_how_docker_gives_gpus_standin(
    probe: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dirs: list[str] | None,
    runtimes: dict[str, Any],
    cdi: bool,
    runtime: bool,
) -> None:
    specs = tmp_path / "cdi"
    specs.mkdir()
    (specs / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    info = {
        "ServerVersion": "28.0.1",
        "CDISpecDirs": dirs and [folder.format(specs=specs) for folder in dirs],
        "Runtimes": runtimes,
    }
    (tmp_path / "info.json").write_text(json.dumps(info))
    executable(tmp_path / "docker", f'#!/bin/sh\n[ "$1" = info ] || exit 1\ncat {tmp_path}/info.json\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = probe(images=["vllm/vllm-openai:v0.25.1"])["docker"]
    assert (said["cdi"], said["nvidia_runtime"], said["images"]) == (cdi, runtime, {})


@pytest.mark.parametrize(("params", "name"), [({"ports": ["x"]}, "ports"), ({"paths": {"a": 1}}, "paths")])
def test_bad_parameters(run_module: Callable[..., Any], params: dict[str, Any], name: str) -> None:
    result = run_module(host_probe, **params)
    assert result["failed"] is True
    assert name in result["msg"]


def test_users(probe: Callable[..., Any]) -> None:
    assert probe(users=["root", "nobody-has-this-name"])["users"] == ["root"]


def test_folders_that_can_be_written_to(probe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked = [str(tmp_path), str(tmp_path / "file"), str(tmp_path / "none")]
    assert probe(writable=asked)["writable"] == asked[:1]
