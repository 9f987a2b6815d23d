#!/bin/busybox sh
# pid 1 of the guest `main`: what neap does on a gateway with pure cgroup v2, where it is the only
# daemon.
#
# kernel: cgroup_no_v1=all

. /lib.sh

only_v2() { mount | grep -q cgroup2 && ! mount | grep -q 'type cgroup ' && [ -e /sys/fs/cgroup/cgroup.controllers ]; }
doctor() { neap doctor; }
imports_compressed() {
    for archive in /images/shell.tar.gz /images/shell.tar.zst; do
        neap image rm shell:1 && neap image import $archive && neap image ls | grep -q shell || return 1
    done
}
logs() { neap logs echo | grep -q from-stderr; }

# Only what neap needs is switched on, at every level above the instances.
controllers() {
    for dir in /sys/fs/cgroup /sys/fs/cgroup/neap $(find /sys/fs/cgroup/neap -mindepth 1 -maxdepth 1 -type d); do
        echo "$dir: $(cat "$dir/cgroup.subtree_control")"
        [ "$(cat "$dir/cgroup.subtree_control")" = "cpu memory pids" ] || return 1
    done
}

limits_are_set() {
    neap invoke burn --data x >/tmp/burn 2>&1 &
    invoke=$!
    within 30 runs burn || return 1
    dir=$(instance_of burn)
    within 30 grep -qx 24 "$dir/pids.max"
    for file in memory.max memory.high memory.swap.max memory.oom.group pids.max cpu.max; do
        echo "$file $(cat "$dir/$file")"
    done
    [ "$(cat "$dir/memory.max")" = $((48 * 1024 * 1024)) ] || return 1
    [ "$(cat "$dir/memory.high")" -lt $((48 * 1024 * 1024)) ] || return 1
    [ "$(cat "$dir/memory.swap.max")" = 0 ] || return 1
    [ "$(cat "$dir/memory.oom.group")" = 1 ] || return 1
    [ "$(cat "$dir/pids.max")" = 24 ] || return 1
    # A quarter of a CPU, whatever the period.
    read -r quota period <"$dir/cpu.max"
    [ "$((quota * 4))" -eq "$period" ] || return 1
    within 15 throttled "$dir" || {
        echo "never throttled: $(cat "$dir/cpu.stat")"
        return 1
    }
    echo 1 >"$dir/cgroup.kill"
    wait "$invoke"
    true
}
throttled() { [ "$(awk '/^nr_throttled/ { print $2 }' "$1/cpu.stat" 2>/dev/null || echo 0)" -ge 3 ]; }

# The machine has swap, so that a limit on memory alone would not stop anybody.
has_swap() {
    dd if=/dev/zero of=/swap bs=1M count=48 2>/dev/null && mkswap /swap >/dev/null && swapon /swap
}
out_of_memory() {
    before=$(swapped)
    fails_with oom 'out of memory' || return 1
    echo "pages swapped out: $before before, $(swapped) after"
    [ $(($(swapped) - before)) -lt 1024 ]
}
swapped() { awk '/^pswpout/ { print $2 }' /proc/vmstat; }
# Killed by somebody else, at the same limit: not told as memory.
killed_otherwise() {
    neap invoke sleeper --data x >/tmp/sleeper 2>&1 &
    invoke=$!
    within 30 runs sleeper || return 1
    within 30 sleeps || return 1
    echo 1 >"$(instance_of sleeper)/cgroup.kill"
    wait "$invoke" && return 1
    cat /tmp/sleeper
    grep -q 'signal 9' /tmp/sleeper && ! grep -qi 'memory' /tmp/sleeper
}
sleeps() { grep -q sleep $(sed 's|.*|/proc/&/comm|' "$(instance_of sleeper)/cgroup.procs") /dev/null 2>/dev/null; }

forks_end_at_the_limit() {
    output=$(neap invoke forks --data x 2>&1) && echo "succeeded"
    output="$output $(neap logs forks 2>&1)"
    echo "$output"
    echo "$output" | grep -qi "can't fork" && ! echo "$output" | grep -q all-64-forked
}

freezes() {
    neap invoke burn --data x >/tmp/burn 2>&1 &
    invoke=$!
    within 30 runs burn || return 1
    dir=$(instance_of burn)
    # Not while it is still being made, which the launcher would wait for.
    within 30 executes "$dir" 'while :' || return 1
    echo 1 >"$dir/cgroup.freeze"
    within 10 grep -q 'frozen 1' "$dir/cgroup.events" || return 1
    before=$(awk '/^usage_usec/ { print $2 }' "$dir/cpu.stat")
    sleep 1
    after=$(awk '/^usage_usec/ { print $2 }' "$dir/cpu.stat")
    echo "usage_usec $before then $after"
    [ "$before" = "$after" ] || return 1
    echo 0 >"$dir/cgroup.freeze"
    within 10 grep -q 'frozen 0' "$dir/cgroup.events" || return 1
    # And again, this time for good: what is frozen ends at its deadline as well.
    echo 1 >"$dir/cgroup.freeze"
    wait "$invoke" && return 1
    cat /tmp/burn
    grep -qi 'timed out\|timeout' /tmp/burn && within 20 no_instance
}
# Whether a process there was executed with this in its arguments.
executes() {
    for pid in $(cat "$1/cgroup.procs" 2>/dev/null); do
        tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q -- "$2" && return
    done
    return 1
}

