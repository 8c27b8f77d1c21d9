#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# A real vLLM over a real Ray cluster on a machine with two GPUs and no network, as root.
#
#   tests/device/ray.sh PYTHON [WHEELS]
#
# PYTHON    an interpreter with vLLM. WHEELS: a folder with the wheel of Ray where that interpreter has none (without
#           ray/jars it is 46 MB: zip -qd ray-*.whl 'ray/jars/*' 'ray/rllib/*').
# OUT       folder for logs and figures (default: ./ray-out). LIMIT_S: for each start of a server (default 240).
#
# Three servers of the same weights, greedy: one GPU without Ray; TP 2 over one Ray node; PP 2 over two Ray nodes, each in a
# network namespace with one GPU and one end of a veth pair, or, where namespaces are refused, over one node. The nodes are
# started with the flags, the token and the environment of role ray_cluster, the servers behind its gate. Then the answers
# are compared, tokens per second are taken, and one Ray worker is killed: vLLM must end, and the gate must say why when a
# placement cannot be met. Ends with one line of JSON for each figure and PASS or FAIL.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${1:?usage: ray.sh PYTHON [WHEELS]}
wheels=${2:-}
out=${OUT:-$PWD/ray-out}
limit=${LIMIT_S:-240}
site=/tmp/ray-site
model=/tmp/ray-model
token=/tmp/ray-token
port=8100 failed=0
mkdir -p "$out"
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token CUDA_DEVICE_ORDER=PCI_BUS_ID
# Else Ray shows a line of several workers once.
export RAY_DEDUP_LOGS=0
export NCCL_NVLS_ENABLE=0 VLLM_CONFIG_ROOT=/tmp/ray-vllm-config

say() { echo "== $*"; }
fail() { say "FAIL: $*"; failed=1; }
ray() { "$python" -m ray.scripts.scripts "$@"; }

# Ray takes a node at a loopback address to be at the machine's own.
here=$(hostname -I | cut -d' ' -f1)
[[ -n $here ]] || { echo "ray.sh: this machine has no address but loopback, and Ray needs one"; exit 1; }

if [[ -n $wheels ]]; then
  mkdir -p "$site"
  for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$site" || exit 1; done
  chmod -R u+x "$site/ray/core"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
# Imported, as metadata says nothing of what Ray's wheel needs beside it; msgpack, which vLLM does not bring, it loads late.
"$python" - <<END || exit 1
import importlib.metadata as m, platform
import msgpack, ray.scripts.scripts
print("== python", platform.python_version(), "vllm", m.version("vllm"), "torch", m.version("torch"), "ray", m.version("ray"))
END
nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader
head -c 32 /dev/urandom | sha256sum | cut -c1-48 | tr -d '\n' >"$token"
chmod 600 "$token"

# A Llama of random weights that is large enough to show something: 24 layers of 2048.
MODEL=$model ROOT=$root "$python" - <<'END' || exit 1
import json, os, sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, os.environ["ROOT"] + "/plugins/module_utils")
import random_llama

