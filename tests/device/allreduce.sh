#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# The all-reduce of the interconnect's preflight on real GPUs: each GPU plays a host of its own, over sockets as between hosts.
#
#   tests/device/allreduce.sh PYTHON [nccl|gloo]     PYTHON has torch; two GPUs, or none for gloo
#
# Prints the figures of a sum of two, then what is said when the second one is stopped in the middle, and after how long.
# Ends with PASS, or with 1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${1:?usage: tests/device/allreduce.sh PYTHON [nccl|gloo]} backend=${2:-nccl}
# Not by NVLink or shared memory: two hosts have only the network.
export NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo NCCL_NVLS_ENABLE=0
port=29700 limit=60

rank() { # RANK
  CUDA_VISIBLE_DEVICES=$1 NCCL_HOSTID="host$1" "$python" roles/vllm/files/baremetal_allreduce.py --rank "$1" \
    --peer host0=127.0.0.1 --peer host1=127.0.0.1 --port "$port" --backend "$backend" --timeout "$limit"
}

"$python" roles/vllm/files/baremetal_allreduce.py --load
rank 1 >/dev/null &
sum=$(rank 0)
wait
echo "allreduce: $sum"
grep -q '"problems": \[\], "whole": "", "ms": ' <<<"$sum"

port=29701
began=$SECONDS
(
  rank 1 >/dev/null &
  # Its process of the sum is stopped once both have met: what a host does that hangs. Each of the two is a client of the store
  # that rank 0 keeps at the port, rank 0 first; one that is not there yet would be said not to have come.
  met() { (($(cat /proc/net/tcp /proc/net/tcp6 | grep -ciE ":$(printf '%04X' "$port") 01 ") >= 2)); }
  until met || ((SECONDS - began > limit)); do sleep 0.02; done
  sleep 0.2
  kill -STOP "$(pgrep -f -- "--child .1, 2, .127.0.0.1., $port" | head -n 1)"
  wait
) &
sum=$(rank 0)
took=$((SECONDS - began))
pkill -KILL -f -- "--child .1, 2, .127.0.0.1., $port" || true
wait
echo "allreduce: one hangs: said after $took s: $sum"
grep -q "host0 and host1 cannot compute together ($backend over their interconnect)" <<<"$sum"
[[ $took -le $limit ]]
echo PASS
