"""What make bench-buffer and bench-http run: brokers, neap, publishers, each a process that ends with this one."""

import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

BASE = pathlib.Path(tempfile.mkdtemp(prefix="neap-bench-", dir=os.environ.get("CARGO_TARGET_TMPDIR")))
children = []


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*command, orphaned="KILL", **more):
    """`orphaned`: the signal it gets when this process ends without having ended it."""
    child = subprocess.Popen(["setpriv", "--pdeathsig", orphaned, "--", *map(str, command)], **more)
    children.append(child)
    return child


def end_on_signals():
    """What would end this process at once raises instead, so that `finally` is kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def clean(gently=False):
    """Ends what runs. `gently`: SIGTERM first, for those with containers to end."""
    for child in reversed(children):
        if child.poll() is None and gently:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                pass
        if child.poll() is None:
            child.kill()
            child.wait()
    shutil.rmtree(BASE, ignore_errors=True)


def stop(child, how=signal.SIGKILL):
    child.send_signal(how)
    child.wait()


def wait(what, condition, limit=180, every=0.02):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {limit} s for: {what}")
        time.sleep(every)


def accepts(number):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) == 0


def written(child):
    """Bytes handed to the block layer, the page cache's share included (proc(5), io)."""
    for line in open(f"/proc/{child.pid}/io"):
        if line.startswith("write_bytes"):
            return int(line.split()[1])
    return 0


def memory_kb(child):
    for line in open(f"/proc/{child.pid}/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


class Mosquitto:
    """`inflight`: what it sends to each unacknowledged, and what it lets each send (receive_max)."""

    def __init__(self, name, lines=(), inflight=20, number=None):
        self.dir = BASE / name
        self.dir.mkdir()
        self.port = number or port()
        self.config = self.dir / "conf"
        self.config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {self.dir}/\nmax_queued_messages 0\nmax_inflight_messages {inflight}\n"
            "user root\nlog_type error\nset_tcp_nodelay true\n" + "\n".join(lines) + "\n"
        )
        self.up()

    def up(self):
        self.child = start("mosquitto", "-c", self.config, stderr=subprocess.DEVNULL)
        wait("mosquitto listens", lambda: accepts(self.port))


class Neap:
    """A node with one forward, `in/#` to `site/…`, and an uplink."""

    def __init__(self, binary, name, site, cloud_port, buffer=""):
        self.binary, self.dir, self.http = binary, BASE / name, port()
        self.dir.mkdir()
        (self.dir / "functions.d").mkdir()
        (self.dir / "neap.toml").write_text(
            f'[node]\nid = "bench"\ndata_dir = "{self.dir}/data"\nrun_dir = "{self.dir}/run"\n'
            f'functions_dir = "{self.dir}/functions.d"\ncgroup = "neap-bench-{os.getpid()}-{name}"\n'
            f'[http]\nlisten = "127.0.0.1:{self.http}"\n'
            f'[mqtt]\nurl = "mqtt://127.0.0.1:{site.port}"\n'
            f'[uplink]\nurl = "mqtt://127.0.0.1:{cloud_port}"\n'
            f'[[forward]]\nmqtt = "in/#"\ntopic = "site/{{topic}}"\n[buffer]\norder = "fifo"\n{buffer}\n'
        )
        self.up()

    def up(self):
        log = open(self.dir / "log", "ab")
        self.child = start(
            self.binary, "daemon", "--config", self.dir / "neap.toml", stdout=log, stderr=log
        )
        wait(f"neap is up ({self.dir}/log)", lambda: self.link("mqtt") == "up")
        time.sleep(1)  # the subscription

    def status(self):
        try:
            with socket.socket(socket.AF_UNIX) as unix:
                unix.settimeout(30)
                unix.connect(f"{self.dir}/run/neap.sock")
                unix.sendall(b"GET /v1/status HTTP/1.1\r\nhost: neap\r\nconnection: close\r\n\r\n")
                answer = http.client.HTTPResponse(unix)
                answer.begin()
                return json.loads(answer.read())
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def link(self, name):
        found = self.status() or {"links": []}
        return next((link["state"] for link in found["links"] if link["name"] == name), None)

    def owed(self):
        found = self.status()
        return found["outbox"]["depth"] if found else -1

    def wait_owed(self, count, limit=300):
        """The moment at which so many were owed; seen every 10 ms."""
        wait(f"neap owes {count} ({self.owed()})", lambda: self.owed() == count, limit, 0.01)
        return time.monotonic()


def lines(numbers, size):
    return "".join(f"{n:07d} ".ljust(size, "x") + "\n" for n in numbers).encode()


def publisher(to, topic, file):
    """mosquitto_pub: QoS 1, 20 in flight."""
    return start(
        "mosquitto_pub", "-h", "127.0.0.1", "-p", to.port, "-V", 5, "-q", 1, "-t", topic, "-l",
        stdin=open(file, "rb"),
    )


