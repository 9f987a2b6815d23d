#!/bin/bash
# The toolchain of the static builds: zig as the C compiler and linker for every target (with the
# musl it carries), cargo-zigbuild between it and cargo, Rust's standard libraries, and the
# source of libseccomp. All of it is pinned and goes below target/cross, but for what rustup
# keeps; a second run finds it there and asks no network.
#
#   cross/toolchain.sh ARCH…
set -euo pipefail
. cross/lib.sh

if [ ! -x "$venv/bin/zig" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv" || fail "python3 with its venv module is needed: apt-get install python3-venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        --require-hashes --requirement cross/requirements.txt
    # The compiler itself: through Python's launcher each call takes a few times as long.
    ln -s "$("$venv/bin/python" -c 'import os, ziglang; print(os.path.dirname(ziglang.__file__))')/zig" "$venv/bin/zig"
fi
ln -sfn "$venv" "$work/venv"

for arch in "$@"; do
    read_target "$arch"
    case $std in
        prebuilt) installed="rustup target list --installed" add="rustup target add $rust" what=$rust ;;
        build) installed="rustup component list --installed" add="rustup component add rust-src" what=rust-src ;;
        *) fail "std of $arch in cross/targets is neither prebuilt nor build: $std" ;;
    esac
    command -v rustup >/dev/null || fail "$what is needed, and there is no rustup to add it"
    $installed | grep -qx "$what" || $add
done

source=$work/libseccomp-$libseccomp_version
if [ ! -d "$source" ]; then
    archive=$source.tar.gz
    for url in "${libseccomp_urls[@]}"; do
        curl --silent --show-error --fail --location --max-time 120 --output "$archive" "$url" && break
    done
    echo "$libseccomp_sha256  $archive" | sha256sum --check --quiet ||
        fail "no source of libseccomp $libseccomp_version with the pinned hash could be had"
    mkdir "$source.part"
    tar --extract --file "$archive" --directory "$source.part" --strip-components=1 --no-same-owner
    mv "$source.part" "$source"
fi
