#!/bin/busybox sh
# pid 1 of the guest `delegated`: neap in a part of the cgroup tree, as a service manager or a
# container hands it out. Nothing outside of that part may change.
#
# kernel: cgroup_no_v1=all
# packages: attr libattr1 util-linux libc6

. /lib.sh

cgroup=/sys/fs/cgroup

# part NAME: a cgroup that is marked as systemd marks what it delegates.
part() { mkdir -p "$cgroup/$1" && setfattr -n user.delegate -v 1 "$cgroup/$1"; }
# in_part NAME COMMAND…: runs it there.
in_part() { sh -c 'echo $$ >"/sys/fs/cgroup/$0/cgroup.procs" && exec "$@"' "$@"; }
where() { cut -d: -f3 "/proc/$(daemon)/cgroup"; }

# The daemon in a child of a part that was given memory and processes, but no CPU.
partly() {
    echo '+memory +pids' >$cgroup/cgroup.subtree_control
    part box && mkdir $cgroup/box/inner || return 1
    daemon_in=box/inner
    base=box/
    start_daemon || return 1
    echo "daemon in $(where), root passes on: $(cat $cgroup/cgroup.subtree_control)"
    [ "$(where)" = /box/inner ] && [ "$(cat $cgroup/cgroup.subtree_control)" = "memory pids" ] || return 1
    [ "$(cat $cgroup/box/cgroup.subtree_control)" = "memory pids" ] && [ ! -e $cgroup/neap ] || return 1
    grep 'limits.cpu' /tmp/daemon.log | grep 'Delegate=yes'
}
partly_limits() {
    base=box/
    imports && neap deploy /functions && echoes && fails_with oom 'out of memory' || return 1
    neap invoke forks --data x >/dev/null 2>&1
    neap logs forks | grep -qi "can't fork"
}
doctor_knows() {
    neap() { in_part box/inner /bin/neap "$@"; }
    doctor_says 'cgroup cpu' warning 'Delegate=yes'
}

# The daemon in the part itself: it has to make room.
whole() {
    stop_daemon || return 1
    echo '+cpu +memory +pids' >$cgroup/cgroup.subtree_control
    part unit || return 1
    daemon_in=unit
    start_daemon || return 1
    echo "daemon in $(where), the part passes on: $(cat $cgroup/unit/cgroup.subtree_control)"
    [ "$(where)" = /unit/daemon ] && [ "$(cat $cgroup/unit/cgroup.subtree_control)" = "cpu memory pids" ] || return 1
    echoes && fails_with oom 'out of memory'
}
# Killed and started anew in the same place, as a service manager would.
again() {
    kill_daemon || return 1
    daemon_in=unit/daemon
    start_daemon && [ "$(where)" = /unit/daemon ] && echoes
}

# Somebody else's process in the part.
occupied() {
    stop_daemon || return 1
    part flat || return 1
    in_part flat sleep 600 &
    within 10 grep -q . $cgroup/flat/cgroup.procs
    daemon_in=flat
    refuses 'limits.memory' 'cgroup /flat holds processes' || return 1
    # Not even half of the controllers, which would make cgroups that nobody can enter.
    [ -z "$(cat $cgroup/flat/cgroup.subtree_control)" ]
}

# What a container sees: the part as the root of a tree of its own.
in_a_container() {
    mkdir -p $cgroup/container
    daemon_in=container daemon_namespace=1
    start_daemon || return 1
    echo "daemon in $(where); the container passes on: $(cat $cgroup/container/cgroup.subtree_control)"
    [ "$(where)" = /container/daemon ] || return 1
    [ "$(cat $cgroup/container/cgroup.subtree_control)" = "cpu memory pids" ] || return 1
    echoes && fails_with oom 'out of memory' && stop_daemon
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "a part without the CPU controller is enough" partly || exit
check "its limits hold" partly_limits
check "doctor names who does not pass the CPU controller on" doctor_knows
check "in a part of its own the daemon moves to a leaf" whole
check "also when it was killed there" again
check "a part that others use is refused" occupied
check "in a container's cgroup namespace" in_a_container
