# SPDX-License-Identifier: GPL-3.0-or-later
"""What a service over several hosts runs on each of them, by real plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from support import SERVICE_SETTINGS
from test_host_services import HOSTS, service

from ansible_collections.baremetal.vllm.plugins.filter.host_services import host_services
from ansible_collections.baremetal.vllm.plugins.filter.interconnect import interconnect
from ansible_collections.baremetal.vllm.plugins.filter.plan_running import plan_running
from ansible_collections.baremetal.vllm.plugins.filter.vllm_plan import vllm_plan
from ansible_collections.baremetal.vllm.plugins.plugin_utils.multi_host import kept_home, ray_image, ray_ports, spans
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.hardware import hosts_from_text

ROLE = Path(__file__).parents[4] / "roles" / "vllm"
PLACES = {
    "one": {"address": "10.0.0.1", "interface": "eth1"},
    "two": {"address": "10.0.0.2", "interface": "ens3"},
}
NETWORK = {"chat": {"hosts": PLACES, "problems": []}}
CPU_SERVICE = service(hosts=["one", "two"], tensor_parallel_size=2)


def on(host: str, asked: dict[str, Any], hosts: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    names = settings.pop("order", [one["name"] for one in hosts])
    plan = vllm_plan([asked], hosts)
    assert plan["fits"], plan["problems"]
    (found,) = host_services(
        plan,
        host,
        [asked],
        {**SERVICE_SETTINGS, "hosts": names, "network": NETWORK, "ray_version": "2.60.0", **settings},
    )
    return found


def after(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def gpu_hosts(number: int = 2, gpus: str = "2x V100-PCIE-16GB no-p2p") -> list[dict[str, Any]]:
    names = ["one", "two", "three"]
    return [{**host, "name": names[n]} for n, host in enumerate(hosts_from_text(f"{number}x({gpus})"))]


def test_mp_runs_vllm_on_every_host_behind_a_keeper() -> None:
    head, rank = (on(host, CPU_SERVICE, HOSTS) for host in ("one", "two"))
    assert (head["headless"], rank["headless"]) == (False, True)
    for number, svc in enumerate((head, rank)):
        command = svc["command"]
        keeper, server = command[: command.index("--")], command[command.index("--") + 1 :]
        assert keeper[1] == "/opt/vllm/lib/baremetal_ranks.py"
        assert [keeper[place + 1] for place, word in enumerate(keeper) if word == "--peer"] == [
            "one=10.0.0.1",
            "two=10.0.0.2",
        ]
        assert after(keeper, "--rank") == after(server, "--node-rank") == str(number)
        assert after(keeper, "--token-file") == "/etc/vllm/chat/cluster_token"
        assert server[1:4] == ["/opt/vllm/lib/baremetal_vllm_main.py", "serve", "/srv/models/random-llama"]
        assert after(server, "--nnodes") == after(server, "--tensor-parallel-size") == "2"
        assert (after(server, "--master-addr"), after(server, "--master-port")) == ("10.0.0.1", "29601")
        assert ("--headless" in server) == ("--middleware" not in server) == bool(number)
    assert head["pid_command"] == ["cat", "/var/lib/vllm/chat/engine.pid"]


def test_each_host_has_its_own_address_and_interface() -> None:
    for host, place in PLACES.items():
        env = on(host, CPU_SERVICE, HOSTS)["env"]
        assert env["VLLM_HOST_IP"] == place["address"]
        assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == place["interface"]


def test_an_interface_is_looked_for_by_its_address_at_each_start() -> None:
    """A boot may name it anew. What the user set is left as it is."""
    place = PLACES["two"]
    for asked, there in ((CPU_SERVICE, HOSTS), (RAY_SERVICE, gpu_hosts(3))):
        svc = on("two", asked, there)
        words = [svc["python"], "/opt/vllm/lib/baremetal_interface.py", place["address"], place["interface"]]
        assert svc["span"]["found_at_start"] == {"GLOO_SOCKET_IFNAME": words, "NCCL_SOCKET_IFNAME": words}
    svc = on("two", {**CPU_SERVICE, "env": {"NCCL_SOCKET_IFNAME": "ib0"}}, HOSTS)
    assert list(svc["span"]["found_at_start"]) == ["GLOO_SOCKET_IFNAME"]


def test_ranks_follow_the_inventory() -> None:
    head = on("two", CPU_SERVICE, HOSTS, order=["two", "one"])
    assert not head["headless"]
    assert after(head["command"], "--master-addr") == "10.0.0.2"


def test_before_the_network_is_known_names_stand_for_addresses() -> None:
    assert "one=one" in on("one", CPU_SERVICE, HOSTS, network={})["command"]


def test_services_on_one_host_are_as_before() -> None:
    svc = on("one", service(hosts=["one"]), HOSTS)
    assert svc["span"] is None
    assert "baremetal_ranks.py" not in " ".join(svc["command"])


RAY_SERVICE = {
    "name": "chat", "model": "Qwen/Qwen2.5-14B", "served_model_name": "qwen", "runtime": "venv",
    "hosts": ["one", "two", "three"], "tensor_parallel_size": 2, "pipeline_parallel_size": 3, "executor": "ray",
    "max_model_len": 8192, "env": {"MY_ACCESS_KEY": "x", "OMP_NUM_THREADS": "4"},
}  # fmt: skip


def ray_service(host: str) -> dict[str, Any]:
    network = {"chat": {"hosts": {**PLACES, "three": {"address": "10.0.0.3", "interface": "eth1"}}, "problems": []}}
    return on(host, RAY_SERVICE, gpu_hosts(3), network=network)


def test_ray_runs_vllm_on_the_first_host_behind_a_gate() -> None:
    head = ray_service("one")
    gate = head["command"][: head["command"].index("--")]
    assert gate[1] == "/opt/vllm/lib/baremetal_ray_gate.py"
    assert [word for word in gate if "=" in word] == ["one=10.0.0.1=2", "two=10.0.0.2=2", "three=10.0.0.3=2"]
    assert after(head["command"], "--distributed-executor-backend") == "ray"
    assert head["env"]["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert head["span"]["ranks_a_host"] == 2
    assert head["span"]["gpus"] == {name: [0, 1] for name in ("one", "two", "three")}
    assert all(ray_service(host)["headless"] for host in ("two", "three"))


def test_ray_gets_an_environment_of_its_own() -> None:
    head = ray_service("one")
    assert head["venv"]["path"].endswith("-ray-2.60.0"), "another version of Ray is another environment"
    assert head["python"].startswith(head["venv"]["path"])
    assert {word for word in head["command"] if word.endswith("/bin/python")} == {head["python"]}


def test_what_differs_between_hosts_and_secrets_stay_on_the_first_host() -> None:
    head, other = ray_service("one"), ray_service("two")
    kept = set(head["kept_home"])
    different = {name for name in head["env"] if head["env"][name] != other["env"].get(name)}
    assert different and different <= kept
    assert {"VLLM_API_KEY", "HF_TOKEN", "MY_ACCESS_KEY", "RAY_AUTH_TOKEN"} <= kept
    assert not {"OMP_NUM_THREADS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"} & kept
    assert kept_home({"AWS_SECRET_ACCESS_KEY": "x"}) == json.loads(
        json.dumps(kept_home({"AWS_SECRET_ACCESS_KEY": "x"}))
    )


LIBRARIES = {"NCCL_IB_HCA": "mlx5_0", "NCCL_P2P_DISABLE": "1", "MY_PASSWORD": "x", "HF_TOKEN": "x"}


@pytest.mark.parametrize("runtime", ["venv", "container"])
def test_what_a_service_sets_reaches_engines_on_every_host_but_for_secrets(runtime: str) -> None:
    """vLLM of V100's releases copies nothing of it, and newer ones not what may differ between hosts."""
    asked = {**RAY_SERVICE, "env": LIBRARIES, "runtime": runtime}
    for host in ("one", "two"):
        network = {"chat": {"hosts": {**PLACES, "three": {"address": "10.0.0.3", "interface": "eth1"}}, "problems": []}}
        svc = on(host, asked, gpu_hosts(3), network=network, container=CONTAINER)
        engines = svc["span"]["environment"]
        assert {"NCCL_IB_HCA": "mlx5_0", "NCCL_P2P_DISABLE": "1", "HF_HUB_OFFLINE": "1"}.items() <= engines.items()
        assert engines["VLLM_HOST_IP"] == PLACES[host]["address"]
        assert not {
            "MY_PASSWORD",
            "HF_TOKEN",
            "VLLM_API_KEY",
            "HOME",
            "VLLM_CONFIG_ROOT",
            "BAREMETAL_OPEN_PATHS",
        } & set(engines)
        assert svc["span"]["interface"] == PLACES[host]["interface"]


