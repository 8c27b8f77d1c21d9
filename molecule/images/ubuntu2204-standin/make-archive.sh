#!/bin/sh
# Makes two signed apt repositories below /srv/mirror from Debian's packages:
#   ubuntu/        what Ubuntu's own archive has: docker.io and what it needs
#   linux/ubuntu/  what Docker's repository has: docker-ce and its companions, made from the same binaries and with
#                  the conflicts that the real ones declare
set -eu
apt-get update -q
apt-get install -qy apt-utils gpg gpg-agent
mkdir -p /tmp/debs/partial
apt-get install -qy --download-only -o Dir::Cache::archives=/tmp/debs docker.io
mkdir -p /srv/mirror/ubuntu/pool /srv/mirror/linux/ubuntu/pool
cp /tmp/debs/*.deb /srv/mirror/ubuntu/pool/

unpacked() { # package, folder: its files and its maintainer scripts
  dpkg-deb -R /tmp/debs/"$1"_*.deb "$2"
  rm -rf "$2"/usr/share/doc "$2"/usr/share/man "$2"/usr/share/lintian
}
engine_version=$(dpkg-deb -f /tmp/debs/docker.io_*.deb Version | sed 's/[+].*//')
control() { # folder, name, version, further fields
  printf 'Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: stand-in <root@localhost>\nSection: admin\nPriority: optional\n%b\nDescription: stand-in made from Debian binaries\n' \
    "$2" "$3" "$(dpkg --print-architecture)" "$4" > "$1"/DEBIAN/control
  dpkg-deb --build -Zgzip -z1 --root-owner-group "$1" /srv/mirror/linux/ubuntu/pool/"$2"_"$3".deb
}
version=$engine_version-1~ubuntu.22.04~jammy
unpacked docker.io /tmp/ce
mkdir -p /tmp/cli/DEBIAN /tmp/cli/usr/bin
mv /tmp/ce/usr/bin/docker /tmp/cli/usr/bin/
unpacked tini /tmp/tini
mv /tmp/tini/usr/bin/tini-static /tmp/ce/usr/bin/docker-init
control /tmp/ce docker-ce "5:$version" 'Depends: containerd.io, docker-ce-cli, iptables, adduser, libc6, libdevmapper1.02.1, libsystemd0\nConflicts: docker.io\nReplaces: docker.io'
control /tmp/cli docker-ce-cli "5:$version" 'Conflicts: docker.io\nReplaces: docker.io'
unpacked containerd /tmp/io
unpacked runc /tmp/runc
rm -r /tmp/runc/DEBIAN
cp -a /tmp/runc/. /tmp/io/
control /tmp/io containerd.io 1.6.20-1 'Depends: libc6, libseccomp2\nConflicts: containerd, runc\nReplaces: containerd, runc\nProvides: containerd, runc'
for plugin in buildx compose; do
  mkdir -p /tmp/"$plugin"/DEBIAN
  control /tmp/"$plugin" docker-"$plugin"-plugin 1.0-1~ubuntu.22.04~jammy 'Enhances: docker-ce-cli'
done

export GNUPGHOME=/tmp/gnupg
mkdir -m 700 "$GNUPGHOME"
publish() { # folder, suite, components, key's name
  gpg --batch --quiet --passphrase '' --quick-generate-key "$4" rsa3072 sign never
  cd "$1"
  release="apt-ftparchive -o APT::FTPArchive::Release::Suite=$2 -o APT::FTPArchive::Release::Codename=$2"
  for component in $3; do
    mkdir -p dists/"$2"/"$component"/binary-"$(dpkg --print-architecture)"
  done
  first=${3%% *}
  for component in $3; do
    packages=dists/$2/$component/binary-$(dpkg --print-architecture)/Packages
    if [ "$component" = "$first" ] && [ "$3" != "$first" ]; then : > "$packages"; else apt-ftparchive packages pool > "$packages"; fi
    gzip -k "$packages"
  done
  $release release dists/"$2" > /tmp/Release
  mv /tmp/Release dists/"$2"/Release
  gpg --batch --quiet --local-user "$4" --clearsign -o dists/"$2"/InRelease dists/"$2"/Release
}
publish /srv/mirror/ubuntu jammy 'main universe' archive@standin
publish /srv/mirror/linux/ubuntu jammy stable docker@standin
gpg --export archive@standin > /srv/mirror/archive.gpg
gpg --armor --export docker@standin > /srv/mirror/linux/ubuntu/gpg
# What a scenario passes to the role in place of the published pins.
printf '{"url": "http://127.0.0.1:8080", "sha256": "%s", "fingerprint": ""}\n' \
  "$(sha256sum /srv/mirror/linux/ubuntu/gpg | cut -d' ' -f1)" > /srv/mirror/docker.json
