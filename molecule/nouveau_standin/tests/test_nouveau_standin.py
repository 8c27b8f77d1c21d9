# SPDX-License-Identifier: GPL-3.0-or-later
"""nouveau and nova are denied, in the initramfs too, which was made anew once."""

from __future__ import annotations

import pytest

DENYLIST = "/etc/modprobe.d/baremetal-nouveau.conf"


def kernel_of(host):
    return host.check_output("ls /lib/modules").split()[0]


@pytest.mark.parametrize("module", ["nouveau", "nova_core", "nova_drm"])
def test_denied(host, module):
    lines = host.file(DENYLIST).content_string.splitlines()
    assert {f"blacklist {module}", f"options {module} modeset=0", f"install {module} /bin/false"} <= set(lines)
    assert host.file(DENYLIST).mode == 0o644


def test_the_initramfs_has_it(host):
    kernel = kernel_of(host)
    (image,) = (
        path for path in (f"/boot/initrd.img-{kernel}", f"/boot/initramfs-{kernel}.img") if host.file(path).exists
    )
    assert host.file(DENYLIST).content_string in host.file(image).content_string


def test_it_was_made_once(host):
    """By check mode not at all, by the first run once, and by the second not again."""
    assert host.file("/srv/standin/rebuilt").content_string.split() == [kernel_of(host)]