def test_a_sum_between_hosts_is_computed_with_the_environment_and_the_gpus_of_the_service() -> None:
    asked = {**RAY_SERVICE, "env": LIBRARIES}
    venv = on("one", asked, gpu_hosts(3))
    assert venv["span"]["environment"]["CUDA_VISIBLE_DEVICES"] == venv["env"]["CUDA_VISIBLE_DEVICES"]
    assert venv["span"]["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    box = contained(asked, gpu_hosts(3))
    assert {"--env=NCCL_P2P_DISABLE", "--env=NCCL_SOCKET_IFNAME"} <= set(box["run_python"])
    assert "--env=HF_TOKEN" not in box["run_python"]


CONTAINER = {**SERVICE_SETTINGS["container"], "images": {}}


def contained(asked: dict[str, Any], hosts: list[dict[str, Any]], host: str = "one") -> dict[str, Any]:
    network = {"chat": {"hosts": {**PLACES, "three": {"address": "10.0.0.3", "interface": "eth1"}}, "problems": []}}
    asked = {**asked, "runtime": "container"}
    return on(host, asked, hosts, network=network, container=CONTAINER)


def test_ranks_in_containers_run_the_same_commands() -> None:
    for host in ("one", "two"):
        venv, box = on(host, CPU_SERVICE, HOSTS), contained(CPU_SERVICE, HOSTS, host)
        assert [word.replace(venv["python"], "python3") for word in venv["command"]] == box["command"]
        assert ("--no-healthcheck" in box["run_options"]) == (host == "two")
        assert bool([word for word in box["run_options"] if word.startswith("--health-")]) == (host == "one")
        assert not [word for word in box["run_options"] if word.startswith("--env")], (
            "no value of the host in arguments"
        )
        assert box["run_python"][-1] == box["image"]["reference"]
        assert {"--env=VLLM_HOST_IP", "--env=GLOO_SOCKET_IFNAME", "--network=host"} <= set(box["run_python"])
        assert box["inside"] == ""
    assert on("one", CPU_SERVICE, HOSTS)["run_python"] == [venv["python"]]


def test_ray_in_containers_starts_the_server_inside_the_first_node() -> None:
    head, venv = contained(RAY_SERVICE, gpu_hosts(3)), ray_service("one")
    assert [word.replace(venv["python"], "python3") for word in venv["command"]] == head["command"]
    assert head["inside"] == "ray-chat"
    version = head["version"]
    assert head["image"]["ray"] == f"baremetal/vllm-openai:v{version}-ray2.60.0"
    assert head["run_python"][-1] == head["image"]["ray"]
    assert head["told"]["python"] == [
        "docker",
        "exec",
        "--interactive",
        "--env",
        "OPENAI_API_KEY",
        "ray-chat",
        "python3",
    ]
    options = head["node_options"]
    assert options[options.index("--gpus") + 1].startswith('"device=')
    assert {"--read-only", "--cap-drop=ALL", "--network=host", "--shm-size=10g"} <= set(options)
    assert "--mount=type=bind,src=/var/lib/vllm/chat,dst=/var/lib/vllm/chat" in options
    assert not [word for word in options if word.startswith(("--env", "--name", "--entrypoint"))]
    # The container numbers its GPUs itself.
    assert "CUDA_VISIBLE_DEVICES" not in head["env"]
    different = {
        name
        for name, value in head["env"].items()
        if value != contained(RAY_SERVICE, gpu_hosts(3), "two")["env"].get(name)
    }
    assert different and different <= set(head["kept_home"])


@pytest.mark.parametrize(
    "bind, networks", [("127.0.0.1", []), ("::1", []), ("0.0.0.0", ["any"]), ("10.1.2.3", ["any"])]
)
def test_clients_reach_a_server_inside_of_a_node(bind: str, networks: list[str]) -> None:
    asked = {**RAY_SERVICE, "bind": bind}
    assert contained(asked, gpu_hosts(3))["node_networks"] == networks
    # Nobody comes to the other nodes, and in an environment the server runs in a unit of its own.
    assert contained(asked, gpu_hosts(3), "two")["node_networks"] == []
    assert on("one", asked, gpu_hosts(3), network={})["node_networks"] == []


@pytest.mark.parametrize(
    "reference, name",
    [
        ("vllm/vllm-openai:v0.25.1", "vllm-openai:v0.25.1"),
        ("r.example.com:5000/hub/vllm-openai", "vllm-openai:latest"),
        ("vllm/vllm-openai@sha256:" + "ab" * 32, "vllm-openai:abababababab"),
    ],
)
def test_names_of_images_with_ray(reference: str, name: str) -> None:
    assert ray_image(reference, "2.60.0") == f"baremetal/{name}-ray2.60.0"


def test_two_clusters_share_no_port() -> None:
    first, second = ({*ray_ports(number).values()} for number in (0, 1))
    assert not first & second
    assert ray_ports(1)["min_worker"] > ray_ports(0)["max_worker"]


def test_all_ports_are_listed_for_a_firewall() -> None:
    ports = ray_service("one")["span"]["firewall_ports"]
    assert ports[:2] == ["6379", "6380"] and ports[-3:] == ["6387", "10002-10201", "32768-60999"]
    assert on("one", CPU_SERVICE, HOSTS)["span"]["firewall_ports"] == ["29600", "29601", "29602", "32768-60999"]


@pytest.mark.parametrize(
    "ephemeral, ports",
    [
        (
            "20000-65000",
            ["6379", "6380", "6381", "6382", "6383", "6384", "6385", "6386", "6387", "10002-10201", "20000-65000"],
        ),
        ("1024-65535", ["10002-10201", "1024-65535"]),
    ],
)
def test_the_firewall_follows_the_ephemeral_ports_of_the_host(ephemeral: str, ports: list[str]) -> None:
    nic = {"name": "eth1", "mtu": 1500, "speed_mbps": None, "physical": True, "default": True}
    looks = {}
    for number, name in enumerate(("one", "two", "three"), 1):
        own = {**nic, "addresses": [{"address": f"10.0.0.{number}", "prefix": 24}]}
        looks[name] = {"interfaces": [own], "ephemeral": ephemeral if name == "two" else "32768-60999"}
    network = interconnect([{"service": "chat", "hosts": list(looks)}], looks, {})
    there = on("two", RAY_SERVICE, gpu_hosts(3), network=network)["span"]["firewall_ports"]
    assert there == ports
    assert on("one", RAY_SERVICE, gpu_hosts(3), network=network)["span"]["firewall_ports"][-1] == "32768-60999"


def test_the_firewall_leaves_the_api_alone() -> None:
    environment = jinja2.Environment(trim_blocks=True, autoescape=False)
    rules = environment.from_string((ROLE / "templates" / "interconnect.nft.j2").read_text()).render(
        __vllm_firewall_ports=["29600", "1024-65535"], __vllm_firewall_peers={"ip": ["10.0.0.2"]},
        __vllm_here=[{"port": 8000}, {"port": 8001}],
    )  # fmt: skip
    lines = [line.strip() for line in rules.splitlines()]
    assert lines.index("tcp dport { 8000, 8001 } accept") < lines.index("tcp dport { 29600, 1024-65535 } drop")


def test_the_all_reduce_has_a_port_that_no_engine_holds() -> None:
    ranks, ray = on("one", CPU_SERVICE, HOSTS)["span"]["ports"], ray_service("one")["span"]["ports"]
    assert ranks == {"ranks": 29600, "master": 29601, "allreduce": 29602}
    assert ray["allreduce"] == 6387
    assert "ports.allreduce" in (ROLE / "vars" / "main.yml").read_text()


def blocks_of(plan: dict[str, Any]) -> dict[str, int]:
    """First port of the keepers of each service."""
    return {span["service"]: span["ports"]["ranks"] for span in spans(plan, [])}


def files(plan: dict[str, Any]) -> list[dict[str, str]]:
    return [{f"/etc/vllm/{row['name']}/plan.json": json.dumps(row["record"]) for row in plan["services"]}]


def over(name: str, *hosts: str) -> dict[str, Any]:
    return service(name=name, hosts=list(hosts), tensor_parallel_size=len(hosts), port=8000 + len(name))


ONE_TWO_THREE = [{**HOSTS[0], "name": name} for name in ("one", "two", "three")]


def test_a_service_keeps_its_ports_when_another_one_goes_or_comes() -> None:
    both = [over("a", "one", "two"), over("bb", "one", "two")]
    first = plan_running(both, HOSTS)
    assert blocks_of(first) == {"a": 29600, "bb": 29610}
    # The one before it goes; a new one gets what is free, also before it in the list.
    alone = plan_running(both[1:], HOSTS, files(first))
    assert blocks_of(alone) == {"bb": 29610}
    assert blocks_of(plan_running([over("ccc", "one", "two"), *both[1:]], HOSTS, files(alone))) == {
        "ccc": 29600,
        "bb": 29610,
    }
    # All else of it may be planned anew.
    again = plan_running([both[0], {**both[1], "max_model_len": 256}], HOSTS, files(first))
    assert [row["kept"] for row in again["services"]] == [True, False]
    assert blocks_of(again) == blocks_of(first)


def test_a_service_keeps_its_ports_in_a_run_that_is_limited_to_its_hosts() -> None:
    services = [over("a", "one", "two"), over("bb", "two", "three"), over("ccc", "one", "three")]
    first = plan_running(services, ONE_TWO_THREE)
    assert blocks_of(first) == {"a": 29600, "bb": 29610, "ccc": 29620}
    limited = plan_running(services[1:2], ONE_TWO_THREE[1:], files(first)[0:1])
    assert blocks_of(limited) == {"bb": 29610}
    assert blocks_of(plan_running(services, ONE_TWO_THREE, files(first))) == blocks_of(first)


def test_services_of_other_hosts_do_not_count() -> None:
    """A run limited to the second one's hosts does not see the first one, whose ports are free there."""
    hosts = [{**HOSTS[0], "name": name} for name in ("one", "two", "three", "four")]
    services = [over("a", "one", "two"), over("bb", "three", "four")]
    limited = plan_running(services[1:], hosts[2:])
    assert blocks_of(limited) == {"bb": 29600}
    assert blocks_of(plan_running(services, hosts, files(limited))) == {"a": 29600, "bb": 29600}


@pytest.mark.parametrize("noted", [-1, 10**6, "0", None, 0])
def test_a_block_that_is_none_or_another_ones_is_not_taken(noted: object) -> None:
    first = plan_running([over("a", "one", "two"), over("bb", "one", "two")], HOSTS)
    (kept,) = files(first)
    path = "/etc/vllm/bb/plan.json"
    kept[path] = json.dumps({**json.loads(kept[path]), "block": noted})
    assert blocks_of(plan_running([over("a", "one", "two"), over("bb", "one", "two")], HOSTS, [kept])) == {
        "a": 29600,
        "bb": 29610,
    }


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"tensor_parallel_size": 3}, "TP 3 is not possible: 4 attention heads"),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 3}, "PP 3 is not possible: 2 layers"),
        ({"tensor_parallel_size": 1, "pipeline_parallel_size": 2}, "and ends at the first request"),
        ({"tensor_parallel_size": 2, "executor": "ray"}, "on CPUs it is mp"),
        ({"tensor_parallel_size": 2, "engine_version": "0.11.0"}, "executor mp does not span hosts in vLLM 0.11.0"),
    ],
)
def test_what_cpus_of_several_hosts_cannot_do(fields: dict[str, Any], problem: str) -> None:
    plan = vllm_plan([service(**{"hosts": ["one", "two"], **fields})], HOSTS)
    assert any(problem in line for line in plan["problems"]), plan["problems"]


