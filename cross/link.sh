#!/bin/bash
# The linker of the static builds, as rustc calls it (linker-flavor ld.lld): zig's own lld with
# zig's C runtime, for what zig's driver doesn't pass on.
#
#   - A position-independent executable on every processor, although rustc asks for one at a
#     fixed address where it doesn't know static ones: a daemon that reads bytes from outside as
#     root should not lie where everybody expects it.
#   - Relative relocations in the packed form (RELR): some hundred kilobytes less.
#   - One copy of functions that came out as the same instructions: 73 kB less. Merged ones share an
#     address. Rust promises no other, and what SQLite tells apart by a function's address has a body
#     of its own, but for IN on virtual tables (sqlite3_vtab_in), which neap has none of.
#   - No unwind tables, not even those of zig's C runtime (link.ld).
#
# NEAP_RUNTIME is the directory that cross/runtime.sh filled, NEAP_ZIG the compiler.
set -euo pipefail

# rustc speaks to lld by its generic name, which asks for a flavor first.
[ "${1-}" != -flavor ] || shift 2
arguments=()
for argument in "$@"; do
    case $argument in
    -no-pie | -static | -static-pie | -pie | --no-dynamic-linker | -Bstatic | -Bdynamic) ;;
    # Those below.
    -lunwind | -lgcc | -lgcc_s | -lgcc_eh | -lc) ;;
    # Of nothing.
    --eh-frame-hdr) ;;
    *) arguments+=("$argument") ;;
    esac
done
exec "$NEAP_ZIG" ld.lld -static -pie --no-dynamic-linker -z text -z relro -z now -z noexecstack \
    --pack-dyn-relocs=relr --build-id=none --entry=_start --gc-sections --icf=all \
    "${BASH_SOURCE%/*}/link.ld" "$NEAP_RUNTIME/rcrt1.o" "${arguments[@]}" \
    "$NEAP_RUNTIME/libunwind.a" "$NEAP_RUNTIME/libc.a" "$NEAP_RUNTIME/libzigc.a" "$NEAP_RUNTIME/libcompiler_rt.a"
