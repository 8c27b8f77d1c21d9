# SPDX-License-Identifier: GPL-3.0-or-later
"""container_image with a stand-in for the program docker, as strict as that about what it is asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ansible_collections.baremetal.vllm.plugins.modules import container_image

# Its images, registry and failures are in a file; what it was asked goes to another.
STANDIN = """#!/usr/bin/env python3
import json, re, sys
folder = {folder!r}
state = json.load(open(folder + "/state"))
args = sys.argv[1:]
open(folder + "/asked", "a").write(json.dumps(args) + "\\n")
def end(code, out="", err=""):
    json.dump(state, open(folder + "/state", "w"))
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.exit(code)
if args[:2] == ["image", "inspect"] and args[2:4] == ["--format", "{{{{.Id}}}}"] and len(args) == 5:
    if args[4] in state["images"]:
        end(0, state["images"][args[4]] + "\\n")
    end(1, "\\n", "Error: No such image: %s\\n" % args[4])
if args[:3] == ["load", "--quiet", "--input"] and len(args) == 4:
    content = open(args[3]).read()
    if not content.startswith("image "):
        end(1, "", "open /var/lib/docker/tmp/x/manifest.json: no such file or directory\\n")
    name, identity = (content.split() + ["loaded"])[1:3]
    state["images"][name] = "sha256:" + identity
    end(0, "Loaded image: %s\\n" % name)
if args[:2] == ["pull", "--quiet"] and len(args) == 3:
    if state["failures"]:
        end(1, "", "a hint\\n" + state["failures"].pop(0) + "\\n")
    if args[2] not in state["registry"]:
        end(1, "", "Error response from daemon: manifest for %s not found: manifest unknown\\n" % args[2])
    state["images"][args[2]] = state["registry"][args[2]]
    end(0, args[2] + "\\n")
def option(name):
    return [word.partition("=")[2] for word in args if word.startswith(name + "=")]
held, labels, boxes = (state.setdefault(key, {{}}) for key in ("held", "labels", "boxes"))
if args[:3] == ["image", "inspect", "--format"] and len(args) == 5:
    identity = state["images"].get(args[4])
    if not identity:
        end(1, "\\n", "Error: No such image: %s\\n" % args[4])
    if args[3] == "{{{{json .Config}}}}":
        end(0, json.dumps({{"Entrypoint": ["vllm", "serve"], "Cmd": None, "User": "", "Env": ["PATH=/x"]}}) + "\\n")
    if args[3] == '{{{{.Id}}}} {{{{index .Config.Labels "baremetal.vllm.made_of"}}}}':
        end(0, "%s %s\\n" % (identity, labels.get(identity, "")))
if args[0] == "run" and option("--entrypoint") == ["python3"]:
    image = state["images"][args[args.index("-c") - 1]]
    missing = set(args[args.index("-c") + 2 :]) - set(held.get(image, []))
    end(1 if missing else 0)
if args[0] == "run" and option("--entrypoint") == ["/bin/sh"] and "--interactive" in args:
    script = sys.stdin.read()
    words = re.search("^set -- (.*)$", script, re.M).group(1).replace("'", "").split()
    (name,) = option("--name")
    boxes[name] = [word for word in words if "==" in word]
    open(folder + "/script", "w").write(script)
    end(*state.pop("install", [0]))
if args[0] == "commit":
    name, image = args[-2:]
    changes = [after for word, after in zip(args, args[1:]) if word == "--change"]
    assert changes[1:] == ["USER 0", 'ENTRYPOINT ["vllm", "serve"]', "CMD []"], changes
    identity = "sha256:made-of-" + name
    state["images"][image], held[identity] = identity, boxes[name]
    labels[identity] = json.loads(changes[0].partition("=")[2])
    end(0, identity + "\\n")
if args[0] == "tag" and len(args) == 3:
    state["images"][args[2]] = state["images"][args[1]]
    end(0)
if args[:3] == ["rm", "--force", "--volumes"] and len(args) == 4:
    boxes.pop(args[3], None)
    end(0)
