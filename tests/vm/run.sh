#!/bin/bash
# neap on a pure cgroup v2 system: QEMU under software emulation boots Debian's cloud kernel with
# an ext4 root that holds busybox, neap with its libraries and one image; guest.sh is its init
# and checks that limits really hold.
#
#   tests/vm/run.sh [NEAP]      NEAP: a neap binary; default: cargo builds the dev profile's
#
# Never KVM: a test must say the same everywhere. Everything is made below target/vm; the kernel
# package is downloaded once. Needs no root: nothing is mounted here.
# The last line is "N passed, M failed"; exit code 0 only when M is 0 and the guest got through.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)
work=${CARGO_TARGET_DIR:-$repo/target}/vm
# What one run may take; about 60 s on a quiet machine with two cores.
limit=${NEAP_VM_SECONDS:-420}
PATH=$PATH:/usr/sbin:/sbin

say() { echo "vm: $*"; }
die() {
    echo "vm: $*" >&2
    exit 1
}

for tool in qemu-system-x86_64 busybox mkfs.ext4 dpkg-deb apt-get ldd strip umoci; do
    command -v "$tool" >/dev/null || die "\`$tool\` is not installed; \`make deps\` brings it"
done
mkdir -p "$work"

# One run at a time in this directory; the next one waits.
exec 9>"$work/lock"
flock 9

# --- kernel -------------------------------------------------------------------------------------

newest() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image/ { print $2; exit }'; }
package=$(newest) || true
# Without package lists, a kernel that was fetched earlier does.
[ -n "$package" ] || package=$(cd "$work" && ls -d linux-image-*/ 2>/dev/null | tail -1 | tr -d /) || true
if [ -z "$package" ]; then
    if [ "$(id -u)" = 0 ]; then apt-get -qq update; else sudo apt-get -qq update; fi
    package=$(newest) || true
fi
[ -n "$package" ] || die "apt knows no linux-image-cloud-amd64"
kernel=$work/$package
if [ ! -e "$kernel/complete" ]; then
    say "fetching $package"
    rm -rf "$kernel" "$work/deb"
    mkdir -p "$kernel" "$work/deb"
    (cd "$work/deb" && apt-get -qq download "$package") || die "could not download $package"
    dpkg-deb -x "$work"/deb/*.deb "$kernel"
    rm -rf "$work/deb"
    version=$(ls "$kernel/lib/modules")
    # depmod of busybox writes its map where it stands.
    (cd "$kernel/lib/modules/$version" && busybox depmod -b "$kernel" "$version")
    touch "$kernel/complete"
fi
version=$(ls "$kernel/lib/modules")

# --- neap and what it needs ---------------------------------------------------------------------

neap=${1-}
if [ -z "$neap" ]; then
    (cd "$repo" && cargo build --quiet --locked --bin neap)
    neap=${CARGO_TARGET_DIR:-$repo/target}/debug/neap
fi
[ -x "$neap" ] || die "no neap binary at $neap"

rm -rf "$work/root" "$work/initrd"
mkdir -p "$work"/root/{bin,sbin,dev,proc,sys,run,tmp,etc/neap/functions.d,var/lib,lib64,images}
cp "$(command -v busybox)" "$work/root/bin/busybox"
strip -o "$work/root/bin/neap" "$neap"
# A dynamic binary brings its loader and libraries along, each at its own path.
{ ldd "$neap" || true; } | grep -oE '/[^ ]+' | while read -r library; do
    mkdir -p "$work/root$(dirname "$library")"
    cp -L "$library" "$work/root$library"
done
cp "$here/guest.sh" "$work/root/init"
cp "$here/neap.toml" "$work/root/etc/neap/neap.toml"
mkdir "$work/root/functions"
cp "$here"/functions/*.toml "$work/root/functions/"
chmod 755 "$work/root/init"
"$repo/images/shell/build.sh" "$work/root/images/shell.tar"

rm -f "$work/disk"
truncate -s 768M "$work/disk"
mkfs.ext4 -q -F -O ^has_journal -d "$work/root" "$work/disk"

# --- initramfs: the modules to reach the disk, nothing more ---------------------------------------

mkdir -p "$work"/initrd/{bin,dev,proc,newroot,modules}
cp "$(command -v busybox)" "$work/initrd/bin/busybox"
ln -s busybox "$work/initrd/bin/sh"
order=0
for module in virtio_pci virtio_blk virtio_console overlay; do
    # modules.dep: the module's file, then what it needs, the outermost first.
    line=$(grep -E "/$module\.ko[^:]*:" "$kernel/lib/modules/$version/modules.dep") || die "no module $module"
    for file in $(echo "$line" | tr -d : | tr ' ' '\n' | tac); do
        name=$(basename "$file")
        if ! ls "$work"/initrd/modules/*-"$name" >/dev/null 2>&1; then
            order=$((order + 1))
            cp "$kernel/lib/modules/$version/${file#/lib/modules/"$version"/}" \
                "$work/initrd/modules/$(printf %02d $order)-$name"
        fi
    done
done
cat >"$work/initrd/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
for module in /modules/*; do
    /bin/busybox insmod "$module" || echo "insmod $module failed"
done
# The disk appears a moment after its driver.
for try in 1 2 3 4 5 6 7 8 9 10; do
    /bin/busybox mount -t ext4 /dev/vda /newroot 2>/dev/null && break
    /bin/busybox sleep 1
done
/bin/busybox mount --move /dev /newroot/dev
# pivot_root does not work on the initramfs; containers need a root that can be left.
exec /bin/busybox switch_root /newroot /init
INIT
chmod 755 "$work/initrd/init"
(cd "$work/initrd" && find . | busybox cpio -o -H newc -R 0:0 2>/dev/null | gzip -1) >"$work/initrd.gz"

# --- run ----------------------------------------------------------------------------------------

rm -f "$work/results" "$work/serial"
touch "$work/results" "$work/serial"
say "booting $package, at most $limit s"
started=$SECONDS
qemu=
trap '[ -z "$qemu" ] || kill -KILL "$qemu" 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
timeout --foreground --kill-after=5 "$limit" qemu-system-x86_64 -M q35 -cpu max -accel tcg,thread=multi -smp 2 -m 1024 \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$kernel/boot/vmlinuz-$version" -initrd "$work/initrd.gz" \
    -append "console=ttyS0 quiet panic=-1 cgroup_no_v1=all" \
    -drive "if=virtio,format=raw,cache=unsafe,file=$work/disk" \
    -chardev "file,id=serial,path=$work/serial" -serial chardev:serial \
    -device virtio-serial -chardev "file,id=results,path=$work/results" \
    -device virtserialport,chardev=results,name=neap.results \
    9>&- &
qemu=$!
status=0
wait "$qemu" || status=$?
qemu=
took=$((SECONDS - started))
rm -f "$work/disk"

cat "$work/results"
passed=$(grep -c '^ok ' "$work/results") || true
failed=$(grep -c '^FAILED ' "$work/results") || true
if ! grep -qx 'done' "$work/results"; then
    if [ "$status" = 124 ] || [ "$status" = 137 ]; then
        echo "FAILED the guest took more than $limit s"
    else
        echo "FAILED the guest stopped before its end (qemu: $status)"
    fi
    failed=$((failed + 1))
fi
if [ "$failed" -gt 0 ]; then
    echo "--- serial log, last 150 lines ---"
    tail -150 "$work/serial" | tr -d '\r'
fi
say "$took s in the guest"
echo "test result: $([ "$failed" -eq 0 ] && echo ok || echo FAILED). $passed passed; $failed failed; 0 ignored"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
