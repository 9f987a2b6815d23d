# What every guest's script has: a cgroup v2 system around it (when it is pid 1), checks with a
# time limit each, and a daemon to start, kill and stop.
#
# Each check writes "ok NAME" or "FAILED NAME: why" to the host; the last line is "done".

export PATH=/usr/local/bin:/bin:/sbin:/usr/bin HOME=/
bring_up() {
    /bin/busybox --install -s /bin
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    mkdir -p /dev/pts /dev/shm
    mount -t devpts pts /dev/pts
    mount -t tmpfs tmp /tmp
    mount -t tmpfs run /run
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # Files have the owner they had on the host that made the disk.
    chown -R 0:0 /bin /sbin /lib* /usr /etc /images /functions /servers /init 2>/dev/null
    echo secret >/etc/neap/token
    chmod 600 /etc/neap/token
    echo 'root:x:0:0:root:/:/bin/sh' >/etc/passwd
    hostname vm
    modprobe virtio_net 2>/dev/null
    ip link set lo up
    ip link set eth0 up
    ip addr add 10.0.2.15/24 dev eth0
    ip route add default via 10.0.2.2
}
[ $$ != 1 ] || bring_up

results=/dev/null host=
for port in /sys/class/virtio-ports/*; do
    case $(cat "$port/name" 2>/dev/null) in
        neap.results) results=/dev/${port##*/} ;;
        neap.host) host=/dev/${port##*/} ;;
    esac
done
exec 3>"$results"
[ -z "$host" ] || exec 4<>"$host"
say() {
    echo "$*" >&3
    echo "[$(cut -d' ' -f1 /proc/uptime)] $*"
}

finish() {
    say done
    sync
    busybox poweroff -f
}
trap finish EXIT

now() { cut -d. -f1 /proc/uptime; }

# check NAME COMMAND…: ok when the command succeeds in $step_seconds; its output is the reason
# when not. It runs in a shell of its own, so what it sets is gone afterwards.
step_seconds=300
check() {
    name=$1
    shift
    began=$(now)
    ("$@") >/tmp/check 2>&1 &
    step=$!
    (
        sleep $step_seconds
        kill -KILL $step 2>/dev/null
    ) &
    watchdog=$!
    wait $step
    code=$?
    kill -KILL $watchdog 2>/dev/null
    wait $watchdog 2>/dev/null
    took=$(($(now) - began))
    if [ $code = 0 ]; then
        say "ok $name ($took s)"
    else
        [ $took -lt $step_seconds ] || echo "took more than $step_seconds s" >>/tmp/check
        say "FAILED $name: $(tr '\n' ' ' </tmp/check | tail -c 900)"
        echo "--- daemon ---"
        tail -40 /tmp/daemon.log 2>/dev/null
    fi
    return $code
}

# within SECONDS COMMAND…: polls.
within() {
    end=$(($(now) + $1))
    shift
    until "$@"; do
        [ "$(now)" -lt "$end" ] || return 1
        sleep 0.2
    done
}

# Has the host do something (host.sh), and waits until it is done.
on_host() {
    echo "$*" >&4
    read -r -t 115 answer <&4 || {
        echo "the host did not answer \`$*\`"
        return 1
    }
    [ "$answer" = "done" ] || {
        echo "$*: $answer"
        return 1
    }
}

# Starts the daemon in the background: its pid is in /run/daemon.pid, its end in /run/daemon.code.
# In the cgroup $daemon_in, if that is set; with $daemon_namespace, in a cgroup namespace of it.
launch() {
    rm -f /run/daemon.pid /run/daemon.code
    (
        sh -c '
            [ -z "$1" ] || echo $$ >"/sys/fs/cgroup/$1/cgroup.procs"
            [ -z "$2" ] || exec /usr/bin/unshare -C -m sh -c "
                umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec neap daemon"
            exec neap daemon' launch "${daemon_in-}" "${daemon_namespace-}" >>/tmp/daemon.log 2>&1 &
        echo $! >/run/daemon.pid.new
        mv /run/daemon.pid.new /run/daemon.pid
        wait $!
        echo $? >/run/daemon.code.new
        mv /run/daemon.code.new /run/daemon.code
    ) &
}
daemon() { cat /run/daemon.pid; }
ended() { [ -e /run/daemon.code ]; }

start_daemon() {
    launch "$@"
    within 110 ready_or_ended
    ready || {
        tail -20 /tmp/daemon.log
        return 1
    }
}
ready() { wget -q -O /dev/null http://127.0.0.1:8080/readyz 2>/dev/null; }
ready_or_ended() { ready || ended; }

# The first process of a PID namespace below the daemon.
launcher() {
    for process in /proc/[0-9]*; do
        # Its makers and what is parked are its forks, with its arguments; it alone is 1 in its namespace.
        tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -q '^neap launcher serve' &&
            grep -q '^NSpid:.[0-9]*.1$' "$process/status" && basename "$process" && return
    done 2>/dev/null
}

kill_daemon() {
    kill -KILL "$(daemon)"
    within 30 ended
}
stop_daemon() {
    kill -TERM "$(daemon)"
    within 60 ended || {
        echo "the daemon is still there"
        return 1
    }
    echo "exit code $(cat /run/daemon.code)"
    [ "$(cat /run/daemon.code)" = 0 ]
}
# The daemon must refuse to start, and say all of this.
refuses() {
    launch
    within 60 ended || {
        echo "it started"
        return 1
    }
    echo "exit code $(cat /run/daemon.code): $(tail -3 /tmp/daemon.log)"
    [ "$(cat /run/daemon.code)" != 0 ] || return 1
    for word in "$@"; do
        tail -5 /tmp/daemon.log | grep -q "$word" || {
            echo "it does not say \`$word\`"
            return 1
        }
    done
}

# doctor_says NAME LEVEL WORD…: the finding has this level and says all of this.
doctor_says() {
    wanted=$1 level=$2
    shift 2
    neap doctor >/tmp/doctor
    finding=$(awk -v name="$wanted" '
        index($0, name) == 10 && $1 ~ /^(ok|warning|failing)$/ { on = 1; print; next }
        on && /^ +→/ { print; next }
        { on = 0 }' /tmp/doctor)
    echo "$finding"
    echo "$finding" | grep -q "^$level " || {
        cat /tmp/doctor
        return 1
    }
    for word in "$@"; do
        echo "$finding" | grep -q -- "$word" || {
            echo "it does not say \`$word\`"
            return 1
        }
    done
}

# Adds lines to a section of the configuration: configure node 'limits = "prefer"'.
configure() { sed -i "/^\[$1\]/a $2" /etc/neap/neap.toml; }

# The instances' cgroups: below the one in the configuration stands one for the data directory.
instances() { find "/sys/fs/cgroup/${base:-}neap" -mindepth 2 -type d 2>/dev/null; }
an_instance() { instances | grep -q .; }
no_instance() { ! an_instance; }
instance_of() { instances | grep "/$1\."; }
runs() { instance_of "$1" | grep -q .; }

imports() { neap image import /images/shell.tar && neap image ls | grep -q shell; }
echoes() {
    output=$(neap invoke echo --data 'twenty-one degrees') || return 1
    echo "$output"
    [ "$output" = 'twenty-one degrees' ]
}
# fails_with FUNCTION PATTERN [DATA]: the invocation fails, and says why.
fails_with() {
    function=$1 pattern=$2
    if output=$(neap invoke "$function" --data "${3:-x}" 2>&1); then
        echo "succeeded: $output"
        return 1
    fi
    echo "$output"
    echo "$output" | grep -qiE "$pattern"
}
depth() { neap status --output json | tr -d ' \n' | sed -n "s/.*\"$1\":{\"depth\":\([0-9]*\).*/\1/p"; }
inbox_empty() { [ "$(depth inbox)" = 0 ]; }
