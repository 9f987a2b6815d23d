//! Lock-step with a naive model on a disk that fails: cuts of the power, kills between any two
//! calls to the disk, and errors of every kind. What was answered is there, what was refused has
//! left nothing, and what was under way is there whole or not at all.
//!
//! All of it is drawn from one seed, which a failure names: `NEAP_TEST_SEED=… cargo test faults`.
//! `NEAP_TEST_CUTS` sets how many there are.

use super::vfs::{Disk, Plan};
use super::*;
use crate::model::Failure;
use crate::store::writer::{Request, run_group};
use rusqlite::ffi;
use std::collections::BTreeSet;
use std::sync::Mutex;
use writer::Call;

/// What one request did, if it was committed.
#[derive(Clone, Debug)]
enum Effect {
    Accepted(String),
    Forwarded(String),
    /// The event's delivery.
    Settled(String),
    Died(String),
    Delivered(String),
    Purged(String),
}

/// All that can be seen of a store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Seen {
    inbox: BTreeSet<String>,
    dead: BTreeSet<String>,
    outbox: BTreeSet<String>,
}

impl Seen {
    fn apply(&mut self, effects: &[Effect]) {
        for effect in effects {
            match effect {
                Effect::Accepted(id) => assert!(self.inbox.insert(id.clone())),
                Effect::Forwarded(id) => assert!(self.outbox.insert(id.clone())),
                Effect::Settled(id) => {
                    assert!(self.inbox.remove(id));
                    assert!(self.outbox.insert(format!("of-{id}")));
                }
                Effect::Died(id) => {
                    assert!(self.inbox.remove(id));
                    assert!(self.dead.insert(id.clone()));
                }
                Effect::Delivered(id) => assert!(self.outbox.remove(id)),
                Effect::Purged(id) => assert!(self.dead.remove(id)),
            }
        }
    }

    /// For people.
    fn differs(&self, found: &Self) -> String {
        let sets = |of: fn(&Self) -> &BTreeSet<String>| {
            let missing: Vec<_> = of(self).difference(of(found)).cloned().collect();
            let more: Vec<_> = of(found).difference(of(self)).cloned().collect();
            format!("missing {missing:?}, more {more:?}")
        };
        format!("inbox: {}; dead: {}; outbox: {}", sets(|s| &s.inbox), sets(|s| &s.dead), sets(|s| &s.outbox))
    }

    fn of(db: &Db) -> Self {
        let ids = |sql| {
            let ids: Vec<String> = db.query(sql, [], "look", |row| row.get(0)).expect("reads");
            let count = ids.len();
            let ids: BTreeSet<String> = ids.into_iter().collect();
            assert_eq!(ids.len(), count, "nothing is there twice");
            ids
        };
        Self {
            inbox: ids("SELECT event_id FROM invocations i JOIN events ON seq = i.id / 4096"),
            dead: ids("SELECT event_id FROM dead_invocations i JOIN events ON seq = i.id / 4096"),
            outbox: ids("SELECT event_id FROM deliveries"),
        }
    }
}

type Answer = smol::channel::Receiver<Result<Vec<Effect>, StoreError>>;

struct Site {
    disk: Disk,
    clock: TestClock,
    db: Option<Db>,
    rng: fastrand::Rng,
    /// What was answered.
    known: Seen,
    /// What the group under way did before the disk stopped.
    doubtful: Arc<Mutex<Vec<Effect>>>,
    events: u32,
}

impl Site {
    fn new(seed: u64) -> Self {
        let mut site = Self {
            disk: Disk::new(),
            clock: TestClock::new(),
            db: None,
            rng: fastrand::Rng::with_seed(seed),
            known: Seen::default(),
            doubtful: Arc::default(),
            events: 0,
        };
        site.open();
        let db = site.db.as_mut().expect("open");
        db.begin(true).expect("begins");
        functions::deploy(db, &function("f"), "m", "i", None).expect("deploys");
        db.commit().expect("commits");
        site
    }

    fn open(&mut self) {
        let path = PathBuf::from("neap.db");
        let options = Options { path, buffer: buffer(64 * MIB), clock: Arc::new(self.clock.clone()) };
        let (db, recovered) = Db::open_in_vfs(&options, self.disk.name).expect("opens");
        assert!(recovered.salvaged.is_none(), "never damaged: {recovered:?}");
        self.db = Some(db);
    }

    /// A group of requests; what was answered is known.
    fn group(&mut self) -> Vec<StoreError> {
        lock(&self.doubtful).clear();
        let mut group: Vec<Box<dyn Request>> = Vec::new();
        let mut answers = Vec::new();
        for _ in 0..self.rng.u32(1..12) {
            let (request, answer) = self.request();
            group.push(request);
            answers.push(answer);
        }
        run_group(self.db.as_mut().expect("open"), &mut group);
        group.into_iter().for_each(Request::answer);
        let mut refused = Vec::new();
        for answer in answers {
            match answer.try_recv().expect("an answer") {
                Ok(effects) => self.known.apply(&effects),
                Err(error) => refused.push(error),
            }
        }
        self.clock.pass(Duration::from_millis(self.rng.u64(0..4_000)));
        refused
    }

