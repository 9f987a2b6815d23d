//! When each schedule last fired: stored with the event of the tick, so that a tick is one event
//! whatever is killed between, and a restart knows what was missed.

use super::Tick;
use super::db::Db;
use super::error::StoreError;
use super::functions;
use crate::model::UnixMs;

/// Nothing of a function that is not deployed.
pub(super) fn set(db: &mut Db, tick: &Tick) -> Result<(), StoreError> {
    let Some(function) = functions::deployed(db, &tick.function)? else { return Ok(()) };
    db.execute(
        "INSERT OR REPLACE INTO ticks (function, schedule, fired_ms) VALUES (?1, ?2, ?3)",
        (function, &tick.schedule, tick.fired.0),
        "remember a tick",
    )
    .map(drop)
}

pub(super) fn list(db: &mut Db) -> Result<Vec<Tick>, StoreError> {
    db.query(
        "SELECT f.name, t.schedule, t.fired_ms FROM ticks t JOIN functions f ON f.id = t.function
         WHERE f.removed IS NULL ORDER BY f.name, t.schedule",
        [],
        "read ticks",
        |row| {
            Ok(Tick {
                function: functions::read_name(row, 0)?,
                schedule: row.get(1)?,
                fired: UnixMs(row.get(2)?),
            })
        },
    )
}

/// Those of schedules that the function no longer has go, or there would be more with each deploy.
pub(super) fn keep(db: &mut Db, function: i64, schedules: &[String]) -> Result<(), StoreError> {
    let doing = "forget schedules";
    let known: Vec<String> =
        db.query("SELECT schedule FROM ticks WHERE function = ?1", [function], doing, |row| row.get(0))?;
    for schedule in known.iter().filter(|known| !schedules.contains(known)) {
        db.execute("DELETE FROM ticks WHERE function = ?1 AND schedule = ?2", (function, schedule), doing)?;
    }
    Ok(())
}
