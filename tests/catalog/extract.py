# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes catalog/flags.yml and catalog/architectures.yml from vLLM's own source distributions.

    pip download --no-deps --no-binary vllm --no-build-isolation --no-clean vllm==0.32.0   # once a version
    python tests/catalog/extract.py SOURCES

SOURCES holds one unpacked source distribution a version, in folders named after the version (pip keeps the unpacked
source under $TMPDIR with --no-clean, even though building it fails without CUDA). Nothing is imported: the files
are read as syntax trees. Hand-written keys of flags.yml (``rewritten``, ``replacement``, ``note``) are kept.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CATALOG = Path(__file__).parents[2] / "plugins" / "plugin_utils" / "planner" / "catalog"
# Where the server's options are declared. Older and newer trees have only some of these.
OPTION_FILES = (
    "vllm/engine/arg_utils.py",
    "vllm/entrypoints/openai/api_server.py",
    "vllm/entrypoints/openai/cli_args.py",
    "vllm/entrypoints/launchers/cli_args.py",
    "vllm/entrypoints/common/cli_args.py",
    "vllm/entrypoints/cli/serve.py",
)
FRONTEND_CLASSES = {"BaseFrontendArgs", "FrontendArgs"}
REGISTRIES = (
    "vllm/model_executor/models/registry.py",
    "vllm/model_executor/models/__init__.py",
    "vllm/model_executor/model_loader.py",
)


def version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def is_bool(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation) in ("bool", "bool | None", "Optional[bool]")


def fields(tree: ast.Module, classes: set[str]) -> dict[str, ast.expr]:
    """Annotated fields of the named classes."""
    return {
        item.target.id: item.annotation
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def can_negate(call: ast.Call, engine_fields: dict[str, ast.expr]) -> bool:
    """Whether --no-FLAG exists too. Options that are spelled out say so; others take it from their field's type."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if "action" in keywords:
        return "BooleanOptionalAction" in ast.unparse(keywords["action"])
    long = next((arg.value for arg in call.args if isinstance(arg, ast.Constant) and arg.value.startswith("--")), "--")
    return None in keywords and is_bool(engine_fields.get(long[2:].replace("-", "_")))


def options(root: Path) -> Iterator[tuple[str, bool]]:
    """(flag, whether --no-FLAG exists) of every server option in one source tree."""
    engine_fields: dict[str, ast.expr] = {}
    for name in OPTION_FILES:
        path = root / name
        if not path.exists():
            continue
        tree = ast.parse(path.read_text())
        engine_fields |= fields(tree, {"EngineArgs", "AsyncEngineArgs"})
        for field, annotation in fields(tree, FRONTEND_CLASSES).items():
            yield f"--{field.replace('_', '-')}", is_bool(annotation)
        for call in ast.walk(tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            if call.func.attr != "add_argument":
                continue
            for arg in call.args:
                if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and arg.value.startswith("-"):
                    flag = arg.value if len(arg.value) < 3 or arg.value[1] != "-" else arg.value.replace("_", "-")
                    yield flag, can_negate(call, engine_fields)


def architectures(root: Path) -> Iterator[str]:
    """Names of the model classes in the registry: keys of its module-level dictionaries."""
    for name in REGISTRIES:
        path = root / name
        if not path.exists():
            continue
        for node in ast.parse(path.read_text()).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if not (isinstance(target, ast.Name) and isinstance(value, ast.Dict) and "MODELS" in target.id):
                continue
            # Tables of what is gone, of what runs elsewhere and of other hardware are no support.
            if any(word in target.id for word in ("PREVIOUSLY", "OOT", "ROCM", "PARTIALLY")):
                continue
            for key in value.keys:
                if isinstance(key, ast.Constant) and re.fullmatch(r"[A-Z]\w+", str(key.value)):
                    yield str(key.value)


def withdrawn(root: Path) -> dict[str, str]:
    """Model class -> last version that supports it, as the newest registry says of what it no longer has."""
    for node in ast.parse((root / REGISTRIES[0]).read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "_PREVIOUSLY_SUPPORTED_MODELS":
            table: dict[str, str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return table
    return {}


def ranges(seen: set[str], versions: list[str]) -> dict[str, str]:
    """first and last version; ``last`` is left out while the newest version still has it."""
    have = [version for version in versions if version in seen]
    row = {"first": have[0]}
    if have[-1] != versions[-1]:
        row["last"] = have[-1]
    holes = [
        version
        for version in versions
        if version_key(have[0]) < version_key(version) < version_key(have[-1]) and version not in seen
    ]
    if holes:
        row["except"] = holes  # type: ignore[assignment]
    return row


def dump(name: str, head: list[str], versions: list[str], key: str, rows: dict[str, Any]) -> None:
    """Writes one row a line, so that a new release shows as few changed lines."""
    lines = ["---", "# yamllint disable rule:line-length", *head, "versions_read:"]
    lines += [f"  - {version}" for version in versions]
    lines.append(f"{key}:")
    for row in sorted(rows):
        lines.append(f"  {row}: " + yaml.safe_dump(rows[row], width=10**6, default_flow_style=True).strip())
    (CATALOG / name).write_text("\n".join(lines) + "\n")


def main(sources: Path) -> None:
    roots = {path.name: path for path in sources.iterdir() if (path / "vllm").is_dir()}
    versions = sorted(roots, key=version_key)
    flags: dict[str, set[str]] = defaultdict(set)
    negatable: dict[str, set[str]] = defaultdict(set)
    models: dict[str, set[str]] = defaultdict(set)
    for version in versions:
        for flag, negates in options(roots[version]):
            flags[flag].add(version)
            if negates:
                negatable[flag].add(version)
        for name in architectures(roots[version]):
            models[name].add(version)

    old = yaml.safe_load((CATALOG / "flags.yml").read_text())["flags"] if (CATALOG / "flags.yml").exists() else {}
    table: dict[str, Any] = {}
    for flag, seen in flags.items():
        row: dict[str, Any] = ranges(seen, versions)
        if flag in negatable:
            row["negatable"] = min(negatable[flag], key=version_key)
        row |= {key: old[flag][key] for key in ("rewritten", "replacement", "note") if key in old.get(flag, {})}
        table[flag] = row
    dump(
        "flags.yml",
        [
            "# Options of vLLM's API server: the first and the last version that have them (no `last`: the newest).",
            "# negatable: --no-FLAG exists from that version on. except: versions between that lack the option.",
            "# rewritten: no option of its own any more, vLLM's parser makes that one of it (argparse_utils.py).",
            "# Source: arg_utils.py and cli_args.py of the source distributions, read by tests/catalog/extract.py;",
            "# `rewritten`, `replacement` and `note` are written by hand from vLLM's release notes and deprecation messages.",
        ],
        versions,
        "flags",
        table,
    )
    rows = {name: ranges(seen, versions) for name, seen in models.items()}
    for name, last in withdrawn(roots[versions[-1]]).items():
        if name in rows:
            rows[name]["last"] = last
    dump(
        "architectures.yml",
        [
            "# Model classes in vLLM's registry: the first and the last version that have them (the last as the newest",
            "# registry says it, where it does: some stay listed a little longer than they work).",
            "# Source: model_executor/models/registry.py of the same sources, read by tests/catalog/extract.py.",
        ],
        versions,
        "architectures",
        rows,
    )
    print(f"{len(versions)} versions, {len(table)} flags, {len(models)} architectures")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
