#!/bin/sh
# Builds the threshold alarm as an OCI archive, `threshold:1`: one static binary, one layer.
#
#   images/threshold/build.sh OUT.tar
#
# The layout is written by hand, which shows how little an image is: a layer, a configuration, a
# manifest, an index. The same compiler and sources give the same bytes.
# Needs cargo, a C linker with a static C library (Debian's gcc and libc6-dev), GNU tar and gzip;
# installs nothing, needs no registry.
set -eu

name=threshold:1
if [ $# -ne 1 ]; then echo "usage: $0 OUT.tar" >&2; exit 2; fi
case $1 in -*) echo "usage: $0 OUT.tar" >&2; exit 2 ;; esac
out=$1
here=$(cd "$(dirname "$0")" && pwd)

missing=
for tool in cargo cc tar gzip sha256sum; do
    command -v $tool >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
    echo "$0: missing:$missing; on Debian: apt-get install gcc libc6-dev tar gzip coreutils; cargo from https://rustup.rs" >&2
    exit 1
fi
case $(uname -m) in
    x86_64) target=x86_64-unknown-linux-gnu architecture=amd64 variant= ;;
    aarch64) target=aarch64-unknown-linux-gnu architecture=arm64 variant= ;;
    armv7l) target=armv7-unknown-linux-gnueabihf architecture=arm variant='"variant":"v7",' ;;
    *) echo "$0: no recipe for $(uname -m)" >&2; exit 1 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
umask 022

# The host's own target, statically linked: no other target has to be installed. Naming it keeps
# the flags away from build scripts.
built=${CARGO_TARGET_DIR:-$here/target}
RUSTFLAGS="-C target-feature=+crt-static --remap-path-prefix=$here=threshold" CARGO_TARGET_DIR=$built \
    cargo build --quiet --release --locked --target $target --manifest-path "$here/Cargo.toml"

mkdir -p "$work/root" "$work/layout/blobs/sha256"
install -m 755 "$built/$target/release/threshold" "$work/root/threshold"

pack() { tar --format=gnu --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 "$@"; }
digest() { sha256sum "$1" | cut -d' ' -f1; }
size() { wc -c <"$1" | tr -d ' '; }
# Moves a file to the blobs; prints its descriptor.
blob() {
    printf '{"mediaType":"application/vnd.oci.image.%s","digest":"sha256:%s","size":%s%s}' \
        "$1" "$(digest "$2")" "$(size "$2")" "${3-}"
    mv "$2" "$work/layout/blobs/sha256/$(digest "$2")"
}

pack -C "$work/root" -cf "$work/layer" threshold
diff_id=$(digest "$work/layer")
gzip -9n <"$work/layer" >"$work/layer.gz"
layer=$(blob layer.v1.tar+gzip "$work/layer.gz")

printf '{"architecture":"%s",%s"os":"linux","config":{"User":"65534:65534","Entrypoint":["/threshold"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$architecture" "$variant" "$diff_id" >"$work/config"
config=$(blob config.v1+json "$work/config")

printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":%s,"layers":[%s]}' \
    "$config" "$layer" >"$work/manifest"
manifest=$(blob manifest.v1+json "$work/manifest" ",\"annotations\":{\"org.opencontainers.image.ref.name\":\"$name\"}")

printf '{"schemaVersion":2,"manifests":[%s]}' "$manifest" >"$work/layout/index.json"
printf '{"imageLayoutVersion":"1.0.0"}' >"$work/layout/oci-layout"
pack -C "$work/layout" -cf "$work/out.tar" oci-layout index.json blobs
mv "$work/out.tar" "$out"
