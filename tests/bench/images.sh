#!/bin/bash
# What a pull costs: bytes on the wire over ten cuts, time against `skopeo copy`, memory, and the
# rate of unpacking against `umoci unpack`; each with its target and whether it holds. Nothing
# fails here: a machine that does other things besides says nothing about time.
#
#   tests/bench/images.sh NEAP [MIB] [ROUNDS] [LAYERS]
#
# Needs root, docker-registry, skopeo, umoci, python3 (the proxy that cuts).
set -euo pipefail
neap=$(realpath "$1") mib=${2:-50} rounds=${3:-7} layers=${4:-1}
work=$(mktemp -d "${TMPDIR:-/tmp}/neap-bench-XXXXXX")
children=()
finish() {
    for pid in "${children[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
cd "$work"
port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
seconds() { python3 -c "print(f'{$(date +%s.%N) - $1:.3f}')"; }
registry=$(port) cutting=$(port) http=$(port)

cat >registry.yml <<Y
version: 0.1
log: { level: error }
storage: { filesystem: { rootdirectory: $work/registry } }
http: { addr: 127.0.0.1:$registry }
Y
docker-registry serve registry.yml >registry.log 2>&1 &
children+=($!)

# Half random, half text: compresses to a bit more than half, as programs do.
mkdir -p rootfs
umoci init --layout layout
umoci new --image layout:1
python3 - "$mib" <<'P'
import os, random, sys
words = [b"%x" % random.getrandbits(40) for _ in range(4000)]
for at in range(int(sys.argv[1])):
    with open(f"rootfs/file-{at}", "wb") as f:
        for _ in range(16):
            f.write(os.urandom(48 << 10))
            text = b" ".join(random.choices(words, k=2000))
            f.write((text * 4)[:48 << 10])
P
for layer in $(seq "$layers"); do
    (cd rootfs && find . -type f | sort | awk -v n="$layers" -v l="$layer" 'NR % n == l % n') >names
    tar -C rootfs -cf layer.tar -T names
    umoci raw add-layer --image layout:1 layer.tar
done
size=$(du -sb layout/blobs | cut -f1)
until curl -fs "http://127.0.0.1:$registry/v2/" >/dev/null; do :; done
skopeo copy --quiet --dest-tls-verify=false oci:layout:1 "docker://127.0.0.1:$registry/bench:1"

# Cuts each of the first ten answers with a layer after a twelfth of it, and counts.
cat >proxy.py <<'P'
import http.client, os, socket, sys, threading
port, registry, share = map(int, sys.argv[1:])
cuts, sent, lock = 10, 0, threading.Lock()
def serve(client):
    global cuts, sent
    head = b""
    while b"\r\n\r\n" not in head:
        got = client.recv(65536)
        if not got: return
        head += got
    lines = head.decode("latin1").split("\r\n")
    path = lines[0].split()[1]
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    up = http.client.HTTPConnection("127.0.0.1", registry)
    up.request("GET", path, headers={k: v for k, v in headers.items() if k.lower() in ("accept", "range")})
    answer = up.getresponse()
    client.sendall(f"HTTP/1.1 {answer.status} X\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in answer.getheaders()) + b"connection: close\r\n\r\n")
    left = 1 << 60
    with lock:
        if "/blobs/" in path and (answer.length or 0) > share and cuts:
            cuts -= 1
            left = share
    while left > 0:
        piece = answer.read(min(65536, left))
        if not piece: break
        client.sendall(piece)
        left -= len(piece)
        with lock: sent += len(piece)
    client.close()
    with open("sent", "w") as f: f.write(f"{sent} {cuts}\n")
def quiet(client):
    try: serve(client)
    except OSError: pass
listener = socket.create_server(("127.0.0.1", port))
while True:
    threading.Thread(target=quiet, args=(listener.accept()[0],), daemon=True).start()
P
python3 proxy.py "$cutting" "$registry" $((size / 12)) &
children+=($!)

cat >neap.toml <<T
[node]
data_dir = "$work/data"
run_dir = "$work/run"
functions_dir = "$work/functions.d"
cgroup = "neap-bench-$$"
user_namespaces = "prefer"
limits = "prefer"
[http]
listen = "127.0.0.1:$http"
[images]
insecure = ["127.0.0.1:$registry", "127.0.0.1:$cutting"]
T
"$neap" daemon --config neap.toml >daemon.log 2>&1 &
daemon=$!
children+=($daemon)
export NEAP_SOCKET=$work/run/neap.sock
until curl -fs "http://127.0.0.1:$http/readyz" >/dev/null; do :; done
sleep 6 # what a start takes is given back by then
rss() { grep VmHWM "/proc/$1/status" | tr -s ' \t' ' ' | cut -d' ' -f2; }
anonymous() { grep RssAnon "/proc/$1/status" | tr -s ' \t' ' ' | cut -d' ' -f2; }
before=$(rss $daemon) anonymous=$(anonymous $daemon)
peak_of_workers() { # of each kind, and of both at once: sampled, each sample a peak so far
    declare -A peak
    local all=0
    while kill -0 "$1" 2>/dev/null; do
        sum=0
        for pid in $(pgrep -P $daemon -f image-worker || true); do
            kind=$( (tr '\0' '\n' <"/proc/$pid/cmdline" | sed -n 3p) 2>/dev/null) || continue
            kb=$(rss "$pid" 2>/dev/null) || continue
            sum=$((sum + ${kb:-0}))
            if [ -n "$kind" ] && [ "${kb:-0}" -gt "${peak[$kind]:-0}" ]; then peak[$kind]=$kb; fi
        done
        [ "$sum" -le "$all" ] || all=$sum
        sleep 0.01
    done
    for kind in "${!peak[@]}"; do echo "worker $kind: peak resident ${peak[$kind]} kB"; done
    echo "$all" >workers
}
# verdict WHAT FIGURE OPERATOR TARGET
verdict() {
    python3 - "$@" <<'P'
import sys
what, figure, operator, target = sys.argv[1], float(sys.argv[2]), sys.argv[3], float(sys.argv[4])
holds = figure <= target if operator == "<=" else figure >= target
print(f"{'holds' if holds else 'MISSED':7}{what}: {figure:g} ({operator} {target:g})")
P
}
median() { python3 -c "import statistics, sys; print(f'{statistics.median(map(float, sys.argv[1:])):.3f}')" "$@"; }

echo "image: $size bytes compressed, $(du -sb rootfs | cut -f1) unpacked, layers: $layers"
"$neap" image pull "127.0.0.1:$cutting/bench:1" >/dev/null 2>&1 &
pull=$!
peak_of_workers $pull
wait $pull
read -r sent cuts <sent
cut=$(python3 -c "print(f'{$sent / $size:.4f}')")
echo "over $((10 - cuts)) cuts: $sent bytes on the wire of $size"
echo "daemon: peak resident $before kB before, $(rss $daemon) kB after; anonymous $anonymous kB before, $(anonymous $daemon) kB after"
"$neap" image rm "127.0.0.1:$cutting/bench:1" >/dev/null
"$neap" image gc >/dev/null

# What is compared goes in turns, so that what else the machine does hits both. First the pulls
# alone: the daemon's memory is asked about these.
copies=() unpacks=() pulls=() imports=() both=()
for round in $(seq "$rounds"); do
    rm -rf copy
    sync
    start=$(date +%s.%N)
    skopeo copy --quiet --src-tls-verify=false "docker://127.0.0.1:$registry/bench:1" oci:copy:1
    copies+=("$(seconds "$start")")
    sync
    start=$(date +%s.%N)
    "$neap" image pull "127.0.0.1:$registry/bench:1" >/dev/null 2>&1
    pulls+=("$(seconds "$start")")
    last=$(anonymous $daemon)
    [ "$round" = 1 ] && first=$last
    "$neap" image rm "127.0.0.1:$registry/bench:1" >/dev/null
    echo "round $round: skopeo copy ${copies[-1]} s, neap pull with unpacking ${pulls[-1]} s; daemon's anonymous memory $last kB"
done
tar -C copy -cf copy.tar .
for round in $(seq "$rounds"); do
    rm -rf bundle
    sync
    start=$(date +%s.%N)
    umoci unpack --image copy:1 bundle >/dev/null
    unpacks+=("$(seconds "$start")")
    sync
    start=$(date +%s.%N)
    "$neap" image import copy.tar --name bench:2 >/dev/null 2>&1
    imports+=("$(seconds "$start")")
    "$neap" image rm bench:2 >/dev/null
    echo "round $round: umoci unpack ${unpacks[-1]} s, neap import (archive to layers) ${imports[-1]} s; daemon's anonymous memory $(anonymous $daemon) kB"
    both+=("$(python3 -c "print(${copies[round - 1]} + ${unpacks[-1]})")")
done
ratio() { python3 -c "print(f'{$1 / $2:.2f}')"; }
echo
echo "medians of $rounds rounds, load $(cut -d' ' -f1-3 /proc/loadavg)"
verdict "bytes on the wire over ten cuts, of the image's size" "$cut" '<=' 1.02
verdict "pull with unpacking, of skopeo's copying alone" "$(ratio "$(median "${pulls[@]}")" "$(median "${copies[@]}")")" '<=' 1.1
verdict "pull with unpacking, of skopeo and umoci one after the other" "$(ratio "$(median "${pulls[@]}")" "$(median "${both[@]}")")" '<=' 1
verdict "rate of an import (archive to layers), of umoci's unpacking" "$(ratio "$(median "${unpacks[@]}")" "$(median "${imports[@]}")")" '>=' 1
verdict "daemon's peak resident memory after all of it, of before" "$(ratio "$(rss $daemon)" "$before")" '<=' 1.02
verdict "workers together, peak resident MiB" "$(ratio "$(cat workers)" 1024)" '<=' 24
verdict "daemon's anonymous memory after the last pull, of after the first" "$(ratio "$last" "$first")" '<=' 1.02
