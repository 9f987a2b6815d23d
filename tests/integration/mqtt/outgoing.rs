//! Outbox → broker.

use super::gateway::{Gateway, SOON, Setup, broker};
use crate::support::recording::Options;
use crate::support::{Mosquitto, RecordingBroker, Subscriber, TestDir, wait_until};
use neap::config::{Broker, MqttVersion};
use neap::model::Target;
use std::time::{Duration, Instant};

fn uplink(broker: Broker) -> Setup {
    Setup { uplink: Some(broker), ..Setup::default() }
}

#[test]
fn deliveries_are_cloudevents_in_binary_mode_on_mqtt_5() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let cloud = Subscriber::start(mosquitto.port(), "cloud", &["site/#"]);
    let gateway = Gateway::start(&dir, uplink(broker(mosquitto.port(), "neap-gw")));

    gateway.owe(Target::Uplink, "site/gw", b"21.5", Some("text/plain"));
    let message = cloud.wait_for(1, SOON).remove(0);

    assert_eq!((message.topic.as_str(), message.text().as_str(), message.qos), ("site/gw", "21.5", 1));
    assert_eq!(message.property("content-type"), Some("text/plain"));
    for (name, value) in [
        ("specversion", "1.0"),
        ("source", "/gw/function/f"),
        ("type", "neap.function.output"),
        ("subject", "a/b"),
        ("time", "1970-01-01T00:00:00.000Z"),
        ("seq", "7"),
    ] {
        assert_eq!(message.user_property(name), Some(value), "{name}");
    }
    assert_eq!(message.user_property("id").map(str::len), Some(32));
    gateway.wait_drained(Target::Uplink);
}

#[test]
fn deliveries_are_structured_on_3_1_1_and_raw_is_the_data_alone() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let cloud = Subscriber::start_v311(mosquitto.port(), "cloud", &["#"]);
    let to = Broker { version: MqttVersion::V311, ..broker(mosquitto.port(), "neap-gw") };
    let gateway = Gateway::start(&dir, uplink(to.clone()));
    gateway.owe(Target::Uplink, "a", br#"{"t":21.50}"#, Some("application/json"));
    let message = cloud.wait_for(1, SOON).remove(0);
    let json: serde_json::Value = serde_json::from_slice(&message.payload).expect("JSON");
    assert_eq!((json["specversion"].as_str(), json["data"]["t"].as_f64()), (Some("1.0"), Some(21.5)));
    drop(gateway);

    let gateway = Gateway::start(&dir, Setup { raw: true, ..uplink(to.clone()) });
    gateway.owe(Target::Uplink, "b", &[0xFF, 0], None);
    assert_eq!(cloud.wait_for(2, SOON)[1].payload, [0xFF, 0]);
    drop(gateway);

    // An actuator on site gets what the function wrote, nothing around it.
    let gateway = Gateway::start(&dir, Setup { local: Some(to), ..Setup::default() });
    gateway.owe(Target::Local, "relay/7/set", b"on", Some("text/plain"));
    assert_eq!(cloud.wait_for(3, SOON)[2].text(), "on");
}

#[test]
fn backlog_drains_in_order_within_a_second_of_the_link_coming_back() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let dir = TestDir::new("mqtt");
        let mut recording = RecordingBroker::stopped(Options { receive_max: Some(20), ..Options::default() });
        let to = Broker { version, ..broker(recording.port(), "neap-gw") };
        let gateway = Gateway::start(&dir, uplink(to));
        for n in 0..300 {
            gateway.owe(Target::Uplink, "site/gw", n.to_string().as_bytes(), None);
        }
        wait_until(SOON, "it has noticed", || gateway.uplink.get().state == "waiting");

        recording.restart();
        gateway.wait_up(Target::Uplink);
        let up = Instant::now();
        wait_until(SOON, "the first", || !recording.records().is_empty());
        assert!(up.elapsed() < Duration::from_secs(1));
        gateway.wait_drained(Target::Uplink);

        let records = recording.records();
        let data = |payload: &[u8]| -> Option<u32> {
            let text = match serde_json::from_slice::<serde_json::Value>(payload).ok()? {
                serde_json::Value::Object(object) => object["data"].to_string(),
                other => other.to_string(),
            };
            text.parse().ok()
        };
        let numbers: Vec<u32> = records.iter().filter_map(|r| data(&r.payload())).collect();
        assert_eq!(numbers, (0..300).collect::<Vec<_>>());
    }
}

#[test]
fn broker_killed_again_and_again_gets_everything_in_order_of_first_arrival() {
    let dir = TestDir::new("mqtt");
    let mut recording = RecordingBroker::start(Options::default());
    let gateway = Gateway::start(&dir, uplink(broker(recording.port(), "neap-gw")));
    for round in 0..6 {
        for n in 0..100 {
            gateway.owe(Target::Uplink, "site/gw", (round * 100 + n).to_string().as_bytes(), None);
            if n == 50 {
                recording.kill();
            }
        }
        recording.restart();
    }
    gateway.wait_drained(Target::Uplink);

    let mut seen = Vec::new();
    for record in recording.records() {
        let number: u32 = record.text().parse().expect("a number");
        if !seen.contains(&number) {
            seen.push(number);
        }
    }
    assert_eq!(seen, (0..600).collect::<Vec<_>>());
}

