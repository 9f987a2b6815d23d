//! Handler http from the outside: a server in a container, reached through the node.

use super::{SOON, Site, alone, possible};
use crate::support::python::python_image;
use crate::support::{Node, Subscriber, have, http, publish, wait_until};
use std::io::{Read, Write};
use std::net::TcpStream;

/// busybox's httpd with one CGI program, `/cgi-bin/f`, which runs `script`.
pub(super) fn served(name: &str, script: &str, rest: &str) -> String {
    let start = "mkdir -p /tmp/www/cgi-bin && cp /tmp/f /tmp/www/cgi-bin/f";
    format!(
        "name = \"{name}\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
         command = ['/bin/sh', '-c', '''printf '%s\\n' '#!/bin/sh' \"$SCRIPT\" >/tmp/f; chmod 755 /tmp/f; \
         {start}; echo \"listening on $PORT\"; exec httpd -f -p $PORT -h /tmp/www''']\n\
         env = {{ SCRIPT = '''{script}''' }}\n{rest}\n"
    )
}

const ECHO: &str = "printf 'Content-Type: text/plain\\r\\n\\r\\n'; cat";

/// v1: the word in the freezer of the node's only instance; v2: its digit.
pub(super) fn frozen(node: &Node) -> Option<bool> {
    let states = node.instance_files("freezer.state", "cgroup.freeze");
    let text = states.first().map(|file| std::fs::read_to_string(file).unwrap_or_default())?;
    Some(matches!(text.trim(), "FROZEN" | "1"))
}

#[test]
fn server_is_started_by_the_first_call_frozen_when_idle_and_removed_after_its_time() {
    if !possible() {
        return;
    }
    let node = alone("http-life");
    node.deploy(&served("echo", ECHO, "[scale]\nidle = \"3s\"\n"));
    assert_eq!(node.status()["instances"], 0, "nothing runs before the first call");

    let first = node.post("/function/echo/cgi-bin/f?x=1", "21 degrees");
    wait_until(SOON, "the idle instance is frozen", || frozen(&node) == Some(true));
    let second = node.post("/function/echo/cgi-bin/f", "22 degrees");

    assert_eq!((first.status, first.text().as_str()), (200, "21 degrees"));
    assert_eq!((second.status, second.text().as_str()), (200, "22 degrees"));
    assert_eq!(first.header("content-type"), Some("text/plain"));
    assert!(first.header("x-call-id").is_some());
    let log = node.neap_ok(&["logs", "echo"]);
    assert_eq!(log.matches("listening on 8080").count(), 1, "one instance served both: {log}");
    wait_until(SOON, "the idle instance is removed", || node.status()["instances"] == 0);
    assert_eq!(node.post("/function/echo/cgi-bin/f", "again").text(), "again", "and comes again");
}

#[test]
fn a_killed_daemons_launcher_ends_also_what_is_frozen() {
    if !possible() {
        return;
    }
    let mut node = alone("http-orphan");
    node.deploy(&served("echo", ECHO, "[scale]\nidle = \"10m\"\n"));
    assert_eq!(node.post("/function/echo/cgi-bin/f", "21").text(), "21");
    wait_until(SOON, "the idle instance is frozen", || frozen(&node) == Some(true));

    node.kill();

    wait_until(SOON, "nothing runs any more", || {
        node.launcher_pids().is_empty() && node.instance_pids().is_empty()
    });
}

#[test]
fn functions_own_status_and_headers_reach_the_caller() {
    if !possible() {
        return;
    }
    let node = alone("http-status");
    node.deploy(&served(
        "echo",
        "printf 'Status: 418 Teapot\\r\\nX-Made-Of: %s\\r\\n\\r\\nno coffee' \"$HTTP_X_ASKED\"",
        "",
    ));

    let answer =
        http::request(node.port(), "GET", "/function/echo/cgi-bin/f", &[("X-Asked", "porcelain")], b"")
            .expect("an answer");
    let missing = node.get("/function/echo/nothing");

    assert_eq!((answer.status, answer.text().as_str()), (418, "no coffee"));
    assert_eq!(answer.header("x-made-of"), Some("porcelain"));
    assert_eq!(missing.status, 404);
}

