#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Proves that a container sees the GPUs, and that it still does after systemctl daemon-reload, which takes them away where the engine
# gives them by other means than CDI. The image is made of this host's own shell and C library, so that no registry is needed.
# Arguments: how many GPUs there are, or `listed` for as many as nvidia-smi lists here, then the options by which docker run gives all of
# them.
set -eu
wanted=$1
shift
if [ "$wanted" = listed ]; then
  wanted=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU [0-9]' || true)
fi
# Of this run alone: another may prove the same at the same moment.
name=baremetal-gpu-acceptance-$$
image=baremetal-gpu-acceptance:$$
folder=$(mktemp -d)
trap 'rm -rf "$folder"; docker rm --force "$name" >/dev/null 2>&1 || true; docker rmi --force "$image" >/dev/null 2>&1 || true' EXIT

for program in /bin/sh "$(command -v sleep)" "$(command -v nvidia-smi)"; do
  for file in "$program" $(ldd "$program" 2>/dev/null | grep -oE '/[^ )]+'); do
    # nvidia-smi itself and the driver's libraries are what CDI has to bring.
    case "$(basename "$file")" in nvidia-smi | *nvidia* | libcuda*) continue ;; esac
    mkdir -p "$folder$(dirname "$file")"
    cp -L "$file" "$folder$file"
  done
done
# What nvidia-smi opens by name.
for library in libdl.so.2 libpthread.so.0 librt.so.1 libm.so.6; do
  path=$(ldconfig -p | awk -v name="$library" '$1 == name && /x86-64|AArch64/ {print $NF; exit}')
  if [ -n "$path" ]; then
    mkdir -p "$folder$(dirname "$path")"
    cp -L "$path" "$folder$path"
  fi
done
tar -C "$folder" -c . | docker import - "$image" >/dev/null
docker rm --force "$name" >/dev/null 2>&1 || true
docker run --detach --name "$name" --network none "$@" "$image" /bin/sh -c 'sleep 600' >/dev/null

seen() {
  docker exec "$name" nvidia-smi -L 2>&1 || true
}

before=$(seen)
count=$(echo "$before" | grep -c '^GPU [0-9]' || true)
if [ "$count" != "$wanted" ] || [ "$count" = 0 ]; then
  echo "a container sees $count of $wanted GPUs: $before" >&2
  exit 1
fi
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload
fi
after=$(seen)
if [ "$before" != "$after" ]; then
  echo "a container loses the GPUs after systemctl daemon-reload: $after" >&2
  exit 1
fi
echo "a container sees $count GPUs, after systemctl daemon-reload too"
