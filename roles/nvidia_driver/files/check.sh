#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Managed by Ansible: role baremetal.vllm.nvidia_driver
# At boot: the kernel that runs has a module of the version that the libraries have, or gets it built; else says what is wrong.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
kernel=$(uname -r)

libraries() {
  for folder in /usr/lib/x86_64-linux-gnu /usr/lib/aarch64-linux-gnu /usr/lib64 /usr/lib; do
    if [ -e "$folder/libnvidia-ml.so.1" ]; then
      basename "$(readlink -f "$folder/libnvidia-ml.so.1")" | sed 's/^libnvidia-ml\.so\.//'
      return
    fi
  done
}

# Debian's own are called otherwise.
module() {
  for name in nvidia nvidia-current nvidia-current-open; do
    modinfo -k "$kernel" -F version "$name" 2>/dev/null && return
  done
}

wanted=$(libraries)
if [ -z "$wanted" ]; then
  echo "no NVIDIA driver is installed, nothing to check"
  exit 0
fi
if [ "$(module)" != "$wanted" ]; then
  echo "kernel $kernel has NVIDIA module '$(module)', the libraries are $wanted: building it"
  for tree in /var/lib/dkms/nvidia*/"$wanted"; do
    name=$(basename "$(dirname "$tree")")
    if [ -e "$tree/source/dkms.conf" ]; then
      dkms install --force -m "$name" -v "$wanted" -k "$kernel"
    fi
  done
  depmod "$kernel"
fi
if [ "$(module)" != "$wanted" ]; then
  if [ ! -e "/lib/modules/$kernel/build/Makefile" ]; then
    echo "the headers of kernel $kernel are not installed: install them, or boot the former kernel" >&2
  fi
  echo "kernel $kernel has no NVIDIA module $wanted: /var/lib/dkms/nvidia*/$wanted/build/make.log says why" >&2
  exit 1
fi
modprobe nvidia || { echo "the NVIDIA module $wanted does not load into kernel $kernel: see dmesg" >&2; exit 1; }
modprobe nvidia-uvm || true
