#!/bin/bash
# Builds the Lambda function in lambda/ as an image: an OCI archive, `rustlambda:1`, with one
# static binary, /bootstrap.
#
#   tests/images/rust/build.sh OUT.tar
#
# What was compiled is kept beside OUT.tar, for the next build. Needs cargo, a C linker with a
# static C library, umoci and GNU tar.
set -euo pipefail
out=$(realpath -m "$1")
here=$(cd "$(dirname "$0")" && pwd)
cache=$(dirname "$out")/cache
mkdir -p "$cache"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022

# The host's own target, statically linked: nothing else of the machine has to be in the image.
target=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="-C target-feature=+crt-static" CARGO_TARGET_DIR=$cache/rust \
    cargo build --quiet --locked --target "$target" --manifest-path "$here/lambda/Cargo.toml" >&2
mkdir -p "$work/root"
install -m 755 "$cache/rust/$target/debug/bootstrap" "$work/root/bootstrap"

tar --format=gnu --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work/root" -cf "$work/layer.tar" .
layout=$work/layout
umoci init --layout "$layout"
umoci new --image "$layout:1"
umoci raw add-layer --image "$layout:1" "$work/layer.tar"
umoci config --image "$layout:1" --no-history --config.entrypoint /bootstrap --config.workingdir /
umoci gc --layout "$layout" 2>/dev/null
sed -i "s|\"org.opencontainers.image.ref.name\":\"1\"|\"org.opencontainers.image.ref.name\":\"rustlambda:1\"|" "$layout/index.json"
tar -C "$layout" -cf "$work/out.tar" oci-layout index.json blobs
mv "$work/out.tar" "$out"
