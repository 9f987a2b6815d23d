#!/usr/bin/env python3
"""make bench-http: calls through neap beside calls to the same server.

One server (probe.rs) is the function and, started by hand on this machine, what is called directly;
one client calls both, each over a connection of its own that is kept alive. Each round measures
every row once, so that a neighbour that makes the machine slow makes all of them slow.

  warm     a call's median through neap less the direct one: <= 0.3 ms
  thaw     the same after a pause in which the instance was frozen, less warm: <= 0.5 ms
  cold     from no instance to the first answer, to `crun run` of the same image until the server
           answers: <= 1.2 x
  load     answers a second of 32 callers, to those of 32 direct ones: >= 0.5 x

  run.py NEAP [ROUNDS]

Runs as root; ends within five minutes. Prints figures and what holds; fails by nothing but
errors.
"""

import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

# crun refuses hybrid cgroups: hidden from this run, the v2 mount makes them plain v1.
if os.path.isdir("/sys/fs/cgroup/unified") and "NEAP_BENCH_HIDDEN" not in os.environ:
    os.environ["NEAP_BENCH_HIDDEN"] = "1"
    hide = 'umount /sys/fs/cgroup/unified; exec "$@"'
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "bench", sys.executable, *sys.argv])

HERE = pathlib.Path(__file__).resolve().parent
NEAP = os.path.abspath(sys.argv[1])
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 8
WARM, THAW, COLD, LOAD_SECONDS, CALLERS = 1000, 10, 3, 3, 32
BASE = pathlib.Path(tempfile.mkdtemp(prefix="neap-bench-", dir=os.environ.get("CARGO_TARGET_TMPDIR")))
children = []


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*command, **more):
    child = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *map(str, command)], **more)
    children.append(child)
    return child


def run(*command, **more):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, **more).stdout


def wait(what, condition, limit=60):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {limit} s for: {what}")
        time.sleep(0.01)


def answers(port, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5).status == 200
    except OSError:
        return False


class Node:
    def __init__(self):
        self.port = free_port()
        self.socket = BASE / "run/neap.sock"
        config = BASE / "neap.toml"
        config.write_text(
            f'[node]\nid = "bench"\ndata_dir = "{BASE}/data"\nrun_dir = "{BASE}/run"\n'
            f'functions_dir = "{BASE}/functions.d"\ncgroup = "neap-bench-{os.getpid()}"\n'
            f'[http]\nlisten = "127.0.0.1:{self.port}"\n'
        )
        (BASE / "functions.d").mkdir()
        self.child = start(NEAP, "daemon", "--config", config, stderr=open(BASE / "stderr", "wb"))
        wait("neap is ready", lambda: answers(self.port, "/readyz") and self.socket.exists())

    def neap(self, *words):
        return run(NEAP, "--socket", self.socket, *words)

    def deploy(self, name, scale):
        file = BASE / f"{name}.toml"
        file.write_text(
            f'name = "{name}"\nimage = "probe:1"\nhandler = "http"\n{scale}\n[limits]\ncpu = 4\nmemory = "64MiB"\npids = 256\n'
        )
        self.neap("deploy", file)

    def instances(self):
        return json.loads(self.neap("status", "--output", "json"))["instances"]


def image(probe):
    root = BASE / "root"
    root.mkdir()
    shutil.copy(probe, root / "probe")
    run("tar", "--owner=0", "--group=0", "--numeric-owner", "-C", root, "-cf", BASE / "layer.tar", ".")
    layout = BASE / "layout"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", f"{layout}:1")
    run("umoci", "raw", "add-layer", "--image", f"{layout}:1", BASE / "layer.tar")
    run("umoci", "config", "--image", f"{layout}:1", "--config.entrypoint", "/probe", "--config.cmd", "serve")
    index = layout / "index.json"
    index.write_text(index.read_text().replace('ref.name":"1"', 'ref.name":"probe:1"'))
    run("tar", "-C", layout, "-cf", BASE / "probe.tar", ".")
    return BASE / "probe.tar"


