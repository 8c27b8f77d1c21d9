#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Measures what the plans of this collection give against what people start by hand, on this machine's GPUs, in one run.
#
#   VLLM_PYTHON=/path/to/python tests/device/bench.sh OUT [CASE...]
#
# Cases: throughput, latency   site.yml with that objective, planned from this machine's facts
#        defaults              `vllm serve MODEL` and nothing else: one GPU
#        tp                    the same with tensor parallelism over all GPUs
#        seed0, seed1          the flags of the deployments that this collection was made from, over all GPUs
#        seed1-planned         seed 1's batch and context over all GPUs, with the memory that the plan gives them
#        CASE@ARG,ARG          the same with more arguments: throughput@--api-server-count,4
# All of them, in the order throughput tp latency defaults seed1 seed0, when none is named. OUT/summary.md and OUT/report.html
# are written anew after each case: a run that is cut short loses nothing, and a second run adds to the first.
#
# VLLM_PYTHON          a Python that holds vLLM; nothing is fetched but supervisor, by pip
#                      (without a network: PIP_NO_INDEX=1 PIP_FIND_LINKS=folder of wheels)
# MODEL                name in tests/benchmarks/truth/configs.json or a config.json (qwen2.5-7b); weights are dummies
# CONCURRENCY          clients at once ("8 200 1024"), PROMPTS_PER_CLIENT (4), INPUT_LEN (512), OUTPUT_LEN (128), PROCESSES (8)
# GPUS                 number of GPUs to use by hand (all)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$(realpath -m "${1:?usage: VLLM_PYTHON=... tests/device/bench.sh OUT [CASE...]}")
shift
: "${VLLM_PYTHON:?set it to a Python that holds vLLM}"
cases=("$@")
[[ ${#cases[@]} -gt 0 ]] || cases=(throughput tp latency defaults seed1 seed0)
PATH=$PWD/.venv/bin:$PATH
export ANSIBLE_COLLECTIONS_PATH=$PWD/collections ANSIBLE_INJECT_FACT_VARS=false ANSIBLE_NOCOLOR=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
python=$(command -v python3)
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)}
[[ $gpus -gt 0 ]] || gpus=1
port=18300
work=$(mktemp -d)
server=
key=sk-device-bench
mkdir -p "$out"

# What this machine sets for its links holds for planned servers, too.
links=$("$python" -c 'import json, os
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith(("NCCL_", "NVSHMEM_", "TORCH_SYMM_", "FLASHINFER_"))}))')

model=$work/models/$(basename "${MODEL:-qwen2.5-7b}" .json)
PYTHONPATH=collections "$python" tests/device/dummy_model.py "${MODEL:-qwen2.5-7b}" "$model"
cat >"$work/hosts" <<HOSTS
$(hostname -s) ansible_connection=local ansible_python_interpreter=$python
HOSTS

play() { # PLAYBOOK OBJECTIVE [ARGUMENT...]
  local playbook=$1 objective=$2
  shift 2
  cat >"$work/vars.json" <<VARS
{
  "vllm_services": [{"name": "chat", "model": "$model", "objective": "$objective", "port": $port, "start_timeout": 900, $settings
                     "extra_args": ["--load-format", "dummy"$(for arg in "${more[@]}"; do printf ', "%s"' "$arg"; done)], "env": $links}],
  "vllm_root": "$work/root", "vllm_config_dir": "$work/config", "vllm_state_dir": "$work/state", "vllm_log_dir": "$work/log",
  "vllm_user": "$(id -un)", "vllm_existing_python": "$VLLM_PYTHON", "vllm_api_key": "$key", "vllm_verify_client": "never",
  "ansible_become": false, "preflight_allow_untested_distribution": true, "model_root": "$work/models",
  "bench_concurrency": [$(tr ' ' , <<<"${CONCURRENCY:-8 200 1024}")], "bench_prompts_per_client": ${PROMPTS_PER_CLIENT:-4},
  "bench_input_len": ${INPUT_LEN:-512}, "bench_output_len": ${OUTPUT_LEN:-128}, "bench_processes": ${PROCESSES:-8},
  "bench_output_dir": "$out/runs", "bench_label": "$name"
}
VARS
  ansible-playbook "playbooks/$playbook.yml" -i "$work/hosts" -e "@$work/vars.json" "$@"
}

