//! Lock-step with a naive model: random operations, clean stops and kills, everything that can
//! be seen compared after each. A kill is a copy of the files as they lie while the store is
//! open, which is what SIGKILL leaves. The same again on a disk that fails within the operations:
//! what is answered with an error has changed nothing.

use super::vfs::{Disk, Plan};
use super::*;
use crate::model::Failure;
use proptest::prelude::*;
use rusqlite::ffi;
use std::collections::BTreeSet;
use std::fs;

const NAMES: [&str; 3] = ["f", "g", "h"];

#[derive(Clone, Debug)]
enum Op {
    Deploy(usize),
    Remove(usize),
    Accept {
        functions: Vec<usize>,
        expires: Option<u8>,
        once: Option<u8>,
        dead: bool,
        forward: bool,
    },
    Owe(u8),
    Lease(usize, u32),
    Settle(usize, How),
    /// The n-th that is owed, and the one behind it.
    Delivered(usize),
    SetAside(usize),
    Redrive(Option<usize>),
    Purge(Option<usize>),
    RedriveDeliveries,
    PurgeDeliveries,
    Pass(u8),
    Close,
    Kill,
}

#[derive(Clone, Debug)]
enum How {
    Done { deliveries: u8, event: Option<usize> },
    Retry { seconds: u8, counted: bool },
    Dead,
    Release,
}

fn ops() -> impl Strategy<Value = Op> {
    let function = 0..NAMES.len();
    let some = prop::option::of(0..NAMES.len());
    let how = prop_oneof![
        3 => (0..3u8, some.clone()).prop_map(|(deliveries, event)| How::Done { deliveries, event }),
        3 => (0..50u8, any::<bool>()).prop_map(|(seconds, counted)| How::Retry { seconds, counted }),
        2 => Just(How::Dead),
        1 => Just(How::Release),
    ];
    let accept = (
        prop::collection::btree_set(0..NAMES.len(), 0..3),
        prop::option::weighted(0.3, 0..50u8),
        prop::option::weighted(0.3, 0..3u8),
        prop::bool::weighted(0.1),
        any::<bool>(),
    )
        .prop_map(|(functions, expires, once, dead, forward)| Op::Accept {
            functions: functions.into_iter().collect(),
            expires,
            once,
            dead,
            forward,
        });
    prop_oneof![
        2 => function.clone().prop_map(Op::Deploy),
        1 => function.clone().prop_map(Op::Remove),
        8 => accept,
        1 => (0..3u8).prop_map(Op::Owe),
        6 => (function, 0..4u32).prop_map(|(function, limit)| Op::Lease(function, limit)),
        6 => (0..4usize, how).prop_map(|(n, how)| Op::Settle(n, how)),
        2 => (0..3usize).prop_map(Op::Delivered),
        2 => (0..3usize).prop_map(Op::SetAside),
        1 => some.clone().prop_map(Op::Redrive),
        1 => some.prop_map(Op::Purge),
        1 => Just(Op::RedriveDeliveries),
        1 => Just(Op::PurgeDeliveries),
        3 => (0..40u8).prop_map(Op::Pass),
        1 => Just(Op::Close),
        2 => Just(Op::Kill),
    ]
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    Ready,
    Running,
    Waiting { due: u64 },
    Dead,
}

#[derive(Clone, Debug)]
struct Invocation {
    id: i64,
    function: usize,
    event: String,
    arrived: u64,
    expires: Option<u64>,
    attempts: u32,
    lost: u32,
    state: State,
}

/// Times in seconds.
#[derive(Default)]
struct Model {
    now: u64,
    deployed: BTreeSet<usize>,
    invocations: Vec<Invocation>,
    retained: BTreeMap<usize, u8>,
    owed: Vec<String>,
    dead_deliveries: Vec<String>,
    expired: u64,
    events: u64,
}

impl Model {
    fn next_event(&mut self) -> String {
        self.events += 1;
        format!("e{}", self.events)
    }

