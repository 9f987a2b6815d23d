#!/usr/bin/env python3
"""make bench-buffer: what a node takes, keeps and passes on, against this disk and against mosquitto.

Parts, all of them unless --only names some:

  accept   1 KiB over QoS 1 through mosquitto until neap has committed them, by one publisher with
           20 in flight and by 64 of them, against this disk's append and fdatasync of 1 KiB
  drain    the backlog to a broker with receive_max 20, against `mosquitto_pub -l -q 1` to the same
           broker; the time from CONNACK to the first PUBLISH with the backlog waiting; the bytes
           written to the disk for each event of 256 bytes, from accept to delete
  memory   the daemon's memory (PSS) with a tenth of --waiting events and with all of them, which
           come from a broker that does nothing else; what came within --seconds is measured
  bridge   neap beside a mosquitto bridge with persistence: QoS 1 messages come while the link to the
           cloud is down, the side on site is killed by SIGKILL and started again, the link comes
           back. Lost, twice, drained, bytes to the disk for each message. The bridge once as it
           comes (it saves every half hour) and once with autosave_interval 1

Ratios hold on any machine; on a busy one nothing does. Ends with 1 when a target is missed.
"""

import argparse
import os
import signal
import sys
import time

from gateway import (
    BASE, Feeder, Greeter, Mosquitto, Neap, clean, end_on_signals, memory_kb, publish, start, stop, wait, written,
)

verdicts = []


def verdict(what, value, holds, target):
    verdicts.append(holds)
    print(f"  {'holds ' if holds else 'MISSED'}  {what}: {value} (target {target})", flush=True)


def said(text):
    print(text, flush=True)