# The kernel would let anybody make user namespaces; in a function the filter refuses.
confined() {
    unshare -U true || {
        echo "this kernel has no user namespaces to refuse"
        return 1
    }
    facts=$(neap invoke confined --data x) || return 1
    echo "$facts"
    for fact in 'NoNewPrivs:.1' 'Seccomp:.2' 'CapEff:.0000000000000000' 'CapBnd:.0000000000000000' \
        'unshare refused' 'mount refused' 'root is read-only' 'uid 0' 'host uid mapped' 'pid 1' 'network lo' \
        'keys hidden'; do
        echo "$facts" | grep -q "$fact" || {
            echo "not so: $fact"
            return 1
        }
    done
}

leaves_nothing() {
    within 20 no_instance && return 0
    echo "left: $(instances)"
    return 1
}

starts_once() {
    neap invoke once --async --data survivor || return 1
    within 30 runs once || {
        echo "the instance did not start"
        return 1
    }
}
daemon_killed() {
    starts_once || return 1
    # Frozen, too: a v1 kernel would not kill it.
    echo 1 >"$(instance_of once)/cgroup.freeze"
    kill_daemon && start_daemon
}
launcher_killed() {
    starts_once || return 1
    # The launcher is the first process of a PID namespace below the daemon.
    launcher=$(launcher)
    [ -n "$launcher" ] && kill -KILL "$launcher" || return 1
    within 60 inbox_empty && ! neap events --state dead | grep -q once && neap logs once 2>/dev/null
    [ "$(launcher)" != "$launcher" ]
}
runs_again() {
    within 80 inbox_empty || {
        neap events
        return 1
    }
    neap status --output json
    # At least once: the attempt that died with the daemon does not count as a failure.
    ! neap events --state dead | grep -q once
}

# The demo's job: readings become reports in the cloud, through an outage and a kill.
readings() {
    on_host subscribed && on_host publish 1 3 && on_host arrived 3
}
outage() {
    on_host cloud-off && on_host publish 4 9 && within 80 holds 6
}
holds() { [ "$(depth inbox)" = 0 ] && [ "$(depth outbox)" -ge "$1" ]; }
kill_in_outage() {
    kill_daemon && on_host publish 10 12 && start_daemon && within 80 holds 9
}
cloud_comes_back() {
    on_host cloud-on && on_host all-arrived 12 && within 30 holds 0 && [ "$(depth outbox)" = 0 ]
}

