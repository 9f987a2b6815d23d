//! The way of an event: in over HTTP or MQTT, through a container, out to a broker.

use super::{SOON, Site, alone, function, possible};
use crate::support::{Subscriber, http, publish, publish_with, wait_until};

#[test]
fn http_invocation_answers_with_the_output() {
    if !possible() {
        return;
    }
    let node = alone("http");
    node.deploy(&function("upper", "tr a-z A-Z; echo seen >&2", ""));

    let answer = node.post("/function/upper", "21 degrees");
    let by_cli = node.neap_ok(&["invoke", "upper", "--data", "by hand"]);

    assert_eq!((answer.status, answer.text().as_str()), (200, "21 DEGREES"));
    assert_eq!(by_cli.trim_end(), "BY HAND");
    wait_until(SOON, "the log has stderr's lines", || node.neap_ok(&["logs", "upper"]).contains("seen"));
}

#[test]
fn http_trigger_has_a_path_of_its_own() {
    if !possible() {
        return;
    }
    let node = alone("trigger");
    let trigger = "[[trigger]]\nhttp = \"/thermostat\"\nmethods = [\"POST\"]\n";
    node.deploy(&(function("thermostat", "printf \"$Http_Method $Http_Query \"; cat", "") + trigger));

    let answer = node.post("/thermostat?unit=C", "21");
    let refused = node.get("/thermostat");

    assert_eq!((answer.status, answer.text().as_str()), (200, "POST unit=C 21"));
    assert_eq!(refused.status, 405);
}

#[test]
fn reading_over_mqtt_becomes_a_cloudevent_at_the_uplink() {
    if !possible() {
        return;
    }
    let site = Site::start("mqtt");
    site.node.deploy(
        &(function("thermostat", "printf \"$CE_SUBJECT \"; cat", "")
            + "[[trigger]]\nmqtt = \"sensors/+/temperature\"\n\
               [[output]]\nto = \"uplink\"\ntopic = \"site/{node}/{topic.1}\"\n"),
    );
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["site/#"]);

    site.local.wait_subscribed("neap-", "sensors/+/temperature");
    publish(site.local.port(), "sensors/hall/temperature", "21");
    publish_with(site.local.port(), "sensors/yard/temperature", "7", &["-V", "311"]);
    let mut messages = cloud.wait_for(2, SOON);
    messages.sort_by(|a, b| a.topic.cmp(&b.topic));

    let texts: Vec<_> = messages.iter().map(|message| (message.topic.as_str(), message.text())).collect();
    assert_eq!(
        texts,
        [
            ("site/mqtt/hall", "sensors/hall/temperature 21".to_owned()),
            ("site/mqtt/yard", "sensors/yard/temperature 7".to_owned())
        ]
    );
    assert_eq!(messages[0].user_property("specversion"), Some("1.0"));
    let ids: Vec<_> = messages.iter().filter_map(|message| message.user_property("id")).collect();
    assert!(ids.len() == 2 && ids[0] != ids[1], "{messages:?}");
    assert!(messages.iter().all(|message| message.qos == 1 && !message.retain));
}

