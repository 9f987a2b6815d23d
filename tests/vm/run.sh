#!/bin/bash
# neap on pure cgroup v2 systems: QEMU under software emulation boots Debian's kernel with an
# ext4 root that holds busybox, neap and one image, and neap is the only daemon.
#
#   tests/vm/run.sh [ARCH [BOOT…]]
#
# ARCH is x86_64 (default), aarch64 or armv7; each BOOT is a script of guest/ that checks:
#   main    limits really hold, leftovers are swept, MQTT and HTTP with the host, the demo's job
#   small   kernels that lack things: what neap says, and what it does
#   servers  http and Lambda functions: frozen between calls, killed while frozen
#   delegated  neap in a part of the cgroup tree, as systemd or a container hands it out
# The default is these. When asked for:
#   old     Debian 11's kernel, 5.10, which neap must refuse
#   systemd Debian's package under a real systemd (x86_64, after `make deb`; it fetches 100 MB)
#
# NEAP=FILE is the binary to test. Default: target/dist/neap-VERSION-ARCH where `make cross` made
# one, else, for this machine's own architecture, the dev profile's with its libraries.
#
# Never KVM: a test must say the same everywhere. All is below target/vm; packages are fetched
# once. Needs no root: nothing is mounted here. Every boot has NEAP_VM_SECONDS at most.
# The last line is "N passed, M failed"; exit code 0 only when M is 0 and all guests got through.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$repo/target}
work=$target/vm
# What one boot may take: one to two minutes on a quiet machine with two cores, three times as
# long beside ten other jobs.
limit=${NEAP_VM_SECONDS:-1200}
PATH=$PATH:/usr/sbin:/sbin

say() { echo "vm: $*"; }
die() {
    echo "vm: $*" >&2
    exit 1
}
. "$here/packages.sh"
. "$here/host.sh"

