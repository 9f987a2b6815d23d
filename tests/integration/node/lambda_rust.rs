//! Handler lambda, with AWS's own runtime for Rust in the container.

use super::{SOON, possible};
use crate::support::rust::rust_lambda_image;
use crate::support::{Node, http, wait_until};
use std::io::{Read, Write};
use std::net::TcpStream;

fn function(name: &str, env: &str) -> String {
    format!(
        "name = \"{name}\"\nimage = \"rustlambda:1\"\nenv = {{ {env} }}\n[retry]\nattempts = 1\n\
         [scale]\nmax = 1\n[limits]\ncpu = 2\ntimeout = \"20s\"\nstart = \"60s\"\n"
    )
}

fn node(name: &str) -> Node {
    let node = Node::builder(name).start();
    node.import(rust_lambda_image());
    node
}

#[test]
fn runtime_for_rust_gets_events_answers_and_fails_in_every_way() {
    if !possible() {
        return;
    }
    let node = node("lambda-rust");
    // Nothing names the platform: the image's `bootstrap` does.
    node.deploy(&function("f", ""));
    node.deploy(&function("broken", "FAIL_INIT = \"1\""));
    node.deploy(&function("late", "").replace("20s", "2s"));
    let ask = |body: &str| node.post("/function/f", body);
    let failure = |answer: &http::Response| answer.header("x-neap-failure").map(str::to_owned);

    let good = ask(r#"{"celsius": 21.5}"#);
    assert_eq!((good.status, &good.json()["event"]["celsius"]), (200, &serde_json::json!(21.5)));
    let pid = good.json()["pid"].clone();

    let handled = ask(r#"{"do": "fail"}"#);
    assert_eq!((handled.status, failure(&handled).as_deref()), (502, Some("answer")));
    assert!(handled.text().contains("bad reading"), "{}", handled.text());
    let panicked = ask(r#"{"do": "panic"}"#);
    assert_eq!((panicked.status, failure(&panicked).as_deref()), (502, Some("answer")));
    assert!(panicked.text().contains("out of range"), "{}", panicked.text());

    let most = ask(r#"{"do": "large", "bytes": 6000000}"#);
    assert_eq!((most.status, most.body.len()), (200, 6_000_002));
    let large = ask(r#"{"do": "large", "bytes": 7000000}"#);
    assert_eq!((large.status, failure(&large).as_deref()), (502, Some("output_too_large")));
    assert_eq!(ask("{}").json()["pid"], pid, "the instance has lived through all of it");

    let exited = ask(r#"{"do": "exit"}"#);
    assert_eq!((exited.status, failure(&exited).as_deref()), (502, Some("exit")), "{}", exited.text());
    assert_eq!(ask("{}").status, 200, "another has taken its place");

    let late = node.post("/function/late", r#"{"do": "sleep"}"#);
    assert_eq!((late.status, failure(&late).as_deref()), (504, Some("timed_out")));
    let init = node.post("/function/broken", "{}");
    assert_eq!((init.status, failure(&init).as_deref()), (502, Some("start")));
    assert!(init.text().contains("no such sensor") && init.text().contains("101"), "{}", init.text());

    wait_until(SOON, "the logs have Lambda's lines", || {
        let log = node.neap_ok(&["logs", "f", "--tail", "1000"]);
        let said = ["Runtime exited with error: exit status 9", "Runtime.ExitError", "Init Duration: "];
        said.iter().all(|line| log.contains(line))
            && node.neap_ok(&["logs", "late"]).contains("Task timed out after 2.00 seconds")
    });
    assert!(node.neap_ok(&["show", "f"]).contains("lambda"));
}

#[test]
fn streamed_response_reaches_the_caller_before_its_end() {
    if !possible() {
        return;
    }
    let node = node("lambda-stream");
    node.deploy(&function("f", ""));
    node.deploy(
        &(function("stored", "")
            + "payload = \"1MiB\"\n[[output]]\nto = \"event\"\ntype = \"com.example.never\"\n"),
    );

    let whole = node.post("/function/f", r#"{"do": "stream"}"#);
    assert_eq!((whole.status, whole.header("x-made")), (203, Some("in pieces")), "{}", whole.text());
    assert_eq!(whole.text(), "one two three", "what it says of its head is none of the body");
    assert_eq!(node.post("/function/f", "{}").status, 200, "the next event finds the runtime waiting");
    // Where the output is needed, it is collected.
    let collected = node.post("/function/stored", r#"{"do": "stream"}"#);
    assert_eq!(collected.text(), "one two three");

    let mut stream = TcpStream::connect(("127.0.0.1", node.port())).expect("the node listens");
    stream.set_read_timeout(Some(SOON)).expect("a timeout");
    let body = r#"{"do": "hang"}"#;
    write!(stream, "POST /function/f HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .expect("sent");
    let mut read = Vec::new();
    let mut piece = [0; 4096];
    while !String::from_utf8_lossy(&read).contains("one ") {
        let amount = stream.read(&mut piece).expect("the first piece comes while the function runs");
        assert!(amount > 0, "ended before its first piece: {}", String::from_utf8_lossy(&read));
        read.extend_from_slice(&piece[..amount]);
    }
    drop(stream);
    // It still works on what nobody waits for, until its time is over.
    wait_until(SOON * 2, "its time is over", || {
        node.neap_ok(&["logs", "f", "--tail", "1000"]).contains("Task timed out after 20.00 seconds")
            || node.post("/function/f", "{}").status == 200
    });
    assert_eq!(node.post("/function/f", "{}").status, 200);
}