def test_cpu_servers_on_several_hosts_are_servers_of_their_own() -> None:
    plan = vllm_plan([service(hosts=["one", "two"])], HOSTS)
    assert [instance["hosts"] for instance in plan["services"][0]["instances"]] == [["one"], ["two"]]
    assert spans(plan, ["one", "two"]) == []


@pytest.mark.parametrize("sizes", [{}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}])
def test_unlike_gpus_are_refused_in_one_line(sizes: dict[str, int]) -> None:
    hosts = [*gpu_hosts(1), {**gpu_hosts(1, "2x A10")[0], "name": "two"}]
    asked = {"name": "chat", "model": "Qwen/Qwen2.5-32B", "max_model_len": 32768, "hosts": ["one", "two"], **sizes}
    plan = vllm_plan([asked], hosts)
    assert plan["problems"] == [
        "chat: the GPUs of one server are alike, and the hosts have no kind in common: one has 2 Tesla V100-PCIE-16GB "
        "(16384 MiB); two has 2 NVIDIA A10 (23028 MiB). Name hosts with equal GPUs, or make a service for each kind"
    ]


OVER_TWO = {"name": "chat", "model": "Qwen/Qwen2.5-14B", "max_model_len": 8192, "hosts": ["one", "two"],
            "tensor_parallel_size": 2, "pipeline_parallel_size": 2}  # fmt: skip


