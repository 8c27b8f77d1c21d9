# SPDX-License-Identifier: GPL-3.0-or-later
"""model_info on folders, and against a stand-in for a hub."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.module_utils import hubs, model_store, random_llama
from ansible_collections.baremetal.vllm.plugins.modules import model_info
from ansible_collections.baremetal.vllm.tests.fakes.hub import Fault, Hub
from ansible_collections.baremetal.vllm.tests.fakes.openai_server import OpenAiServer
from ansible_collections.baremetal.vllm.tests.fakes.server import Answer

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64}
REPO = "owner/tiny-1.0"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def model_files(**config: Any) -> dict[str, str | bytes]:
    return {
        "config.json": json.dumps({**CONFIG, **config}),
        "model-00001-of-00002.safetensors": b"a" * 3000,
        "model-00002-of-00002.safetensors": b"b" * 500,
        "pytorch_model.bin": b"c" * 7000,
        "original/consolidated.safetensors": b"d" * 9000,
        "tokenizer.json": "{}",
    }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.add(REPO, write(tmp_path / "repo", model_files()))
        yield hub


@pytest.fixture
def read(run_module: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """read(model, ..., endpoint=) -> the facts about one model."""

    def read(
        model: Any = REPO,
        endpoint: str = "http://127.0.0.1:9",
        token: str | None = None,
        settings: Any = None,
        **entry: Any,
    ) -> Any:
        params = {
            "models": [{"name": "chat", "model": model, **entry}],
            "root": str(tmp_path / "models"),
            **(settings or {}),
        }
        result = run_module(model_info, **params, endpoint=endpoint, token=token, timeout=2)
        assert result["changed"] is False
        facts = result["models"]["chat"]
        assert bool(facts["problem"]) != bool(facts["config"]), "either a problem or a configuration"
        assert "\n" not in facts["problem"]
        return facts

    return read


COMMIT = "c" * 40


def fetched(tmp_path: Path, stamp: Any = None, revision: str = "main", **config: Any) -> Path:
    """A folder as the role model leaves it, but for the stamp where one is given."""
    folder = write(tmp_path / "models" / REPO / COMMIT, model_files(**config))
    place = model_store.Place(str(tmp_path / "models"), {"model": REPO, "source": "huggingface", "revision": revision})
    files = [
        {"path": str(path.relative_to(folder)), "size": path.stat().st_size, "sha256": "0" * 64}
        for path in folder.rglob("*")
        if path.is_file()
    ]
    model_store.finish(str(folder), place, COMMIT, hubs.selection(["*"], [], False), files)
    model_store.flip(place, COMMIT)
    if stamp is not None:
        (folder / model_store.STAMP).write_text(stamp if isinstance(stamp, str) else json.dumps(stamp))
    return folder


def test_a_model_of_the_hub(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    facts = read(endpoint=hub.url)
    commit = hub.repositories[REPO].revisions["main"]
    files = {entry["path"]: entry for entry in facts.pop("files")}
    assert facts == {
        "bytes": sum(entry["size"] for entry in files.values()),
        "commit": commit,
        "config": CONFIG,
        "model": REPO,
        "path": f"{tmp_path}/models/{REPO}/{commit}",
        "present": False,
        "problem": "",
        "revision": "main",
        "source": "huggingface",
        "staged_bytes": 0,
        "unreachable": False,
        "weights_bytes": 3500,  # safetensors of the top folder; vLLM reads neither the .bin nor original/
    }
    assert "pytorch_model.bin" not in files, "the same weights once more"
    assert files["model-00002-of-00002.safetensors"]["sha256"] == hashlib.sha256(b"b" * 500).hexdigest()
    assert files["tokenizer.json"]["git"] == hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert not (tmp_path / "models").exists()


def test_what_is_left_at_the_hub(hub: Hub, read: Callable[..., Any]) -> None:
    def paths(**settings: Any) -> set[str]:
        return {entry["path"] for entry in read(endpoint=hub.url, settings=settings)["files"]}

    everything = set(model_files())
    assert paths() == everything - {"pytorch_model.bin"}
    assert paths(duplicates=True) == everything
    assert paths(exclude=["original/*"]) == everything - {"pytorch_model.bin", "original/consolidated.safetensors"}
    assert paths(include=["config.json", "tok*"]) == {"config.json", "tokenizer.json"}


def test_parts_of_a_model_in_folders_of_their_own(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    """A layer of sentence-transformers has weights of its own, in whatever format; Llama's `original` has the same ones once more."""

    def weights(name: str, *files: str) -> set[str]:
        hub.add(
            f"owner/{name}", write(tmp_path / name, {"config.json": json.dumps(CONFIG)} | dict.fromkeys(files, b"a"))
        )
        return {entry["path"] for entry in read(f"owner/{name}", endpoint=hub.url)["files"]} - {"config.json"}

    dense, other = "2_Dense/pytorch_model.bin", "2_Dense/model.safetensors"
    copies = ["pytorch_model.bin", "original/consolidated.00.pth"]
    assert weights("dense", "model.safetensors", dense, *copies) == {"model.safetensors", dense}
    assert weights("old", "pytorch_model.bin", other, dense) == {"pytorch_model.bin", other}