class Crun:
    """The same image, with the machine's own network so that its port can be reached."""

    def __init__(self, probe):
        self.bundle = BASE / "bundle"
        (self.bundle / "rootfs").mkdir(parents=True)
        shutil.copy(probe, self.bundle / "rootfs/probe")
        self.port = free_port()
        run("crun", "spec", cwd=self.bundle)
        spec = json.loads((self.bundle / "config.json").read_text())
        spec["process"].update(terminal=False, args=["/probe", "serve"], env=[f"PORT={self.port}"])
        spec["linux"]["namespaces"] = [n for n in spec["linux"]["namespaces"] if n["type"] != "network"]
        spec["linux"]["resources"] = {"memory": {"limit": 64 << 20}, "pids": {"limit": 256}}
        (self.bundle / "config.json").write_text(json.dumps(spec))

    def start(self, probe):
        name = f"bench-{os.getpid()}"
        begun = time.monotonic_ns()
        command = ["crun", "run", "--bundle", self.bundle, name]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            return until(probe, self.port, "/", begun)
        finally:
            # The server may answer before crun has written down that it runs.
            delete = ["crun", "delete", "--force", name]
            wait("crun's container is gone", lambda: subprocess.run(delete, capture_output=True).returncode == 0)
            child.wait(20)


def until(probe, port, path, begun):
    """From `begun` to the first answer. The client's own start is in both rows."""
    run(probe, "until", port, path)
    return time.monotonic_ns() - begun


def calls(probe, port, path, count, pause_ms):
    return [int(line) for line in run(probe, "calls", port, path, count, pause_ms).split()]


def load(probe, port, path):
    rate, failed = map(int, run(probe, "load", port, path, CALLERS, LOAD_SECONDS).split())
    if failed:
        print(f"  {failed} calls failed")
    return rate


def main():
    if not shutil.which("crun"):
        print("bench-http: crun is not installed: no row `cold` (apt-get install crun)")
    probe = BASE / "probe"
    run("rustc", "--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o", probe, HERE / "probe.rs")
    crun = Crun(probe) if shutil.which("crun") else None
    direct = free_port()
    start(probe, "serve", env={"PORT": str(direct)})
    node = Node()
    node.neap("image", "import", image(probe))
    node.deploy("warm", '[scale]\nmax = 1\nidle = "10m"')
    node.deploy("load", f'[scale]\nmax = 1\nconcurrency = {CALLERS}\nidle = "10m"')
    node.deploy("cold", '[scale]\nmax = 1\nidle = "100ms"')
    wait("the server answers", lambda: answers(direct, "/"))
    for name in ["warm", "load"]:
        wait(f"{name} answers", lambda: answers(node.port, f"/function/{name}"))

    rows = {"direct": [], "neap": [], "direct paused": [], "neap paused": [], "crun": [], "cold": []}
    rates = {"direct": [], "neap": []}
    print(f"bench-http: {ROUNDS} rounds")
    for _ in range(ROUNDS):
        rows["direct"] += calls(probe, direct, "/", WARM, 0)
        rows["neap"] += calls(probe, node.port, "/function/warm", WARM, 0)
        # Longer than FREEZE_AFTER (100 ms).
        rows["direct paused"] += calls(probe, direct, "/", THAW, 250)
        rows["neap paused"] += calls(probe, node.port, "/function/warm", THAW, 250)
        for _ in range(COLD if crun else 0):
            rows["crun"].append(crun.start(probe))
            wait("no instance of `cold`", lambda: node.instances() <= 2)
            rows["cold"].append(until(probe, node.port, "/function/cold", time.monotonic_ns()))
        rates["direct"].append(load(probe, direct, "/"))
        rates["neap"].append(load(probe, node.port, "/function/load"))

    ms = lambda name: statistics.median(rows[name]) / 1e6
    p99 = lambda name: sorted(rows[name])[len(rows[name]) * 99 // 100] / 1e6
    for name in rows:
        if rows[name]:
            print(f"  {name:14} p50 {ms(name):8.3f} ms   p99 {p99(name):8.3f} ms   n {len(rows[name])}")
    for name in rates:
        print(f"  32 callers, {name:6} {statistics.median(rates[name]):8.0f} answers/s")
    warm = ms("neap") - ms("direct")
    thaw = ms("neap paused") - ms("direct paused") - warm
    share = statistics.median(rates["neap"]) / statistics.median(rates["direct"])
    targets = [
        ("warm call adds", warm, "ms", "<=", 0.3),
        ("thaw adds", thaw, "ms", "<=", 0.5),
        ("32 callers, of the direct rate", share, "x", ">=", 0.5),
    ]
    if crun:
        targets.append(("0 to first answer, to crun's", ms("cold") / ms("crun"), "x", "<=", 1.2))
    for what, value, unit, sign, target in targets:
        holds = value <= target if sign == "<=" else value >= target
        print(f"{'holds ' if holds else 'MISSED'}  {what}: {value:.3f} {unit} (target {sign} {target} {unit})")


try:
    main()
finally:
    for child in reversed(children):
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
    shutil.rmtree(BASE, ignore_errors=True)
