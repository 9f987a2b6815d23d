//! A gateway without a battery for its clock boots in 1970, and its uplink asks for certificates.

use super::SOON;
use crate::crash::faketime;
use crate::support::tls::Certificates;
use crate::support::{Mosquitto, Node, Subscriber, free_port, have, privileged, publish_with};
use std::time::{SystemTime, UNIX_EPOCH};

#[test]
fn a_gateway_that_boots_in_1970_still_trusts_a_certificate_of_today() {
    let name = "a boot in 1970";
    if !privileged(name) || !have(name, "mosquitto") {
        return;
    }
    let Some(library) = faketime() else {
        assert!(std::env::var_os("CI").is_none(), "libfaketime is not installed");
        return;
    };
    let (certificates, plain) = (Certificates::new(), free_port());
    let cloud = Mosquitto::builder().tls(&certificates, false);
    let cloud = cloud.line(&format!("listener {plain} 127.0.0.1")).start();
    let site = Mosquitto::start_plain();
    let mut node = Node::builder("seventies")
        .mqtt(&site.url())
        .uplink(&cloud.url())
        .uplink_line(&format!("tls = {{ ca = \"{}\" }}", certificates.ca.display()))
        .config("[[forward]]\nmqtt = \"in\"\ntopic = \"out\"\n")
        .stopped();
    let clock = node.dir().write("clock", "+0");
    node.env("LD_PRELOAD", &library.display().to_string());
    node.env("FAKETIME_TIMESTAMP_FILE", &clock.display().to_string());
    node.env("FAKETIME_NO_CACHE", "1");
    node.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    // It has known the time once, which the database remembers.
    node.start();
    node.wait_link("uplink", "up");
    node.stop();

    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    std::fs::write(&clock, format!("-{}", now - 60)).expect("move the clock");
    node.start();

    node.wait_link("uplink", "up");
    let receiver = Subscriber::start(plain, "receiver", &["out"]);
    site.wait_subscribed("neap-", "in");
    publish_with(site.port(), "in", "21.5", &[]);
    let message = receiver.wait_for(1, SOON).remove(0);
    assert_eq!(message.text(), "21.5");
    let time = message.user_property("time");
    assert!(time.is_none_or(|time| !time.starts_with("1970")), "{time:?}");
}