def test_a_second_copy_in_a_folder_of_ones_own_is_not_counted(read: Callable[..., Any], tmp_path: Path) -> None:
    files = {name: content for name, content in model_files().items() if "original" not in name}
    folder = write(tmp_path / "mistral", files | {"consolidated.safetensors": b"d" * 3500})
    assert read(str(folder))["weights_bytes"] == 3500
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).unlink()
    assert read(str(folder))["weights_bytes"] == 3500


def test_a_folder_that_lacks_some_of_its_weights(read: Callable[..., Any], tmp_path: Path) -> None:
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = {"weight_map": {f"layer.{n}": names[n % 3] for n in range(9)}}
    folder = write(tmp_path / "half", model_files() | {"model.safetensors.index.json": json.dumps(index)})
    assert read(str(folder))["problem"] == (
        f"{folder} lacks 3 of the 3 files that model.safetensors.index.json names ({', '.join(names)}): "
        "finish the download of the model"
    )
    write(folder, dict.fromkeys(names, b"a" * 10))
    assert read(str(folder))["present"] is True
    for path in folder.glob("model-*"):
        path.unlink()
    write(folder, {"consolidated.safetensors": b"d" * 99})
    assert read(str(folder))["weights_bytes"] == 99, "the index is that of files which were left out on purpose"


def test_a_link_that_leads_nowhere_on_a_share(read: Callable[..., Any], tmp_path: Path) -> None:
    share = write(tmp_path / "share", model_files())
    (share / ".lock").symlink_to("gone")
    (share / "README.md").symlink_to("gone")
    problem = read(f"file://{share}", source="http")["problem"]
    assert problem.endswith(
        f"{share}/README.md cannot be read: No such file or directory. Put it right, or take it away"
    )
    (share / "README.md").unlink()
    assert read(f"file://{share}", source="http")["weights_bytes"] == 3500


