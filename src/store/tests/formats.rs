//! Saved databases of every schema version must open; those of a later neap must be left alone.

use super::*;
use crate::model::CopyProgress;
use std::fs;

const SAMPLE_1: &[u8] = include_bytes!("../samples/schema-1.db");
const SAMPLE_2: &[u8] = include_bytes!("../samples/schema-2.db");
const SAMPLE_3: &[u8] = include_bytes!("../samples/schema-3.db");

/// Fills a store with a row of every kind; what `check_sample` expects.
fn fill(fixture: &Fixture) {
    fixture.deploy("f");
    let manifest = "name = \"f\"\n".to_owned();
    let file = Some("/etc/neap/functions.d/f.toml".into());
    wait(fixture.store.deploy(function("f"), manifest, "image-2".into(), file)).expect("deploys");
    wait(fixture.store.mark_proven(function("f"), 2)).expect("notes"); // from schema 2 on
    wait(fixture.store.deploy(function("gone"), "m".into(), "i".into(), None)).expect("deploys");
    wait(fixture.store.remove(function("gone"))).expect("removes");
    for id in ["dead", "waiting", "running", "ready"] {
        let mut arrival = arrival(id, &["f"]);
        arrival.event.extensions.insert("traceparent".into(), "00-1-2-01".into());
        arrival.invocations[0].once = Some(RetainedValue { topic: id.into(), hash: [1; 32] });
        arrival.deliveries.push(delivery(id, Target::Uplink));
        wait(fixture.store.accept(arrival)).expect("accepts");
    }
    let dead = fixture.lease("f").expect("leased");
    let failure = crate::model::Failure::Exit(1);
    fixture.settle(dead.id, Settlement::Dead { failure, output: b"output".to_vec() });
    let waiting = fixture.lease("f").expect("leased");
    fixture.settle(waiting.id, retry(Duration::from_secs(60)));
    let running = fixture.lease("f").expect("leased");
    for copy in copies() {
        wait(fixture.store.copy_ended(running.id, 2, copy)).expect("remembers"); // from schema 3 on
    }
    let refused = fixture.owed(Target::Uplink)[0].id;
    wait(fixture.store.set_aside(refused, "not authorized".into())).expect("sets aside");
}

fn copies() -> [CopyProgress; 3] {
    let failure = crate::model::Failure::Exit(3);
    [(0, 1, Some(Ok(()))), (1, 2, Some(Err(failure))), (2, 1, None)]
        .map(|(index, attempts, ended)| CopyProgress { index, attempts, ended })
}

fn check_sample(fixture: &Fixture, recovered: &Recovered) {
    assert_eq!(recovered, &Recovered { leases: 1, ..Recovered::default() });
    let functions = wait(fixture.store.functions()).expect("lists");
    assert_eq!(functions.len(), 1);
    assert_eq!((functions[0].revision.number, functions[0].revision.image.as_str()), (2, "image-2"));
    assert_eq!(functions[0].file.as_deref(), Some(Path::new("/etc/neap/functions.d/f.toml")));
    let rows = fixture.invocations();
    let found: Vec<_> = rows.iter().map(|row| (row.event.id.as_str(), row.state, row.lost)).collect();
    let ready = InvocationState::Ready;
    let dead = InvocationState::Dead;
    assert_eq!(found, [("dead", dead, 0), ("waiting", ready, 0), ("running", ready, 1), ("ready", ready, 0)]);
    assert_eq!(rows[0].last_output, b"output");
    assert_eq!(rows[1].due_in, Duration::from_secs(60));
    assert_eq!(rows[3].event.extensions["traceparent"], "00-1-2-01");
    let owed = fixture.owed(Target::Uplink);
    assert_eq!(
        owed.iter().map(|d| d.body.topic.as_str()).collect::<Vec<_>>(),
        ["site/waiting", "site/running", "site/ready"]
    );
    let dead = fixture.dead_deliveries();
    assert_eq!(dead[0].dead.as_deref(), Some("not authorized"));
    assert_eq!(fixture.deploy("gone").revision.number, 2);
    let leased = wait(fixture.store.lease(vec![(function("f"), 9)])).expect("leases");
    assert_eq!(leased.len(), 2);
}

