# SPDX-License-Identifier: GPL-3.0-or-later
"""Modules run with the host's Python: 3.6 on EL 8, and whatever comes after it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import random_llama

# sha256 of the weights of seed 0. Raise random_llama.FORMAT when it changes: hosts keep what an older release wrote.
WEIGHTS = "4ff89d61486d70dc3e3c6d1f60633c1237b28d82c6b8265d44fccc52031de3bd"
ROOT = Path(__file__).parents[4]
SUPPORTED = [f"3.{minor}" for minor in range(6, 14)]
FILES = sorted((ROOT / "plugins/modules").glob("*.py")) + sorted((ROOT / "plugins/module_utils").glob("*.py"))
# Imports each file as the module that it is, with Ansible's part left empty, and prints what must not differ.
IMPORT = """
import hashlib, importlib, json, sys, types, warnings
warnings.simplefilter("error")  # a syntax that a later Python refuses is a warning first
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
for name in ("ansible", "ansible.module_utils", "ansible.module_utils.basic"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["ansible.module_utils.basic"].AnsibleModule = None
prefix = "ansible_collections.baremetal.vllm.plugins."
for name in sys.argv[2:]:
    importlib.import_module(prefix + name)
llama = sys.modules[prefix + "module_utils.random_llama"]
llama.CONFIG.update(intermediate_size=8, num_hidden_layers=1)  # the whole model takes seconds on each Python
print(hashlib.sha256(llama.safetensors(0) + json.dumps(llama.tokenizer(), sort_keys=True).encode()).hexdigest())
"""
# The modules that a preflight runs, and the one that writes the model, on every host with its own interpreter.
PLAY = """
- hosts: all
  gather_facts: false
  tasks:
    - baremetal.vllm.host_probe:
        paths: [/]
        ports: [9]
        pythons: [python3, /nowhere/python]
        files: [/etc/os-release]
        fingerprints: [/etc/os-release]
        pid_files: [/nowhere/pid]
      register: host_probe
    - baremetal.vllm.gpu_facts:
        own_paths: [/nowhere]
        nvidia_smi: "{{ nvidia_smi }}"
      register: gpu_facts
    - baremetal.vllm.random_model:
        path: "{{ out }}/{{ inventory_hostname }}/random-llama"
      register: random_model
    - baremetal.vllm.model_info:
        root: "{{ out }}/{{ inventory_hostname }}"
        endpoint: http://127.0.0.1:9
        models:
          - {name: generated, model: random-llama, source: generated}
          - {name: hub, model: a/b}
      register: model_info
    - baremetal.vllm.interconnect_probe:
        action: look
      register: look
    - baremetal.vllm.interconnect_probe:
        action: serve
        name: there
        addresses: [127.0.0.2]
        token: word
        seconds: 20
      register: serve
    - baremetal.vllm.interconnect_probe:
        action: measure
        token: word
        peers:
          - name: there
            address: 127.0.0.2
            source: 127.0.0.1
            port: "{{ serve.ports['127.0.0.2'] }}"
            mtu: 1500
            bandwidth: true
      register: measure
    - ansible.builtin.copy:
        content: >-
          {{ {'host_probe': host_probe, 'gpu_facts': gpu_facts, 'random_model': random_model, 'model_info': model_info,
              'look': look, 'measure': measure} | to_json }}
        dest: "{{ out }}/{{ inventory_hostname }}.json"
        mode: "0600"
"""


def names() -> list[str]:
    return [f"{path.parent.name}.{path.stem}" for path in FILES]


@pytest.fixture(scope="session")
def digests() -> set[str]:
    """What each Python has made of the same seed."""
    return set()


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_module_imports_and_the_model_is_the_same(
    pythons: dict[str, str], version: str, digests: set[str]
) -> None:
    if version not in pythons:
        pytest.skip(f"NOT TESTED on Python {version}: no such interpreter here (TEST_PYTHONS names a folder of them)")
    command = [pythons[version], "-c", IMPORT, str(ROOT / "collections"), *names()]
    process = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
    assert process.returncode == 0, process.stderr
    digests.add(process.stdout)
    assert len(digests) == 1


def play(ansible: Path, pythons: dict[str, str], folder: Path) -> dict[str, Any]:
    """Results of the modules, by Python version."""
    fake = ROOT / "tests/fakes/nvidia_smi.py"
    scene = {"gpus": [], "fail": [9, "NVIDIA-SMI has failed"]}
    (folder / "scene.json").write_text(json.dumps(scene))
    (folder / "play.yml").write_text(PLAY)
    hosts = {version: {"ansible_python_interpreter": path} for version, path in pythons.items()}
    (folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
    command = [str(ansible), "-i", f"{folder}/hosts.json", "-c", "local", f"{folder}/play.yml"]
    extra = ["-e", f"out={folder}", "-e", f"nvidia_smi={fake}"]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    settings |= {"ANSIBLE_COLLECTIONS_PATH": str(ROOT / "collections"), "NVIDIA_SMI_SCENE": f"{folder}/scene.json"}
    settings |= {"ANSIBLE_LOCAL_TEMP": f"{folder}/tmp", "ANSIBLE_REMOTE_TEMP": f"{folder}/remote", "LC_ALL": "C.UTF-8"}
    process = subprocess.run(command + extra, env=settings, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return {version: json.loads((folder / f"{version}.json").read_text()) for version in hosts}


def judge(results: dict[str, Any], folder: Path) -> None:
    for version, result in results.items():
        probe, gpu, made, info = (result[name] for name in ("host_probe", "gpu_facts", "random_model", "model_info"))
        assert probe["free_mib"]["/"] > 0, version
        assert "ID=" in probe["files"]["/etc/os-release"]
        assert probe["fingerprints"]["/etc/os-release"].endswith(" root")
        assert probe["listeners"] == {}
        assert probe["pids"] == {"/nowhere/pid": 0}
        assert len(probe["pythons"]) == 1
        assert gpu["ansible_facts"]["gpu"]["device"] == "cpu"
        assert gpu["ansible_facts"]["gpu"]["cpu"]["cores"] > 0
        assert made["changed"] is True
        models = info["models"]
        assert models["generated"]["present"] is True
        assert models["generated"]["config"] == random_llama.CONFIG
        assert "Connection refused" in models["hub"]["problem"]
        assert all(interface["mtu"] > 0 for interface in result["look"]["interfaces"])
        (way,) = result["measure"]["ways"]
        assert way["problem"] == "" and way["whole_mtu"] is True and way["mbps"] > 10, way
        written = folder / version / "random-llama"
        assert random_llama.current(str(written), 0)
        weights = (written / "model.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() == WEIGHTS, version


@pytest.mark.client
def test_modules_run_on_the_oldest_python(
    pythons: dict[str, str], tool_environment: Callable[..., Path], tmp_path: Path
) -> None:
    """ansible-core 2.16 is the last that manages hosts with Python 3.6 (EL 8); it needs 3.10 to 3.12 itself."""
    own = next((pythons[version] for version in ("3.11", "3.12", "3.10") if version in pythons), None)
    if not own or "3.6" not in pythons:
        pytest.skip("NOT TESTED on Python 3.6: it needs that, and one of 3.10 to 3.12 for ansible-core 2.16")
    environment = tool_environment("ansible-core==2.16.*", python=own)
    judge(play(environment / "ansible-playbook", {"3.6": pythons["3.6"]}, tmp_path), tmp_path)


def test_modules_run_on_the_newest_python(pythons: dict[str, str], tmp_path: Path) -> None:
    ansible = Path(sys.executable).with_name("ansible-playbook")
    newest = SUPPORTED[-1]
    if newest not in pythons:
        pytest.skip(f"NOT TESTED on Python {newest}: it is not here")
    judge(play(ansible, {newest: pythons[newest]}, tmp_path), tmp_path)
