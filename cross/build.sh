#!/bin/bash
# Static, stripped binaries in target/dist/neap-VERSION-ARCH: no C library and no loader of the
# machine they run on, so one file does for any distribution, with or without systemd.
#
# The same source gives the same bytes, wherever it lies: every path that could get into the
# binary is mapped to a fixed name, and nothing asks the clock.
#
#   cross/build.sh [ARCH…]        without one: all of cross/targets
set -euo pipefail
. cross/lib.sh

arches=("$@")
[ $# -gt 0 ] || mapfile -t arches < <(all_arches)

mkdir -p "$work" "$dist"
cross/toolchain.sh "${arches[@]}"

# The release of libcontainer doesn't compile where musl's f_type has 32 bits: two comparisons
# want a cast. The crate stays as published; a copy of what cargo fetched is changed, and the
# build stops as soon as it isn't exactly those two lines.
# Drop this with the first release that compiles.
patch_libcontainer() {
    local crate=$work/libcontainer
    local wanted='FsType(DEVPTS_SUPER_MAGIC)' cast='FsType(DEVPTS_SUPER_MAGIC as _)'
    local fetched
    fetched=$(cargo metadata --locked --format-version 1 --filter-platform "$rust" |
        python3 -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "libcontainer":
        print(os.path.dirname(package["manifest_path"]))')
    [ -d "$fetched" ] || fail "cargo names no source of libcontainer"
    rm -rf "$crate.part"
    cp -r "$fetched" "$crate.part"
    [ "$(grep -cF "$wanted" "$crate.part/src/tty.rs")" = 2 ] ||
        fail "libcontainer's src/tty.rs is not the one this patch was made for: see whether it still needs it"
    sed -i "s/$wanted/$cast/" "$crate.part/src/tty.rs"
    # The same bytes keep their time, or cargo would compile it anew at each run.
    if diff -rq "$crate.part" "$crate" >/dev/null 2>&1; then
        rm -rf "$crate.part"
    else
        rm -rf "$crate"
        mv "$crate.part" "$crate"
    fi
}

# A second root of the same source, with a lock that differs from the tracked one in the origin
# of libcontainer alone; `--locked` holds for all the rest. (Cargo's own `lockfile-path` won't
# do: it takes the standard library's lock away too.)
patched_root() {
    rm -rf "$work/source"
    mkdir "$work/source"
    local entry
    for entry in *; do
        case $entry in
        target | Cargo.lock) ;;
        *) ln -s "$root/$entry" "$work/source/$entry" ;;
        esac
    done
    python3 - "$root/Cargo.lock" "$work/source/Cargo.lock" <<'PYTHON'
import re, sys
text = open(sys.argv[1]).read()
text, found = re.subn(r'(\[\[package\]\]\nname = "libcontainer"\nversion = "[^"]*"\n)source = .*\nchecksum = .*\n', r"\1", text)
assert found == 1, "libcontainer isn't once in Cargo.lock"
open(sys.argv[2], "w").write(text)
PYTHON
}

build() {
    local arch=$1 started=$SECONDS
    read_target "$arch"
    cross/libseccomp.sh "$arch"

    local flags="--remap-path-prefix=$cargo_home=/cargo --remap-path-prefix=$root=/neap"
    flags+=" --remap-path-prefix=$target=/neap/target --remap-path-prefix=$(rustc --print sysroot)=/rust"
    local options=() from=$root
    if [ "$std" = build ]; then
        patch_libcontainer
        patched_root
        from=$work/source
        flags+=" --remap-path-prefix=$from=/neap"
        options=(
            -Z build-std=std,panic_abort
            --config "patch.crates-io.libcontainer.path='$work/libcontainer'"
        )
        # zig brings the C runtime's objects where rustc's copy of the target has none.
        flags+=" -C link-self-contained=no"
        export RUSTC_BOOTSTRAP=1
    else
        unset RUSTC_BOOTSTRAP
    fi

    local under=${rust//-/_} seccomp
    seccomp=$(libseccomp_dir "$arch")
    # -pie: for that binary alone; rustc asks for it, but zig takes `-static-pie` for nothing known,
    # and a daemon that reads bytes from outside as root should not lie at a fixed address.
    (cd "$from" && env PATH="$work/venv/bin:$PATH" \
        CARGO_ZIGBUILD_ZIG_PATH="$work/venv/bin/zig" CARGO_ZIGBUILD_CACHE_DIR="$work/zigbuild" \
        ZIG_GLOBAL_CACHE_DIR="$work/zig" ZIG_LOCAL_CACHE_DIR="$work/zig" \
        SOURCE_DATE_EPOCH=0 RUSTFLAGS="$flags" \
        "CFLAGS_$under=-ffile-prefix-map=$cargo_home=/cargo -ffile-prefix-map=$target=/neap/target" \
        LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH="$seccomp" \
        cargo-zigbuild rustc --locked --release --bin neap --target "$rust" \
        --target-dir "$work/cargo" "${options[@]}" -- -C link-arg=-pie)

    local built=$work/cargo/$rust/release/neap out
    out=$(binary "$arch")
    check_static "$built"
    cp "$built" "$out.part"
    mv "$out.part" "$out"
    echo "cross: $out: $(stat -c %s "$out") bytes, built in $((SECONDS - started)) s"
}

check_static() {
    ! readelf -lW "$1" | grep -q INTERP || fail "$1 asks for a dynamic loader"
    ! readelf -dW "$1" | grep -q NEEDED || fail "$1 asks for shared libraries"
    ! readelf -SW "$1" | grep -q '\.symtab' || fail "$1 is not stripped"
    ! grep -qaF -e "$root" -e "$cargo_home" "$1" || fail "$1 carries a path of this machine"
}

for arch in "${arches[@]}"; do
    build "$arch"
done