@pytest.mark.parametrize(
    "gpus, drivers, image",
    [
        ("2x V100-PCIE-16GB no-p2p", ["550.90.07", "550.127.05"], "v0.8.5.post1"),
        ("2x A10", ["580.82.07", "580.159.04"], "v0.25.1"),
        ("2x A10", ["580.82.07", None], "v0.25.1"),  # still to be installed
        # The oldest one decides for both, wherever it is.
        ("2x A10", ["580.82.07", "575.64.03"], "v0.25.1-cu129"),
        ("2x A10", ["575.64.03", "580.82.07"], "v0.25.1-cu129"),
    ],
)
def test_hosts_of_unlike_drivers_work_together(gpus: str, drivers: list[str | None], image: str) -> None:
    hosts = [{**host, "driver_version": driver} for host, driver in zip(gpu_hosts(2, gpus), drivers, strict=True)]
    plan = vllm_plan([OVER_TWO], hosts)
    assert plan["fits"], plan["problems"]
    (row,) = plan["services"]
    assert row["gpus"] == {"one": [0, 1], "two": [0, 1]}
    assert row["image"] == f"vllm/vllm-openai:{image}"
    assert any("the hosts' drivers differ: the oldest, " in line for line in row["why"])


@pytest.mark.parametrize("counts", [(4, 2), (2, 4)])
def test_hosts_of_unlike_numbers_of_gpus_work_together(counts: tuple[int, int]) -> None:
    hosts = [
        {**gpu_hosts(1, f"{count}x A10")[0], "name": name} for count, name in zip(counts, ("one", "two"), strict=True)
    ]
    plan = vllm_plan([OVER_TWO], hosts)
    assert plan["fits"], plan["problems"]
    assert {name: len(gpus) for name, gpus in plan["services"][0]["gpus"].items()} == {"one": 2, "two": 2}
    # ... and with the sizes left out.
    free = {"name": "chat", "model": "Qwen/Qwen2.5-32B", "max_model_len": 32768, "hosts": ["one", "two"]}
    (row,) = vllm_plan([free], hosts)["services"]
    assert row["fits"], row["problems"]
    assert (row["tensor_parallel_size"], row["pipeline_parallel_size"]) == (2, 2)