/// A Python program as a function; `head` is more of the manifest's first table.
fn program(name: &str, head: &str, program: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pytest:1\"\nhandler = \"http\"\n{head}\n\
         command = ['/usr/bin/python3', '-c', '''\n{program}''']\n{rest}\n\
         [limits]\nmemory = \"128MiB\"\ncpu = 2\n"
    )
}

fn python_possible() -> bool {
    possible() && have("Python's servers", "mmdebstrap")
}

fn python_node(name: &str) -> Node {
    let node = Node::builder(name).start();
    node.import(python_image());
    node
}

/// Sends and reads on one connection until `until` has come, then leaves the rest unread.
fn converse(port: u16, request: &[u8], until: &str) -> (String, TcpStream) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the node listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    stream.write_all(request).expect("sent");
    let mut read = Vec::new();
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&read).contains(until) {
        let amount = stream.read(&mut piece).expect("read in time");
        assert!(amount > 0, "ended before {until:?}: {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&piece[..amount]);
    }
    (String::from_utf8_lossy(&read).into_owned(), stream)
}

/// Answers in pieces, each when it is asked for by a line of the request's body.
const ECHO_LINES: &str = r#"
import http.server, os
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Trailer", "X-Lines")
        self.end_headers()
        def chunk(b):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(b), b)); self.wfile.flush()
        lines = 0
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            data = self.rfile.read(size); self.rfile.readline()
            if size == 0: break
            lines += 1
            chunk(b"got " + data)
        self.wfile.write(b"0\r\nX-Lines: %d\r\n\r\n" % lines)
    def do_GET(self):
        n = int(self.path.split("=")[1])
        self.send_response(200)
        self.send_header("Content-Length", str(n))
        self.end_headers()
        try:
            for _ in range(n // 65536): self.wfile.write(b"x" * 65536)
        except BrokenPipeError: pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), H).serve_forever()
"#;

#[test]
fn bodies_stream_both_ways_with_trailers_and_without_memory() {
    if !python_possible() {
        return;
    }
    let node = python_node("http-stream");
    node.deploy(&program("echo", "", ECHO_LINES, ""));

    let head = b"POST /function/echo HTTP/1.1\r\nHost: x\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n";
    let (first, mut stream) = converse(node.port(), head, "got one");
    stream.write_all(b"3\r\ntwo\r\n0\r\n\r\n").expect("sent");
    let mut rest = Vec::new();
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&rest).contains("\r\n\r\n") {
        let amount = stream.read(&mut piece).expect("read in time");
        assert!(amount > 0);
        rest.extend_from_slice(&piece[..amount]);
    }
    let rest = String::from_utf8_lossy(&rest).to_ascii_lowercase();

    assert!(first.starts_with("HTTP/1.1 200") && !first.contains("two"), "{first}");
    assert!(rest.contains("got two") && rest.contains("x-lines: 2"), "{rest}");

    let before = node.daemon_memory_kib();
    let (_, slow) =
        converse(node.port(), b"GET /function/echo?n=1073741824 HTTP/1.1\r\nHost: x\r\n\r\n", "xxxx");
    let whole = http::get(node.port(), "/function/echo?n=67108864").expect("an answer");
    assert_eq!(whole.body.len(), 64 << 20);
    drop(slow);
    let grown = node.daemon_memory_kib().saturating_sub(before);
    assert!(grown < 16 << 10, "the daemon grew by {grown} KiB while 64 MiB went through");
}

#[test]
fn websocket_is_refused_and_other_upgrades_are_ignored() {
    if !possible() {
        return;
    }
    let node = alone("http-upgrade");
    node.deploy(&served("echo", ECHO, ""));
    let ask = |to: &str| {
        let headers = [("Upgrade", to), ("Connection", "Upgrade")];
        http::request(node.port(), "GET", "/function/echo/cgi-bin/f", &headers, b"").expect("an answer")
    };

    assert_eq!(ask("h2c").status, 200);
    let refused = ask("websocket");

    assert_eq!(refused.status, 501);
    assert!(refused.text().contains("WebSocket"), "{}", refused.text());
}

