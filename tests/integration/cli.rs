//! The command line as a process: what it prints where, and how it exits. The daemon is a
//! stand-in that answers one request after another on a Unix socket, so that every answer, also
//! the odd ones, can be had; the real daemon is asked in `node`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;

#[test]
fn help_names_every_command() {
    let help = neap(&["--help"], None);

    assert_eq!(code(&help), 0);
    for command in [
        "daemon",
        "check",
        "doctor",
        "run",
        "deploy",
        "ls",
        "show",
        "rm",
        "pause",
        "resume",
        "rollback",
        "invoke",
        "logs",
        "image",
        "events",
        "deliveries",
        "status",
        "reload",
        "completions",
    ] {
        let listed = stdout(&help).lines().any(|line| line.split_whitespace().next() == Some(command));
        assert!(listed, "{command} is not in\n{}", stdout(&help));
    }
    assert!(stdout(&help).contains("Exit codes: 0 done, 1 failed, 2 usage"));
}

#[test]
fn children_of_the_daemon_are_not_shown() {
    let help = neap(&["--help"], None);

    assert!(!stdout(&help).contains("launcher") && !stdout(&help).contains("image-worker"));
}

#[test]
fn wrong_usage_exits_with_2_and_says_so_on_stderr() {
    for line in ["", "nonsense", "deploy", "ls --output yaml", "events purge", "logs f --since yesterday"] {
        let words: Vec<&str> = line.split_whitespace().collect();

        let done = neap(&words, None);

        assert_eq!(code(&done), 2, "neap {line}");
        assert!(stdout(&done).is_empty() && stderr(&done).contains("--help"), "neap {line}: {done:?}");
    }
}

#[test]
fn contradicting_addresses_are_usage_errors() {
    for line in ["ls --token-file x", "ls --url gw:8443", "ls --url http://127.0.0.1:1 --ca x"] {
        let words: Vec<&str> = line.split_whitespace().collect();

        let done = neap(&words, None);

        assert_eq!(code(&done), 2, "neap {line}: {}", stderr(&done));
    }
}

#[test]
fn daemon_that_is_not_there_exits_with_3_and_names_the_socket() {
    let dir = temporary();
    let socket = dir.path().join("none.sock");
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).expect("bind"));

    for (socket, hint) in [(&socket, "no such socket"), (&stale, "nobody listens")] {
        for line in [
            "ls",
            "show f",
            "rm f",
            "pause f",
            "invoke f",
            "logs f",
            "image ls",
            "events",
            "deliveries",
            "status",
            "reload",
            "run busybox",
            "events redrive --all",
        ] {
            let words: Vec<&str> = line.split_whitespace().collect();
            let done = neap(&words, Some(socket));

            assert_eq!(code(&done), 3, "neap {line}");
            let told = stderr(&done);
            let named = told.contains(&socket.display().to_string()) && told.contains(hint);
            assert!(named && told.contains("systemctl status neap") && told.lines().count() == 1, "{told}");
        }
    }
}

#[test]
fn unreachable_url_exits_with_3() {
    // bound and never accepted from after the listener is gone: nobody is there
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");

    let done = neap(&["ls", "--url", &format!("http://{free}")], None);

    assert_eq!(code(&done), 3, "{}", stderr(&done));
    assert!(stderr(&done).contains(&format!("http://{free}")));
}

#[test]
fn completions_are_scripts_that_their_shells_take() {
    for shell in ["bash", "zsh", "fish"] {
        let script = neap(&["completions", shell], None);
        assert_eq!(code(&script), 0);
        assert!(stdout(&script).contains("deliveries"), "{shell}");

        let Ok(mut check) = Command::new(shell).arg("-n").stdin(Stdio::piped()).spawn() else {
            eprintln!("{shell} is not installed: its script is not checked");
            continue;
        };
        check.stdin.take().expect("a pipe").write_all(&script.stdout).expect("hand over the script");
        assert!(check.wait().expect("the shell").success(), "{shell} refuses its script");
    }
}

