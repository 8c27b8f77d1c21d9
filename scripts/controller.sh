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

[ -f "$requirements" ] || stop "$requirements is not there: name a requirements file of this checkout"

# The same stamp for the same files, whichever checkout they lie in. requirements-dev.txt includes requirements.txt.
wanted="$requirements $(cat requirements.txt "$requirements" | cksum)"
stamp=.venv/.baremetal-$requirements
[ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && exit 0

new_enough() {
    # Run, not looked up: a name on PATH may be a shim for a version that is not there.
    "$1" -c "import sys; sys.exit(sys.version_info[:2] < tuple(map(int, '$minimum'.split('.'))))" 2>/dev/null
}
python=${PYTHON:-}
if [ -n "$python" ]; then
    found=$("$python" --version 2>/dev/null || echo "nothing that runs")
    new_enough "$python" || stop "PYTHON is $python, which is $found: set it to a Python $minimum or newer, or unset it"
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
        if new_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
fi
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
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if [ ! -x .venv/bin/pip ] && ! "$python" -m venv .venv >"$log" 2>&1; then
    rm -rf .venv
    stop "cannot make .venv with $python ($(tail -n 1 "$log")): make $PWD writable with room to spare, or set PYTHON to another one"
fi
if ! .venv/bin/pip install --quiet --disable-pip-version-check -r "$requirements" >"$log" 2>&1; then
    [ "${made:-no}" = no ] || rm -rf .venv
    reason=$(grep -v '^WARNING' "$log" | tail -n 1)
    stop "cannot install $requirements ($reason): check the network, or name a package mirror in pip's configuration"
fi
echo "$wanted" >"$stamp"