    fn add(&mut self, accepted: EventIds<'_>, arrival: &Arrival) {
        let mut n = 0;
        for new in &arrival.invocations {
            let function = index(&new.function);
            if !self.deployed.contains(&function) {
                continue;
            }
            if let Some(value) = &new.once
                && self.retained.insert(function, value.hash[0]) == Some(value.hash[0])
            {
                continue;
            }
            self.invocations.push(Invocation {
                id: accepted(n),
                function,
                event: arrival.event.id.to_string(),
                arrived: self.now,
                expires: new.expires.map(|time| time.as_secs()),
                attempts: 0,
                lost: 0,
                state: if new.dead.is_some() { State::Dead } else { State::Ready },
            });
            n += 1;
        }
        self.owed.extend(arrival.deliveries.iter().map(|delivery| delivery.event.id.to_string()));
        self.invocations.sort_by_key(|invocation| invocation.id);
    }

    fn lease(&mut self, function: usize, limit: u32) -> Vec<(String, u32, u32)> {
        let now = self.now;
        let mut leased = Vec::new();
        let deployed = self.deployed.contains(&function);
        for invocation in self.invocations.iter_mut().filter(|i| i.function == function && deployed) {
            if matches!(invocation.state, State::Waiting { due } if due <= now) {
                invocation.state = State::Ready;
            }
        }
        let mut expired = Vec::new();
        for invocation in self.invocations.iter_mut() {
            if leased.len() == limit as usize || !deployed {
                break;
            }
            if invocation.function == function && invocation.state == State::Ready {
                if invocation.expires.is_some_and(|expires| now - invocation.arrived > expires) {
                    expired.push(invocation.id);
                } else {
                    invocation.state = State::Running;
                    leased.push((invocation.event.clone(), invocation.attempts, invocation.lost));
                }
            }
        }
        self.expired += expired.len() as u64;
        self.invocations.retain(|invocation| !expired.contains(&invocation.id));
        leased
    }

    fn restart(&mut self, clean: bool) {
        for invocation in &mut self.invocations {
            if invocation.state == State::Running {
                invocation.state = State::Ready;
                invocation.lost += u32::from(!clean);
            }
        }
    }
}

type EventIds<'a> = &'a dyn Fn(i64) -> i64;

fn index(name: &FunctionName) -> usize {
    NAMES.iter().position(|n| *n == name.as_str()).expect("one of three")
}

struct Run {
    fixture: Fixture,
    model: Model,
    files: u32,
    path: PathBuf,
    /// Where the files are, unless they are on the machine's own.
    disk: Option<Disk>,
    /// Operations that the disk's failure refused.
    refused: u32,
}

/// So many calls to the disk fail, from the n-th on.
#[derive(Clone, Copy, Debug)]
struct Fault {
    at: u64,
    calls: u64,
    code: i32,
}

fn faults() -> impl Strategy<Value = Fault> {
    let codes = [
        ffi::SQLITE_IOERR,
        ffi::SQLITE_FULL,
        ffi::SQLITE_IOERR_READ,
        ffi::SQLITE_IOERR_WRITE,
        ffi::SQLITE_IOERR_FSYNC,
        ffi::SQLITE_IOERR_NOMEM,
        ffi::SQLITE_NOMEM,
    ];
    let fault = |(at, calls, code)| Fault { at, calls, code };
    (1..14u64, prop::sample::select(vec![1, 1, 3, 20]), prop::sample::select(codes.to_vec())).prop_map(fault)
}

impl Run {
    fn new() -> Self {
        let fixture = Fixture::new();
        let path = fixture.path();
        Self::begin(fixture, path, None)
    }

    fn on_failing_disk() -> Self {
        let (disk, mut fixture) = (Disk::new(), Fixture::new());
        fixture.store = Self::open(&disk, &fixture.clock).0;
        Self::begin(fixture, PathBuf::new(), Some(disk))
    }

    fn begin(fixture: Fixture, path: PathBuf, disk: Option<Disk>) -> Self {
        let mut run = Self { fixture, model: Model::default(), files: 0, path, disk, refused: 0 };
        run.step(&Op::Deploy(0));
        run
    }

