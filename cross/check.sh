#!/bin/bash
# What is said of the static builds, put to the test:
#
#   cross/check.sh smoke [ARCH…]          each starts, the ARM ones under user emulation
#   cross/check.sh year-2038 [ARCH…]      each reads a clock beyond 32 bits of seconds
#   cross/check.sh reproducible [ARCH…]   built a second time, in another directory with another
#                                         cargo home, it has the same hash; minutes for each
#
# Without ARCH: all of cross/targets. The binaries are those of `make cross`.
set -euo pipefail
. cross/lib.sh

what=${1:?usage: cross/check.sh smoke|year-2038|reproducible [ARCH…]}
shift
arches=("$@")
[ $# -gt 0 ] || mapfile -t arches < <(all_arches)

# The emulator's own libc is told another time, and so is what runs in it. A static binary asks
# the kernel itself, so this machine's own is seen by emulation too.
year_2038() {
    local arch=$1 library said
    read_target "$arch"
    library=$(ls /usr/lib/*/faketime/libfaketime.so.1 2>/dev/null | head -n 1) || true
    if [ "$deb" = armhf ]; then
        # The standard library of this target counts seconds in 32 bits, and its first look at a
        # clock beyond them panics. With the libc crate's `libc_unstable_musl_v1_2` it would not,
        # but Rust 1.95 doesn't compile with that.
        echo "cross: $arch: not checked, its clock must be before 2038-01-19"
        return
    fi
    [ -n "$library" ] || fail "libfaketime is not installed; make cross-check brings it"
    local dynamic=${emulator%-static}
    [ "$emulator" != - ] || dynamic=qemu-$(uname -m)
    command -v "$dynamic" >/dev/null || fail "\`$dynamic\` is not installed; make cross-check brings it"
    said=$(LD_PRELOAD=$library FAKETIME="2040-01-01 00:00:00" "$dynamic" "$(binary "$arch")" doctor 2>&1 || true)
    grep -q '^ok  *clock  *2040-01-01T' <<<"$said" || {
        echo "$said" | tail -n 8 >&2
        fail "$arch: can't read a clock of 2040"
    }
    echo "cross: $arch reads a clock of 2040"
}

reproducible() {
    local arch=$1 again=$work/again first second
    [ -f "$(binary "$arch")" ] || fail "no $(binary "$arch"): \`make cross ARCH=$arch\` makes it"
    # Another place, another cargo home, another file order; the toolchain and what was
    # downloaded are the same.
    rm -rf "$again/source"
    git clone --quiet --no-hardlinks "$root" "$again/source"
    # As it is, not as it was committed.
    git ls-files -z --cached --others --exclude-standard | (cd "$root" && tar --create --null --files-from=-) |
        tar --extract --directory "$again/source"
    [ -d "$again/home/registry" ] || { mkdir -p "$again/home" && cp -r "$cargo_home/registry" "$again/home/registry"; }
    mkdir -p "$again/source/target/cross"
    local tool
    for tool in "$venv" "$work/libseccomp-$libseccomp_version"; do
        ln -s "$tool" "$again/source/target/cross/"
    done
    (cd "$again/source" && CARGO_HOME=$again/home CARGO_TARGET_DIR=target cross/build.sh "$arch")
    first=$(sha256sum <"$(binary "$arch")")
    second=$(sha256sum <"$again/source/target/dist/neap-$version-$arch")
    [ "$first" = "$second" ] || fail "$arch: two builds differ: ${first%% *} and ${second%% *}; the second is in $again"
    echo "cross: $arch is reproducible: sha256 ${first%% *}"
}

case $what in
smoke) cross/smoke.sh "${arches[@]}" ;;
year-2038) for arch in "${arches[@]}"; do year_2038 "$arch"; done ;;
reproducible) for arch in "${arches[@]}"; do reproducible "$arch"; done ;;
*) fail "no such check: $what" ;;
esac
