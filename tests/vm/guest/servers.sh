#!/bin/busybox sh
# pid 1 of the guest `servers`: functions that stay up between calls, on cgroup v2. Between calls
# they are frozen by cgroup.freeze, and killed like that they end, as on v1 they would not.
#
# kernel: cgroup_no_v1=all

. /lib.sh

# only FUNCTION: its one instance's cgroup.
only() {
    [ "$(instance_of "$1" | wc -l)" = 1 ] || return 1
    instance_of "$1"
}
# The file neap writes, and what the kernel made of it.
frozen() {
    dir=$(only "$1") && [ "$(cat "$dir/cgroup.freeze")" = 1 ] && grep -qx 'frozen 1' "$dir/cgroup.events"
}
# comes_to_rest FUNCTION: frozen, it uses no CPU at all.
comes_to_rest() {
    within 30 frozen "$1" || {
        echo "$1 is not frozen: $(instances | while read -r left; do echo "$left $(xargs <"$left/cgroup.events")"; done)"
        return 1
    }
    before=$(used "$1")
    sleep 1
    echo "$1 used $before us, then $(used "$1")"
    frozen "$1" && [ "$(used "$1")" = "$before" ]
}
used() { awk '/^usage_usec/ { print $2 }' "$(only "$1")/cpu.stat"; }
# answers WANTED FUNCTION[/PATH] DATA
answers() {
    answer=$(wget -q -O - --post-data "$3" "http://127.0.0.1:8080/function/$2") || {
        echo "$2 does not answer"
        return 1
    }
    echo "$answer"
    [ "$answer" = "$1" ] || {
        echo "wanted: $1"
        return 1
    }
}

# Each twice, at rest in between: what was counted by the first call is there for the second, so
# both were one instance's.
serves() {
    neap deploy /servers/served.toml && no_instance || return 1
    answers '1 calls, twenty-one' served/cgi-bin/count twenty-one && comes_to_rest served || return 1
    echo "limits: memory $(cat "$(only served)/memory.max"), frozen with $(cat "$(only served)/pids.current") processes"
    [ "$(cat "$(only served)/memory.max")" = 33554432 ]
}
is_thawed() { answers '2 calls, twenty-two' served/cgi-bin/count twenty-two && comes_to_rest served; }
counts() {
    neap deploy /servers/counter.toml || return 1
    answers '{"calls":1,"event":{"celsius":21}}' counter '{"celsius":21}' && comes_to_rest counter || return 1
    answers '{"calls":2,"event":{"celsius":22}}' counter '{"celsius":22}' && comes_to_rest counter
}
# An event of the inbox thaws it like a call.
takes_an_event() {
    neap invoke counter --async --data '{"celsius":23}' && within 60 inbox_empty && comes_to_rest counter || return 1
    neap events --state dead | grep -q counter && return 1
    answers '{"calls":4,"event":1}' counter 1 && comes_to_rest counter
}

# The launcher goes, and with it what it has frozen: v2 kills frozen processes at once.
launcher_killed() {
    frozen served && frozen counter || return 1
    processes=$(cat "$(only served)/cgroup.procs" "$(only counter)/cgroup.procs")
    kill -KILL "$(launcher)" && within 30 gone $processes && serve_anew
}
# The node goes; its frozen functions end before anything sweeps them, and the next node has
# nothing of them.
node_killed() {
    frozen served && frozen counter || return 1
    processes=$(cat "$(only served)/cgroup.procs" "$(only counter)/cgroup.procs")
    kill_daemon && within 30 gone $processes || {
        echo "still there: $(ps | grep -E "^ *($(echo $processes | tr ' ' '|')) ")"
        return 1
    }
    start_daemon && within 30 no_instance && serve_anew
}
gone() { for process in "$@"; do [ ! -e "/proc/$process" ] || return 1; done; }
serve_anew() {
    answers '1 calls, x' served/cgi-bin/count x && answers '{"calls":1,"event":7}' counter 7 \
        && comes_to_rest served && comes_to_rest counter
}

# Both kinds of instances ahead of their events: started and frozen, and parked.
keeps() {
    neap deploy /servers/kept.toml && cp /images/warm.toml /tmp/warm.toml && neap deploy /tmp/warm.toml \
        && within 60 kept_and_parked && comes_to_rest kept || return 1
    wget -q -O - http://127.0.0.1:8080/function/kept/index.html | grep -qx kept && comes_to_rest kept
}
kept_and_parked() { frozen kept && [ "$(instance_of warm | wc -l)" = 2 ]; }
kept_are_made_again() {
    before=$(instances)
    kill_daemon && start_daemon && within 90 kept_and_parked || {
        echo "there are: $(instances)"
        return 1
    }
    for dir in $before; do
        [ ! -e "$dir" ] || {
            echo "left: $dir"
            return 1
        }
    done
    [ "$(neap invoke warm --data 1)" = "fresh 1" ] || return 1
    neap rm warm && neap rm kept && within 30 no_instance
}

# The whole group goes, not only the process that ate, and another serves.
out_of_memory() {
    before=$(daemon)
    answers '1 calls, x' served/cgi-bin/count x || return 1
    wget -S -O /dev/null --post-data x http://127.0.0.1:8080/function/served/cgi-bin/eat >/tmp/eat 2>&1 && return 1
    cat /tmp/eat
    grep -q 'HTTP/1.1 502' /tmp/eat && answers '1 calls, x' served/cgi-bin/count x || return 1
    fails_with counter 'out of memory' '"eat"' && answers '{"calls":1,"event":7}' counter 7 && [ "$(daemon)" = "$before" ]
}

# `scale.idle` later it is gone.
goes_when_idle() {
    sed 's/^idle = .*/idle = "1s"/' /servers/served.toml >/tmp/served.toml
    neap deploy /tmp/served.toml && answers '1 calls, x' served/cgi-bin/count x && within 60 no_instance_of served
}
no_instance_of() { ! runs "$1"; }

# The one that is frozen is asked to end, too.
stops() {
    neap invoke counter --data 7 && comes_to_rest counter && stop_daemon && no_instance \
        && [ ! -e /sys/fs/cgroup/neap ]
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "daemon is ready" start_daemon || exit
check "image import" imports
check "a server is started by its first call, frozen when it is idle" serves
check "the next call thaws it" is_thawed
check "a Lambda function is frozen between calls" counts
check "an event thaws it" takes_an_event
check "a killed launcher takes its frozen instances along, others serve" launcher_killed
check "a killed node's frozen instances end, the next one serves" node_killed
check "instances are kept ready, one started and frozen, two parked" keeps
check "a killed node's are swept, and made again" kept_are_made_again
check "a server out of memory is told as such, and another serves" out_of_memory
check "an idle server is removed after its time" goes_when_idle
check "SIGTERM stops it cleanly, with a frozen function" stops