#[test]
fn json_is_the_apis_own() {
    let answer = r#"[ {"name":"f", "later":  1} ]"#;
    let fake = Fake::new(vec![json(200, answer)]);

    let done = fake.neap(&["ls", "--output", "json"]);

    assert_eq!((code(&done), stdout(&done)), (0, format!("{answer}\n")));
}

#[test]
fn unknown_function_exits_with_4() {
    let problem = r#"{"title":"not found","status":404,"detail":"no function named `f`"}"#;

    for line in ["show f", "rm f", "pause f", "invoke f", "logs f"] {
        let fake = Fake::new(vec![json(404, problem)]);
        let words: Vec<&str> = line.split_whitespace().collect();
        let done = fake.neap(&words);

        assert_eq!(code(&done), 4, "neap {line}");
        let verb = words[0];
        assert_eq!(stderr(&done), format!("neap: {verb} f: no function named `f`\n"));
        assert!(stdout(&done).is_empty());
    }
}

#[test]
fn every_mistake_of_every_manifest_is_told() {
    let dir = temporary();
    for name in ["a.toml", "b.toml", "c.toml"] {
        std::fs::write(dir.path().join(name), format!("# {name}")).expect("write a manifest");
    }
    let refused = |name: &str| {
        let line = |n: u8| format!("{name}:{n}: mistake {n}");
        let body = serde_json::json!({
            "title": "bad request", "status": 400, "detail": "the manifest has 2 mistakes",
            "errors": [line(1), line(2)],
        });
        json(400, &body.to_string())
    };
    let good = r#"{"name":"b","revision":3,"image":"sha256:ab","changed":true}"#;
    let fake = Fake::new(vec![refused("a.toml"), json(200, good), refused("c.toml")]);

    let done = fake.neap(&["deploy", path(dir.path())]);

    assert_eq!(code(&done), 1);
    assert_eq!(stdout(&done), "b: revision 3 (sha256:ab)\n");
    for line in ["a.toml:1: mistake 1", "a.toml:2: mistake 2", "c.toml:1: mistake 1", "c.toml:2: mistake 2"] {
        assert!(stderr(&done).lines().any(|l| l.trim() == line), "{}", stderr(&done));
    }
    let asked = fake.requests();
    assert_eq!(asked.len(), 3);
    assert!(asked[0].head.starts_with("POST /v1/functions?file="), "{}", asked[0].head);
    assert_eq!(asked[0].body, b"# a.toml");
}

#[test]
fn missing_manifest_fails_and_the_others_are_deployed() {
    let dir = temporary();
    let good = dir.path().join("good.toml");
    std::fs::write(&good, "").expect("write a manifest");
    let same = r#"{"name":"good","revision":1,"image":"sha256:ab","changed":false}"#;
    let fake = Fake::new(vec![json(200, same)]);

    let done = fake.neap(&["deploy", path(&dir.path().join("none.toml")), path(&good)]);

    assert_eq!(code(&done), 1);
    assert!(stderr(&done).contains("none.toml"), "{}", stderr(&done));
    assert!(stdout(&done).contains("good: unchanged"), "{}", stdout(&done));
}

#[test]
fn invoke_prints_the_output_as_it_is() {
    let output = b"\x00\xff\x1b[31mno line break";
    let fake = Fake::new(vec![answer(200, "application/octet-stream", output)]);

    let done = fake.neap(&["invoke", "f", "--data", "21.5", "--header", "X-Site=north", "--event", "e 1"]);

    assert_eq!((code(&done), done.stdout.as_slice()), (0, &output[..]));
    let asked = fake.requests();
    assert!(asked[0].head.starts_with("POST /function/f HTTP/1.1\r\n"), "{}", asked[0].head);
    assert_eq!(asked[0].header("x-site"), Some("north"));
    assert_eq!(asked[0].header("x-call-id"), Some("e 1"));
    assert_eq!(asked[0].body, b"21.5");
}