# Instances ahead of their events: each serves one and is replaced, a killed daemon's are swept.
parks() {
    cp /images/warm.toml /tmp/warm.toml && neap deploy /tmp/warm.toml || return 1
    within 40 parked 2 || return 1
    first=$(instances | sort | tr '\n' ' ')
    for number in 1 2 3; do
        output=$(neap invoke warm --data "$number") || return 1
        [ "$output" = "fresh $number" ] || {
            echo "$output"
            return 1
        }
    done
    within 40 parked 2 || return 1
    dir=$(instances | head -1)
    echo "first $first then $(instances | tr '\n' ' '), memory $(cat "$dir/memory.current") of $(cat "$dir/memory.max")"
    [ "$(instances | sort | tr '\n' ' ')" != "$first" ] && [ "$(cat "$dir/memory.max")" = 33554432 ]
}
parked() {
    [ "$(neap status --output json | tr -d ' \n' | sed -n 's/.*"parked":\([0-9]*\).*/\1/p')" = "$1" ] \
        && [ "$(instances | wc -l)" = "$1" ]
}
parked_are_swept() {
    before=$(instances | sort | head -1)
    kill_daemon && start_daemon && within 40 parked 2 && [ ! -e "$before" ]
}
# Somebody else takes the machine's memory and keeps waiting for more: real pressure, by the kernel's
# own count. `parked` above is what comes back.
brakes() {
    [ -e /proc/pressure/memory ] || {
        echo "this kernel has no pressure stall information"
        return 1
    }
    mkdir -p /tmp/taken /sys/fs/cgroup/greedy
    mount -t tmpfs -o size=100% taken /tmp/taken
    number=0
    while [ "$(available)" -gt 15 ]; do
        number=$((number + 1))
        dd if=/dev/zero of=/tmp/taken/$number bs=1M count=4 2>/dev/null || return 1
    done
    echo 2M >/sys/fs/cgroup/greedy/memory.high
    echo 32M >/sys/fs/cgroup/greedy/memory.max
    (
        sh -c 'echo $$ >/sys/fs/cgroup/greedy/cgroup.procs; while :; do tail /dev/zero; done' >/dev/null 2>&1 &
    )
    within 120 very_short || {
        cat /proc/pressure/memory
        neap status
        return 1
    }
    # Nothing is refused: it waits its turn.
    within 60 parked 0 && neap invoke echo --data pressed
}
available() { awk '/^MemTotal/ { all = $2 } /^MemAvailable/ { print int($2 * 100 / all) }' /proc/meminfo; }
very_short() { neap status | grep -q 'memory is very short'; }
recovers() {
    echo 1 >/sys/fs/cgroup/greedy/cgroup.kill
    umount /tmp/taken
    within 120 parked 2
}
# What a manifest may give. Twice: parked or not, each instance has it anew.
permits() {
    mknod /dev/meter c 60 7 # for experiments (devices.txt), and never given out: it has no driver
    neap secret set key --data sesame && cp /images/permits.toml /tmp/permits.toml && neap deploy /tmp/permits.toml || return 1
    for time in first second; do
        facts=$(neap invoke permits --data x) || return 1
        echo "$time: $facts"
        for fact in 'secret sesame' 'root is fresh' 'root is writable' 'disk is limited' \
            'CapEff:.0000000000000001' 'chown works' 'device is let through'; do
            echo "$facts" | grep -q "$fact" || {
                echo "not so: $fact"
                return 1
            }
        done
    done
    neap rm permits && neap secret rm key && within 30 no_instance
}
# Growing takes a capability that many a test machine lacks; here root has it.
keeps_volumes() {
    modprobe loop 2>/dev/null
    cp /images/volume.toml /tmp/volume.toml && neap deploy /tmp/volume.toml || return 1
    small=$(neap invoke volume --data x) && sed -i 's/4MiB/16MiB/' /tmp/volume.toml \
        && neap deploy /tmp/volume.toml && large=$(neap invoke volume --data x) || return 1
    kill_daemon && start_daemon || return 1
    within 30 back || return 1
    echo "small $small, large $large, back" $back
    set -- $small $large
    [ "$1" = 0 ] && [ "$2" -lt 4194304 ] && [ "$3" = 1 ] && [ "$4" -gt $((4194304 + 8388608)) ] && [ "$4" -lt 16777216 ] || return 1
    neap rollback volume && neap invoke volume --data x && neap rm volume && within 30 no_instance
}
back() { back=$(neap invoke volume --data x) && [ "${back%%[!0-9]*}" = 1 ]; }
unparks() { neap rm warm && within 30 no_instance; }

stops() {
    stop_daemon && no_instance && [ ! -e /sys/fs/cgroup/neap ]
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "only cgroup v2" only_v2
check "doctor finds nothing failing" doctor
check "daemon is ready" start_daemon || exit
check "image import" imports
check "image import, gzip and zstd" imports_compressed
check "deploy" neap deploy /functions
check "invoke echoes its data" echoes
check "stderr is in the function's log" logs
check "HTTP from the host" on_host call twenty-two
check "controllers are on from the top, needed ones alone" controllers
check "limits are in the cgroup, and the CPU limit throttles" limits_are_set
check "there is swap" has_swap
check "allocating past the memory limit is told as such, and swaps nothing" out_of_memory
check "another kill is not told as memory" killed_otherwise
check "forking past the pids limit fails inside" forks_end_at_the_limit
check "a run past its timeout is told as such" fails_with slow 'timed out|timeout'
check "an instance is frozen, thawed, and killed frozen" freezes
check "a function is confined" confined
check "no cgroup is left behind by finished runs" leaves_nothing
check "a killed daemon starts again, a frozen instance behind it" daemon_killed
check "its committed event runs again" runs_again
check "nothing of the killed instance is left" leaves_nothing
check "a killed launcher is replaced, its event runs again" launcher_killed
check "nothing of the killed launcher's is left" leaves_nothing
check "readings from the host's broker reach the cloud" readings
check "results are kept while the cloud is away" outage
check "and through a kill of the daemon" kill_in_outage
check "all arrive when it is back" cloud_comes_back
check "instances wait parked, serve one event each and are replaced" parks
check "a killed daemon's parked instances are swept, others are made" parked_are_swept
check "short of memory nothing is parked, and events still run" brakes
check "with memory there are parked ones again" recovers
check "a function that goes takes its parked instances along" unparks
check "a function has what its manifest permits, fresh each time" permits
check "a volume grows with its manifest, through a kill and a rollback" keeps_volumes
check "SIGTERM stops it cleanly" stops