@pytest.mark.parametrize(
    "gpus, pp, problem",
    [
        ("4x A10", 3, "each gets the same number of stages. Set pipeline_parallel_size 2, 4, or name other hosts"),
        ("2x A10", 4, "two has 2 GPUs, and 2 stages take 4. Set pipeline_parallel_size 2, or name other hosts"),
    ],
)
def test_stages_that_do_not_go_onto_the_hosts(gpus: str, pp: int, problem: str) -> None:
    hosts = [gpu_hosts(1, "6x A10")[0], {**gpu_hosts(1, gpus)[0], "name": "two"}]
    plan = vllm_plan([{**OVER_TWO, "pipeline_parallel_size": pp}], hosts)
    assert plan["problems"] == [f"chat: TP 2 x PP {pp} does not go onto 2 hosts: {problem}"]


def test_a_refusal_does_not_show_that_it_fits() -> None:
    asked = {**OVER_TWO, "hosts": None, "pipeline_parallel_size": 3}
    (problem,) = vllm_plan([asked], gpu_hosts(2, "4x A10"))["problems"]
    assert problem.startswith(
        "chat: TP 2 x PP 3 fits on GPUs like these, but not on these hosts: each one gets the same"
    )


def test_the_host_that_cannot_hold_a_server_of_its_own_is_told() -> None:
    hosts = [gpu_hosts(1, "4x A10")[0], {**gpu_hosts(1)[0], "name": "two"}]
    plan = vllm_plan([{**OVER_TWO, "tensor_parallel_size": 1, "pipeline_parallel_size": 1}], hosts)
    assert plan["problems"][0].startswith("chat: does not fit on Tesla V100-PCIE-16GB with TP 1: ")


