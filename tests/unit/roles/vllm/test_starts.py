# SPDX-License-Identifier: GPL-3.0-or-later
"""The role's tables about starts, against lines that vLLM 0.8 to 0.32, PyTorch, NCCL and Docker print."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.modules.vllm_wait import cause, explain, measured, stage_of

ROOT = Path(__file__).parents[4]
VARS = yaml.safe_load((ROOT / "roles/vllm/vars/main.yml").read_text())
CAPTURES = ROOT / "tests/unit/plugins/modules/captures"
VALUES = {
    "gpu_memory_utilization": 0.92, "max_model_len": 32768, "max_num_seqs": 256, "max_num_batched_tokens": 8192,
    "engine_version": "0.25.1", "port": 8000, "bind": "127.0.0.1", "name": "chat",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("ValueError: ... the estimated maximum model length is 11520. Try increasing", "Set max_model_len: 11520 of the"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "gpu_memory_utilization of the service below 0.92"),
        ("ValueError: No available memory for the cache blocks. Try increasing", "Lower max_num_seqs (now 256)"),
        (
            "ValueError: Free memory on device cuda:0 (10.5/139.72 GiB) on startup is less than desired GPU memory utilization",
            "10.5 of 139.72 GiB are free",
        ),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12020).", "the CUDA of vLLM 0.25.1"),
        (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). ... Error 802: system not yet initialized",
            "a fabric manager of the driver's very version",
        ),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0", "Upgrade the driver"),
        ("OSError: [Errno 98] Address already in use", "listens on 127.0.0.1 port 8000"),
        ("RuntimeError: NCCL error: unhandled system error", "NCCL_P2P_DISABLE"),
        ("api_server.py: error: unrecognized arguments: --swap-space 4", "does not know --swap-space 4"),
        ("ValueError: The repository /m contains custom code which must be executed", "trust_remote_code of the service"),
        ("docker: Error response from daemon: could not select device driver", "nvidia_container_toolkit"),
        ("invalid mount config: bind source path does not exist: /srv/loras/x.", "/srv/loras/x. is named by the service"),
        (
            "runc create failed: error during container init: error setting rlimits for ready process: error setting rlimit type 8: "
            "operation not permitted: unknown.",
            "may not let containers lock memory",
        ),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "Install gcc"),
    ],
)  # fmt: skip
def test_why_it_failed(line: str, told: str) -> None:
    assert told in explain(f"INFO something\n{line}\nINFO more\n", VARS["__vllm_causes"], VALUES)


@pytest.mark.parametrize(
    ("source", "log", "cause_line", "told"),
    [
        (
            "vllm-project/vllm#27508, one H100",
            """(EngineCore_DP0 pid=8884) ERROR 10-31 15:15:48 [core.py:708] torch.OutOfMemoryError: CUDA out of memory. Tried to \
allocate 786.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 140.75 MiB is free. Process 3270336 has 78.96 GiB memory in use.
(EngineCore_DP0 pid=8884) ERROR 10-31 15:15:48 [core.py:708]
(EngineCore_DP0 pid=8884) ERROR 10-31 15:15:48 [core.py:708] The above exception was the direct cause of the following exception:
(EngineCore_DP0 pid=8884) ERROR 10-31 15:15:48 [core.py:708] RuntimeError: CUDA out of memory occurred when warming up sampler \
with 1024 dummy requests. Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.
(APIServer pid=8600) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}""",
            "RuntimeError: CUDA out of memory occurred when warming up sampler",
            "the GPU's memory ran out. Set gpu_memory_utilization of the service below 0.92, or halve max_num_batched_tokens (now 8192) "
            "or max_num_seqs (now 256)",
        ),
        (
            "vLLM 0.3.0 on V100s (inventories/v100-ray-3x2)",
            "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total capacty of 15.77 GiB of "
            "which 281.12 MiB is free.",
            "torch.cuda.OutOfMemoryError: CUDA out of memory",
            "the GPU's memory ran out",
        ),
        (
            "the same",
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.",
            "ValueError: No available memory for the cache blocks",
            "weights and activations leave no memory for the KV cache",
        ),
        (
            "vllm-project/vllm#5635, driver 530 and an image of CUDA 12.4",
            """docker: Error response from daemon: failed to create task for container: failed to create shim task: OCI runtime create \
