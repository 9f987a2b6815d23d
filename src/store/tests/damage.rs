//! Full quota, full disk, requests that fail beside others, SIGKILL.

use super::*;
use crate::store::writer::{Request, run_group};
use smol::channel::Receiver;
use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

fn big(id: &str, name: &str, bytes: usize) -> Arrival {
    let mut arrival = arrival(id, &[name]);
    arrival.event.data = vec![7; bytes];
    arrival
}

#[test]
fn full_quota_refuses_events_but_no_existing_work() {
    let fixture = Fixture::with(2 * MIB);
    fixture.deploy("f");
    let mut accepted = 0;
    let error = loop {
        match wait(fixture.store.accept(big(&format!("e{accepted}"), "f", 10_000))) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Full), "{error:?}");
    assert!((150..=210).contains(&accepted), "{accepted}");

    // Everything that is there can be worked off, its output kept, with the quota still full.
    for _ in 0..accepted {
        let leased = fixture.lease("f").expect("leased");
        fixture.settle(
            leased.id,
            done(vec![NewDelivery { event: leased.event, ..delivery("d", Target::Uplink) }]),
        );
    }
    assert!(matches!(wait(fixture.store.accept(big("no", "f", 10_000))), Err(StoreError::Full)));
    let owed = fixture.owed(Target::Uplink);
    assert_eq!(owed.len(), accepted);
    wait(fixture.store.delivered(owed.iter().map(|delivery| delivery.id).collect())).expect("deletes");

    wait(fixture.store.accept(big("yes", "f", 10_000))).expect("there is room again");
}

#[test]
fn outcome_that_finds_no_room_stays_leased_until_it_does() {
    let fixture = Fixture::with(MIB);
    fixture.deploy("f");
    let huge = || vec![NewDelivery { event: big("d", "f", 900_000).event, ..delivery("d", Target::Uplink) }];
    for n in 0..10 {
        fixture.accept(&format!("e{n}"), "f");
    }
    let leased = wait(fixture.store.lease(vec![(function("f"), 10)])).expect("leases");
    let settled: Vec<_> =
        leased.iter().map(|leased| wait(fixture.store.settle(leased.id, done(huge())))).collect();
    let stored = settled.iter().take_while(|settled| settled.is_ok()).count();
    assert!((4..=6).contains(&stored), "{stored}");
    assert!(settled[stored..].iter().all(|settled| matches!(settled, Err(StoreError::Full))), "{settled:?}");
    let nobody = wait(fixture.store.owe(huge(), vec![]));
    assert!(matches!(nobody, Err(StoreError::TooLarge { .. })), "{nobody:?}");
    assert_eq!(fixture.counts().running, 10 - stored as u64);

    let owed = fixture.owed(Target::Uplink);
    wait(fixture.store.delivered(owed.iter().map(|delivery| delivery.id).collect())).expect("deletes");

    fixture.settle(leased[9].id, done(huge()));
    assert_eq!(fixture.counts().running, 9 - stored as u64);
}

#[test]
fn what_can_never_fit_is_told_apart_from_a_full_store() {
    let fixture = Fixture::with(2 * MIB);
    fixture.deploy("f");
    let empty = fixture.counts().bytes;
    assert!(empty < 256 << 10, "{empty}");

    let error = wait(fixture.store.accept(big("e", "f", 2_100_000))).expect_err("does not fit");
    assert!(
        matches!(error, StoreError::TooLarge { bytes: 2_100_000.., bytes_max: 1..2_100_000 }),
        "{error:?}"
    );
    wait(fixture.store.accept(big("e", "f", 1_800_000))).expect("fits an empty one");
    let error = wait(fixture.store.accept(big("e", "f", 1_800_000))).expect_err("does not fit beside it");
    assert!(matches!(error, StoreError::Full), "{error:?}");

    let leased = fixture.lease("f").expect("leased");
    let huge = NewDelivery { event: big("d", "f", 7_000_000).event, ..delivery("d", Target::Uplink) };
    let error = wait(fixture.store.settle(leased.id, done(vec![huge]))).expect_err("does not fit");
    assert!(matches!(error, StoreError::TooLarge { .. }), "{error:?}");
    fixture.settle(leased.id, done(vec![]));
}

#[test]
fn event_for_a_removed_function_needs_no_room() {
    let fixture = Fixture::with(MIB);
    fixture.deploy("f");
    wait(fixture.store.accept(big("e", "f", 700_000))).expect("accepts");

    for bytes in [700_000, 9_000_000] {
        let accepted = wait(fixture.store.accept(big("gone", "gone", bytes))).expect("nothing to store");
        assert_eq!(accepted.invocations, 0);
    }
}

