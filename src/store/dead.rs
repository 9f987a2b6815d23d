//! Dead letters: invocations that will not be tried again unless a person says so. Bounded by
//! number and by bytes, the oldest out first and counted, because a function that fails on
//! every event must not stop the node from taking new ones.

use super::counters::{Of, Total};
use super::db::Db;
use super::error::{StoreError, listed};
use super::event_row::read_event;
use super::full::NEVER_EXPIRES;
use super::{DEAD_MAX, OUTPUT_BYTES_MAX, inbox};

pub(super) struct Dead<'a> {
    pub id: i64,
    pub function: i64,
    pub lane: i64,
    pub attempts: u32,
    pub lost: u32,
    pub error: String,
    pub output: &'a [u8],
    /// Of its event.
    pub bytes: u64,
}

/// The part of an error text or an output that is kept.
pub(super) fn head(text: &str) -> &str {
    let mut end = text.len().min(OUTPUT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

pub(super) fn add(db: &mut Db, dead: &Dead<'_>) -> Result<(), StoreError> {
    let output = &dead.output[..dead.output.len().min(OUTPUT_BYTES_MAX)];
    let error = head(&dead.error);
    let bytes = dead.bytes as i64 + (output.len() + error.len()) as i64;
    db.execute(
        "INSERT INTO dead_invocations (id, function, lane, attempts, lost, error, output, bytes)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        (dead.id, dead.function, dead.lane, dead.attempts, dead.lost, error, output, bytes),
        "keep a dead invocation",
    )?;
    db.counters.add(dead.function, Of::Dead, 1);
    db.counters.add_total(Total::Dead, 1);
    db.counters.add_total(Total::DeadBytes, bytes);
    trim(db)
}

/// The oldest go while there are too many; the last one stays, however large.
fn trim(db: &mut Db) -> Result<(), StoreError> {
    while db.counters.total(Total::Dead) > DEAD_MAX as i64
        || (db.counters.total(Total::DeadBytes) > db.dead_bytes_max() && db.counters.total(Total::Dead) > 1)
    {
        let oldest: Option<i64> =
            db.query_one("SELECT min(id) FROM dead_invocations", [], "find the oldest dead", |row| {
                row.get(0)
            })?;
        let Some(oldest) = oldest else { break };
        remove(db, oldest)?;
        inbox::count_meta(db, "dead_dropped", Total::Dropped)?;
    }
    Ok(())
}

/// The dead invocation goes, and its event with the last one; false when there is none.
pub(super) fn remove(db: &mut Db, id: i64) -> Result<bool, StoreError> {
    let taken = take(db, id)?;
    if taken.is_some() {
        inbox::drop_event(db, inbox::seq_of(id))?;
    }
    Ok(taken.is_some())
}

/// Back in line, attempts and losses from zero, in its old place. `expires` no longer counts:
/// a person asked for it, however old it is. One whose event can't be read stays: at its turn it
/// would be dropped.
pub(super) fn redrive(db: &mut Db, id: i64) -> Result<bool, StoreError> {
    let doing = "read a dead invocation's event";
    let event = db.query_opt(
        "SELECT event_id, source, type, subject, time_ms, content_type, extras, data FROM events WHERE seq = ?1",
        [inbox::seq_of(id)],
        doing,
        |row| listed(id, read_event(row, 0)),
    )?;
    if let Some(Err(damaged)) = event {
        tracing::warn!(invocation = id, error = damaged.why, "a damaged event can't be read: it stays dead");
        return Ok(false);
    }
    let Some((function, lane, error)) = take(db, id)? else { return Ok(false) };
    db.execute(
        "INSERT INTO invocations (id, function, lane, place, expires_ms, error)
         VALUES (?1, ?2, ?3, ?3, ?4, ?5)",
        (id, function, lane, NEVER_EXPIRES, error),
        "redrive an invocation",
    )?;
    db.counters.add(function, Of::Ready, 1);
    Ok(true)
}

/// Takes the row out; its function, lane and error.
fn take(db: &mut Db, id: i64) -> Result<Option<(i64, i64, String)>, StoreError> {
    let row: Option<(i64, i64, String, i64)> = db.query_opt(
        // What can't be read must go all the same.
        "DELETE FROM dead_invocations WHERE id = ?1
         RETURNING CAST(function AS INTEGER), CAST(lane AS INTEGER), error, CAST(bytes AS INTEGER)",
        [id],
        "take a dead invocation out",
        |row| {
            let error = row.get_ref(2)?.as_bytes_or_null().unwrap_or_default().unwrap_or_default();
            Ok((row.get(0)?, row.get(1)?, String::from_utf8_lossy(error).into_owned(), row.get(3)?))
        },
    )?;
    Ok(row.map(|(function, lane, error, bytes)| {
        db.counters.add(function, Of::Dead, -1);
        db.counters.add_total(Total::Dead, -1);
        db.counters.add_total(Total::DeadBytes, -bytes);
        (function, lane, error)
    }))
}

/// The function goes, its dead with it; how many.
pub(super) fn remove_all(db: &mut Db, function: i64) -> Result<u64, StoreError> {
    let ids: Vec<i64> = db.query(
        "SELECT id FROM dead_invocations WHERE function = ?1",
        [function],
        "list dead invocations",
        |row| row.get(0),
    )?;
    for id in &ids {
        remove(db, *id)?;
    }
    Ok(ids.len() as u64)
}
