#!/bin/sh
# Makes two signed rpm repositories below /srv/mirror:
#   rocky/9/BaseOS                what Rocky's own has and Docker's packages ask for
#   linux/centos/9/<arch>/stable  what Docker's has
set -eu
apt-get update -q
apt-get install -qy rpm createrepo-c docker.io docker-cli containerd runc tini iptables gpg gpg-agent
base=/srv/mirror/rocky/9/BaseOS
docker=/srv/mirror/linux/centos/9/$(uname -m)/stable
mkdir -p "$base" "$docker"

export GNUPGHOME=/tmp/gnupg
mkdir -m 700 "$GNUPGHOME"
engine_version=$(dockerd --version | sed 's/^Docker version \([0-9.]*\).*/\1/')
build() { # spec, folder, key's name, file of the public key
  gpg --batch --quiet --passphrase '' --quick-generate-key "$3" rsa3072 sign never
  gpg --armor --export "$3" > "$4"
  # rpm's own default of 19 takes ten times as long for a file that lives on this machine.
  rpmbuild --quiet -bb --define "_topdir /tmp/rpmbuild" --define "_rpmdir $2" --define "_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm" \
    --define "_binary_payload w1.gzdio" --define "_vendor redhat" --define "engine_version $engine_version" "$1"
  rpmsign --addsign --define "_gpg_name $3" "$2"/*.rpm
  createrepo_c --quiet "$2"
}
build /specs/base.spec "$base" rocky@standin /srv/mirror/rocky/RPM-GPG-KEY-Rocky-9
build /specs/docker.spec "$docker" docker@standin /srv/mirror/linux/centos/gpg
# What a scenario passes to the role in place of the published pins.
printf '{"url": "http://127.0.0.1:8080", "sha256": "", "fingerprint": "%s"}\n' \
  "$(gpg --batch --with-colons --list-keys docker@standin | awk -F: '/^fpr/ {print $10; exit}')" > /srv/mirror/docker.json
