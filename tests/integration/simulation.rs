//! Scheduler, breaker, rate, retry, sync order and link, as the pure code that the daemon runs,
//! under a virtual clock, with a runtime, a store and an uplink made of plain maps: thousands of
//! days pass in a few seconds, and the promises are looked at after every step.
//!
//! A site's days: events come in bursts, a function breaks for hours and is mended, some events
//! are poison, the daemon is killed, the link goes and comes and loses what was on its way.
//!
//! Each run has a seed, which a failure prints: `NEAP_TEST_SEED=… cargo test simulation::`.
//! `NEAP_SIMULATED_DAYS` makes it longer.

use neap::config::manifest;
use neap::ingress::routes::{Deployment, Routes};
use neap::model::{
    Digest, Event, EventId, Failure, FunctionName, InvocationId, Lane, Outcome, Revision, UnixMs,
};
use neap::scheduler::budget::Budget;
use neap::scheduler::gates::{Ended, Gates};
use neap::scheduler::plan::{Capacity, Grant, Plan};
use neap::scheduler::settle::{self, Context};
use neap::store::{LOST_MAX, Leased, Settlement};
use neap::sync::link::{self, Effect, End, Input, Link, Refusal, State};
use neap::sync::order::{Share, Side};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(86_400);
/// Of one run. Many short runs see more kinds of weather than one long one.
const RUN_DAYS: u32 = 50;
const RUNS: u32 = 60;
const WINDOW: usize = 8;
const MEMORY: u64 = 100;

#[test]
fn promises_hold_over_thousands_of_simulated_days() {
    let given = std::env::var("NEAP_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let days = std::env::var("NEAP_SIMULATED_DAYS").ok().and_then(|text| text.parse().ok());
    let days: u32 = days.unwrap_or(RUN_DAYS * RUNS);
    let (runs, first) = match given {
        Some(seed) => (1, seed),
        None => (days.div_ceil(RUN_DAYS), fastrand::u64(..)),
    };
    let mut total = Tally::default();
    for run in 0..u64::from(runs) {
        let seed = first.wrapping_add(run);
        let guard = Said(seed);
        let tally = World::new(seed, None).run(DAY * RUN_DAYS);
        std::mem::forget(guard);
        total.add(&tally);
    }
    eprintln!("{} days from seed {first}: {total:?}", runs * RUN_DAYS);
    // A run in which nothing went wrong would show nothing.
    if given.is_none() && days >= 1000 {
        let t = &total;
        let seen =
            [t.delivered, t.dead, t.deferred, t.lost_attempts, t.duplicates, t.kills, t.breaks, t.replayed];
        assert!(seen.iter().all(|count| *count > 0), "{total:?}");
    }
}

/// What a node could do wrong; the simulation must see each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// A delivery is deleted when it is sent, not when it is acknowledged.
    DeletesWhenSent,
    /// What ran when the daemon was killed is forgotten.
    ForgetsWhatRan,
    /// A new connection goes on behind what was in flight.
    GoesOnBehind,
    /// The backlog goes newest first.
    NewestFirst,
    /// An open breaker lets nothing through, not even a probe.
    NeverProbes,
    /// `[rate]` is not asked.
    IgnoresRate,
}

const FLAWS: [Flaw; 6] = [
    Flaw::DeletesWhenSent,
    Flaw::ForgetsWhatRan,
    Flaw::GoesOnBehind,
    Flaw::NewestFirst,
    Flaw::NeverProbes,
    Flaw::IgnoresRate,
];

/// The proof's own proof: with a flaw planted, an assertion fails.
#[test]
fn each_planted_flaw_is_seen() {
    let first = fastrand::u64(..);
    for flaw in FLAWS {
        let fails = |run: u64| {
            let seed = first.wrapping_add(run);
            std::panic::catch_unwind(|| World::new(seed, Some(flaw)).run(DAY * 20)).is_err()
        };
        assert!((0..30).any(fails), "{flaw:?} is not seen; seeds from {first}");
    }
}

