#!/bin/bash
# The toolchain of the static builds: zig as the C compiler and linker for every target (with the
# musl it carries), cargo-zigbuild between it and cargo, the sources of Rust's
# standard library and of libseccomp. All of it is pinned and goes below target/cross, but for what rustup
# keeps; a second run finds it there and asks no network.
#
#   cross/toolchain.sh
set -euo pipefail
. cross/lib.sh

if [ ! -x "$venv/bin/zig" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv" || fail "python3 with its venv module is needed: apt-get install python3-venv"
    try_thrice "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        --require-hashes --requirement cross/requirements.txt
    # The compiler itself: through Python's launcher each call takes a few times as long.
    ln -s "$("$venv/bin/python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig" "$venv/bin/zig"
fi
ln -sfn "$venv" "$work/venv"

# Of Rust only the sources: the standard library is compiled for each target (cross/build.sh).
std=$(rustc --print sysroot)/lib/rustlib/src/rust/library/std/Cargo.toml
if [ ! -f "$std" ]; then
    without="the static builds compile Rust's standard library, and its sources (rust-src) are not in $(rustc --print sysroot)"
    command -v rustup >/dev/null ||
        fail "$without; there is no rustup to add them: install Rust by rustup, or your distribution's rust-src for $(rustc --version)"
    try_thrice rustup component add rust-src ||
        fail "$without; \`rustup component add rust-src\` failed: it asks the server that Rust was installed from (RUSTUP_DIST_SERVER for a mirror), once"
    [ -f "$std" ] || fail "rustup says that rust-src is there, but there is no $std"
fi

source=$work/libseccomp-$libseccomp_version
if [ ! -d "$source" ]; then
    archive=$source.tar.gz
    rm -rf "$source.part"
    for url in "${libseccomp_urls[@]}"; do
        curl --silent --show-error --fail --location --retry 3 --max-time 120 --output "$archive" "$url" && break
    done
    echo "$libseccomp_sha256  $archive" | sha256sum --check --quiet ||
        fail "no source of libseccomp $libseccomp_version with the pinned hash could be had"
    mkdir "$source.part"
    tar --extract --file "$archive" --directory "$source.part" --strip-components=1 --no-same-owner
    mv "$source.part" "$source"
fi
