#!/usr/bin/env python3
"""make bench-buffer: neap's uplink beside a mosquitto bridge with persistence.

The same messages, QoS 1, to a broker on site, each a number and padding. The link to the cloud is
down while they come; then the side on site is killed with SIGKILL and started again; then the link
comes back. Counted: what the sender had acknowledged and the cloud never got, what it got twice,
how fast the backlog drained, and the bytes that the side on site wrote to the disk for each message.

  neap     mosquitto_pub -> mosquitto (persistent) -> neap [[forward]] -> cloud
           neap is killed; the messages have all reached it
  bridge   mosquitto_pub -> mosquitto (persistent) -> bridge -> cloud; that mosquitto is killed.
           Once as it comes (it saves every half hour), once with autosave_interval 1

The cloud is one more mosquitto, which a subscriber of QoS 1 listens to; down means stopped.

  buffer.py NEAP [MESSAGES]
"""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

NEAP = os.path.abspath(sys.argv[1])
MESSAGES = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
BYTES = 256
QUIET = 10.0
BASE = pathlib.Path(tempfile.mkdtemp(prefix="neap-bench-", dir=os.environ.get("CARGO_TARGET_TMPDIR")))
children = []


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*command, **more):
    child = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)], **more)
    children.append(child)
    return child


def stop(child, how=signal.SIGKILL):
    child.send_signal(how)
    child.wait()


def wait(what, condition, limit=120):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {limit} s for: {what}")
        time.sleep(0.02)


def accepts(number):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) == 0


def written(*children):
    """Bytes handed to the block layer, the page cache's share included (proc(5), io)."""
    total = 0
    for child in children:
        for line in open(f"/proc/{child.pid}/io"):
            if line.startswith("write_bytes"):
                total += int(line.split()[1])
    return total


class Mosquitto:
    def __init__(self, name, lines=()):
        self.dir = BASE / name
        self.dir.mkdir()
        self.port = port()
        self.config = self.dir / "conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {self.dir}/\nmax_queued_messages 0\nmax_inflight_messages 20\n"
            "user root\nlog_type error\n" + "\n".join(lines) + "\n"
        )
        self.up()

    def up(self):
        self.child = start("mosquitto", "-c", self.config, stderr=subprocess.DEVNULL)
        wait("mosquitto listens", lambda: accepts(self.port))


class Cloud:
    """A broker and a subscriber that writes down what comes, each with its time."""

    def __init__(self, name):
        self.broker = Mosquitto(name)
        self.log = self.broker.dir / "received"

    def up(self):
        self.broker.up()
        self.listen()

    def listen(self):
        out = open(self.log, "ab", buffering=0)
        self.subscriber = start(
            "mosquitto_sub", "-h", "127.0.0.1", "-p", self.broker.port, "-q", 1, "-t", "site/#",
            "-i", "bench", "-c", "-F", "%U %p", stdout=out,
        )
        time.sleep(0.5)

    def down(self):
        stop(self.subscriber)
        stop(self.broker.child, signal.SIGTERM)

    def received(self):
        rows = []
        for line in self.log.read_text(errors="replace").splitlines():
            parts = line.split(" ", 2)
            if len(parts) == 3:
                rows.append((float(parts[0]), int(parts[1])))
        return rows


def publish(to, topic):
    lines = "".join(f"{n:06d} ".ljust(BYTES, "x") + "\n" for n in range(MESSAGES))
    done = subprocess.run(
        ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(to.port), "-q", "1", "-t", topic, "-l"],
        input=lines.encode(),
    )
    assert done.returncode == 0


def drain(cloud):
    """Until nothing came for a while; when the link came up."""
    up = time.time()
    last, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET:
        count = cloud.log.stat().st_size
        if count != last:
            last, since = count, time.monotonic()
        if len({n for _, n in cloud.received()}) == MESSAGES:
            time.sleep(1)
            break
        time.sleep(0.2)
    return up