#[test]
fn failed_function_exits_with_1_and_leaves_stdout_empty() {
    let problem = r#"{"title":"bad gateway","status":502,"detail":"function failed: exited with code 3"}"#;
    let fake = Fake::new(vec![json(502, problem)]);

    let done = fake.neap(&["invoke", "f"]);

    assert_eq!((code(&done), stdout(&done)), (1, String::new()));
    assert_eq!(stderr(&done), "neap: invoke f: function failed: exited with code 3\n");
}

#[test]
fn async_invoke_prints_the_events_id() {
    let reply = b"HTTP/1.1 202 Accepted\r\nx-call-id: e%201\r\ncontent-length: 0\r\n\r\n".to_vec();
    let fake = Fake::new(vec![reply]);

    let done = fake.neap(&["invoke", "f", "--async", "--data", "-"]);

    assert_eq!((code(&done), stdout(&done)), (0, "e 1\n".to_owned()));
    assert!(fake.requests()[0].head.starts_with("POST /async-function/f "));
}

#[test]
fn refusal_before_the_body_was_read_is_still_told() {
    let dir = temporary();
    let large = dir.path().join("large");
    std::fs::write(&large, vec![0; 8 << 20]).expect("write a large file");
    let problem =
        r#"{"title":"payload too large","status":413,"detail":"the body is larger than 1048576 bytes"}"#;
    let fake = Fake::with(move |_, _, mut stream| {
        // The socket's buffers are full, the client is still sending.
        stream.write_all(&json(413, problem)).expect("answer early");
        drop(stream);
    });

    let done = fake.neap(&["invoke", "f", "--data", &format!("@{}", large.display())]);

    assert_eq!(code(&done), 1);
    assert!(stderr(&done).contains("larger than 1048576 bytes"), "{}", stderr(&done));
}

#[test]
fn run_passes_the_functions_output_and_exit_code_on() {
    // "out" and "err"
    let result = r#"{"stdout":"b3V0","stderr":"ZXJy","failure":"exited with code 7","code":7,"took_ms":1}"#;
    let fake = Fake::new(vec![json(200, result)]);

    let done = fake.neap(&["run", "busybox", "--env", "A=b", "--data", "x", "--", "sh", "-c", "exit 7"]);

    assert_eq!((code(&done), stdout(&done)), (7, "out".to_owned()));
    assert!(stderr(&done).starts_with("err") && stderr(&done).contains("exited with code 7"));
    let asked: serde_json::Value = serde_json::from_slice(&fake.requests()[0].body).expect("JSON");
    let expected = serde_json::json!({
        "image": "busybox", "command": ["sh", "-c", "exit 7"], "env": {"A": "b"}, "data": "eA==",
    });
    assert_eq!(asked, expected);
}

