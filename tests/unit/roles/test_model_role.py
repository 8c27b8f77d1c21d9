# SPDX-License-Identifier: GPL-3.0-or-later
"""Role model: what it tells its modules."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).parents[3] / "roles"
FETCH = ROLES / "model/tasks/fetch.yml"


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


def test_old_revisions_are_looked_for_in_what_engines_of_ray_serve(
    render: Callable[..., Any], role_vars: Callable[..., dict[str, Any]]
) -> None:
    """Where another host has the server, no script names the model."""
    (start,) = [task for task in yaml.safe_load(FETCH.read_text()) if task["name"].startswith("Start fetching")]
    patterns = render(start["baremetal.vllm.model_fetch"]["used_by"], **role_vars("model", "main"))
    kept = yaml.safe_load((ROLES / "vllm/tasks/multi_host_kept.yml").read_text())
    (record,) = [(task, item) for task in kept for item in task.get("loop", []) if "svc.model_path" in item["content"]]
    svc = {"config_dir": role_vars("vllm", "main")["vllm_config_dir"] + "/chat", "model_path": "/m/owner/name/1234"}
    path = render(record[0]["ansible.builtin.copy"]["dest"], svc=svc, item=record[1])
    assert any(fnmatch(path, pattern) for pattern in patterns), path
    assert render(record[1]["content"], svc=svc) == "/m/owner/name/1234\n"
