#!/bin/busybox sh
# pid 1 of the guest: brings up a cgroup v2 system, starts `neap daemon` and checks it.
# Each check writes "ok NAME" or "FAILED NAME: why" to the host, the last line is "done".

/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
# Files have the owner they had on the host that made the disk.
chown -R 0:0 /bin /lib* /usr /etc /images /functions /init 2>/dev/null
ip link set lo up
hostname vm

results=/dev/null
for port in /sys/class/virtio-ports/*; do
    [ "$(cat "$port/name" 2>/dev/null)" = neap.results ] && results=/dev/${port##*/}
done
exec 3>"$results"
say() {
    echo "$*" >&3
    echo "[$(cut -d' ' -f1 /proc/uptime)] $*"
}

daemon=
finish() {
    say done
    sync
    poweroff -f
}

# check NAME COMMAND…: ok when the command succeeds; its output is the reason when not.
check() {
    name=$1
    shift
    if "$@" >/tmp/check 2>&1; then
        say "ok $name"
    else
        say "FAILED $name: $(tr '\n' ' ' </tmp/check | tail -c 600)"
        echo "--- daemon ---"
        tail -40 /tmp/daemon.log
    fi
}

# within SECONDS COMMAND…: polls.
within() {
    end=$(($(cut -d. -f1 /proc/uptime) + $1))
    shift
    until "$@"; do
        [ "$(cut -d. -f1 /proc/uptime)" -lt "$end" ] || return 1
        sleep 0.2
    done
}

start_daemon() {
    neap daemon >>/tmp/daemon.log 2>&1 &
    daemon=$!
    within 60 ready || {
        tail -20 /tmp/daemon.log
        return 1
    }
}

ready() { wget -q -O /dev/null http://127.0.0.1:8080/readyz 2>/dev/null; }

# The instances' cgroups: below the one in the configuration stands one for the data directory.
instances() { find /sys/fs/cgroup/neap -mindepth 2 -type d 2>/dev/null; }
an_instance() { instances | grep -q .; }
no_instance() { ! an_instance; }
# The directory that holds the limits, once the instance runs.
limited() { for dir in $(instances); do grep -qx "$1" "$dir/memory.max" 2>/dev/null && echo "$dir"; done; }
is_limited() { limited "$1" | grep -q .; }

only_v2() { mount | grep -q cgroup2 && ! mount | grep -q 'type cgroup ' && [ -e /sys/fs/cgroup/cgroup.controllers ]; }
imports() { neap image import /images/shell.tar && neap image ls | grep -q shell; }
deploys() { neap deploy /functions; }
echoes() {
    output=$(neap invoke echo --data 'twenty-one degrees') || return 1
    echo "$output"
    [ "$output" = 'twenty-one degrees' ]
}
logs() { neap logs echo | grep -q from-stderr; }

# OUTPUT must name the cause; the invocation must fail.
fails_with() {
    function=$1 pattern=$2
    if output=$(neap invoke "$function" --data x 2>&1); then
        echo "succeeded: $output"
        return 1
    fi
    echo "$output"
    echo "$output" | grep -qiE "$pattern"
}

forks_end_at_the_limit() {
    output=$(neap invoke forks --data x 2>&1) && echo "succeeded"
    output="$output $(neap logs forks 2>&1)"
    echo "$output"
    echo "$output" | grep -qi "can't fork" && ! echo "$output" | grep -q all-64-forked
}

limits_are_set() {
    neap invoke burn --data x >/tmp/burn 2>&1 &
    invoke=$!
    within 30 is_limited $((48 * 1024 * 1024)) || {
        echo "no cgroup with memory.max of 48 MiB: $(instances)"
        return 1
    }
    dir=$(limited $((48 * 1024 * 1024)) | head -1)
    echo "in $dir: memory $(cat "$dir/memory.max") swap $(cat "$dir/memory.swap.max" 2>/dev/null) oom.group" \
        "$(cat "$dir/memory.oom.group") pids $(cat "$dir/pids.max") cpu $(cat "$dir/cpu.max")"
    [ "$(cat "$dir/pids.max")" = 24 ] || return 1
    # A quarter of a CPU, whatever the period.
    read -r quota period <"$dir/cpu.max"
    [ "$((quota * 4))" -eq "$period" ] || return 1
    [ "$(cat "$dir/memory.oom.group")" = 1 ] || return 1
    within 15 throttled "$dir" || {
        echo "never throttled: $(cat "$dir/cpu.stat")"
        return 1
    }
    wait "$invoke"
    true
}
throttled() { [ "$(awk '/^nr_throttled/ { print $2 }' "$1/cpu.stat" 2>/dev/null || echo 0)" -ge 3 ]; }

restart_sweeps() {
    neap invoke once --async --data survivor || return 1
    within 30 an_instance || {
        echo "the instance did not start"
        return 1
    }
    kill -KILL "$daemon"
    wait "$daemon" 2>/dev/null
    start_daemon
}
runs_again() {
    within 90 queue_empty || {
        neap events
        return 1
    }
    neap status --output json
    # At least once: the attempt that died with the daemon does not count as a failure.
    ! neap events --state dead | grep -q once
}
queue_empty() { neap status --output json | tr -d ' \n' | grep -q '"inbox":{"depth":0'; }
nothing_of_the_killed() {
    within 20 no_instance && return 0
    echo "left: $(instances)"
    return 1
}

stops() {
    kill -TERM "$daemon"
    wait "$daemon"
    code=$?
    echo "exit code $code"
    [ "$code" = 0 ] && no_instance
}

trap finish EXIT
say "guest: $(uname -r), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "only cgroup v2" only_v2
check "daemon is ready" start_daemon
# Without it the rest says nothing.
ready || exit 1
say "doctor: $(neap doctor 2>&1 | tr '\n' ';' | cut -c1-900)"
check "image import" imports
check "deploy" deploys
check "invoke echoes its data" echoes
check "stderr is in the function's log" logs
check "limits are in the cgroup, and the CPU limit throttles" limits_are_set
check "allocating past the memory limit is told as such" fails_with oom 'oom|out of memory|memory'
check "forking past the pids limit fails inside" forks_end_at_the_limit
check "a run past its timeout is told as such" fails_with slow 'timed out|timeout'
check "no cgroup is left behind by finished runs" nothing_of_the_killed
check "a killed daemon starts again" restart_sweeps
check "its committed event runs again" runs_again
check "nothing of the killed instance is left" nothing_of_the_killed
check "SIGTERM stops it cleanly" stops
