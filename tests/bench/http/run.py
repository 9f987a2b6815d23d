#!/usr/bin/env python3
"""make bench-http: calls through neap beside calls to the same server.

One server (probe.rs) is the function and, started by hand on this machine, what is called directly;
one client calls both, each over a connection of its own that is kept alive. Each round measures
every row once, so that a neighbour that makes the machine slow makes all of them slow.

  warm     a call's median through neap less the direct one: <= 0.3 ms
  thaw     a call after a pause in which the instance was frozen, less one after a pause in which it was
           not, for it had another call to answer: <= 0.5 ms
  pause    what the pause itself costs beside the direct call after the same one: caches have gone cold
           and processors sleep; a figure without a target
  cold     from no instance to the first answer, to `crun run` of the same image until the server
           answers: <= 1.2 x
  load     answers a second of 32 callers, to those of 32 direct ones: >= 0.5 x; of a server that
           answers at once, and of PyPI's functions-framework with a function that says hello

Beside the last one: nginx as a proxy in front of the same server, where it is installed. What a
proxy written in C for nothing else keeps of the direct rate is about what can be had.

  run.py NEAP [ROUNDS]

Runs as root; ends within five minutes once functions-framework has been downloaded. Prints figures
and what holds; fails by nothing but errors. Interrupted, it leaves nothing behind.
"""

import json
import os
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

# crun refuses hybrid cgroups: hidden from this run, the v2 mount makes them plain v1.
if os.path.isdir("/sys/fs/cgroup/unified") and "NEAP_BENCH_HIDDEN" not in os.environ:
    os.environ["NEAP_BENCH_HIDDEN"] = "1"
    hide = 'umount /sys/fs/cgroup/unified; exec "$@"'
    os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", "sh", "-c", hide, "bench", sys.executable, *sys.argv])

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from gateway import BASE, clean, end_on_signals, port, start, wait  # noqa: E402

NEAP = os.path.abspath(sys.argv[1])
ROUNDS = int(sys.argv[2]) if len(sys.argv) > 2 else 8
WARM, THAW, COLD, LOAD_SECONDS, CALLERS = 1000, 10, 3, 2, 32
FRAMEWORK = "functions-framework==3.9.2", "flask==3.1.2"
HELLO = "def f(request):\n    return 'hello'\n"


def run(*command, **more):
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True, **more).stdout


def answers(number, path):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{number}{path}", timeout=5).status == 200
    except OSError:
        return False


class Node:
    def __init__(self):
        self.port = port()
        self.socket = BASE / "run/neap.sock"
        config = BASE / "neap.toml"
        config.write_text(
            f'[node]\nid = "bench"\ndata_dir = "{BASE}/data"\nrun_dir = "{BASE}/run"\n'
            f'functions_dir = "{BASE}/functions.d"\ncgroup = "neap-bench-{os.getpid()}"\n'
            f'[http]\nlisten = "127.0.0.1:{self.port}"\n'
        )
        (BASE / "functions.d").mkdir()
        # Killed, it would leave frozen instances where cgroups are v1.
        log = open(BASE / "stderr", "wb")
        self.child = start(NEAP, "daemon", "--config", config, orphaned="TERM", stderr=log)
        wait("neap is ready", lambda: answers(self.port, "/readyz") and self.socket.exists())

    def neap(self, *words):
        return run(NEAP, "--socket", self.socket, *words)

    def deploy(self, name, scale, image="probe:1", more="", memory="64MiB"):
        file = BASE / f"{name}.toml"
        file.write_text(
            f'name = "{name}"\nimage = "{image}"\nhandler = "http"\n{more}\n{scale}\n'
            f'[limits]\ncpu = 4\nmemory = "{memory}"\npids = 256\ntimeout = "10m"\n'
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
        self.port = port()
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


def until(probe, number, path, begun):
    """From `begun` to the first answer. The client's own start is in both rows."""
    run(probe, "until", number, path)
    return time.monotonic_ns() - begun


def calls(probe, number, path, count, pause_ms):
    return [int(line) for line in run(probe, "calls", number, path, count, pause_ms).split()]


def load(probe, number, path):
    """Answers a second of CALLERS; failed calls."""
    rate, failed = map(int, run(probe, "load", number, path, CALLERS, LOAD_SECONDS).split())
    if failed:
        print(f"  {failed} calls failed")
    return rate


class Framework:
    """functions-framework: its image for neap, and the same root on this machine."""

    COMMAND = ["/usr/bin/python3", "-m", "functions_framework", "--source=/app/main.py", "--target=f"]

    def __init__(self):
        kept = pathlib.Path(os.environ.get("CARGO_TARGET_TMPDIR", BASE)) / "images"
        kept.mkdir(parents=True, exist_ok=True)
        self.archive = kept / "bench-framework.tar"
        if not self.archive.exists():
            print("bench-http: building an image with functions-framework", flush=True)
            program = BASE / "program/app"
            program.mkdir(parents=True)
            (program / "main.py").write_text(HELLO)
            build = HERE.parents[1] / "images/python/build.sh"
            run(build, self.archive, "framework", *FRAMEWORK, "--", program.parent)
        layout, root = BASE / "framework", BASE / "unpacked"
        layout.mkdir()
        run("tar", "-C", layout, "-xf", self.archive)
        run("umoci", "unpack", "--image", f"{layout}:framework:1", root)
        self.port = port()
        environment = {"PORT": str(self.port), "PATH": "/usr/bin:/bin", "PYTHONPATH": "/usr/local/lib/python-packages"}
        with open(BASE / "framework.log", "wb") as log:
            start("/usr/sbin/chroot", root / "rootfs", *self.COMMAND, env=environment, stdout=log, stderr=log)

    def manifest(self):
        command = ", ".join(f'"{word}"' for word in self.COMMAND)
        return f'platform = "knative"\ncommand = [{command}]'


def nginx(upstream):
    """One worker, connections to the server kept alive: what a proxy costs that is only that."""
    number = port()
    own = BASE / f"nginx-{number}"
    own.mkdir()
    config = own / "conf"
    paths = "\n".join(f"{kind}_temp_path {own}/{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"])
    config.write_text(
        f"""daemon off; master_process off; pid {own}/pid; error_log {own}/log;
        events {{ worker_connections 256; }}
        http {{ access_log off; keepalive_requests 100000000; {paths}
        upstream server {{ server 127.0.0.1:{upstream}; keepalive {CALLERS}; keepalive_requests 100000000; }}
        server {{ listen 127.0.0.1:{number}; location / {{
        proxy_pass http://server; proxy_http_version 1.1; proxy_set_header Connection ""; }} }} }}"""
    )
    start("nginx", "-c", config, stderr=subprocess.DEVNULL)
    return number


