//! Links that cost: the day's bytes, the hours of the backlog, and what goes before what.

use super::gateway::{Ahead, Gateway, Order, SOON, Setup, broker};
use super::scripted::{Scripted, ordinary};
use crate::support::packet;
use crate::support::recording::Options;
use crate::support::{RecordingBroker, TestDir, wait_until};
use neap::config::{DayWindow, UplinkLimits};
use neap::model::Target;

/// A day in 2026; its number in UTC.
const DAY: u64 = 20_500;

fn texts(broker: &RecordingBroker) -> Vec<String> {
    broker.records().iter().map(|record| record.text().trim_end_matches('.').to_owned()).collect()
}

fn owe(gateway: &Gateway, range: std::ops::Range<usize>, bytes: usize) {
    for n in range {
        gateway.owe(Target::Uplink, "site/gw", format!("{n:.<bytes$}").as_bytes(), None);
    }
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[test]
fn a_day_carries_its_bytes_and_the_next_day_the_rest() {
    let (dir, ahead) = (TestDir::new("mqtt"), Ahead::default());
    ahead.set_wall(DAY, 12);
    let mut recording = RecordingBroker::start(Options::default());
    let setup = || Setup {
        uplink: Some(broker(recording.port(), "neap-gw")),
        raw: true,
        ahead: ahead.clone(),
        limits: UplinkLimits { window: None, bytes_per_day: 10_000 },
        ..Setup::default()
    };
    let spent = |gateway: &Gateway| {
        let said = || gateway.uplink.get().last_error.as_deref().is_some_and(|e| e.contains("bytes_per_day"));
        wait_until(SOON, "the day is spent, and says so", said);
        recording.records().iter().map(|record| record.payload().len()).sum::<usize>()
    };
    let gateway = Gateway::start(&dir, setup());
    owe(&gateway, 0..20, 1000);

    // What is sent is counted with its topic and attributes: seven to ten of a thousand bytes.
    let first = spent(&gateway);
    assert!((7_000..=10_000).contains(&first), "{first}");

    // A restart does not make the day new.
    drop(gateway);
    let gateway = Gateway::start(&dir, setup());
    assert_eq!(spent(&gateway), first);

    ahead.set_wall(DAY + 1, 1);
    gateway.look();
    wait_until(SOON, "the second day's", || gateway.owed(Target::Uplink) <= 6);
    wait_until(SOON, "the second day is spent", || spent(&gateway) <= 20_000);
    assert!(gateway.owed(Target::Uplink) > 0, "two days carry less than all");
    ahead.set_wall(DAY + 2, 1);
    gateway.look();
    gateway.wait_drained(Target::Uplink);

    assert_eq!(texts(&recording), numbers(0..20));
    assert_eq!(gateway.uplink.get().last_error, None);
    recording.kill();
}

#[test]
fn the_backlog_waits_for_its_hours_and_what_is_fresh_does_not() {
    let (dir, ahead) = (TestDir::new("mqtt"), Ahead::default());
    ahead.set_wall(DAY, 12);
    let mut recording = RecordingBroker::stopped(Options::default());
    let gateway = Gateway::start(
        &dir,
        Setup {
            uplink: Some(broker(recording.port(), "neap-gw")),
            raw: true,
            ahead: ahead.clone(),
            order: Order::LiveFirst,
            limits: UplinkLimits {
                window: Some(DayWindow { from: 2 * 60, until: 4 * 60 }),
                bytes_per_day: 0,
            },
            ..Setup::default()
        },
    );
    owe(&gateway, 0..30, 8);
    recording.restart();
    gateway.wait_up(Target::Uplink);

    owe(&gateway, 100..110, 8);
    wait_until(SOON, "what is fresh is gone", || gateway.owed(Target::Uplink) == 30);
    assert_eq!(texts(&recording), numbers(100..110));

    ahead.set_wall(DAY + 1, 3);
    gateway.look();
    gateway.wait_drained(Target::Uplink);

    assert_eq!(texts(&recording)[10..], numbers(0..30));
    let late: Vec<_> =
        recording.records().iter().map(|r| r.user_property("neapreplayed").is_some()).collect();
    assert!(late[..10].iter().all(|late| !late), "{late:?}");
}

#[test]
fn what_is_fresh_takes_the_next_place_before_a_long_backlog() {
    // One at a time, and none is acknowledged until the test has looked.
    let scripted = Scripted::start(|packet, level, seen| match packet.kind {
        packet::CONNECT => Some(vec![0x20, 6, 0, 0, 3, 0x21, 0, 1]), // receive maximum 1
        packet::PUBLISH if seen.published.len() == 1 => {
            seen.held = seen.published[0].packet_id;
            Some(Vec::new())
        }
        _ => ordinary(packet, level, seen),
    });
    let (dir, ahead) = (TestDir::new("mqtt"), Ahead::default());
    let setup = |port| Setup {
        uplink: Some(broker(port, "neap-gw")),
        ahead: ahead.clone(),
        order: Order::LiveFirst,
        ..Setup::default()
    };
    // The backlog is there before the link is.
    let nobody = Gateway::start(&dir, setup(1));
    owe(&nobody, 0..50, 4);
    drop(nobody);
    let gateway = Gateway::start(&dir, setup(scripted.port));
    wait_until(SOON, "the backlog has begun", || scripted.look(|seen| seen.published.len()) == 1);

    owe(&gateway, 900..903, 4);
    scripted.release();
    gateway.wait_drained(Target::Uplink);

    let order = scripted.look(|seen| {
        let payloads = seen.published.iter().map(|p| String::from_utf8_lossy(&p.payload).into_owned());
        payloads.map(|text| text.trim_end_matches('.').to_owned()).collect::<Vec<_>>()
    });
    assert_eq!(order[0], "0");
    let fresh: Vec<usize> = (900..903)
        .map(|n: usize| order.iter().position(|text| *text == n.to_string()).expect("it was sent"))
        .collect();
    assert_eq!(fresh[0], 1, "{order:?}");
    assert!(fresh.is_sorted() && fresh[2] < 8, "{order:?}");
    let backlog: Vec<String> =
        order.iter().filter(|text| !text.starts_with('9') || text.len() < 3).cloned().collect();
    assert_eq!(backlog, numbers(0..50));
}
