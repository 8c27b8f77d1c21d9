# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from ansible_collections.baremetal.vllm.plugins.filter.host_readiness import host_readiness

LIBRARIES = {"libnuma.so.1": {"Debian": "libnuma1", "RedHat": "numactl-libs"}}
PROGRAMS = {"gcc": {"Debian": "gcc", "RedHat": "gcc"}}
HEADERS = {"Debian": "python{version}-dev", "RedHat": "python{version}-devel"}
BUILDS = {
    "cpu": {"python": ["3.11", "3.14"], "disk_mib": 10000, "libraries": LIBRARIES, "programs": {}, "headers": {}},
    "cuda": {"python": ["3.10", "3.13"], "disk_mib": 20000, "libraries": {}, "programs": PROGRAMS, "headers": HEADERS},
}
SETTINGS = {
    "root": "/opt/vllm",
    "builds": BUILDS,
    "tools": ["uv==1.0", "supervisor==2.0"],
    "tools_dir": "/opt/vllm/tools",
    "manager": "systemd",
    "supervisor_dir": "/opt/vllm/supervisor",
    "supervisor_pid": "/opt/vllm/supervisor/supervisord.pid",
    "other_units": [],
    "may_install": True,
    "os_family": "Debian",
    "venv_package": {"Debian": "python{version}-venv"},
    "image_disk_mib": {"cpu": 8000, "cuda": 40000},
    "gone": [],
}
MADE_WITH = ["/usr/bin/python3", "3.11"]
TOOLS = {
    "/opt/vllm/tools/.baremetal-complete.json": json.dumps(
        {"packages": ["supervisor==2.0", "uv==1.0"], "python": MADE_WITH}
    )
}
PYTHON = {"path": "/usr/bin/python3", "version": "3.11.2", "venv": True, "headers": True}


def service(
    name: str = "chat", device: str = "cpu", port: int = 8000, venv: bool = True, version: str = "0.32.0"
) -> dict[str, Any]:
    path = f"/opt/vllm/venvs/{device}-{version}"
    return {
        "name": name,
        "device": device,
        "port": port,
        "state_dir": f"/var/lib/vllm/{name}",
        "config_dir": f"/etc/vllm/{name}",
        "endpoint_files": [f"/etc/vllm/{name}/endpoint.json"],
        "model_path": f"/srv/models/{name}",
        "python": f"{path}/bin/python",
        "runtime": "venv" if venv else "container",
        "venv": {"path": path, "device": device, "version": version} if venv else None,
    }


def probe(**seen: Any) -> dict[str, Any]:
    told = {
        "pythons": [PYTHON],
        "free_mib": {"/opt/vllm": 99999},
        "files": {},
        "listeners": {},
        "fingerprints": {},
        "pids": {},
        "writable": [],
    }
    return {**told, "libraries": ["libnuma.so.1"], "programs": ["gcc"], **seen}


def stamp(device: str = "cpu") -> dict[str, str]:
    return {
        f"/opt/vllm/venvs/{device}-0.32.0/.baremetal-complete.json": json.dumps(
            {"packages": ["x"], "python": MADE_WITH}
        )
    }


