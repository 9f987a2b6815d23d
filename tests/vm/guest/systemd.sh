#!/bin/busybox sh
# In the guest `systemd`: Debian 12 with its own systemd, which starts this. neap's package is
# installed, upgraded and removed, and its service does what an operator asks of it. What
# delegation looks like when it is real.
#
# kernel: cgroup_no_v1=all systemd.show_status=0 net.ifnames=0
# root: systemd

. /lib.sh

# What Debian's minbase lacks.
mkdir -p /tmp/busybox && busybox --install -s /tmp/busybox
PATH=$PATH:/usr/sbin:/tmp/busybox
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2

cgroup=/sys/fs/cgroup
unit=$cgroup/system.slice/neap.service
base=system.slice/neap.service/

daemon() { systemctl show --value -p MainPID neap; }
restarts() { systemctl show --value -p NRestarts neap; }
where() { cut -d: -f3 "/proc/$(daemon)/cgroup"; }
active() { systemctl is-active --quiet neap && ready; }
why() { journalctl -q -n 15 -u neap --no-pager; }

# The configuration that lies there stays.
installs() {
    sum=$(md5sum </etc/neap/neap.toml)
    packaged -i --force-confold /neap.deb || return 1
    [ "$(md5sum </etc/neap/neap.toml)" = "$sum" ] && systemctl is-enabled neap && grep '^neap:' /etc/group
    systemctl show -p Type,NotifyAccess,Delegate,WatchdogUSec,Restart,KillMode,OOMPolicy neap
    [ "$(systemctl show --value -p Type neap)" = notify ] && [ "$(systemctl show --value -p Delegate neap)" = yes ] \
        && [ "$(systemctl show --value -p WatchdogUSec neap)" = 1min ]
}
# By its path, for busybox has a dpkg of its own.
packaged() { DEBIAN_FRONTEND=noninteractive /usr/bin/dpkg "$@"; }
starts() {
    within 80 active || {
        why
        return 1
    }
    echo "daemon in $(where), root passes on: $(cat $cgroup/cgroup.subtree_control)"
    [ "$(where)" = /system.slice/neap.service/daemon ] || return 1
    [ "$(cat $unit/cgroup.subtree_control)" = "cpu memory pids" ] && [ ! -e $cgroup/neap ]
}
limits() {
    imports && neap deploy /functions && echoes && fails_with oom 'out of memory' || return 1
    neap invoke forks --data x >/dev/null 2>&1
    neap logs forks | grep -qi "can't fork" || return 1
    # OOMPolicy=continue: the kernel's kill of a function is not the service's failure.
    active && [ "$(restarts)" = 0 ]
}
killed() {
    neap invoke sleeper --async --data x || return 1
    within 30 runs sleeper || return 1
    before=$(instance_of sleeper)
    systemctl kill --signal=KILL --kill-whom=main neap
    within 30 restarted 1 && within 80 active && [ ! -e "$before" ] && echoes || {
        why
        return 1
    }
}
restarted() { [ "$(restarts)" -ge "$1" ]; }
reloads() { systemctl reload neap && active && echoes; }
restarts_by_hand() {
    before=$(daemon)
    systemctl restart neap && within 80 active && [ "$(daemon)" != "$before" ] && echoes || {
        why
        return 1
    }
}
hangs() {
    drop_in 'WatchdogSec=6s'
    systemctl restart neap && within 60 active || {
        why
        return 1
    }
    # Fed, it stays; stopped, nobody feeds it.
    before=$(daemon) past=$(($(restarts) + 1))
    sleep 13
    [ "$(daemon)" = "$before" ] || return 1
    kill -STOP "$before"
    within 60 restarted $past && within 60 active && echoes || {
        why
        return 1
    }
    rm -r /run/systemd/system/neap.service.d && systemctl daemon-reload && systemctl restart neap && within 60 active
}
# By the same package once more, as by a newer one: what runs is let finish, its caller gets its answer.
upgrades() {
    before=$(daemon)
    neap invoke once --data drained >/tmp/drained 2>&1 &
    invoke=$!
    within 60 runs once && packaged -i --force-confold /neap.deb && wait $invoke || {
        cat /tmp/drained
        why
        return 1
    }
    cat /tmp/drained
    [ "$(cat /tmp/drained)" = drained ] && within 80 active && [ "$(daemon)" != "$before" ] && [ ! -e "/proc/$before" ] && echoes
}
# Data and configuration stay.
goes() {
    packaged -r neap || return 1
    within 60 test ! -e $unit && [ ! -e /usr/bin/neap ] && [ -e /var/lib/neap/neap.db ] && [ -e /etc/neap/neap.toml ]
}

stops() {
    systemctl stop neap || return 1
    systemctl show -p Result,ExecMainStatus neap
    [ "$(systemctl show --value -p Result neap)" = success ] && [ ! -e $unit ]
}

drop_in() {
    mkdir -p /run/systemd/system/neap.service.d
    printf '[Service]\n%s\n' "$1" >/run/systemd/system/neap.service.d/test.conf
    systemctl daemon-reload
}
unit_with_a_limit() {
    # The whole unit has less than a function asks for: its end is told, the service goes on.
    drop_in 'MemoryMax=100M
MemorySwapMax=0'
    systemctl start neap && within 80 active || {
        why
        return 1
    }
    echo "unit: $(cat $unit/memory.max), daemon uses $(cat $unit/daemon/memory.current)"
    output=$(neap invoke big --data x 2>&1) && return 1
    echo "$output"
    # Not "at its limit", which is three times as much.
    echo "$output" | grep -q 'signal 9' && why | grep "not its own memory" || return 1
    active && [ "$(restarts)" = 0 ] && [ "$(cat $unit/neap/*/memory.max 2>/dev/null | head -1)" = max ] && within 30 echoes
}

say "guest: $(uname -rm), $(systemctl --version | head -1), $(cat $cgroup/cgroup.controllers)"
check "the package is installed" installs || exit
check "the service starts, the daemon in a leaf of its unit" starts || exit
check "doctor finds nothing failing" neap doctor
check "limits hold, and a function out of memory is not the service" limits
check "killed, it is restarted, and what it left is swept" killed
check "it reloads" reloads
check "it restarts" restarts_by_hand
check "one that hangs is replaced by the watchdog" hangs
check "the package is upgraded, a call in flight is answered" upgrades
check "it stops, its cgroup is gone" stops
check "a unit with a limit of its own loses the function, not the daemon" unit_with_a_limit
check "the package is removed, data and configuration stay" goes
