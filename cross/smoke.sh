#!/bin/bash
# Starts what cross/build.sh made, where a static musl binary differs from what the tests run:
# names are looked up by musl, the system's certificates are found without a distribution's
# library, containers are made by an executable without a loader.
#
#   cross/smoke.sh ARCH…
#
# The binary for this machine runs as a node: two brokers over TLS, a container, `make demo`.
# One for another processor runs under user emulation, which can't make containers: it checks,
# opens a database, and is that node's command line over TLS. (tests/vm runs it for real.)
#
# In mount, network and PID namespaces of its own: nothing of it is left behind.
set -euo pipefail
. cross/lib.sh

say() { echo "smoke: $*"; }

if [ -z "${NEAP_SMOKE_INSIDE-}" ]; then
    for tool in mosquitto openssl busybox unshare; do
        command -v $tool >/dev/null || fail "\`$tool\` is not installed; \`make deps\` brings it"
    done
    images/shell/build.sh "$work/shell.tar"
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo --preserve-env)
    exec "${as_root[@]}" env NEAP_SMOKE_INSIDE=1 \
        unshare --mount --net --pid --fork --kill-child --mount-proc "$0" "$@"
fi

dir=$(mktemp -d "$work/smoke.XXXXXX")
cgroup=neap-smoke-$$-$RANDOM
daemon=
cleanup() {
    status=$?
    [ "$status" = 0 ] || tail -n 30 "$dir"/*.log >&2 || true
    if [ -n "$daemon" ]; then
        kill -TERM "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    fi
    for group in $(find /sys/fs/cgroup -maxdepth 2 -type d -name "$cgroup" 2>/dev/null); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    umount -l "$dir/run" 2>/dev/null || true
    rm -rf "$dir"
}
trap cleanup EXIT

# wait_for SECONDS WHAT COMMAND…
wait_for() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "waited in vain for: $what"
        sleep 0.1
    done
}

# --- a small world: names, certificates, a broker ------------------------------------------------

busybox ip link set lo up
python3 cross/names.py &
wait_for 20 "the name server" busybox nslookup broker.neap.test 127.0.0.1

(
    cd "$dir"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=smoke \
        -keyout ca.key -out ca.pem
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=neap.test -keyout key.pem -out csr.pem
    openssl x509 -req -in csr.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out cert.pem \
        -extfile <(echo "subjectAltName=DNS:broker.neap.test,DNS:gateway.neap.test")
    head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n' >token
) >"$dir/openssl.log" 2>&1

# The system's own files, for whoever is in this mount namespace.
echo "nameserver 127.0.0.1" >"$dir/resolv.conf"
mount --bind "$dir/resolv.conf" "$(realpath /etc/resolv.conf)"
mount --bind "$dir/ca.pem" "$(realpath /etc/ssl/certs/ca-certificates.crt)"

cat >"$dir/mosquitto.conf" <<CONF
listener 8883 127.0.0.1
allow_anonymous true
user root
cafile $dir/ca.pem
certfile $dir/cert.pem
keyfile $dir/key.pem
CONF
mosquitto -c "$dir/mosquitto.conf" >"$dir/mosquitto.log" 2>&1 &

cat >"$dir/neap.toml" <<CONF
[node]
id = "smoke"
data_dir = "$dir/data"
run_dir = "$dir/run"
functions_dir = "$dir/functions.d"
cgroup = "$cgroup"
[http]
listen = "127.0.0.1:8443"
token_file = "$dir/token"
tls = { cert = "$dir/cert.pem", key = "$dir/key.pem" }
[mqtt]
url = "mqtts://broker.neap.test:8883"
[uplink]
url = "mqtts://broker.neap.test:8883"
CONF
mkdir "$dir/functions.d" "$dir/run"
mount -t tmpfs -o mode=0755 tmpfs "$dir/run"

# --- what every binary must do -------------------------------------------------------------------

# everywhere NAME COMMAND…: COMMAND is the binary, behind its emulator.
everywhere() {
    local name=$1
    shift
    [ "$("$@" --version)" = "neap $version" ] || fail "$name: not version $version: $("$@" --version)"
    "$@" check --config configs/neap.toml configs/functions.d/*.toml >/dev/null || fail "$name: refuses configs/"
    echo 'name = 1' >"$dir/bad.toml"
    ! "$@" check --config "$dir/neap.toml" "$dir/bad.toml" >/dev/null 2>&1 || fail "$name: accepts a manifest with mistakes"
    # Emulation refuses a thing or two, which is for doctor to say, not for this test.
    ("$@" doctor --config "$dir/neap.toml" --output json || true) | python3 -m json.tool >/dev/null ||
        fail "$name: doctor gives no JSON"
    "$@" completions bash | bash -n || fail "$name: completions are no shell script"
}

# Over TLS, with a name from DNS and the system's certificates.
remote() {
    "$@" --url https://gateway.neap.test:8443 --token-file "$dir/token" --output json status
}

node=
for arch in $(all_arches); do
    read_target "$arch"
    [ "$emulator" != - ] || node=$(binary "$arch")
done
[ -x "$node" ] || fail "no $node: \`make cross\` makes it"
mkdir "$dir/bin"
cp "$node" "$dir/bin/neap"
neap=$dir/bin/neap
export NEAP_SOCKET=$dir/run/neap.sock

"$neap" daemon --config "$dir/neap.toml" >"$dir/neap.log" 2>&1 &
daemon=$!
wait_for 30 "the daemon" "$neap" status

links_up() {
    "$neap" status --output json | python3 -c 'import json, sys
links = json.load(sys.stdin)["links"]
sys.exit(not (len(links) == 2 and all(link["state"] == "up" for link in links)))'
}
wait_for 30 "both links over TLS, by a name from DNS and the system's certificates" links_up

# --- each in turn --------------------------------------------------------------------------------

for arch in "$@"; do
    read_target "$arch"
    file=$(binary "$arch")
    [ -x "$file" ] || fail "no $file: \`make cross ARCH=$arch\` makes it"
    if [ "$emulator" = - ]; then
        everywhere "$arch" "$file"
        remote "$file" >/dev/null
        "$neap" doctor --config "$dir/neap.toml" >"$dir/doctor.log" || fail "$arch: doctor finds something failing"
        "$neap" image import "$work/shell.tar" >/dev/null
        [ "$("$neap" run shell:1 --data 'echo $((6 * 7))' -- sh)" = 42 ] || fail "$arch: a container doesn't answer"
        tests/demo/run.sh "$neap" >"$dir/demo.log" 2>&1 || fail "$arch: the demo failed"
        say "$arch: checks, links over TLS, containers and the demo: ok"
    else
        command -v "$emulator" >/dev/null || fail "\`$emulator\` is not installed; make cross-check brings it"
        everywhere "$arch" "$emulator" "$file"
        remote "$emulator" "$file" >/dev/null
        # Emulated, it gets as far as the launcher: by then there is a database.
        sed "s|^data_dir.*|data_dir = \"$dir/data-$arch\"|; s|^run_dir.*|run_dir = \"$dir/run-$arch\"|; s|:8443|:8444|" \
            "$dir/neap.toml" >"$dir/$arch.toml"
        timeout 60 "$emulator" "$file" daemon --config "$dir/$arch.toml" >"$dir/$arch.log" 2>&1 || true
        python3 -c 'import sqlite3, sys
found = sqlite3.connect(sys.argv[1]).execute("pragma integrity_check").fetchall()
sys.exit(found != [("ok",)])' "$dir/data-$arch/neap.db" || fail "$arch: its database is not sound"
        say "$arch under $emulator: checks, a database, HTTP over TLS: ok"
    fi
done
