#!/bin/bash
# SPDX-License-Identifier: GPL-3.0-or-later
# Makes signed package repositories of stand-ins, laid out as the published ones, for test hosts that serve FOLDER at 127.0.0.1:8080:
#   make-repositories.sh apt|dnf FOLDER        on Debian 12, as root, with its package mirror in reach
# apt:
#     ubuntu-more/                            what Ubuntu 22.04 has for building modules, and its driver packages
#     debian-non-free/                        Debian 12's driver packages
#     repos/{ubuntu2204,debian12}/x86_64/     NVIDIA's: toolkits and fabric manager; local/: the same without a network
#     libnvidia-container/                    the container toolkit's
# dnf:
#     rocky/{8,9}/AppStream/, epel/           the same of Rocky, where EPEL has dkms
#     repos/rhel9/x86_64/                     NVIDIA's, drivers by module streams
#     libnvidia-container/                    the container toolkit's
# and pins.json with the keys' sums and fingerprints.
# dkms, kmod and dnf's versionlock are the real programs. The compiler is a stand-in: `make` takes only what the installer, DKMS and the
# role's settings give it and needs the kernel's own compiler, which writes a module that modinfo reads.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
family=$1 to=$2
work=$(mktemp -d)
export DEBIAN_FRONTEND=noninteractive
echo "APT::Sandbox::User root;" > /etc/apt/apt.conf.d/99root
apt-get update -qq
builders=(apt-utils)
[ "$family" = dnf ] && builders=(rpm createrepo-c)
apt-get install -qqy --no-install-recommends gpg gpg-agent "${builders[@]}" > /dev/null
export GNUPGHOME=$work/gnupg
mkdir -m 700 "$GNUPGHOME"

