//! The crash matrix: each fault at each moment of an event's way, with a real mosquitto in front,
//! real containers, and an uplink that writes down what it acknowledges. One test for each fault,
//! each with a node of its own; 20,016 events over all of them. `make soak` runs it twelve times with
//! five times the forwards: a million.
//!
//! | fault | what it stands for |
//! |---|---|
//! | SIGKILL daemon, launcher | a crash, the out-of-memory killer |
//! | kill broker | the uplink dies and comes back |
//! | broker restarts without its session | the broker on site has forgotten who we are |
//! | ENOSPC | another program fills the disk, and goes |
//! | clock jump | back an hour, ahead a year, and right again (libfaketime) |
//! | half-open TCP | the other side is gone without a word: only a timer can tell |
//! | slow broker | one message at a time (receive_max 1) |
//!
//! Asked of every cell: nothing that the broker on site had acknowledged is lost, forwards come in
//! their order (first arrivals), and what comes twice is bounded by the window, one batch of
//! deletions and what the broker on site had unacknowledged, for each fault.
//!
//! The moments come from a seed, which a failure prints: `NEAP_TEST_SEED=… cargo test crash::`.

use crate::support::{
    Mosquitto, Node, RecordingBroker, have, holds_within, privileged, proxy, recording, shell_image, tied,
};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Of a cell in which a function runs, and of one of forwards unless `NEAP_MATRIX_FORWARDS` says
/// otherwise: 8 × 3 of each are 20,016.
const RUN_EVENTS: usize = 150;
const FORWARD_EVENTS: usize = 684;
/// What one fault may bring twice: the window, one batch of deletions, and what mosquitto had
/// unacknowledged, which it delivers again.
const TWICE_MAX: usize = 64 + 1024 + 256;
/// Of one cell, on a machine that compiles beside this; a half-open connection takes 30 s of it, one
/// message at a time to the uplink takes most of it where there are five times the forwards.
const CELL: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    KillDaemon,
    KillLauncher,
    KillBroker,
    SessionLost,
    DiskFull,
    ClockJump,
    HalfOpen,
    SlowBroker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Accepting,
    Leased,
    Running,
    Committing,
    Delivering,
    Acknowledged,
}

const MOMENTS: [Moment; 6] = [
    Moment::Accepting,
    Moment::Leased,
    Moment::Running,
    Moment::Committing,
    Moment::Delivering,
    Moment::Acknowledged,
];

#[test]
fn nothing_is_lost_when_the_daemon_is_killed() {
    matrix(Fault::KillDaemon);
}

#[test]
fn nothing_is_lost_when_the_launcher_is_killed() {
    matrix(Fault::KillLauncher);
}

#[test]
fn nothing_is_lost_when_the_uplink_is_killed() {
    matrix(Fault::KillBroker);
}

#[test]
fn nothing_is_lost_when_the_broker_on_site_forgets_its_sessions() {
    matrix(Fault::SessionLost);
}

#[test]
fn nothing_is_lost_when_the_disk_is_full() {
    matrix(Fault::DiskFull);
}

#[test]
fn nothing_is_lost_when_the_clock_jumps() {
    if have("clock jumps", "setpriv") && faketime().is_some() {
        matrix(Fault::ClockJump);
    } else {
        assert!(std::env::var_os("CI").is_none(), "libfaketime is not installed");
    }
}

#[test]
fn nothing_is_lost_when_a_connection_is_half_open() {
    matrix(Fault::HalfOpen);
}

#[test]
fn nothing_is_lost_at_a_broker_that_takes_one_at_a_time() {
    matrix(Fault::SlowBroker);
}

/// The proof's own proof: with the commit taken out of the acknowledgement's way, the same scene
/// must see that events are lost. They stream in while the fault hits: on a fast machine all that
/// came before has been committed long ago.
#[test]
fn an_acknowledgement_before_the_commit_is_seen_by_the_matrix() {
    planted(Fault::KillDaemon, proxy::Mode::EarlyAcknowledgement, proxy::Mode::Faithful);
}

