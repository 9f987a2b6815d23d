//! Broker → committed events.

use super::gateway::{Gateway, SOON, Setup, broker, function, function_with, tls};
use crate::support::tls::Certificates;
use crate::support::{Mosquitto, Subscriber, TestDir, publish, publish_lines, publish_with, wait_until};
use neap::config::{Broker, MqttVersion};
use neap::model::function::Retained;
use neap::model::{Failure, Target};
use neap::store::InvocationState;

fn listening(broker: Broker, filter: &str) -> Setup {
    Setup { local: Some(broker), functions: vec![function("f", filter)], ..Setup::default() }
}

/// Waits until the broker has answered a SUBSCRIBE of this gateway.
#[track_caller]
fn wait_subscribed(mosquitto: &Mosquitto, times: usize) {
    wait_until(SOON, "a SUBACK", || mosquitto.log().matches("Sending SUBACK to neap-gw").count() >= times);
}

fn count(mosquitto: &Mosquitto, what: &str) -> usize {
    mosquitto.log().matches(what).count()
}

#[test]
fn messages_of_both_versions_and_qualities_become_events() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let gateway = Gateway::start(&dir, listening(to, "sensors/+/t"));
        gateway.wait_up(Target::Local);
        wait_subscribed(&mosquitto, 1);

        publish_with(mosquitto.port(), "sensors/1/t", "one", &["-q", "0", "-V", "311"]);
        publish_with(
            mosquitto.port(),
            "sensors/2/t",
            "two",
            &["-D", "publish", "content-type", "text/plain"],
        );
        publish(mosquitto.port(), "sensors/2/other", "not wanted");
        let events = gateway.wait_events(2);

        assert_eq!(events.len(), 2);
        assert_eq!(events[0].event.data, b"one");
        assert_eq!(events[0].event.kind, "neap.mqtt.message");
        assert_eq!(events[0].event.source, "/gw/mqtt");
        assert_eq!(events[1].event.subject.as_deref(), Some("sensors/2/t"));
        let content_type = (version == MqttVersion::V5).then_some("text/plain");
        assert_eq!(events[1].event.content_type.as_deref(), content_type);
        wait_until(SOON, "a PUBACK", || count(&mosquitto, "Received PUBACK from neap-gw") == 1);
    }
}

#[test]
fn cloudevents_keep_their_attributes() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let gateway = Gateway::start(&dir, listening(broker(mosquitto.port(), "neap-gw"), "ce/#"));
    wait_subscribed(&mosquitto, 1);

    let mut options = vec!["-D", "publish", "content-type", "application/json"];
    for (name, value) in [
        ("specversion", "1.0"),
        ("id", "e-1"),
        ("source", "/door"),
        ("type", "door.opened"),
        ("time", "2026-03-01T09:00:00Z"),
        ("site", "north"),
    ] {
        options.extend(["-D", "publish", "user-property", name, value]);
    }
    publish_with(mosquitto.port(), "ce/door", "{}", &options);
    let structured = r#"{"specversion":"1.0","id":"e-2","source":"/door","type":"door.shut","subject":"d","data":{"a":1.50}}"#;
    let json = ["-D", "publish", "content-type", "application/cloudevents+json; charset=utf-8"];
    publish_with(mosquitto.port(), "ce/door", structured, &json);
    let events = gateway.wait_events(2);

    let first = &events[0].event;
    assert_eq!(
        (first.id.as_str(), first.source.as_str(), first.kind.as_str()),
        ("e-1", "/door", "door.opened")
    );
    assert_eq!(first.time.map(|t| t.rfc3339()).as_deref(), Some("2026-03-01T09:00:00.000Z"));
    assert_eq!(first.extensions.get("site").map(String::as_str), Some("north"));
    assert_eq!(first.content_type.as_deref(), Some("application/json"));
    let second = &events[1].event;
    assert_eq!((second.id.as_str(), second.kind.as_str()), ("e-2", "door.shut"));
    assert_eq!((second.subject.as_deref(), second.data.as_slice()), (Some("d"), &br#"{"a":1.50}"#[..]));
}

#[test]
fn what_is_published_while_neap_is_away_arrives_when_it_is_back() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let gateway = Gateway::start(&dir, listening(to.clone(), "s/#"));
        wait_subscribed(&mosquitto, 1);
        drop(gateway);
        assert_eq!(count(&mosquitto, "Received DISCONNECT from neap-gw"), 1, "it leaves in order");

        publish_lines(mosquitto.port(), "s/1", (0..500).map(|n| n.to_string()));
        let gateway = Gateway::start(&dir, listening(to, "s/#"));
        let events = gateway.wait_events(500);

        assert_eq!(events.len(), 500);
        for (n, row) in events.iter().enumerate() {
            assert_eq!(row.event.data, n.to_string().as_bytes(), "in order");
        }
        // 3.1.1 doesn't ask again for what the session has; 5 asks without retained messages.
        let asked = if version == MqttVersion::V311 { 1 } else { 2 };
        gateway.wait_up(Target::Local);
        wait_subscribed(&mosquitto, asked);
        assert_eq!(count(&mosquitto, "Sending SUBACK to neap-gw"), asked);
    }
}

