#!/bin/bash
# Runs the benchmark that `make bench` has built, as root, in a mount namespace of its own.
#
#   tests/bench/run.sh TARGET [ARGUMENT…]
#
# PEERS=1 installs what is missing of crun, runc, podman (Debian) and youki (crates.io).
set -euo pipefail
target=$1
shift

if [ -n "${PEERS:-}" ]; then
    missing=()
    for package in crun runc podman; do
        command -v $package >/dev/null || missing+=($package)
    done
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    if [ ${#missing[@]} -gt 0 ]; then
        echo "bench: installing ${missing[*]}"
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
            install --no-install-recommends "${missing[@]}"
    fi
    if ! command -v youki >/dev/null; then
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
            install --no-install-recommends pkg-config libdbus-1-dev libseccomp-dev libelf-dev
        # Without the feature it refuses cgroup v1. A peer that can't be built is left out, and the
        # benchmark says so.
        cargo install --locked --root "$target/youki" --features v1 youki || echo "bench: youki can't be built" >&2
    fi
fi
export PATH="$PATH:$PWD/$target/youki/bin:$target/youki/bin"

# Cargo's own name for it; the newest is what was just built.
bench=$(ls -t "$target"/release/deps/bench-* | grep -v '\.d$' | head -n 1)
json=$target/bench/result.json
run=("$bench" --json "$json" "$@")
[ "$(id -u)" = 0 ] || run=(sudo --preserve-env=PATH "${run[@]}")
# crun refuses hybrid cgroups: hidden from this run, the v2 mount makes them plain v1.
if [ -d /sys/fs/cgroup/unified ]; then
    hide='umount /sys/fs/cgroup/unified; exec "$@"'
    prefix=(unshare --mount --propagation private sh -c "$hide" bench)
    [ "$(id -u)" = 0 ] || prefix=(sudo --preserve-env=PATH "${prefix[@]}")
    exec "${prefix[@]}" "$bench" --json "$json" "$@"
fi
exec "${run[@]}"