/// The same at the other end: deliveries that go from the outbox before the uplink has them.
#[test]
fn a_delivery_deleted_before_the_uplink_has_it_is_seen_by_the_matrix() {
    planted(Fault::KillBroker, proxy::Mode::Faithful, proxy::Mode::EarlyTaking);
}

fn planted(fault: Fault, front: proxy::Mode, back: proxy::Mode) {
    let name = "crash matrix: negative control";
    if !privileged(name) || !have(name, "mosquitto") || !have(name, "umoci") {
        return;
    }
    let seed = fastrand::u64(..);
    let mut scene = Scene::new(fault, seed, front, back);

    let loses = (0..30).any(|_| scene.loses(fault));

    assert!(loses, "30 faults, and no loss is seen; seed {seed}");
}

const FUNCTION: &str = r#"
name = "relay"
image = "shell:1"
command = ["/bin/cat"]

[limits]
memory = "16MiB"

[[trigger]]
mqtt = "readings"

[[output]]
to = "uplink"
topic = "site/readings"
"#;

struct Scene {
    node: Node,
    local: Mosquitto,
    uplink: RecordingBroker,
    front: proxy::Proxy,
    back: Stalling,
    faketime: PathBuf,
    data: PathBuf,
    random: fastrand::Rng,
    published: BTreeMap<&'static str, usize>,
    faults: usize,
    /// Events of a cell of forwards.
    forwards: usize,
    /// Behind the node, which must have ended before it goes.
    small: Option<Mounted>,
}

/// A small file system of its own under the node's data.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
        if let (false, Some(node)) = (std::thread::panicking(), self.0.parent()) {
            let _ = std::fs::remove_dir_all(node);
        }
    }
}

fn asked_for<T: std::str::FromStr>(variable: &str) -> Option<T> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

fn matrix(fault: Fault) {
    let name = format!("crash matrix: {fault:?}");
    if !privileged(&name) || !have(&name, "mosquitto") || !have(&name, "umoci") {
        return;
    }
    let seed = asked_for("NEAP_TEST_SEED").unwrap_or_else(|| fastrand::u64(..));
    let rounds = asked_for("NEAP_MATRIX_ROUNDS").unwrap_or(1);
    eprintln!("{name}: NEAP_TEST_SEED={seed}");
    let started = Instant::now();
    let mut scene = Scene::new(fault, seed, proxy::Mode::Faithful, proxy::Mode::Faithful);
    scene.forwards = asked_for("NEAP_MATRIX_FORWARDS").unwrap_or(FORWARD_EVENTS);
    for _ in 0..rounds {
        for moment in MOMENTS {
            scene.cell(fault, moment);
        }
    }
    scene.judge(fault, seed, started.elapsed());
}