fn fixture_of(bytes: &[u8]) -> (Fixture, Recovered) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    fs::write(&path, bytes).expect("writes");
    let clock = TestClock::new();
    let (store, recovered) = open_at(&path, &clock);
    (Fixture { folder, clock, store }, recovered)
}

/// Run with `--ignored` when a migration is added, and name the file after it.
#[test]
#[ignore = "writes the sample of the newest schema, src/store/samples/new.db"]
fn write_sample() {
    let fixture = Fixture::new();
    fill(&fixture);
    let path = fixture.path();
    let Fixture { store, folder: _folder, .. } = fixture;
    drop(store); // not closed, but checkpointed: one file
    fs::copy(path, concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/samples/new.db")).expect("copies");
}

#[test]
fn database_of_schema_1_opens() {
    let (fixture, recovered) = fixture_of(SAMPLE_1);

    check_sample(&fixture, &recovered);
}

#[test]
fn database_of_schema_2_opens() {
    let (fixture, recovered) = fixture_of(SAMPLE_2);

    assert!(wait(fixture.store.history(function("f"))).expect("reads").proven);
    check_sample(&fixture, &recovered);
}

#[test]
fn database_of_schema_3_opens() {
    let (fixture, recovered) = fixture_of(SAMPLE_3);

    let running = fixture.lease("f").expect("it is first in line");
    assert_eq!(wait(fixture.store.copies(running.id, 2)).expect("reads"), copies());
    fixture.settle(running.id, Settlement::Release);
    check_sample(&fixture, &recovered);
}

#[test]
fn database_of_this_version_opens_as_the_samples_do() {
    let fixture = Fixture::new();
    fill(&fixture);

    let (fixture, recovered) = fixture.kill();

    check_sample(&fixture, &recovered);
}

#[test]
fn database_of_a_later_neap_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("neap.db");
    fs::write(&path, SAMPLE_1).expect("writes");
    let conn = rusqlite::Connection::open(&path).expect("opens");
    conn.execute_batch(
        "UPDATE meta SET value = '99.1.0' WHERE key = 'written_by';
         UPDATE meta SET value = '99.0.0' WHERE key = 'readable_by';",
    )
    .expect("writes");
    drop(conn);
    let before = fs::read(&path).expect("reads");

    let error = try_open(&path).err().expect("refused");

    assert_eq!(
        error.to_string(),
        "the database was written by neap 99.1.0, and neap 99.0.0 or newer can read it: install that, or \
         move neap.db and neap.db-wal out of the data directory to start with an empty one"
    );
    assert!(before == fs::read(&path).expect("reads"));
}

#[test]
fn newer_schema_that_says_it_is_readable_is_used_as_it_is() {
    let (fixture, _) = fixture_of(SAMPLE_1);
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    conn.execute_batch(
        "ALTER TABLE invocations ADD COLUMN colour INTEGER NOT NULL DEFAULT 1;
         UPDATE meta SET value = 7 WHERE key = 'schema';",
    )
    .expect("writes");
    drop(conn);

    let (fixture, _) = fixture.kill();

    fixture.accept("new", "f");
    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    let schema = conn.query_row("SELECT value FROM meta WHERE key = 'schema'", [], |row| row.get(0));
    assert_eq!(schema, Ok(7));
}

#[test]
fn folder_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(matches!(try_open(&folder.path().join("no/such/folder.db")), Err(StoreError::Io { .. })));
}

fn try_open(path: &Path) -> Result<(Store, Recovered), StoreError> {
    let clock = Arc::new(TestClock::new());
    Store::open(Options { path: path.to_owned(), buffer: buffer(MIB), clock })
}