failed: runc create failed: unable to start container process: error during container init: error running hook #0: error running \
hook: exit status 1, stdout: , stderr: Auto-detected mode as 'legacy'
nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.4, please update your driver to a newer version, or use an \
earlier cuda container: unknown.""",
            "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.4",
            "the NVIDIA driver is too old for the CUDA of vLLM 0.25.1. Upgrade the driver",
        ),
        (
            "modelscope/FunASR#2973, PyTorch for CUDA 13.0 on driver 570",
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by "
            "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12080)",
            "the NVIDIA driver is too old for the CUDA of vLLM 0.25.1",
        ),
        (
            "vllm-project/vllm#6732",
            """(VllmWorkerProcess pid=411) ERROR 08-19 19:00:55 multiproc_worker_utils.py:226]     raise RuntimeError(f"NCCL error: \
{error_str}")
(VllmWorkerProcess pid=411) ERROR 08-19 19:00:55 multiproc_worker_utils.py:226] RuntimeError: NCCL error: unhandled cuda error (run \
with NCCL_DEBUG=INFO for details)""",
            "RuntimeError: NCCL error: unhandled cuda error",
            "the GPUs cannot talk to each other. Set env NCCL_P2P_DISABLE to 1",
        ),
    ],
)  # fmt: skip
def test_what_others_have_seen(source: str, log: str, cause_line: str, told: str) -> None:
    """Lines of logs that are public: what only a GPU can show. Continued lines are one."""
    log = log.replace("\\\n", "")
    assert cause(log).startswith(cause_line), source
    assert told in explain(log, VARS["__vllm_causes"], VALUES), source


# What vLLM 0.25.1 said on two H200s before it failed, with all settings of its engine; and lines of other releases that name no error.
BEFORE = (CAPTURES / "vllm_0.25.1_worker_out_of_memory.txt").read_text().partition("ERROR")[0].rpartition("\n")[0]
BEFORE += """
INFO 12-12 22:54:41 api_server.py:560] Using supplied chat template:
WARNING 06-01 10:00:00 serving_chat.py:102] No chat template provided. Chat API will not work.
WARNING 11-21 15:51:50 [utils.py:1] NewForCausalLM has no vLLM implementation, falling back to Transformers implementation.
WARNING 11-21 15:51:52 [parallel.py:624] Address already in use. Retrying with a new port.
(EngineCore pid=1) INFO 11-21 15:52:58 [gpu_worker.py:816] Free memory on device (60.31/139.8 GiB) on startup. Desired GPU memory \
utilization is (0.542, 75.77 GiB). Actual usage is 14.25 GiB for weight
"""
CORE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): "


@pytest.mark.parametrize(
    ("log", "told"),
    [
        # Nothing known: nothing is told. What cause() finds stands alone.
        ("TypeError: unsupported operand type(s) for +: 'int' and 'NoneType'", ""),
        (CORE + "{'EngineCore_DP0': 1}", ""),
        ("ERROR [core_client.py:600] Engine core proc EngineCore_DP0 died unexpectedly, shutting down client.", ""),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", ""),
        # memory of the GPU, in the words of several releases
        (
            "ValueError: Free memory on device (3.22/79.1 GiB) on startup is less than desired GPU memory utilization (0.9, 71.19 GiB).",
            "3.22 of 79.1 GiB are free",
        ),
        (
            "ValueError: Free memory on device cuda:1 (3.22/79.1 GiB) on startup is less than desired GPU memory utilization",
            "3.22 of 79.1 GiB are free",
        ),
        (
            "ValueError: Available memory on node 0 (3.1/15.6 GiB) on startup is less than desired CPU memory utilization",
            "3.1 of 15.6 GiB are free",
        ),
        (
            "ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can be stored in KV cache "
            "(11520). Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.",
            "Set max_model_len: 11520 of the service",
        ),
        (
            "ValueError: To serve at least one request with the model's max seq len (32768), (4.00 GiB KV cache is needed, which is "
            "larger than the available KV cache memory (0.01 GiB). Try increasing `gpu_memory_utilization`",
            "Lower max_num_seqs (now 256)",
        ),
        (
            "RuntimeError: Worker failed with error 'CUDA out of memory. Tried to allocate 432.00 MiB.'\n" + CORE + "{}",
            "the GPU's memory ran out",
        ),
        # memory of the host
        (CORE + "{'EngineCore_DP0': -9}", "the host's memory ran out"),
        ("ERROR [multiproc_executor.py:285] Worker proc VllmWorker-1 died unexpectedly, shutting down executor.", "the host's memory"),
        ("vllm-chat.service: A process of this unit has been killed by the OOM killer.", "the host's memory ran out"),
        ("vllm-chat.service: Main process exited, code=killed, status=9/KILL", "the host's memory ran out"),
        ("vllm-chat.service: Main process exited, code=exited, status=137/n/a", "the host's memory ran out"),
        ("MemoryError", "the host's memory ran out"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory", "the host's memory ran out"),
        # code of the model
        (
            "ValueError: Loading /m requires you to execute the configuration file in that repo on your local machine. Make sure you "
            "have read the code there to avoid malicious use, then set the option `trust_remote_code=True` to remove this error.",
            "the model brings code of its own",
        ),
        (
            "RuntimeError: Failed to load the tokenizer. If the tokenizer is a custom tokenizer not yet available in the HuggingFace "
            "transformers library, consider setting `trust_remote_code=True` in LLM or using the `--trust-remote-code` flag in the CLI.",
            "the model brings code of its own",
        ),
        # kinds of models
        (
            "Value error, Model architectures ['NewForCausalLM'] are not supported for now. Supported architectures: dict_keys([])",
            "cannot load this kind of model",
        ),
        (
            "Value error, Model architecture BaichuanForCausalLM was supported in vLLM until v0.23.0, and is not supported anymore.",
            "cannot load this kind of model",
        ),
        (
            "Value error, The checkpoint you are trying to load has model type `new9` but Transformers does not recognize this "
            "architecture.",
            "cannot load this kind of model",
        ),
        (
            "Value error, NewForCausalLM has no vLLM implementation and the Transformers implementation is not compatible with vLLM.",
            "cannot load this kind of model",
        ),
        # templates
        ("FileNotFoundError: the supplied chat template path doesn't exist", "the chat template that extra_args name"),
        (
            "ValueError: The supplied chat template (/srv/x.jinja) looks like a file path, but it failed to be opened. Tried:",
            "the chat template that extra_args name",
        ),
        (
            "ChatTemplateResolutionError: As of transformers v4.44, default chat template is no longer allowed, so you must provide a "
            "chat template if the tokenizer does not define one.",
            "the model has no chat template",
        ),
        # what lies outside the host
        (
            "OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://hub.example/m/m.\n"
            "401 Client Error. (Request ID: Root=1)",
            "accept its licence and give model_token",
        ),
        (
            "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1)\n\nCannot access gated repo for url "
            "https://hub.example/m/resolve/main/config.json.\nAccess to model m/m is restricted and you are not in the authorized list.",
            "accept its licence and give model_token",
        ),
        ("OSError: m/m is not a local folder and is not a valid model identifier listed on the hub", "servers fetch nothing"),
        (
            "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the disk cache and outgoing traffic has "
            "been disabled.",
            "servers fetch nothing",
        ),
        # the host
        ("OSError: [Errno 28] No space left on device", "a disk or /dev/shm is full"),
        ("ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address already in use", "port 8000"),
        ("zmq.error.ZMQError: Address already in use (addr='tcp://10.0.0.1:29550')", "a port that the engine's processes use"),
        (
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. port: 29501, "
            "useIpv6: false, code: -98, name: EADDRINUSE, message: address already in use",
            "a port that the engine's processes use",
        ),
        ("RuntimeError: Failed to find C compiler. Please specify via CC environment variable", "Install gcc"),
        ("torch._inductor.exc.InductorError: InvalidCxxCompiler: No working C++ compiler found", "Install gcc"),
        ("main.c:5:10: fatal error: Python.h: No such file or directory", "Install gcc"),
        ("RuntimeError: The NVIDIA driver on your system is too old (found version 12080).", "the NVIDIA driver is too old"),
        ("RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain.", "the NVIDIA driver is too old"),
        ("RuntimeError: Failed to infer device type, please set the environment variable", "the server does not see a GPU"),
        ("RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)", "NCCL_P2P_DISABLE"),
        ("api_server.py: error: argument --max-num-seqs: invalid int value: 'x'", "does not take what --max-num-seqs was given"),
    ],
)  # fmt: skip
def test_why_it_failed_after_all_that_a_start_prints(log: str, told: str) -> None:
    """Lines that every start has, with the engine's settings among them, are no reason."""
    said = explain(f"{BEFORE}\n{log}\nINFO more\n", VARS["__vllm_causes"], VALUES)
    assert told in said if told else said == ""