#[test]
fn log_lines_are_shown_as_they_come() {
    let (go_on, wait) = channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let fake = Fake::with(move |_, _, mut stream| {
        stream.write_all(NDJSON_HEAD).expect("the head");
        stream.write_all(&chunk(&log_line("first"))).expect("a line");
        let _ = wait.lock().expect("one request").recv(); // until the first one was seen
        stream.write_all(&chunk(&log_line("second"))).expect("a line");
        stream.write_all(b"0\r\n\r\n").expect("the end");
    });
    let mut child = fake
        .command(&["logs", "f", "-f", "--tail", "5", "--event", "e"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("neap");
    let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();

    let first = lines.next().expect("a line").expect("text");
    assert!(first.ends_with(" e first"), "{first}");
    go_on.send(()).expect("the stand-in waits");
    let second = lines.next().expect("a line").expect("text");

    assert!(second.ends_with(" e second"), "{second}");
    assert!(child.wait().expect("its end").success());
    let head = &fake.requests()[0].head;
    assert!(head.starts_with("GET /v1/functions/f/logs?follow=1&tail=5&event=e "), "{head}");
}

#[test]
fn reader_that_leaves_ends_the_command_quietly() {
    let fake = Fake::with(|_, _, mut stream| {
        stream.write_all(NDJSON_HEAD).expect("the head");
        while stream.write_all(&chunk(&log_line("and on"))).is_ok() {}
    });
    let mut child = fake
        .command(&["logs", "f", "-f"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("neap");

    let mut first = String::new();
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut first).expect("a line");
    let done = child.wait_with_output().expect("its end");

    assert_eq!((code(&done), stderr(&done)), (0, String::new()));
}

#[test]
fn interrupt_ends_following() {
    let (hold, held) = channel::<()>();
    let held = std::sync::Mutex::new(held);
    let fake = Fake::with(move |_, _, mut stream| {
        stream.write_all(NDJSON_HEAD).expect("the head");
        stream.write_all(&chunk(&log_line("first"))).expect("a line");
        let _ = held.lock().expect("one request").recv(); // quiet, until the test is over
    });
    let hold = hold; // gone before the stand-in, which waits for it
    // A shell starts what runs in its background with interrupts ignored, which is inherited.
    let mut child = Command::new("env")
        .args(["--default-signal=INT", env!("CARGO_BIN_EXE_neap"), "logs", "f", "-f"])
        .env("NEAP_SOCKET", &fake.socket)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("neap");
    BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut String::new()).expect("a line");

    let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("interrupt it");

    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.wait().expect("its end").signal(), Some(2));
    drop(hold);
}

#[test]
fn answer_that_breaks_off_is_a_failure() {
    let fake = Fake::with(|_, _, mut stream| {
        stream.write_all(NDJSON_HEAD).expect("the head");
        stream.write_all(&chunk(&log_line("first"))).expect("a line");
    });

    let done = fake.neap(&["logs", "f"]);

    assert_eq!(code(&done), 1, "{}", stderr(&done));
    assert!(stdout(&done).contains("first"));
    assert!(stderr(&done).starts_with("neap: logs f: "), "{}", stderr(&done));
}

#[test]
fn import_sends_a_layout_directory_as_a_tar_and_hears_of_progress_meanwhile() {
    let dir = temporary();
    let blobs = dir.path().join("blobs/sha256");
    std::fs::create_dir_all(&blobs).expect("make blobs");
    std::fs::write(dir.path().join("oci-layout"), "{}").expect("write");
    std::fs::write(dir.path().join("index.json"), "{}").expect("write");
    std::fs::write(blobs.join("a".repeat(64)), vec![1; 3 << 20]).expect("write");
    let fake = Fake::with(|_, mut request, mut stream| {
        stream.write_all(NDJSON_HEAD).expect("the head, before the body");
        stream.write_all(&chunk("{\"read\":512}\n")).expect("progress");
        request.read_body();
        let done =
            r#"{"done":{"references":["docker.io/library/t:1"],"digest":"sha256:ab","platform":"linux/amd64",
            "bytes":3145728,"imported":0,"used_by":[]}}"#
                .replace('\n', " ");
        stream
            .write_all(&chunk("{\"warning\":\"dev/null: a device node was left out\"}\n"))
            .expect("a warning");
        stream.write_all(&chunk(&format!("{done}\n"))).expect("the result");
        stream.write_all(b"0\r\n\r\n").expect("the end");
        request
    });

    let done = fake.neap(&["image", "import", path(dir.path()), "--name", "t:1"]);

    assert_eq!(code(&done), 0, "{}", stderr(&done));
    assert_eq!(stdout(&done), "t:1: linux/amd64, 3 MiB (sha256:ab)\n");
    assert_eq!(stderr(&done), "neap: warning: dev/null: a device node was left out\n");
    let asked = fake.requests();
    assert!(asked[0].head.starts_with("POST /v1/images?name=t%3A1 "), "{}", asked[0].head);
    assert_eq!(&asked[0].body[257..262], b"ustar");
    assert!(asked[0].body.len() > 3 << 20);
}

