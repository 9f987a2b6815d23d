# What the scripts of this directory share: the pins, the table of targets, and where things go.
# To be sourced, with the current directory at the root of the source.

# libseccomp is the one C library that no crate brings along. Any copy with this hash will do:
# Debian's pool drops a version some years after its release, upstream and the archive don't.
libseccomp_version=2.5.4
libseccomp_sha256=d82902400405cf0068574ef3dc1fe5f5926207543ba1ae6f8e7a1576351dcbdb
libseccomp_urls=(
    "https://deb.debian.org/debian/pool/main/libs/libseccomp/libseccomp_$libseccomp_version.orig.tar.gz"
    "https://github.com/seccomp/libseccomp/releases/download/v$libseccomp_version/libseccomp-$libseccomp_version.tar.gz"
    "https://snapshot.debian.org/archive/debian/20230601T000000Z/pool/main/libs/libseccomp/libseccomp_$libseccomp_version.orig.tar.gz"
)

fail() {
    echo "cross: $*" >&2
    exit 1
}

# try_thrice COMMAND…: for what comes over a network.
try_thrice() {
    local pause
    for pause in 5 30; do
        "$@" && return
        echo "cross: failed, once more in $pause s: $*" >&2
        sleep $pause
    done
    "$@"
}

root=$PWD
[ -f "$root/Cargo.toml" ] || fail "run from the root of the source"
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# What is made once and stays: toolchain, C libraries, cargo's own target directories.
work=$target/cross
dist=$target/dist
venv=$work/venv-$(sha256sum <cross/requirements.txt | head -c 12)
cargo_home=${CARGO_HOME:-$HOME/.cargo}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)

# Every arch of the table, in its order.
all_arches() {
    sed -n 's/^\([a-z0-9_]\+\) .*/\1/p' cross/targets
}

# Sets rust, patch, zig, cpu, deb and emulator for an arch.
read_target() {
    # shellcheck disable=SC2034
    read -r _ rust patch zig cpu deb emulator < <(grep "^$1 " cross/targets) ||
        fail "no arch \`$1\` in cross/targets: $(all_arches | xargs)"
}

# The binary that `make cross` leaves for an arch.
binary() {
    echo "$dist/neap-$version-$1"
}

# Where libseccomp.a for an arch is, after cross/libseccomp.sh. Named after how it is made, for
# cargo looks at the name alone.
libseccomp_dir() {
    local recipe
    recipe=$(cat cross/libseccomp.sh cross/targets | sha256sum | head -c 12)
    echo "$work/libseccomp-$libseccomp_version-$1-$recipe"
}

# Where the C runtime for an arch is, after cross/runtime.sh.
runtime_dir() {
    local recipe
    recipe=$(cat cross/runtime.sh cross/targets cross/requirements.txt | sha256sum | head -c 12)
    echo "$work/runtime-$1-$recipe"
}
