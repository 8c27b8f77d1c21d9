# SPDX-License-Identifier: GPL-3.0-or-later
"""The data below ``catalog/``, read once: engines, flags, architectures, GPUs and models."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).with_name("catalog")
# libyaml is ten times as fast, and not in every Python.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def load(name: str) -> dict[str, Any]:
    """One file of the catalog, such as ``load("gpus")``. The caller must not change what it gets."""
    with (FOLDER / f"{name}.yml").open(encoding="utf-8") as stream:
        data: dict[str, Any] = yaml.load(stream, Loader=_LOADER)  # noqa: S506 - a safe loader, see above
    return data


def model_entry(model: str) -> tuple[str, dict[str, Any]] | None:
    """Name and row of a model in models.yml: by its id, or by the last part of a path or of another publisher's id."""
    models: dict[str, dict[str, Any]] = load("models")["models"]
    if model in models:
        return model, models[model]
    last = model.rstrip("/").rsplit("/", 1)[-1].lower()
    found = [name for name in models if name.rsplit("/", 1)[-1].lower() == last]
    return (found[0], models[found[0]]) if len(found) == 1 else None
