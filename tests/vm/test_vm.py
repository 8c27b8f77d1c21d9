# SPDX-License-Identifier: GPL-3.0-or-later
"""On a real kernel, with real initramfs, udev, DKMS and reboots. The tests are steps of one story and run in this order.

The GPU is what fakegpu.ko puts on a PCI bus of its own: udev loads nouveau for it as for a real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.guest import ROOT, Guest

HERE = Path(__file__).parent
DENYLIST = "/etc/modprobe.d/baremetal-nouveau.conf"
GPU = "/sys/bus/pci/devices/1000:00:00.0"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    image = subprocess.run([HERE / "image.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    guest = Guest(Path(image), tmp_path_factory.mktemp("vm"))
    guest.start()
    yield guest
    guest.stop()


def tasks(output: str) -> dict[str, int]:
    """Counts of the recap."""
    (line,) = re.findall(r"^guest +: (ok=.*)$", output, re.M)
    return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", line)}


def modules(guest: Guest) -> set[str]:
    return {line.split()[0] for line in guest.out("cat /proc/modules").splitlines()}


def initramfs(guest: Guest) -> str:
    """Identity of the running kernel's initramfs."""
    return guest.out("stat -c '%i %Y %s' /boot/initrd.img-$(uname -r)")


def boot_id(guest: Guest) -> str:
    return guest.out("cat /proc/sys/kernel/random/boot_id")


def test_nouveau_is_loaded_before(guest: Guest) -> None:
    """By udev in the initramfs, for the device id, as on a host with a GPU."""
    assert "nouveau" in modules(guest)
    assert guest.out(f"cat {GPU}/vendor {GPU}/device {GPU}/class").split() == ["0x10de", "0x1db6", "0x030200"]
    log = guest.out("dmesg")
    assert "nouveau 1000:00:00.0" in log  # its probe really ran
    assert log.index("nouveau 1000:00:00.0") < log.index("EXT4-fs (vda): mounted")


def test_without_consent_nothing_is_done(guest: Guest) -> None:
    before = initramfs(guest)
    done = guest.play(HERE / "nouveau.yml")
    assert done.returncode != 0
    said = " ".join(done.stdout.split())
    assert "nouveau is loaded until the next boot, and the NVIDIA driver cannot take the GPUs before" in said
    assert "Set baremetal_reboot to true to have it done, or to false to go on without and reboot later" in said
    assert tasks(done.stdout)["changed"] == 0
    assert initramfs(guest) == before
    assert guest.run(f"test -e {DENYLIST}", check=False).returncode == 1


def test_check_mode_says_what_it_would_do(guest: Guest) -> None:
    before = initramfs(guest), boot_id(guest)
    done = guest.play(HERE / "nouveau.yml", "--check", "--diff", "-e", "baremetal_reboot=true")
    assert done.returncode == 0, done.stdout
    assert "+blacklist nova_core" in done.stdout
    assert "made before the change" in done.stdout
    assert tasks(done.stdout)["changed"] >= 2
    assert (initramfs(guest), boot_id(guest)) == before
    assert guest.run(f"test -e {DENYLIST}", check=False).returncode == 1


def test_a_lost_connection_is_made_good_by_the_next_run(guest: Guest) -> None:
    """The whole site.yml as far as nouveau. Consent false: the host goes on with it, and says that a reboot is due."""
    service = {"name": "chat", "model": "random-llama", "source": "generated", "engine_version": "0.8.5"}
    given = json.dumps({"vllm_services": [service], "baremetal_reboot": False})
    site = (ROOT / "site.yml", "--tags", "nouveau", "-e", given)
    before = initramfs(guest), boot_id(guest)
    output = ""
    with guest.playing(*site) as process:
        assert process.stdout
        for line in process.stdout:
            output += line
            if "Make the initramfs" in line:  # the denylist is written
                guest.cable(False)
    assert process.returncode == 4, output
    assert tasks(output)["unreachable"] == 1
    guest.cable(True)
    guest.wait()
    assert "blacklist nouveau" in guest.out(f"cat {DENYLIST}")
    # What the run that was cut off had started may still be at work: a user waits, too.
    guest.run("while pgrep -f '[m]kinitramfs|[A]nsiballZ' >/dev/null; do sleep 1; done")
    done = guest.play(*site)
    assert done.returncode == 0, done.stdout
    assert "baremetal_reboot is false: going on without" in " ".join(done.stdout.split())
    assert initramfs(guest) != before[0]
    assert boot_id(guest) == before[1]
    assert "nouveau" in modules(guest)
    assert DENYLIST[1:] in guest.out("lsinitramfs /boot/initrd.img-$(uname -r)").splitlines()