def publish(to, topic, count, size, publishers=1):
    """Returns when all are acknowledged; how long it took."""
    files = []
    for which in range(publishers):
        file = BASE / f"lines-{which}"
        file.write_bytes(lines(range(which, count, publishers), size))
        files.append(file)
    begun = time.monotonic()
    running = [publisher(to, topic, file) for file in files]
    codes = [child.wait() for child in running]
    assert not any(codes), f"mosquitto_pub failed: {codes}"
    return time.monotonic() - begun


class Feeder:
    """A broker on site whose clients publish as fast as neap takes it: MQTT 5, QoS 1, two batches
    unacknowledged. Beside mosquitto and its publishers a million would take minutes."""

    BATCH = 128

    def __init__(self, topic, size):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        head = len(topic).to_bytes(2, "big") + topic.encode()
        prefix = bytes([0x32, len(head) + 3 + size]) + head  # below 128: one byte
        packets = [prefix + (n + 1).to_bytes(2, "big") + b"\0" + b"x" * size for n in range(2 * self.BATCH)]
        self.batches = [b"".join(packets[: self.BATCH]), b"".join(packets[self.BATCH :])]
        self.wanted = self.sent = self.acknowledged = 0
        self.subscribed = False
        threading.Thread(target=self.serve, daemon=True).start()

    def publish(self, count, limit=300):
        """Rounded up to whole batches. How many are acknowledged, of all, when the time is over."""
        self.wanted += -(-count // self.BATCH) * self.BATCH
        end = time.monotonic() + limit
        while self.acknowledged < self.wanted and time.monotonic() < end:
            time.sleep(0.05)
        self.wanted = self.sent
        wait("neap has acknowledged what was sent", lambda: self.acknowledged == self.sent)
        return self.acknowledged

    def serve(self):
        while True:
            peer, _ = self.listener.accept()
            with peer:
                try:
                    self.session(peer)
                except OSError:
                    pass

    def session(self, peer):
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.settimeout(0.05)
        rest = b""
        while True:
            while self.subscribed and self.sent < self.wanted and self.sent - self.acknowledged <= self.BATCH:
                peer.sendall(self.batches[self.sent // self.BATCH % 2])
                self.sent += self.BATCH
            try:
                read = peer.recv(65536)
            except TimeoutError:
                continue
            if not read:
                return
            rest = self.answer(peer, rest + read)

    def answer(self, peer, got):
        """What is left: the head of a packet that is still coming."""
        whole = len(got) // 4
        if got[: 4 * whole : 4] == b"\x40" * whole:  # nothing but PUBACKs
            self.acknowledged += whole
            return got[4 * whole :]
        while len(got) >= 2:
            length = at = 0
            while at + 1 < len(got):
                at += 1
                length |= (got[at] & 127) << 7 * (at - 1)
                if got[at] < 128:
                    break
            end = at + 1 + length
            if got[at] > 127 or len(got) < end:
                break
            self.packet(peer, got[0] >> 4, got[at + 1 : end])
            got = got[end:]
        return got

    def packet(self, peer, kind, body):
        if kind == 1:
            peer.sendall(b"\x20\x03\0\0\0")
        elif kind == 4:
            self.acknowledged += 1
        elif kind == 8:
            at, filters = 3 + body[2], 0
            while at < len(body):
                at += 3 + int.from_bytes(body[at : at + 2], "big")
                filters += 1
            peer.sendall(bytes([0x90, 3 + filters]) + body[:2] + b"\0" + b"\1" * filters)
            self.subscribed = True
        elif kind == 12:
            peer.sendall(b"\xd0\0")


class Greeter:
    """A broker that only greets: the time from its CONNACK to the first PUBLISH."""

    def __init__(self, number):
        self.listener = socket.create_server(("127.0.0.1", number))
        self.listener.settimeout(90)

    def first_publish(self):
        while True:
            peer, _ = self.listener.accept()
            try:
                return self.greet(peer)
            except (OSError, EOFError):
                continue
            finally:
                peer.close()

    def greet(self, peer):
        peer.settimeout(30)
        self.packet(peer)
        peer.sendall(b"\x20\x03\x00\x00\x00")
        greeted = time.monotonic()
        while True:
            kind = self.packet(peer)
            if kind == 3:
                return time.monotonic() - greeted

    def packet(self, peer):
        """The kind of the next packet, by its first byte."""
        kind = self.bytes(peer, 1)[0] >> 4
        if kind == 3:
            return kind
        length, shift = 0, 0
        while True:
            byte = self.bytes(peer, 1)[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        self.bytes(peer, length)
        return kind

    def bytes(self, peer, count):
        got = b""
        while len(got) < count:
            more = peer.recv(count - len(got))
            if not more:
                raise EOFError
            got += more
        return got

    def close(self):
        self.listener.close()
