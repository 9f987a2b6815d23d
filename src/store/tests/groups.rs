//! What requests that come together have of each other, and what a failure leaves for the next.

use super::damage::database;
use super::*;
use crate::store::writer::{Request, work};
use writer::Call;

type Answer<T> = smol::channel::Receiver<Result<T, StoreError>>;

fn request<T: Send + 'static>(
    writes: bool,
    run: impl FnMut(&mut Db) -> Result<T, StoreError> + Send + 'static,
) -> (Box<dyn Request>, Answer<T>) {
    let (reply, answer) = smol::channel::bounded(1);
    (Box::new(Call { run, line: None, closed: false, writes, bytes: 0, result: None, reply }), answer)
}

fn accepting(id: &'static str) -> (Box<dyn Request>, Answer<Accepted>) {
    request(true, move |db| inbox::accept(db, &arrival(id, &["f"])))
}

#[test]
fn a_read_is_answered_before_what_is_written_with_it_is_synced() {
    let (mut db, _folder) = database();
    let (read, answer) = request(false, |db| outbox::owed(db, &all(Target::Uplink)));
    let (early, seen) = request(true, {
        let answer = answer.clone();
        move |_| Ok(answer.len())
    });

    work(&mut db, &mut vec![early, read]);

    assert_eq!(seen.try_recv().expect("an answer").expect("it ran"), 1, "the answer was there first");
    assert!(answer.try_recv().expect("an answer").is_ok());
}

#[test]
fn only_what_is_written_waits_for_the_commit_window() {
    let (folder, clock) = (tempfile::tempdir().expect("a folder"), TestClock::new());
    let hour = Duration::from_secs(3600);
    let buffer = Buffer { commit_window: hour, ..buffer(64 * MIB) };
    let options = Options { path: folder.path().join("neap.db"), buffer, clock: Arc::new(clock) };
    let (store, _) = Store::open(options).expect("opens");
    let line = Line::default();
    let written = wait(store.submit(&line, arrival("waits", &[]))).expect("stands in line");

    // Neither would come to an end within the window.
    assert_eq!(wait(store.counts()).expect("counts").ready, 0);
    wait(store.close());

    assert_eq!(wait(written.committed()).expect("is committed").invocations, 0);
}

#[test]
fn a_connection_in_doubt_is_replaced_by_one_that_knows_what_is_stored() {
    let (mut db, _folder) = database();
    for id in ["one", "two"] {
        let (request, answer) = accepting(id);
        work(&mut db, &mut vec![request]);
        assert!(answer.try_recv().expect("an answer").is_ok());
    }
    db.begin(true).expect("begins");
    inbox::accept(&mut db, &arrival("undone", &["f"])).expect("runs");

    db.reconnect().expect("connects");

    assert_eq!(db.counters.sum(counters::Of::Ready), 2);
    let (refused, _) = request(true, |_| Err::<(), _>(StoreError::NotFound));
    let (next, answer) = accepting("three");
    work(&mut db, &mut vec![refused, next]);
    assert!(answer.try_recv().expect("an answer").is_ok());
    assert_eq!(db.counters.sum(counters::Of::Ready), 3);
}

#[test]
fn a_transaction_that_could_not_be_rolled_back_is_not_the_end() {
    let (mut db, _folder) = database();
    let (first, answer) = accepting("before");
    work(&mut db, &mut vec![first]);
    assert!(answer.try_recv().expect("an answer").is_ok());
    // As a rollback leaves it that had no memory to begin with.
    db.begin(true).expect("begins");
    inbox::accept(&mut db, &arrival("undone", &["f"])).expect("runs");

    let (next, answer) = accepting("after");
    work(&mut db, &mut vec![next]);

    assert!(answer.try_recv().expect("an answer").is_ok());
    let ids = "SELECT event_id FROM events ORDER BY seq";
    let ids: Vec<String> = db.query(ids, [], "look", |row| row.get(0)).expect("reads");
    assert_eq!(ids, ["before", "after"]);
    assert_eq!(db.counters.sum(counters::Of::Ready), 2);
}

#[test]
fn a_connection_that_could_not_be_had_is_asked_for_again() {
    let (mut db, folder) = database();
    let (first, answer) = accepting("before");
    work(&mut db, &mut vec![first]);
    assert!(answer.try_recv().expect("an answer").is_ok());
    let (path, away) = (folder.path().join("neap.db"), folder.path().join("away.db"));
    db.query_one("PRAGMA wal_checkpoint(TRUNCATE)", [], "empty the log", |_| Ok(())).expect("checkpoints");
    std::fs::rename(&path, &away).expect("renames");
    std::fs::create_dir(&path).expect("stands in the way");
    db.reconnect().expect_err("a directory is no database");

    let (meanwhile, refused) = accepting("meanwhile");
    work(&mut db, &mut vec![meanwhile]);
    assert!(refused.try_recv().expect("an answer").is_err());
    std::fs::remove_dir(&path).expect("goes");
    std::fs::rename(&away, &path).expect("renames");
    let (next, answer) = accepting("after");
    work(&mut db, &mut vec![next]);

    assert!(answer.try_recv().expect("an answer").is_ok());
    assert_eq!(db.counters.sum(counters::Of::Ready), 2, "what was stored is known again");
}

#[test]
fn a_line_that_a_failed_pass_closed_is_open_when_each_runs_alone() {
    let (mut db, _folder) = database();
    let line = Line::default();
    let of_line = |id: &'static str, fails: bool| {
        let (reply, answer) = smol::channel::bounded(1);
        let mut first = fails;
        let run = move |db: &mut Db| match std::mem::take(&mut first) {
            true => Err(StoreError::out_of_memory("accept an event")),
            false => inbox::accept(db, &arrival(id, &["f"])),
        };
        let line = Some(line.clone());
        let call = Call { run, line, closed: false, writes: true, bytes: 0, result: None, reply };
        (Box::new(call) as Box<dyn Request>, answer)
    };
    let (one, first) = of_line("one", true);
    let (two, second) = of_line("two", false);

    work(&mut db, &mut vec![one, two]);

    assert!(first.try_recv().expect("an answer").is_ok());
    assert!(second.try_recv().expect("an answer").is_ok());
}
