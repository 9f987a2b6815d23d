# The host's half of a guest's run: two brokers on the loopback, the readings of a sensor, what
# arrives in the cloud; sourced by run.sh. The guest leads: it writes one order a line on a
# virtio-serial port and gets `done` or `failed WHY` back, so neither side guesses how far the
# other is.

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        listening $port || break
    done
    echo $port
}

# within SECONDS COMMAND…
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# Everything that is started dies with the shell that started it, however that dies. (No function:
# in the background that would be one more shell, and $! not the program.)
bound=(setpriv --pdeathsig KILL)

# start_broker NAME PORT: its pid in $started.
start_broker() {
    mkdir -p "$run/$1"
    cat >"$run/$1/mosquitto.conf" <<CONF
listener $2 127.0.0.1
allow_anonymous true
user $(id -un)
persistence true
persistence_location $run/$1/
max_queued_messages 0
max_queued_bytes 0
log_type all
CONF
    "${bound[@]}" mosquitto -c "$run/$1/mosquitto.conf" >>"$run/$1/log" 2>&1 &
    started=$!
    within 20 listening "$2" || die "the broker $1 did not start: $(tail -3 "$run/$1/log")"
}

start_cloud() {
    start_broker cloud "$cloud_port"
    cloud=$started
    # The application in the cloud: its session is persistent, so it misses nothing.
    "${bound[@]}" mosquitto_sub -h 127.0.0.1 -p "$cloud_port" -V 5 -q 1 -c -x 86400 -i application \
        -t 'plant/#' -F '%j' >>"$run/arrived" 2>/dev/null &
    application=$!
}

stop_cloud() {
    local pid
    for pid in $application $cloud; do
        kill -TERM "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    application='' cloud=''
}

# publish FIRST LAST: readings r-FIRST to r-LAST.
publish() {
    local number
    for number in $(seq "$1" "$2"); do
        printf '{"id":"r-%03d","celsius":%d}\n' "$number" $((18 + number * 7 % 12))
    done | timeout 30 mosquitto_pub -h 127.0.0.1 -p "$site_port" -V 5 -q 1 -t sensors/hall/temperature -l
}

subscribed() { grep -q '1 sensors/+/temperature' "$run/site/log"; }
readings() { grep -oE 'r-[0-9]{3}' "$run/arrived" 2>/dev/null | sort -u; }
arrived() { [ "$(readings | wc -l)" -ge "$1" ]; }
# The CloudEvents id of each message that came, duplicates too.
event_ids() { sed -n 's/.*"user-properties":{[^}]*"id":"\([^"]*\)".*/\1/p' "$run/arrived"; }

# What came is what was published, each reading once by its id.
all_arrived() {
    local number
    within 100 arrived "$1" || {
        echo "$(readings | wc -l) of $1 readings arrived"
        return 1
    }
    for number in $(seq 1 "$1"); do
        readings | grep -qx "$(printf 'r-%03d' "$number")" || {
            echo "reading $number did not arrive"
            return 1
        }
    done
    [ "$(event_ids | sort -u | wc -l)" = "$1" ] || {
        echo "$1 readings have $(event_ids | sort -u | wc -l) ids"
        return 1
    }
}

# An HTTP call into the guest, with bash alone.
call_guest() {
    local line
    exec 4<>"/dev/tcp/127.0.0.1/$http_port" || return 1
    printf 'POST /function/echo HTTP/1.1\r\nHost: gateway\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s' \
        "${#1}" "$1" >&4
    answer=$(timeout 60 cat <&4)
    exec 4>&-
    case $answer in
        "HTTP/1.1 200"*"$1") ;;
        *)
            echo "answered: $(head -c 300 <<<"$answer")"
            return 1
            ;;
    esac
}

order() {
    case $1 in
        subscribed) within 60 subscribed ;;
        publish) publish "$2" "$3" ;;
        cloud-off) stop_cloud ;;
        cloud-on) start_cloud ;;
        arrived) within 100 arrived "$2" ;;
        all-arrived) all_arrived "$2" ;;
        call) call_guest "$2" ;;
        *)
            echo "unknown order"
            false
            ;;
    esac
}

# serve IN OUT: until the guest hangs up, which it never does; killed with the run.
serve() {
    local line why
    while read -r line; do
        # shellcheck disable=SC2086 # words, by intent
        if order $line >"$run/order" 2>&1; then
            echo "done"
        else
            why=$(tr '\n' ' ' <"$run/order" | tail -c 300)
            echo "failed $why"
        fi
    done <"$1" >"$2"
}