#[test]
fn uplink_of_3_1_1_gets_structured_cloudevents() {
    if !possible() {
        return;
    }
    let site = Site::start_with(crate::support::Node::builder("old").uplink_line("version = \"3.1.1\""));
    site.node.deploy(
        &(function("echo", "cat", "")
            + "[[trigger]]\nmqtt = \"in\"\n[[output]]\nto = \"uplink\"\ntopic = \"out\"\n"),
    );
    let cloud = Subscriber::start_v311(site.uplink.port(), "cloud", &["out"]);

    site.local.wait_subscribed("neap-", "in");
    publish(site.local.port(), "in", r#"{"celsius": 21.5}"#);
    let message = cloud.wait_for(1, SOON).remove(0);

    let event: serde_json::Value = serde_json::from_slice(&message.payload).expect("structured mode is JSON");
    assert_eq!(event["specversion"], "1.0");
    assert_eq!(event["data"]["celsius"], 21.5);
    assert!(event["id"].is_string() && event["source"].is_string() && event["type"].is_string(), "{event}");
}

#[test]
fn output_goes_to_the_broker_on_site_and_to_another_function() {
    if !possible() {
        return;
    }
    let site = Site::start("chain");
    site.node.deploy(
        &(function("first", "printf \"one-\"; cat", "")
            + "[[trigger]]\nmqtt = \"button\"\n[[output]]\nto = \"event\"\ntype = \"com.example.pressed\"\n"),
    );
    site.node.deploy(
        &(function("second", "printf \"$CE_TYPE two-\"; cat", "")
            + "[[trigger]]\nevent = \"com.example.pressed\"\n[[output]]\nto = \"local\"\ntopic = \"relay/set\"\n"),
    );
    let relay = Subscriber::start(site.local.port(), "relay", &["relay/#"]);

    site.local.wait_subscribed("neap-", "button");
    publish(site.local.port(), "button", "x");
    let message = relay.wait_for(1, SOON).remove(0);

    assert_eq!(message.text(), "com.example.pressed two-one-x");
}

#[test]
fn forward_passes_a_message_on_without_a_function() {
    if !possible() {
        return;
    }
    let site = Site::start_with(
        crate::support::Node::builder("forward")
            .config("[[forward]]\nmqtt = \"raw/#\"\ntopic = \"site/{node}/{topic}\"\n"),
    );
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["site/#"]);

    site.local.wait_subscribed("neap-", "raw/#");
    publish(site.local.port(), "raw/a/b", [0x00, 0xff, 0x80]);
    let message = cloud.wait_for(1, SOON).remove(0);

    assert_eq!((message.topic.as_str(), message.payload), ("site/forward/raw/a/b", vec![0x00, 0xff, 0x80]));
}

#[test]
fn async_call_is_committed_before_it_is_answered() {
    if !possible() {
        return;
    }
    let site = Site::start("async");
    site.node.deploy(&(function("echo", "cat", "") + "[[output]]\nto = \"uplink\"\ntopic = \"out\"\n"));
    let cloud = Subscriber::start(site.uplink.port(), "cloud", &["out"]);

    let answer = site.node.post("/async-function/echo", "later");
    let id = answer.header("x-call-id").expect("a call has an id").to_owned();
    let message = cloud.wait_for(1, SOON).remove(0);

    assert_eq!((answer.status, message.text().as_str()), (202, "later"));
    assert!(!id.is_empty());
    assert_eq!(http::post(site.node.port(), "/async-function/nobody", "x").expect("an answer").status, 404);
}

#[test]
fn failing_event_is_retried_then_set_aside_and_can_be_redriven() {
    if !possible() {
        return;
    }
    let node = alone("dead");
    node.deploy(&function(
        "broken",
        "echo no sensor >&2; exit 3",
        "[retry]\nattempts = 2\nbackoff = \"100ms\"",
    ));

    assert_eq!(node.post("/async-function/broken", "x").status, 202);
    wait_until(SOON, "the event is dead", || node.status()["dead_events"] == 1);
    let dead = node.neap_json(&["events", "--state", "dead"]);
    let event = &dead[0];
    node.deploy(&function("broken", "cat", "[retry]\nattempts = 2\nbackoff = \"100ms\""));
    node.neap_ok(&["events", "redrive", event["id"].as_str().expect("an event has an id")]);

    assert_eq!(event["attempts"], 2, "{dead}");
    assert!(event["last_error"].as_str().is_some_and(|error| error.contains('3')), "{dead}");
    wait_until(SOON, "the redriven event ran", || {
        let status = node.status();
        status["dead_events"] == 0 && status["inbox"]["depth"] == 0
    });
    // A synchronous call is told at once.
    node.deploy(&function("broken", "exit 3", ""));
    assert_eq!(node.post("/function/broken", "x").status, 502);
}
