//! What is counted by the day, for caps: bytes on a metered link.
//!
//! The caller says which day it is, by the wall clock and its zone, and that clock may lie: a day
//! that lies before the one that is counted belongs to it, so that a clock set back opens no
//! second budget; and a count ends after a day of node time whatever the clock says, so that one
//! that once stood far ahead closes no link for years.

use super::Usage;
use super::db::Db;
use super::error::StoreError;

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

fn key(kind: Usage) -> &'static str {
    match kind {
        Usage::UplinkBytes => "uplink_bytes",
    }
}

struct Counted {
    day: i64,
    began_node_ms: i64,
    amount: i64,
}

fn read(db: &Db, kind: Usage, day: i64) -> Result<Counted, StoreError> {
    let counted = db.query_opt(
        "SELECT day, began_node_ms, amount FROM usage WHERE kind = ?1",
        [key(kind)],
        "read what was used",
        |row| Ok(Counted { day: row.get(0)?, began_node_ms: row.get(1)?, amount: row.get(2)? }),
    )?;
    let now = db.node_ms();
    let current = counted.filter(|c| day <= c.day && now.saturating_sub(c.began_node_ms) < DAY_MS);
    Ok(current.unwrap_or(Counted { day, began_node_ms: now, amount: 0 }))
}

pub(super) fn get(db: &mut Db, kind: Usage, day: i64) -> Result<u64, StoreError> {
    Ok(read(db, kind, day)?.amount.max(0) as u64)
}

/// Returns the day's sum.
pub(super) fn add(db: &mut Db, kind: Usage, day: i64, amount: u64) -> Result<u64, StoreError> {
    let counted = read(db, kind, day)?;
    let sum = counted.amount.saturating_add(i64::try_from(amount).unwrap_or(i64::MAX));
    db.execute(
        "INSERT OR REPLACE INTO usage (kind, day, began_node_ms, amount) VALUES (?1, ?2, ?3, ?4)",
        (key(kind), counted.day, counted.began_node_ms, sum),
        "count what was used",
    )?;
    Ok(sum.max(0) as u64)
}