def main():
    load_before, begun = os.getloadavg()[0], time.monotonic()
    for missing in ["crun", "nginx"]:
        if not shutil.which(missing):
            print(f"bench-http: {missing} is not installed, its rows are left out")
    probe = BASE / "probe"
    run("rustc", "--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-o", probe, HERE / "probe.rs")
    crun = Crun(probe) if shutil.which("crun") else None
    direct = port()
    start(probe, "serve", env={"PORT": str(direct)})
    framework = Framework()
    proxies = [(direct, nginx(direct)), (framework.port, nginx(framework.port))] if shutil.which("nginx") else []
    node = Node()
    node.neap("image", "import", image(probe))
    node.neap("image", "import", framework.archive)
    shared = f'[scale]\nmax = 1\nconcurrency = {CALLERS}\nidle = "10m"'
    node.deploy("warm", '[scale]\nmax = 1\nidle = "10m"')
    node.deploy("busy", '[scale]\nmax = 1\nconcurrency = 2\nidle = "10m"')
    node.deploy("load", shared)
    node.deploy("framework", shared, "framework:1", framework.manifest(), "256MiB")
    node.deploy("cold", '[scale]\nmax = 1\nidle = "100ms"')
    for number in [direct, framework.port]:
        wait("the server answers", lambda: answers(number, "/"))
    for name in ["warm", "busy", "load", "framework"]:
        wait(f"{name} answers", lambda: answers(node.port, f"/function/{name}"))
    unanswered = socket.create_connection(("127.0.0.1", node.port))
    unanswered.sendall(b"GET /function/busy/never HTTP/1.1\r\nHost: localhost\r\n\r\n")
    kept = node.instances()

    rows = {name: [] for name in ["direct", "neap", "direct, paused", "neap, paused", "neap, frozen", "crun", "cold"]}
    servers = {"at once": (direct, "load"), "framework": (framework.port, "framework")}
    rates = {}
    print(f"bench-http: {ROUNDS} rounds, load before: {load_before:.1f}", flush=True)
    for _ in range(ROUNDS):
        rows["direct"] += calls(probe, direct, "/", WARM, 0)
        rows["neap"] += calls(probe, node.port, "/function/warm", WARM, 0)
        # Longer than FREEZE_AFTER (100 ms).
        rows["direct, paused"] += calls(probe, direct, "/", THAW, 250)
        rows["neap, paused"] += calls(probe, node.port, "/function/busy", THAW, 250)
        rows["neap, frozen"] += calls(probe, node.port, "/function/warm", THAW, 250)
        for _ in range(COLD if crun else 0):
            rows["crun"].append(crun.start(probe))
            wait("no instance of `cold`", lambda: node.instances() <= kept)
            rows["cold"].append(until(probe, node.port, "/function/cold", time.monotonic_ns()))
        for server, (number, function) in servers.items():
            ways = [("direct", number, "/"), ("neap", node.port, f"/function/{function}")]
            ways += [("nginx", to, "/") for at, to in proxies if at == number]
            for way, to, path in ways:
                rates.setdefault((server, way), []).append(load(probe, to, path))

    ms = lambda name: statistics.median(rows[name]) / 1e6
    p99 = lambda name: sorted(rows[name])[len(rows[name]) * 99 // 100] / 1e6
    for name in rows:
        if rows[name]:
            print(f"  {name:20} p50 {ms(name):8.3f} ms   p99 {p99(name):8.3f} ms   n {len(rows[name])}")
    rate = {key: statistics.median(found) for key, found in rates.items()}
    for (server, way), found in rate.items():
        share = found / rate[server, "direct"]
        print(f"  {CALLERS} callers, {server:10} {way:7} {found:8.0f} answers/s   {share:.2f} x direct")
    warm = ms("neap") - ms("direct")
    print(f"  a pause adds {ms('neap, paused') - ms('direct, paused') - warm:.3f} ms")
    thaw = ms("neap, frozen") - ms("neap, paused")
    targets = [("warm call adds", warm, "ms", "<=", 0.3), ("thaw adds", thaw, "ms", "<=", 0.5)]
    for server in servers:
        share = rate[server, "neap"] / rate[server, "direct"]
        targets.append((f"{CALLERS} callers, server {server}, of the direct rate", share, "x", ">=", 0.5))
    if crun:
        targets.append(("0 to first answer, to crun's", ms("cold") / ms("crun"), "x", "<=", 1.2))
    for what, value, unit, sign, target in targets:
        holds = value <= target if sign == "<=" else value >= target
        print(f"{'holds ' if holds else 'MISSED'}  {what}: {value:.3f} {unit} (target {sign} {target} {unit})")
    print(f"{time.monotonic() - begun:.0f} s")


end_on_signals()
try:
    main()
finally:
    clean(gently=True)