arch=${1:-x86_64}
[ $# -eq 0 ] || shift
boots=("$@")
[ ${#boots[@]} -gt 0 ] || boots=(main small servers delegated)
describe "$arch"

for tool in "${emulator[0]}" busybox mkfs.ext4 dpkg-deb apt-get strip umoci setpriv mosquitto mosquitto_sub zstd; do
    command -v "$tool" >/dev/null || die "\`$tool\` is not installed; \`make test-vm\` brings it"
done

# One run at a time for each architecture; the next one waits.
run=$work/$arch
mkdir -p "$run"
exec 9>"$run/lock"
flock 9

# --- neap and what it needs ---------------------------------------------------------------------

neap_version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml" | head -1)
neap=${NEAP:-$target/dist/neap-$neap_version-$arch}
if [ ! -x "$neap" ] && [ -z "${NEAP-}" ]; then
    [ "$arch" = "$(uname -m)" ] || die "no $neap: \`make cross\` builds it"
    (cd "$repo" && cargo build --quiet --locked --bin neap)
    neap=$target/debug/neap
fi
[ -x "$neap" ] || die "no neap binary at $neap"
say "$arch: $neap"

get_busybox

rm -rf "$run/common"
mkdir -p "$run"/common/{bin,sbin,dev,proc,sys,run,tmp,etc/neap/functions.d,var/lib,lib,images,functions}
root=$run/common
cp "$busybox" "$root/bin/busybox"
ln -s ../bin/busybox "$root/sbin/modprobe"
if [ "$arch" = "$(uname -m)" ]; then
    strip -o "$root/bin/neap" "$neap"
    # Volumes are made with it.
    cp -L "$(command -v mkfs.ext4)" "$root/sbin/mkfs.ext4"
    # A dynamic binary brings its loader and libraries along, each at its own path.
    # (A static one has none, for grep to fail about.)
    { ldd "$neap" "$root/sbin/mkfs.ext4" 2>/dev/null | grep -oE '/[^ :]+' | grep -v "^$root" || true; } | sort -u | while read -r library; do
        [ "$library" != "$neap" ] || continue
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
else
    cp "$neap" "$root/bin/neap"
    for package in e2fsprogs libext2fs2 libcom-err2 libblkid1 libuuid1 libc6; do
        fetch "$package"
        for part in lib usr/lib; do
            [ -d "$cache/$package/$part" ] || continue
            mkdir -p "$root/$part"
            cp -a "$cache/$package/$part/." "$root/$part/"
        done
    done
    cp -L "$cache/e2fsprogs/sbin/mkfs.ext4" "$root/sbin/mkfs.ext4"
fi
chmod 755 "$root/bin/neap"
cp "$here"/functions/*.toml "$repo/tests/demo/report.toml" "$root/functions/"
cp -r "$here/servers" "$root/"
BUSYBOX=$busybox ARCHITECTURE=$oci "$repo/images/shell/build.sh" "$root/images/shell.tar"
cp "$here/warm.toml" "$here/permits.toml" "$here/volume.toml" "$root/images/"
gzip -1 -k "$root/images/shell.tar"
zstd -q -k "$root/images/shell.tar"

# --- a kernel, and the initramfs that reaches the disk with it ------------------------------------

# use_kernel SUITE
use_kernel() {
    [ "${suite-none}" != "$1" ] || return 0
    suite=$1
    from "$suite"
    get_kernel
    from ''
    rm -rf "$run/initrd" "$run/modules"
    mkdir -p "$run"/initrd/{bin,dev,newroot}
    cp "$busybox" "$run/initrd/bin/busybox"
    ln -s busybox "$run/initrd/bin/sh"
    # ext4 asks for crc32c by a soft dependency, which modules.dep does not hold.
    local crc=crc32c_generic
    grep -q "/$crc\.ko" "$kernel/lib/modules/$version"/modules.{dep,builtin} || crc=
    # shellcheck disable=SC2086 # none or one
    modules "$run/initrd" virtio_pci virtio_blk virtio_console virtio_net $crc ext4 >"$run/initrd/order"
    cat >"$run/initrd/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do
    /bin/busybox insmod "$module" || echo "insmod $module failed"
done </order
# The disk appears a moment after its driver.
for try in 1 2 3 4 5 6 7 8 9 10; do
    /bin/busybox mount -t ext4 /dev/vda /newroot 2>/dev/null && break
    /bin/busybox sleep 1
done
/bin/busybox mount --move /dev /newroot/dev
# pivot_root does not work on the initramfs; containers need a root that can be left.
exec /bin/busybox switch_root /newroot /init
INIT
    chmod 755 "$run/initrd/init"
    (cd "$run/initrd" && find . | busybox cpio -o -H newc -R 0:0 2>/dev/null | gzip -1) >"$run/initrd.gz"
    # What a running system loads for itself.
    modules "$run/modules" virtio_net overlay loop nf_tables >/dev/null
    cp "$kernel/lib/modules/$version/modules.builtin" "$run/modules/lib/modules/$version/"
}

# systemd_root: Debian itself instead of busybox, with neap's package for the boot's script, which
# is a service there, to install.
systemd_root() {
    local tar=$cache/systemd.tar package=$target/dist/neap_$neap_version-1_$debian.deb
    [ -f "$package" ] || die "no $package: \`make deb ARCH=$arch\` makes it"
    if [ ! -e "$tar" ]; then
        command -v mmdebstrap >/dev/null || die "\`mmdebstrap\` is not installed: apt-get install mmdebstrap"
        say "making Debian's root with systemd"
        mmdebstrap --quiet --format=tar --variant=minbase --include=systemd,systemd-sysv,busybox-static,kmod \
            --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
            --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$tar.new"
        mv "$tar.new" "$tar"
    fi
    mkdir -p "$run/root"
    tar -C "$run/root" --exclude=./dev -xf "$tar"
    mkdir -p "$run/root/dev" "$run/root/etc/neap"
    cp "$package" "$run/root/neap.deb"
    cp -r "$run"/common/{images,functions} "$run/root/"
    cp "$script" "$run/root/checks.sh"
    chmod 755 "$run/root/checks.sh"
    ln -sf /sbin/init "$run/root/init"
    echo vm >"$run/root/etc/hostname"
    echo secret >"$run/root/etc/neap/token"
    chmod 600 "$run/root/etc/neap/token"
    cat >"$run/root/etc/systemd/system/checks.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=exec
ExecStart=/checks.sh
StandardOutput=tty
TTYPath=/dev/console
UNIT
    mkdir -p "$run/root/etc/systemd/system/multi-user.target.wants"
    # Debian's own would want an index that busybox's depmod does not make.
    ln -sf /bin/busybox "$run/root/usr/sbin/modprobe"
    # Without udev its terminal never appears, which the boot would wait for.
    ln -sf /dev/null "$run/root/etc/systemd/system/serial-getty@.service"
    ln -sf /dev/null "$run/root/etc/systemd/system/getty.target"
    ln -sf ../checks.service "$run/root/etc/systemd/system/multi-user.target.wants/"
}

# --- a boot -------------------------------------------------------------------------------------

passed=0 failed=0 qemu='' host=''
cleanup() {
    trap '' INT TERM
    # What they started is bound to them (host.sh).
    for pid in $qemu $host; do kill -KILL "$pid" 2>/dev/null || true; done
    rm -rf "$run/disk" "$run/root"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# boot NAME DISK KERNEL-OPTIONS MEMORY_MIB: runs a guest to its end.
boot() {
    local name=$1 append=$3 memory=$4 status=0 started=$SECONDS took
    rm -f "$run/results" "$run/serial" "$run"/host.{in,out}
    touch "$run/results" "$run/serial" "$run/arrived"
    mkfifo "$run"/host.{in,out}
    say "$arch $name: booting $(basename "$kernel"), at most $limit s"
    (
        cloud='' application=''
        start_broker site "$site_port"
        start_cloud
        touch "$run/brokers"
        serve "$run/host.out" "$run/host.in"
    ) 9>&- &
    host=$!
    within 30 test -e "$run/brokers" || die "the brokers did not start"
    "${bound[@]}" timeout --foreground --kill-after=5 "$limit" "${bound[@]}" \
        "${emulator[@]}" -m "$memory" -accel tcg,thread=multi -smp 2 \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$kernel/boot/vmlinuz-$version" -initrd "$run/initrd.gz" \
        -append "console=$console quiet panic=-1 $append" \
        -drive "if=none,id=disk,format=raw,cache=unsafe,file=$2" -device virtio-blk-pci,drive=disk \
        -netdev "user,id=net,hostfwd=tcp:127.0.0.1:$http_port-:8080" -device virtio-net-pci,netdev=net,romfile= \
        -chardev "file,id=serial,path=$run/serial" -serial chardev:serial \
        -device virtio-serial-pci \
        -chardev "file,id=results,path=$run/results" -device virtserialport,chardev=results,name=neap.results \
        -chardev "pipe,id=host,path=$run/host" -device virtserialport,chardev=host,name=neap.host \
        9>&- &
    qemu=$!
    wait "$qemu" || status=$?
    qemu=
    took=$((SECONDS - started))
    kill -KILL "$host" 2>/dev/null || true
    wait "$host" 2>/dev/null || true
    host=

    local ok bad
    sed "s/^/$arch $name: /" "$run/results"
    ok=$(grep -c '^ok ' "$run/results") || true
    bad=$(grep -c '^FAILED ' "$run/results") || true
    if ! grep -qx 'done' "$run/results"; then
        if [ "$status" = 124 ] || [ "$status" = 137 ]; then
            echo "$arch $name: FAILED the guest took more than $limit s"
        else
            echo "$arch $name: FAILED the guest stopped before its end (qemu: $status)"
        fi
        bad=$((bad + 1))
    fi
    if [ "$bad" -gt 0 ]; then
        echo "--- serial log, last 200 lines ---"
        tail -200 "$run/serial" | tr -d '\r'
    fi
    cp "$run/serial" "$run/serial-$name"
    passed=$((passed + ok))
    failed=$((failed + bad))
    say "$arch $name: $ok passed, $bad failed, $took s in the guest"
}

for name in "${boots[@]}"; do
    script=$here/guest/$name.sh
    [ -f "$script" ] || die "no boot \`$name\`: $(cd "$here/guest" && ls ./*.sh | tr '\n' ' ')"
    rm -rf "$run/root" "$run/disk" "$run/site" "$run/cloud" "$run/arrived" "$run/brokers"
    use_kernel "$(sed -n 's/^# suite: //p' "$script")"
    if grep -q '^# root: systemd' "$script"; then
        systemd_root
    else
        cp -a "$run/common" "$run/root"
        cp "$script" "$run/root/init"
        chmod 755 "$run/root/init"
    fi
    cp -a "$run/modules/lib/modules" "$run/root/lib/"
    site_port=$(free_port) cloud_port=$(free_port) http_port=$(free_port)
    cp "$here/guest/lib.sh" "$run/root/lib.sh"
    sed -e "s/@SITE@/$site_port/; s/@CLOUD@/$cloud_port/" "$here/neap.toml" >"$run/root/etc/neap/neap.toml"
    # The kernel's options for this boot, as the script itself names them.
    options=$(sed -n 's/^# kernel: //p' "$script")
    # More of Debian that it asks for, programs with their libraries.
    for package in $(sed -n 's/^# packages: //p' "$script"); do
        fetch "$package"
        for part in usr/bin lib lib64 usr/lib; do
            [ -d "$cache/$package/$part" ] || continue
            mkdir -p "$run/root/$part"
            cp -an "$cache/$package/$part/." "$run/root/$part/"
        done
    done
    # Modules that the script says its kernel does not have.
    for module in $(sed -n 's/^# without: //p' "$script"); do
        find "$run/root/lib/modules" -name "$module.ko*" -exec mv {} "$run/root/" \;
    done
    (cd "$run/root/lib/modules/$version" && busybox depmod -b "$run/root" "$version" 2>/dev/null)
    truncate -s 768M "$run/disk"
    mkfs.ext4 -q -F -O ^has_journal -d "$run/root" "$run/disk"
    memory=$(sed -n 's/^# memory: //p' "$script")
    boot "$name" "$run/disk" "$options" "${memory:-1024}"
done

echo "test result: $([ "$failed" -eq 0 ] && echo ok || echo FAILED). $passed passed; $failed failed; 0 ignored"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