#[test]
fn dead_ones_give_way_before_they_fill_the_quota() {
    let fixture = Fixture::with(4 * MIB);
    fixture.deploy("f");
    for n in 0..200 {
        wait(fixture.store.accept(big(&format!("e{n}"), "f", 10_000))).expect("accepts");
        let leased = fixture.lease("f").expect("leased");
        let failure = crate::model::Failure::Exit(1);
        fixture.settle(leased.id, Settlement::Dead { failure, output: vec![] });
    }

    let counts = fixture.counts();

    assert!(counts.dead_dropped > 100 && counts.dead + counts.dead_dropped == 200, "{counts:?}");
    let newest = wait(fixture.store.event("e199".into())).expect("finds");
    assert_eq!(newest.len(), 1);
}

#[test]
fn request_that_fails_takes_nothing_of_its_neighbours() {
    let (mut db, _folder) = database();
    let (a, a_answer) = accepting("a");
    let (refused, refused_answer) = request(|db| {
        inbox::accept(db, &arrival("half", &["f"]))?;
        Err(StoreError::NotFound)
    });
    let (b, b_answer) = accepting("b");

    commit(&mut db, vec![a, refused, b]);

    assert!(
        a_answer.try_recv().expect("an answer").is_ok() && b_answer.try_recv().expect("an answer").is_ok()
    );
    assert!(matches!(refused_answer.try_recv(), Ok(Err(StoreError::NotFound))));
    assert_eq!(ready(&mut db), ["a", "b"]);
}

#[test]
fn request_that_ends_the_transaction_takes_nothing_of_its_neighbours() {
    let (mut db, _folder) = database();
    let (a, a_answer) = accepting("a");
    // As SQLite does by itself when it can't write.
    let (fatal, fatal_answer) = request(|db| {
        inbox::accept(db, &arrival("half", &["f"]))?;
        db.connection().execute_batch("ROLLBACK").expect("rolls back");
        Err(StoreError::DiskFull)
    });
    let (b, b_answer) = accepting("b");

    commit(&mut db, vec![a, fatal, b]);

    assert!(
        a_answer.try_recv().expect("an answer").is_ok() && b_answer.try_recv().expect("an answer").is_ok()
    );
    assert!(matches!(fatal_answer.try_recv(), Ok(Err(StoreError::DiskFull))));
    assert_eq!(ready(&mut db), ["a", "b"]);
}

#[test]
fn failed_commit_is_everybodys_answer_and_leaves_nothing() {
    let (mut db, _folder) = database();
    // A constraint that is checked at the commit stands for a commit that fails.
    let tables = "PRAGMA foreign_keys = ON; CREATE TABLE parent (id INTEGER PRIMARY KEY);
        CREATE TABLE child (id REFERENCES parent (id) DEFERRABLE INITIALLY DEFERRED);";
    db.connection().execute_batch(tables).expect("creates");
    let (a, a_answer) = accepting("a");
    let (orphan, orphan_answer) = request(|db| {
        db.execute("INSERT INTO child VALUES (1)", [], "break a constraint")?;
        inbox::accept(db, &arrival("b", &["f"]))
    });

    commit(&mut db, vec![a, orphan]);

    assert!(matches!(a_answer.try_recv(), Ok(Err(StoreError::Sqlite { doing: "commit", .. }))));
    assert!(matches!(orphan_answer.try_recv(), Ok(Err(StoreError::Sqlite { doing: "commit", .. }))));
    assert_eq!(ready(&mut db), [""; 0]);
    let (c, c_answer) = accepting("c");
    commit(&mut db, vec![c]);
    assert!(c_answer.try_recv().expect("an answer").is_ok());
}

type Answer = Receiver<Result<Accepted, StoreError>>;

pub fn database() -> (Db, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    let clock = Arc::new(TestClock::new());
    let options = Options { path, buffer: buffer(64 * MIB), clock };
    let (mut db, _) = Db::open(&options).expect("opens");
    db.begin(true).expect("begins");
    functions::deploy(&mut db, &function("f"), "m", "i", None).expect("deploys");
    db.commit().expect("commits");
    (db, folder)
}

fn accepting(id: &'static str) -> (Box<dyn Request>, Answer) {
    request(move |db| inbox::accept(db, &arrival(id, &["f"])))
}

fn request(
    run: impl FnMut(&mut Db) -> Result<Accepted, StoreError> + Send + 'static,
) -> (Box<dyn Request>, Answer) {
    let (reply, answer) = smol::channel::bounded(1);
    (Box::new(Call { run, line: None, closed: false, writes: true, bytes: 0, result: None, reply }), answer)
}

