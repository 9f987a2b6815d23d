//! The promise that nothing acknowledged is lost, under SIGKILL: events come in over MQTT at
//! QoS 1 through a real mosquitto, run a function, and go to an uplink that writes down what it
//! acknowledges, while daemon, launcher and uplink are killed at random moments.
//!
//! The moments come from a seed, which a failure prints: `NEAP_TEST_SEED=… cargo test kill::`.
//! A kill is due at a count of events published, not at a time, so that a slow machine is hit
//! as often as a fast one. A burst is published right before it, and a proxy between mosquitto
//! and neap tells when neap is in the middle of taking it.
//!
//! The negative control is the same run with the proxy acknowledging to mosquitto before neap has
//! committed. It must report loss, or the test could not see any.

use crate::support::proxy::{Mode, Proxy};
use crate::support::{
    Mosquitto, Node, RecordingBroker, have, holds_within, privileged, recording, shell_image, tied,
};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Daemon,
    Launcher,
    Uplink,
}

#[derive(Debug)]
struct Scenario {
    events: usize,
    kills: Vec<Victim>,
    /// `EarlyAcknowledgement`: the commit taken out of the acknowledgement's way.
    mode: Mode,
}

#[derive(Debug)]
struct Report {
    seed: u64,
    published: usize,
    lost: Vec<usize>,
    /// Messages at the uplink beyond the first of each reading.
    duplicates: usize,
    /// Those of them with an id of their own: mosquitto delivered the reading again, because neap
    /// was killed between its commit and its acknowledgement. The others are for the receiver to
    /// drop by id.
    other_ids: usize,
    inbox: u64,
    outbox: u64,
    dead: u64,
    left: Vec<String>,
    kills: BTreeMap<&'static str, usize>,
    took: Duration,
}

#[test]
fn nothing_acknowledged_is_lost_when_daemon_launcher_and_uplink_are_killed() {
    if !privileged("kill test") || !have("kill test", "mosquitto") {
        return;
    }
    let mut kills = vec![Victim::Daemon; 8];
    kills.extend([Victim::Launcher; 6]);
    kills.extend([Victim::Uplink; 6]);

    let report = run(Scenario { events: 2_000, kills, mode: Mode::Faithful });

    keep(&report);
    assert!(report.lost.is_empty(), "{} events are lost: {report:#?}", report.lost.len());
    assert_eq!((report.inbox, report.outbox, report.dead), (0, 0, 0), "{report:#?}");
    assert!(report.left.is_empty(), "{report:#?}");
}

#[test]
fn an_acknowledgement_before_the_commit_is_seen_as_loss() {
    if !privileged("kill test's negative control") || !have("kill test's negative control", "mosquitto") {
        return;
    }

    let report =
        run(Scenario { events: 600, kills: vec![Victim::Daemon; 10], mode: Mode::EarlyAcknowledgement });

    eprintln!("{} of {} events are lost", report.lost.len(), report.published);
    assert!(!report.lost.is_empty(), "the kill test can't see loss: {report:#?}");
    // What reached neap is still kept.
    assert_eq!((report.inbox, report.outbox), (0, 0), "{report:#?}");
}