#[test]
fn refused_delivery_is_set_aside_and_the_queue_moves_on() {
    let dir = TestDir::new("mqtt");
    let refuse = vec![("secret".to_owned(), 0x87)];
    let recording = RecordingBroker::start(Options { refuse, ..Options::default() });
    let gateway = Gateway::start(&dir, uplink(broker(recording.port(), "neap-gw")));

    gateway.owe(Target::Uplink, "a", b"1", None);
    gateway.owe(Target::Uplink, "secret/x", b"2", None);
    gateway.owe(Target::Uplink, "a", b"3", None);
    gateway.wait_drained(Target::Uplink);

    let (topic, reason) = gateway.wait_dead_delivery();
    assert_eq!(topic, "secret/x");
    assert!(reason.contains("not authorized"), "{reason}");
    assert_eq!(recording.records().iter().map(|r| r.text()).collect::<Vec<_>>(), ["1", "3"]);
}

#[test]
fn delivery_that_makes_the_broker_hang_up_is_found_and_set_aside() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let dir = TestDir::new("mqtt");
        let disconnect = vec!["poison".to_owned()];
        let recording = RecordingBroker::start(Options { disconnect, ..Options::default() });
        let to = Broker { version, ..broker(recording.port(), "neap-gw") };
        let gateway = Gateway::start(&dir, Setup { raw: true, ..uplink(to) });
        for n in 0..20 {
            gateway.owe(Target::Uplink, if n == 7 { "poison" } else { "a" }, n.to_string().as_bytes(), None);
        }
        gateway.wait_drained(Target::Uplink);

        let (topic, reason) = gateway.wait_dead_delivery();
        assert_eq!(topic, "poison");
        assert!(reason.contains("alone in flight"), "{reason}");
        let mut texts: Vec<u32> = recording.records().iter().filter_map(|r| r.text().parse().ok()).collect();
        texts.dedup();
        assert_eq!(texts, (0..20).filter(|n| *n != 7).collect::<Vec<_>>());
    }
}

/// A broker that reads them together drops the good ones before the poison unacknowledged. Each
/// connection that ends doubles the wait for the next: one for each good one would take hours.
#[test]
fn good_deliveries_that_fall_with_a_poisonous_one_cost_one_connection_together() {
    let dir = TestDir::new("mqtt");
    let disconnect = vec!["poison".to_owned()];
    let mut recording = RecordingBroker::stopped(Options { disconnect, ..Options::default() });
    let gateway = Gateway::start(&dir, Setup { raw: true, ..uplink(broker(recording.port(), "neap-gw")) });
    for n in 0..60 {
        gateway.owe(Target::Uplink, if n == 50 { "poison" } else { "a" }, n.to_string().as_bytes(), None);
    }
    recording.restart();
    gateway.wait_drained(Target::Uplink);

    assert_eq!(gateway.wait_dead_delivery().0, "poison");
    let mut texts: Vec<u32> = recording.records().iter().filter_map(|r| r.text().parse().ok()).collect();
    texts.dedup();
    assert_eq!(texts, (0..60).filter(|n| *n != 50).collect::<Vec<_>>());
}

#[test]
fn delivery_larger_than_the_broker_takes_is_set_aside_before_it_is_sent() {
    let dir = TestDir::new("mqtt");
    let mosquitto = Mosquitto::builder().line("max_packet_size 2000").start();
    let gateway = Gateway::start(&dir, uplink(broker(mosquitto.port(), "neap-gw")));

    gateway.owe(Target::Uplink, "big", &[7; 5000], None);
    gateway.owe(Target::Uplink, "small", b"x", None);
    gateway.wait_drained(Target::Uplink);

    let (topic, reason) = gateway.wait_dead_delivery();
    assert_eq!(topic, "big");
    assert!(reason.contains("at most 2000"), "{reason}");
    assert_eq!(mosquitto.log().matches("New client connected").count(), 1, "and no reconnect");
}

#[test]
fn old_broker_is_spoken_to_in_its_version() {
    let dir = TestDir::new("mqtt");
    let recording = RecordingBroker::start(Options { v311_only: true, ..Options::default() });
    let gateway = Gateway::start(&dir, uplink(broker(recording.port(), "neap-gw")));

    gateway.owe(Target::Uplink, "a", b"1", None);
    gateway.wait_drained(Target::Uplink);

    let json: serde_json::Value = serde_json::from_slice(&recording.records()[0].payload()).expect("JSON");
    assert_eq!(json["data"], 1);
}
