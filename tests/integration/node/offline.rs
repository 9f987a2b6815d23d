//! What is kept while the uplink is away, and what arrives when it is back.

use super::{SOON, Site, function, possible};
use crate::support::{Node, RecordingBroker, Subscriber, recording, shell_image, wait_until};
use std::collections::BTreeSet;

const ECHO_OUT: &str = "[[output]]\nto = \"uplink\"\ntopic = \"out\"\n";

#[test]
fn outage_of_the_uplink_loses_nothing() {
    if !possible() {
        return;
    }
    let mut site = Site::start("outage");
    site.node.deploy(&(function("echo", "cat", "") + ECHO_OUT));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);
    assert_eq!(site.node.post("/async-function/echo", "before").status, 202);
    cloud.wait_for(1, SOON);

    let before = cloud.stop();
    site.uplink.stop();
    for number in 0..20 {
        assert_eq!(site.node.post("/async-function/echo", format!("n{number}")).status, 202);
    }
    wait_until(SOON, "20 deliveries wait", || site.node.status()["outbox"]["depth"] == 20);
    let listed = site.node.neap_json(&["deliveries"]);
    site.node.restart();
    assert_eq!(site.node.status()["outbox"]["depth"], 20, "a restart keeps them");
    site.uplink.start();
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);
    let after = cloud.wait_for(20, SOON);

    assert_eq!(before.len(), 1);
    assert_eq!(listed.as_array().map(Vec::len), Some(20), "{listed}");
    let texts: BTreeSet<_> = after.iter().map(|message| message.text()).collect();
    assert_eq!(texts, (0..20).map(|number| format!("n{number}")).collect());
    let ids: BTreeSet<_> = after.iter().filter_map(|message| message.user_property("id")).collect();
    assert_eq!(ids.len(), 20, "each delivery has an id of its own");
    wait_until(SOON, "the outbox is empty", || site.node.status()["outbox"]["depth"] == 0);
}

#[test]
fn deliveries_of_one_function_arrive_in_order() {
    if !possible() {
        return;
    }
    let mut uplink = RecordingBroker::stopped(recording::Options::default());
    let node = Node::builder("order").uplink(&uplink.url()).start();
    node.import(shell_image());
    // One instance at a time: the invocations end in the order of their events.
    node.deploy(&(function("echo", "cat", "[scale]\nmax = 1") + ECHO_OUT));
    for number in 0..30 {
        assert_eq!(node.post("/async-function/echo", number.to_string()).status, 202);
    }
    wait_until(SOON, "30 deliveries wait", || node.status()["outbox"]["depth"] == 30);

    uplink.restart();
    wait_until(SOON, "the outbox is empty", || node.status()["outbox"]["depth"] == 0);

    let numbers: Vec<_> = uplink.records().iter().map(|record| record.text()).collect();
    assert_eq!(numbers, (0..30).map(|number| number.to_string()).collect::<Vec<_>>());
}

#[test]
fn delivery_refused_for_good_is_set_aside_and_the_queue_moves_on() {
    if !possible() {
        return;
    }
    let refuse = vec![("forbidden".to_owned(), 0x87)];
    let uplink = RecordingBroker::start(recording::Options { refuse, ..Default::default() });
    let node = Node::builder("refused").uplink(&uplink.url()).start();
    node.import(shell_image());
    let output = |topic: &str| format!("[[output]]\nto = \"uplink\"\ntopic = \"{topic}\"\n");
    node.deploy(&(function("outcast", "cat", "") + &output("forbidden")));
    node.deploy(&(function("citizen", "cat", "") + &output("allowed")));

    assert_eq!(node.post("/async-function/outcast", "x").status, 202);
    assert_eq!(node.post("/async-function/citizen", "y").status, 202);
    wait_until(SOON, "the queue has moved on", || {
        let status = node.status();
        uplink.count() == 1 && status["outbox"]["depth"] == 0 && status["dead_deliveries"] == 1
    });

    assert_eq!(uplink.records().iter().map(|record| record.text()).collect::<Vec<_>>(), ["y"]);
    let dead = node.neap_json(&["deliveries", "--dead"]);
    assert_eq!(dead[0]["topic"], "forbidden", "{dead}");
}

#[test]
fn uplink_that_speaks_only_3_1_1_is_reached_by_itself() {
    if !possible() {
        return;
    }
    let uplink = RecordingBroker::start(recording::Options { v311_only: true, ..Default::default() });
    let node = Node::builder("auto").uplink(&uplink.url()).start();
    node.import(shell_image());
    node.deploy(&(function("echo", "cat", "") + ECHO_OUT));

    assert_eq!(node.post("/async-function/echo", "x").status, 202);
    wait_until(SOON, "it arrived", || uplink.count() == 1);

    assert!(uplink.records()[0].text().contains("\"specversion\":\"1.0\""), "structured on 3.1.1");
}
