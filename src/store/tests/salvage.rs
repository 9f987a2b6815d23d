//! Damage of every kind: the node runs, what can be read is kept, what was lost is said.

use super::*;
use crate::model::Failure;
use std::fs;

const PAGE: usize = 2048;

/// A database with plenty of everything, and what is in it.
struct Filled {
    folder: tempfile::TempDir,
    bytes: Vec<u8>,
}

const EVENTS: usize = 400;

fn filled() -> Filled {
    let fixture = Fixture::new();
    fixture.deploy("f");
    for n in 0..EVENTS {
        let mut arrival = arrival(&format!("e{n}"), &["f"]);
        arrival.event.data = vec![7; if n % 50 == 0 { 9_000 } else { 300 }];
        arrival.deliveries.push(delivery(&format!("d{n}"), Target::Uplink));
        wait(fixture.store.accept(arrival)).expect("accepts");
    }
    let dead = fixture.lease("f").expect("leased");
    fixture.settle(dead.id, Settlement::Dead { failure: Failure::Exit(1), output: vec![] });
    let path = fixture.path();
    let Fixture { folder, store, .. } = fixture;
    drop(store); // not clean, and checkpointed: one file
    let bytes = fs::read(path).expect("reads");
    Filled { folder, bytes }
}

impl Filled {
    /// Opens a copy with some of its bytes changed.
    fn open_with(&self, damage: impl FnOnce(&mut Vec<u8>)) -> (Fixture, Recovered) {
        let folder = tempfile::tempdir_in(self.folder.path()).expect("a folder");
        let mut bytes = self.bytes.clone();
        damage(&mut bytes);
        let path = folder.path().join("neap.db");
        fs::write(&path, bytes).expect("writes");
        let clock = TestClock::new();
        let (store, recovered) = open_at(&path, &clock);
        (Fixture { folder, clock, store }, recovered)
    }
}

/// It takes, runs and sends, and its next start finds nothing wrong.
fn assert_works(fixture: Fixture) {
    fixture.deploy("f");
    fixture.accept("new", "f");
    let leased = wait(fixture.store.lease(vec![(function("f"), 10_000)])).expect("leases");
    assert!(leased.iter().any(|leased| leased.event.id.as_str() == "new"));
    for leased in leased {
        fixture.settle(leased.id, done(vec![delivery("o", Target::Uplink)]));
    }
    let owed = fixture.owed(Target::Uplink);
    wait(fixture.store.delivered(owed.iter().map(|delivery| delivery.id).collect())).expect("deletes");
    let (fixture, recovered) = fixture.kill();
    assert_eq!(recovered.salvaged, None);
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    let sound: String = conn.query_row("PRAGMA integrity_check", [], |row| row.get(0)).expect("checks");
    assert_eq!(sound, "ok");
}

#[test]
fn sound_database_is_left_as_it_is() {
    let filled = filled();
    let (fixture, recovered) = filled.open_with(|_| {});
    assert_eq!(recovered.salvaged, None);
    assert_works(fixture);
}

#[test]
fn damaged_page_costs_what_stood_on_it() {
    let seed = Seed::draw();
    let mut rng = seed.random();
    let filled = filled();
    let pages = filled.bytes.len() / PAGE;
    let (mut salvaged, mut kept) = (0, 0);
    for round in 0..40 {
        let page = rng.usize(1..pages); // page 0 is another test's
        let garbage: Vec<u8> = (0..PAGE).map(|_| rng.u8(..)).collect();
        let (fixture, recovered) =
            filled.open_with(|bytes| bytes[page * PAGE..][..PAGE].copy_from_slice(&garbage));
        if let Some(found) = &recovered.salvaged {
            salvaged += 1;
            let counts = fixture.counts();
            assert_eq!(found.invocations, counts.ready + counts.dead, "page {page}");
            assert_eq!(found.deliveries, counts.owed_uplink, "page {page}");
            kept += (found.invocations + found.deliveries) as usize;
            assert!(found.set_aside.exists() && found.told().contains("was damaged"));
        }
        if round < 5 {
            assert_works(fixture);
        }
    }
    // A page of 2 KiB holds three events or so; some pages hold what all need.
    println!("{salvaged} of 40 were salvaged, {kept} of {} rows kept", salvaged * 2 * EVENTS);
    assert!(salvaged >= 20 && kept > salvaged * 2 * EVENTS * 3 / 4, "{salvaged} {kept}");
}

#[test]
fn functions_can_be_deployed_whichever_page_was_lost() {
    let filled = filled();
    for page in 1..filled.bytes.len() / PAGE {
        let (fixture, _) = filled.open_with(|bytes| bytes[page * PAGE..][..PAGE].fill(0xA5));
        let name = FunctionName::parse("f").expect("a good name");
        let deployed = wait(fixture.store.deploy(name, "changed".into(), "image".into(), None));
        assert!(deployed.is_ok(), "page {page}: {deployed:?}");
    }
}

