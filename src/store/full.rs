//! What happens when there is no room: `[buffer] when_full`, and the age of what waits.
//!
//! Dropped is only what an operator said may be, the oldest first, and never what runs: living
//! invocations that wait for their turn, and deliveries. Each is counted in the database; what was
//! refused or dropped is said in the log once a minute.

use super::counters::{Of, Total};
use super::db::{Db, Room};
use super::error::StoreError;
use super::{inbox, outbox};
use crate::config::WhenFull;
use crate::model::{DeliveryId, Lane};
use std::time::Duration;

/// Dropped at most to make room for one arrival, and as many more as entries of the smallest kind
/// take its bytes: what is refused has dropped nothing, so trying again would find no more room.
const DROPPED_PER_ARRIVAL: u64 = 8_192;
const SMALLEST_BYTES: u64 = 64;

/// Looked at for their age so often: an entry outlives `max_age` by no more.
const AGE_EVERY_MS: i64 = 1_000;

/// Said in the log no more often.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A redriven invocation: however old, a person asked for it. In column `expires_ms`.
pub(super) const NEVER_EXPIRES: i64 = i64::MAX;

/// What there is not enough of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    Bytes,
    Events,
    Disk,
}

impl Lack {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bytes => "max_bytes",
            Self::Events => "max_events",
            Self::Disk => "disk",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Room,
    /// All that is there goes before it: it is what is dropped. It has been counted.
    Dropped,
}

/// Something that waits, and may be dropped.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Invocation { id: i64, function: i64, of: Of },
    Delivery(DeliveryId),
}

/// Makes room for `entries` of this lane, `bytes` in all.
pub(super) fn make_room(
    db: &mut Db,
    who: Room,
    lane: Lane,
    entries: u64,
    bytes: u64,
) -> Result<Verdict, StoreError> {
    db.fits_at_all(who, bytes)?;
    let (mut dropped, dropped_max) = (0, DROPPED_PER_ARRIVAL + bytes / SMALLEST_BYTES);
    while let Some(lack) = db.lacks(who, entries, bytes)? {
        db.full = Some(lack);
        let lanes = match (db.limits.when_full, lack) {
            (WhenFull::Reject, _) | (_, Lack::Disk) => {
                db.refused += 1;
                return Err(if lack == Lack::Disk { StoreError::DiskFull } else { StoreError::Full });
            }
            (WhenFull::DropOldest, _) => Lane::High,
            (WhenFull::DropLowestPriority, _) => lane,
        };
        match oldest(db, db.limits.when_full, lanes)? {
            Some(entry) if dropped < dropped_max => {
                drop_entry(db, entry, "dropped_full", Total::DroppedFull)?
            }
            Some(_) => return Err(StoreError::Full),
            // What is left runs, or goes before it.
            None if db.limits.when_full == WhenFull::DropLowestPriority && lane > Lane::High => {
                for _ in 0..entries {
                    inbox::count_meta(db, "dropped_full", Total::DroppedFull)?;
                }
                return Ok(Verdict::Dropped);
            }
            None => return Err(StoreError::Full),
        }
        dropped += 1;
    }
    if dropped == 0 && who == Room::Ingest {
        db.full = None;
    }
    Ok(Verdict::Room)
}