def appends_per_second(seconds=2.0):
    """Of this disk: 1 KiB appended, then fdatasync."""
    file = os.open(BASE / "append", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    block, count, begun = b"x" * 1024, 0, time.monotonic()
    while time.monotonic() - begun < seconds:
        os.write(file, block)
        os.fdatasync(file)
        count += 1
    os.close(file)
    return count / (time.monotonic() - begun)


def accept(arguments):
    count = arguments.messages
    site = Mosquitto("accept-site", inflight=0)
    node = Neap(arguments.neap, "accept", site, 1)
    one = disk = many = 0.0
    # The disk's own rate before and after: others may use it too.
    disk = appends_per_second()
    owed = 0
    for publishers in (1, 64):
        begun = time.monotonic()
        publish(site, "in/a", count, 1024, publishers)
        owed += count
        rate = count / (node.wait_owed(owed) - begun)
        one, many = (rate, many) if publishers == 1 else (one, rate)
    disk = (disk + appends_per_second()) / 2
    said(f"accept: {count} of 1 KiB each time; append + fdatasync {disk:.0f}/s")
    verdict("one publisher, 20 in flight", f"{one:.0f}/s = {one / disk:.2f} x", one >= disk, ">= 1 x")
    verdict("64 publishers", f"{many:.0f}/s = {many / disk:.2f} x", many >= 3 * disk, ">= 3 x")
    stop(node.child, signal.SIGTERM)
    stop(site.child, signal.SIGTERM)


def drain(arguments):
    count, size = 5 * arguments.messages // 2, 256
    site = Mosquitto("drain-site", inflight=0)
    greeter = Greeter(0)
    cloud_port = greeter.listener.getsockname()[1]
    greeter.close()  # nothing listens there: the link is down
    node = Neap(arguments.neap, "drain", site, cloud_port)
    before = written(node.child)
    publish(site, "in/a", count, size, 8)
    node.wait_owed(count)
    greeter = Greeter(cloud_port)
    first = greeter.first_publish()
    greeter.close()
    cloud = Mosquitto("drain-cloud", inflight=20, number=cloud_port)
    wait("the uplink is up", lambda: node.link("uplink") == "up" or node.owed() < count, 60, 0.005)
    begun, already = time.monotonic(), count - node.owed()
    rate = (count - already) / (node.wait_owed(0) - begun)
    disk = (written(node.child) - before) / count
    peer = count / publish(cloud, "site/in/a", count, size)
    said(f"drain: {count} of {size} bytes; mosquitto_pub {peer:.0f}/s")
    verdict("drained", f"{rate:.0f}/s = {rate / peer:.2f} x", rate >= 0.4 * peer, ">= 0.4 x")
    verdict("first PUBLISH after CONNACK", f"{first * 1000:.1f} ms", first < 1, "< 1 s")
    verdict("to disk for each", f"{disk:.0f} B", disk <= 4096, "<= 4096 B")
    stop(node.child, signal.SIGTERM)
    stop(site.child, signal.SIGTERM)
    stop(cloud.child, signal.SIGTERM)


def memory(arguments):
    size = 64
    feeder = Feeder("in/a", size)
    node = Neap(arguments.neap, "memory", feeder, 1, 'max_bytes = "4GiB"')
    few, begun = feeder.publish(arguments.waiting // 10), time.monotonic()
    node.wait_owed(few)
    before = memory_kb(node.child)
    many = feeder.publish(arguments.waiting - few, arguments.seconds)
    took = time.monotonic() - begun
    node.wait_owed(many)
    after = memory_kb(node.child)
    said(f"memory: {few} of {size} bytes waiting {before} kB, {many} waiting {after} kB; filled in {took:.0f} s")
    verdict("while they wait", f"{after - before:+} kB", abs(after - before) <= 2048, "+-2048 kB")
    verdict("so many wait", f"{many}", many >= arguments.waiting, f">= {arguments.waiting}")
    stop(node.child, signal.SIGTERM)


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

    def drained(self, count, quiet=10.0):
        """Until all came, or nothing for a while."""
        last, since = -1, time.monotonic()
        while time.monotonic() - since < quiet:
            size = self.log.stat().st_size
            if size != last:
                last, since = size, time.monotonic()
            elif len({n for _, n in self.received()}) == count:
                break
            time.sleep(0.5)

    def report(self, name, count, disk):
        rows = self.received()
        distinct = {n for _, n in rows}
        lost, twice = count - len(distinct), len(rows) - len(distinct)
        span = max(t for t, _ in rows) - min(t for t, _ in rows) if rows else 0
        rate = len(rows) / max(span, 0.001)
        said(
            f"  {name:22} lost {lost}, twice {twice}, drained {rate:.0f}/s, {disk / count:.0f} B to disk each"
        )
        return lost


def bridge(arguments):
    count, size = arguments.messages, 256
    said(f"bridge: {count} of {size} bytes, the side on site killed while the link is down")
    cloud, site = Cloud("cloud-neap"), Mosquitto("site-neap")
    cloud.listen()
    node = Neap(arguments.neap, "neap", site, cloud.broker.port)
    wait("the uplink is up", lambda: node.link("uplink") == "up")
    cloud.down()
    before = written(node.child)
    publish(site, "in/a", count, size)
    node.wait_owed(count)
    disk = written(node.child) - before
    stop(node.child)
    node.up()
    before = written(node.child)
    cloud.up()
    cloud.drained(count)
    node.wait_owed(0)
    lost = cloud.report("neap", count, disk + written(node.child) - before)
    stop(node.child, signal.SIGTERM)
    for name, autosave in (("mosquitto bridge", []), ("the same, autosave 1 s", ["autosave_interval 1"])):
        peer(name, autosave, count, size)
    verdict("neap lost", lost, lost == 0, "0")


def peer(name, autosave, count, size):
    key = f"bridge{len(autosave)}"
    cloud = Cloud(f"cloud-{key}")
    cloud.listen()
    # A setting of the broker, which must not stand below the bridge.
    site = Mosquitto(f"site-{key}", autosave + [
        "connection cloud", f"address 127.0.0.1:{cloud.broker.port}", "topic # out 1 in/ site/in/",
        "cleansession false", "bridge_protocol_version mqttv311", "restart_timeout 1", "notifications false",
    ])
    time.sleep(3)
    cloud.down()
    time.sleep(1)
    before = written(site.child)
    publish(site, "in/a", count, size)
    time.sleep(3)
    disk = written(site.child) - before
    stop(site.child)
    site.up()
    before = written(site.child)
    cloud.up()
    cloud.drained(count)
    cloud.report(name, count, disk + written(site.child) - before)
    stop(site.child)
    cloud.down()


PARTS = {"accept": accept, "drain": drain, "memory": memory, "bridge": bridge}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("neap", type=os.path.abspath, help="the binary to measure")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--messages", type=int, default=20_000, help="of each figure (default: %(default)s)")
    parser.add_argument("--waiting", type=int, default=1_000_000, help="of the memory part (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=300, help="for filling it (default: %(default)s)")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    for unknown in set(wanted) - set(PARTS):
        parser.error(f"no such part: {unknown} (there are {', '.join(PARTS)})")
    load, begun = os.getloadavg()[0], time.monotonic()
    said(f"load before: {load:.1f}")
    for name in wanted:
        PARTS[name](arguments)
    missed = verdicts.count(False)
    said(f"{len(verdicts) - missed} of {len(verdicts)} targets hold; {time.monotonic() - begun:.0f} s")
    return 1 if missed else 0


end_on_signals()
try:
    code = main()
finally:
    clean()
sys.exit(code)
