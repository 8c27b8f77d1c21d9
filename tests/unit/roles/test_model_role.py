# SPDX-License-Identifier: GPL-3.0-or-later
"""Role model: what it tells its modules."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

FETCH = Path(__file__).parents[3] / "roles/model/tasks/fetch.yml"


def test_old_revisions_are_looked_for_in_what_starts_services(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    (start,) = [task for task in yaml.safe_load(FETCH.read_text()) if task["name"].startswith("Start fetching")]
    patterns = render(start["baremetal.vllm.model_fetch"]["used_by"], **role_vars("model", "main"))
    files = role_vars("vllm", "main")
    own = [file["path"] for kind in ("venv", "container") for file in files[f"__vllm_{kind}_files"]]
    scripts = [path for path in own if path.endswith(".sh")]
    assert len(scripts) == 2
    svc = {"config_dir": files["vllm_config_dir"] + "/chat"}
    folders = [svc["config_dir"], render(files["__vllm_good_dir"], svc=svc)]
    names = [f"{folder}/{Path(path).name}" for folder in folders for path in scripts]
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)
    assert render(start["baremetal.vllm.model_fetch"]["used_by"], **role_vars("model", "main"), vllm_config_dir="/x")[
        0
    ].startswith("/x/*/")
