# What a guest is made of, from Debian's archive, for any architecture; sourced by run.sh.
#
# Package lists of a foreign architecture are kept apart, below the work directory: nothing in
# /etc or /var/lib/apt changes, and no foreign architecture is added to this machine's dpkg.
# Fetched packages stay, unpacked, in `$cache/NAME`, where the name holds the version for kernels:
# the next run needs no network.

# describe ARCH: sets what the rest of the scripts ask about an architecture.
describe() {
    case $1 in
        x86_64)
            debian=amd64 kernel_package=linux-image-cloud-amd64 console=ttyS0 oci=amd64
            emulator=(qemu-system-x86_64 -M q35 -cpu max)
            ;;
        aarch64)
            debian=arm64 kernel_package=linux-image-cloud-arm64 console=ttyAMA0 oci=arm64
            emulator=(qemu-system-aarch64 -M virt -cpu cortex-a57)
            ;;
        armv7)
            debian=armhf kernel_package=linux-image-armmp-lpae console=ttyAMA0 oci=arm
            emulator=(qemu-system-arm -M virt -cpu cortex-a15)
            ;;
        *) die "no guest for \`$1\`: x86_64, aarch64 or armv7" ;;
    esac
    from ''
}

# from SUITE: packages come from this release of Debian's; empty: from this machine's own sources.
from() {
    cache=$work/packages/$arch${1:+-$1}
    mkdir -p "$cache"
    local sources=()
    if [ -n "$1" ]; then
        echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $1 main" \
            >"$cache/sources.list"
        sources=(-o "Dir::Etc::sourcelist=$cache/sources.list" -o "Dir::Etc::sourceparts=-")
    fi
    apt_options=(
        "${sources[@]}"
        -o "APT::Architecture=$debian" -o "APT::Architectures=$debian"
        -o "Dir::State::lists=$cache/lists" -o "Dir::Cache=$cache/archive"
        -o "Dir::State::status=/dev/null" -o "APT::Sandbox::User="
        -o "Acquire::Languages=none" -o "Acquire::Retries=3"
    )
}

# lists: package lists for this architecture, fetched once a day at most.
lists() {
    if [ -z "$(find "$cache/lists-complete" -mtime -1 2>/dev/null)" ]; then
        mkdir -p "$cache/lists/partial" "$cache/archive/archives/partial"
        # A suite that can't be had (a mirror without it) is no reason to stop.
        apt-get -qq "${apt_options[@]}" update >"$cache/update.log" 2>&1 || true
        touch "$cache/lists-complete"
    fi
}

# newest PACKAGE: the real package behind a metapackage.
newest() { apt-cache "${apt_options[@]}" depends "$1" 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }'; }

# fetch PACKAGE: unpacks it below $cache/PACKAGE, once.
fetch() {
    [ -e "$cache/$1/complete" ] && return
    say "fetching $1 for $debian"
    lists
    rm -rf "$cache/$1" "$cache/deb"
    mkdir -p "$cache/$1" "$cache/deb"
    (cd "$cache/deb" && apt-get -qq "${apt_options[@]}" download "$1") || die "could not download $1 for $debian"
    dpkg-deb -x "$cache"/deb/*.deb "$cache/$1"
    rm -rf "$cache/deb"
    touch "$cache/$1/complete"
}

# get_kernel: sets $kernel, a directory with boot/ and lib/modules/, and $version.
get_kernel() {
    local package
    # By the name it has now; without a network, one that was fetched earlier does.
    lists
    package=$(newest "$kernel_package") || true
    [ -n "$package" ] || package=$(cd "$cache" && ls -d linux-image-*/ 2>/dev/null | tail -1 | tr -d /) || true
    [ -n "$package" ] || die "apt knows no $kernel_package: $(tail -1 "$cache/update.log" 2>/dev/null)"
    fetch "$package"
    kernel=$cache/$package
    version=$(ls "$kernel/lib/modules")
    if [ ! -e "$kernel/depmod" ]; then
        # depmod of busybox writes its map where it stands.
        (cd "$kernel/lib/modules/$version" && busybox depmod -b "$kernel" "$version")
        touch "$kernel/depmod"
    fi
}

# modules DIRECTORY NAME…: copies modules and what they need to DIRECTORY/lib/modules; those that
# are built in are passed over. Prints the files, in the order of loading.
modules() {
    local to=$1 base=$kernel/lib/modules/$version name line file
    shift
    mkdir -p "$to/lib/modules/$version"
    for name in "$@"; do
        grep -qE "/$name\.ko" "$base/modules.builtin" && continue
        line=$(grep -E "/$name\.ko[^:]*:" "$base/modules.dep") || die "no module $name in $version"
        # The module's file, then what it needs, the outermost first.
        for file in $(echo "$line" | tr -d : | tr ' ' '\n' | tac); do
            file=${file#/lib/modules/"$version"/}
            if [ ! -e "$to/lib/modules/$version/$file" ]; then
                mkdir -p "$to/lib/modules/$version/$(dirname "$file")"
                cp "$base/$file" "$to/lib/modules/$version/$file"
                echo "/lib/modules/$version/$file"
            fi
        done
    done
}

# get_busybox: sets $busybox, a static one for the guest.
get_busybox() {
    if [ "$debian" = "$(dpkg --print-architecture)" ]; then
        busybox=$(command -v busybox)
    else
        fetch busybox-static
        busybox=$cache/busybox-static/bin/busybox
    fi
}