/// Prints the seed when it is dropped, which a run that passes prevents.
struct Said(u64);

impl Drop for Said {
    fn drop(&mut self) {
        eprintln!("NEAP_TEST_SEED={}", self.0);
    }
}

#[derive(Clone, Debug, Default)]
struct Tally {
    accepted: u64,
    delivered: u64,
    dead: u64,
    deferred: u64,
    lost_attempts: u64,
    duplicates: u64,
    replayed: u64,
    kills: u64,
    breaks: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.accepted += other.accepted;
        self.delivered += other.delivered;
        self.dead += other.dead;
        self.deferred += other.deferred;
        self.lost_attempts += other.lost_attempts;
        self.duplicates += other.duplicates;
        self.replayed += other.replayed;
        self.kills += other.kills;
        self.breaks += other.breaks;
    }
}

/// What will happen, and when.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Arrive,
    /// Of this life of the daemon.
    Look(u64),
    /// Of this life of the daemon: an instance ends.
    End(u64, i64),
    Link(u64),
    /// Of this connection: the uplink got it, the acknowledgement came.
    Got(u64, i64),
    Acked(u64, i64),
    /// The connection is lost while acknowledgements are on their way.
    Cut(u64),
    Kill,
    /// The network goes or comes.
    Network(bool),
    /// This function breaks or is mended.
    Break(usize, bool),
}

#[derive(Clone, Debug)]
enum Place {
    Ready,
    Waiting(Duration),
    Running,
    Dead,
    /// It succeeded and is owed.
    Owed,
    Delivered,
}

struct Invocation {
    function: usize,
    place: Place,
    attempts: u32,
    lost: u32,
    /// It fails whenever it is run.
    poison: bool,
    leased: Option<Grant>,
}

struct Function {
    name: FunctionName,
    revision: Arc<Revision>,
    broken: bool,
    /// Starts that its rate has let through since the bucket was full, and when that was.
    starts: (u64, Duration),
    /// What came to the uplink for the first time, fresh and replayed apart.
    arrived: [Vec<i64>; 2],
    running: u32,
}

struct World {
    random: fastrand::Rng,
    now: Duration,
    end: Duration,
    heap: BinaryHeap<Reverse<(Duration, u64, What)>>,
    sequence: u64,
    functions: Vec<Function>,
    routes: Routes,
    /// Everything that was ever accepted: nothing leaves it.
    all: BTreeMap<i64, Invocation>,
    /// Those that are not settled: keeps a step short.
    living: BTreeSet<i64>,
    /// By the number that each got when it became owed, which is what the outbox orders by.
    owed: BTreeMap<i64, i64>,
    numbers: i64,
    plan: Plan,
    gates: Gates,
    life: u64,
    link: Link,
    connection: u64,
    network: bool,
    arrives: Duration,
    session: Option<Session>,
    flaw: Option<Flaw>,
    /// Every number that was ever owed, and its invocation.
    numbered: BTreeMap<i64, i64>,
    /// Where the last connection stood, for `Flaw::GoesOnBehind`.
    taken: [i64; 2],
    received: BTreeMap<i64, u32>,
    tally: Tally,
}

