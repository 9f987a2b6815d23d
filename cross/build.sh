#!/bin/bash
# Static, stripped binaries in target/dist/neap-VERSION-ARCH: no C library and no loader of the
# machine they run on, so one file does for any distribution, with or without systemd.
#
# The same source gives the same bytes, wherever it lies and whatever else rustup has installed: every
# path that could get into the binary is mapped to a fixed name, nothing asks the clock, and build
# scripts find the same compiler (cross/rustc.sh).
#
#   cross/build.sh [ARCH…]        without one: all of cross/targets
set -euo pipefail
. cross/lib.sh

arches=("$@")
[ $# -gt 0 ] || mapfile -t arches < <(all_arches)

mkdir -p "$work" "$dist"
cross/toolchain.sh

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
    patch_libcontainer
    rm -rf "$work/source"
    mkdir -p "$work/source/target"
    ln -s "$work/libcontainer" "$work/source/target/libcontainer"
    local entry
    for entry in * .cargo; do
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
    export ZIG_GLOBAL_CACHE_DIR=$work/zig ZIG_LOCAL_CACHE_DIR=$work/zig
    cross/libseccomp.sh "$arch"
    cross/runtime.sh "$arch"

    local from=$root options=()
    if [ "$patch" = libcontainer ]; then
        patched_root
        from=$work/source
        # Inside of that root: cargo names a crate by its path below the root, or by the whole of it.
        options=(--config "patch.crates-io.libcontainer.path='$from/target/libcontainer'")
    fi

    local flags="--remap-path-prefix=$cargo_home=/cargo --remap-path-prefix=$root=/neap"
    flags+=" --remap-path-prefix=$from=/neap --remap-path-prefix=$target=/neap/target"
    flags+=" --remap-path-prefix=$(rustc --print sysroot)=/rust"
    # No unwind tables: a panic ends the process, and without symbols they name nothing.
    flags+=" -C force-unwind-tables=no"
    # zig brings the C runtime; cross/link.sh says why not through its own driver.
    flags+=" -C link-self-contained=no -C linker=$root/cross/link.sh -C linker-flavor=ld.lld"

    local under=${rust//-/_} seccomp c_flags
    seccomp=$(libseccomp_dir "$arch")
    c_flags="-ffile-prefix-map=$cargo_home=/cargo -ffile-prefix-map=$target=/neap/target"
    c_flags+=" -fno-asynchronous-unwind-tables -fno-unwind-tables -ffunction-sections -fdata-sections"
    # The standard library is compiled too, for size: the one that rustup brings is made for speed
    # and carries its unwind tables. Cargo can do that and says that it may change, hence
    # RUSTC_BOOTSTRAP; the language stays the stable one.
    (cd "$from" && env PATH="$work/venv/bin:$PATH" \
        CARGO_ZIGBUILD_ZIG_PATH="$work/venv/bin/zig" CARGO_ZIGBUILD_CACHE_DIR="$work/zigbuild" \
        NEAP_ZIG="$work/venv/bin/zig" NEAP_RUNTIME="$(runtime_dir "$arch")" \
        SOURCE_DATE_EPOCH=0 RUSTC="$root/cross/rustc.sh" RUSTC_BOOTSTRAP=1 \
        RUSTFLAGS="$flags" "CFLAGS_$under=$c_flags" \
        LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH="$seccomp" \
        cargo-zigbuild build --locked --release --bin neap --target "$rust" --target-dir "$work/cargo" \
        -Z build-std=std,panic_abort -Z build-std-features=optimize_for_size "${options[@]}")

    local built=$work/cargo/$rust/release/neap out
    out=$(binary "$arch")
    check_static "$built"
    cp "$built" "$out.part"
    mv "$out.part" "$out"
    echo "cross: $out: $(stat -c %s "$out") bytes, built in $((SECONDS - started)) s"
}

check_static() {
    readelf -hW "$1" | grep -q 'Type: *DYN' || fail "$1 lies at a fixed address"
    ! readelf -lW "$1" | grep -q INTERP || fail "$1 asks for a dynamic loader"
    ! readelf -dW "$1" | grep -q NEEDED || fail "$1 asks for shared libraries"
    ! readelf -SW "$1" | grep -q '\.symtab' || fail "$1 is not stripped"
    ! grep -qaF -e "$root" -e "$cargo_home" "$1" || fail "$1 carries a path of this machine"
}

for arch in "${arches[@]}"; do
    build "$arch"
done