#[test]
fn import_that_fails_says_why() {
    let reply = [NDJSON_HEAD, &chunk("{\"error\":\"layer 2: wrong digest\"}\n"), b"0\r\n\r\n"].concat();
    let fake = Fake::new(vec![reply]);

    let done = fake.neap(&["image", "import", "-"]);

    assert_eq!((code(&done), stderr(&done)), (1, "neap: import -: layer 2: wrong digest\n".to_owned()));
}

#[test]
fn listing_goes_through_every_page() {
    let row = |n: i64| {
        format!(
            r#"{{"id":{n},"target":"uplink","function":null,"topic":"a\nb","event":"e{n}","created":0,"dead":null,"data_bytes":1}}"#
        )
    };
    let pages = || {
        vec![
            json(200, &format!("[{},{}]", row(1), row(2))),
            json(200, &format!("[{}]", row(3))),
            json(200, "[]"),
        ]
    };

    let fake = Fake::new(pages());
    let text = fake.neap(&["deliveries"]);
    let asked = fake.requests();
    let fake = Fake::new(pages());
    let listed = fake.neap(&["deliveries", "--output", "json"]);

    assert_eq!(code(&text), 0, "{}", stderr(&text));
    assert_eq!(stdout(&text).lines().count(), 4, "{}", stdout(&text));
    assert!(stdout(&text).contains("a\\nb"));
    assert!(asked[1].head.starts_with("GET /v1/deliveries?after=2&limit="), "{}", asked[1].head);
    let listed: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout).expect("one array");
    assert_eq!(listed.len(), 3);
}

#[test]
fn empty_listing_is_an_empty_array_for_programs() {
    let fake = Fake::new(vec![json(200, "[]")]);

    let done = fake.neap(&["events", "--state", "dead", "--output", "json"]);

    assert_eq!((code(&done), stdout(&done)), (0, "[]\n".to_owned()));
}

