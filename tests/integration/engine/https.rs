//! The uplink that takes batches: what is acknowledged, refused, denied, and what a kill does.

use super::{SOON, function, possible};
use crate::support::receiver::{Receiver, have_sdk};
use crate::support::{Node, shell_image, wait_until};
use serde_json::json;

fn start(receiver: &Receiver, name: &str, line: &str) -> Node {
    let ca = receiver.certificates.ca.display();
    let node = Node::builder(name)
        .uplink(&receiver.url())
        .uplink_line(&format!("tls = {{ ca = \"{ca}\" }}\n{line}"))
        .start();
    node.import(shell_image());
    node.deploy(&function("echo", "cat", "[[output]]\nto = \"uplink\"\ntopic = \"site/{function}\""));
    node
}

fn send(node: &Node, texts: impl IntoIterator<Item = String>) {
    for text in texts {
        assert_eq!(node.post("/function/echo", text).status, 200);
    }
}

fn numbered(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    range.map(|n| format!("reading {n:03}."))
}

fn dead(node: &Node) -> serde_json::Value {
    node.neap_json(&["deliveries", "--dead"])
}

#[test]
fn deliveries_come_in_batches_in_order_over_one_connection() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let receiver = Receiver::start(json!({ "status": 503 }));
    let node = start(&receiver, "batches", "");
    send(&node, numbered(0..30));
    node.wait_link("uplink", "waiting");

    receiver.rules(json!({}));
    wait_until(SOON, "all arrived", || receiver.events().len() == 30);
    send(&node, numbered(30..33));
    wait_until(SOON, "the fresh ones arrived", || receiver.events().len() == 33);

    assert_eq!(receiver.data(), numbered(0..33).collect::<Vec<_>>());
    let (events, records) = (receiver.events(), receiver.records());
    assert_eq!(events[0]["neaptopic"], "site/echo");
    assert_eq!(events[0]["source"], "/batches/function/echo");
    assert_eq!((&events[0]["neapreplayed"], &events[32]["neapreplayed"]), (&json!("true"), &json!(null)));
    assert!(records.iter().all(|record| record["path"] == "/in/events?site=7"), "{records:?}");
    assert_eq!(records[30]["connection"], records[32]["connection"], "the connection is kept");
    wait_until(SOON, "the outbox is empty", || node.status()["outbox"]["depth"] == 0);
    assert_eq!(node.link_state("uplink"), "up");
}

#[test]
fn one_bad_event_is_found_in_its_batch_and_the_queue_moves_on() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let receiver = Receiver::start(json!({ "status": 503 }));
    let node = start(&receiver, "poison", "");
    send(&node, numbered(0..20));
    node.wait_link("uplink", "waiting");

    receiver.rules(json!({ "refuse": { "reading 007": 422, "reading 013": 403 } }));
    wait_until(SOON, "the others arrived", || receiver.events().len() == 18);

    let expected: Vec<_> = numbered(0..20).filter(|t| !t.contains("007") && !t.contains("013")).collect();
    assert_eq!(receiver.data(), expected);
    wait_until(SOON, "two are dead", || dead(&node).as_array().is_some_and(|list| list.len() == 2));
    assert!(dead(&node).to_string().contains("the receiver answered 422"), "{}", dead(&node));
    receiver.rules(json!({}));
    node.neap_ok(&["deliveries", "redrive", "--all"]);
    wait_until(SOON, "they arrive when they are taken", || receiver.events().len() == 20);
}

#[test]
fn a_receiver_that_does_not_know_us_costs_no_delivery() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let receiver = Receiver::start(json!({ "authorization": "Bearer right" }));
    let token = receiver.certificates.ca.with_file_name("token");
    std::fs::write(&token, "wrong\n").expect("write the token");
    let node = start(&receiver, "denied", &format!("token_file = \"{}\"", token.display()));
    send(&node, numbered(0..10));
    wait_until(SOON, "it is denied", || node.status().to_string().contains("the receiver answered 401"));

    std::fs::write(&token, "right\n").expect("write the token");

    wait_until(SOON, "all arrived", || receiver.events().len() == 10);
    assert_eq!(dead(&node), json!([]));
}

#[test]
fn retry_after_is_waited_for() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let receiver = Receiver::start(json!({ "status": 429, "retry_after": 600 }));
    let node = start(&receiver, "later", "");
    send(&node, numbered(0..1));

    node.wait_link("uplink", "waiting");
    let status = node.status();
    let retry = status["links"][1]["retry_in_ms"].as_u64().expect("a wait");
    assert!((500_000..=600_000).contains(&retry), "{status}");
    assert_eq!(receiver.requests(), 1);
}

#[test]
fn a_delivery_that_kills_the_receiver_is_found_and_set_aside() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let receiver = Receiver::start(json!({ "status": 503 }));
    let node = start(&receiver, "killer", "");
    send(&node, numbered(0..6));
    node.wait_link("uplink", "waiting");

    receiver.rules(json!({ "hang_up": ["reading 002"] }));
    wait_until(SOON, "the others arrived", || receiver.events().len() == 5);

    assert!(dead(&node).to_string().contains("while it was alone"), "{}", dead(&node));
}

#[test]
fn nothing_is_lost_when_daemon_and_receiver_are_killed() {
    if !possible() || !have_sdk("https uplink") {
        return;
    }
    let mut receiver = Receiver::start(json!({}));
    let mut node = start(&receiver, "killed", "");
    for round in 0..6 {
        send(&node, numbered(round * 20..(round + 1) * 20));
        if round % 2 == 0 {
            node.kill();
            node.start();
        } else {
            receiver.kill();
            send(&node, numbered(200 + round..201 + round));
            receiver.restart();
        }
    }

    let distinct = || {
        let mut ids: Vec<_> = receiver.events().iter().map(|event| event["id"].to_string()).collect();
        let count = ids.len();
        ids.sort();
        ids.dedup();
        (ids.len(), count)
    };
    wait_until(SOON, "all arrived", || distinct().0 == 123);
    wait_until(SOON, "the outbox is empty", || node.status()["outbox"]["depth"] == 0);
    let (_, count) = distinct();
    // One batch for each kill at most.
    assert!(count <= 123 + 6 * 20, "{count} came");
}