#[test]
fn broker_that_is_killed_and_forgets_is_subscribed_again() {
    let (dir, mut mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let gateway = Gateway::start(&dir, listening(broker(mosquitto.port(), "neap-gw"), "s/#"));
    wait_subscribed(&mosquitto, 1);
    publish(mosquitto.port(), "s/1", "before");
    gateway.wait_events(1);

    mosquitto.kill();
    wait_until(SOON, "the link is down", || gateway.local.get().state != "up");
    assert!(gateway.local.get().last_error.is_some());
    mosquitto.start();
    wait_subscribed(&mosquitto, 2);
    publish(mosquitto.port(), "s/1", "after");

    let events = gateway.wait_events(2);
    assert_eq!(events[1].event.data, b"after");
}

#[test]
fn retained_messages_come_once_per_value() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mut mosquitto) = (TestDir::new("mqtt"), Mosquitto::builder().persistent().start());
        publish_with(mosquitto.port(), "state/valve", "open", &["-r"]);
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let functions = vec![
            function("new", "state/#"),
            function_with("each", "state/+", |t| t.retained = Retained::Each),
            function_with("ignore", "state/valve", |t| t.retained = Retained::Ignore),
        ];
        let setup = || Setup { local: Some(to.clone()), functions: functions.clone(), ..Setup::default() };
        let gateway = Gateway::start(&dir, setup());
        wait_until(SOON, "both functions", || {
            let events = gateway.events();
            ["new", "each"].iter().all(|f| events.iter().any(|row| row.function.as_str() == *f))
        });
        let subacks = if version == MqttVersion::V5 { 3 } else { 1 };
        wait_subscribed(&mosquitto, subacks);
        drop(gateway);

        // The session is still there: nothing comes again.
        let before = count(&mosquitto, "Sending PUBLISH to neap-gw");
        let gateway = Gateway::start(&dir, setup());
        gateway.wait_up(Target::Local);
        publish(mosquitto.port(), "state/fence", "live");
        wait_until(SOON, "the live one", || {
            gateway.events().iter().filter(|row| row.event.data == b"live").count() == 2
        });
        let log = mosquitto.log();
        let retained_again = log.matches("Sending PUBLISH to neap-gw").count() - before;
        assert!(retained_again <= 3, "only the live message, for each of three filters at most");
        drop(gateway);

        // The value is another: once more.
        mosquitto.restart();
        publish_with(mosquitto.port(), "state/valve", "shut", &["-r"]);
        let gateway = Gateway::start(&dir, setup());
        wait_until(SOON, "the new value", || {
            let rows = gateway.events();
            rows.iter().filter(|row| row.event.data == b"shut" && row.function.as_str() == "new").count() == 1
        });
        let rows = gateway.events();
        let of = |name: &str, data: &[u8]| {
            rows.iter().filter(|row| row.function.as_str() == name && row.event.data == data).count()
        };
        assert_eq!(of("new", b"open"), 1);
        assert_eq!(of("ignore", b"open"), 0);
    }
}

#[test]
fn shared_subscription_serves_its_function() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let gateway = Gateway::start(&dir, listening(broker(mosquitto.port(), "neap-gw"), "$share/g/jobs/#"));
    wait_subscribed(&mosquitto, 1);

    publish(mosquitto.port(), "jobs/1", "x");

    assert_eq!(gateway.wait_events(1)[0].event.subject.as_deref(), Some("jobs/1"));
}

#[test]
fn filters_that_nobody_wants_any_more_are_given_back_even_across_a_restart() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let both = vec![function("a", "a/#"), function("b", "b/#")];
        let gateway =
            Gateway::start(&dir, Setup { local: Some(to.clone()), functions: both, ..Setup::default() });
        wait_subscribed(&mosquitto, if version == MqttVersion::V5 { 2 } else { 1 });
        drop(gateway);

        let gateway = Gateway::start(&dir, listening(to, "c/#"));
        wait_until(SOON, "both are given back", || {
            let log = mosquitto.log();
            log.contains("Received UNSUBSCRIBE from neap-gw")
                && log.contains("\ta/#")
                && log.contains("\tb/#")
        });
        wait_until(SOON, "UNSUBACK", || count(&mosquitto, "Sending UNSUBACK to neap-gw") > 0);
        publish(mosquitto.port(), "a/1", "unwanted");
        gateway.deploy(&[function("f", "d/#")]);
        wait_until(SOON, "c is given back", || count(&mosquitto, "Sending UNSUBACK to neap-gw") > 1);
        publish(mosquitto.port(), "c/1", "unwanted");
        publish(mosquitto.port(), "d/1", "wanted");

        let events = gateway.wait_events(1);
        assert_eq!((events.len(), events[0].event.data.as_slice()), (1, &b"wanted"[..]));
    }
}