def report(name, cloud, up, disk):
    rows = cloud.received()
    distinct = {n for _, n in rows}
    lost, twice = MESSAGES - len(distinct), len(rows) - len(distinct)
    first, last = (min(t for t, _ in rows), max(t for t, _ in rows)) if rows else (up, up)
    rate = len(rows) / max(last - first, 0.001)
    print(
        f"{name:9} {MESSAGES} messages of {BYTES} B: lost {lost}, twice {twice}, drained {rate:.0f}/s, "
        f"{disk / MESSAGES:.0f} B to disk per message",
        flush=True,
    )
    return lost


def bench_neap():
    cloud = Cloud("cloud-neap")
    site = Mosquitto("site-neap")
    http, dir = port(), BASE / "neap"
    dir.mkdir()
    (dir / "neap.toml").write_text(
        f'[node]\nid = "bench"\ndata_dir = "{dir}/data"\nrun_dir = "{dir}/run"\n'
        f'functions_dir = "{dir}/functions.d"\ncgroup = "neap-bench-{os.getpid()}"\n'
        f'[http]\nlisten = "127.0.0.1:{http}"\n'
        f'[mqtt]\nurl = "mqtt://127.0.0.1:{site.port}"\n[uplink]\nurl = "mqtt://127.0.0.1:{cloud.broker.port}"\n'
        '[[forward]]\nmqtt = "in/#"\ntopic = "site/{topic}"\n[buffer]\norder = "fifo"\n'
    )
    (dir / "functions.d").mkdir()
    log = open(dir / "log", "ab")
    daemon = lambda: start(NEAP, "daemon", "--config", dir / "neap.toml", stdout=log, stderr=log)

    def status():
        out = subprocess.run([NEAP, "status", "--socket", f"{dir}/run/neap.sock", "--output", "json"], capture_output=True)
        return json.loads(out.stdout) if out.returncode == 0 else None

    def link(name, state):
        found = status() or {"links": []}
        return any(l["name"] == name and l["state"] == state for l in found["links"])

    cloud.listen()
    node = daemon()
    wait("neap is up", lambda: link("mqtt", "up") and link("uplink", "up"))
    time.sleep(1)
    cloud.down()
    before = written(node)
    publish(site, "in/a")
    wait("neap has them", lambda: (status() or {"outbox": {"depth": 0}})["outbox"]["depth"] >= MESSAGES)
    disk = written(node) - before
    stop(node)
    node = daemon()
    wait("neap is up again", lambda: link("mqtt", "up"))
    before = written(node)
    cloud.up()
    up = drain(cloud)
    disk += written(node) - before
    lost = report("neap", cloud, up, disk)
    stop(node, signal.SIGTERM)
    return lost


def bench_bridge(name, autosave):
    cloud = Cloud(f"cloud-{name}")
    bridge = [
        "connection cloud", f"address 127.0.0.1:{cloud.broker.port}", "topic # out 1 in/ site/in/",
        "cleansession false", "bridge_protocol_version mqttv311", "restart_timeout 1", "notifications false",
    ]
    # A setting of the broker, which must not stand below the bridge.
    bridge = ([f"autosave_interval {autosave}"] if autosave else []) + bridge
    cloud.listen()
    site = Mosquitto(f"site-{name}", bridge)
    time.sleep(3)
    cloud.down()
    time.sleep(1)
    before = written(site.child)
    publish(site, "in/a")
    time.sleep(3)
    disk = written(site.child) - before
    stop(site.child)
    site.up()
    before = written(site.child)
    cloud.up()
    up = drain(cloud)
    disk += written(site.child) - before
    report(name, cloud, up, disk)
    stop(site.child)


try:
    lost = bench_neap()
    bench_bridge("bridge", 0)
    bench_bridge("bridge-1s", 1)
finally:
    for child in children:
        if child.poll() is None:
            child.kill()
    shutil.rmtree(BASE, ignore_errors=True)
sys.exit(1 if lost else 0)
