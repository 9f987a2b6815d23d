#!/bin/busybox sh
# pid 1 of the guest `old`: Debian 11's kernel, Linux 5.10, has no mount_setattr (5.12), which
# libcontainer makes every mount with. It is refused with its reason, not at the first event.
#
# kernel: cgroup_no_v1=all
# suite: bullseye

. /lib.sh

no_kill_file() {
    mkdir /sys/fs/cgroup/probe && [ ! -e /sys/fs/cgroup/probe/cgroup.kill ] || return 1
    doctor_says 'cgroup ' ok '5.14' && rmdir /sys/fs/cgroup/probe
}

say "guest: $(uname -rm), $(cat /sys/fs/cgroup/cgroup.controllers)"
check "doctor: the kernel is too old" doctor_says kernel failing 5.10 'Linux 5.12'
check "doctor: no cgroup.kill" no_kill_file
check "refuses to start" refuses mount_setattr 'Linux 5.12'
configure node 'user_namespaces = "prefer"'
check "also without user namespaces" refuses mount_setattr 'Linux 5.12'