#[test]
fn function_that_never_listens_is_named_with_its_last_lines() {
    if !possible() {
        return;
    }
    let node = alone("http-deaf");
    let deaf = |name: &str, script: &str, start: &str| {
        format!(
            "name = \"{name}\"\nimage = \"shell:1\"\nhandler = \"http\"\n\
             command = ['/bin/sh', '-c', '{script}']\n[limits]\nstart = \"{start}\"\n[retry]\nattempts = 1\n"
        )
    };
    node.deploy(&deaf("deaf", "echo no database >&2; exec sleep 1000", "2s"));
    node.deploy(&deaf("dies", "echo missing key >&2; exit 3", "30s"));

    let deaf = node.post("/function/deaf", "x");
    let dies = node.post("/function/dies", "x");
    assert_eq!(node.post("/async-function/dies", "x").status, 202);

    assert_eq!((deaf.status, dies.status), (502, 502));
    let (deaf_says, dies_says) = (deaf.text(), dies.text());
    assert!(deaf_says.contains("not ready after 2s") && deaf_says.contains("no database"), "{deaf_says}");
    assert!(dies_says.contains("exited with code 3") && dies_says.contains("missing key"), "{dies_says}");
    assert_eq!(dies.header("x-neap-failure"), Some("start"));
    wait_until(SOON, "the event is dead", || node.status()["dead_events"] == 1);
    wait_until(SOON, "nothing is left running", || node.status()["instances"] == 0);
}

/// Speaks no HTTP, or not to the end, by the path asked for.
const RUDE: &str = r#"
import os, socket, threading, time
def serve(c):
    head = b""
    while b"\r\n\r\n" not in head:
        d = c.recv(4096)
        if not d: return
        head += d
    path = head.split()[1].decode()
    if path == "/garbage": c.sendall(b"\x00\xff not http at all\r\n\r\n")
    elif path == "/close": pass
    elif path == "/early": c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    elif path == "/headers": c.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-A: " + b"a" * (1 << 20))
    elif path == "/lines": c.sendall(b"HTTP/1.1 200 OK\r\n" + b"X-A: 1\r\n" * 5000 + b"\r\n")
    elif path == "/hints":
        try:
            while True: c.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 1000)
        except OSError: pass
    elif path == "/hinted":
        c.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")
    elif path == "/hang": c.sendall(b"HTTP/1.1 200 OK\r\nX-Begun: 1\r\n"); time.sleep(1000)
    elif path == "/flood":
        c.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(1 << 14): c.sendall(b"x" * 65536)
        except OSError: pass
    elif path == "/die": os._exit(7)
    else: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")
    c.close()
s = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
while True:
    c, _ = s.accept()
    threading.Thread(target=serve, args=(c,), daemon=True).start()
"#;

#[test]
fn rude_servers_harm_nobody() {
    if !python_possible() {
        return;
    }
    let node = python_node("http-rude");
    let more = "[retry]\nattempts = 1\n[scale]\nmax = 1\n";
    node.deploy(&program("rude", "", RUDE, more).replace("cpu = 2", "cpu = 2\ntimeout = \"3s\""));
    let ask = |path: &str| http::get(node.port(), &format!("/function/rude{path}")).expect("an answer");

    for path in ["/garbage", "/close", "/headers", "/lines"] {
        let answer = ask(path);
        let found = (answer.status, answer.header("x-neap-failure"));
        assert_eq!(found, (502, Some("answer")), "{path}: {}", answer.text());
    }
    let cut = ask("/early");
    assert_eq!(
        (cut.status, cut.text().as_str()),
        (200, "half"),
        "what came is passed on, then it breaks off"
    );
    assert_eq!(ask("/hinted").text(), "fine", "an interim response is none");
    let hints = ask("/hints");
    assert!([502, 504].contains(&hints.status), "{}: {}", hints.status, hints.text());
    let hangs = ask("/hang");
    assert_eq!((hangs.status, hangs.header("x-neap-failure")), (504, Some("timed_out")));
    let died = ask("/die");
    assert_eq!((died.status, died.header("x-neap-failure")), (502, Some("exit")), "{}", died.text());
    assert_eq!(ask("/").text(), "fine", "another instance serves");

    // An event's answer has a bound, the instance goes on.
    assert_eq!(node.post("/async-function/rude/flood", "x").status, 202);
    wait_until(SOON, "the flood is a dead event", || node.status()["dead_events"] == 1);
    let dead = node.neap_json(&["events", "--state", "dead"]);
    assert!(dead[0]["last_error"].as_str().is_some_and(|e| e.contains("limits.payload")), "{dead}");
    assert_eq!(ask("/").text(), "fine");
}