by_hand() { # ARGUMENT...
  mkdir -p "$work/config/chat" "$work/state" "$work/log"
  (umask 077 && echo "$key" >"$work/config/chat/api_key")
  cat >"$work/config/chat/endpoint.json" <<TOLD
{"service": "chat", "base_url": "http://127.0.0.1:$port/v1", "api_key_file": "$work/config/chat/api_key", "model": "$model",
 "task": "generate", "gpus": [], "python": ["$VLLM_PYTHON"]}
TOLD
  VLLM_API_KEY=$key setsid "$VLLM_PYTHON" -m vllm.entrypoints.openai.api_server --model "$model" --load-format dummy \
    --host 127.0.0.1 --port "$port" "$@" "${more[@]}" >"$out/$name.log" 2>&1 &
  server=$!
  for _ in $(seq 900); do
    if "$python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health', timeout=5)" 2>/dev/null; then return; fi
    kill -0 "$server" 2>/dev/null || { tail -n 30 "$out/$name.log"; echo "bench: the server of $name has ended"; return 1; }
    sleep 1
  done
  echo "bench: the server of $name does not answer"
  return 1
}

stop() {
  if [[ -n $server ]]; then
    kill -TERM -- "-$server" 2>/dev/null || true
    for _ in $(seq 60); do kill -0 "$server" 2>/dev/null || break; sleep 1; done
    kill -KILL -- "-$server" 2>/dev/null || true
    server=
    rm -rf "$work/config/chat"
  elif [[ -d $work/root/supervisor ]]; then
    play teardown throughput >"$out/teardown.log" 2>&1 || true
  fi
}

summarize() {
  PYTHONPATH=collections "$python" - "$out" "$gpus" <<'SUMMARY'
import json, pathlib, sys
from ansible_collections.baremetal.vllm.plugins.plugin_utils import bench
out, gpus = pathlib.Path(sys.argv[1]), sys.argv[2]
latest = {}
for path in sorted(out.glob("runs/*/*.json")):
    run = json.loads(path.read_text())
    latest[run["label"]] = run
if latest:
    runs = list(latest.values())
    clients = [row["concurrency"] for row in runs[0]["levels"]]
    base = latest.get("tp") or runs[-1]
    lines = [f"{runs[0]['model'].rsplit('/', 1)[-1]}, {gpus} GPUs, dummy weights, {bench.title(runs[0])}", ""]
    heads = [f"{n} clients: output tokens/s | per token ms | against {base['label']}" for n in clients]
    lines += [f"| case | {' | '.join(heads)} |", "|---" + "|---:|---:|---:" * len(clients) + "|"]
    for label, run in latest.items():
        cells = [label]
        for row, other in zip(run["levels"], base["levels"]):
            key = "output_tokens_per_s"
            cells += [f"{row[key]:,.0f}", f"{row['median_tpot_ms']:.2f}", f"{row[key] / other[key]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")
    (out / "report.html").write_text(bench.as_html(runs, "Plans against what is started by hand"))
    print("\n".join(lines))
SUMMARY
}
trap 'stop; rm -rf "$work"' EXIT

failed=0
for name in "${cases[@]}"; do
  began=$SECONDS more=() settings=
  [[ $name != *@* ]] || IFS=, read -ra more <<<"${name#*@}"
  all_gpus=()
  [[ $gpus -eq 1 ]] || all_gpus=(--tensor-parallel-size "$gpus")
  if case ${name%%@*} in
      throughput | latency) play site "${name%%@*}" >"$out/$name.log" 2>&1 ;;
      seed1-planned)
        settings="\"tensor_parallel_size\": $gpus, \"max_model_len\": 32768, \"max_num_batched_tokens\": 65536,"
        play site throughput >"$out/$name.log" 2>&1
        ;;
      defaults) by_hand ;;
      tp) by_hand "${all_gpus[@]}" ;;
      seed0) by_hand "${all_gpus[@]}" --gpu-memory-utilization 0.85 --max-model-len 4096 ;;
      seed1)
        by_hand "${all_gpus[@]}" --gpu-memory-utilization 0.95 --dtype bfloat16 --max-model-len 32768 --block-size 64 \
          --enable-chunked-prefill --enable-prefix-caching --max-num-batched-tokens 65536
        ;;
      *) echo "bench: there is no case $name" && false ;;
    esac && up=$((SECONDS - began)) && play bench throughput >"$out/$name-bench.log" 2>&1; then
    echo "bench: $name: up after $up s, measured after $((SECONDS - began)) s"
  else
    failed=$((failed + 1))
    tail -n 40 "$out/$name.log" "$out/$name-bench.log" 2>/dev/null || true
    for log in "$work"/log/*.log; do [[ ! -f $log ]] || cp "$log" "$out/"; done
    echo "bench: $name FAILED after $((SECONDS - began)) s"
  fi
  stop
  summarize
done
[[ $failed -eq 0 ]]
