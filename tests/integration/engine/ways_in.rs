//! Cron ticks, POST /events, and functions that are triggered by each other's outputs.

use super::{SOON, alone, function, log, possible};
use crate::support::receiver::{have_sdk, script};
use crate::support::{http, wait_until};

const BINARY: [(&str, &str); 4] =
    [("ce-specversion", "1.0"), ("ce-id", "1"), ("ce-source", "/door"), ("ce-type", "door.opened")];

#[test]
fn the_sdks_events_come_in_by_every_mode() {
    if !possible() || !have_sdk("the SDK's events") {
        return;
    }
    let node = alone("sdk");
    node.deploy(&function(
        "door",
        "echo \"$CE_ID $CE_SOURCE $CE_TYPE $(cat)\" >&2",
        "[[trigger]]\nevent = \"com.example.door\"",
    ));

    let url = format!("http://127.0.0.1:{}/events", node.port());
    let sent = script("send_events.py").args([&url, "com.example.door"]).output().expect("run the SDK");

    assert_eq!(String::from_utf8_lossy(&sent.stdout).trim(), "202\n202\n202", "{sent:?}");
    for id in ["binary", "structured", "batch-1", "batch-2"] {
        let line = format!("{id} /sdk com.example.door");
        wait_until(SOON, &line, || {
            log(&node, "door").iter().any(|l| l.contains(&line) && l.contains(&format!("\"mode\": \"{id}\"")))
        });
    }
}

#[test]
fn events_are_refused_before_any_of_a_batch_is_stored() {
    if !possible() {
        return;
    }
    let node = alone("events");
    let manifest = function("f", "cat >&2", "[[trigger]]\nevent = \"t\"");
    node.deploy(&manifest.replace("memory =", "payload = \"1KiB\", memory ="));
    let post = |headers: &[(&str, &str)], body: &str| {
        let answer = http::request(node.port(), "POST", "/events", headers, body.as_bytes());
        answer.expect("an answer").status
    };
    let batch = [("content-type", "application/cloudevents-batch+json")];
    let event = |kind: &str, data: &str| {
        format!(r#"{{"specversion":"1.0","id":"{kind}","source":"/s","type":"{kind}","data":"{data}"}}"#)
    };

    assert_eq!(post(&[], "plain"), 400);
    assert_eq!(post(&BINARY, "nobody"), 404);
    assert_eq!(post(&batch, &format!("[{},{}]", event("t", "x"), event("other", "y"))), 404);
    assert_eq!(post(&batch, &format!("[{},{{}}]", event("t", "x"))), 400);
    assert_eq!(post(&batch, &format!("[{},{}]", event("t", "x"), event("t", &"y".repeat(2000)))), 413);
    assert_eq!(node.status()["inbox"]["depth"], 0);
    assert_eq!(log(&node, "f"), [""; 0]);

    assert_eq!(post(&batch, &format!("[{}]", event("t", "at last"))), 202);
    assert_eq!(post(&batch, "[]"), 202);
    wait_until(SOON, "the event ran", || log(&node, "f").iter().any(|line| line.contains("at last")));
}

#[test]
fn an_event_that_its_sender_repeats_runs_once() {
    if !possible() {
        return;
    }
    let node = alone("repeat");
    node.deploy(&function("f", "echo ran $CE_ID >&2", "[[trigger]]\nevent = \"door.opened\""));

    for _ in 0..3 {
        assert_eq!(
            http::request(node.port(), "POST", "/events", &BINARY, b"x").expect("an answer").status,
            202
        );
    }
    let mut other = BINARY;
    other[1].1 = "2";
    assert_eq!(http::request(node.port(), "POST", "/events", &other, b"x").expect("an answer").status, 202);

    wait_until(SOON, "the other event ran", || log(&node, "f").iter().any(|line| line.contains("ran 2")));
    assert_eq!(log(&node, "f").iter().filter(|line| line.contains("ran 1")).count(), 1);
}

#[test]
fn functions_chain_by_the_types_of_their_outputs() {
    if !possible() {
        return;
    }
    let node = alone("chain");
    node.deploy(&function(
        "first",
        "printf 'one '; cat",
        "[[trigger]]\nevent = \"door.opened\"\n[[output]]\nto = \"event\"\ntype = \"middle\"",
    ));
    node.deploy(&function(
        "second",
        "printf 'two '; cat",
        "[[trigger]]\nevent = \"middle\"\n[[output]]\nto = \"event\"\ntype = \"end\"",
    ));
    node.deploy(&function("third", "echo \"$(cat) from $CE_SOURCE\" >&2", "[[trigger]]\nevent = \"end\""));

    let answer = http::request(node.port(), "POST", "/events", &BINARY, b"data").expect("an answer");

    assert_eq!((answer.status, answer.header("x-call-id")), (202, Some("1")));
    wait_until(SOON, "the chain came to its end", || {
        log(&node, "third").iter().any(|line| line.contains("two one data from /chain/function/second"))
    });
}

#[test]
fn a_schedule_ticks_and_goes_on_after_a_kill() {
    if !possible() {
        return;
    }
    let mut node = alone("cron");
    node.deploy(&function(
        "tick",
        "echo \"$CE_TYPE $CE_SUBJECT $CE_TIME\" >&2",
        "[[trigger]]\ncron = \"*/2 * * * * *\"",
    ));
    let ticks = |node: &crate::support::Node| {
        let lines =
            log(node, "tick").into_iter().filter(|line| line.contains("neap.cron.tick */2 * * * * *"));
        lines.map(|line| line.rsplit(' ').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    wait_until(SOON, "two ticks", || ticks(&node).len() >= 2);

    node.kill();
    node.start();
    let before = ticks(&node).len();
    wait_until(SOON, "two ticks more", || ticks(&node).len() >= before + 2);

    let all = ticks(&node);
    let mut times = all.clone();
    times.sort();
    times.dedup();
    // An attempt that the kill interrupted may have said its line before it was made again.
    assert!(times.len() + 1 >= all.len(), "a tick came twice: {all:?}");
    for time in times {
        let second: u32 = time[17..19].parse().expect("a second");
        assert_eq!((second % 2, &time[19..]), (0, ".000Z"), "{time}");
    }
}