    fn open(disk: &Disk, clock: &TestClock) -> (Store, Recovered) {
        let (path, clock) = (PathBuf::from("neap.db"), Arc::new(clock.clone()));
        Store::open_in_vfs(Options { path, buffer: buffer(64 * MIB), clock }, disk.name).expect("opens")
    }

    /// With the disk failing meanwhile; afterwards it is well.
    fn step_with(&mut self, op: &Op, fault: Option<Fault>) {
        let disk = self.disk.clone().expect("it is on one that can fail");
        // What an opening does then is another test's: it gives up.
        if let (Some(Fault { at, calls, code }), false) = (fault, matches!(op, Op::Close | Op::Kill)) {
            disk.plan(Some(Plan::Fail { at, calls, code }));
        }
        self.step(op);
        disk.plan(None);
        // The ballast would be looked for on a real disk. A commit that failed may come true by a kill,
        // as `faults` has it, until the next one stands in its place.
        let put_right = self.fixture.store.write(|db| {
            db.ballast = ballast::Ballast::none();
            usage::add(db, Usage::UplinkBytes, 1, 1)
        });
        wait(put_right).expect("writes");
    }

    /// `None`: the disk failed, and nothing was done.
    fn done<T>(&mut self, result: Result<T, StoreError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(StoreError::Sqlite { .. } | StoreError::DiskFull) if self.disk.is_some() => {
                self.refused += 1;
                None
            }
            Err(error) => panic!("{}", crate::errors::chain(&error)),
        }
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Deploy(n) => {
                let deployed = self.fixture.store.deploy(function(NAMES[*n]), "m".into(), "i".into(), None);
                if self.done(wait(deployed)).is_some() {
                    self.model.deployed.insert(*n);
                }
            }
            Op::Remove(n) => {
                let removed = wait(self.fixture.store.remove(function(NAMES[*n])));
                let expected = self.model.invocations.iter().filter(|i| i.function == *n).count() as u64;
                match removed {
                    Err(StoreError::NotFound) => assert!(!self.model.deployed.contains(n)),
                    other => {
                        let Some(removed) = self.done(other) else { return };
                        assert!(self.model.deployed.remove(n));
                        assert_eq!(removed, expected);
                        self.model.invocations.retain(|i| i.function != *n);
                        self.model.retained.remove(n);
                    }
                }
            }
            Op::Accept { functions, expires, once, dead, forward } => {
                let id = self.model.next_event();
                let mut arrival = arrival(&id, &[]);
                for n in functions {
                    arrival.invocations.push(NewInvocation {
                        function: function(NAMES[*n]),
                        lane: Lane::Normal,
                        expires: expires.map(|seconds| Duration::from_secs(seconds.into())),
                        once: once.map(|hash| RetainedValue { topic: "t".into(), hash: [hash; 32] }),
                        dead: dead.then(|| Failure::Refused("too large".into())),
                    });
                }
                if *forward {
                    arrival.deliveries.push(delivery(&id, Target::Uplink));
                }
                let accepted = wait(self.fixture.store.accept(arrival.clone()));
                let Some(accepted) = self.done(accepted) else { return };
                let before = self.model.invocations.len();
                self.model.add(&|n| accepted.seq.0 * 4096 + n, &arrival);
                assert_eq!(accepted.invocations, self.model.invocations.len() - before);
            }
            Op::Owe(count) => {
                let ids: Vec<String> = (0..*count).map(|_| self.model.next_event()).collect();
                let deliveries = ids.iter().map(|id| delivery(id, Target::Uplink)).collect();
                if self.done(wait(self.fixture.store.owe(deliveries, vec![]))).is_some() {
                    self.model.owed.extend(ids);
                }
            }
            Op::Lease(n, limit) => {
                let wanted = vec![(function(NAMES[*n]), *limit)];
                let leased = wait(self.fixture.store.lease(wanted));
                let Some(leased) = self.done(leased) else { return };
                let leased: Vec<_> =
                    leased.iter().map(|l| (l.event.id.to_string(), l.attempts, l.lost)).collect();
                assert_eq!(leased, self.model.lease(*n, *limit));
            }
            Op::Settle(n, how) => self.settle(*n, how),
            Op::Delivered(n) => {
                let Some(owed) = self.owed() else { return };
                let ids: Vec<_> = owed.iter().skip(*n).take(2).map(|delivery| delivery.id).collect();
                let Some(()) = self.done(wait(self.fixture.store.delivered(ids))) else { return };
                let end = (n + 2).min(self.model.owed.len());
                self.model.owed.drain((*n).min(end)..end);
            }
            Op::SetAside(n) => {
                let Some(owed) = self.owed() else { return };
                let id = owed.get(*n).map_or(DeliveryId(i64::MAX), |delivery| delivery.id);
                match wait(self.fixture.store.set_aside(id, "refused".into())) {
                    Err(StoreError::NotFound) => assert!(*n >= self.model.owed.len()),
                    other => {
                        let Some(()) = self.done(other) else { return };
                        let gone = self.model.owed.remove(*n);
                        self.model.dead_deliveries.push(gone);
                    }
                }
            }
            Op::Redrive(n) => {
                let count = wait(self.fixture.store.redrive(of_function(*n)));
                let Some(count) = self.done(count) else { return };
                let dead = self.dead(*n);
                assert_eq!(count, dead.len() as u64);
                for invocation in self.model.invocations.iter_mut().filter(|i| dead.contains(&i.id)) {
                    let (attempts, lost, expires) = (0, 0, None);
                    *invocation =
                        Invocation { attempts, lost, expires, state: State::Ready, ..invocation.clone() };
                }
            }
            Op::Purge(n) => {
                let count = wait(self.fixture.store.purge(of_function(*n)));
                let Some(count) = self.done(count) else { return };
                let dead = self.dead(*n);
                assert_eq!(count, dead.len() as u64);
                self.model.invocations.retain(|i| !dead.contains(&i.id));
            }
            Op::RedriveDeliveries => {
                let count = wait(self.fixture.store.redrive_deliveries(None));
                let Some(count) = self.done(count) else { return };
                self.well();
                assert_eq!(count, self.model.dead_deliveries.len() as u64);
                // In the order of their old ids, which is the order of the events' numbers or not:
                // compared as a set by `check`, then taken over as it is.
                let mut moved = std::mem::take(&mut self.model.dead_deliveries);
                let tail: Vec<String> = self
                    .fixture
                    .owed(Target::Uplink)
                    .iter()
                    .skip(self.model.owed.len())
                    .map(|delivery| delivery.body.event.id.to_string())
                    .collect();
                moved.sort();
                let mut sorted = tail.clone();
                sorted.sort();
                assert_eq!(sorted, moved);
                self.model.owed.extend(tail);
            }
            Op::PurgeDeliveries => {
                let count = wait(self.fixture.store.purge_deliveries(None));
                let Some(count) = self.done(count) else { return };
                assert_eq!(count, self.model.dead_deliveries.len() as u64);
                self.model.dead_deliveries.clear();
            }
            Op::Pass(seconds) => self.pass(u64::from(*seconds)),
            Op::Close => {
                wait(self.fixture.store.close());
                self.reopen(self.path.clone(), true);
            }
            Op::Kill => self.kill(),
        }
    }

    fn settle(&mut self, n: usize, how: &How) {
        let running: Vec<usize> = (0..self.model.invocations.len())
            .filter(|n| self.model.invocations[*n].state == State::Running)
            .collect();
        let Some(at) = running.get(n).copied() else {
            match wait(self.fixture.store.settle(InvocationId(1), Settlement::Release)) {
                Err(StoreError::NotFound) => {}
                other => assert!(self.done(other).is_none(), "nobody runs"),
            }
            return;
        };
        let id = self.model.invocations[at].id;
        let (mut owed, mut follow_up) = (Vec::new(), None);
        let settlement = match how {
            How::Done { deliveries, event } => {
                owed.extend((0..*deliveries).map(|_| self.model.next_event()));
                let deliveries = owed.iter().map(|id| delivery(id, Target::Uplink)).collect();
                follow_up = event.map(|n| arrival(&self.model.next_event(), &[NAMES[n]]));
                Settlement::Done { deliveries, events: follow_up.iter().cloned().collect() }
            }
            How::Retry { seconds, counted } => {
                let delay = Duration::from_secs((*seconds).into());
                Settlement::Retry { delay, counted: *counted, error: "failed".into() }
            }
            How::Dead => Settlement::Dead { failure: Failure::Exit(1), output: b"x".to_vec() },
            How::Release => Settlement::Release,
        };
        let settled = wait(self.fixture.store.settle(InvocationId(id), settlement));
        let Some(()) = self.done(settled) else { return };
        let now = self.model.now;
        let invocation = &mut self.model.invocations[at];
        match how {
            How::Done { .. } => {
                self.model.invocations.remove(at);
                self.model.owed.extend(owed);
                if let Some(arrival) = follow_up {
                    self.well();
                    let rows = wait(self.fixture.store.event(arrival.event.id.to_string())).expect("finds");
                    self.model.add(&|n| rows[n as usize].id.0, &arrival);
                }
            }
            How::Retry { seconds, counted } => {
                invocation.attempts += u32::from(*counted);
                invocation.lost += u32::from(!*counted);
                invocation.state = match seconds {
                    0 => State::Ready,
                    _ => State::Waiting { due: now + u64::from(*seconds) },
                };
                if invocation.lost >= LOST_MAX {
                    invocation.state = State::Dead;
                }
            }
            How::Dead => {
                invocation.attempts += 1;
                invocation.state = State::Dead;
            }
            How::Release => invocation.state = State::Ready,
        }
    }

    /// What the model needs to know of the store, from a disk that is well.
    fn well(&self) {
        if let Some(disk) = &self.disk {
            disk.plan(None);
        }
    }

    fn owed(&mut self) -> Option<Vec<Delivery>> {
        self.done(wait(self.fixture.store.owed(all(Target::Uplink))))
    }

    fn dead(&self, n: Option<usize>) -> Vec<i64> {
        let dead = self.model.invocations.iter().filter(|i| i.state == State::Dead);
        dead.filter(|i| n.is_none_or(|n| n == i.function)).map(|i| i.id).collect()
    }

    fn pass(&mut self, seconds: u64) {
        self.fixture.clock.pass(Duration::from_secs(seconds));
        self.model.now += seconds;
    }

    fn kill(&mut self) {
        // Sweeping goes on after an answer. Once it has nothing to do, a question and its
        // answer later the files lie still.
        while self.orphans() > 0 {
            std::thread::yield_now();
        }
        self.fixture.counts();
        self.fixture.counts();
        if let Some(disk) = &mut self.disk {
            let left = disk.after_kill();
            std::mem::replace(disk, left).clear();
            self.reopen(PathBuf::new(), false);
        } else {
            self.files += 1;
            let path = self.fixture.folder.path().join(format!("{}.db", self.files));
            fs::copy(&self.path, &path).expect("copies");
            let wal = |path: &Path| PathBuf::from(format!("{}-wal", path.display()));
            fs::copy(wal(&self.path), wal(&path)).expect("copies");
            self.reopen(path, false);
        }
        // Node time may have gone back by what was not saved: after an hour all is due and old
        // again, whatever was lost of it.
        self.pass(3600);
    }

    fn number(&self, sql: &'static str) -> i64 {
        wait(self.fixture.store.read(move |db| db.query_one(sql, [], "count", |row| row.get(0))))
            .expect("reads")
    }

    fn orphans(&self) -> i64 {
        self.number(
            "SELECT count(*) FROM invocations WHERE function NOT IN
                 (SELECT id FROM functions WHERE removed IS NULL)",
        )
    }

    fn reopen(&mut self, path: PathBuf, clean: bool) {
        let running = self.model.invocations.iter().filter(|i| i.state == State::Running).count() as u64;
        let (store, recovered) = match &self.disk {
            Some(disk) => Self::open(disk, &self.fixture.clock),
            None => open_at(&path, &self.fixture.clock),
        };
        self.fixture.store = store;
        self.path = path;
        assert_eq!(
            recovered,
            Recovered { leases: if clean { 0 } else { running }, clean, ..Recovered::default() }
        );
        self.model.restart(clean);
        for invocation in &mut self.model.invocations {
            if invocation.lost >= LOST_MAX && invocation.state == State::Ready {
                invocation.state = State::Dead;
            }
        }
    }

    /// Everything that can be seen.
    fn check(&self) {
        let rows = self.fixture.invocations();
        let found: Vec<_> = rows
            .iter()
            .map(|row| {
                let function = index(&row.function);
                (row.id.0, function, row.event.id.to_string(), row.state, row.attempts, row.lost)
            })
            .collect();
        let expected = self.model.invocations.iter().map(|i| {
            let state = match i.state {
                State::Ready | State::Waiting { .. } => InvocationState::Ready,
                State::Running => InvocationState::Running,
                State::Dead => InvocationState::Dead,
            };
            (i.id, i.function, i.event.clone(), state, i.attempts, i.lost)
        });
        assert_eq!(found, expected.collect::<Vec<_>>());

        let owed = self.fixture.owed(Target::Uplink);
        let owed: Vec<_> = owed.iter().map(|delivery| delivery.body.event.id.to_string()).collect();
        assert_eq!(owed, self.model.owed);

        let counts = self.fixture.counts();
        let of = |wanted: InvocationState| rows.iter().filter(|row| row.state == wanted).count() as u64;
        assert_eq!(counts.ready, of(InvocationState::Ready));
        assert_eq!(counts.running, of(InvocationState::Running));
        assert_eq!(counts.dead, of(InvocationState::Dead));
        assert_eq!(counts.owed_uplink, self.model.owed.len() as u64);
        assert_eq!(counts.dead_deliveries, self.model.dead_deliveries.len() as u64);
        assert_eq!(counts.expired, self.model.expired);
        assert_eq!(counts.per_function.len(), self.model.deployed.len());

        let (due, _) = wait(self.fixture.store.due()).expect("reads");
        let due: BTreeSet<usize> = due.iter().map(index).collect();
        let now = self.model.now;
        let is_due = |i: &&Invocation| {
            i.state == State::Ready || matches!(i.state, State::Waiting { due } if due <= now)
        };
        assert_eq!(due, self.model.invocations.iter().filter(is_due).map(|i| i.function).collect());
    }

    /// No event is left without an invocation, and the file is sound.
    fn check_file(&self) {
        while self.orphans() > 0 {
            std::thread::yield_now();
        }
        let unneeded = self.number(
            "SELECT count(*) FROM events WHERE seq NOT IN
                 (SELECT id / 4096 FROM invocations UNION SELECT id / 4096 FROM dead_invocations)",
        );
        assert_eq!(unneeded, 0, "events that nobody needs");
        let sound = self.fixture.store.read(|db| {
            let sql = "PRAGMA integrity_check";
            db.query_one(sql, [], "check", |row| row.get::<_, String>(0))
        });
        assert_eq!(wait(sound).expect("checks"), "ok");
    }
}

fn of_function(n: Option<usize>) -> InvocationFilter {
    InvocationFilter { function: n.map(|n| function(NAMES[n])), ..InvocationFilter::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 400, ..ProptestConfig::default() })]

    #[test]
    fn store_does_what_a_naive_model_does(ops in prop::collection::vec(ops(), 1..80)) {
        let mut run = Run::new();
        for op in &ops {
            run.step(op);
            run.check();
        }
        run.check_file();
    }
}

#[test]
fn store_on_a_failing_disk_does_what_it_says_or_nothing() {
    let steps = prop::collection::vec((ops(), prop::option::weighted(0.5, faults())), 1..80);
    let refused = std::cell::Cell::new(0);
    let config = ProptestConfig { cases: 48, max_shrink_iters: 400, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);

    let done = runner.run(&steps, |steps| {
        let mut run = Run::on_failing_disk();
        for (op, fault) in &steps {
            run.step_with(op, *fault);
            run.check();
        }
        run.check_file();
        refused.set(refused.get() + run.refused);
        Ok(())
    });

    done.unwrap_or_else(|failed| panic!("{failed}"));
    assert!(refused.get() > 0, "no failure of the disk was seen");
}
