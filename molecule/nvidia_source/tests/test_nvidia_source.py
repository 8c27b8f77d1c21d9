# SPDX-License-Identifier: GPL-3.0-or-later
"""NVIDIA's module is there for the kernel that was named, built by that kernel's compiler."""

from __future__ import annotations

import re


def test_modinfo_shows_the_version(host):
    version, kernel = (host.file(f"/root/{name}").content_string.strip() for name in ("version", "kernel"))
    for name in ("nvidia-current", "nvidia-current-uvm"):
        text = host.check_output(f"/sbin/modinfo -k {kernel} {name}")
        fields = dict(re.findall(r"^(\w+):\s+(\S.*)$", text, re.M))
        assert fields["version"] == version
        assert fields["vermagic"].split()[0] == kernel
        assert "/updates/dkms/" in fields["filename"]
    assert f"nvidia-current/{version}, {kernel}, x86_64: installed" in host.check_output("/usr/sbin/dkms status")


def test_it_was_built_by_the_compiler_of_the_kernel(host):
    version, kernel = (host.file(f"/root/{name}").content_string.strip() for name in ("version", "kernel"))
    config = host.file(f"/lib/modules/{kernel}/build/.config").content_string
    compiler = re.search(r'^CONFIG_CC_VERSION_TEXT="(\S+)', config, re.M).group(1)
    assert compiler.endswith("gcc-12")
    log = host.file(f"/var/lib/dkms/nvidia-current/{version}/{kernel}/x86_64/log/make.log").content_string
    assert "wrong compiler" not in log
    # What cc is by default here fails, so that the module could not be there without the role's choice.
    assert host.run("gcc --version").rc == 1