def judge(services: list[dict[str, Any]], seen: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return host_readiness(services, seen, {**SETTINGS, **settings})


def test_the_other_manager_keeps_servers_here() -> None:
    pid = {SETTINGS["supervisor_pid"]: 77}
    (problem,) = judge([service()], probe(pids=pid))["problems"]
    assert problem == (
        "a supervisor keeps servers here (pid 77, /opt/vllm/supervisor) and vllm_service_manager is systemd: run playbooks/teardown.yml "
        "with vllm_service_manager=supervisor first (models, settings and keys stay)"
    )
    unit = "/etc/systemd/system/vllm-chat.service"
    settings = {"manager": "supervisor", "other_units": [unit]}
    assert judge([service()], probe(pids=pid, fingerprints={unit: ""}), **settings)["problems"] == []
    (problem,) = judge([service()], probe(fingerprints={unit: "sum 0644 root"}), **settings)["problems"]
    assert problem.startswith(f"systemd has {unit} and vllm_service_manager is supervisor: run playbooks/teardown.yml")


@pytest.mark.parametrize("place", ["/tmp/models/chat", "/var/tmp/chat", "/tmpfs/chat"])
def test_folders_that_a_unit_does_not_see(place: str) -> None:
    problems = judge([{**service(), "model_path": place}], probe())["problems"]
    seen = place.startswith("/tmpfs")
    assert [problem.split(" is ")[0] for problem in problems] == ([] if seen else [f"{place} of service chat"])
    for other in ({"runtime": "container"}, {}):
        settings = {} if other else {"manager": "supervisor"}
        assert judge([{**service(), "model_path": place, **other}], probe(), **settings)["problems"] == []


def test_a_bare_host() -> None:
    assert judge([service()], probe()) == {
        "problems": [],
        "prepared": False,
        "tools": True,
        "python": "/usr/bin/python3",
        "packages": [],
        "missing": ["/opt/vllm/venvs/cpu-0.32.0"],
    }


def test_a_host_that_has_everything_needs_no_more() -> None:
    seen = probe(files={**TOOLS, **stamp()}, free_mib={"/opt/vllm": 0})
    expected = {"problems": [], "prepared": True, "tools": False, "python": "", "packages": [], "missing": []}
    assert judge([service()], seen) == expected


@pytest.mark.parametrize(
    "python",
    [{**PYTHON, "version": "3.12.1"}, {**PYTHON, "path": "/opt/python/bin/python3"}],
    ids=["upgraded", "other"],
)
def test_an_environment_whose_python_has_gone_is_made_anew(python: dict[str, Any]) -> None:
    result = judge([service()], probe(pythons=[python], files={**TOOLS, **stamp()}))
    assert (result["missing"], result["prepared"]) == (["/opt/vllm/venvs/cpu-0.32.0"], False)
    assert result["python"] == python["path"]


def test_what_triton_compiles_with() -> None:
    seen = probe(pythons=[{**PYTHON, "headers": False}], programs=[])
    assert sorted(judge([service(device="cuda")], seen)["packages"]) == ["gcc", "python3.11-dev"]
    assert sorted(judge([service(device="cuda")], seen, os_family="RedHat")["packages"]) == ["gcc", "python3.11-devel"]
    assert judge([service()], seen)["packages"] == []
    (problem,) = judge([service(device="cuda")], seen, may_install=False)["problems"]
    assert "gcc is missing" in problem and "apt-get or dnf install" in problem


def test_packages_that_went_away_cost_no_tools() -> None:
    seen = probe(programs=[], files={**TOOLS, **stamp("cuda")})
    result = judge([service(device="cuda")], seen)
    assert (result["packages"], result["prepared"], result["tools"]) == (["gcc"], False, False)


class TestContainers:
    IMAGE: ClassVar[dict[str, str]] = {"reference": "vllm/vllm-openai:v1", "archive": "", "checksum": ""}

    def judge(self, **settings: Any) -> list[str]:
        docker = {"version": "29.0", "cdi": False, "images": {}, "free_mib": 99999, **settings.pop("docker", {})}
        services = [
            {**service(name, "cuda", port, venv=False), "image": self.IMAGE} for name, port in (("a", 1), ("b", 2))
        ]
        problems: list[str] = judge(services, probe(docker=docker), **settings)["problems"]
        return problems

    def test_room_for_each_image_once(self) -> None:
        assert self.judge(docker={"free_mib": 40000}) == []
        (problem,) = self.judge(docker={"free_mib": 39999})
        assert problem.startswith("Docker's folder has 39999 MiB free and vllm/vllm-openai:v1 needs 40000: make room")
        there = {"images": {"vllm/vllm-openai:v1": "sha256:1"}, "free_mib": 0}
        assert self.judge(docker=there) == []

    def test_docker_is_installed_by_root(self) -> None:
        assert self.judge(docker={"version": ""}) == []
        (problem,) = self.judge(docker={"version": ""}, may_install=False)
        assert "set vllm_runtime: venv" in problem
        assert self.judge(may_install=False) == []


@pytest.mark.parametrize("tools", ["", "{", "[]", "null", '{"packages": ["uv==0.9", "supervisor==2.0"]}'])
def test_other_tools_are_made_anew(tools: str) -> None:
    seen = probe(files={**stamp(), "/opt/vllm/tools/.baremetal-complete.json": tools})
    result = judge([service()], seen)
    assert (result["prepared"], result["python"], result["problems"]) == (False, "/usr/bin/python3", [])


def test_a_host_without_services_needs_nothing() -> None:
    result = judge([], probe(pythons=[], free_mib={"/opt/vllm": 0}))
    assert (result["problems"], result["prepared"]) == ([], True)


@pytest.mark.parametrize(("manager", "prepared"), [("systemd", True), ("supervisor", False)])
def test_a_given_environment_needs_tools_only_for_supervisor(manager: str, prepared: bool) -> None:
    assert judge([service(venv=False)], probe(), manager=manager)["prepared"] is prepared


@pytest.mark.parametrize(
    ("devices", "versions", "taken"),
    [
        (["cpu"], ["3.10.1", "3.15.0", "3.12.3", "3.11.2"], "3.12.3"),  # the first that will do
        (["cuda"], ["3.9.2", "3.10.12"], "3.10.12"),
        (["cuda"], ["3.14.0", "3.13.1"], "3.13.1"),
        (["cpu", "cuda"], ["3.10.1", "3.14.0", "3.11.0"], "3.11.0"),
    ],
)
def test_the_python_that_every_build_takes(devices: list[str], versions: list[str], taken: str) -> None:
    pythons = [{"path": f"/p/{version}", "version": version, "venv": True, "headers": True} for version in versions]
    services = [service(device, device, port) for port, device in enumerate(devices, 8000)]
    assert judge(services, probe(pythons=pythons))["python"] == f"/p/{taken}"


@pytest.mark.parametrize(
    ("version", "taken"), [("0.8.5.post1", "/p/3.12.3"), ("0.3.0", "/p/3.12.3"), ("0.10.2", "/p/3.13.5")]
)
def test_the_python_that_an_older_release_takes(version: str, taken: str) -> None:
    """V100 get 0.8.5.post1, whose wheels refuse the Python of Debian 13."""
    pythons = [{**PYTHON, "path": f"/p/{number}", "version": number} for number in ("3.13.5", "3.12.3")]
    services = [service(device="cuda", version=version)]
    assert judge(services, probe(pythons=pythons))["python"] == taken
    if taken == "/p/3.12.3":
        (problem,) = judge(services, probe(pythons=pythons[:1]))["problems"]
        assert problem.startswith("vLLM needs Python 3.10 to 3.12 and the host has /p/3.13.5 3.13.5: install one")


def test_no_python_that_will_do() -> None:
    pythons = [{"path": "/usr/bin/python3", "version": "3.9.2", "venv": True}]
    assert judge([service()], probe(pythons=pythons))["problems"] == [
        "vLLM needs Python 3.11 to 3.14 and the host has /usr/bin/python3 3.9.2: install one and give its path as vllm_python"
    ]
    assert "and the host has no Python: install one" in judge([service()], probe(pythons=[]))["problems"][0]


def test_packages_are_installed_where_that_is_allowed() -> None:
    seen = probe(pythons=[{**PYTHON, "venv": False}], libraries=[])
    result = judge([service()], seen)
    assert (result["problems"], sorted(result["packages"]), result["prepared"]) == (
        [],
        ["libnuma1", "python3.11-venv"],
        False,
    )
    result = judge([service()], seen, os_family="RedHat")
    assert sorted(result["packages"]) == ["numactl-libs", "python3"]


def test_packages_are_asked_for_where_it_is_not() -> None:
    (problem,) = judge([service()], probe(pythons=[{**PYTHON, "venv": False}], libraries=[]), may_install=False)[
        "problems"
    ]
    assert "/usr/bin/python3 cannot make virtual environments" in problem
    assert "libnuma.so.1 is missing" in problem
    assert "apt-get or dnf install python3.11-venv libnuma1" in problem


def test_a_library_is_missing_though_all_else_is_there() -> None:
    result = judge([service()], probe(files={**TOOLS, **stamp()}, libraries=[]))
    assert (result["packages"], result["prepared"], result["python"]) == (["libnuma1"], False, "")


def test_a_gpu_host_does_not_need_the_libraries_of_the_cpu() -> None:
    assert judge([service(device="cuda")], probe(libraries=[]))["packages"] == []


@pytest.mark.parametrize(
    ("services", "files", "need"),
    [
        ([service()], {}, 10000),
        ([service(), service("b", port=8001)], {}, 10000),  # they share an environment
        ([service(), service("b", "cuda", 8001)], {}, 30000),
        ([service(), service("b", "cuda", 8001)], stamp("cuda"), 10000),
    ],
)
def test_room(services: list[dict[str, Any]], files: dict[str, str], need: int) -> None:
    assert judge(services, probe(free_mib={"/opt/vllm": need}, files=files))["problems"] == []
    assert judge(services, probe(free_mib={"/opt/vllm": need - 1}, files=files))["problems"] == [
        f"/opt/vllm has {need - 1} MiB free and vLLM needs {need}: make room or set vllm_root to a larger disk"
    ]


@pytest.mark.parametrize(
    ("listener", "who"),
    [
        ({"pid": 12, "command": "nginx: master", "cwd": "/"}, "nginx: master (pid 12)"),
        ({"pid": 12, "command": "VLLM::APIServer", "cwd": "/var/lib/vllm/other"}, "VLLM::APIServer (pid 12)"),
        ({"pid": None, "command": "", "cwd": ""}, "another user's process"),
        ({"pid": 12, "command": "VLLM::APIServer", "cwd": "/var/lib/vllm/chat"}, None),
        (
            {"pid": 12, "command": "VLLM::APIServer", "cwd": "/var/lib/vllm/chat/standby"},
            None,
        ),  # left by a run that ended
    ],
)
def test_a_port_that_is_taken(listener: dict[str, Any], who: str | None) -> None:
    problems = judge([service(), service("free", port=8001)], probe(listeners={"8000": listener}))["problems"]
    message = f"port 8000 of service chat is taken by {who}: stop it, or give the service another port"
    assert problems == ([message] if who else [])


def listens(name: str) -> dict[str, Any]:
    return {"pid": 12, "command": "VLLM::APIServer", "cwd": f"/var/lib/vllm/{name}"}


def test_a_port_of_a_service_that_is_removed_first() -> None:
    seen = probe(listeners={"8000": listens("former")})
    assert judge([service()], seen, gone=["/var/lib/vllm/former"])["problems"] == []
    assert len(judge([service()], seen)["problems"]) == 1


@pytest.mark.parametrize(
    ("ports", "told"),
    [
        (
            {"a": (8000, 8001), "b": (8001, 8002)},
            ["port 8001 of service a is still that of service b, RUN with b at its new port and a as it was, then"],
        ),
        (
            {"a": (8000, 8001), "b": (8001, 8000)},
            [
                "port 8001 of service a is still that of service b, RUN with b at a port that nobody has and a as it was, then "
                "with a at 8001 and b as then, then"
            ],
        ),
        ({"a": (8000, 8000), "b": (8001, 8002)}, []),
    ],
    ids=["handed on", "exchanged", "free"],
)
def test_a_port_of_another_service_that_stays(ports: dict[str, tuple[int, int]], told: list[str]) -> None:
    run = "and passes on run by run, so that what does not start can go back: run site.yml"
    seen = probe(listeners={str(before): listens(name) for name, (before, _) in ports.items()})
    problems = judge([service(name, port=after) for name, (_, after) in ports.items()], seen)["problems"]
    assert problems == [f"{line.replace('RUN', run)} with all as they are to be" for line in told]


@pytest.mark.parametrize(
    ("manager", "length", "refused"), [("supervisor", 79, False), ("supervisor", 80, True), ("systemd", 200, False)]
)
def test_the_address_of_a_socket(manager: str, length: int, refused: bool) -> None:
    folder = "/" + "x" * (length - 1)
    problems = judge([service()], probe(), manager=manager, supervisor_dir=folder)["problems"]
    assert problems == (
        [f"{folder} is too long for the address of a socket: set a shorter vllm_root"] if refused else []
    )


def test_all_problems_are_told_together() -> None:
    seen = probe(pythons=[], free_mib={"/opt/vllm": 1}, listeners={"8000": {"pid": 1, "command": "x", "cwd": "/"}})
    assert len(judge([service()], seen)["problems"]) == 3


def test_in_a_template(render: Callable[..., Any]) -> None:
    template = "{{ services | baremetal.vllm.host_readiness(probe, settings) }}"
    shown = render(template, services=[service()], probe=probe(), settings=SETTINGS)
    assert (shown["problems"], shown["python"]) == ([], "/usr/bin/python3")


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("/home/me/endpoint.json", ""),
        ("/opt/vllm/endpoint.json", ""),
        (
            "/home/you/endpoint.json",
            "needs a folder /home/you that is there and can be written to: make it, or name another place",
        ),
        ("endpoint.json", "is no absolute path: give one"),
    ],
)
def test_a_second_place_for_the_address(path: str, wrong: str) -> None:
    told = {**service(), "endpoint_files": ["/etc/vllm/chat/endpoint.json", path]}
    problems = judge([told], probe(writable=["/home/me"]))["problems"]
    assert problems == ([f"endpoint_file {path} of service chat {wrong}"] if wrong else [])
