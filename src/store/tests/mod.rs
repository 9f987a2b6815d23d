//! Laws of the store. `laws`: one at a time; `model`: random operations and kills against a
//! naive model; `faults`: the same on a disk that fails (`vfs`); `bounds`: lanes, limits and what gives way; `damage`: full quota, full disk,
//! SIGKILL; `groups`: what requests that come together have of each other; `formats`: saved databases.

mod bounds;
mod damage;
mod faults;
mod formats;
mod groups;
mod laws;
mod measure;
mod model;
mod revisions;
mod salvage;
mod vfs;

use super::*;
use crate::model::{Event, EventId, Lane, UnixMs};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};

/// A clock that stands still until a test moves it.
#[derive(Clone)]
pub struct TestClock {
    wall_ms: Arc<AtomicI64>,
    monotonic_ms: Arc<AtomicI64>,
}

impl TestClock {
    pub fn new() -> Self {
        // 2026-11-21, and an hour of uptime
        let clock =
            Self { wall_ms: Arc::new(AtomicI64::new(1_795_000_000_000)), monotonic_ms: Arc::default() };
        clock.monotonic_ms.store(3_600_000, Ordering::Relaxed);
        clock
    }

    pub fn pass(&self, time: Duration) {
        self.jump(time);
        self.monotonic_ms.fetch_add(time.as_millis() as i64, Ordering::Relaxed);
    }

    /// The wall clock alone.
    pub fn jump(&self, time: Duration) {
        self.wall_ms.fetch_add(time.as_millis() as i64, Ordering::Relaxed);
    }

    pub fn set_wall(&self, wall: UnixMs) {
        self.wall_ms.store(wall.0, Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn wall(&self) -> UnixMs {
        UnixMs(self.wall_ms.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_millis(self.monotonic_ms.load(Ordering::Relaxed) as u64)
    }
}

pub const MIB: u64 = 1 << 20;

pub fn open_at(path: &Path, clock: &TestClock) -> (Store, Recovered) {
    open_with(path, clock, 64 * MIB)
}

pub fn buffer(bytes_max: u64) -> Buffer {
    Buffer { bytes_max, ..crate::config::defaults::buffer() }
}

pub fn open_with(path: &Path, clock: &TestClock, bytes_max: u64) -> (Store, Recovered) {
    let clock = Arc::new(clock.clone());
    Store::open(Options { path: path.to_owned(), buffer: buffer(bytes_max), clock })
        .expect("a database that opens")
}

/// A store in a folder of its own.
pub struct Fixture {
    pub folder: tempfile::TempDir,
    pub clock: TestClock,
    pub store: Store,
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(64 * MIB)
    }

    pub fn with(bytes_max: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let clock = TestClock::new();
        let (store, _) = open_with(&folder.path().join("neap.db"), &clock, bytes_max);
        Self { folder, clock, store }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("neap.db")
    }

    /// As after SIGKILL: what was answered is there, nobody said goodbye.
    pub fn kill(self) -> (Self, Recovered) {
        let Self { folder, clock, store } = self;
        drop(store);
        let (store, recovered) = open_at(&folder.path().join("neap.db"), &clock);
        (Self { folder, clock, store }, recovered)
    }

    pub fn close(self) -> (Self, Recovered) {
        wait(self.store.close());
        self.kill()
    }

    pub fn deploy(&self, name: &str) -> StoredFunction {
        wait(self.store.deploy(function(name), "manifest".into(), "image".into(), None)).expect("deploys")
    }

    /// Accepts an event for one function.
    pub fn accept(&self, id: &str, name: &str) -> Accepted {
        wait(self.store.accept(arrival(id, &[name]))).expect("accepts")
    }

    /// Leases one.
    pub fn lease(&self, name: &str) -> Option<Leased> {
        let leased = wait(self.store.lease(vec![(function(name), 1)])).expect("leases");
        leased.into_iter().next()
    }

    pub fn settle(&self, id: InvocationId, settlement: Settlement) {
        wait(self.store.settle(id, settlement)).expect("settles");
    }

    pub fn counts(&self) -> Counts {
        wait(self.store.counts()).expect("counts")
    }

    /// All of them, none damaged.
    pub fn invocations(&self) -> Vec<InvocationRow> {
        let rows = wait(self.store.invocations(InvocationFilter::default())).expect("lists");
        rows.into_iter().collect::<Result<_, _>>().expect("none is damaged")
    }

    /// The same of dead deliveries.
    pub fn dead_deliveries(&self) -> Vec<DeliveryRow> {
        let rows = wait(self.store.deliveries(true, None, 0)).expect("lists");
        rows.into_iter().collect::<Result<_, _>>().expect("none is damaged")
    }

    pub fn owed(&self, target: Target) -> Vec<Delivery> {
        wait(self.store.owed(all(target))).expect("reads")
    }
}

/// All that is owed, in order of arrival.
pub fn all(target: Target) -> Owed {
    Owed {
        target,
        after: Position::default(),
        upto: None,
        order: OwedOrder::Arrival,
        limit: 1000,
        bytes_max: u64::MAX,
    }
}

pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// What a test draws from. It is said when the test fails, and `NEAP_TEST_SEED` brings it back.
pub struct Seed(pub u64);

impl Seed {
    pub fn draw() -> Self {
        Self(number("NEAP_TEST_SEED", fastrand::u64(..)))
    }

    pub fn random(&self) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.0)
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("NEAP_TEST_SEED={}", self.0);
        }
    }
}

pub fn wait<T>(future: impl Future<Output = T>) -> T {
    smol::block_on(future)
}

pub fn function(name: &str) -> FunctionName {
    FunctionName::parse(name).expect("a good name")
}

pub fn event(id: &str) -> Event {
    Event {
        id: EventId::parse(id).expect("a good id"),
        source: "/gw/mqtt".into(),
        kind: "neap.mqtt.message".into(),
        subject: Some("sensors/1".into()),
        time: Some(UnixMs(1_795_000_000_000)),
        content_type: None,
        extensions: BTreeMap::new(),
        http: None,
        data: id.as_bytes().to_vec(),
    }
}

pub fn arrival(id: &str, functions: &[&str]) -> Arrival {
    let invocations = functions.iter().map(|name| invocation(name)).collect();
    Arrival { invocations, ..Arrival::of(event(id)) }
}

pub fn invocation(name: &str) -> NewInvocation {
    NewInvocation { function: function(name), lane: Lane::Normal, expires: None, once: None, dead: None }
}

pub fn delivery(id: &str, target: Target) -> NewDelivery {
    NewDelivery {
        target,
        lane: Lane::Normal,
        function: Some(function("f")),
        topic: format!("site/{id}"),
        event: event(id),
    }
}

pub fn done(deliveries: Vec<NewDelivery>) -> Settlement {
    Settlement::Done { deliveries, events: Vec::new() }
}

pub fn retry(delay: Duration) -> Settlement {
    Settlement::Retry { delay, counted: true, error: "exited with code 1".into() }
}