#[test]
fn redrive_of_an_unknown_event_exits_with_4_and_the_others_are_done() {
    let fake = Fake::new(vec![json(200, r#"{"count":0}"#), json(200, r#"{"count":2}"#)]);

    let done = fake.neap(&["events", "redrive", "gone", "here"]);

    assert_eq!(code(&done), 4);
    assert!(stderr(&done).contains("gone"), "{}", stderr(&done));
    assert!(stdout(&done).starts_with("2 "), "{}", stdout(&done));
}

#[test]
fn answer_of_another_version_is_an_error_and_no_panic() {
    for body in ["", "null", "{", "[1]", r#"{"title":1}"#, "\u{fffd}"] {
        for line in ["ls", "status", "image ls", "events", "show f", "reload"] {
            let fake = Fake::new(vec![json(200, body)]);
            let words: Vec<&str> = line.split_whitespace().collect();
            let done = fake.neap(&words);

            assert_eq!(code(&done), 1, "neap {line} for {body:?}: {}", stderr(&done));
            assert!(stderr(&done).starts_with("neap: ") && stderr(&done).lines().count() == 1);
        }
    }
}

#[test]
fn token_is_sent_to_a_url() {
    let dir = temporary();
    let token = dir.path().join("token");
    std::fs::write(&token, "secret\n").expect("write the token");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client");
        let head = read_head(&mut stream);
        stream.write_all(&json(401, "")).expect("answer");
        head
    });

    let done = neap(&["ls", "--url", &url, "--token-file", path(&token)], None);

    assert!(server.join().expect("the server").contains("authorization: Bearer secret\r\n"));
    assert_eq!(code(&done), 1);
    assert!(stderr(&done).contains("--token-file"), "{}", stderr(&done));
}

const NDJSON_HEAD: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";

fn log_line(text: &str) -> String {
    format!("{{\"time\":0,\"event\":\"e\",\"text\":\"{text}\"}}\n")
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

fn json(status: u16, body: &str) -> Vec<u8> {
    answer(status, "application/json", body.as_bytes())
}

fn answer(status: u16, kind: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes =
        format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len())
            .into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

/// What the command line asked.
struct Asked {
    head: String,
    body: Vec<u8>,
    stream: UnixStream,
}

impl Asked {
    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    fn read_body(&mut self) {
        if self.header("transfer-encoding") == Some("chunked") {
            loop {
                let mut size = String::new();
                while !size.ends_with("\r\n") {
                    let mut byte = [0];
                    self.stream.read_exact(&mut byte).expect("a chunk's size");
                    size.push(byte[0] as char);
                }
                let size = usize::from_str_radix(size.trim(), 16).expect("a number");
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk).expect("a chunk");
                if size == 0 {
                    return;
                }
                self.body.extend_from_slice(&chunk[..size]);
            }
        }
        let length = self.header("content-length").map_or(0, |n| n.parse().expect("a number"));
        self.body = vec![0; length];
        self.stream.read_exact(&mut self.body).expect("the body");
    }
}

/// What a stand-in's handler gives back: the request, when the test wants to look at it.
trait Seen {
    fn seen(self) -> Option<Asked>;
}

impl Seen for () {
    fn seen(self) -> Option<Asked> {
        None
    }
}

impl Seen for Asked {
    fn seen(self) -> Option<Asked> {
        Some(self)
    }
}

/// A stand-in for the daemon.
struct Fake {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    asked: Receiver<Asked>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    /// Reads each request whole, and answers the first with the first of `replies`, and so on.
    fn new(replies: Vec<Vec<u8>>) -> Self {
        Self::with(move |n, mut asked, mut stream| {
            asked.read_body();
            let _ = stream.write_all(&replies[n]); // who looks at exit codes alone may be gone
            asked
        })
    }

    /// Calls `handle` with each request's number and head, and with the connection.
    fn with<S: Seen>(handle: impl Fn(usize, Asked, UnixStream) -> S + Send + 'static) -> Self {
        let dir = temporary();
        let socket = dir.path().join("neap.sock");
        let listener = UnixListener::bind(&socket).expect("bind the stand-in's socket");
        let (sender, asked) = channel();
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                let (mut stream, _) = listener.accept().expect("accept");
                let head = read_head(&mut stream);
                if head.is_empty() {
                    return; // the test is over
                }
                let answer = stream.try_clone().expect("a second handle");
                let seen = Asked { head: head.clone(), body: Vec::new(), stream };
                let bare =
                    Asked { head, body: Vec::new(), stream: seen.stream.try_clone().expect("a handle") };
                let seen = handle(n, seen, answer).seen();
                let _ = bare.stream.shutdown(std::net::Shutdown::Both);
                let _ = sender.send(seen.unwrap_or(bare));
            }
        });
        Self { _dir: dir, socket, asked, thread: Some(thread) }
    }

    fn command(&self, words: &[&str]) -> Command {
        command(words, Some(&self.socket))
    }

    fn neap(&self, words: &[&str]) -> Output {
        self.command(words).output().expect("run neap")
    }

    /// Every request so far; the stand-in is stopped.
    fn requests(&self) -> Vec<Asked> {
        drop(UnixStream::connect(&self.socket));
        self.asked.iter().collect()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        drop(UnixStream::connect(&self.socket));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the stand-in failed");
        }
    }
}

fn read_head(stream: &mut impl Read) -> String {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return String::new(),
        }
    }
    String::from_utf8(head).expect("a head in ASCII")
}

fn command(words: &[&str], socket: Option<&Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_neap"));
    command.args(words).env_remove("NEAP_SOCKET").stdin(Stdio::null());
    if let Some(socket) = socket {
        command.env("NEAP_SOCKET", socket);
    }
    command
}

fn neap(words: &[&str], socket: Option<&Path>) -> Output {
    command(words, socket).output().expect("run neap")
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("an exit code, no signal")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