fn commit(db: &mut Db, mut group: Vec<Box<dyn Request>>) {
    run_group(db, &mut group);
    group.into_iter().for_each(Request::answer);
}

/// Ids of ready events; the counters must agree.
fn ready(db: &mut Db) -> Vec<String> {
    let sql = "SELECT event_id FROM events JOIN invocations ON seq = id / 4096 ORDER BY id";
    let ids: Vec<String> = db.query(sql, [], "read", |row| row.get(0)).expect("reads");
    assert_eq!(db.counters.sum(counters::Of::Ready), ids.len() as i64);
    ids
}

/// A file system of its own size, unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    const SIZE: &str = "24m";

    /// `None` when this process may not mount.
    fn tmpfs() -> Option<Self> {
        let folder = tempfile::tempdir().expect("a folder");
        let options = format!("size={}", Self::SIZE);
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "neap-test"]).arg(folder.path());
        succeeds(mount).then(|| Self(folder))
    }

    fn ext4() -> Option<Self> {
        let (folder, image) = (tempfile::tempdir().expect("a folder"), tempfile::NamedTempFile::new());
        let image = image.expect("a file");
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.arg("-qF").arg(image.path()).arg(Self::SIZE);
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(image.path()).arg(folder.path());
        (succeeds(mkfs) && succeeds(mount)).then(|| Self(folder))
    }
}

fn succeeds(mut command: Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn full_tmpfs_stops_ingestion_alone() {
    full_disk_stops_ingestion_alone(SmallDisk::tmpfs());
}

#[test]
fn full_ext4_stops_ingestion_alone() {
    full_disk_stops_ingestion_alone(SmallDisk::ext4());
}

fn full_disk_stops_ingestion_alone(disk: Option<SmallDisk>) {
    let Some(disk) = disk else {
        assert!(std::env::var_os("CI").is_none(), "a mount is needed here");
        eprintln!("skipped: this process may not mount");
        return;
    };
    let clock = TestClock::new();
    let path = disk.0.path().join("neap.db");
    let (store, _) = open_at(&path, &clock);
    wait(store.deploy(function("f"), "m".into(), "i".into(), None)).expect("deploys");
    let forwarded = |id: &str| {
        let mut arrival = big(id, "f", 3_000);
        arrival.deliveries.push(delivery(id, Target::Uplink));
        arrival
    };
    let mut acknowledged = Vec::new();
    for n in 0..1_000 {
        let id = format!("e{n}");
        wait(store.accept(forwarded(&id))).expect("accepts");
        acknowledged.push(id);
    }

    // Another program takes all there is, to the last byte.
    let hog = disk.0.path().join("hog");
    let mut file = fs::File::create(&hog).expect("creates");
    for bytes in [1 << 20, 1 << 12, 1] {
        while file.write_all(&vec![1; bytes]).is_ok() {}
    }
    let error = loop {
        let id = format!("e{}", acknowledged.len());
        match wait(store.accept(forwarded(&id))) {
            Ok(_) => acknowledged.push(id), // pages that were free, and room in the WAL
            Err(error) => break error,
        }
        // What a commit frees for a moment is taken again.
        while file.write_all(&[1]).is_ok() {}
    };
    assert!(matches!(error, StoreError::DiskFull), "{error:?}");
    assert_eq!(wait(store.counts()).expect("reads").full, Some("disk"));

    // All that is there is worked off and sent, and nothing new is taken meanwhile.
    let leased = wait(store.lease(vec![(function("f"), 10_000)])).expect("leases");
    let ids: Vec<_> = leased.iter().map(|leased| leased.event.id.as_str()).collect();
    assert_eq!(ids, acknowledged);
    for leased in leased {
        wait(store.settle(leased.id, done(vec![]))).expect("settles");
        assert!(matches!(wait(store.accept(forwarded("no"))), Err(StoreError::DiskFull)));
    }
    let mut sent = Vec::new();
    loop {
        let owed = wait(store.owed(all(Target::Uplink))).expect("reads");
        if owed.is_empty() {
            break;
        }
        sent.extend(owed.iter().map(|delivery| delivery.body.event.id.to_string()));
        wait(store.delivered(owed.iter().map(|delivery| delivery.id).collect())).expect("deletes");
    }
    assert_eq!(sent, acknowledged);

    // A restart in that state goes on with it.
    drop(store);
    let (store, _) = open_at(&path, &clock);
    assert_eq!(wait(store.counts()).expect("reads").ready, 0);

    drop(file);
    fs::remove_file(&hog).expect("removes");
    clock.pass(Duration::from_secs(60));
    // It looks for room behind an answer.
    let again = (0..1_000).find(|n| wait(store.accept(forwarded(&format!("again{n}")))).is_ok());
    assert!(again.is_some(), "events are taken again");
    assert_eq!(wait(store.counts()).expect("reads").full, None);
    assert!(disk.0.path().join("neap.ballast").exists());
}

const CHILD: &str = "NEAP_STORE_TEST_CHILD";

/// Not a test of its own: what `nothing_acknowledged_is_lost_by_sigkill` starts and kills.
/// Prints `a ID` after each accept and `d ID` after each settled delivery.
#[test]
fn child_that_is_killed() {
    let Some(args) = std::env::var_os(CHILD) else { return };
    let args = args.into_string().expect("text");
    let (round, path) = args.split_once(':').expect("ROUND:PATH");
    let clock = Arc::new(crate::model::SystemClock::new());
    let options = Options { path: path.into(), buffer: buffer(256 * MIB), clock };
    let (store, _) = Store::open(options).expect("opens");
    wait(store.deploy(function("f"), "m".into(), "i".into(), None)).expect("deploys");
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(line.as_bytes()).and_then(|()| out.flush()).expect("the parent reads until it kills");
    };
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (store, say) = (&store, &say);
            scope.spawn(move || {
                for n in 0.. {
                    let id = format!("r{round}t{thread}n{n}");
                    wait(store.accept(arrival(&id, &["f"]))).expect("accepts");
                    say(format!("\na {id}\n"));
                }
            });
        }
        loop {
            for leased in wait(store.lease(vec![(function("f"), 10)])).expect("leases") {
                let id = leased.event.id.clone();
                let delivery = NewDelivery { event: leased.event, ..delivery("d", Target::Uplink) };
                wait(store.settle(leased.id, done(vec![delivery]))).expect("settles");
                say(format!("\nd {id}\n"));
            }
        }
    });
}

