#!/bin/sh
# A stand-in of NVIDIA's self-extracting archive (makeself): same options, same statuses. What follows line @SKIP@ is the payload.
skip=@SKIP@
version=@VERSION@
md5=@MD5@
target=""
temporary="${TMPDIR:-/tmp}"
extract=no
arguments=""
while [ $# -gt 0 ]; do
  case "$1" in
    --check)
      if [ "$(tail -n +$skip "$0" | md5sum | cut -d' ' -f1)" = "$md5" ]; then echo "check sums and md5 sums are ok"; exit 0; fi
      echo "Error in md5 checksum"; exit 2 ;;
    --info) echo "Identification: NVIDIA Accelerated Graphics Driver for Linux-x86_64 $version"; exit 0 ;;
    --version-string) echo "$version"; exit 0 ;;
    --target-arch) echo x86_64; exit 0 ;;
    --list) tail -n +$skip "$0" | tar -tzf -; exit $? ;;
    -x | --extract-only) extract=yes ;;
    --target) shift; target=$1 ;;
    --tmpdir) shift; temporary=$1 ;;
    *) arguments="$arguments '$1'" ;;
  esac
  shift
done
if [ "$(tail -n +$skip "$0" | md5sum | cut -d' ' -f1)" != "$md5" ]; then echo "Error in md5 checksum" >&2; exit 2; fi
if [ "$extract" = yes ]; then
  target=${target:-./NVIDIA-Linux-x86_64-$version}
  if [ -e "$target" ]; then echo "directory $target already exists" >&2; exit 1; fi
else
  target=$(mktemp -d "$temporary/selfgz.XXXXXX") || { echo "Unable to create temporary directory in $temporary" >&2; exit 1; }
  printf '#!/bin/sh\nexit 0\n' > "$target/probe"; chmod +x "$target/probe"
  "$target/probe" 2>/dev/null || { echo "Temporary directory $target is not executable" >&2; exit 1; }
  rm "$target/probe"
fi
mkdir -p "$target"
echo "Verifying archive integrity... OK"
echo "Uncompressing NVIDIA Accelerated Graphics Driver for Linux-x86_64 $version"
tail -n +$skip "$0" | tar -xzf - -C "$target" || exit 1
[ "$extract" = no ] || exit 0
(cd "$target" && eval "./nvidia-installer $arguments")
status=$?
rm -rf "$target"
exit $status