#[test]
fn bits_that_flip_anywhere_never_keep_it_from_opening_and_are_met_once() {
    let seed = Seed::draw();
    let mut rng = seed.random();
    let filled = filled();
    for _ in 0..40 {
        let (fixture, _) = filled.open_with(|bytes| {
            for _ in 0..rng.usize(1..200) {
                let at = rng.usize(100..bytes.len());
                bytes[at] ^= 1 << rng.u8(0..8);
            }
        });
        // What flips inside a value is not seen: SQLite has no checksums. An index that contradicts its
        // table is not looked for at an ordinary start; who meets it has the next one look.
        if let Err(error) = wait(fixture.store.counts()) {
            assert!(error.is_damage(), "{error:?}");
            let (fixture, recovered) = fixture.kill();
            assert!(recovered.suspected && recovered.salvaged.is_some());
            fixture.counts();
        }
    }
}

#[test]
fn what_a_function_has_proven_survives() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    wait(fixture.store.mark_proven(function("f"), 1)).expect("notes");
    for n in 0..200 {
        fixture.accept(&format!("e{n}"), "f");
    }
    let path = fixture.path();
    let Fixture { folder, store, .. } = fixture;
    drop(store);
    let mut bytes = fs::read(&path).expect("reads");
    let last = bytes.len() - PAGE;
    bytes[last..].fill(0xA5); // a page of events

    let (filled, seen) = (Filled { folder, bytes }, |_: &mut Vec<u8>| {});
    let (fixture, recovered) = filled.open_with(seen);

    assert!(recovered.salvaged.is_some());
    assert!(wait(fixture.store.history(function("f"))).expect("reads").proven);
}

#[test]
fn rows_that_cannot_be_read_go_and_those_behind_them_come() {
    let fixture = Fixture::new();
    fixture.deploy("f");
    for n in 1..=3 {
        let mut arrival = arrival(&format!("e{n}"), &["f"]);
        arrival.deliveries.push(delivery(&format!("d{n}"), Target::Uplink));
        wait(fixture.store.accept(arrival)).expect("accepts");
    }
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    conn.execute_batch(
        "UPDATE events SET extras = '{' WHERE event_id = 'e1';
         UPDATE deliveries SET extras = '{' WHERE event_id = 'd1';",
    )
    .expect("writes");
    drop(conn);

    let leased = wait(fixture.store.lease(vec![(function("f"), 9)])).expect("leases");
    assert!(wait(fixture.store.owed(all(Target::Uplink))).is_err(), "one of them can't be read");
    let owed = fixture.owed(Target::Uplink);

    assert_eq!(leased.iter().map(|l| l.event.id.as_str()).collect::<Vec<_>>(), ["e2", "e3"]);
    assert_eq!(owed.iter().map(|d| d.body.event.id.as_str()).collect::<Vec<_>>(), ["d2", "d3"]);
    let counts = fixture.counts();
    assert_eq!((counts.ready, counts.running, counts.owed_uplink), (0, 2, 2));
    assert_eq!(counts.dead_dropped, 2);
}

/// Text of neap's own; the highest bit of a letter is as likely to flip as any other.
const TEXTS: [&str; 6] = ["event_id", "source", "type", "subject", "content_type", "extras"];

fn spoil(fixture: &Fixture, table: &str, column: &str, event_id: &str) {
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    let sql = format!("UPDATE {table} SET {column} = CAST(x'41ff' AS TEXT) WHERE event_id = ?1");
    assert_eq!(conn.execute(&sql, [event_id]).expect("writes"), 1, "{sql}");
}

#[test]
fn text_that_is_no_text_gives_way_wherever_it_stands() {
    for column in TEXTS.iter().chain(&["function", "topic"]) {
        let fixture = Fixture::new();
        fixture.deploy("f");
        for n in 1..=2 {
            let mut arrival = arrival(&format!("e{n}"), &["f"]);
            arrival.deliveries.push(delivery(&format!("d{n}"), Target::Uplink));
            wait(fixture.store.accept(arrival)).expect("accepts");
        }
        if TEXTS.contains(column) {
            spoil(&fixture, "events", column, "e1");
        } else {
            fixture.lease("f").expect("e1 is out of the way");
        }
        spoil(&fixture, "deliveries", column, "d1");

        let leased = fixture.lease("f").expect("e2 stands behind it");
        assert!(wait(fixture.store.owed(all(Target::Uplink))).is_err(), "{column}");
        let owed = fixture.owed(Target::Uplink);

        assert_eq!(leased.event.id.as_str(), "e2", "{column}");
        assert_eq!(owed.iter().map(|d| d.body.event.id.as_str()).collect::<Vec<_>>(), ["d2"], "{column}");
    }
}

