#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Builds one image of a test host, unless it is there already, and prints its tag on the last line.
#
#   molecule/images/build.sh debian12|debian13|ubuntu2204|rocky9
#
# Without a registry (the default) Debian images are made from Debian's packages, and the others are stand-ins: a
# Debian userland with the other distribution's os-release, package manager and package repositories, and nothing
# of Debian's to fall back on. Their names end in -standin.
# BAREMETAL_TEST_REGISTRY=docker.io/library takes the real images from there instead.
#
# The tag is a hash of everything that goes into the image, so a change builds anew and nothing else does.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
registry=${BAREMETAL_TEST_REGISTRY:-}

declare -A suites=([debian12]=bookworm [debian13]=trixie)
declare -A real=([debian12]=debian:12 [debian13]=debian:13 [ubuntu2204]=ubuntu:22.04 [rocky9]=rockylinux:9)
declare -A standin_of=([ubuntu2204]=debian12 [rocky9]=debian13)
# What a test host has before any role comes: process 1, Python, a way in, and what every server has.
packages=systemd,systemd-sysv,dbus,openssh-server,python3,python3-apt,ca-certificates,iproute2,procps,gpg

name=${1:?usage: build.sh NAME}
if [[ -z ${real[$name]:-} ]]; then
  echo "unknown image '$name': there are ${!real[*]}" >&2
  exit 2
fi

hash_of() { # of the arguments and of the files in a folder
  local folder=$1
  shift
  { printf '%s\n' "$@"; [[ -z $folder ]] || find "$folder" -type f -print0 | sort -z | xargs -0 sha256sum | sed "s|$here||"; } |
    sha256sum | cut -c1-12
}

have() { docker image inspect "$1" >/dev/null 2>&1; }

finish() { # tag, started
  have "$1" || { echo "$1 was not built" >&2; exit 1; }
  echo "built $1 in $((SECONDS - $2)) s" >&2
}

debian_here() {
  if ! command -v mmdebstrap >/dev/null; then
    if [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
      apt-get update -qq >&2 && apt-get install -y -qq --no-install-recommends mmdebstrap >&2
    else
      echo "mmdebstrap is missing: install it, or set BAREMETAL_TEST_REGISTRY to a registry with $1" >&2
      exit 1
    fi
  fi
  local suite=$1 tag=$2 mirror=${BAREMETAL_TEST_DEBIAN_MIRROR:-http://deb.debian.org}
  mmdebstrap --quiet --variant=minbase --include="$packages" --mode=root --format=tar \
    --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    "$suite" - "deb $mirror/debian $suite main" "deb $mirror/debian $suite-updates main" \
    "deb $mirror/debian-security $suite-security main" |
    docker import --change 'CMD ["/lib/systemd/systemd"]' --change 'ENV container=docker' - "$tag" >/dev/null
}

if [[ -n $registry ]]; then
  folder=$here/registry
  tag=baremetal-test/$name:$(hash_of "$folder" "$registry/${real[$name]}" "$packages")
  build() { docker build --quiet --build-arg "BASE=$registry/${real[$name]}" --build-arg "PACKAGES=$packages" -t "$tag" "$folder" >/dev/null; }
elif [[ -n ${suites[$name]:-} ]]; then
  tag=baremetal-test/$name:$(hash_of "" "$(declare -f debian_here)" "$packages" "${suites[$name]}")
  build() { debian_here "${suites[$name]}" "$tag"; }
else
  folder=$here/$name-standin
  base=$("$0" "${standin_of[$name]}" | tail -n 1)
  tag=baremetal-test/$name-standin:$(hash_of "$folder" "$base")
  build() { docker build --quiet --build-arg "BASE=$base" -t "$tag" "$folder" >/dev/null; }
fi

if ! have "$tag"; then
  # Two scenarios may want the same image at once: the second waits and finds it.
  exec 9>"${TMPDIR:-/tmp}/baremetal-test-image-$name.lock"
  flock 9
  if ! have "$tag"; then
    started=$SECONDS
    build >&2
    finish "$tag" "$started"
  fi
fi
echo "$tag"