def test_every_row_can_be_told() -> None:
    for row in VARS["__vllm_causes"]:
        assert set(row) == {"pattern", "cause", "advice"}


@pytest.mark.parametrize(
    ("capture", "told"),
    [
        ("vllm_0.32.0_max_model_len.txt", "the model's own context is 2048 tokens. Set max_model_len: 2048"),
        ("vllm_0.32.0_unrecognized.txt", "does not know"),
        ("vllm_0.32.0_port_in_use.txt", "another process listens on"),
        ("vllm_0.32.0_custom_code.txt", "the model brings code of its own that has to run"),
        ("vllm_0.25.1_worker_out_of_memory.txt", "the GPU's memory ran out"),
    ],
)
def test_a_real_failure(capture: str, told: str) -> None:
    assert told in explain((CAPTURES / capture).read_text(), VARS["__vllm_causes"], VALUES)


LOG = """(EngineCore_DP0 pid=7) INFO [core.py:115] Initializing a V1 LLM engine (v0.25.1) with config: model='m'
(EngineCore_DP0 pid=7) INFO [pynccl.py:69] vLLM is using nccl==2.27.5
(EngineCore_DP0 pid=7) INFO [gpu_model_runner.py:5210] Starting to load model m...
(EngineCore_DP0 pid=7) INFO [gpu_model_runner.py:5307] Model loading took 14.25 GiB memory and 5.4 seconds
(EngineCore_DP0 pid=7) INFO [backends.py:430] Dynamo bytecode transform time: 5.30 s
(EngineCore_DP0 pid=7) INFO [gpu_worker.py:539] Available KV cache memory: 45.13 GiB
(EngineCore_DP0 pid=7) INFO [kv_cache_utils.py:2146] GPU KV cache size: 845,104 tokens
(EngineCore_DP1 pid=8) INFO [kv_cache_utils.py:2146] GPU KV cache size: 844,992 tokens
(EngineCore_DP0 pid=7) INFO [kv_cache_utils.py:2148] Maximum concurrency for 32,768 tokens per request: 25.79x
Capturing CUDA graphs (decode, FULL): 100%|##########| 35/35
(EngineCore_DP0 pid=7) INFO [gpu_model_runner.py:6708] Graph capturing finished in 20 secs, took 0.58 GiB
(EngineCore_DP0 pid=7) INFO [core.py:328] init engine (profile, create kv cache, warmup model) took 50.1 s
"""


