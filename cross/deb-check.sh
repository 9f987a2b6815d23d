#!/bin/bash
# Installs, uses, upgrades, removes and purges the packages of `make deb`, in a minimal Debian of
# its own: a root directory below target/cross entered by pivot_root (a chroot can't make user
# namespaces, and containers need them), with mount, network and PID namespaces of its own.
# There is no systemd as pid 1 in there, so this is the init script's way; that the unit was
# enabled is read off the files.
#
# A package for another processor is unpacked: its control data, its files and its binary are
# compared with the native one's.
#
#   cross/deb-check.sh [ARCH…]
set -euo pipefail
. cross/lib.sh

arches=("$@")
[ $# -gt 0 ] || mapfile -t arches < <(all_arches)

suite=bookworm
say() { echo "deb-check: $*"; }
package() {
    read_target "$1"
    echo "$dist/neap_$version-1_$deb.deb"
}

if [ -z "${NEAP_DEB_CHECK_INSIDE-}" ]; then
    for tool in mmdebstrap umoci busybox; do
        command -v $tool >/dev/null || fail "\`$tool\` is not installed; \`make deb-check\` brings it"
    done
    images/shell/build.sh "$work/shell.tar"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo --preserve-env)
    # What neap's package asks for is in there already: the check itself needs no network.
    [ -f "$work/$suite.tar" ] || {
        "${as_root[@]}" mmdebstrap --quiet --format=tar --variant=minbase \
            --include=sysvinit-core,adduser,debconf,init-system-helpers,lsb-base,bsdutils,procps \
            "$suite" "$work/$suite.tar.part"
        mv "$work/$suite.tar.part" "$work/$suite.tar"
    }
    exec "${as_root[@]}" env NEAP_DEB_CHECK_INSIDE=1 \
        unshare --mount --net --pid --fork --kill-child --propagation private "$0" "${arches[@]}"
fi

native=
for arch in $(all_arches); do
    read_target "$arch"
    [ "$emulator" != - ] || native=$arch
done

# --- the others: unpacked ------------------------------------------------------------------------

# Every path with its mode, and the control data but for what depends on the binary's size.
contents() { dpkg-deb --contents "$1" | awk '{ print $1, $2, $6 }'; }
control() { dpkg-deb --field "$1" | sed '/^Installed-Size:/d; /^Architecture:/d'; }
scripts() {
    local to
    to=$(mktemp -d)
    dpkg-deb --control "$1" "$to"
    (cd "$to" && cat conffiles postinst postrm prerm preinst config templates)
    rm -rf "$to"
}

for arch in "${arches[@]}"; do
    [ -f "$(package "$arch")" ] || fail "no $(package "$arch"): \`make deb ARCH=$arch\` makes it"
    [ "$arch" != "$native" ] || continue
    read_target "$arch"
    one=$(package "$native") other=$(package "$arch")
    [ -f "$one" ] || fail "no $one to compare with"
    [ "$(dpkg-deb --field "$other" Architecture)" = "$deb" ] || fail "$other is for another architecture"
    for aspect in contents control scripts; do
        diff <($aspect "$one") <($aspect "$other") >&2 || fail "$aspect of $other and $one differ"
    done
    dpkg-deb --fsys-tarfile "$other" | tar --extract --to-stdout ./usr/bin/neap | cmp - "$(binary "$arch")" ||
        fail "$other holds another binary than $(binary "$arch")"
    say "$(basename "$other"): control data, files and scripts are those of $(basename "$one")"
done
[[ " ${arches[*]} " = *" $native "* ]] || exit 0

# --- the native one: installed -------------------------------------------------------------------

new=$(mktemp -d "$work/deb-check.XXXXXX")
cleanup() {
    status=$?
    [ "$status" = 0 ] || tail -n 40 "$new/var/log/neap-check.log" >&2 2>/dev/null || true
    # Processes go with their namespace. Nothing is mounted below it out here.
    rm -rf --one-file-system "$new"
}
trap cleanup EXIT
tar --extract --file "$work/$suite.tar" --directory "$new"
mkdir "$new/check" "$new/old"
cp "$(package "$native")" "$new/check/neap.deb"
cp "$work/shell.tar" "$new/check/shell.tar"
cp cross/deb-check-inside.sh "$new/check/inside.sh"

# The same package under a later version: what an upgrade brings.
dpkg-deb --raw-extract "$(package "$native")" "$new/check/next"
sed -i "s/^Version: .*/Version: $version-2/" "$new/check/next/DEBIAN/control"
dpkg-deb --root-owner-group --build "$new/check/next" "$new/check/next.deb" >/dev/null

busybox ip link set lo up
# In one more mount namespace: pivot_root moves every process of its own, this script too, which
# then couldn't clean up.
enter() {
    set -euo pipefail
    local new=$1 node
    mount --bind "$new" "$new"
    mount -t proc proc "$new/proc"
    mount --rbind /sys "$new/sys"
    mount -t tmpfs tmpfs "$new/run"
    mount -t tmpfs -o mode=1777 tmpfs "$new/tmp"
    for node in null zero random urandom full tty; do
        touch "$new/dev/$node"
        mount --bind "/dev/$node" "$new/dev/$node"
    done
    cd "$new"
    pivot_root . old
    umount -l /old
    cd /
    exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 \
        DEBIAN_FRONTEND=noninteractive bash ${TRACE:+-x} /check/inside.sh "$2"
}
export -f enter
unshare --mount --propagation private bash -c 'enter "$@"' enter "$new" "$version"
[ -e "$new/check/neap.deb" ] || fail "the root of the check is out of reach: $new"
say "$(basename "$(package "$native")"): installed, used, upgraded, removed and purged"