#[test]
fn oversized_message_is_acknowledged_and_dead_lettered() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let gateway = Gateway::start(&dir, listening(to, "s/#"));
        wait_subscribed(&mosquitto, 1);

        publish(mosquitto.port(), "s/big", vec![b'x'; 3_000_000]);
        publish(mosquitto.port(), "s/small", "y");
        let events = gateway.wait_events(2);

        let (dead, living): (Vec<_>, Vec<_>) =
            events.iter().partition(|row| row.state == InvocationState::Dead);
        assert_eq!((dead.len(), living.len()), (1, 1));
        let limit = Failure::PayloadTooLarge { limit_bytes: 100_000 }.to_string();
        assert_eq!(dead[0].last_error.as_deref(), Some(limit.as_str()));
        assert!(dead[0].event.data.len() <= 1024);
        wait_until(SOON, "both PUBACKs", || count(&mosquitto, "Received PUBACK from neap-gw") == 2);
        assert_eq!(count(&mosquitto, "Sending CONNACK to neap-gw"), 1, "and no reconnect");
    }
}

#[test]
fn several_functions_share_one_event_and_forwards_go_to_the_uplink() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let uplink = Mosquitto::start_plain();
    let cloud = Subscriber::start(uplink.port(), "cloud", &["site/#"]);
    let setup = Setup {
        local: Some(broker(mosquitto.port(), "neap-gw")),
        uplink: Some(broker(uplink.port(), "neap-gw-uplink")),
        functions: vec![function("a", "s/1"), function("b", "s/1")],
        forwards: vec![("s/1", "site/{node}/{topic}")],
        ..Setup::default()
    };
    let gateway = Gateway::start(&dir, setup);
    gateway.wait_up(Target::Uplink);
    wait_subscribed(&mosquitto, 1);

    publish(mosquitto.port(), "s/1", "x");

    let events = gateway.wait_events(2);
    assert_eq!(events[0].event.id, events[1].event.id);
    assert_ne!(events[0].function, events[1].function);
    let message = &cloud.wait_for(1, SOON)[0];
    assert_eq!((message.topic.as_str(), message.text().as_str()), ("site/gw/s/1", "x"));
    assert_eq!(message.user_property("id"), Some(events[0].event.id.as_str()));
    assert_eq!(message.user_property("type"), Some("neap.mqtt.message"));
}

#[test]
fn commands_come_from_the_uplink() {
    let (dir, uplink) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let setup = Setup {
        uplink: Some(broker(uplink.port(), "neap-gw-uplink")),
        functions: vec![function_with("f", "cmd/#", |t| t.from = Target::Uplink)],
        ..Setup::default()
    };
    let gateway = Gateway::start(&dir, setup);
    wait_until(SOON, "a SUBACK", || count(&uplink, "Sending SUBACK to neap-gw-uplink") == 1);

    publish(uplink.port(), "cmd/reboot", "now");

    assert_eq!(gateway.wait_events(1)[0].event.subject.as_deref(), Some("cmd/reboot"));
}

#[test]
fn client_certificates_are_shown_and_read_again_at_every_connect() {
    let certificates = Certificates::new();
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::builder().tls(&certificates, true).start());
    // Wrong at first: the CA of somebody else.
    let other = Certificates::new();
    let ca = dir.write("ca.pem", std::fs::read(&other.ca).expect("read a CA"));
    let mut with = tls(&ca);
    with.cert = Some(certificates.client_cert.clone());
    with.key = Some(certificates.client_key.clone());
    let to = Broker { host: "localhost".to_owned(), tls: Some(with), ..broker(mosquitto.port(), "neap-gw") };
    let gateway = Gateway::start(&dir, listening(to, "s/#"));
    wait_until(SOON, "the wrong CA is told", || {
        let error = gateway.local.get().last_error.clone().unwrap_or_default();
        error.contains("certificate")
    });

    std::fs::copy(&certificates.ca, &ca).expect("the right CA");
    gateway.wait_up(Target::Local);
    wait_subscribed(&mosquitto, 1);
    let path = |p: &std::path::Path| p.to_str().expect("UTF-8").to_owned();
    let files = [path(&certificates.ca), path(&certificates.client_cert), path(&certificates.client_key)];
    let [ca, cert, key] = files.each_ref().map(String::as_str);
    let options = ["-h", "localhost", "--cafile", ca, "--cert", cert, "--key", key];
    publish_with(mosquitto.port(), "s/1", vec![b'x'; 90_000], &options);

    assert_eq!(gateway.wait_events(1)[0].event.data.len(), 90_000);
}