def test_the_stages_in_their_order() -> None:
    lines = LOG.splitlines(keepends=True)
    seen: list[str] = []
    for count in range(1, len(lines) + 1):
        name = stage_of("".join(lines[:count]), VARS["__vllm_stages"])["name"]
        seen += [name] if seen[-1:] != [name] else []
    assert seen == [
        "starting the engine",
        "connecting the GPUs (NCCL)",
        "loading weights",
        "compiling",
        "profiling memory",
        "capturing CUDA graphs",
        "starting the API server",
    ]


def test_what_the_engine_measured() -> None:
    assert measured(LOG) == {
        "kv_cache_tokens": 844992,
        "max_concurrency": 25.79,
        "kv_cache_gib": 45.13,
        "weights_gib": 14.25,
        "cuda_graph_gib": 0.58,
        "engines": 2,
    }
    assert measured("INFO # cuda blocks: 1000, # CPU blocks: 512")["kv_cache_tokens"] == 16000
    assert measured("") == {}


@pytest.mark.parametrize(
    "line",
    [
        "INFO 12-11 17:57:51 api_server.py:719] args: Namespace(port=8000, block_size=64, seed=0)",
        "INFO 07-01 10:00:00 [utils.py:328] non-default args: {'model': '/m', 'block_size': 64, 'port': 8000}",
    ],
)
def test_blocks_of_another_size(line: str) -> None:
    """As a deployment with --block-size 64 has them. A size that nobody gave is the first engine's own."""
    blocks = "\nINFO gpu_executor.py:122] # GPU blocks: 1000, # CPU blocks: 512"
    assert measured(line + blocks) == {"kv_cache_tokens": 64000, "engines": 1}
    assert measured(line.replace("64", "None") + blocks)["kv_cache_tokens"] == 16000