def test_a_revision_becomes_a_commit(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    commit = hub.add(REPO, write(tmp_path / "other", model_files(hidden_size=128)), revision="refs/pr/1")
    facts = read(endpoint=hub.url, revision="refs/pr/1")
    assert (facts["commit"], facts["revision"], facts["config"]["hidden_size"]) == (commit, "refs/pr/1", 128)
    assert read(endpoint=hub.url, revision=commit)["commit"] == commit


def test_a_mirror_below_a_path_and_a_slash_at_the_end(hub: Hub, read: Callable[..., Any]) -> None:
    assert read(endpoint=hub.url + "/")["problem"] == ""


def test_weights_without_safetensors(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    files = {"config.json": json.dumps(CONFIG), "pytorch_model.bin": b"c" * 70, "training_args.pt": b"d" * 9}
    hub.add("owner/old", write(tmp_path / "old", files))
    assert read("owner/old", endpoint=hub.url)["weights_bytes"] == 70


def test_a_complete_folder_needs_no_hub(read: Callable[..., Any], tmp_path: Path) -> None:
    path = fetched(tmp_path)
    facts = read()
    assert (facts["present"], facts["commit"], facts["weights_bytes"], facts["config"]) == (True, COMMIT, 3500, CONFIG)
    assert facts["path"] == str(path)
    assert read(revision=COMMIT)["present"] is True, "a revision may be the commit"


def test_a_branch_that_has_moved_on(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    fetched(tmp_path)
    assert read(endpoint=hub.url)["commit"] == COMMIT, "what is there stays"
    facts = read(endpoint=hub.url, settings={"update": True})
    assert (facts["present"], facts["commit"]) == (False, hub.repositories[REPO].revisions["main"])


def test_a_folder_that_was_changed_by_hand(read: Callable[..., Any], tmp_path: Path) -> None:
    path = fetched(tmp_path)
    (path / "tokenizer.json").write_text("{ }")
    (path / "model-00001-of-00002.safetensors").unlink()
    said = read()["problem"]
    assert said.startswith(f"{path} is not as it was fetched (")
    assert "tokenizer.json has 3 bytes and not 2" in said
    assert "model-00001-of-00002.safetensors: No such file or directory" in said
    assert "give model_repair=true to have it right again" in said
    facts = read(settings={"repair": True})
    assert (facts["problem"], facts["present"], facts["config"]) == ("", False, CONFIG)


def test_what_needs_no_room(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    """Of a model that is repaired or updated, what is there already will be linked."""
    path = fetched(tmp_path)
    stamp = json.loads((path / model_store.STAMP).read_text())
    for entry in stamp["files"]:
        entry["sha256"] = hashlib.sha256((path / entry["path"]).read_bytes()).hexdigest()
    (path / model_store.STAMP).write_text(json.dumps(stamp))
    (path / "model-00002-of-00002.safetensors").unlink()
    facts = read(settings={"repair": True})
    assert (facts["present"], facts["bytes"] - facts["staged_bytes"]) == (False, 500)
    facts = read(endpoint=hub.url, settings={"update": True})
    # The listing tells the hashes of weights alone.
    assert (facts["commit"], facts["staged_bytes"]) == (hub.repositories[REPO].revisions["main"], 3000 + 9000)
    place = model_store.Place(str(tmp_path / "models"), {"model": REPO, "source": "huggingface", "revision": "main"})
    write(Path(place.staging(facts["commit"])) / "files", {"model-00001-of-00002.safetensors": b"a" * 3000})
    again = read(endpoint=hub.url, settings={"update": True})
    assert again["staged_bytes"] == facts["staged_bytes"], "what is linked already counts once"
    # The folder is whole, and only the link to it is gone.
    (path / "model-00002-of-00002.safetensors").write_bytes(b"b" * 500)
    Path(place.link).unlink()
    facts = read(settings={"known": {"chat": {"commit": COMMIT, "files": [], "config": CONFIG}}})
    assert (facts["present"], facts["bytes"] - facts["staged_bytes"]) == (False, 0)


def test_another_selection_is_another_model(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    fetched(tmp_path)
    assert read(endpoint=hub.url, settings={"exclude": ["tok*"]})["present"] is False


def test_what_another_host_knows(read: Callable[..., Any], run_module: Callable[..., Any], tmp_path: Path) -> None:
    files = [{"path": "config.json", "size": 2, "sha256": "", "git": ""}]
    known = {"chat": {"commit": COMMIT, "files": files, "config": CONFIG}}
    facts = read(settings={"known": known})
    assert (facts["commit"], facts["config"], facts["files"], facts["present"]) == (COMMIT, CONFIG, files, False)


def test_a_read_only_target(hub: Hub, read: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store.os, "access", lambda path, mode: False)  # root may write everywhere
    assert (
        "cannot be written (no permission): mount it writable, or set model_root" in read(endpoint=hub.url)["problem"]
    )


@pytest.mark.parametrize("stamp", ["", "own"])
def test_a_folder_of_something_else_is_kept(hub: Hub, read: Callable[..., Any], tmp_path: Path, stamp: str) -> None:
    path = write(tmp_path / "models" / REPO, model_files())
    (path / model_store.STAMP).write_text(stamp)
    assert read(endpoint=hub.url)["problem"] == (
        f"{path} is there and is not revision main of {REPO} as this collection fetched it: move it away, or serve it "
        "as it is by giving its path as the model"
    )


@pytest.mark.parametrize("stamp", ["{", "[]", "null", {"format": 0}])
def test_a_stamp_that_is_none(read: Callable[..., Any], tmp_path: Path, stamp: Any) -> None:
    fetched(tmp_path, stamp)
    assert "cannot reach the hub" in read()["problem"]


@pytest.mark.parametrize(("model", "revision"), [("owner/nobody-has-this", "main"), (REPO, "v9")])
def test_not_to_be_had(hub: Hub, read: Callable[..., Any], model: str, revision: str) -> None:
    status = 401 if model != REPO else 404  # the hub tells strangers nothing
    assert read(model, endpoint=hub.url, revision=revision)["problem"] == (
        f"model {model} (revision {revision}) is not to be had from {hub.url}: HTTP {status}. Check the name, and for "
        "a gated model accept its licence there and give model_token"
    )


def test_gated(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    hub.add("meta/gated", write(tmp_path / "gated", model_files()), token="hf_right")
    assert "HTTP 401" in read("meta/gated", endpoint=hub.url)["problem"]
    refused = read("meta/gated", endpoint=hub.url, token="hf_wrong")
    assert "HTTP 403" in refused["problem"]
    assert read("meta/gated", endpoint=hub.url, token="hf_right")["config"] == CONFIG


def test_the_token_is_not_told(
    hub: Hub, run_module: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not even when a server repeats it."""
    hub.faults.append(Fault("/api/", status=503))
    for endpoint in (hub.url, "http://127.0.0.1:9", "hub.example/hf_right"):
        models = [{"name": "chat", "model": REPO}]
        result = run_module(model_info, models=models, root=str(tmp_path), endpoint=endpoint, token="hf_right")
        assert "hf_right" not in result["text"]
    assert "hf_right" not in "".join(capfd.readouterr())


def test_the_token_stays_with_the_hub(hub: Hub, read: Callable[..., Any]) -> None:
    """A mirror may send clients elsewhere; strangers get no token."""
    with Hub() as elsewhere:
        hub.faults.append(Fault("/resolve/", status=302, headers={"Location": f"{elsewhere.url}/config.json"}))
        assert "HTTP 404" in read(endpoint=hub.url, token="hf_secret")["problem"]
        assert [headers.get("Authorization") for _, _, headers in elsewhere.requests] == [None]
    assert {headers.get("Authorization") for _, _, headers in hub.requests} == {"Bearer hf_secret"}


def test_the_token_follows_a_renamed_model(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    hub.add("new/name", write(tmp_path / "gated", model_files()), token="hf_right")
    hub.faults.append(Fault("/api/models/old/", status=307, headers={"Location": "/api/models/new/name/revision/main"}))
    hub.faults.append(Fault("^/old/", status=307, headers={"Location": "/new/name/resolve/main/config.json"}))
    assert read("old/name", endpoint=hub.url, token="hf_right")["config"] == CONFIG


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (
            Fault("/api/", status=429, headers={"Retry-After": "1"}),
            "answers HTTP 429: try again later, or give another",
        ),
        (Fault("/api/", status=503), "answers HTTP 503: try again later"),
        (Fault("/api/", hang_up=True), "cannot reach the hub"),
        (Fault("/api/", cut_at=20), "cannot reach the hub"),
        (Fault("/resolve/", cut_at=5), "cannot reach the hub"),
        (Fault("/resolve/", stall_at=5), "cannot reach the hub"),
    ],
)
def test_hubs_in_trouble(hub: Hub, read: Callable[..., Any], fault: Fault, problem: str) -> None:
    hub.faults.append(fault)
    said = read(endpoint=hub.url)["problem"]
    assert problem in said
    assert "model_hub_endpoint" in said


def test_nobody_there(read: Callable[..., Any]) -> None:
    assert read()["problem"] == (
        f"cannot reach the hub http://127.0.0.1:9 for model {REPO} ([Errno 111] Connection refused): give "
        "model_hub_endpoint of a mirror, or the path of a local folder"
    )


@pytest.mark.parametrize("endpoint", ["hub.example", "", "file:///etc", "http://"])
def test_an_address_that_is_none(read: Callable[..., Any], endpoint: str) -> None:
    said = read(endpoint=endpoint)["problem"]
    assert f"model_hub_endpoint is {endpoint!r}" in said
    assert "https://" in said


def test_a_server_that_is_no_hub(read: Callable[..., Any]) -> None:
    with OpenAiServer() as server:
        path = f"/api/models/{REPO}/revision/main"
        for body in (b"<html>hello</html>", b"[]", b'"x"', b'{"sha": "1"}', b'{"siblings": [{}], "sha": "1"}'):
            server.overrides["GET", path] = Answer(body=body)
            assert read(endpoint=server.url)["problem"] == (
                f"{server.url} is no model hub: its answer has no list of files. Check model_hub_endpoint"
            )


def test_no_config(hub: Hub, read: Callable[..., Any], tmp_path: Path) -> None:
    hub.add("owner/adapter", write(tmp_path / "adapter", {"adapter_model.safetensors": b"x"}))
    assert read("owner/adapter", endpoint=hub.url)["problem"] == (
        "model owner/adapter holds no config.json: vLLM cannot serve it"
    )


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("{", "is no JSON"),
        ("", "is no JSON"),
        (b'{"x": "\xff\xfe"}', "is no"),
        ("[1]", "is no model's configuration"),
        ("{}", "is no model's configuration"),
    ],
)
def test_a_config_that_is_none(
    hub: Hub, read: Callable[..., Any], tmp_path: Path, config: str | bytes, problem: str
) -> None:
    folder = write(tmp_path / "odd", {"config.json": config, "model.safetensors": b"x"})
    commit = hub.add("owner/odd", folder)
    for facts, where in (
        (read("owner/odd", endpoint=hub.url), f"{hub.url}/owner/odd/resolve/{commit}/config.json"),
        (read(str(folder)), f"{folder}/config.json"),
    ):
        assert facts["problem"].startswith(f"{where} {problem}")


def test_a_folder(read: Callable[..., Any], tmp_path: Path) -> None:
    facts = read(str(write(tmp_path / "local", model_files())))
    assert (facts["source"], facts["path"], facts["present"], facts["commit"]) == (
        "path",
        f"{tmp_path}/local",
        True,
        "",
    )
    assert facts["weights_bytes"] == 3500


@pytest.mark.parametrize("make", ["nothing", "empty", "file", "dangling"])
def test_a_folder_without_a_model(read: Callable[..., Any], tmp_path: Path, make: str) -> None:
    folder = tmp_path / "local"
    if make == "empty":
        folder.mkdir()
    elif make == "file":
        folder.write_text("")
    elif make == "dangling":  # what a copied cache of the client looks like when its blobs stayed behind
        write(folder, {"config.json": json.dumps(CONFIG)})
        (folder / "model.safetensors").symlink_to("../blobs/gone")
    said = read(str(folder))["problem"]
    assert said.startswith(f"no model in {folder}: ")
    assert said.endswith("give the folder that holds config.json and the weights")


def test_a_folder_without_weights(read: Callable[..., Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "local", {"config.json": json.dumps(CONFIG)})
    assert read(str(folder))["problem"] == (
        f"{folder} has config.json and no weights (*.safetensors): finish the download of the model"
    )


def test_a_generated_model(read: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_llama, "tensor_bytes", lambda name, shape, generator: bytes(2 * math.prod(shape)))
    facts = read("random-llama", source="generated")
    assert (facts["present"], facts["config"], facts["path"]) == (
        False,
        random_llama.CONFIG,
        f"{tmp_path}/models/random-llama",
    )
    random_llama.write(facts["path"], 0)
    facts = read("random-llama", source="generated")
    assert facts["present"] is True
    size = Path(facts["path"], "model.safetensors").stat().st_size
    assert 0 < size - facts["weights_bytes"] < 4096  # the header
    Path(facts["path"], random_llama.MANIFEST).unlink()
    assert "exists and is no generated model" in read("random-llama", source="generated")["problem"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"model": None}, "service chat has no model: give owner/name or the path of a folder"),
        ({"model": ""}, "service chat has no model"),
        ({"model": ["a/b"]}, "service chat has no model"),
        ({"model": "gpt"}, "model gpt is no name for source huggingface: give owner/name"),
        ({"model": "a/b/c"}, "model a/b/c is no name for source huggingface"),
        ({"model": "../etc"}, "model ../etc is no name for source huggingface"),
        ({"model": "owner/.."}, "model owner/.. is no name for source huggingface"),
        ({"model": "owner/."}, "model owner/. is no name for source huggingface"),
        ({"model": "owner/name\n"}, "model owner/name is no name for source huggingface"),
        ({"model": "rel/path", "source": "path"}, "model rel/path is no name for source path"),
        ({"model": "a/b", "source": "generated"}, "model a/b is no name for source generated"),
        ({"model": "..", "source": "generated"}, "model .. is no name for source generated"),
        (
            {"model": "a/b", "source": "s3"},
            "source s3 of model a/b is not known: give one of generated, ",
        ),
        ({"model": "a/b", "source": ["path"]}, "of model a/b is not known"),
    ],
)
def test_bad_entries(read: Callable[..., Any], entry: dict[str, Any], problem: str) -> None:
    assert problem in read(**entry)["problem"]


def test_problems_do_not_hide_other_models(run_module: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "local", model_files())
    models = [{"name": "bad", "model": "gpt"}, {"name": "good", "model": f"{tmp_path}/local"}]
    result = run_module(model_info, models=models, root=str(tmp_path))
    assert [bool(result["models"][name]["problem"]) for name in ("bad", "good")] == [True, False]


@pytest.mark.client
class TestTheRealClient:
    """The stand-in speaks with the client that the role model installs; else tests of downloads would prove nothing."""

    @pytest.fixture
    def download(self, tool_environment: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
        hf = tool_environment("huggingface_hub==1.33.0") / "hf"

        def download(hub: Hub, *arguments: str, token: str = "") -> subprocess.CompletedProcess[str]:
            settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": hub.url}
            settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "2", "PATH": "/usr/bin:/bin"}
            command = [str(hf), "download", *arguments, "--local-dir", str(tmp_path / "out")]
            return subprocess.run(
                command,
                env=settings | ({"HF_TOKEN": token} if token else {}),
                capture_output=True,
                text=True,
                timeout=60,
            )

        return download

    def test_download(self, hub: Hub, download: Callable[..., Any], tmp_path: Path) -> None:
        commit = hub.repositories[REPO].revisions["main"]
        hub.faults.append(Fault("/cdn/", cut_at=100, times=1))  # the client tries again
        process = download(hub, REPO, "--revision", commit, "--exclude", "original/*")
        assert process.returncode == 0, process.stdout + process.stderr
        for name, content in model_files().items():
            path = tmp_path / "out" / name
            if name.startswith("original/"):
                assert not path.exists()
            else:
                assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert len([path for path in hub.paths() if path.startswith("/cdn/")]) == 4

    def test_refused(self, hub: Hub, download: Callable[..., Any], tmp_path: Path) -> None:
        hub.add("meta/gated", write(tmp_path / "gated", model_files()), token="hf_right")
        for arguments, token, words in (
            (("owner/nobody-has-this",), "", "not found"),
            (("meta/gated",), "hf_wrong", "requires approval"),
        ):
            process = download(hub, *arguments, token=token)
            assert process.returncode != 0
            assert words in (process.stdout + process.stderr).lower()

    def test_download_of_a_gated_model(self, hub: Hub, download: Callable[..., Any], tmp_path: Path) -> None:
        hub.add("meta/gated", write(tmp_path / "gated", model_files()), token="hf_right")
        process = download(hub, "meta/gated", "config.json", "model-00001-of-00002.safetensors", token="hf_right")
        assert process.returncode == 0, process.stdout + process.stderr
        assert (tmp_path / "out/model-00001-of-00002.safetensors").stat().st_size == 3000
        asked = [{name.lower() for name in headers} for _, path, headers in hub.requests if path.startswith("/cdn/")]
        assert asked and all("authorization" not in names for names in asked)


def test_the_stand_in_serves_parts_of_a_file(hub: Hub) -> None:
    def fetch(wanted: str) -> tuple[int, bytes, str]:
        url = f"{hub.url}/{REPO}/resolve/main/model-00001-of-00002.safetensors"
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, headers={"Range": wanted}))
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, answer.read(), answer.headers["Content-Range"]

    assert fetch("bytes=2990-") == (206, b"a" * 10, "bytes 2990-2999/3000")
    assert fetch("bytes=10-19") == (206, b"a" * 10, "bytes 10-19/3000")
    assert fetch("bytes=3000-")[::2] == (416, "bytes */3000")


SENTENCE = {"max_seq_length": 256, "do_lower_case": False}


@pytest.mark.parametrize(
    ("files", "length"),
    [
        ({"sentence_bert_config.json": SENTENCE}, 256),
        ({"sentence_xlm-roberta_config.json": {**SENTENCE, "max_seq_length": 8192}}, 8192),
        ({"sentence_bert_config.json": {"max_seq_length": 256}}, None),  # vLLM wants both
        ({"sentence_bert_config.json": {**SENTENCE, "max_seq_length": None}}, None),
        ({}, None),
    ],
)
def test_the_length_of_sentence_transformers(
    read: Callable[..., Any], tmp_path: Path, files: dict[str, Any], length: int | None
) -> None:
    """vLLM refuses a longer max_model_len than this file says, whatever config.json says."""
    folder = write(tmp_path / "repo", model_files() | {name: json.dumps(content) for name, content in files.items()})
    with Hub() as hub:
        hub.add(REPO, folder)
        for facts in (read(str(folder)), read(endpoint=hub.url)):
            assert facts["config"].get("sentence_max_seq_length") == length


def test_a_length_that_cannot_be_read(read: Callable[..., Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "repo", model_files() | {"sentence_bert_config.json": "{"})
    assert "sentence_bert_config.json is no JSON" in read(str(folder))["problem"]