end(125, "", "unknown command: docker %s\\n" % " ".join(args))
"""
NAME = "registry.example.com/vllm/vllm-openai:v0.25.1"


class Docker:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = {"images": {}, "registry": {NAME: "sha256:pulled"}, "failures": []}
        program = folder / "bin/docker"
        program.parent.mkdir()
        program.write_text(STANDIN.format(folder=str(folder)))
        program.chmod(0o755)
        (folder / "asked").write_text("")

    def asked(self) -> list[str]:
        return [json.loads(line)[0] for line in (self.folder / "asked").read_text().splitlines()]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(container_image.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(container_image, "STAMP", str(tmp_path / "var/images.json"))
    return Docker(tmp_path)


@pytest.fixture
def have(run_module: Callable[..., dict[str, Any]], docker: Docker) -> Callable[..., dict[str, Any]]:
    def have(check: bool = False, **params: Any) -> dict[str, Any]:
        (docker.folder / "state").write_text(json.dumps(docker.state))
        result = run_module(container_image, check, **{"reference": NAME, **params})
        docker.state = json.loads((docker.folder / "state").read_text())
        return result

    return have


def archive(docker: Docker, content: str = f"image {NAME}") -> tuple[str, str]:
    path = docker.folder / "image.tar"
    path.write_text(content)
    return str(path), "sha256:" + hashlib.sha256(content.encode()).hexdigest()


def test_an_image_is_pulled_once(docker: Docker, have: Callable[..., Any]) -> None:
    result = have()
    assert (result["changed"], result["id"]) == (True, "sha256:pulled")
    result = have()
    assert (result["changed"], result["id"]) == (False, "sha256:pulled")
    assert docker.asked().count("pull") == 1


def test_check_mode_pulls_nothing(docker: Docker, have: Callable[..., Any]) -> None:
    result = have(check=True)
    assert (result["changed"], result["id"]) == (True, "")
    assert docker.asked() == ["image"]
    docker.state["images"][NAME] = "sha256:there"
    assert have(check=True)["changed"] is False


def test_an_archive_is_loaded_and_no_registry_asked(docker: Docker, have: Callable[..., Any]) -> None:
    path, checksum = archive(docker)
    result = have(archive=path, checksum=checksum)
    assert (result["changed"], result["id"]) == (True, "sha256:loaded")
    assert "pull" not in docker.asked()
    assert have(archive=path, checksum=checksum)["changed"] is False
    assert docker.asked().count("load") == 1


def test_another_archive_under_the_same_name_is_loaded(
    docker: Docker, have: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, checksum = archive(docker)
    assert have(archive=path, checksum=checksum)["changed"] is True
    path, newer = archive(docker, f"image {NAME} newer")
    assert "copy it again, or correct the checksum" in have(archive=path, checksum="sha256:" + "0" * 64)["msg"]
    result = have(check=True, archive=path, checksum=newer)
    assert (result["changed"], result["id"]) == (True, "sha256:loaded")
    result = have(archive=path, checksum=newer)
    assert (result["changed"], result["id"]) == (True, "sha256:newer")
    # From then on no gigabytes are read to know it.
    monkeypatch.setattr(container_image, "sha256", None)
    assert have(archive=path, checksum=newer)["changed"] is False
    assert have(check=True, archive=path, checksum=newer)["changed"] is False
    (docker.folder / "image.tar").unlink()
    assert have(archive=path, checksum=newer)["changed"] is False, "it has done its work"


def test_an_image_of_which_nothing_is_known(docker: Docker, have: Callable[..., Any]) -> None:
    """There before the module kept a stamp, or pulled by somebody: only the archive says whether it is the one."""
    path, checksum = archive(docker)
    docker.state["images"][NAME] = "sha256:somebodys"
    assert have(archive=path)["changed"] is False, "without a checksum nothing tells another archive"
    assert have(check=True, archive=path, checksum=checksum)["changed"] is True
    assert have(archive=path, checksum=checksum)["id"] == "sha256:loaded"
    docker.state["images"][NAME] = "sha256:somebodys"
    assert have(archive=path, checksum=checksum)["changed"] is True, "somebody has given the name to another image"
    (docker.folder / "var/images.json").write_text("{")
    assert have(archive=path, checksum=checksum)["changed"] is True
    assert have(archive=path, checksum=checksum)["changed"] is False


def test_an_archive_that_went_before_there_was_a_stamp(
    docker: Docker, have: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    docker.state["images"][NAME] = "sha256:there"
    result = have(archive="/no/such.tar", checksum="sha256:" + "0" * 64)
    assert result["changed"] is False
    # On a host it comes with the result.
    said = " ".join(result["text"].split() + capsys.readouterr().err.split())
    assert "/no/such.tar is not on the host any more, so that nothing says whether" in said


def test_an_archive_that_is_not_there(docker: Docker, have: Callable[..., Any]) -> None:
    assert (
        have(archive="/no/such.tar")["msg"] == f"archive /no/such.tar of image {NAME} is not on the host: copy it there"
    )


def test_an_archive_that_is_another(docker: Docker, have: Callable[..., Any]) -> None:
    path, _ = archive(docker)
    message = have(archive=path, checksum="sha256:" + "0" * 64)["msg"]
    assert message.startswith(f"archive {path} is sha256:") and "copy it again, or correct the checksum" in message
    assert "load" not in docker.asked(), "it is read before Docker gets it"


def test_an_archive_with_another_name_in_it(docker: Docker, have: Callable[..., Any]) -> None:
    path, _ = archive(docker, "image other:1")
    assert f"holds other:1, not {NAME}: give that as reference" in have(archive=path)["msg"]


def test_an_archive_that_is_none(docker: Docker, have: Callable[..., Any]) -> None:
    path, _ = archive(docker, "nothing")
    assert have(archive=path)["msg"].startswith(f"docker cannot load {path}: open /var/lib")


@pytest.mark.parametrize("checksum", ["0" * 64, "sha256:xyz", "md5:" + "0" * 32])
def test_a_checksum_that_is_none(have: Callable[..., Any], checksum: str) -> None:
    assert have(checksum=checksum)["msg"] == f"checksum is {checksum}: give sha256: and 64 hexadecimal digits"


def test_a_network_that_fails_is_tried_again(docker: Docker, have: Callable[..., Any]) -> None:
    docker.state["failures"] = ["net/http: TLS handshake timeout", "read: connection reset by peer"]
    assert have()["id"] == "sha256:pulled"
    assert docker.asked().count("pull") == 3


def test_a_network_that_stays_away(docker: Docker, have: Callable[..., Any]) -> None:
    docker.state["failures"] = ["dial tcp: no route to host"] * 3
    message = have()["msg"]
    assert message.startswith(f"cannot pull {NAME}: dial tcp: no route to host. Check the name")
    assert docker.asked().count("pull") == 3


@pytest.mark.parametrize(
    "error",
    [
        "manifest unknown",
        "pull access denied for x, repository does not exist",
        "unauthorized: authentication required",
    ],
)
def test_a_name_that_the_registry_refuses_is_asked_once(docker: Docker, have: Callable[..., Any], error: str) -> None:
    docker.state["failures"] = [error] * 3
    assert error in have()["msg"]
    assert docker.asked().count("pull") == 1


def test_a_host_without_docker(have: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin/docker").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert have()["msg"] == "cannot run docker: No such file or directory. The role docker installs it"


BASE, MADE = "vllm/vllm-openai:v0.25.1", "baremetal/vllm-openai:v0.25.1-ray2.60.0"
MAKE: dict[str, Any] = {"reference": MADE, "base": BASE, "packages": ["ray==2.60.0"]}


def test_packages_are_added_once(
    docker: Docker, have: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("https_proxy", "http://user:pa'ss@proxy:3128")
    docker.state["images"][BASE] = "sha256:base"
    assert have(check=True, **MAKE)["changed"] is True
    assert "run" not in docker.asked() and "commit" not in docker.asked()
    result = have(**MAKE)
    assert result["changed"] is True and result["id"].startswith("sha256:made-of-")
    assert docker.state["boxes"] == {}, "the container that it was made in is gone"
    assert "pa'\\''ss@proxy" in (docker.folder / "script").read_text()
    assert "proxy:3128" not in (docker.folder / "asked").read_text(), "an argument would stay in the image"
    assert have(**MAKE)["changed"] is False
    assert docker.asked().count("commit") == 1
    # Another image under the base's name, and another release of Ray.
    docker.state["images"][BASE] = "sha256:newer"
    assert have(check=True, **MAKE)["changed"] is True
    assert have(**MAKE)["changed"] is True
    assert have(**{**MAKE, "packages": ["ray==2.61.0"]})["changed"] is True


def test_wheels_and_no_index(docker: Docker, have: Callable[..., Any], tmp_path: Path) -> None:
    docker.state["images"][BASE] = "sha256:base"
    assert have(**MAKE, wheels=str(tmp_path / "none"))["msg"].endswith("no such folder on the host: copy it there")
    (tmp_path / "wheels").mkdir()
    assert have(**MAKE, wheels=str(tmp_path / "wheels"))["changed"] is True
    assert "'--no-index' '--find-links' '/run/baremetal/wheels' 'ray==2.60.0'" in (docker.folder / "script").read_text()
    assert f"src={tmp_path}/wheels,dst=/run/baremetal/wheels" in (docker.folder / "asked").read_text()


def test_an_image_that_has_the_packages_gets_a_name(docker: Docker, have: Callable[..., Any]) -> None:
    docker.state |= {"images": {BASE: "sha256:base"}, "held": {"sha256:base": ["ray==2.60.0"]}}
    result = have(**MAKE)
    assert (result["changed"], result["id"]) == (True, "sha256:base")
    assert have(**MAKE)["changed"] is False
    assert "commit" not in docker.asked()


def test_packages_that_cannot_be_added(docker: Docker, have: Callable[..., Any]) -> None:
    assert f"image {BASE} is not on the host" in have(**MAKE)["msg"]
    docker.state["images"][BASE] = "sha256:base"
    docker.state["install"] = [1, "", "ERROR: No matching distribution found for ray==2.60.0\n"]
    message = have(**MAKE)["msg"]
    assert message.startswith(f"cannot add ray==2.60.0 to image {BASE}: ERROR: No matching distribution")
    assert "vllm_ray_wheels" in message
    assert MADE not in docker.state["images"] and docker.state["boxes"] == {}
    assert have(**{**MAKE, "packages": ["ray"]})["msg"] == "packages has ray: give name==version"
