#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Builds the disk of the test machine, unless it is there already, and prints its folder: disk.img (ext4, Debian 12),
# boot (GRUB in the form of a kernel, which starts whatever kernel the disk's /vmlinuz is), id_ed25519 (root's key).
#
#   tests/vm/image.sh
#
# Needs root and, from Debian, mmdebstrap, e2fsprogs, grub-common and grub-pc-bin.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
hash=$(cat "$here/image.sh" "$here"/fakegpu/* | sha256sum | cut -c1-12)
folder=$here/../../.cache/vm/$hash
mirror=${BAREMETAL_TEST_DEBIAN_MIRROR:-http://deb.debian.org}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
exec 9>"$folder/lock"
flock 9
[[ ! -f $folder/complete ]] || { echo "$folder"; exit 0; }
for program in mmdebstrap mke2fs grub-mkimage ssh-keygen; do
  command -v "$program" >/dev/null || { echo "$program is missing: apt-get install mmdebstrap e2fsprogs grub-common grub-pc-bin openssh-client" >&2; exit 1; }
done
[[ -f /usr/lib/grub/i386-pc/lnxboot.img ]] || { echo "apt-get install grub-pc-bin" >&2; exit 1; }
rm -f "$folder"/id_ed25519*
ssh-keygen -q -t ed25519 -N '' -C vm -f "$folder/id_ed25519"
root=$(mktemp -d "${TMPDIR:-/var/tmp}/baremetal-vm.XXXXXX")
trap 'rm -rf "$root"' EXIT

# The compiler comes with the headers. dkms, which the driver's role needs, would take a minute under emulation.
mmdebstrap --quiet --variant=minbase --mode=root --format=directory --skip=cleanup/apt/lists --aptopt='Acquire::Languages "none"' \
  --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --include=systemd-sysv,dbus,udev,openssh-server,python3,python3-apt,ca-certificates,iproute2,procps,kmod,linux-image-amd64,linux-headers-amd64,initramfs-tools,dkms,make,libc6-dev,libelf-dev,dwarves,g++,pci.ids \
  bookworm "$root" "deb $mirror/debian bookworm main" "deb $mirror/debian bookworm-updates main" \
  "deb $mirror/debian-security bookworm-security main" >&2

kernel=$(basename "$(readlink -f "$root/vmlinuz")" | sed 's/^vmlinuz-//')
mkdir -p "$root/usr/src/fakegpu" "$root/root/.ssh"
cp "$here"/fakegpu/* "$root/usr/src/fakegpu/"
cp "$folder/id_ed25519.pub" "$root/root/.ssh/authorized_keys"
chmod -R go= "$root/root/.ssh"
echo guest >"$root/etc/hostname"
echo "127.0.0.1 localhost guest" >"$root/etc/hosts"
echo "/dev/vda / ext4 rw,noatime 0 1" >"$root/etc/fstab"
printf '[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n' >"$root/etc/systemd/network/guest.network"
# The second kernel's packages, so that the test does not wait for the mirror: DKMS has to build for it.
cp /etc/resolv.conf "$root/etc/resolv.conf"
chroot "$root" apt-get install -qq --yes --download-only linux-image-cloud-amd64 linux-headers-cloud-amd64 >/dev/null
echo "nameserver 10.0.2.3" >"$root/etc/resolv.conf"
# A small initramfs, packed fast; with nouveau in it, as a machine with such a GPU has it.
sed -i 's/^MODULES=.*/MODULES=list/; s/^COMPRESS=.*/COMPRESS=gzip/' "$root/etc/initramfs-tools/initramfs.conf"
printf '%s\n' virtio_pci virtio_blk ext4 fakegpu >>"$root/etc/initramfs-tools/modules"
# shellcheck disable=SC2016 # expanded when an initramfs is made
printf '#!/bin/sh\n[ "$1" != prereqs ] || exit 0\n. /usr/share/initramfs-tools/hook-functions\nmanual_add_modules nouveau\n' \
  >"$root/etc/initramfs-tools/hooks/nouveau"
chmod 755 "$root/etc/initramfs-tools/hooks/nouveau"
echo fakegpu >"$root/etc/modules-load.d/fakegpu.conf"
chroot "$root" make -s -C "/lib/modules/$kernel/build" M=/usr/src/fakegpu >&2
install -D -m 644 "$root/usr/src/fakegpu/fakegpu.ko" "$root/lib/modules/$kernel/extra/fakegpu.ko"
chroot "$root" depmod "$kernel"
chroot "$root" update-initramfs -u -k "$kernel" >&2
mkdir "$root/usr/src/fakegpu-580.1.1"
cp "$here"/fakegpu/* "$root/usr/src/fakegpu-580.1.1/"
rm -r "$root/usr/src/fakegpu"
chroot "$root" systemctl --quiet enable systemd-networkd ssh
chroot "$root" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer systemd-timesyncd systemd-networkd-wait-online

truncate -s 40G "$folder/disk.img" # as much as a server needs; what is empty takes no room
mke2fs -q -t ext4 -O ^metadata_csum_seed,^orphan_file -E lazy_itable_init=0 -d "$root" "$folder/disk.img"
printf 'set root=(hd0)\nlinux /vmlinuz root=/dev/vda rw console=ttyS0 panic=5 net.ifnames=0\ninitrd /initrd.img\nboot\n' >"$folder/grub.cfg"
grub-mkimage -O i386-pc -p / -c "$folder/grub.cfg" -o "$folder/core.img" biosdisk ext2 linux normal
cat /usr/lib/grub/i386-pc/lnxboot.img "$folder/core.img" >"$folder/boot"
touch "$folder/complete"
echo "$folder"
