#!/bin/bash
# neap's main job, told as it goes: readings come in over MQTT, run a function in a container each,
# and their results go to the cloud; the cloud goes away, neap is killed, the cloud comes back,
# and every result arrives.
#
#   tests/demo/run.sh NEAP      (make demo builds it first)
#
# As another user than root it builds the images and asks sudo for the rest: containers need root.
# Everything runs on free loopback ports, below one temporary directory and one cgroup of its
# own, and is gone afterwards, also after Ctrl-C. Exit code 0 only when every result arrived.
set -euo pipefail

neap=$(realpath "${1:?usage: $0 NEAP}")
dir='' daemon=''
# Set when this is the part as root: where the images are.
images=${2-}
here=$(cd "$(dirname "$0")" && pwd)
repo=$(cd "$here/../.." && pwd)

# --- telling -------------------------------------------------------------------------------------

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' plain=$'\e[0m'; else bold= dim= red= green= plain=; fi
step=0
step() {
    step=$((step + 1))
    printf '\n%s%d. %s%s\n' "$bold" "$step" "$*" "$plain"
}
tell() { printf '   %s\n' "$*"; }
# Shows a command and what it says.
show() {
    printf '   %s$ %s%s\n' "$dim" "$*" "$plain"
    "$@" 2>&1 | sed 's/^/     /'
}
fail() {
    printf '\n%sdemo failed: %s%s\n' "$red" "$*" "$plain" >&2
    if [ -n "$daemon" ] && kill -0 "$daemon" 2>/dev/null; then
        timeout 5 "$neap" status >&2 || true
        timeout 5 "$neap" events >&2 || true
        timeout 5 "$neap" deliveries >&2 || true
    fi
    if [ -s "$dir/neap.log" ]; then
        echo "--- the end of the daemon's log ---" >&2
        tail -30 "$dir/neap.log" >&2
    fi
    exit 1
}

# wait_for SECONDS WHAT COMMAND…
wait_for() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $end ] || fail "waited in vain for: $what"
        sleep 0.1
    done
}

# Not /tmp: it may be a tmpfs, which kernels before 6.3 can't map to a function's users. A Unix
# socket's path has 108 bytes, so a deep checkout falls back to /var/tmp.
base=${CARGO_TARGET_DIR:-$repo/target}
if [ ! -d "$base" ] || [ ${#base} -gt 70 ]; then base=/var/tmp; fi

if [ -z "$images" ]; then
    step "Two function images, built without a registry"
    images=$base/demo-images
    mkdir -p "$images"
    for image in shell threshold; do
        "$repo/images/$image/build.sh" "$images/$image.tar"
        tell "$image: $(stat -c %s "$images/$image.tar") bytes, an OCI archive"
    done
    [ "$(id -u)" = 0 ] || exec sudo --preserve-env "$0" "$neap" "$images"
else
    step=1
fi

# --- what is started, and ended again ------------------------------------------------------------

dir=$(mktemp -d "$base/demo.XXXXXX")
cgroup=neap-demo-$$
site='' cloud='' application='' alarms=''

stop() {
    [ -n "$1" ] || return 0
    kill -TERM "$1" 2>/dev/null || true
    for _ in $(seq 100); do
        kill -0 "$1" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}
cleanup() {
    trap '' INT TERM
    stop "$daemon"
    stop "$application"
    stop "$alarms"
    stop "$site"
    stop "$cloud"
    # What a killed daemon may have left; a stopped one has left only the empty parent.
    for group in $(find /sys/fs/cgroup -maxdepth 2 -type d -name "$cgroup" 2>/dev/null); do
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || true
    done
    rm -rf "$dir"
}
trap cleanup EXIT
trap 'printf "\ndemo: interrupted, cleaning up\n"; exit 130' INT TERM

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 10000))
        listening $port || break
    done
    echo $port
}

# start_broker NAME PORT: leaves its pid in $started.
start_broker() {
    mkdir -p "$dir/$1"
    cat >"$dir/$1/mosquitto.conf" <<CONF
listener $2 127.0.0.1
allow_anonymous true
user root
persistence true
persistence_location $dir/$1/
# Without these two, mosquitto drops what it holds for an absent client beyond 1,000 messages.
max_queued_messages 0
max_queued_bytes 0
log_type all
CONF
    mosquitto -c "$dir/$1/mosquitto.conf" >>"$dir/$1/log" 2>&1 &
    started=$!
    wait_for 20 "the broker $1" listening "$2"
}
start_cloud() {
    start_broker cloud "$cloud_port"
    cloud=$started
    # The application in the cloud: its session is persistent, so it misses nothing.
    stdbuf -oL mosquitto_sub -h 127.0.0.1 -p "$cloud_port" -V 5 -q 1 -c -x 86400 -i application \
        -t 'plant/#' -F '%j' >>"$dir/arrived" 2>/dev/null &
    application=$!
}
stop_cloud() {
    stop "$application"
    application=
    stop "$cloud"
    cloud=
}
start_neap() {
    "$neap" daemon --config "$dir/neap.toml" >>"$dir/neap.log" 2>&1 &
    daemon=$!
    wait_for 30 "neap to be ready" ready
}
ready() {
    kill -0 "$daemon" 2>/dev/null || fail "the daemon ended"
    [ -S "$dir/run/neap.sock" ] && [ "$(curl_status /readyz)" = 200 ]
}
# bash instead of curl, which a fresh Debian lacks.
curl_status() {
    exec 4<>"/dev/tcp/127.0.0.1/$http_port" || return 0
    printf 'GET %s HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n' "$1" >&4
    head -1 <&4 | cut -d' ' -f2
    exec 4>&-
} 2>/dev/null

