#!/bin/bash
# The part of cross/deb-check.sh inside the minimal Debian: one user's way with the package.
#
#   inside.sh VERSION
set -euo pipefail
version=$1
log=/var/log/neap-check.log

step=
say() {
    step=$*
    echo "   $step"
}
trap '[ $? = 0 ] || { echo "deb-check: failed at: $step" >&2; tail -n 20 $log >&2; }' EXIT
quietly() { "$@" >>$log 2>&1 || { tail -n 20 $log >&2; return 1; }; }

# wait_for SECONDS COMMAND…
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.2
    done
}
# `!` alone would never end the script.
not() { if "$@" >/dev/null 2>&1; then return 1; fi; }
installed() { [ "$(dpkg-query -W -f '${Status} ${Version}' neap 2>/dev/null)" = "install ok installed $1" ]; }
# The daemon that init's pid file names.
daemon_pid() { cat /run/neap.pid; }
runs() { kill -0 "$1" 2>/dev/null; }

# Init has noted that the machine has come up: else Debian's scripts start nothing.
perl -e 'print pack "s x2 i a32 a4 a32 a256 x4 i3 x36", 1, unpack("v", "2N"), "~", "~~", "runlevel", "", 0, time, 0' >/run/utmp

say "install: the group, the socket, a daemon that runs"
quietly dpkg -i /check/neap.deb
installed "$version-1"
getent group neap >/dev/null
wait_for 30 neap status
[ "$(stat -c '%a %U %G' /run/neap/neap.sock)" = "660 root neap" ]
[ "$(stat -c '%a %U %G' /run/neap)" = "750 root neap" ]
[ "$(stat -c '%a %U' /var/lib/neap)" = "700 root" ]
[ -L /etc/systemd/system/multi-user.target.wants/neap.service ]
first=$(daemon_pid)

say "a member of the group uses the command line, others don't"
quietly adduser --quiet --disabled-password --gecos "" inside
quietly adduser --quiet --disabled-password --gecos "" outside
quietly adduser --quiet inside neap
setpriv --reuid inside --regid inside --init-groups neap status >/dev/null
not setpriv --reuid outside --regid outside --init-groups neap status

say "a function in a container"
neap image import /check/shell.tar >/dev/null
[ "$(neap run shell:1 --data 'echo $((6 * 7))' -- sh)" = 42 ]
cat >/etc/neap/functions.d/slow.toml <<'TOML'
name = "slow"
image = "shell:1"
command = ["sh", "-c", "sleep 6; cat"]
TOML
neap reload >/dev/null

say "manual and completions"
[ "$(dpkg -L neap | grep -c '/man1/neap.*\.1\.gz$')" -gt 25 ]
dpkg -L neap | grep -qx /usr/share/bash-completion/completions/neap
dpkg -L neap | grep -qx /usr/share/zsh/vendor-completions/_neap
dpkg -L neap | grep -qx /usr/share/fish/vendor_completions.d/neap.fish

say "upgrade: the old daemon drains, a changed configuration stays"
echo '# changed here' >>/etc/neap/neap.toml
neap invoke slow --data drained --event upgrade-1 >/tmp/answer 2>>$log &
asked=$!
running() { neap status --output json | grep -q '"instances":1,'; }
wait_for 20 running
quietly dpkg --force-confold -i /check/next.deb
installed "$version-2"
# What ran when the upgrade began was let finish, and its caller has the answer.
wait $asked
[ "$(cat /tmp/answer)" = drained ]
wait_for 30 neap status
second=$(daemon_pid)
[ "$first" != "$second" ]
not runs "$first"
runs "$second"
tail -n 1 /etc/neap/neap.toml | grep -qx '# changed here'
neap image ls --output json | grep -q shell

say "the init script: status, restart, a killed daemon"
/etc/init.d/neap status >/dev/null
quietly /etc/init.d/neap restart
third=$(daemon_pid)
[ "$third" != "$second" ]
neap ls --output json | grep -q slow
kill -KILL "$third"
wait_for 10 not runs "$third"
not /etc/init.d/neap status
quietly /etc/init.d/neap start
wait_for 30 neap status

say "remove: the daemon is gone, configuration and data stay"
last=$(daemon_pid)
quietly dpkg -r neap
not runs "$last"
[ ! -e /usr/bin/neap ]
[ -f /etc/neap/neap.toml ]
[ -f /var/lib/neap/neap.db ]

say "purge without an answer keeps the data"
quietly dpkg --purge neap
[ ! -e /etc/neap/neap.toml ]
[ -f /etc/neap/functions.d/slow.toml ]
[ -f /var/lib/neap/neap.db ]
[ ! -e /etc/init.d/neap ]
[ ! -L /etc/systemd/system/multi-user.target.wants/neap.service ]

say "installed again, it goes on with it"
quietly dpkg -i /check/neap.deb
wait_for 30 neap status
neap image ls --output json | grep -q shell

say "purge with neap/purge-data deletes the data"
echo "neap neap/purge-data boolean true" | debconf-set-selections
rm /etc/neap/functions.d/slow.toml
quietly dpkg --purge neap
[ ! -e /var/lib/neap ]
[ ! -e /etc/neap ]
[ ! -e /run/neap ]
[ -z "$(debconf-show neap)" ]
getent group neap >/dev/null