/// Waits for others in the same instance.
const SHARED: &str = r#"
import http.server, os, threading
b = threading.Barrier(4)
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        b.wait(60)
        self.send_response(200); self.send_header("Content-Length", "4"); self.end_headers()
        self.wfile.write(b"four")
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), H).serve_forever()
"#;

#[test]
fn one_instance_serves_as_many_at_once_as_it_may() {
    if !python_possible() {
        return;
    }
    let node = python_node("http-shared");
    node.deploy(&program("shared", "", SHARED, "[scale]\nmax = 1\nconcurrency = 4\n"));

    let port = node.port();
    let call = move || http::get(port, "/function/shared");
    let callers: Vec<_> = (0..4).map(|_| std::thread::spawn(call)).collect();

    for caller in callers {
        let answer = caller.join().expect("no panic").expect("an answer");
        assert_eq!((answer.status, answer.text().as_str()), (200, "four"));
    }
}

/// Executes PyPI's functions framework, as Cloud Run runs it, on the source in the environment.
const FRAMEWORK: &str = r#"
import os
open("/tmp/main.py", "w").write(os.environ["SOURCE"])
args = ["--source=/tmp/main.py", "--target=f", "--signature-type=" + os.environ["SIGNATURE"]]
os.execvp("python3", ["python3", "-m", "functions_framework"] + args)
"#;

fn framework(name: &str, signature: &str, source: &str, rest: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"pytest:1\"\nplatform = \"knative\"\n\
         command = ['/usr/bin/python3', '-c', '''{FRAMEWORK}''']\n\
         env = {{ SIGNATURE = \"{signature}\", SOURCE = '''{source}''' }}\n{rest}\n\
         [limits]\nmemory = \"192MiB\"\ncpu = 2\npids = 128\nstart = \"120s\"\n"
    )
}

#[test]
fn functions_framework_serves_http() {
    if !python_possible() {
        return;
    }
    let node = python_node("framework");
    let source = r#"
import os
def f(request):
    v, h = os.environ, request.headers
    return [v["K_SERVICE"], v["K_REVISION"], v["K_CONFIGURATION"], v["PORT"], h["Host"], h["Forwarded"],
            h["X-Forwarded-For"], len(h["traceparent"]), request.get_data(as_text=True), request.full_path]
"#;
    node.deploy(&framework("hello", "http", source, ""));

    let answer = node.post("/function/hello/a?x=%20", "21");

    assert_eq!(answer.status, 200, "{}", answer.text());
    let expected = serde_json::json!([
        "hello",
        "hello-00001",
        "hello",
        "8080",
        "localhost",
        "for=127.0.0.1;proto=http;host=\"localhost\"",
        "127.0.0.1",
        55,
        "21",
        "/a?x=%20"
    ]);
    assert_eq!(answer.json(), expected);
    let shown = node.neap_ok(&["show", "hello"]);
    assert!(shown.contains("knative"), "{shown}");
}

#[test]
fn functions_framework_gets_messages_as_cloudevents() {
    if !python_possible() {
        return;
    }
    let site = Site::start("framework-events");
    site.node.import(python_image());
    let source = "\ndef f(event):\n    print('saw', event['type'], event['subject'], event.data)\n";
    let source = source.replace('\'', "\"");
    site.node.deploy(&framework("events", "cloudevent", &source, "[[trigger]]\nmqtt = \"sensors/#\"\n"));

    site.local.wait_subscribed("neap-", "sensors/#");
    publish(site.local.port(), "sensors/caf\u{e9}/temperature", r#"{"celsius": 21.5}"#);

    wait_until(SOON * 4, "the function has printed the event", || {
        let log = site.node.neap_ok(&["logs", "events"]);
        // The SDK of Python leaves the percent-encoding of HTTP binding §3.1.3.2 as it is.
        log.contains("saw neap.mqtt.message sensors/caf%C3%A9/temperature") && log.contains("21.5")
    });
    assert_eq!(site.node.status()["dead_events"], 0);
}

/// Adds up, and says so by an event of its own; the first attempt is told to wait.
const SUMS: &str = r#"
import http.server, json, os
class H(http.server.BaseHTTPRequestHandler):
    seen = set()
    def do_POST(self):
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["ce-id"] not in self.seen:
            self.seen.add(self.headers["ce-id"])
            self.send_response(503); self.send_header("Retry-After", "1"); self.end_headers(); return
        body = json.dumps({"sum": sum(data)}).encode()
        self.send_response(200)
        for k, v in [("ce-specversion", "1.0"), ("ce-id", "sum-1"), ("ce-source", "/sums"), ("ce-type", "sum.made"),
                     ("ce-subject", "caf%C3%A9"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]:
            self.send_header(k, v)
        self.end_headers(); self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), H).serve_forever()
