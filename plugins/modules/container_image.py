#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: container_image
short_description: Have a container image on the host, from a registry or from an archive
version_added: 0.1.0
description:
  - Pulls an image that is not there, or loads it from an archive that C(docker save) has made. One that is there is left
    as it is, unless O(checksum) tells that another archive is to be had under its name. Needs the program C(docker) and nothing
    else, unlike modules that need Docker's SDK for Python on the host.
  - With O(base) it is made on the host, from another image and Python packages. That needs no builder of Docker. What pip is told
    on the host (F(/etc/pip.conf), proxies in the environment) holds while it is made, and is not in the image.
  - Registries that ask for a login take what C(docker login) has kept for the user.
options:
  reference:
    description: The image, with its tag or its digest.
    type: str
    required: true
  archive:
    description: A file on the host that holds the image under this very name.
    type: path
  checksum:
    description:
      - What the archive must be, C(sha256:) and 64 digits. F(/var/lib/baremetal/images.json) keeps which image came from it, so
        that a further run need not read it. Without a checksum, an archive is looked at only while its image is not there.
    type: str
  base:
    description:
      - An image on the host that O(packages) are added to. O(reference) is made anew when this one has changed. One that has
        the packages already just gets the further name.
    type: str
  packages:
    description: What to add, C(name==version).
    type: list
    elements: str
  wheels:
    description: Folder on the host that holds the packages and all that they need, for hosts that reach no index.
    type: path
  retries:
    description: How often a pull that fails is tried again. Layers that are there already are kept.
    type: int
    default: 2
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether the image would be fetched.
    support: full
"""

EXAMPLES = r"""
- name: An image from a mirror, pinned by its digest
  baremetal.vllm.container_image:
    reference: registry.example.com/vllm/vllm-openai@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef

- name: A host without a registry
  baremetal.vllm.container_image:
    reference: vllm/vllm-openai:v0.25.1
    archive: /srv/images/vllm-openai-v0.25.1.tar

- name: vLLM's image with Ray
  baremetal.vllm.container_image:
    reference: baremetal/vllm-openai:v0.25.1-ray2.60.0
    base: vllm/vllm-openai:v0.25.1
    packages: [ray==2.60.0]
"""

RETURN = r"""
id:
  description: Id of the image, empty in check mode when it is not there.
  returned: success
  type: str
  sample: sha256:5e1c...
"""

import hashlib
import json
import os
import re
import time

from ansible.module_utils.basic import AnsibleModule

# Of an image that was made here: the id of its base, and what was added.
LABEL = "baremetal.vllm.made_of"
# Reference -> id and checksum of an image that came from an archive. The role vllm reads it, too.
STAMP = "/var/lib/baremetal/images.json"
HELD = """
import importlib.metadata, sys
for package in sys.argv[1:]:
    name, dummy, version = package.partition("==")
    if importlib.metadata.version(name) != version:
        raise SystemExit(name)
"""
FOLDER = "/run/baremetal"
# Read from standard input: arguments and environment of a container stay in what is made of it.
INSTALL = """
set -eu
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore UV_BREAK_SYSTEM_PACKAGES=1
if [ -e %(folder)s/pip.conf ]; then export PIP_CONFIG_FILE=%(folder)s/pip.conf; fi
if ! python3 -m pip --version >/dev/null 2>&1 && command -v uv >/dev/null; then
    exec uv pip install --quiet --no-cache --python "$(command -v python3)" "$@"