folder = Path(os.environ["MODEL"])
if not (folder / "model.safetensors").exists():
    random_llama.write(str(folder), 0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
               "num_key_value_heads": 8, "head_dim": 128}
    torch.manual_seed(0)
    hidden, middle, kv, vocab = 2048, 5632, 8 * 128, config["vocab_size"]

    def weights(*shape):
        return (torch.randn(*shape) * 0.03).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": weights(vocab, hidden), "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
               "lm_head.weight": weights(vocab, hidden)}
    for layer in range(24):
        name = f"model.layers.{layer}."
        for key, shape in (("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (kv, hidden)),
                           ("self_attn.v_proj", (kv, hidden)), ("self_attn.o_proj", (hidden, hidden)),
                           ("mlp.gate_proj", (middle, hidden)), ("mlp.up_proj", (middle, hidden)),
                           ("mlp.down_proj", (hidden, middle))):
            tensors[name + key + ".weight"] = weights(*shape)
        for key in ("input_layernorm", "post_attention_layernorm"):
            tensors[name + key + ".weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(config))
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
END

# What Ray must not copy from the first host: the list of role vllm.
mkdir -p "$VLLM_CONFIG_ROOT"
python3 - "$root" >"$VLLM_CONFIG_ROOT/ray_non_carry_over_env_vars.json" <<'END' || exit 1
import ast, json, sys
tree = ast.parse(open(sys.argv[1] + "/plugins/plugin_utils/multi_host.py").read())
lists = [ast.literal_eval(node.value) for node in tree.body
         if isinstance(node, ast.Assign) and node.targets[0].id in ("PER_HOST", "OF_THE_SERVER")]
print(json.dumps(sorted({name for names in lists for name in names})))
END

cat >"$out/client.py" <<'END'
import concurrent.futures, json, sys, time, urllib.request as r
base, name = sys.argv[1:3]
opener = r.build_opener(r.ProxyHandler({}))
def ask(prompt, tokens, seed=None):
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = r.Request(base + "/v1/completions", json.dumps(body).encode(),
                        {"Content-Type": "application/json", "Authorization": "Bearer sk-test"})
    return json.loads(opener.open(request, timeout=120).read())["choices"][0]["text"]
answers = [ask(p, 32) for p in ("hello", "the quick brown fox", "one two three")]
figures = {"server": name}
for users in (1, 32):
    ask("warm", 16)
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(users) as pool:
        list(pool.map(lambda n: ask("request %d" % n, 128), range(users * 2)))
    figures["tokens_per_s_%d" % users] = round(users * 2 * 128 / (time.monotonic() - start), 1)
print(json.dumps(figures))
json.dump(answers, open(sys.argv[3], "w"))
END

within() { # name of a namespace or -: sets the words that a command starts with
  prefix=()
  [[ $1 == - ]] || prefix=(ip netns exec "$1")
}

node() { # namespace, name, address, gpus, head address or -
  local space=$1 name=$2 address=$3 gpus=$4 head=$5
  local role=(--head --port=6379 --include-dashboard=false --dashboard-host=127.0.0.1 --ray-client-server-port=6386)
  [[ $head == - ]] || role=(--address="$head:6379")
  local env=(CUDA_VISIBLE_DEVICES="$gpus" VLLM_HOST_IP="$address" RAY_gcs_rpc_server_reconnect_timeout_s=30)
  [[ $space == - ]] || env+=(NCCL_SOCKET_IFNAME="$name" GLOO_SOCKET_IFNAME="$name" NCCL_HOSTID="$name")
  local list
  IFS=, read -ra list <<<"$gpus"
  within "$space"
  "${prefix[@]}" env "${env[@]}" "$python" -m ray.scripts.scripts start --block --disable-usage-stats "${role[@]}" \
    --node-ip-address="$address" --node-manager-port=6380 --object-manager-port=6381 --dashboard-agent-listen-port=6382 \
    --dashboard-agent-grpc-port=6383 --runtime-env-agent-port=6384 --metrics-export-port=6385 --min-worker-port=10002 \
    --max-worker-port=10201 --object-store-memory=536870912 --temp-dir="/tmp/r$name" --num-gpus="${#list[@]}" --num-cpus=8 \
    >"$out/node-$name.log" 2>&1 &
  local pid=$! began=$SECONDS
  # It says so once it is in the cluster; its ports are open before. What it does not say in time, the gate judges.
  until grep -q 'Ray runtime started' "$out/node-$name.log" || ((SECONDS - began > 60)); do
    if ! kill -0 "$pid" 2>/dev/null; then
      fail "Ray's node $name has ended"
      tail -n 5 "$out/node-$name.log" | cut -c1-300
      return 1
    fi
    sleep 0.5
  done
}

server() { # namespace, name, address, parallel flags and environment in arrays flags, gate, more; runs on where all went well
  local space=$1 name=$2 address=$3
  started=$SECONDS
  within "$space"
  if "${prefix[@]}" curl -sf --noproxy '*' "http://$address:$port/health" >/dev/null; then
    fail "something answers at $address:$port before $name is started"
    return 1
  fi
  "${prefix[@]}" env VLLM_API_KEY=sk-test VLLM_HOST_IP="$address" "${more[@]}" "${gate[@]}" "$python" \
    -m vllm.entrypoints.openai.api_server --model "$model" --served-model-name m --host "$address" --port "$port" \
    --max-model-len 2048 --gpu-memory-utilization 0.5 --enforce-eager "${flags[@]}" >"$out/server-$name.log" 2>&1 &
  pid=$!
  until "${prefix[@]}" curl -sf --noproxy '*' "http://$address:$port/health" >/dev/null; do
    if ! kill -0 "$pid" 2>/dev/null || ((SECONDS - started > limit)); then
      fail "$name does not answer"
      tail -n 30 "$out/server-$name.log"
      end_server
      return 1
    fi
    sleep 1
  done
  echo "{\"server\": \"$name\", \"start_s\": $((SECONDS - started))}" | tee -a "$out/figures.jsonl"
  "${prefix[@]}" "$python" "$out/client.py" "http://$address:$port" "$name" "$out/answers-$name.json" 2>"$out/client-$name.log" |
    tee -a "$out/figures.jsonl" || {
    fail "$name does not answer all requests: $(tail -n 1 "$out/client-$name.log")"
    tail -n 15 "$out/server-$name.log"
    end_server
    return 1
  }
}

end_server() {
  kill "$pid" 2>/dev/null
  for _ in $(seq 120); do kill -0 "$pid" 2>/dev/null || break; sleep 0.25; done
  kill -KILL "$pid" 2>/dev/null && fail "the server did not end within 30 s"
  wait "$pid" 2>/dev/null
  for _ in $(seq 60); do
    nvidia-smi --query-compute-apps=pid --format=csv,noheader | grep -q . || return 0
    sleep 0.5
  done
  fail "the server has ended and something holds a GPU"
}
end_ray() {
  ray stop --force >/dev/null 2>&1
  for _ in $(seq 40); do pgrep -x raylet >/dev/null || pgrep -x gcs_server >/dev/null || break; sleep 0.25; done
}
trap 'end_ray; ip netns del ra 2>/dev/null; ip netns del rb 2>/dev/null' EXIT

say "one GPU, no Ray"
gate=() flags=() more=(CUDA_VISIBLE_DEVICES=0)
server - one "$here" && end_server

say "TP 2 over one Ray node"
node - single "$here" 0,1 -
gate=("$python" "$root/roles/ray_cluster/files/baremetal_ray_gate.py" --wait 60 --node "single=$here=2" --)
flags=(--tensor-parallel-size 2 --distributed-executor-backend ray --disable-custom-all-reduce)
more=(RAY_ADDRESS="$here":6379)
if server - tp2 "$here"; then
  RAY_ADDRESS="$here":6379 timeout 60 "$python" -m ray.scripts.scripts status 2>&1 | tee "$out/ray-status-tp2.txt" | grep -E "GPU|node_"
  victim=$(pgrep -f 'ray::RayWorkerProc|RayWorkerProc' | head -n 1)
  killed=$SECONDS
  kill -KILL "$victim" 2>/dev/null || fail "no Ray worker of vLLM was found"
  for _ in $(seq 90); do kill -0 "$pid" 2>/dev/null || break; sleep 1; done
  if kill -0 "$pid" 2>/dev/null; then fail "vLLM lives on without its worker"; end_server; else
    echo "{\"server\": \"tp2\", \"end_after_worker_killed_s\": $((SECONDS - killed))}" | tee -a "$out/figures.jsonl"
  fi
fi
say "a placement that cannot be met"
began=$SECONDS
RAY_ADDRESS="$here":6379 timeout 90 "$python" "$root/roles/ray_cluster/files/baremetal_ray_gate.py" --wait 30 --node "single=$here=3" -- /bin/true
code=$?
[[ $code == 78 ]] && echo "{\"refused_after_s\": $((SECONDS - began))}" | tee -a "$out/figures.jsonl" || fail "the gate ended with $code, not 78"
end_ray

if ip netns add ra 2>/dev/null && ip netns add rb && ip link add va netns ra type veth peer name vb netns rb; then
  for pair in "ra va 10.99.0.1" "rb vb 10.99.0.2"; do
    read -r space link address <<<"$pair"
    ip -n "$space" addr add "$address/24" dev "$link"
    ip -n "$space" link set "$link" up
    ip -n "$space" link set lo up
  done
  say "PP 2 over two Ray nodes in network namespaces"
  node ra va 10.99.0.1 0 -
  node rb vb 10.99.0.2 1 10.99.0.1
  space=ra address=10.99.0.1
  gate=("$python" "$root/roles/ray_cluster/files/baremetal_ray_gate.py" --wait 60 --node va=10.99.0.1=1 --node vb=10.99.0.2=1 --)
  more=(RAY_ADDRESS=10.99.0.1:6379 NCCL_SOCKET_IFNAME=va GLOO_SOCKET_IFNAME=va)
else
  say "network namespaces are refused: PP 2 over one Ray node"
  node - single "$here" 0,1 -
  space=- address=$here
  gate=("$python" "$root/roles/ray_cluster/files/baremetal_ray_gate.py" --wait 60 --node "single=$here=2" --)
  more=(RAY_ADDRESS="$here":6379)
fi
flags=(--pipeline-parallel-size 2 --distributed-executor-backend ray)
if server "$space" pp2 "$address"; then
  within "$space"
  "${prefix[@]}" env RAY_ADDRESS="$address:6379" timeout 60 "$python" -m ray.scripts.scripts status 2>&1 | tee "$out/ray-status-pp2.txt" | grep -E "GPU|node_"
  end_server
fi
end_ray

say "answers"
python3 - "$out" <<'END' || failed=1
import json, pathlib, sys
answers = {path.stem.split("-")[1]: json.loads(path.read_text()) for path in pathlib.Path(sys.argv[1]).glob("answers-*.json")}
print({name: [answer[:24] for answer in texts] for name, texts in answers.items()})
same = {name: sum(a == b for a, b in zip(texts, answers["one"])) for name, texts in answers.items()}
print("equal to one GPU, of 3:", same)
# Stages compute the same sums in the same order; TP splits them, so that the last digits may differ.
sys.exit(0 if same.get("pp2") == 3 and "tp2" in same else 1)
END
for name in tp2 pp2; do
  say "$name: what its log says of Ray, ranks, NCCL and memory"
  sed 's/\x1b\[[0-9;]*m//g' "$out/server-$name.log" 2>/dev/null | grep -E \
    '^placement: .* here|Connected to Ray|placement group|world_size=|vLLM is using nccl|Model loading took|GPU KV cache size' | cut -c1-200
done
cat "$out/figures.jsonl"
[[ $failed == 0 ]] && echo PASS || { echo FAIL; exit 1; }