"#;

#[test]
fn answer_that_is_a_cloudevent_is_the_event_that_goes_on() {
    if !python_possible() {
        return;
    }
    let site = Site::start("http-answer");
    site.node.import(python_image());
    let rest = "[[trigger]]\nmqtt = \"in\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"\n[retry]\nbackoff = \"10ms\"\n";
    site.node.deploy(&program("sums", "", SUMS, rest));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    site.local.wait_subscribed("neap-", "in");
    publish(site.local.port(), "in", "[1, 2, 3]");
    let message = cloud.wait_for(1, SOON * 2).remove(0);

    assert_eq!(message.text(), r#"{"sum": 6}"#);
    let property = |name: &str| message.user_property(name).map(str::to_owned);
    assert_eq!(property("type").as_deref(), Some("sum.made"));
    assert_eq!((property("id").as_deref(), property("source").as_deref()), (Some("sum-1"), Some("/sums")));
    assert_eq!(property("subject").as_deref(), Some("caf\u{e9}"));
}

#[test]
fn statuses_that_are_named_are_tried_again_and_no_others() {
    if !possible() {
        return;
    }
    let node = alone("http-codes");
    node.deploy(&served(
        "f",
        "echo \"tried $QUERY_STRING\" >&2; printf 'Status: %s No\\r\\n\\r\\n' \"$QUERY_STRING\"",
        "[retry]\nattempts = 3\nbackoff = \"1ms\"\nbackoff_max = \"1ms\"\ncodes = [429, 503]\n",
    ));

    for status in [503, 500, 429] {
        let path = format!("/async-function/f/cgi-bin/f?{status}");
        assert_eq!(node.post(&path, "x").status, 202);
    }

    wait_until(SOON * 2, "all three are dead", || {
        node.neap_json(&["events", "--state", "dead"]).as_array().map(Vec::len) == Some(3)
    });
    let log = node.neap_ok(&["logs", "f", "--tail", "1000"]);
    let tried = [503, 500, 429].map(|status| log.matches(&format!("tried {status}")).count());
    assert_eq!(tried, [3, 1, 3], "{log}");
}

#[test]
fn page_at_the_root_shows_what_metrics_say_and_may_do_nothing_else() {
    if !possible() {
        return;
    }
    let node = alone("page");
    node.deploy(&served("echo", ECHO, ""));
    assert_eq!(node.post("/function/echo/cgi-bin/f", "21").text(), "21");
    // Instances of a function are told of where there are some.
    node.deploy(&super::function("parked", "cat", "[scale]\nmin = 1"));
    node.wait_parked("parked", 1);

    let page = http::request(node.port(), "GET", "/", &[("accept", "text/html,*/*;q=0.8")], b"");
    let page = page.expect("an answer");

    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let text = page.text();
    let script = text.split_once("<script>").and_then(|(_, rest)| rest.split_once("</script>"));
    let script = script.expect("it has a script").0;
    let policy = page.header("content-security-policy").expect("it has a policy");
    let hash = ring::digest::digest(&ring::digest::SHA256, script.as_bytes());
    let hash = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, hash);
    assert!(policy.contains(&format!("script-src 'sha256-{hash}'")), "a browser runs it: {policy}");
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    // What it looks for is what there is.
    let asked: Vec<&str> = script.split("of(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(asked.len() > 10, "{asked:?}");
    let missing = || {
        let metrics = node.get("/metrics").text();
        asked.iter().filter(|name| !metrics.contains(&format!("neap_{name}"))).count()
    };
    // A call is counted when it has ended, which its answer need not wait for.
    wait_until(SOON * 2, "all that it asks for is there", || missing() == 0);
    // To others a line about what this is.
    let plain = node.get("/");
    assert!(plain.text().starts_with("neap ") && plain.text().contains(" on page:"), "{}", plain.text());
}