impl Scene {
    /// `front`, `back`: how the broker on site and the uplink are passed on.
    fn new(fault: Fault, seed: u64, front: proxy::Mode, back: proxy::Mode) -> Self {
        let local = match fault {
            Fault::SessionLost => Mosquitto::builder(),
            _ => Mosquitto::builder().persistent(),
        };
        let local = local.start();
        let uplink = RecordingBroker::start(recording::Options::default());
        let front = proxy::Proxy::start(local.port(), front);
        let flawed = (back != proxy::Mode::Faithful).then(|| proxy::Proxy::start(uplink.port(), back));
        let back = Stalling::start(flawed.as_ref().map_or(uplink.port(), proxy::Proxy::port));
        let version = "version = \"5\"";
        let mut node = Node::builder("crash")
            .mqtt(&front.url())
            .uplink(&format!("mqtt://127.0.0.1:{}", back.port))
            .mqtt_line(version)
            .uplink_line(version)
            .config("[[forward]]\nmqtt = \"bulk\"\ntopic = \"site/bulk\"\n[buffer]\norder = \"fifo\"\n")
            .stopped();
        let (data, clock) = (node.dir().join("data"), node.dir().write("clock", "+0"));
        let small = (fault == Fault::DiskFull).then(|| {
            std::fs::create_dir_all(&data).expect("make the data directory");
            mount_small(&data);
            Mounted(data.clone())
        });
        if fault == Fault::ClockJump {
            let library = faketime().expect("it was looked for");
            node.env("LD_PRELOAD", &library.display().to_string());
            node.env("FAKETIME_TIMESTAMP_FILE", &clock.display().to_string());
            node.env("FAKETIME_NO_CACHE", "1");
            node.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        node.start();
        node.import(shell_image());
        node.deploy(FUNCTION);
        local.wait_subscribed("neap-", "readings");
        local.wait_subscribed("neap-", "bulk");
        node.wait_link("uplink", "up");
        Self {
            node,
            local,
            uplink,
            front,
            back,
            faketime: clock,
            data,
            random: fastrand::Rng::with_seed(seed),
            published: BTreeMap::new(),
            faults: 0,
            forwards: FORWARD_EVENTS,
            small,
        }
    }

    fn cell(&mut self, fault: Fault, moment: Moment) {
        let (topic, events) = match moment {
            Moment::Leased | Moment::Running | Moment::Committing => ("readings", RUN_EVENTS),
            Moment::Accepting | Moment::Delivering | Moment::Acknowledged => ("bulk", self.forwards),
        };
        let (delivered, arrived) = (self.front.delivered(), self.uplink.count());
        if fault == Fault::SlowBroker {
            let options = recording::Options { receive_max: Some(1), ..recording::Options::default() };
            self.uplink.restart_with(options);
        }
        self.publish(topic, events);
        let soon = Duration::from_secs(60);
        let some = self.random.usize(1..events / 2);
        let moved = |uplink: &RecordingBroker, by: usize| {
            holds_within(soon, || uplink.count() >= arrived + by);
        };
        match moment {
            Moment::Accepting => self.front.wait_delivered(delivered + some, soon),
            Moment::Leased => self.front.wait_delivered(delivered + some.min(20), soon),
            Moment::Running => {
                holds_within(soon, || {
                    self.node.status()["instances"].as_u64().is_some_and(|count| count > 0)
                });
            }
            Moment::Committing | Moment::Delivering => {
                moved(&self.uplink, some.min(events / 4));
                std::thread::sleep(Duration::from_millis(self.random.u64(..25)));
            }
            // Rows are deleted 20 ms after the first acknowledgement at the earliest.
            Moment::Acknowledged => moved(&self.uplink, some),
        }
        if fault == Fault::SessionLost {
            // What the broker has not handed over yet is its own to lose.
            self.front.wait_delivered(delivered + events, soon);
            let quiet = || self.front.acknowledged() >= self.front.delivered();
            assert!(holds_within(soon, quiet), "neap acknowledges what it got");
        }
        self.strike(fault);
        self.faults += 1;
        let expected: usize = self.published.values().sum();
        let complete = || self.uplink.count() >= expected && self.missing() == 0;
        assert!(
            holds_within(CELL, || {
                std::thread::sleep(Duration::from_millis(100));
                complete()
            }),
            "{fault:?} while {moment:?}: {} of {expected} events are missing; {}",
            self.missing(),
            self.node.status()
        );
        if fault == Fault::SlowBroker {
            self.uplink.restart_with(recording::Options::default());
        }
    }

    fn strike(&mut self, fault: Fault) {
        let pause = |random: &mut fastrand::Rng| {
            std::thread::sleep(Duration::from_millis(random.u64(100..1200)));
        };
        match fault {
            Fault::KillDaemon => {
                self.node.kill();
                self.node.start();
            }
            Fault::KillLauncher => {
                let choice = self.random.usize(..2);
                let killed = holds_within(Duration::from_secs(20), || self.node.kill_launcher(choice));
                assert!(killed, "there is a launcher to kill");
            }
            Fault::KillBroker => {
                self.uplink.kill();
                pause(&mut self.random);
                self.uplink.restart();
            }
            Fault::SessionLost => {
                self.local.kill();
                self.local.start();
                self.local.wait_subscribed("neap-", "readings");
                self.local.wait_subscribed("neap-", "bulk");
            }
            Fault::DiskFull => {
                let filler = self.data.join("somebody-elses-file");
                let mut file = std::fs::File::create(&filler).expect("make a file");
                while file.write_all(&[0; 65_536]).is_ok() {}
                while file.write_all(&[0; 512]).is_ok() {}
                pause(&mut self.random);
                drop(file);
                std::fs::remove_file(filler).expect("remove the file");
            }
            Fault::ClockJump => {
                for offset in ["-3600", "+31536000", "+0"] {
                    std::fs::write(&self.faketime, offset).expect("move the clock");
                    pause(&mut self.random);
                }
            }
            Fault::HalfOpen => self.back.stall(),
            // It is slow all the time.
            Fault::SlowBroker => {}
        }
    }

    /// Through a `mosquitto_pub` of its own; returns when mosquitto has acknowledged all.
    fn publish(&mut self, topic: &'static str, events: usize) {
        let first = self.published.entry(topic).or_default();
        publish(self.local.port(), topic, *first..*first + events);
        *first += events;
    }

    /// The fault hits while events stream through; whether one never arrives.
    fn loses(&mut self, fault: Fault) -> bool {
        let events = 2_000;
        let (delivered, arrived) = (self.front.delivered(), self.uplink.count());
        let first = self.published.entry("bulk").or_default();
        let (port, range) = (self.local.port(), *first..*first + events);
        *first += events;
        let publishing = std::thread::spawn(move || publish(port, "bulk", range));
        self.front.wait_delivered(delivered + self.random.usize(1..events / 2), Duration::from_secs(60));
        if fault == Fault::KillBroker {
            holds_within(Duration::from_secs(60), || self.uplink.count() > arrived);
        }
        self.strike(fault);
        publishing.join().expect("the publisher ends");
        // Until all came, or nothing moves any more.
        let (mut last, mut since) = (arrived, Instant::now());
        holds_within(CELL, || {
            std::thread::sleep(Duration::from_millis(100));
            let count = self.uplink.count();
            if count != last {
                (last, since) = (count, Instant::now());
            }
            let status = self.node.status();
            let idle = status["inbox"]["depth"] == 0 && status["outbox"]["depth"] == 0;
            (count >= arrived + events || since.elapsed() > Duration::from_secs(3)) && idle
        });
        self.missing() > 0
    }

    /// First arrivals of each topic, in order, and all arrivals.
    fn arrivals(&self) -> (BTreeMap<String, Vec<usize>>, usize) {
        let (mut first, mut seen, mut all) = (BTreeMap::new(), std::collections::HashSet::new(), 0);
        for record in self.uplink.records() {
            let text = record.text();
            let mut words = text.split(' ');
            let topic = words.next().unwrap_or_default().to_owned();
            let number: usize = words.next().and_then(|n| n.parse().ok()).expect("an event has its number");
            all += 1;
            if seen.insert((topic.clone(), number)) {
                first.entry(topic).or_insert_with(Vec::new).push(number);
            }
        }
        (first, all)
    }

    fn missing(&self) -> usize {
        let (first, _) = self.arrivals();
        let arrived: usize = first.values().map(Vec::len).sum();
        self.published.values().sum::<usize>() - arrived
    }

    fn judge(mut self, fault: Fault, seed: u64, took: Duration) {
        let (first, all) = self.arrivals();
        let published: usize = self.published.values().sum();
        let twice = all - first.values().map(Vec::len).sum::<usize>();
        let text = format!(
            "crash matrix: {fault:?}: {published} events, {} faults, 0 lost, {twice} twice, {:.0} s, seed {seed}\n",
            self.faults,
            took.as_secs_f64()
        );
        eprint!("{text}");
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{fault:?}.txt"));
        let _ = std::fs::write(file, &text);
        assert!(twice <= self.faults * TWICE_MAX, "{text}");
        let bulk = &first["bulk"];
        assert!(bulk.is_sorted(), "{fault:?}: forwards out of order, seed {seed}: {:?}", first_wrong(bulk));
        let empty = || {
            let status = self.node.status();
            status["inbox"]["depth"] == 0 && status["outbox"]["depth"] == 0
        };
        assert!(holds_within(Duration::from_secs(60), empty), "{}", self.node.status());
        let status = self.node.status();
        assert_eq!((&status["dead_events"], &status["dead_deliveries"]), (&0.into(), &0.into()), "{status}");
        if self.small.is_some() {
            // The node's own check for what it left behind would find the mount.
            self.node.stop();
            self.small = None;
        }
    }
}

fn publish(port: u16, topic: &'static str, numbers: std::ops::Range<usize>) {
    let mut child = tied("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-V", "5", "-q", "1", "-t", topic, "-l"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("start mosquitto_pub");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    for number in numbers {
        writeln!(stdin, "{topic} {number:07} {}", "x".repeat(200)).expect("write to mosquitto_pub");
    }
    drop(stdin);
    assert!(child.wait().expect("wait for mosquitto_pub").success(), "mosquitto_pub failed");
}

fn first_wrong(numbers: &[usize]) -> Option<&[usize]> {
    numbers.windows(2).find(|pair| pair[0] > pair[1])
}

/// neap keeps 64 MiB for events from images, so it is not smaller than that.
fn mount_small(path: &Path) {
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("tmpfs"), path, Some("tmpfs"), flags, Some("size=128m"))
        .expect("mount a small file system");
}

/// The library that gives a process another clock.
pub fn faketime() -> Option<PathBuf> {
    let dirs = ["/usr/lib/x86_64-linux-gnu/faketime", "/usr/lib/aarch64-linux-gnu/faketime"];
    dirs.iter().map(|dir| Path::new(dir).join("libfaketimeMT.so.1")).find(|path| path.is_file())
}

/// Between neap and the uplink: its connections can be made to stand still for ever, as when the
/// other side loses power. Later ones pass.
struct Stalling {
    port: u16,
    /// Connections before this one stand still.
    first: Arc<AtomicUsize>,
    count: Arc<AtomicUsize>,
}

impl Stalling {
    fn start(to: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("listen");
        let port = listener.local_addr().expect("an address").port();
        let (first, count) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (first_seen, counted) = (first.clone(), count.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let number = counted.fetch_add(1, Ordering::AcqRel);
                for (from, to) in [(&client, &server), (&server, &client)] {
                    let (from, to) = (from.try_clone(), to.try_clone());
                    let (Ok(from), Ok(to)) = (from, to) else { continue };
                    let first = first_seen.clone();
                    std::thread::spawn(move || pump(from, to, number, &first));
                }
            }
        });
        Self { port, first, count }
    }

    fn stall(&self) {
        self.first.store(self.count.load(Ordering::Acquire), Ordering::Release);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, number: usize, first: &AtomicUsize) {
    let _ = from.set_nodelay(true);
    let mut piece = [0; 16 * 1024];
    loop {
        let read = from.read(&mut piece);
        if number < first.load(Ordering::Acquire) {
            // Neither closed nor read again, until the test ends.
            std::mem::forget((from, to));
            return;
        }
        match read {
            Ok(amount) if amount > 0 && to.write_all(&piece[..amount]).is_ok() => {}
            _ => break,
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}
