# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection as its users get it: what is in the artifact, what Galaxy would say, and that it works installed."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import checked, run

ROOT = Path(__file__).resolve().parents[2]
# What a user of the collection may need. Tests, tools and settings of this repository stay out (build_ignore).
WANTED = {
    *("CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md"),
    *("changelogs", "docs", "inventories", "meta", "playbooks", "plugins", "roles"),
    *("requirements.txt", "requirements.yml"),
}
PLUGINS = [
    (kind, path.stem)
    for kind, folder in (("module", "modules"), ("filter", "filter"))
    for path in sorted((ROOT / "plugins" / folder).glob("[!_]*.py"))
]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())


def test_artifact_holds_what_users_need(artifact: Path) -> None:
    with tarfile.open(artifact) as archive:
        names = archive.getnames()
    assert {name.split("/")[0] for name in names} <= WANTED
    for name in ("README.md", "playbooks/site.yml", "roles/vllm/tasks/main.yml", "meta/runtime.yml"):
        assert name in names
    assert artifact.stat().st_size < 2**21, "more than 2 MiB: something that does not belong there?"


def test_galaxy_importer(artifact: Path, tmp_path: Path) -> None:
    """What Galaxy checks at an upload. ansible-lint is a gate of its own, with this repository's settings."""
    settings = tmp_path / "galaxy-importer.cfg"
    settings.write_text("[galaxy-importer]\nrun_ansible_lint = False\ncheck_required_tags = True\n")
    output = checked(
        [sys.executable, "-m", "galaxy_importer.main", artifact], tmp_path, GALAXY_IMPORTER_CONFIG=str(settings)
    )
    print(output)
    assert "Importer processing completed successfully" in output
    assert not re.findall(r"^(?:WARNING|ERROR).*", output, re.MULTILINE)


@pytest.fixture(scope="module")
def documentation(installed_collection: Path) -> dict[str, dict[str, Any]]:
    """Kind -> full name -> what ansible-doc knows. One call a kind: each takes seconds."""
    told = {}
    for kind in {kind for kind, _ in PLUGINS}:
        names = [f"baremetal.vllm.{name}" for other, name in PLUGINS if other == kind]
        command = ["ansible-doc", "-t", kind, "--json", *names]
        output = run(command, installed_collection, ANSIBLE_COLLECTIONS_PATH=str(installed_collection)).stdout
        told[kind] = json.loads(output[output.index("{") :])
    return told


@pytest.mark.parametrize(("kind", "name"), PLUGINS)
def test_plugin_is_documented(documentation: dict[str, dict[str, Any]], kind: str, name: str) -> None:
    told = documentation[kind].get(f"baremetal.vllm.{name}")
    assert told and "error" not in told, told
    assert told["doc"]["short_description"]
    assert f"baremetal.vllm.{name}" in told["examples"], "the examples do not use it by its full name"
    assert told["return"]


def test_execution_environment(installed_collection: Path) -> None:
    """What ansible-builder reads from meta/execution-environment.yml and from the files that it names."""
    told = yaml.safe_load(checked(["ansible-builder", "introspect", installed_collection], installed_collection))
    assert [line.split("  #")[0] for line in told["python"]] == ["openai>=1.50"]
    assert [line.split("  #")[0] for line in told["system"]] == [
        "openssh-client [platform:dpkg]",
        "openssh-clients [platform:rpm]",
    ]


@pytest.mark.parametrize("role", ROLES)
def test_role_is_documented(installed_collection: Path, tmp_path: Path, role: str) -> None:
    text = checked(
        ["ansible-doc", "-t", "role", f"baremetal.vllm.{role}"],
        tmp_path,
        ANSIBLE_COLLECTIONS_PATH=str(installed_collection),
    )
    assert "ENTRY POINT: " in text


@pytest.fixture
def gpu_hosts(short_path: Path) -> Path:
    """A user's own inventory in the plain form, of this machine, in a folder that holds nothing else."""
    inventory = short_path / "mine" / "gpu_hosts"
    inventory.parent.mkdir()
    folders = ("vllm_root", "vllm_config_dir", "vllm_state_dir", "vllm_log_dir", "model_root")
    inventory.write_text(
        "[gpu]\n"
        f"node1 ansible_connection=local ansible_python_interpreter={sys.executable}\n\n"
        "[gpu:vars]\n"
        "ansible_become=false\n"
        'vllm_services=[{"name": "chat", "model": "random-llama", "source": "generated", "port": 18123}]\n'
        "vllm_runtime=venv\n"
        "vllm_service_manager=supervisor\n"
        "vllm_user={{ ansible_facts['user_id'] }}\n" + "".join(f"{name}={short_path / name}\n" for name in folders)
    )
    return inventory


def test_installed_playbooks(installed_collection: Path, gpu_hosts: Path) -> None:
    """From a folder with nothing but the inventory."""
    path = str(installed_collection)
    for playbook in ("site", "verify", "teardown"):
        command = ["ansible-playbook", f"baremetal.vllm.{playbook}", "-i", "gpu_hosts", "--list-tasks"]
        assert "TAGS: [" in checked(command, gpu_hosts.parent, ANSIBLE_COLLECTIONS_PATH=path)


def nothing_failed(output: str) -> bool:
    return bool(re.search(r"^node1 +: ok=[1-9].* unreachable=0 +failed=0 ", output, re.MULTILINE))


def test_installed_site_in_check_mode(installed_collection: Path, gpu_hosts: Path) -> None:
    command = ["ansible-playbook", "baremetal.vllm.site", "-i", "gpu_hosts", "--check"]
    assert nothing_failed(checked(command, gpu_hosts.parent, ANSIBLE_COLLECTIONS_PATH=str(installed_collection)))
    assert list(gpu_hosts.parent.parent.iterdir()) == [gpu_hosts.parent], "check mode made something"


def test_site_from_a_checkout(clone: Path, gpu_hosts: Path) -> None:
    """`ansible-playbook site.yml -i gpu_hosts`: the collection is found through the checkout's own ansible.cfg."""
    inventory = clone / "gpu_hosts"
    inventory.write_text(gpu_hosts.read_text())
    try:
        assert nothing_failed(checked(["ansible-playbook", "site.yml", "-i", "gpu_hosts", "--check"], clone))
    finally:
        inventory.unlink()


def test_not_installed(tmp_path: Path) -> None:
    """Elsewhere the names resolve to nothing: the tests above ran the installed files, not this checkout's."""
    done = run(
        ["ansible-playbook", "baremetal.vllm.site", "-i", "localhost,", "--list-tasks"], tmp_path, HOME=str(tmp_path)
    )
    assert done.returncode != 0
    assert "could not be found" in done.stdout