#[test]
fn user_and_password_are_asked_and_refusals_are_told() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::builder().user("gw", "secret").start());
    let file = dir.write("password", "wrong\n");
    let to = Broker {
        username: Some("gw".to_owned()),
        password_file: Some(file.clone()),
        ..broker(mosquitto.port(), "neap-gw")
    };
    let gateway = Gateway::start(&dir, listening(to, "s/#"));
    wait_until(SOON, "the refusal", || {
        gateway
            .local
            .get()
            .last_error
            .as_deref()
            .is_some_and(|e| e.contains("not authorized") || e.contains("password"))
    });

    std::fs::write(&file, "secret\n").expect("the right password");

    gateway.wait_up(Target::Local);
}

#[test]
fn full_store_withholds_acknowledgements_and_deliveries_still_drain() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let setup = Setup {
        local: Some(broker(mosquitto.port(), "neap-gw")),
        functions: vec![function("f", "s/#")],
        bytes_max: Some(2 << 20),
        ..Setup::default()
    };
    let gateway = Gateway::start(&dir, setup);
    wait_subscribed(&mosquitto, 1);

    // Fills the store through the same link that drains it.
    for _ in 0..40 {
        publish(mosquitto.port(), "s/1", vec![b'x'; 90_000]);
    }
    wait_until(SOON, "no more room", || {
        let counts = smol::block_on(gateway.store.counts()).expect("count");
        counts.ready < 40 && counts.bytes + 200_000 > counts.bytes_max
    });
    let stored = gateway.arrived();
    assert!(stored < 40);
    let acknowledged = count(&mosquitto, "Received PUBACK from neap-gw");
    assert!(acknowledged <= stored, "{acknowledged} acknowledged, {stored} stored");

    // Room: everything that was withheld comes, each at least once.
    wait_until(SOON * 2, "all of them", || {
        smol::block_on(async {
            let name = neap::model::FunctionName::parse("f").expect("a good name");
            for leased in gateway.store.lease(vec![(name, 100)]).await.expect("lease") {
                let done = neap::store::Settlement::Done { deliveries: Vec::new(), events: Vec::new() };
                gateway.store.settle(leased.id, done).await.expect("settle");
            }
        });
        count(&mosquitto, "Received PUBACK from neap-gw") >= 40
    });
}

#[test]
fn message_larger_than_the_store_is_dead_lettered_and_blocks_nothing() {
    let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
    let mut large = function("f", "s/#");
    large.limits.payload_bytes = 8 << 20;
    let setup = Setup {
        local: Some(broker(mosquitto.port(), "neap-gw")),
        functions: vec![large],
        bytes_max: Some(2 << 20),
        ..Setup::default()
    };
    let gateway = Gateway::start(&dir, setup);
    wait_subscribed(&mosquitto, 1);

    publish(mosquitto.port(), "s/big", vec![b'x'; 3_000_000]);
    publish(mosquitto.port(), "s/small", "y");
    let events = gateway.wait_events(2);

    let (dead, living): (Vec<_>, Vec<_>) = events.iter().partition(|row| row.state == InvocationState::Dead);
    assert_eq!((dead.len(), living.len()), (1, 1));
    let error = dead[0].last_error.as_deref().unwrap_or_default();
    assert!(error.contains("[buffer] max_bytes"), "{error}");
    assert!(dead[0].event.data.len() <= 1024);
    wait_until(SOON, "both PUBACKs", || count(&mosquitto, "Received PUBACK from neap-gw") == 2);
}

#[test]
fn overlapping_filters_give_each_function_a_message_once() {
    for version in [MqttVersion::V311, MqttVersion::V5] {
        let (dir, mosquitto) = (TestDir::new("mqtt"), Mosquitto::start_plain());
        let to = Broker { version, ..broker(mosquitto.port(), "neap-gw") };
        let functions = vec![function("a", "s/#"), function("b", "s/+"), function("c", "s/1")];
        let gateway = Gateway::start(&dir, Setup { local: Some(to), functions, ..Setup::default() });
        let subacks = if version == MqttVersion::V5 { 3 } else { 1 };
        wait_subscribed(&mosquitto, subacks);

        for text in ["same", "same", "other"] {
            publish(mosquitto.port(), "s/1", text);
        }
        publish(mosquitto.port(), "s/end/of/test", "last");
        let events = gateway.wait_events(10);

        assert_eq!(events.len(), 3 * 3 + 1);
    }
}
