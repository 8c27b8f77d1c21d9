# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables agree with themselves, with the extraction script, and with the real parser of an installed vLLM."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner import engine as engines
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.model import parse_config
from ansible_collections.baremetal.vllm.plugins.plugin_utils.planner.tables import FOLDER, load, model_entry

ROWS = [(name, row) for name in ("gpus", "engines") for row in load(name)[name]]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yml")))
def test_every_file_is_plain_yaml(name: str) -> None:
    assert load(name) == yaml.safe_load((FOLDER / f"{name}.yml").read_text())


def test_every_row_has_a_source() -> None:
    for name, row in ROWS:
        assert row["source"], (name, row)
    for name, row in load("models")["models"].items():
        assert row["source"], name
    for name, row in load("engines")["cuda"].items():
        assert row["source"], name


def test_no_release_is_listed_twice_and_all_rows_agree_with_the_tables() -> None:
    listed = [str(version) for row in load("engines")["engines"] for version in row["versions"]]
    assert len(listed) == len(set(listed))
    for row in load("engines")["engines"]:
        assert row["cuda"] in load("engines")["cuda"]
        assert row["batching"] in load("engines")["batching"]
        assert set(row["executors"]) <= {"mp", "ray"}
        assert row["generation"] in ("V0", "V1")
        assert row["entrypoint"] in ("serve", "api_server")
    # Every release whose flags were read can be planned for.
    assert set(load("flags")["versions_read"]) <= set(listed)


def test_replacements_are_flags_that_exist() -> None:
    flags = load("flags")["flags"]
    for name, row in flags.items():
        if "replacement" in row:
            assert row["replacement"].split()[0] in flags, name


def test_gpu_names_do_not_clash() -> None:
    names = [
        re.sub(r"[\s_-]+", "", name).lower()
        for row in load("gpus")["gpus"]
        for name in (row["name"], *row.get("aliases", ()))
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", sorted(load("models")["models"]))
def test_every_model_can_be_parsed_and_served_by_some_release(name: str) -> None:
    row = load("models")["models"][name]
    shape = parse_config(row["config"], weights_gib=row.get("weights_gib"))
    assert shape.parameters > 0
    able = [v for v in engines.versions() if not engines.architecture_problem(engines.get(v), shape.architecture)]
    assert able, shape.architecture
    for flag in engines.flag_names([str(flag) for flag in row.get("flags", ())]):
        assert engines.has_flag(able[-1], flag), flag


def test_a_model_is_found_by_its_id_its_path_and_another_publisher() -> None:
    for name in (
        "Qwen/Qwen2.5-14B",
        "/Data/Qwen/Qwen2.5-14B",
        "/Data/Qwen/Qwen2.5-14B/",
        "qwen2.5-14b",
        "me/QWEN2.5-14B",
    ):
        found = model_entry(name)
        assert found and found[0] == "Qwen/Qwen2.5-14B", name
    assert model_entry("Qwen/Qwen2.5-14B-GPTQ") is None


def test_flags_are_exactly_those_of_the_installed_vllm(ask_vllm: Any) -> None:
    version, options, _ = ask_vllm([])
    real = {name for name in options if not name.startswith("--no-")} - {"-h", "--help"}
    assert {name for name in load("flags")["flags"] if engines.has_flag(version, name)} == real
    negated = {f"--{name[5:]}" for name in options if name.startswith("--no-")}
    assert {name for name in real if engines.has_flag(version, f"--no-{name[2:]}")} == negated


def test_pci_ids_are_of_one_gpu_and_agree_with_their_architecture() -> None:
    data = load("gpus")
    ids = [(device, row) for row in data["gpus"] for device in row.get("pci", ())]
    assert len({device for device, _row in ids}) == len(ids)
    for device, row in ids:
        (generation,) = (
            one
            for one in data["architectures"]
            if any(int(low, 16) <= int(device, 16) <= int(high, 16) for low, high in one["pci"])
        )
        assert generation["module"] == row["module"], row["name"]
        assert generation.get("last_driver_branch") == row.get("last_driver_branch"), row["name"]
