#!/bin/sh
# Builds the shell function as an OCI archive, `shell:1`: busybox and function.sh, one layer.
#
#   images/shell/build.sh OUT.tar [DIR]
#
# DIR, if given, is copied over the root: more files for an image of your own.
# BUSYBOX=FILE ARCHITECTURE=arm64: for another architecture (OCI's name of it), with its busybox;
# the applets are those of the busybox here.
# The same inputs give the same bytes: sorted names, owner 0:0, times at the epoch.
# Needs busybox-static, umoci and GNU tar; installs nothing, needs no registry.
set -eu

name=shell:1
usage() { echo "usage: $0 OUT.tar [DIR]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
case $1 in -*) usage ;; esac
out=$1 extra=${2-}
here=$(cd "$(dirname "$0")" && pwd)

missing=
for tool in umoci busybox tar; do
    command -v $tool >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    echo "$0: missing:$missing; on Debian: apt-get install umoci busybox-static tar" >&2
    exit 1
fi
busybox=${BUSYBOX:-$(command -v busybox)}
# The dynamic busybox of Debian's `busybox` package would find no libraries in the image. It names
# its loader near the start of the file (PT_INTERP).
if head -c 4096 "$busybox" | LC_ALL=C grep -aq '/ld-'; then
    echo "$0: $busybox is not static; on Debian: apt-get install busybox-static" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
umask 022

root=$work/root
mkdir -p "$root/bin" "$root/etc" "$root/tmp" "$root/usr"
ln -s ../bin "$root/usr/bin"
chmod 1777 "$root/tmp"
cp "$busybox" "$root/bin/busybox"
(cd "$root/bin" && busybox --list | grep -v '^busybox$' | xargs -n 1000 sh -c 'for a; do ln -s busybox "$a"; done' links)
printf 'root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$root/etc/passwd"
printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
install -m 755 "$here/function.sh" "$root/function.sh"
if [ -n "$extra" ]; then cp -a "$extra/." "$root/"; fi

pack() { tar --format=gnu --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 "$@"; }
pack -C "$root" -cf "$work/layer.tar" .

epoch=1970-01-01T00:00:00Z
layout=$work/layout
umoci init --layout "$layout"
umoci new --image "$layout:1"
history="--history.created $epoch --history.created_by images/shell/build.sh"
# shellcheck disable=SC2086 # two words each, by intent
umoci raw add-layer --image "$layout:1" $history "$work/layer.tar"
umoci config --image "$layout:1" --no-history --created $epoch ${ARCHITECTURE:+--architecture "$ARCHITECTURE"} \
    --config.env PATH=/bin --config.workingdir / --config.cmd /function.sh
umoci gc --layout "$layout" 2>/dev/null
# umoci writes the tag alone; with the repository the archive carries its whole name.
sed -i "s|\"org.opencontainers.image.ref.name\":\"1\"|\"org.opencontainers.image.ref.name\":\"$name\"|" "$layout/index.json"

pack -C "$layout" -cf "$work/out.tar" oci-layout index.json blobs
mv "$work/out.tar" "$out"