def test_consent_reboots_and_nouveau_is_gone(guest: Guest) -> None:
    before, image = boot_id(guest), initramfs(guest)
    done = guest.play(HERE / "nouveau.yml", "-e", "baremetal_reboot=true")
    assert done.returncode == 0, done.stdout
    assert boot_id(guest) != before
    assert initramfs(guest) == image  # it was up to date
    assert not modules(guest) & {"nouveau", "nova_core", "nova_drm"}
    assert "fakegpu" in modules(guest)
    assert guest.run(f"test -e {GPU}/driver", check=False).returncode == 1
    assert "nouveau 1000:00:00.0" not in guest.out("dmesg")
    # Nor by name, as /etc/modules or a curious hand would.
    assert guest.run("modprobe nouveau", check=False).returncode != 0
    assert "nouveau" not in modules(guest)


def test_a_second_run_changes_nothing(guest: Guest) -> None:
    before = initramfs(guest), boot_id(guest)
    done = guest.play(HERE / "nouveau.yml")  # consent is not asked for where nothing needs it
    assert done.returncode == 0, done.stdout
    assert tasks(done.stdout)["changed"] == 0
    assert tasks(done.stdout)["ok"] <= 8
    assert (initramfs(guest), boot_id(guest)) == before


def test_a_module_is_built_by_the_compiler_of_the_kernel(guest: Guest) -> None:
    guest.run("rmmod fakegpu")
    guest.run(
        "printf '#!/bin/sh\\necho the wrong compiler was called\\nexit 1\\n' | tee /usr/local/bin/cc >/usr/local/bin/gcc"
    )
    guest.run("chmod 755 /usr/local/bin/cc /usr/local/bin/gcc")
    kernel = guest.out("uname -r")
    done = guest.play(HERE / "dkms.yml", "-e", f"nvidia_driver_kernel={kernel}")
    assert done.returncode == 0, done.stdout
    assert guest.out("modinfo -F version fakegpu") == "580.1.1"
    assert "/updates/dkms/" in guest.out("modinfo -F filename fakegpu")
    assert f"fakegpu/580.1.1, {kernel}, x86_64: installed" in guest.out("dkms status")
    assert "CC=" in guest.out("cat /etc/dkms/fakegpu.conf")
    log = guest.out(f"cat /var/lib/dkms/fakegpu/580.1.1/{kernel}/x86_64/log/make.log")
    assert "wrong compiler" not in log
    # modpost's record of what compiled it
    assert "GCC: (Debian 12." in guest.out("strings -a $(modinfo -F filename fakegpu)")
    guest.run("modprobe fakegpu")
    assert guest.out("cat /sys/module/fakegpu/version") == "580.1.1"
    assert not modules(guest) & {"nouveau"}


@pytest.mark.skipif("BAREMETAL_TEST_SHORT" in os.environ, reason="takes a quarter of an hour; make test-vm runs it")
def test_the_module_outlives_a_change_of_kernel(guest: Guest) -> None:
    before = guest.out("uname -r")
    guest.run(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-download linux-image-cloud-amd64 linux-headers-cloud-amd64"
    )
    done = guest.play(HERE / "reboot.yml", "-e", "baremetal_reboot=true")
    assert done.returncode == 0, done.stdout
    kernel = guest.out("uname -r")
    assert kernel != before
    assert f"fakegpu/580.1.1, {kernel}, x86_64: installed" in guest.out("dkms status")
    assert guest.out("cat /sys/module/fakegpu/version") == "580.1.1"
    assert guest.out(f"cat {GPU}/vendor") == "0x10de"
    done = guest.play(HERE / "nouveau.yml")
    assert done.returncode == 0, done.stdout
    assert tasks(done.stdout)["changed"] == 0  # the new kernel's initramfs came with the denylist