#[test]
fn nothing_acknowledged_is_lost_by_sigkill() {
    let seed = Seed::draw();
    let mut random = seed.random();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    let (mut accepted, mut settled) = (HashSet::new(), HashSet::new());
    for round in 0..6 {
        let mut child = Command::new(std::env::current_exe().expect("this test binary"))
            .args(["--exact", "store::tests::damage::child_that_is_killed", "--nocapture"])
            .env(CHILD, format!("{round}:{}", path.display()))
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut left = random.usize(1..3000);
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).split(b'\n');
        while left > 0 {
            let line = lines.next().expect("the child runs until it is killed").expect("reads");
            left -= usize::from(note(&line, &mut accepted, &mut settled));
        }
        child.kill().expect("kills");
        // What it had still said was acknowledged too; only whole lines count.
        let rest: Vec<Vec<u8>> = lines.map_while(Result::ok).collect();
        for line in rest.iter().take(rest.len().saturating_sub(1)) {
            note(line, &mut accepted, &mut settled);
        }
        child.wait().expect("ends");
    }

    let (store, recovered) = open_with(&path, &TestClock::new(), 256 * MIB);
    assert!(!recovered.clean);
    let mut delivered = HashSet::new();
    let mut after = Position::default();
    loop {
        let owed = wait(store.owed(Owed { after, ..all(Target::Uplink) })).expect("reads");
        if owed.is_empty() {
            break;
        }
        for delivery in owed {
            after.pass(delivery.id);
            let id = delivery.body.event.id.as_str().to_owned();
            assert!(delivered.insert(id), "{} is owed twice", delivery.body.event.id);
        }
    }
    let mut present = delivered.clone();
    for leased in wait(store.lease(vec![(function("f"), u32::MAX)])).expect("leases") {
        let id = leased.event.id.as_str().to_owned();
        assert!(present.insert(id), "{} is there twice", leased.event.id);
    }
    let lost: Vec<_> = accepted.difference(&present).collect();
    assert!(lost.is_empty(), "lost {lost:?}");
    let undone: Vec<_> = settled.difference(&delivered).collect();
    assert!(undone.is_empty(), "settled, but not owed: {undone:?}");
    assert!(accepted.len() > 5);
}

/// Whether the line was an acknowledgement.
fn note(line: &[u8], accepted: &mut HashSet<String>, settled: &mut HashSet<String>) -> bool {
    let line = String::from_utf8_lossy(line);
    match line.split_once(' ') {
        Some(("a", id)) => accepted.insert(id.to_owned()),
        Some(("d", id)) => settled.insert(id.to_owned()),
        _ => false,
    }
}