# publish FIRST LAST: readings r-FIRST to r-LAST.
publish() {
    for number in $(seq "$1" "$2"); do
        printf '{"id":"r-%03d","celsius":%d.%d}\n' "$number" $((18 + number * 7 % 12)) $((number % 10))
    done | mosquitto_pub -h 127.0.0.1 -p "$site_port" -V 5 -q 1 -t sensors/hall/temperature -l
}
# The readings that arrived in the cloud, by their own id, each once.
readings() { grep -oE 'r-[0-9]{3}' "$dir/arrived" 2>/dev/null | sort -u; }
arrived() { [ "$(readings | wc -l)" -ge "$1" ]; }
# The CloudEvents id of each message that came, duplicates too.
event_ids() { sed -n 's/.*"user-properties":{[^}]*"id":"\([^"]*\)".*/\1/p' "$dir/arrived"; }
# Queue depths, from `neap status`.
depth() { "$neap" status --output json | tr -d ' \n' | sed -n "s/.*\"$1\":{\"depth\":\([0-9]*\).*/\1/p"; }
outbox_holds() { [ "$(depth inbox)" = 0 ] && [ "$(depth outbox)" -ge "$1" ]; }
empty() { [ "$(depth inbox)" = 0 ] && [ "$(depth outbox)" = 0 ]; }

# --- the demo ------------------------------------------------------------------------------------

began=$SECONDS
touch "$dir/arrived" "$dir/alarms"

step "A broker on site, a broker in the cloud, and neap between them"
site_port=$(free_port)
cloud_port=$(free_port)
http_port=$(free_port)
start_broker site "$site_port"
site=$started
start_cloud
stdbuf -oL mosquitto_sub -h 127.0.0.1 -p "$site_port" -t 'alarms/#' -F '%t %p' >>"$dir/alarms" 2>/dev/null &
alarms=$!
mkdir -p "$dir/functions.d"
sed -e "s|@DIR@|$dir|g; s|@CGROUP@|$cgroup|; s|@HTTP@|$http_port|" \
    -e "s|@SITE@|$site_port|; s|@CLOUD@|$cloud_port|" "$here/neap.toml" >"$dir/neap.toml"
export NEAP_SOCKET=$dir/run/neap.sock
start_neap
PATH=$(dirname "$neap"):$PATH
tell "site :$site_port, cloud :$cloud_port, neap's HTTP :$http_port"
show neap image import "$images/shell.tar"
show neap image import "$images/threshold.tar"
show cat "$here/report.toml"
show neap deploy "$here/report.toml" "$here/alarm.toml"

step "Readings come in over MQTT; each runs in a container of its own"
wait_for 30 "neap's subscription" grep -q '1 sensors/+/temperature' "$dir/site/log"
publish 1 5
wait_for 30 "5 results in the cloud" arrived 5
tell "the cloud has them:"
sed -nE 's/.*"topic":"([^"]*)".*\\"subject\\":\\"([^\\]*)\\".*\\"data\\":\\"(.*)\\"\}.*/     \1: \3 from \2/p' "$dir/arrived" | tr -d '\\'
tell "alarms, published back on site:"
wait_for 20 "an alarm" test -s "$dir/alarms"
grep . "$dir/alarms" | sed 's/^/     /'

step "The cloud goes away; 20 more readings come in"
stop_cloud
publish 6 25
wait_for 60 "20 results kept" outbox_holds 20
show neap status
tell "$(depth outbox) results are kept on the gateway's disk; the first of them:"
neap deliveries | head -4 | sed 's/^/     /'

step "neap is killed (SIGKILL); 5 readings come in while it is dead; it starts again"
kill -KILL "$daemon"
wait "$daemon" 2>/dev/null || true
tell "killed"
publish 26 30
start_neap
wait_for 60 "25 results kept" outbox_holds 25
tell "back, and holds $(depth outbox) results: nothing is lost, nothing is sent yet"

step "The cloud comes back"
start_cloud
wait_for 60 "30 results in the cloud" arrived 30
wait_for 30 "empty queues" empty
messages=$(wc -l <"$dir/arrived")
distinct=$(event_ids | sort -u | wc -l)
missing=0
for number in $(seq 1 30); do
    readings | grep -qx "$(printf 'r-%03d' "$number")" || missing=$((missing + 1))
done
show neap status
tell "published 30, arrived $(readings | wc -l), missing $missing"
tell "messages $messages, distinct by CloudEvents id $distinct, duplicates $((messages - distinct))"
[ "$missing" = 0 ] || fail "$missing results are missing"
[ "$distinct" = 30 ] || fail "30 results should have 30 ids, they have $distinct"

step "Stop"
kill -TERM "$daemon"
code=0
wait "$daemon" || code=$?
daemon=
[ "$code" = 0 ] || fail "the daemon's exit code is $code"
tell "neap stopped cleanly"
printf '\n%sAll 30 results arrived, through an outage and a kill, in %d s.%s\n' "$green" $((SECONDS - began)) "$plain"
