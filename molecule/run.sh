#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs molecule scenarios one after the other and ends with one line of counts.
#
#   molecule/run.sh [SCENARIO...]     without an argument all of them but those with a file `slow`
#
# Installs and starts Docker Engine on this machine by the collection's own role where none answers. What a scenario
# prints goes to .cache/molecule/SCENARIO.log; of one that fails, the end is shown here too.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
[[ -d .venv/bin ]] && PATH=$PWD/.venv/bin:$PATH
logs=.cache/molecule
mkdir -p "$logs"
export MOLECULE_COMMAND_BORDERS=false NO_COLOR=1 PYTHONUNBUFFERED=1
BAREMETAL_TEST_PIP_ARGUMENTS=$(python3 molecule/shared/pip_here.py --run-arguments)
export BAREMETAL_TEST_PIP_ARGUMENTS

scenarios=("$@")
if [[ ${#scenarios[@]} -eq 0 ]]; then
  for file in molecule/*/molecule.yml; do
    folder=$(dirname "$file")
    [[ -f $folder/slow ]] || scenarios+=("$(basename "$folder")")
  done
fi
for scenario in "${scenarios[@]}"; do
  if [[ ! -f molecule/$scenario/molecule.yml ]]; then
    echo "there is no scenario '$scenario': molecule/ has $(cd molecule && echo */molecule.yml | sed 's|/molecule.yml||g')" >&2
    exit 2
  fi
done

if ! docker version >/dev/null 2>&1; then
  echo "molecule: no Docker Engine answers here, installing and starting one"
  if ! ansible-playbook -i localhost, tests/integration/docker_here.yml >"$logs/docker_here.log" 2>&1; then
    tail -n 40 "$logs/docker_here.log"
    echo "molecule: 0 passed, ${#scenarios[@]} failed"
    exit 1
  fi
fi

passed=0 failed=0
for scenario in "${scenarios[@]}"; do
  started=$SECONDS
  if molecule test --scenario-name "$scenario" >"$logs/$scenario.log" 2>&1 </dev/null &&
    python3 molecule/shared/honest.py "$logs/$scenario.log" >>"$logs/$scenario.log" 2>&1; then
    passed=$((passed + 1))
    echo "molecule: $scenario passed in $((SECONDS - started)) s ($(grep -Eo '[0-9]+ passed.* in ' "$logs/$scenario.log" | tail -n 1)its tests)"
  else
    failed=$((failed + 1))
    echo "molecule: $scenario FAILED after $((SECONDS - started)) s; the end of $logs/$scenario.log:"
    tail -n 60 "$logs/$scenario.log"
  fi
done
echo "molecule: $passed passed, $failed failed"
[[ $failed -eq 0 ]]