/// The next to be dropped, from lanes down to `last`; callbacks before all others.
fn oldest(db: &Db, when_full: WhenFull, last: Lane) -> Result<Option<Entry>, StoreError> {
    if let Some(callback) = outbox::oldest_callback(db)? {
        return Ok(Some(Entry::Delivery(callback.id)));
    }
    if when_full == WhenFull::DropOldest {
        return older(db, oldest_invocation(db)?, outbox::oldest(db)?);
    }
    for lane in Lane::ALL.into_iter().rev().filter(|lane| *lane >= last) {
        let delivery = outbox::oldest_of(db, &[lane])?;
        let found = older(db, oldest_invocation_of(db, lane)?, delivery)?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// (id, function, place)
type Invocation = (i64, i64, i64);

fn older(
    db: &Db,
    invocation: Option<Invocation>,
    delivery: Option<outbox::Head>,
) -> Result<Option<Entry>, StoreError> {
    let of = |(id, function, place)| {
        let of = inbox::State::of(Some(place)).counter();
        Entry::Invocation { id, function, of }
    };
    Ok(match (invocation, delivery) {
        (Some(invocation), Some(delivery)) => {
            let arrived = inbox::arrived_node_ms(db, invocation.0)?;
            let invocation_first = arrived <= delivery.created_node_ms;
            Some(if invocation_first { of(invocation) } else { Entry::Delivery(delivery.id) })
        }
        (Some(invocation), None) => Some(of(invocation)),
        (None, Some(delivery)) => Some(Entry::Delivery(delivery.id)),
        (None, None) => None,
    })
}

fn oldest_invocation(db: &Db) -> Result<Option<Invocation>, StoreError> {
    // Those of removed functions go by sweeping.
    db.query_opt(
        "SELECT i.id, i.function, i.place FROM invocations i NOT INDEXED
         CROSS JOIN functions f ON f.id = i.function
         WHERE i.place IS NOT NULL AND f.removed IS NULL ORDER BY i.id LIMIT 1",
        [],
        "find the oldest invocation",
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )
}

/// The oldest ready one of this lane; of those that wait for another attempt, the next.
fn oldest_invocation_of(db: &Db, lane: Lane) -> Result<Option<Invocation>, StoreError> {
    let doing = "find the oldest invocation of a lane";
    let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
    let mut oldest: Option<Invocation> = None;
    for function in db.counters.having(Of::Ready) {
        let found = db.query_opt(
            "SELECT id, function, place FROM invocations WHERE function = ?1 AND place = ?2
             ORDER BY id LIMIT 1",
            (function, lane as i64),
            doing,
            read,
        )?;
        oldest = oldest.into_iter().chain(found).min();
    }
    for function in db.counters.having(Of::Waiting) {
        let found = db.query_opt(
            "SELECT id, function, place FROM invocations WHERE function = ?1 AND place >= 16 AND lane = ?2
             ORDER BY place LIMIT 1",
            (function, lane as i64),
            doing,
            read,
        )?;
        oldest = oldest.into_iter().chain(found).min();
    }
    Ok(oldest)
}

fn drop_entry(db: &mut Db, entry: Entry, key: &'static str, total: Total) -> Result<(), StoreError> {
    match entry {
        Entry::Invocation { id, function, of } => inbox::remove(db, id, function, of)?,
        Entry::Delivery(id) => outbox::delivered(db, &[id])?,
    }
    inbox::count_meta(db, key, total)
}

/// Whether it is time to look for what has grown too old.
pub(super) fn age_is_due(db: &Db) -> bool {
    db.limits.age_max_ms.is_some() && db.node_ms() >= db.age_looked_ms + AGE_EVERY_MS
}

/// Drops what is older than `max_age`, some at a time; whether there may be more.
pub(super) fn drop_aged(db: &mut Db, rows_max: u32) -> Result<bool, StoreError> {
    let Some(age_max_ms) = db.limits.age_max_ms else { return Ok(false) };
    let before = db.node_ms().saturating_sub(age_max_ms);
    let mut dropped = 0;
    // In order of id, which is the order of arrival: the first that is young ends it.
    let aged: Vec<(Invocation, i64)> = db.query(
        "SELECT i.id, i.function, i.place, e.arrived_node_ms FROM invocations i NOT INDEXED
         CROSS JOIN events e ON e.seq = i.id / 4096 CROSS JOIN functions f ON f.id = i.function
         WHERE i.place IS NOT NULL AND f.removed IS NULL AND i.expires_ms IS NOT ?2
         ORDER BY i.id LIMIT ?1",
        (rows_max, NEVER_EXPIRES),
        "find what is too old",
        |row| Ok(((row.get(0)?, row.get(1)?, row.get(2)?), row.get(3)?)),
    )?;
    for ((id, function, place), arrived) in aged {
        if arrived >= before {
            break;
        }
        let of = inbox::State::of(Some(place)).counter();
        drop_entry(db, Entry::Invocation { id, function, of }, "dropped_age", Total::DroppedAge)?;
        dropped += 1;
    }
    while dropped < 2 * rows_max {
        let Some(head) = outbox::oldest(db)?.filter(|head| head.created_node_ms < before) else { break };
        drop_entry(db, Entry::Delivery(head.id), "dropped_age", Total::DroppedAge)?;
        dropped += 1;
    }
    if dropped < rows_max {
        db.age_looked_ms = db.node_ms();
    }
    Ok(dropped >= rows_max)
}

/// What was last said of it.
#[derive(Debug, Default)]
pub(super) struct Told {
    at: Option<Duration>,
    dropped: [i64; 2],
    refused: u64,
}

/// Says in the log what was dropped and refused since it was last said.
pub(super) fn tell(db: &Db, told: &mut Told, now: Duration) {
    let dropped = [Total::DroppedFull, Total::DroppedAge].map(|total| db.counters.total(total));
    if dropped == told.dropped && db.refused == told.refused {
        return;
    }
    if told.at.is_some_and(|at| now.saturating_sub(at) < TELL_EVERY) {
        return;
    }
    let [full, age] = [0, 1].map(|n| dropped[n] - told.dropped[n]);
    if full > 0 {
        tracing::warn!(
            dropped = full,
            "the buffer is full ([buffer] when_full): waiting entries were dropped"
        );
    }
    if age > 0 {
        tracing::warn!(dropped = age, "entries older than [buffer] max_age were dropped");
    }
    if db.refused != told.refused {
        let lack = db.full.map_or("max_bytes", Lack::as_str);
        tracing::warn!(lack, "the buffer is full: new events are refused");
    }
    *told = Told { at: Some(now), dropped, refused: db.refused };
}

impl Told {
    /// As if all had been said: what was dropped before this start was said then.
    pub fn at_start(db: &Db) -> Self {
        let dropped = [Total::DroppedFull, Total::DroppedAge].map(|total| db.counters.total(total));
        Self { at: None, dropped, refused: 0 }
    }
}

/// An age, by node time.
pub(super) fn age(db: &Db, since_node_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(db.node_ms() - since_node_ms).unwrap_or(0))
}
