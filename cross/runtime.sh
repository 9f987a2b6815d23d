#!/bin/bash
# The C runtime of one arch, as zig makes it from the musl it carries, in $work/runtime-ARCH-…,
# once: rcrt1.o (starts a static position-independent executable), the C library, the compiler's,
# and the unwinder that Rust's backtraces ask for, which finds no tables here and stops.
#
#   cross/runtime.sh ARCH
set -euo pipefail
. cross/lib.sh
read_target "$1"

out=$(runtime_dir "$1")
[ ! -f "$out/rcrt1.o" ] || exit 0

rm -rf "$out" "$out.part"
mkdir -p "$out.part"
echo 'int main(void) { return 0; }' >"$out.part/empty.c"
# Zig names what it links; it makes them first.
objects=$("$venv/bin/zig" cc -target "$zig" -mcpu="$cpu" -Os -static -pie -v "$out.part/empty.c" \
    -lunwind -o "$out.part/empty" 2>&1 | grep '^ld\.lld ' | tail -n 1)
for object in rcrt1.o libc.a libzigc.a libunwind.a libcompiler_rt.a; do
    path=$(tr ' ' '\n' <<<"$objects" | grep "/$object\$") || fail "zig links no $object for $1: $objects"
    cp "$path" "$out.part/"
done
rm "$out.part/empty" "$out.part/empty.c"
mv "$out.part" "$out"