def test_who_starts_together(render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]) -> None:
    """Of a round: what does not run and shares no GPU, on a host with no engine of a service over several hosts."""
    rounds = {"chat": 0, "embed": 0, "shared": 0, "running": 0, "later": 1, "elsewhere": 0}
    services: list[dict[str, Any]] = [
        {
            "name": name,
            "runtime": "container",
            "device": "cuda",
            "state_dir": f"/var/lib/vllm/{name}",
            "turn": ["python", "1"] if name == "shared" else [],
            "span": None,
        }
        for name in rounds
        if name != "elsewhere"
    ]

    def firsts(**more: Any) -> Any:
        given = role_vars("vllm", "main") | {
            "__vllm_all": [*services, *more.get("spans", [])],
            "vllm_plan_result": {"services": [{"name": name, "round": number} for name, number in rounds.items()]},
            "__vllm_round": 0,
            "__vllm_manager": "systemd",
            "__vllm_settings": {"container": {"gpus": more.get("gpus", "cdi")}},
            "__vllm_probe": {"listeners": {"8003": {"cwd": "/var/lib/vllm/running"}}},
        }
        return render("{{ __vllm_firsts }}", **given)

    assert firsts() == ["chat", "embed"]
    assert firsts(gpus="request") == [], "a reload of systemd takes GPUs that a container has not opened"
    wide = {"name": "wide", "state_dir": "/var/lib/vllm/wide", "turn": [], "span": {"hosts": ["one", "two"]}}
    assert firsts(spans=[wide]) == []


def test_one_list_of_services_for_all_hosts(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    """Else the second host's own would be removed as services that are not listed any more."""
    chat, embed = {"name": "chat", "model": "a/b"}, {"name": "embed", "model": "a/c"}

    def unlike(mine: Any, first: Any) -> Any:
        given = role_vars("vllm", "main") | {
            "inventory_hostname": "gpu2",
            "ansible_play_hosts": ["gpu1", "gpu2"],
            "vllm_services": mine,
            "hostvars": {"gpu1": {"vllm_services": first} if first else {}},
        }
        return render("{{ __vllm_unlike }}", **given)

    assert unlike([chat, embed], [chat, {**embed, "port": 8001}]) == []
    (problem,) = unlike([embed], [chat])
    assert problem.startswith(
        "vllm_services of gpu2 (embed) is another list than that of gpu1 (chat): one list holds for"
    )
    assert len(unlike([{**chat, "model": "a/d"}], [chat])) == 1
    assert unlike([chat], None) == [], "given to the play, and not known of any host by itself"


def test_code_of_a_model_that_somebody_has_read(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    commit, other = "ab" * 20, "12" * 20
    services = {
        "local": {"model": "/srv/m"},
        "hub": {"model": "a/b"},
        "pinned": {"model": "a/b", "revision": commit},
        "share": {"model": "file:///mnt/m"},
        "invented": {"model": "https://files.example/m", "revision": other},
        "read": {"model": "file:///mnt/m", "revision": commit},
    }
    given = role_vars("vllm", "main") | {
        "vllm_plan_inputs": {
            "services": [{"name": name, "trust_remote_code": True, **row} for name, row in services.items()]
        },
        "model_infos": {name: {"commit": commit} for name in services},
    }
    assert [problem.split()[1] for problem in render("{{ __vllm_unpinned }}", **given)] == ["hub"]
    unread = render("{{ __vllm_unread }}", **given)
    assert [problem.split()[1] for problem in unread] == ["invented", "share"]
    assert all(problem.endswith(f"read the code there, then give {commit} as revision") for problem in unread)
