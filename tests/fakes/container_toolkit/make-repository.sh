#!/bin/sh
# SPDX-License-Identifier: GPL-3.0-or-later
# Makes a signed apt repository of stand-ins of the container toolkit's four packages, laid out as the published one:
#   make-repository.sh FOLDER VERSION...     FOLDER/gpgkey, FOLDER/stable/deb/amd64/
# The packages ask for each other in their exact version, as the real ones do. Prints the sha256 of gpgkey.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
to=$1/stable/deb/amd64
shift
mkdir -p "$to"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

package() { # name, version, depends
  mkdir -p "$work/$1/DEBIAN"
  printf 'Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: stand-in <root@localhost>\n%sDescription: stand-in\n' \
    "$1" "$2" "${3:+Depends: $3
}" > "$work/$1/DEBIAN/control"
  dpkg-deb --build --root-owner-group "$work/$1" "$to/${1}_${2}_amd64.deb" > /dev/null
  rm -rf "${work:?}/$1"
}

for version in "$@"; do
  base=$work/nvidia-container-toolkit-base
  mkdir -p "$base/usr/bin" "$base/usr/lib/systemd/system" "$base/DEBIAN"
  sed "s/@VERSION@/${version%-*}/" "$here/nvidia-ctk" > "$base/usr/bin/nvidia-ctk"
  chmod 755 "$base/usr/bin/nvidia-ctk"
  cp "$here"/nvidia-cdi-refresh.* "$base/usr/lib/systemd/system/"
  { echo '#!/bin/sh'; cat "$here/postinst"; } > "$base/DEBIAN/postinst"
  chmod 755 "$base/DEBIAN/postinst"
  package nvidia-container-toolkit-base "$version" ""
  package libnvidia-container1 "$version" ""
  package libnvidia-container-tools "$version" "libnvidia-container1 (= $version)"
  mkdir -p "$work/nvidia-container-toolkit/usr/bin"
  cp "$here/nvidia-container-runtime" "$work/nvidia-container-toolkit/usr/bin/"
  chmod 755 "$work/nvidia-container-toolkit/usr/bin/nvidia-container-runtime"
  package nvidia-container-toolkit "$version" "nvidia-container-toolkit-base (= $version), libnvidia-container-tools (= $version)"
done

cd "$to"
: > Packages
for file in *.deb; do
  { dpkg-deb -f "$file"; printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "$file" "$(stat -c %s "$file")" "$(sha256sum "$file" | cut -d' ' -f1)"; } >> Packages
done
printf 'Origin: stand-in\nLabel: stand-in\nSuite: stable\nDate: %s\nSHA256:\n %s %s Packages\n' \
  "$(date -Ru)" "$(sha256sum Packages | cut -d' ' -f1)" "$(stat -c %s Packages)" > Release
export GNUPGHOME=$work/gnupg
mkdir -m 700 "$GNUPGHOME"
gpg --batch --quiet --passphrase '' --quick-generate-key toolkit@standin rsa3072 sign never
gpg --batch --quiet --clearsign -o InRelease Release
gpg --armor --export toolkit@standin > ../../../gpgkey
sha256sum ../../../gpgkey | cut -d' ' -f1
