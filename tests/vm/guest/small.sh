#!/bin/busybox sh
# pid 1 of the guest `small`: a kernel that lacks things. What `neap doctor` says to each, where
# neap refuses to run, and what it does where it may.
#
# kernel: cgroup_no_v1=all cgroup_disable=memory,cpu psi=0
# without: overlay nf_tables
# memory: 384

. /lib.sh

overlay_appears() { insmod /overlay.ko && doctor_says overlayfs ok mounts; }

no_user_namespaces() {
    echo 0 >/proc/sys/user/max_user_namespaces
    doctor_says 'user namespaces' failing 'max_user_namespaces' 'user_namespaces = .*prefer'
}

runs_without() {
    neap status >/tmp/status
    cat /tmp/status
    for word in 'limits.cpu' 'limits.memory' 'user namespaces'; do
        grep -q "$word" /tmp/daemon.log || {
            echo "the daemon does not warn of $word"
            return 1
        }
    done
    facts=$(neap invoke confined --data x) || return 1
    echo "$facts"
    # Root of the node by its number, but without any capability, and under the filter.
    for fact in 'NoNewPrivs:.1' 'Seccomp:.2' 'CapEff:.0000000000000000' 'CapBnd:.0000000000000000' \
        'unshare refused' 'mount refused' 'root is read-only' 'network lo'; do
        echo "$facts" | grep -q "$fact" || return 1
    done
    ! echo "$facts" | grep -q 'host uid mapped'
}

# Limits that can be had hold, also where others can't.
forks_end() {
    neap invoke forks --data x >/tmp/forks 2>&1
    cat /tmp/forks
    neap logs forks | grep -qi "can't fork"
}

has_ids_of_its_own() {
    stop_daemon || return 1
    echo 1000 >/proc/sys/user/max_user_namespaces
    start_daemon || return 1
    neap invoke confined --data x | grep 'host uid mapped'
}

# Without limits.memory it is the machine that runs out: the function goes, not the daemon.
machine_without_memory() {
    before=$(daemon)
    fails_with oom 'signal 9' || return 1
    [ "$(daemon)" = "$before" ] && ! ended && ready
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
# All of it, for who reads the log.
neap doctor
check "doctor: no overlayfs" doctor_says overlayfs failing CONFIG_OVERLAY_FS
check "doctor: no memory controller" doctor_says 'cgroup memory' failing 'cgroup_enable=memory' 'limits = .*prefer'
check "doctor: no cpu controller" doctor_says 'cgroup cpu' warning limits.cpu 'cgroup_disable=cpu'
check "doctor: no pressure stall information" doctor_says 'pressure' warning 'psi=1'
check "doctor: no way out" doctor_says egress warning CONFIG_NF_TABLES
check "no memory controller: refuses to start" refuses 'limits.memory' 'cgroup_enable=memory' 'limits = .*prefer'
configure node 'limits = "prefer"'
check "doctor: no memory controller, but preferred" doctor_says 'cgroup memory' warning 'whole machine'
check "no overlayfs: refuses to start" refuses overlayfs CONFIG_OVERLAY_FS
check "overlayfs is a module away" overlay_appears
check "doctor: no user namespaces" no_user_namespaces
check "no user namespaces: refuses to start" refuses 'max_user_namespaces' 'user_namespaces = .*prefer'
configure node 'user_namespaces = "prefer"'
check "doctor: no user namespaces, but preferred" doctor_says 'user namespaces' warning 'max_user_namespaces'
check "with all that preferred, it starts" start_daemon || exit
check "image import" imports
check "deploy" neap deploy /functions
check "invoke echoes its data" echoes
check "what is missing is told, what is there still confines" runs_without
check "the pids limit holds" forks_end
check "user namespaces are used when they are back" has_ids_of_its_own
# The machine thrashes before it kills; slowly, where it is emulated beside other work.
step_seconds=200
check "a machine without memory loses the function, not the daemon" machine_without_memory
check "SIGTERM stops it cleanly" stop_daemon