fi
python3 -m pip --version >/dev/null 2>&1 || python3 -m ensurepip >/dev/null
exec python3 -m pip install --quiet --no-cache-dir --disable-pip-version-check "$@"
"""
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return "sha256:" + digest.hexdigest()


def docker(module, *arguments, **options):
    """(exit status, output, last line of the errors)."""
    try:
        code, output, errors = module.run_command(["docker"] + list(arguments), handle_exceptions=False, **options)
    except OSError as error:
        module.fail_json(msg="cannot run docker: %s. The role docker installs it" % error.strerror)
    lines = [line for line in errors.splitlines() if line.strip()]
    return code, output, lines[-1] if lines else ""


def identity(module, reference):
    code, output, dummy = docker(module, "image", "inspect", "--format", "{{.Id}}", reference)
    return output.strip() if code == 0 else ""


def stamps():
    try:
        with open(STAMP) as handle:
            return dict(json.load(handle))
    except (IOError, OSError, ValueError, TypeError):
        return {}


def stamp(module, reference, found, checksum):
    """Remembers that an image came from the archive with this checksum."""
    folder = os.path.dirname(STAMP)
    os.makedirs(folder, 0o755, exist_ok=True)
    fresh = "%s.%d" % (STAMP, os.getpid())
    with open(fresh, "w") as handle:
        json.dump(dict(stamps(), **{reference: {"id": found, "checksum": checksum}}), handle, indent=2, sort_keys=True)
        handle.write("\n")
    module.atomic_move(fresh, STAMP)


def load(module, params):
    archive, wanted = params["archive"], params["checksum"]
    if not os.path.isfile(archive):
        module.fail_json(
            msg="archive %s of image %s is not on the host: copy it there" % (archive, params["reference"])
        )
    if wanted:
        found = sha256(archive)
        if found != wanted:
            module.fail_json(
                msg="archive %s is %s, not %s: copy it again, or correct the checksum" % (archive, found, wanted)
            )
    code, output, error = docker(module, "load", "--quiet", "--input", archive)
    if code != 0:
        module.fail_json(msg="docker cannot load %s: %s" % (archive, error))
    found = identity(module, params["reference"])
    if not found:
        names = ", ".join(re.findall(r"Loaded image(?: ID)?: (\S+)", output)) or "nothing"
        module.fail_json(
            msg="archive %s holds %s, not %s: give that as reference, or save the image under its name"
            % (archive, names, params["reference"])
        )
    if wanted:
        stamp(module, params["reference"], found, wanted)
    return found


def pull(module, params):
    for attempt in range(params["retries"] + 1):
        code, dummy, error = docker(module, "pull", "--quiet", params["reference"])
        if code == 0:
            return identity(module, params["reference"])
        # A name that the registry does not have will not be there in a moment.
        if re.search(r"not found|manifest unknown|denied|unauthorized|invalid reference", error):
            break
        time.sleep(5 * (attempt + 1))
    module.fail_json(
        msg="cannot pull %s: %s. Check the name, log in with `docker login`, set vllm_image_mirror to a registry that the host "
        "reaches, or give an archive in vllm_images" % (params["reference"], error)
    )


def quoted(word):
    return "'%s'" % word.replace("'", "'\\''")


def has(module, image, packages):
    """Whether the Python of an image has these very packages."""
    options = ["--rm", "--network=none", "--entrypoint=python3"]
    return docker(module, "run", *(options + [image, "-c", HELD] + packages))[0] == 0


def made_of(module, params):
    """What the image should be made of; nothing when its base is not there."""
    base = identity(module, params["base"])
    return " ".join([base] + sorted(params["packages"])) if base else ""


def is_made(module, params, wanted):
    """Whether the image is there, and is made of that; or is its base itself, under another name."""
    form = '{{.Id}} {{index .Config.Labels "%s"}}' % LABEL
    code, output, dummy = docker(module, "image", "inspect", "--format", form, params["reference"])
    found, dummy, label = output.strip().partition(" ")
    return code == 0 and bool(wanted) and (label == wanted or found == wanted.split(" ")[0])


def make(module, params, wanted):
    """Makes the image by running its base once, and returns its id."""
    base, packages, wheels = params["base"], sorted(params["packages"]), params["wheels"]
    if not wanted:
        module.fail_json(
            msg="image %s is not on the host, and %s is made of it: fetch it before" % (base, params["reference"])
        )
    if wheels and not os.path.isdir(wheels):
        module.fail_json(msg="wheels is %s, and there is no such folder on the host: copy it there" % wheels)
    if has(module, base, packages):
        code, dummy, error = docker(module, "tag", base, params["reference"])
        if code != 0:
            module.fail_json(msg="docker cannot name %s %s: %s" % (base, params["reference"], error))
        return identity(module, params["reference"])
    name = "baremetal-image-%d" % os.getpid()
    options = [
        "--name=" + name,
        "--interactive",
        "--user=0",
        "--network=host",
        "--tmpfs=" + FOLDER,
        "--entrypoint=/bin/sh",
    ]
    for source, target in (("/etc/pip.conf", "pip.conf"), (wheels, "wheels")):
        if source and os.path.exists(source):
            options.append("--mount=type=bind,readonly,src=%s,dst=%s/%s" % (source, FOLDER, target))
    where = ["--no-index", "--find-links", FOLDER + "/wheels"] if wheels else []
    exports = [
        "export %s=%s\n" % (key, quoted(os.environ[key]))
        for key in PROXIES + tuple(key.upper() for key in PROXIES)
        if os.environ.get(key)
    ]
    script = "".join(exports) + "set -- %s\n" % " ".join(map(quoted, where + packages)) + INSTALL % {"folder": FOLDER}
    try:
        code, output, error = docker(module, "run", *(options + [base]), data=script)
        if code != 0:
            module.fail_json(
                msg="cannot add %s to image %s: %s. Check the network, name a package mirror in /etc/pip.conf on this host, "
                "give a folder with the packages (vllm_ray_wheels), or an image that has them already (vllm_images)"
                % (", ".join(packages), base, error or output.strip()[-300:])
            )
        config = json.loads(docker(module, "image", "inspect", "--format", "{{json .Config}}", base)[1])
        changes = ["LABEL %s=%s" % (LABEL, json.dumps(wanted)), "USER %s" % (config.get("User") or "0")]
        # An empty word is what takes the container's away again.
        changes += ["ENTRYPOINT %s" % json.dumps(config.get("Entrypoint") or [""])]
        changes += ["CMD %s" % json.dumps(config.get("Cmd") or [])]
        arguments = [word for change in changes for word in ("--change", change)]
        code, dummy, error = docker(module, "commit", *(arguments + [name, params["reference"]]))
        if code != 0:
            module.fail_json(msg="docker cannot keep %s: %s" % (params["reference"], error))
    finally:
        docker(module, "rm", "--force", "--volumes", name)
    if not has(module, params["reference"], packages):
        module.fail_json(
            msg="%s was made of %s, and its python3 does not have %s" % (params["reference"], base, packages)
        )
    return identity(module, params["reference"])


def main():
    module = AnsibleModule(
        argument_spec={
            "reference": {"type": "str", "required": True},
            "archive": {"type": "path"},
            "checksum": {"type": "str"},
            "base": {"type": "str"},
            "packages": {"type": "list", "elements": "str"},
            "wheels": {"type": "path"},
            "retries": {"type": "int", "default": 2},
        },
        mutually_exclusive=[("archive", "base")],
        required_together=[("base", "packages")],
        required_by={"wheels": "base"},
        supports_check_mode=True,
    )
    params = module.params
    if params["checksum"] and not re.match(r"sha256:[0-9a-f]{64}\Z", params["checksum"]):
        module.fail_json(msg="checksum is %s: give sha256: and 64 hexadecimal digits" % params["checksum"])
    if params["base"]:
        wrong = [package for package in params["packages"] if not re.match(r"[\w.-]+==[\w.+!-]+\Z", package)]
        if wrong:
            module.fail_json(msg="packages has %s: give name==version" % ", ".join(wrong))
        wanted = made_of(module, params)
        if is_made(module, params, wanted) or module.check_mode:
            found = identity(module, params["reference"])
            module.exit_json(changed=not is_made(module, params, wanted), id=found)
        module.exit_json(changed=True, id=make(module, params, wanted))
    found = identity(module, params["reference"])
    wanted = {"id": found, "checksum": params["checksum"]}
    known = stamps().get(params["reference"])
    current = found and (not params["archive"] or not params["checksum"] or known == wanted)
    if found and not current and not known and not os.path.exists(params["archive"]):
        module.warn(
            "archive %s is not on the host any more, so that nothing says whether image %s is of it: copy it there again, or "
            "take it out of vllm_images" % (params["archive"], params["reference"])
        )
        current = True
    if current or module.check_mode:
        module.exit_json(changed=not current, id=found)
    module.exit_json(changed=True, id=(load if params["archive"] else pull)(module, params))


if __name__ == "__main__":
    main()
