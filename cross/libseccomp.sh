#!/bin/bash
# libseccomp.a for one arch, in the directory that `libseccomp_dir` names, once.
#
# Compiled without its own build system: that runs some hundred compiler probes to find one
# header, while its release carries every generated file. Two seconds instead of a minute.
#
#   cross/libseccomp.sh ARCH
set -euo pipefail
. cross/lib.sh
read_target "$1"

source=$work/libseccomp-$libseccomp_version
out=$(libseccomp_dir "$1")
[ ! -f "$out/libseccomp.a" ] || exit 0

rm -rf "$out" "$out.part"
mkdir -p "$out.part"
touch "$out.part/configure.h"
objects=()
for file in "$source"/src/*.c; do
    name=$(basename "$file" .c)
    # A tool of its tests, with a main of its own.
    [ "$name" != arch-syscall-dump ] || continue
    "$work/venv/bin/zig" cc -target "$zig" -mcpu="$cpu" -O2 -fPIC -fvisibility=hidden -fno-sanitize=all \
        -ffile-prefix-map="$source"=/libseccomp -DHAVE_LINUX_SECCOMP_H=1 \
        -I"$out.part" -I"$source/include" -c "$file" -o "$out.part/$name.o"
    objects+=("$out.part/$name.o")
done
# D: no times, no owners.
"$work/venv/bin/zig" ar rcsD "$out.part/libseccomp.a" "${objects[@]}"
rm "${objects[@]}"
mv "$out.part" "$out"