    fn request(&mut self) -> (Box<dyn Request>, Answer) {
        let what = self.rng.u32(0..10);
        self.events += 1;
        let id = format!("e{}", self.events);
        let bytes = *self.rng.choice([10, 300, 300, 1_200, 5_000, 40_000].iter()).unwrap_or(&10);
        let forward = self.rng.u8(0..4) == 0;
        let (disk, doubtful) = (self.disk.clone(), self.doubtful.clone());
        let run = move |db: &mut Db| {
            let effects = match what {
                0..5 => accept(db, &id, bytes, forward)?,
                5..7 => settle(db, false)?,
                7 => settle(db, true)?,
                8 => purge(db)?,
                _ => deliver(db)?,
            };
            // What runs when the disk has stopped is never committed.
            if !disk.stopped() {
                lock(&doubtful).extend(effects.iter().cloned());
            }
            Ok(effects)
        };
        let (reply, answer) = smol::channel::bounded(1);
        (
            Box::new(Call { run, line: None, closed: false, writes: true, bytes: 0, result: None, reply }),
            answer,
        )
    }

    /// The daemon is gone; another starts on what is on the disk.
    fn restart(&mut self, disk: Disk) {
        self.db = None;
        self.disk.clear();
        self.disk = disk;
        self.open();
        let found = Seen::of(self.db.as_ref().expect("open"));
        if found != self.known {
            let mut whole = self.known.clone();
            whole.apply(&lock(&self.doubtful));
            let (answered, under_way) = (self.known.differs(&found), whole.differs(&found));
            assert!(
                found == whole,
                "against what was answered: {answered}\nwith what was under way: {under_way}"
            );
            self.known = found;
        }
        lock(&self.doubtful).clear();
        self.check();
    }

    fn check(&mut self) {
        let db = self.db.as_mut().expect("open");
        // As whoever asks does: what a failure left in doubt is opened anew.
        db.begin(false).and_then(|()| db.end_read()).expect("reads");
        let found = Seen::of(db);
        assert!(found == self.known, "{}", self.known.differs(&found));
        assert_eq!(db.counters.sum(counters::Of::Ready), self.known.inbox.len() as i64);
        assert_eq!(db.counters.total(counters::Total::Dead), self.known.dead.len() as i64);
        assert_eq!(db.counters.total(counters::Total::OwedUplink), self.known.outbox.len() as i64);
    }