#[test]
fn damaged_dead_ones_hide_no_others_and_stay_until_they_are_purged() {
    for column in TEXTS {
        let fixture = Fixture::new();
        fixture.deploy("f");
        for n in 1..=3 {
            fixture.accept(&format!("e{n}"), "f");
            let lease = fixture.lease("f").expect("it is due");
            fixture.settle(lease.id, Settlement::Dead { failure: Failure::Exit(1), output: vec![] });
            wait(fixture.store.owe(vec![delivery(&format!("d{n}"), Target::Uplink)], vec![])).expect("owes");
            let owed = fixture.owed(Target::Uplink)[0].id;
            wait(fixture.store.set_aside(owed, "refused".into())).expect("sets aside");
        }
        spoil(&fixture, "events", column, "e2");
        spoil(&fixture, "dead_deliveries", column, "d2");

        let events = wait(fixture.store.invocations(InvocationFilter::default())).expect("lists");
        let deliveries = wait(fixture.store.deliveries(true, None, 0)).expect("lists");
        let redriven = wait(fixture.store.redrive(InvocationFilter::default())).expect("redrives");
        let redriven_deliveries = wait(fixture.store.redrive_deliveries(None)).expect("redrives");

        assert_eq!(events.iter().map(|row| row.is_ok()).collect::<Vec<_>>(), [true, false, true], "{column}");
        assert_eq!(deliveries.iter().map(|row| row.is_ok()).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!((redriven, redriven_deliveries), (2, 2), "{column}");
        let counts = fixture.counts();
        assert_eq!((counts.dead, counts.dead_deliveries, counts.ready, counts.owed_uplink), (1, 1, 2, 2));
        let damaged = deliveries[1].as_ref().expect_err("it is damaged").id;
        assert!(wait(fixture.store.delivery(DeliveryId(damaged))).is_err());

        assert_eq!(wait(fixture.store.purge(InvocationFilter::default())).expect("purges"), 1);
        assert_eq!(wait(fixture.store.purge_deliveries(Some(DeliveryId(damaged)))).expect("purges"), 1);
        assert_eq!((fixture.counts().dead, fixture.counts().dead_deliveries), (0, 0));
    }
}

#[test]
fn file_that_is_no_database_gives_way_to_an_empty_one() {
    let filled = filled();
    for damage in [0..100, 0..16 * PAGE] {
        let (fixture, recovered) = filled.open_with(|bytes| bytes[damage].fill(b'x'));
        let salvaged = recovered.salvaged.expect("salvaged");
        assert!(!recovered.clean && salvaged.set_aside.exists());
        assert_works(fixture);
    }
    let (fixture, recovered) = filled.open_with(|bytes| bytes.truncate(bytes.len() / 2));
    assert!(recovered.salvaged.is_some());
    assert_works(fixture);
}

#[test]
fn another_programs_database_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    let conn = rusqlite::Connection::open(&path).expect("opens");
    conn.execute_batch("CREATE TABLE theirs (a); INSERT INTO theirs VALUES (1);").expect("writes");
    drop(conn);
    let before = fs::read(&path).expect("reads");

    let options = Options { path: path.clone(), buffer: buffer(MIB), clock: Arc::new(TestClock::new()) };
    let error = Store::open(options).err().expect("refused");

    assert!(matches!(error, StoreError::Io { .. }), "{error:?}");
    assert!(before == fs::read(&path).expect("reads"));
}

#[test]
fn salvage_that_was_killed_goes_on() {
    let filled = filled();
    for (kept, at_place) in [(false, true), (true, true), (true, false)] {
        let folder = tempfile::tempdir_in(filled.folder.path()).expect("a folder");
        let path = folder.path().join("neap.db");
        let damaged = |to: &Path| fs::write(to, vec![b'x'; 9_000]).expect("writes");
        if at_place {
            damaged(&path);
        }
        // Half made, or complete and not yet in its place.
        damaged(&folder.path().join("neap.db.salvaging"));
        if kept {
            fs::write(folder.path().join("neap.db.salvaged"), &filled.bytes).expect("writes");
        }
        let (store, recovered) = open_at(&path, &TestClock::new());
        let counts = wait(store.counts()).expect("counts");
        let expected = if kept { EVENTS as u64 - 1 } else { 0 };
        assert_eq!((counts.ready, recovered.salvaged.is_some()), (expected, !kept));
        assert!(!folder.path().join("neap.db.salvaged").exists());
    }
}