fn run(scenario: Scenario) -> Report {
    let seed = std::env::var("NEAP_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("NEAP_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut kills = scenario.kills;
    random.shuffle(&mut kills);
    let mut due: Vec<usize> = kills.iter().map(|_| random.usize(20..scenario.events)).collect();
    due.sort_unstable();

    let broker = Mosquitto::builder().persistent().start();
    let mut uplink = RecordingBroker::start(recording::Options::default());
    let proxy = Proxy::start(broker.port(), scenario.mode);
    // A broker that dies while it is greeted looks like one that does not know MQTT 5: with the
    // version left open the link would go on in 3.1.1, where events have another form.
    let version = "version = \"5\"";
    let mut node = Node::builder("kill")
        .mqtt(&proxy.url())
        .uplink(&uplink.url())
        .mqtt_line(version)
        .uplink_line(version)
        .start();
    node.import(shell_image());
    node.deploy(FUNCTION);
    broker.wait_subscribed("neap-", "readings");

    let started = Instant::now();
    let mut publisher = Publisher::start(broker.port());
    for (&due, &victim) in due.iter().zip(&kills) {
        let pace = Pace { node: &node, uplink: &uplink };
        publisher.publish_up_to(due.saturating_sub(random.usize(1..150)), &pace);
        let (delivered, burst) = (proxy.delivered(), due.saturating_sub(publisher.published));
        publisher.burst_up_to(due);
        if victim == Victim::Daemon {
            // In the middle of taking the burst; at once if mosquitto holds it back.
            proxy.wait_delivered(delivered + random.usize(..=burst), Duration::from_secs(2));
        } else {
            std::thread::sleep(Duration::from_millis(200).mul_f64(random.f64() * random.f64()));
        }
        match victim {
            Victim::Daemon => {
                node.kill();
                node.start();
            }
            Victim::Launcher => {
                // The daemon may be starting another at this moment.
                let choice = random.usize(..2);
                let killed = holds_within(Duration::from_secs(20), || node.kill_launcher(choice));
                assert!(killed, "there is a launcher to kill");
            }
            Victim::Uplink => {
                uplink.kill();
                std::thread::sleep(Duration::from_millis(random.u64(..1_500)));
                uplink.restart();
            }
        }
    }
    publisher.publish_up_to(scenario.events, &Pace { node: &node, uplink: &uplink });
    publisher.finish();

    settle(&node, &uplink, scenario.events);
    let took = started.elapsed();
    let arrived = arrivals(&uplink);
    let status = node.status();
    let depth = |queue: &str| status[queue]["depth"].as_u64().expect("a depth is a number");
    let dead = |what: &str| status[what].as_u64().expect("a count is a number");
    let mut report = Report {
        seed,
        published: scenario.events,
        lost: (0..scenario.events).filter(|id| !arrived.contains_key(id)).collect(),
        duplicates: arrived.values().map(|ids| ids.len() - 1).sum(),
        other_ids: arrived.values().map(|ids| ids.iter().collect::<BTreeSet<_>>().len() - 1).sum(),
        inbox: depth("inbox"),
        outbox: depth("outbox"),
        dead: dead("dead_events") + dead("dead_deliveries"),
        left: Vec::new(),
        kills: kills.iter().fold(BTreeMap::new(), |mut counts, victim| {
            let name = match victim {
                Victim::Daemon => "daemon",
                Victim::Launcher => "launcher",
                Victim::Uplink => "uplink",
            };
            *counts.entry(name).or_default() += 1;
            counts
        }),
        took,
    };
    assert!(node.stop().success(), "the daemon stops cleanly after all this");
    holds_within(Duration::from_secs(10), || node.leftovers().is_empty());
    report.left = node.leftovers();
    report
}

const FUNCTION: &str = r#"
name = "relay"
image = "shell:1"
command = ["/bin/cat"]

[scale]
min = 2

[limits]
memory = "16MiB"

[[trigger]]
mqtt = "readings"

[[output]]
to = "uplink"
topic = "site/readings"
"#;

/// The readings that came to the uplink, each with the CloudEvents id of every time it came.
fn arrivals(uplink: &RecordingBroker) -> BTreeMap<usize, Vec<String>> {
    let mut arrived: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for record in uplink.records() {
        let text = record.text();
        assert_eq!(text.trim_end().len(), EVENT_BYTES, "an event came changed: {text:?}");
        let id = text.split(' ').next().and_then(|id| id.parse().ok()).expect("an event begins with its id");
        let event = record.user_property("id").expect("a delivery has an id").to_owned();
        arrived.entry(id).or_default().push(event);
    }
    arrived
}

/// Waits until every event has arrived, or nothing moves any more.
fn settle(node: &Node, uplink: &RecordingBroker, events: usize) {
    let quiet = Duration::from_secs(8);
    let (mut last, mut since) = (0, Instant::now());
    let settled = holds_within(Duration::from_secs(180), || {
        std::thread::sleep(Duration::from_millis(200));
        let records = uplink.count();
        if records != last {
            (last, since) = (records, Instant::now());
        }
        let complete = records >= events && arrivals(uplink).len() == events;
        (complete || since.elapsed() > quiet) && idle(node)
    });
    if !settled {
        eprintln!("not settled: {}", node.status());
    }
}

fn idle(node: &Node) -> bool {
    let status = node.status();
    status["inbox"]["depth"] == 0 && status["outbox"]["depth"] == 0
}

const EVENT_BYTES: usize = 256;

/// Publishes no further ahead of the uplink than this, so that the kills are spread over the
/// whole way of the events and not over a backlog alone.
const AHEAD_MAX: usize = 250;

struct Pace<'a> {
    node: &'a Node,
    uplink: &'a RecordingBroker,
}

/// One `mosquitto_pub` for the whole run: QoS 1, a line an event.
struct Publisher {
    child: Child,
    published: usize,
}

impl Publisher {
    fn start(port: u16) -> Self {
        let child = tied("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-V", "5", "-q", "1", "-t", "readings", "-l"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("start mosquitto_pub");
        Self { child, published: 0 }
    }

    fn publish_up_to(&mut self, count: usize, pace: &Pace) {
        while self.published < count {
            self.burst_up_to(count.min(self.published + 20));
            let published = self.published;
            for _ in 0..120 {
                let near = || pace.uplink.count() + AHEAD_MAX >= published;
                // Lost events never arrive: then the node has nothing to do, and none is waited for.
                if holds_within(Duration::from_secs(1), near) || idle(pace.node) {
                    break;
                }
            }
        }
    }

    fn burst_up_to(&mut self, count: usize) {
        let stdin = self.child.stdin.as_mut().expect("stdin is piped");
        while self.published < count {
            let mut line = format!("{:06} ", self.published);
            line.extend(std::iter::repeat_n('x', EVENT_BYTES - line.len()));
            line.push('\n');
            stdin.write_all(line.as_bytes()).expect("write to mosquitto_pub");
            self.published += 1;
        }
    }

    /// Returns when mosquitto has acknowledged all.
    fn finish(mut self) {
        drop(self.child.stdin.take());
        let mut status = None;
        assert!(
            holds_within(Duration::from_secs(60), || {
                status = self.child.try_wait().expect("wait for mosquitto_pub");
                status.is_some()
            }),
            "mosquitto_pub did not end"
        );
        assert!(status.expect("it ended").success(), "mosquitto_pub failed");
    }
}

/// The figures, for whoever writes them down.
fn keep(report: &Report) {
    let text = format!(
        "kill test: {} events, kills {:?}, {} lost, {} duplicates ({} of them with another id), {:.1} s, seed {}\n",
        report.published,
        report.kills,
        report.lost.len(),
        report.duplicates,
        report.other_ids,
        report.took.as_secs_f64(),
        report.seed
    );
    eprint!("{text}");
    let _ = std::fs::write(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("kill-test.txt"), text);
}
