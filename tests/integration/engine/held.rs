//! What holds a function back: its rate, and a breaker when everything fails.

use super::{SOON, alone, function, log, possible};
use crate::support::{http, wait_until};

#[test]
fn calls_over_the_rate_are_told_when_to_come_again() {
    if !possible() {
        return;
    }
    let node = alone("rate");
    node.deploy(&function("slow", "cat", "[rate]\nper_second = 0.02\nburst = 2"));

    let answers: Vec<_> = (0..4).map(|_| node.post("/function/slow", "x")).collect();

    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 200, 429, 429]);
    let wait: u64 = answers[3].header("retry-after").and_then(|w| w.parse().ok()).expect("a time to wait");
    assert!((1..=50).contains(&wait), "{wait}");
    assert_eq!(answers[3].header("content-type"), Some("application/problem+json"));
}

#[test]
fn events_over_the_rate_wait_and_all_of_them_run() {
    if !possible() {
        return;
    }
    let node = alone("paced");
    node.deploy(&function("paced", "echo ran >&2", "[rate]\nper_second = 4\nburst = 1"));
    let started = std::time::Instant::now();

    for _ in 0..8 {
        assert_eq!(node.post("/async-function/paced", "x").status, 202);
    }

    let ran = || log(&node, "paced").iter().filter(|line| line.contains("ran")).count();
    wait_until(SOON, "all ran", || ran() == 8);
    assert!(started.elapsed().as_millis() >= 1700, "seven waits of a quarter of a second: {started:?}");
}

#[test]
fn a_function_that_fails_for_every_event_keeps_them_until_it_is_mended() {
    if !possible() {
        return;
    }
    let node = alone("broken");
    let broken = function("b", "exit 3", "scale = { max = 1 }\n[retry]\nattempts = 2\nbackoff = \"60s\"");
    node.deploy(&broken);

    for n in 0..12 {
        assert_eq!(node.post("/async-function/b", format!("{n}")).status, 202);
    }
    wait_until(SOON, "the breaker opens", || {
        node.status().to_string().contains("fails whatever it is given")
    });

    let status = node.status();
    assert_eq!((&status["inbox"]["depth"], &status["dead_events"]), (&12.into(), &0.into()), "{status}");
    node.deploy(&function("b", "echo got $(cat) >&2", "[retry]\nattempts = 2\nbackoff = \"60s\""));
    // Those that failed wait for their own backoff; the others run at once.
    let got = |n: usize| log(&node, "b").iter().any(|line| line.contains(&format!("got {n}")));
    wait_until(SOON, "those that waited run", || (5..12).all(got));
    assert!(!node.status().to_string().contains("fails whatever it is given"));
    let metrics = http::get(node.port(), "/metrics").expect("metrics").text();
    assert!(metrics.contains("neap_"), "{metrics}");
}