@pytest.mark.parametrize(
    "version, ray, problem",
    [
        ("0.3.0", None, "PP 3 is not possible: vLLM 0.3.0 has no pipeline parallelism"),
        ("0.6.3", ["--distributed-executor-backend", "ray"], None),
        ("0.8.5.post1", ["--distributed-executor-backend", "ray"], None),
        ("0.9.0", None, "compute capability 7.0"),
        ("0.25.1", None, "engine_version 0.8.5.post1 can"),
    ],
)
def test_releases_for_three_hosts_of_v100(version: str, ray: list[str] | None, problem: str | None) -> None:
    plan = vllm_plan([{**RAY_SERVICE, "engine_version": version}], gpu_hosts(3))
    assert plan["fits"] == (problem is None), plan["problems"]
    if ray:
        args = plan["services"][0]["args"]
        assert args[args.index(ray[0]) : args.index(ray[0]) + 2] == ray
    else:
        assert any(str(problem) in line for line in plan["problems"]), plan["problems"]


def test_the_oldest_release_on_one_host_has_its_own_flag_for_ray() -> None:
    asked = {
        key: value for key, value in RAY_SERVICE.items() if key not in ("hosts", "pipeline_parallel_size", "executor")
    }
    asked |= {"engine_version": "0.3.0", "max_model_len": 400, "max_num_batched_tokens": 400, "max_num_seqs": 16}
    asked |= {"enforce_eager": True, "gpu_memory_utilization": 0.995, "max_model_len": 400}
    (row,) = vllm_plan([asked], gpu_hosts(3))["services"]
    assert row["fits"], row["problems"]
    assert "--worker-use-ray" in row["args"] and "--distributed-executor-backend" not in row["args"]