# ---- what packages are made of: $work/trees/NAME is a file tree, with `postinst` beside it where there is one ----
real() { # package, tree: the files of Debian's
  (cd "$work" && apt-get download -qq "$1" && dpkg-deb -x "$1"_*.deb "$2" && rm "$1"_*.deb)
  rm -rf "$2"/usr/share/{doc,man,lintian,locale}
}
script() { # path, then its content on standard input
  mkdir -p "$(dirname "$1")"
  cat > "$1"
  chmod 755 "$1"
}
headers() { # tree, release, the line of its configuration that names the compiler
  local source=$1/usr/src/linux-headers-$2
  mkdir -p "$source/include/generated" "$1/lib/modules/$2"
  echo '/* stand-in */' > "$source/include/generated/autoconf.h"
  printf '%s\nCONFIG_CC_IS_GCC=y\n' "$3" > "$source/.config"
  echo '# the stand-in of make knows what to do' > "$source/Makefile"
  ln -s "/usr/src/linux-headers-$2" "$1/lib/modules/$2/build"
}
driver_source() { # tree, version, licence, name of its tree in DKMS, what is put before its modules' names in there
  local source=$1/usr/src/${4:-nvidia}-$2
  mkdir -p "$source"
  cp "$here"/../nvidia_runfile/payload/kernel/* "$source/"
  sed -i "s|@VERSION@|$2|; s|@LICENSE@|$3|" "$source"/*
  sed -i "s|PACKAGE_NAME=.*|PACKAGE_NAME=\"${4:-nvidia}\"|" "$source/dkms.conf"
  [ -z "${5:-}" ] || printf 'DEST_MODULE_NAME[0]="%s"\nDEST_MODULE_NAME[1]="%s-uvm"\n' "$5" "$5" >> "$source/dkms.conf"
}
libraries() { # tree, folder, version
  mkdir -p "$1$2"
  for name in libcuda libnvidia-ml; do
    echo "stand-in of $name $3" > "$1$2/$name.so.$3"
    ln -s "$name.so.$3" "$1$2/$name.so.1"
  done
}
smi() { # tree, version
  mkdir -p "$1/usr/bin" "$1/usr/lib/nvidia-standin"
  sed "s/@VERSION@/$2/" "$here/../nvidia_runfile/payload/nvidia-smi" > "$1/usr/bin/nvidia-smi"
  cp "$here/../nvidia_smi.py" "$1/usr/lib/nvidia-standin/scene-smi.py"
  chmod 755 "$1/usr/bin/nvidia-smi"
}
persistenced() { # tree, version, and "static" for a unit as Ubuntu's, which has no [Install]
  mkdir -p "$1/usr/bin" "$1/usr/lib/systemd/system"
  sed "s/@VERSION@/$2/" "$here/../nvidia_runfile/payload/nvidia-persistenced" > "$1/usr/bin/nvidia-persistenced"
  chmod 755 "$1/usr/bin/nvidia-persistenced"
  if [ "${3:-}" = static ]; then
    printf '[Unit]\nDescription=NVIDIA Persistence Daemon\n[Service]\nType=forking\nExecStart=/usr/bin/nvidia-persistenced --no-persistence-mode --verbose\n'
  else
    printf '[Unit]\nDescription=NVIDIA Persistence Daemon\n[Service]\nType=forking\nExecStart=/usr/bin/nvidia-persistenced --verbose\n[Install]\nWantedBy=multi-user.target\n'
  fi > "$1/usr/lib/systemd/system/nvidia-persistenced.service"
}
fabric() { # tree, version: refuses a driver of another version, as the real one does
  script "$1/usr/bin/nv-fabricmanager" <<END
#!/bin/sh
grep -q ' $2  Release' /proc/driver/nvidia/version || { echo 'fabric manager NVIDIA GPU driver interface version $2 don''t match with driver version' >&2; exit 1; }
exec sleep infinity
END
  mkdir -p "$1/usr/lib/systemd/system"
  printf '[Unit]\nDescription=NVIDIA fabric manager service\n[Service]\nExecStart=/usr/bin/nv-fabricmanager\n[Install]\nWantedBy=multi-user.target\n' \
    > "$1/usr/lib/systemd/system/nvidia-fabricmanager.service"
}
toolkit() { # tree, series, full version
  script "$1/usr/local/cuda-$2/bin/nvcc" < <(sed "s/@SERIES@/$2/" "$here/nvcc")
  printf '{"cuda": {"name": "CUDA SDK", "version": "%s"}}\n' "$3" > "$1/usr/local/cuda-$2/version.json"
}
compiler() { # tree, name
  script "$1/usr/bin/$2" < "$here/cc"
}
dkms_hook() { # version, name of the tree in DKMS: what its package does when it is installed
  sed "s/@VERSION@/$1/g; s/@NAME@/${2:-nvidia}/g" <<'END'
[ -n "$(dkms status -m @NAME@ -v @VERSION@)" ] || dkms add -m @NAME@ -v @VERSION@
for kernel in $(ls /lib/modules); do
  [ -e /lib/modules/$kernel/build/Makefile ] || continue
  dkms build -m @NAME@ -v @VERSION@ -k $kernel && dkms install --force -m @NAME@ -v @VERSION@ -k $kernel
done
END
}
tree() { # name: an empty tree
  rm -rf "$work/tree"
  mkdir -p "$work/tree"
}

# ---- packages ----
deb() { # folder, name, version, further fields, postinst, name of its tree in DKMS
  mkdir -p "$work/tree/DEBIAN" "$to/$1"
  printf 'Package: %s\nVersion: %s\nArchitecture: amd64\nMaintainer: stand-in <root@localhost>\n%bDescription: stand-in\n' \
    "$2" "$3" "${4:+$4\n}" > "$work/tree/DEBIAN/control"
  if [ -n "${5:-}" ]; then
    printf '#!/bin/sh\nset -e\n%s\n' "$5" > "$work/tree/DEBIAN/postinst"
    printf '#!/bin/sh\ndkms remove -m %s -v %s --all || true\n' "${6:-nvidia}" "${3%%-*}" > "$work/tree/DEBIAN/prerm"
    chmod 755 "$work/tree/DEBIAN/postinst" "$work/tree/DEBIAN/prerm"
  fi
  [ ! -d "$work/tree/etc" ] || (cd "$work/tree" && find etc -type f | sed 's|^|/|' > DEBIAN/conffiles)
  dpkg-deb --build -Zgzip -z1 --root-owner-group "$work/tree" "$to/$1/${2}_${3##*:}_amd64.deb" > /dev/null
  tree
}
rpm_of() { # folder, name, version, release, further lines of the header, %post, %preun (of a DKMS module where it is left out)
  mkdir -p "$to/$1"
  {
    printf '%%global debug_package %%{nil}\n%%global __os_install_post %%{nil}\nAutoReqProv: no\nName: %s\nVersion: %s\nRelease: %s\nSummary: stand-in\nLicense: GPL-3.0-or-later\n%b\n' \
      "$2" "$3" "$4" "${5:-}"
    printf '%%description\nstand-in\n%%install\nmkdir -p %%{buildroot}\ncp -a %s/tree/. %%{buildroot}/\n' "$work"
    if [ -n "${6:-}" ]; then
      printf '%%post\n%s\n%%preun\n%s\n' "$6" "${7:-dkms remove -m nvidia -v $3 --all || true}"
    fi
    printf '%%files\n'
    (cd "$work/tree" && find . -type f -o -type l | sed 's|^\.|"|; s|$|"|' && find . -mindepth 1 -type d -empty | sed 's|^\.|%dir "|; s|$|"|')
  } > "$work/package.spec"
  rpmbuild --quiet -bb --define "_topdir $work/rpmbuild" --define "_rpmdir $to/$1" --define '_rpmfilename %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
    --define '_binary_payload w1.gzdio' --define '_build_id_links none' "$work/package.spec" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
  tree
}
key() { # name
  gpg --batch --quiet --passphrase '' --quick-generate-key "$1" rsa3072 sign never
}
publish_flat() { # folder, label, key
  cd "$to/$1"
  apt-ftparchive packages . > Packages
  apt-ftparchive -o "APT::FTPArchive::Release::Label=$2" -o "APT::FTPArchive::Release::Origin=$2" release . > "$work/Release"
  mv "$work/Release" Release
  gpg --batch --quiet --local-user "$3" --clearsign -o InRelease Release
  cd - > /dev/null
}
publish_rpm() { # folder, key
  rpmsign --define "__gpg /usr/bin/gpg" --define "_gpg_name $2" --addsign "$to/$1"/*.rpm > /dev/null
  createrepo_c --quiet "$to/$1"
}
fingerprint() { gpg --batch --with-colons --list-keys "$1" | awk -F: '/^fpr/ {print $10; exit}'; }

tree
key distribution@standin
key nvidia@standin


if [ "$family" = apt ]; then
# Ubuntu's own
ubuntu_kernel=6.8.0-90-generic
for name in kmod libkmod2; do
  (mkdir -p "$to/ubuntu-more" && cd "$to/ubuntu-more" && apt-get download -qq "$name")
done
real dkms "$work/tree"; rm -rf "$work/tree"/{etc/kernel,lib/systemd,usr/lib/systemd,usr/share/apport}
deb ubuntu-more dkms 3.0.10-1 'Depends: kmod, make'
script "$work/tree/usr/bin/make" < "$here/make"
deb ubuntu-more make 4.3-4.1build1
for name in libc6-dev libelf-dev; do deb ubuntu-more $name 2.35-1; done
compiler "$work/tree" x86_64-linux-gnu-gcc-12; ln -s x86_64-linux-gnu-gcc-12 "$work/tree/usr/bin/gcc-12"
deb ubuntu-more gcc-12 12.3.0-1ubuntu1~22.04
compiler "$work/tree" x86_64-linux-gnu-g++-11; ln -s x86_64-linux-gnu-g++-11 "$work/tree/usr/bin/g++"
deb ubuntu-more g++ 4:11.2.0-1ubuntu1
headers "$work/tree" $ubuntu_kernel 'CONFIG_CC_VERSION_TEXT="x86_64-linux-gnu-gcc-12 (Ubuntu 12.3.0-1ubuntu1~22.04) 12.3.0"'
deb ubuntu-more linux-headers-$ubuntu_kernel 6.8.0-90.91~22.04.1
deb ubuntu-more linux-headers-generic-hwe-22.04 6.8.0-90.91~22.04.1 "Depends: linux-headers-$ubuntu_kernel"
deb ubuntu-more linux-image-$ubuntu_kernel 6.8.0-90.91~22.04.1
deb ubuntu-more linux-image-generic-hwe-22.04 6.8.0-90.91~22.04.1 "Depends: linux-image-$ubuntu_kernel"
for version in 580.95.05 580.105.08 580.126.20; do # NVIDIA's repository below has no fabric manager of the second
  revision=$version-0ubuntu0.22.04.1
  driver_source "$work/tree" $version 'Dual MIT/GPL'
  deb ubuntu-more nvidia-dkms-580-server-open $revision 'Depends: dkms' "$(dkms_hook $version)"
  libraries "$work/tree" /usr/lib/x86_64-linux-gnu $version
  deb ubuntu-more libnvidia-compute-580-server $revision
  smi "$work/tree" $version
  deb ubuntu-more nvidia-utils-580-server $revision "Depends: libnvidia-compute-580-server (= $revision)"
  persistenced "$work/tree" $version static
  deb ubuntu-more nvidia-compute-utils-580-server $revision "Depends: libnvidia-compute-580-server (= $revision)"
  for name in decode encode; do deb ubuntu-more libnvidia-$name-580-server $revision "Depends: libnvidia-compute-580-server (= $revision)"; done
done
publish_flat ubuntu-more Ubuntu distribution@standin
gpg --export distribution@standin > "$to/ubuntu-more/key.gpg"

# Debian 12's, in non-free: modules and their tree are called nvidia-current, and alternatives lead to them
version=535.309.01 revision=535.309.01-0+deb12u1
driver_source "$work/tree" $version NVIDIA nvidia-current nvidia-current
deb debian-non-free nvidia-kernel-dkms $revision 'Depends: dkms' "$(dkms_hook $version nvidia-current)" nvidia-current
libraries "$work/tree" /usr/lib/x86_64-linux-gnu/nvidia/current $version
current=usr/lib/x86_64-linux-gnu/nvidia/current
mkdir -p "$work/ml/$current"; mv "$work/tree/$current"/libnvidia-ml.* "$work/ml/$current/"
ln -s nvidia/current/libcuda.so.1 "$work/tree/usr/lib/x86_64-linux-gnu/libcuda.so.1"
deb debian-non-free libcuda1 $revision
cp -a "$work/ml/." "$work/tree/"
ln -s nvidia/current/libnvidia-ml.so.1 "$work/tree/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1"
deb debian-non-free libnvidia-ml1 $revision
smi "$work/tree" $version
mkdir -p "$work/tree/usr/lib/nvidia"; touch "$work/tree/usr/lib/nvidia/alternate-install-present"
deb debian-non-free nvidia-smi $revision "Depends: libnvidia-ml1 (= $revision)"
deb debian-non-free nvidia-driver-libs $revision
persistenced "$work/tree" $version
deb debian-non-free nvidia-persistenced 535.171.04-1~deb12u1
# The open modules are behind, and need a firmware that the others' update has taken away.
deb debian-non-free nvidia-open-kernel-dkms 535.261.03-1 'Depends: dkms, firmware-nvidia-gsp-535.261.03'
publish_flat debian-non-free Debian distribution@standin
cp "$to/ubuntu-more/key.gpg" "$to/debian-non-free/key.gpg"

# NVIDIA's, for apt
for release in ubuntu2204 debian12; do
  apt=repos/$release/x86_64
  toolkit "$work/tree" 12.9 12.9.1; deb $apt cuda-toolkit-12-9 12.9.1-1
  toolkit "$work/tree" 13.0 13.0.2; deb $apt cuda-toolkit-13-0 13.0.2-1
  for version in 580.95.05 580.126.20; do fabric "$work/tree" $version; deb $apt nvidia-fabricmanager $version-1; done
  # As debian/control of NVIDIA/apt-packaging-fabric-manager has it for the packages with a branch in their name.
  for version in 535.288.01 535.309.01; do
    fabric "$work/tree" $version
    deb $apt nvidia-fabricmanager-535 $version-1 'Provides: nvidia-fabricmanager\nReplaces: nvidia-fabricmanager\nConflicts: nvidia-fabricmanager'
  done
  deb $apt cuda-drivers 590.48.01-1
  publish_flat $apt 'NVIDIA CUDA' nvidia@standin
  mkdir -p "$work/tree/usr/share/keyrings"
  gpg --export nvidia@standin > "$work/tree/usr/share/keyrings/cuda-archive-keyring.gpg"
  deb keyring cuda-keyring 1.1-1
  mv "$to/keyring/cuda-keyring_1.1-1_amd64.deb" "$to/$apt/cuda-keyring_1.1-1_all.deb"
done

# A repository package, as NVIDIA's for installations without a network: the repository lies below /var, its key beside it.
local=$work/local/var/cuda-repo-debian12-12-9-local
mkdir -p "$local" "$work/local/etc/apt/sources.list.d"
cp "$to/repos/debian12/x86_64"/cuda-toolkit-12-9_*.deb "$local/"
(cd "$local" && apt-ftparchive packages . > Packages && apt-ftparchive -o 'APT::FTPArchive::Release::Label=NVIDIA CUDA' release . > "$work/Release" && mv "$work/Release" Release &&
  gpg --batch --quiet --local-user nvidia@standin --clearsign -o InRelease Release && gpg --export nvidia@standin > cuda-9A3B-keyring.gpg)
echo 'deb [signed-by=/usr/share/keyrings/cuda-9A3B-keyring.gpg] file:///var/cuda-repo-debian12-12-9-local /' \
  > "$work/local/etc/apt/sources.list.d/cuda-debian12-12-9-local.list"
cp -a "$work/local/." "$work/tree/"
deb local cuda-repo-debian12-12-9-local 12.9.1-575.57.08-1

# Runfiles
for full in 12.9.1:575.57.08 13.0.2:580.95.05; do
  version=${full%:*} series=${full%.*:*}
  sed "s/@SERIES@/$series/" "$here/nvcc" > "$work/nvcc"
  sed -e "s/@SERIES@/$series/; s/@VERSION@/$version/" -e "/@NVCC@/{r $work/nvcc" -e 'd}' "$here/cuda.run" \
    > "$to/local/cuda_${version}_${full#*:}_linux.run"
done

# The container toolkit's
toolkit_key=$(sh "$here/../container_toolkit/make-repository.sh" "$to/libnvidia-container" 1.19.1-1 1.20.0-1)
sum() { sha256sum "$1" | cut -d' ' -f1; }
printf '{"keyring": {"ubuntu2204": "%s", "debian12": "%s"}, "toolkit": "%s", "local": "%s", "run": {"12.9": "%s", "13.0": "%s"}}\n' \
  "$(sum "$to/repos/ubuntu2204/x86_64/cuda-keyring_1.1-1_all.deb")" "$(sum "$to/repos/debian12/x86_64/cuda-keyring_1.1-1_all.deb")" \
  "$toolkit_key" "$(sum "$to"/local/*.deb)" "$(sum "$to"/local/cuda_12*.run)" "$(sum "$to"/local/cuda_13*.run)" > "$to/pins.json"
else
# Rocky's own, and EPEL
for name in make gcc gcc-c++ glibc-devel elfutils-libelf-devel bzip2; do
  case $name in
    make) script "$work/tree/usr/bin/make" < "$here/make" ;;
    gcc) compiler "$work/tree" gcc ;;
    gcc-c++) compiler "$work/tree" g++ ;;
  esac
  rpm_of rocky/9/AppStream $name 11.5.0 5.el9
done
real kmod "$work/tree"; real libkmod2 "$work/tree"
mkdir -p "$work/tree/usr/bin" "$work/tree/usr/sbin"; [ ! -d "$work/tree/bin" ] || { cp -a "$work/tree/bin/." "$work/tree/usr/bin/"; rm -r "$work/tree/bin"; }
[ ! -d "$work/tree/sbin" ] || { cp -a "$work/tree/sbin/." "$work/tree/usr/sbin/"; rm -r "$work/tree/sbin"; }
[ ! -d "$work/tree/lib" ] || { mkdir -p "$work/tree/usr/lib"; cp -a "$work/tree/lib/." "$work/tree/usr/lib/"; rm -r "$work/tree/lib"; }
rpm_of rocky/9/AppStream kmod 28 10.el9
real dnf-plugins-core "$work/tree"
find "$work/tree" -type f ! -name '*versionlock*' ! -path '*/dnfpluginscore/*' -delete
rpm_of rocky/9/AppStream python3-dnf-plugin-versionlock 4.3.0 20.el9
headers "$work/tree" 5.14.0-570.el9.x86_64 'CONFIG_CC_VERSION_TEXT="gcc (GCC) 11.5.0 20240719 (Red Hat 11.5.0-5)"'
mv "$work/tree/lib" "$work/tree/usr/lib"
rpm_of rocky/9/AppStream kernel-devel 5.14.0 570.el9
for name in kernel kernel-core kernel-modules; do rpm_of rocky/9/AppStream $name 5.14.0 570.el9; done
mkdir -p "$work/tree/etc/yum.repos.d"
printf '[epel]\nname = Extra Packages for Enterprise Linux (stand-in)\nbaseurl = http://127.0.0.1:8080/epel\nenabled = 1\ngpgcheck = 1\ngpgkey = http://127.0.0.1:8080/rocky/9/key.asc\n' \
  > "$work/tree/etc/yum.repos.d/epel.repo"
rpm_of rocky/9/AppStream epel-release 9 9.el9
real dkms "$work/tree"; rm -rf "$work/tree"/{etc/kernel,lib,usr/lib/systemd,usr/share/apport}
rpm_of epel dkms 3.0.10 1.el9 'Requires: kmod, make'
# Rocky 8 has the same but an older kernel, whose configuration tells the compiler in another way.
mkdir -p "$to/rocky/8/AppStream"
cp "$to"/rocky/9/AppStream/*.rpm "$to/rocky/8/AppStream/"
rm "$to"/rocky/8/AppStream/kernel-*.rpm
headers "$work/tree" 4.18.0-553.el8_10.x86_64 '# Compiler: gcc (GCC) 8.5.0 20210514 (Red Hat 8.5.0-22)'
mv "$work/tree/lib" "$work/tree/usr/lib"
rpm_of rocky/8/AppStream kernel-devel 4.18.0 553.el8_10
for name in kernel kernel-core kernel-modules; do rpm_of rocky/8/AppStream $name 4.18.0 553.el8_10; done
publish_rpm rocky/8/AppStream distribution@standin
publish_rpm rocky/9/AppStream distribution@standin
publish_rpm epel distribution@standin
gpg --armor --export distribution@standin > "$to/rocky/9/key.asc"

# NVIDIA's, for dnf: a stream a branch. The first version has no fabric manager here. Before 580 that is named otherwise, with the relations
# that NVIDIA/yum-packaging-fabric-manager (fabricmanager.spec) gives it; what the later name has is not published, so that it has none.
rhel=repos/rhel9/x86_64
for version in 575.57.08 575.64.03 580.95.05 590.48.01; do
  driver_source "$work/tree" $version 'Dual MIT/GPL'
  rpm_of $rhel kmod-nvidia-open-dkms $version 1.el9 'Epoch: 3\nRequires: dkms' "$(dkms_hook $version)"
  libraries "$work/tree" /usr/lib64 $version; smi "$work/tree" $version
  rpm_of $rhel nvidia-driver-cuda $version 1.el9 "Epoch: 3"
  persistenced "$work/tree" $version
  rpm_of $rhel nvidia-persistenced $version 1.el9 "Epoch: 3\nRequires: nvidia-driver-cuda = 3:$version"
  case $version in
    575.57.08) continue ;;
    575.*) name=nvidia-fabric-manager
      relations="Provides: nvidia-fabricmanager = $version, nvidia-fabricmanager-575 = $version\nObsoletes: nvidia-fabricmanager" ;;
    *) name=nvidia-fabricmanager relations= ;;
  esac
  fabric "$work/tree" $version
  rpm_of $rhel $name $version 1 "$relations"
done
toolkit "$work/tree" 12.9 12.9.1; rpm_of $rhel cuda-toolkit-12-9 12.9.1 1
toolkit "$work/tree" 13.0 13.0.2; rpm_of $rhel cuda-toolkit-13-0 13.0.2 1
publish_rpm $rhel nvidia@standin
gpg --armor --export nvidia@standin > "$to/$rhel/D42D0685.pub"

# A repository package, as NVIDIA's for installations without a network: the repository lies below /var, its key in it.
local=var/cuda-repo-rhel9-12-9-local
mkdir -p "$work/tree/$local" "$work/tree/etc/yum.repos.d"
cp "$to/$rhel"/cuda-toolkit-12-9-*.rpm "$to/$rhel/D42D0685.pub" "$work/tree/$local/"
createrepo_c --quiet "$work/tree/$local"
printf '[cuda-rhel9-12-9-local]\nname = cuda-rhel9-12-9-local\nbaseurl = file:///%s\nenabled = 1\ngpgcheck = 1\ngpgkey = file:///%s/D42D0685.pub\n' $local $local \
  > "$work/tree/etc/yum.repos.d/cuda-rhel9-12-9-local.repo"
rpm_of local cuda-repo-rhel9-12-9-local 12.9.1_575.57.08 1

modules=$work/modules.yaml
for stream in 575-open:575.57.08:575.64.03 580-open:580.95.05 open-dkms:590.48.01; do
  versions=${stream#*:}
  printf -- '---\ndocument: modulemd\nversion: 2\ndata:\n  name: nvidia-driver\n  stream: %s\n  version: 20260101000000\n  context: 8e3b%s\n  arch: x86_64\n  summary: stand-in\n  description: stand-in\n  license: {module: [NVIDIA]}\n  artifacts:\n    rpms:\n' \
    "${stream%%:*}" "${versions%%.*}f"
  for version in ${versions//:/ }; do
    for name in kmod-nvidia-open-dkms nvidia-driver-cuda nvidia-persistenced; do printf '    - %s-3:%s-1.el9.x86_64\n' $name "$version"; done
    for name in nvidia-fabricmanager nvidia-fabric-manager; do
      [ ! -e "$to/$rhel/$name-$version-1.x86_64.rpm" ] || printf '    - %s-0:%s-1.x86_64\n' $name "$version"
    done
  done
  printf '...\n'
done > "$modules"
printf -- '---\ndocument: modulemd-defaults\nversion: 1\ndata:\n  module: nvidia-driver\n  stream: open-dkms\n  profiles: {}\n...\n' >> "$modules"
modifyrepo_c --mdtype=modules "$modules" "$to/$rhel/repodata" > /dev/null
cp -r "$to/repos/rhel9" "$to/repos/rhel8"

key toolkit@standin
# The container toolkit's, for dnf
rpmdir=libnvidia-container/stable/rpm/x86_64
scripts=$here/../container_toolkit
for version in 1.19.1 1.20.0; do
  rpm_of $rpmdir libnvidia-container1 $version 1
  rpm_of $rpmdir libnvidia-container-tools $version 1 "Requires: libnvidia-container1 = $version-1"
  script "$work/tree/usr/bin/nvidia-ctk" < <(sed "s/@VERSION@/$version/; s|/usr/lib/x86_64-linux-gnu|/usr/lib64|g" "$scripts/nvidia-ctk")
  mkdir -p "$work/tree/usr/lib/systemd/system"
  cp "$scripts"/nvidia-cdi-refresh.* "$work/tree/usr/lib/systemd/system/"
  rpm_of $rpmdir nvidia-container-toolkit-base $version 1 '' "$(cat "$scripts/postinst")" true
  script "$work/tree/usr/bin/nvidia-container-runtime" < "$scripts/nvidia-container-runtime"
  rpm_of $rpmdir nvidia-container-toolkit $version 1 "Requires: nvidia-container-toolkit-base = $version-1, libnvidia-container-tools = $version-1"
done
publish_rpm $rpmdir toolkit@standin
gpg --armor --export toolkit@standin > "$to/libnvidia-container/gpgkey"

printf '{"cuda": "%s", "toolkit": "%s", "local": "%s"}\n' "$(fingerprint nvidia@standin)" "$(fingerprint toolkit@standin)" \
  "$(sha256sum "$to"/local/*.rpm | cut -d' ' -f1)" > "$to/pins.json"
fi
rm -rf "$work" "$to/keyring"
