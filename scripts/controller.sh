#!/bin/sh
# Makes the controller's environment (.venv) from a requirements file, or leaves it alone when it is current.
# usage: scripts/controller.sh requirements.txt
set -eu
cd "$(dirname "$0")/.."
requirements=$1
# The oldest Python that a supported ansible-core runs on; see meta/runtime.yml.
minimum=3.10

stop() {
    echo "baremetal.vllm: $1" >&2
    exit 1
}

# The same stamp for the same files, whichever checkout they lie in. requirements-dev.txt includes requirements.txt.
wanted="$requirements $(cat requirements.txt "$requirements" | cksum)"
stamp=.venv/.baremetal-$requirements
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

python=
for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
    # Run, not looked up: a name on PATH may be a shim for a version that is not there.
    if "$candidate" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$minimum'.split('.'))))" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=$(python3 --version 2>/dev/null || echo "no python3")
    stop "Python $minimum or newer is needed and $found was found: install one (Debian, Ubuntu: apt-get install python3-venv) or set PYTHON"
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null \
    || stop "$python cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"

free_mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
[ "$free_mib" -ge 1024 ] || stop "$PWD has $free_mib MiB free and the controller needs 1024: make room"

# A broken environment is not repaired but made anew; a failed one is not left behind.
[ -f .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || { rm -rf .venv; made=yes; }
echo "Making the controller's environment in .venv (a minute)"
[ -x .venv/bin/pip ] || "$python" -m venv .venv
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements" >"$log" 2>&1; then
    [ "${made:-no}" = no ] || rm -rf .venv
    reason=$(grep -v '^WARNING' "$log" | tail -n 1)
    stop "cannot install $requirements ($reason): check the network, or name a package mirror in pip's configuration"
fi
echo "$wanted" >"$stamp"
