#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Runs gpu_facts through Ansible on this machine, which has GPUs, and writes its fact as JSON.
#
#   tests/device/gpu_facts.sh OUT.json [PYTHON...]
#
# With more than one PYTHON the module runs under each, and all must tell the same but for memory in use.
# Keep the result as tests/unit/plugins/modules/captures/NAME_gpu_facts.json: a test has the planner read what it finds there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$(realpath -m "${1:?usage: gpu_facts.sh OUT.json [PYTHON...]}")
shift
PATH=$PWD/.venv/bin:$PATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/play.yml" <<'PLAY'
- hosts: all
  gather_facts: false
  tasks:
    - baremetal.vllm.gpu_facts:
    - ansible.builtin.copy:
        content: "{{ ansible_facts['gpu'] | to_nice_json(indent=2) }}\n"
        dest: "{{ out }}.{{ inventory_hostname }}"
        mode: "0644"
      when: not ansible_check_mode
PLAY
pythons=("$@")
[[ ${#pythons[@]} -gt 0 ]] || pythons=("$(command -v python3)")
for number in "${!pythons[@]}"; do
  echo "run$number ansible_connection=local ansible_python_interpreter=${pythons[$number]}"
done >"$work/hosts"
export ANSIBLE_COLLECTIONS_PATH=$PWD/collections ANSIBLE_INJECT_FACT_VARS=false ANSIBLE_NOCOLOR=1
# A machine without a virtual environment: ANSIBLE_PLAYBOOK="python3 -m ansible playbook" and PYTHONPATH.
${ANSIBLE_PLAYBOOK:-ansible-playbook} -i "$work/hosts" -e "out=$work/gpu" "$work/play.yml"
for number in "${!pythons[@]}"; do
  python3 - "$work/gpu.run0" "$work/gpu.run$number" <<'COMPARE'
import json, sys
first, other = (json.load(open(path)) for path in sys.argv[1:])
for facts in (first, other):
    facts.pop("cpu"), facts.pop("processes")
    for gpu in facts["gpus"]:
        gpu.pop("memory_used_mib")
sys.exit("the interpreters do not tell the same" if first != other else 0)
COMPARE
done
cp "$work/gpu.run0" "$out"
python3 -c 'import json, sys; g = json.load(open(sys.argv[1])); print("gpu_facts:", g["state"], g["device"], len(g["gpus"]), "GPUs,", len(g["pci"]), "on PCI,", "problem:", g["problem"] or "none")' "$out"