    fn check_file(&self) {
        let db = self.db.as_ref().expect("open");
        let sound: String =
            db.query_one("PRAGMA integrity_check", [], "check", |row| row.get(0)).expect("checks");
        assert_eq!(sound, "ok");
        let ids = "SELECT count(*) FROM events WHERE seq NOT IN
            (SELECT id / 4096 FROM invocations UNION SELECT id / 4096 FROM dead_invocations)";
        assert_eq!(db.query_one(ids, [], "check", |row| row.get::<_, i64>(0)).ok(), Some(0));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn accept(db: &mut Db, id: &str, bytes: usize, forward: bool) -> Result<Vec<Effect>, StoreError> {
    let mut arrival = arrival(id, &["f"]);
    arrival.event.data = vec![7; bytes];
    arrival.dedup = forward.then(|| DedupKey::cloud_event("/s", id));
    let mut effects = vec![Effect::Accepted(id.to_owned())];
    if forward {
        let forwarded = format!("fwd-{id}");
        arrival.deliveries.push(delivery(&forwarded, Target::Uplink));
        effects.push(Effect::Forwarded(forwarded));
    }
    inbox::accept(db, &arrival)?;
    Ok(effects)
}

fn settle(db: &mut Db, dies: bool) -> Result<Vec<Effect>, StoreError> {
    let mut effects = Vec::new();
    for leased in inbox::lease(db, &[(function("f"), 2)])? {
        let id = leased.event.id.to_string();
        if dies {
            let dead = Settlement::Dead { failure: Failure::Exit(1), output: vec![1; 100] };
            inbox::settle(db, leased.id, &dead)?;
            effects.push(Effect::Died(id));
        } else {
            let output = delivery(&format!("of-{id}"), Target::Uplink);
            inbox::settle(db, leased.id, &done(vec![output]))?;
            effects.push(Effect::Settled(id));
        }
    }
    Ok(effects)
}

fn deliver(db: &mut Db) -> Result<Vec<Effect>, StoreError> {
    let owed = outbox::owed(db, &Owed { limit: 9, ..all(Target::Uplink) })?;
    let ids: Vec<_> = owed.iter().map(|delivery| delivery.id).collect();
    outbox::delivered(db, &ids)?;
    Ok(owed.iter().map(|delivery| Effect::Delivered(delivery.body.event.id.to_string())).collect())
}

/// Keeps them below their bound, which is another law's.
fn purge(db: &mut Db) -> Result<Vec<Effect>, StoreError> {
    let sql = "SELECT i.id, event_id FROM dead_invocations i JOIN events ON seq = i.id / 4096 ORDER BY i.id LIMIT 3";
    let dead: Vec<(i64, String)> = db.query(sql, [], "look", |row| Ok((row.get(0)?, row.get(1)?)))?;
    for (id, _) in &dead {
        dead::remove(db, *id)?;
    }
    Ok(dead.into_iter().map(|(_, id)| Effect::Purged(id)).collect())
}

/// Works until the disk stops somewhere within so many calls.
fn work_until_stop(site: &mut Site, calls: u64) {
    let at = site.rng.u64(1..calls);
    site.disk.plan(Some(Plan::Stop { at }));
    while !site.disk.stopped() {
        site.group();
    }
}

#[test]
fn power_cut_loses_nothing_that_was_answered() {
    let drawn = Seed::draw();
    let seed = drawn.0;
    let mut site = Site::new(seed);
    let cuts = number("NEAP_TEST_CUTS", 200);
    for cut in 0..cuts {
        // Some come while the store is opening again.
        work_until_stop(&mut site, if cut % 3 == 0 { 400 } else { 4_000 });
        let disk = site.disk.after_cut(&mut site.rng);
        site.restart(disk);
        if cut % 50 == 0 {
            site.check_file();
        }
    }
    site.check_file();
    println!("{cuts} cuts, {} events, nothing lost; seed {seed}", site.events);
}

/// The proof's own proof: on a disk that is never asked to sync, it must find that events are lost.
#[test]
fn power_cut_without_sync_is_seen_to_lose() {
    let drawn = Seed::draw();
    let seed = drawn.0;
    let mut rng = fastrand::Rng::with_seed(seed);
    let lost = (0..20).filter(|_| {
        let mut site = Site::new(rng.u64(..));
        site.db.as_ref().expect("open").connection().pragma_update(None, "synchronous", "OFF").expect("sets");
        work_until_stop(&mut site, 4_000);
        let disk = site.disk.after_cut(&mut site.rng);
        let path = PathBuf::from("neap.db");
        let options = Options { path, buffer: buffer(64 * MIB), clock: Arc::new(site.clock.clone()) };
        site.db = None;
        let known = site.known.clone();
        // Lost, or so torn that it can't be opened or read.
        let found = Db::open_in_vfs(&options, disk.name)
            .ok()
            .map(|(db, _)| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| Seen::of(&db))).ok());
        let lost = !matches!(found, Some(Some(found)) if known.inbox.is_subset(&found.inbox));
        site.disk.clear();
        lost
    });
    let lost = lost.count();
    println!("{lost} of 20 cuts lost something without sync; seed {seed}");
    assert!(lost >= 10, "{lost}; seed {seed}");
}

#[test]
fn kill_between_any_two_calls_loses_nothing_and_doubles_nothing() {
    let drawn = Seed::draw();
    let seed = drawn.0;
    let mut site = Site::new(seed);
    for kill in 0..number("NEAP_TEST_CUTS", 200) {
        work_until_stop(&mut site, if kill % 3 == 0 { 400 } else { 3_000 });
        let disk = site.disk.after_kill();
        site.restart(disk);
    }
    site.check_file();
}

#[test]
fn failing_disk_refuses_and_leaves_nothing_behind() {
    let drawn = Seed::draw();
    let seed = drawn.0;
    let mut site = Site::new(seed);
    // A bare NOMEM is memory's: SQLite takes a rollback that met it for a good one, and its pages with it.
    let codes = [
        ffi::SQLITE_IOERR,
        ffi::SQLITE_FULL,
        ffi::SQLITE_IOERR_READ,
        ffi::SQLITE_IOERR_WRITE,
        ffi::SQLITE_IOERR_FSYNC,
        ffi::SQLITE_IOERR_NOMEM,
        ffi::SQLITE_NOMEM,
        ffi::SQLITE_NOMEM,
    ];
    let (mut failed, mut refused) = (0, 0);
    for round in 0..number("NEAP_TEST_CUTS", 200) {
        let code = *site.rng.choice(codes.iter()).unwrap_or(&ffi::SQLITE_IOERR);
        let (at, calls) = (site.rng.u64(1..60), *site.rng.choice([1, 1, 3, 20].iter()).unwrap_or(&1));
        site.disk.plan(Some(Plan::Fail { at, calls, code }));
        for _ in 0..4 {
            refused += site.group().len();
        }
        failed += site.disk.failed();
        site.disk.plan(None);
        // The writer's thread would look for room.
        site.db.as_mut().expect("open").ballast = ballast::Ballast::none();
        // The disk is well again: so is the store, without a restart.
        site.check();
        let errors = site.group();
        assert!(errors.is_empty(), "{errors:?}");
        site.check();
        if round % 10 == 0 {
            let disk = site.disk.after_kill();
            site.restart(disk);
        }
    }
    site.check_file();
    assert!(failed > 0 && refused > 0, "{failed} calls failed, {refused} requests were refused");
    println!("{failed} calls failed, {refused} requests were refused; seed {seed}");
}