/// What a connection knows; it is forgotten with it.
struct Session {
    /// Ids up to here were owed when it began.
    backlog_upto: i64,
    /// Sent up to here, of the backlog and of what is fresh.
    taken: [i64; 2],
    share: Share,
    in_flight: BTreeSet<i64>,
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        let texts = [
            "name = \"plain\"\nimage = \"i\"\n[scale]\nmax = 2",
            "name = \"paced\"\nimage = \"i\"\n[rate]\nper_second = 0.05\nburst = 3\n[retry]\nattempts = 3",
            "name = \"often-broken\"\nimage = \"i\"\n[scale]\nmax = 3\n[retry]\nattempts = 2",
        ];
        let config = neap::config::Config::defaults(&neap::config::Machine::default()).permissive();
        let functions: Vec<Function> = texts
            .iter()
            .map(|text| {
                let text = format!("{text}\n[[output]]\nto = \"uplink\"\ntopic = \"t\"");
                let manifest = manifest::parse("f.toml", &text, &config).expect("a good manifest");
                let image = Digest::from_sha256(&[0; 32]);
                let revision = Arc::new(Revision { number: 1, manifest, image, uid_base: 0 });
                Function {
                    name: revision.name().clone(),
                    revision,
                    broken: false,
                    starts: (0, Duration::ZERO),
                    arrived: [Vec::new(), Vec::new()],
                    running: 0,
                }
            })
            .collect();
        let deployments = functions.iter().map(|function| {
            let deployment = Deployment {
                revision: function.revision.clone(),
                paused: false,
                file: None,
                created: UnixMs(0),
                unusable: None,
            };
            (function.name.clone(), deployment)
        });
        let routes = Routes { functions: deployments.collect(), node: "gw".to_owned(), ..Routes::default() };
        let mut world = Self {
            random,
            now: Duration::ZERO,
            end: Duration::ZERO,
            heap: BinaryHeap::new(),
            sequence: 0,
            functions,
            routes,
            all: BTreeMap::new(),
            living: BTreeSet::new(),
            owed: BTreeMap::new(),
            numbers: 0,
            plan: Plan::new(Budget::new(MEMORY)),
            gates: Gates::default(),
            life: 0,
            link: Link::default(),
            connection: 0,
            network: true,
            arrives: Duration::ZERO,
            session: None,
            flaw,
            numbered: BTreeMap::new(),
            taken: [0, 0],
            received: BTreeMap::new(),
            tally: Tally::default(),
        };
        world.boot();
        world
    }

    fn run(mut self, days: Duration) -> Tally {
        self.end = days;
        self.at(1.0, What::Arrive);
        self.at(3_600.0, What::Kill);
        self.at(1_800.0, What::Network(false));
        for function in 0..self.functions.len() {
            self.at(40_000.0, What::Break(function, true));
        }
        // Nothing new after the end; what there is must come to its own.
        let most = self.end + DAY * 4;
        while let Some(Reverse((when, _, what))) = self.heap.pop() {
            if when > most {
                break;
            }
            assert!(when >= self.now, "time goes on");
            self.now = when;
            let quiet = self.now > self.end;
            self.step(what, quiet);
            self.check();
        }
        self.settled();
        self.tally
    }

    fn at(&mut self, mean_seconds: f64, what: What) {
        // Exponential: bursts and silences as they come.
        let seconds = -mean_seconds * (1.0 - self.random.f64()).ln();
        self.exactly(Duration::from_secs_f64(seconds.clamp(0.001, 2e6)), what);
    }

    fn exactly(&mut self, after: Duration, what: What) {
        self.sequence += 1;
        self.heap.push(Reverse((self.now + after, self.sequence, what)));
    }

    /// A daemon starts: all it knows is what is stored.
    fn boot(&mut self) {
        self.life += 1;
        self.plan = Plan::new(Budget::new(MEMORY));
        self.plan.set_functions(self.functions.iter().map(|function| {
            let instances_max = function.revision.manifest.scale.max;
            let lane = function.revision.manifest.priority;
            let capacity =
                Capacity { instances_max, memory_bytes: 30, lane, runnable: true, shared_by: None };
            (function.name.clone(), capacity)
        }));
        self.gates = Gates::default();
        let gated = self.functions.iter().map(|f| (f.name.clone(), 1, f.revision.manifest.rate));
        self.gates.set_functions(gated, self.now);
        for function in &mut self.functions {
            (function.starts, function.running) = ((0, self.now), 0);
        }
        for id in self.living.clone() {
            let lost = {
                let invocation = self.all.get_mut(&id).expect("it was accepted");
                invocation.leased = None;
                let running = matches!(invocation.place, Place::Running);
                if running && self.flaw == Some(Flaw::ForgetsWhatRan) {
                    self.living.remove(&id);
                } else if running {
                    invocation.lost += 1;
                    invocation.place = Place::Ready;
                }
                running && invocation.lost >= LOST_MAX
            };
            if lost {
                self.die(id);
            }
        }
        self.hang_up();
        self.link = Link::default();
        self.link_step(Input::Configured(Some(link::Versions::Only(link::Version::V5))));
        self.exactly(Duration::from_millis(1), What::Look(self.life));
    }

    fn step(&mut self, what: What, quiet: bool) {
        match what {
            What::Arrive => {
                if !quiet {
                    for _ in 0..self.random.usize(1..6) {
                        self.accept();
                    }
                    self.at(2_500.0, What::Arrive);
                    self.look();
                    self.drain();
                }
            }
            What::Look(life) if life == self.life => {
                self.look();
                // As the driver: level-triggered, by a period at the latest.
                let next = self.next_look();
                self.exactly(next, What::Look(self.life));
            }
            What::End(life, id) if life == self.life => self.ended(id),
            What::Cut(connection) if connection == self.connection && self.session.is_some() => self.cut(),
            What::Kill => {
                if !quiet {
                    self.tally.kills += 1;
                    self.boot();
                    self.at(30_000.0, What::Kill);
                }
            }
            What::Network(up) => {
                self.network = up || quiet;
                if !self.network && self.session.is_some() {
                    self.cut();
                }
                if !quiet {
                    self.at(if up { 15_000.0 } else { 9_000.0 }, What::Network(!up));
                }
            }
            What::Break(function, broken) => {
                self.functions[function].broken = broken && !quiet;
                if !quiet {
                    self.at(if broken { 20_000.0 } else { 90_000.0 }, What::Break(function, !broken));
                }
            }
            What::Link(life) if life == self.life => self.link_step(Input::Tick),
            What::Got(connection, id) if connection == self.connection && self.session.is_some() => {
                self.got(id);
            }
            What::Acked(connection, id) if connection == self.connection => self.acked(id),
            What::Look(_)
            | What::Cut(_)
            | What::End(..)
            | What::Link(_)
            | What::Got(..)
            | What::Acked(..) => {}
        }
    }

    fn accept(&mut self) {
        let id = self.all.len() as i64 + 1;
        let function = self.random.usize(..self.functions.len());
        let poison = self.random.u32(..40) == 0;
        let place = Place::Ready;
        self.all.insert(id, Invocation { function, place, attempts: 0, lost: 0, poison, leased: None });
        self.living.insert(id);
        self.tally.accepted += 1;
    }

    fn due(&self) -> BTreeMap<usize, Vec<i64>> {
        let mut due: BTreeMap<usize, Vec<i64>> = BTreeMap::new();
        for id in &self.living {
            let invocation = &self.all[id];
            let now = match invocation.place {
                Place::Ready => true,
                Place::Waiting(until) => until <= self.now,
                _ => false,
            };
            if now {
                due.entry(invocation.function).or_default().push(*id);
            }
        }
        due
    }

    fn next_look(&mut self) -> Duration {
        let due = self.due();
        let waits = self.living.iter().filter_map(|id| match self.all[id].place {
            Place::Waiting(until) if until > self.now => Some(until - self.now),
            _ => None,
        });
        let soonest = waits.min();
        let (gates, functions, now) = (&mut self.gates, &self.functions, self.now);
        let held: Vec<usize> =
            due.keys().copied().filter(|at| gates.limit(&functions[*at].name, now) == 0).collect();
        let gated = held.iter().filter_map(|at| gates.wait(&functions[*at].name, now)).min();
        // A period of minutes, where the driver has one of seconds: nothing may hang on it.
        let wait = soonest.into_iter().chain(gated).min().unwrap_or(Duration::from_secs(600));
        wait.clamp(Duration::from_millis(1), Duration::from_secs(600))
    }

    /// What the driver does with `due` and `lease`.
    fn look(&mut self) {
        let due = self.due();
        let names: Vec<FunctionName> = due.keys().map(|at| self.functions[*at].name.clone()).collect();
        let (gates, now) = (&mut self.gates, self.now);
        let limits: BTreeMap<_, _> =
            names.iter().map(|name| (name.clone(), gates.limit(name, now))).collect();
        let limits = match self.flaw {
            Some(Flaw::IgnoresRate) => limits.into_keys().map(|name| (name, u32::MAX)).collect(),
            Some(Flaw::NeverProbes) => {
                let shut = |name: FunctionName, limit| (gates.is_open(&name), name, limit);
                let limits = limits.into_iter().map(|(name, limit)| shut(name, limit));
                limits.map(|(open, name, limit)| (name, if open { 0 } else { limit })).collect()
            }
            _ => limits,
        };
        let held = self.plan.leases_within(&names, |name| limits[name]);
        for (name, grants) in held {
            let at = self.functions.iter().position(|f| f.name == name).expect("it is deployed");
            let mut ids = due[&at].iter();
            for grant in grants {
                match ids.next() {
                    Some(id) => self.start(*id, grant),
                    None => self.plan.ended(grant),
                }
            }
        }
    }

    fn start(&mut self, id: i64, grant: Grant) {
        let at = self.all[&id].function;
        let open = self.gates.is_open(&self.functions[at].name);
        self.gates.started(&grant.function, InvocationId(id), self.now);
        let function = &mut self.functions[at];
        function.starts.0 += 1;
        function.running += 1;
        assert!(!open || self.gates.limit(&grant.function, self.now) == 0, "one probe at a time");
        if let Some(rate) = function.revision.manifest.rate {
            let since = (self.now - function.starts.1).as_millis() as u64;
            let most = u64::from(rate.burst) + since * u64::from(rate.per_second_millis) / 1_000_000;
            assert!(function.starts.0 <= most, "{} starts, {most} allowed", function.starts.0);
        }
        let invocation = self.all.get_mut(&id).expect("it was accepted");
        assert!(matches!(invocation.place, Place::Ready | Place::Waiting(_)), "leased twice: {id}");
        (invocation.place, invocation.leased) = (Place::Running, Some(grant));
        self.at(20.0, What::End(self.life, id));
    }

    fn ended(&mut self, id: i64) {
        let random = self.random.u64(..);
        let roll = self.random.u32(..100);
        let (at, attempts, lost, poison) = {
            let invocation = &self.all[&id];
            (invocation.function, invocation.attempts, invocation.lost, invocation.poison)
        };
        let (broken, revision) = (self.functions[at].broken, self.functions[at].revision.clone());
        let fails = broken || poison || roll < 4;
        let outcome = match (roll, fails) {
            (99, _) => Outcome::Lost,
            (_, true) => Outcome::failed(Failure::Exit(1), Vec::new(), Duration::ZERO),
            (_, false) => Outcome::Succeeded {
                output: b"x".to_vec(),
                content_type: None,
                event: None,
                took: Duration::ZERO,
            },
        };
        let ended = match &outcome {
            Outcome::Succeeded { .. } => Ended::Succeeded,
            Outcome::Failed { .. } => Ended::Failed,
            Outcome::Lost => Ended::Other,
        };
        let name = self.functions[at].name.clone();
        let counted = self.gates.ended((&name, 1), InvocationId(id), ended, self.now, random);
        let context = Context { routes: &self.routes, revision: &revision, now: UnixMs(0), counted, random };
        let lease = Leased {
            id: InvocationId(id),
            function: name,
            lane: Lane::Normal,
            event: event(id),
            attempts,
            lost,
        };
        let settlement = settle::settle(&lease, outcome, &context);
        let grant = self.all.get_mut(&id).and_then(|i| i.leased.take()).expect("it ran");
        self.plan.ended(grant);
        self.functions[at].running -= 1;
        let invocation = self.all.get_mut(&id).expect("it was accepted");
        match settlement {
            Settlement::Done { deliveries, .. } => {
                assert_eq!(deliveries.len(), 1);
                invocation.place = Place::Owed;
                self.living.remove(&id);
                self.numbers += 1;
                self.owed.insert(self.numbers, id);
                self.numbered.insert(self.numbers, id);
                self.drain();
            }
            Settlement::Retry { delay, counted, .. } => {
                if counted {
                    invocation.attempts += 1;
                } else {
                    invocation.lost += 1;
                    self.tally.lost_attempts += 1;
                }
                let limit = revision.manifest.retry.attempts;
                assert!(invocation.attempts < limit, "retried beyond its attempts");
                invocation.place = Place::Waiting(self.now + delay);
                if invocation.lost >= LOST_MAX {
                    self.die(id);
                }
            }
            Settlement::Defer { delay, .. } => {
                self.tally.deferred += 1;
                invocation.place = Place::Waiting(self.now + delay);
            }
            Settlement::Dead { .. } => {
                let limit = revision.manifest.retry.attempts;
                assert!(counted && invocation.attempts + 1 == limit, "dead before its attempts were used up");
                self.die(id);
            }
            Settlement::Release => panic!("nothing stops here"),
        }
        self.look();
    }

    fn die(&mut self, id: i64) {
        self.all.get_mut(&id).expect("it was accepted").place = Place::Dead;
        self.living.remove(&id);
        self.tally.dead += 1;
    }

    // -- the link and what is owed over it

    fn link_step(&mut self, input: Input) {
        let (next, effect) = self.link.step(input, self.now, self.random.u64(..));
        self.link = next;
        match effect {
            Effect::Connect(_) => {
                assert!(self.session.is_none(), "two connections at once");
                if self.network && self.random.u32(..10) > 0 {
                    self.link_step(Input::Greeted);
                    self.greeted();
                } else {
                    let refusal = if self.random.bool() { Refusal::Other } else { Refusal::ClosedOnConnect };
                    self.link_step(Input::Failed(refusal));
                }
            }
            Effect::WaitUntil(until) => {
                let wait = until.saturating_sub(self.now);
                assert!(wait <= Duration::from_secs(30), "the link rests too long: {wait:?}");
                self.exactly(wait, What::Link(self.life));
            }
            Effect::HangUp | Effect::None => {}
        }
    }

    fn greeted(&mut self) {
        self.connection += 1;
        let backlog_upto = self.numbers;
        let taken = match self.flaw {
            Some(Flaw::GoesOnBehind) => [self.taken[0], self.taken[1].max(backlog_upto)],
            _ => [0, backlog_upto],
        };
        let in_flight = BTreeSet::new();
        self.session = Some(Session { backlog_upto, taken, share: Share::new(80), in_flight });
        self.drain();
    }

    fn cut(&mut self) {
        self.tally.breaks += 1;
        self.hang_up();
        self.link_step(Input::Ended(End::Lost));
    }

    fn hang_up(&mut self) {
        self.session = None;
        self.connection += 1;
    }

    fn drain(&mut self) {
        loop {
            let Some(session) = &mut self.session else { return };
            if session.in_flight.len() >= WINDOW {
                return;
            }
            let next = |after: i64, upto: i64| {
                self.owed
                    .range(after + 1..)
                    .next()
                    .map(|(number, _)| *number)
                    .filter(|number| *number <= upto)
            };
            let live = next(session.taken[1], i64::MAX);
            let backlog = match self.flaw {
                Some(Flaw::NewestFirst) => {
                    let behind = self.owed.range(..=session.backlog_upto).rev().map(|(number, _)| *number);
                    behind.into_iter().find(|number| !session.in_flight.contains(number))
                }
                _ => next(session.taken[0], session.backlog_upto),
            };
            let (side, number) = match session.share.next(live.is_some(), backlog.is_some()) {
                None => return,
                Some(Side::Live) => (1, live.expect("it waits")),
                Some(Side::Backlog) => (0, backlog.expect("it waits")),
            };
            session.taken[side] = number;
            self.taken = session.taken;
            assert!(session.in_flight.insert(number), "sent twice over one connection");
            let connection = self.connection;
            // A connection keeps the order: nothing arrives before what was sent before.
            let arrives = (self.now + Duration::from_millis(20 + self.random.u64(..200))).max(self.arrives);
            self.arrives = arrives;
            self.exactly(arrives - self.now, What::Got(connection, number));
            if self.flaw == Some(Flaw::DeletesWhenSent) {
                self.deleted(number);
            }
        }
    }

    fn got(&mut self, number: i64) {
        let Some(id) = self.numbered.get(&number).copied() else { return };
        let times = self.received.entry(id).or_default();
        *times += 1;
        if *times > 1 {
            self.tally.duplicates += 1;
        } else {
            let replayed = self.session.as_ref().is_some_and(|session| number <= session.backlog_upto);
            self.tally.replayed += u64::from(replayed);
            let arrived = &mut self.functions[self.all[&id].function].arrived[usize::from(replayed)];
            // Fresh and replayed ones are each in order.
            assert!(
                arrived.last().is_none_or(|last| *last < number),
                "{number} overtook {:?}",
                arrived.last()
            );
            arrived.push(number);
        }
        let connection = self.connection;
        if self.random.u32(..30) == 0 {
            self.exactly(Duration::from_millis(10), What::Cut(connection));
        }
        self.exactly(Duration::from_millis(30), What::Acked(connection, number));
    }

    fn acked(&mut self, number: i64) {
        let Some(session) = &mut self.session else { return };
        session.in_flight.remove(&number);
        if let Some(id) = self.owed.get(&number) {
            assert!(self.received.contains_key(id), "deleted before the uplink had it");
            self.deleted(number);
        }
        self.drain();
    }

    fn deleted(&mut self, number: i64) {
        if let Some(id) = self.owed.remove(&number) {
            self.all.get_mut(&id).expect("it was accepted").place = Place::Delivered;
            self.tally.delivered += 1;
        }
    }

    // -- the promises

    fn check(&self) {
        assert!(self.plan.budget().reserved_bytes() <= MEMORY);
        let running: u32 = self.functions.iter().map(|function| function.running).sum();
        assert_eq!(u64::from(running), self.plan.taken());
        for function in &self.functions {
            assert!(function.running <= function.revision.manifest.scale.max, "more than scale.max");
        }
        assert_eq!(self.session.is_some(), matches!(self.link.state, State::Up { .. }));
        let settled = self.tally.delivered + self.tally.dead + self.owed.len() as u64;
        assert_eq!(self.tally.accepted, settled + self.living.len() as u64, "an event is nowhere");
    }

    /// Long after the last event, with everything mended.
    fn settled(&self) {
        assert!(self.living.is_empty(), "{} events still wait: {:?}", self.living.len(), self.gates);
        assert!(self.owed.is_empty(), "{} deliveries are still owed: {:?}", self.owed.len(), self.link);
        for (id, invocation) in &self.all {
            match invocation.place {
                Place::Delivered => assert!(self.received.contains_key(id), "{id} is lost"),
                Place::Dead => assert!(!self.received.contains_key(id), "{id} is dead and was delivered"),
                _ => panic!("{id} is nowhere"),
            }
        }
        // Duplicates: what was in flight when a connection ended, no more.
        let ends = self.tally.breaks + self.tally.kills;
        assert!(self.tally.duplicates <= ends * WINDOW as u64, "{:?}", self.tally);
    }
}

fn event(id: i64) -> Event {
    Event {
        id: EventId::parse(&id.to_string()).expect("a good id"),
        source: "/gw/mqtt".to_owned(),
        kind: "neap.mqtt.message".to_owned(),
        subject: Some("a".to_owned()),
        time: None,
        content_type: None,
        extensions: BTreeMap::new(),
        http: None,
        data: Vec::new(),
    }
}
