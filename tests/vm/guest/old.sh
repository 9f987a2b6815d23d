#!/bin/busybox sh
# pid 1 of the guest `old`: Debian 11's kernel, Linux 5.10. It has no id-mapped mounts (5.12),
# so `user_namespaces` has to be `prefer`; and no cgroup.kill (5.14).
#
# kernel: cgroup_no_v1=all
# suite: bullseye

. /lib.sh

no_kill_file() {
    mkdir /sys/fs/cgroup/probe && [ ! -e /sys/fs/cgroup/probe/cgroup.kill ] || return 1
    doctor_says cgroup ok '5.14' && rmdir /sys/fs/cgroup/probe
}
confined() {
    facts=$(neap invoke confined --data x) || return 1
    echo "$facts"
    for fact in 'NoNewPrivs:.1' 'Seccomp:.2' 'CapEff:.0000000000000000' 'CapBnd:.0000000000000000' \
        'unshare refused' 'mount refused' 'root is read-only' 'network lo'; do
        echo "$facts" | grep -q "$fact" || return 1
    done
}
leaves_nothing() { within 20 no_instance; }
# A frozen instance of a killed daemon is swept without cgroup.kill, too.
daemon_killed() {
    neap invoke sleeper --async --data x || return 1
    within 30 runs sleeper || return 1
    echo 1 >"$(instance_of sleeper)/cgroup.freeze"
    kill_daemon && start_daemon
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "doctor: no cgroup.kill" no_kill_file
check "doctor: no id-mapped mounts" doctor_says 'user namespaces' failing 5.12 prefer
check "no id-mapped mounts: refuses to start" refuses id-mapped 'user_namespaces = .*prefer'
configure node 'user_namespaces = "prefer"'
check "with that preferred, it starts" start_daemon || exit
check "image import" imports
check "deploy" neap deploy /functions
check "invoke echoes its data" echoes
check "a function is confined" confined
check "allocating past the memory limit is told as such" fails_with oom 'out of memory'
check "a run past its timeout is told as such" fails_with slow 'timed out|timeout'
check "no cgroup is left behind by finished runs" leaves_nothing
check "a killed daemon starts again, a frozen instance behind it" daemon_killed
check "SIGTERM stops it cleanly" stop_daemon
