//! `retained = "new"`: a retained MQTT message is an event once per value, although the broker
//! sends it again at every subscription.

use super::counters::Of;
use super::db::Db;
use super::error::StoreError;
use super::{RETAINED_MAX, RetainedValue};

/// Whether this function sees this value on this topic for the first time; remembers it.
pub(super) fn is_new(db: &mut Db, function: i64, value: &RetainedValue) -> Result<bool, StoreError> {
    let doing = "remember a retained value";
    let known: Option<(i64, bool)> = db.query_opt(
        "SELECT id, hash = ?3 FROM retained WHERE function = ?1 AND topic = ?2",
        (function, &value.topic, &value.hash[..]),
        doing,
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    match known {
        Some((_, true)) => return Ok(false),
        Some((id, false)) => {
            db.execute("DELETE FROM retained WHERE id = ?1", [id], doing)?;
            db.counters.add(function, Of::Retained, -1);
        }
        None if db.counters.of(function, Of::Retained) >= RETAINED_MAX => {
            db.execute(
                "DELETE FROM retained WHERE id = (SELECT min(id) FROM retained WHERE function = ?1)",
                [function],
                doing,
            )?;
            db.counters.add(function, Of::Retained, -1);
        }
        None => {}
    }
    db.execute(
        "INSERT INTO retained (function, topic, hash) VALUES (?1, ?2, ?3)",
        (function, &value.topic, &value.hash[..]),
        doing,
    )?;
    db.counters.add(function, Of::Retained, 1);
    Ok(true)
}

/// The function goes: what it has seen goes with it.
pub(super) fn forget(db: &mut Db, function: i64) -> Result<(), StoreError> {
    db.execute("DELETE FROM retained WHERE function = ?1", [function], "forget retained values")?;
    let count = db.counters.of(function, Of::Retained);
    db.counters.add(function, Of::Retained, -count);
    Ok(())
}
