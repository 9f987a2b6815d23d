//! The inbox: events that arrived, and the invocations that neap owes them.
//!
//! An invocation's life (`dead` ones live in a table of their own, see `dead`):
//!
//! ```text
//!   accept ──▶ ready ──lease──▶ running ──Done──▶ gone, its deliveries owed
//!                ▲  ▲              │ │ │
//!                │  └──Release─────┘ │ └──Dead, or lost for the 20th time──▶ dead
//!                │                   └──Retry──▶ waiting
//!                └───────when due───────────────────┘
//! ```
//!
//! A kill leaves rows in `running`; the next opening makes them ready and counts a loss.

use super::counters::{Of, Total};
use super::db::{Db, Id, Room};
use super::error::{Doing, StoreError, is_unreadable};
use super::event_row::{EventColumns, event_bytes, read_event};
use super::full::{self, Verdict};
use super::{
    Accepted, Arrival, Fate, INVOCATIONS_PER_EVENT_MAX, LOST_MAX, Leased, NewInvocation, Settlement, copies,
    dead, functions, outbox, retained, seen, ticks,
};
use crate::model::callback;
use crate::model::{Event, EventSeq, Failure, FunctionName, InvocationId, Lane, NewDelivery, Target};
use rusqlite::Row;
use std::time::Duration;

/// Waiting ones whose time has come made ready by one lease, and expired ones dropped by it:
/// keeps a lease short. `due` names the function again, so the next one goes on.
const PROMOTED_PER_LEASE: u32 = 1_000;
const EXPIRED_PER_LEASE: u32 = 1_000;

/// `place` of one that waits: this and the node time of its next attempt. Part of the schema.
pub(super) const WAITING_FROM: i64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    Running,
    Waiting,
}

impl State {
    pub fn of(place: Option<i64>) -> Self {
        match place {
            None => Self::Running,
            Some(place) if place < WAITING_FROM => Self::Ready,
            Some(_) => Self::Waiting,
        }
    }

    pub fn counter(self) -> Of {
        match self {
            Self::Ready => Of::Ready,
            Self::Running => Of::Running,
            Self::Waiting => Of::Waiting,
        }
    }
}

pub(super) fn lane(column: i64) -> Lane {
    match column {
        0 => Lane::High,
        2 => Lane::Low,
        _ => Lane::Normal,
    }
}

/// The event of an invocation, and the first invocation that an event can have.
pub(super) fn seq_of(invocation: i64) -> i64 {
    invocation / INVOCATIONS_PER_EVENT_MAX
}

pub(super) fn first_of(seq: i64) -> i64 {
    seq * INVOCATIONS_PER_EVENT_MAX
}

pub(super) fn accept(db: &mut Db, arrival: &Arrival) -> Result<Accepted, StoreError> {
    if let Some(key) = &arrival.dedup
        && let Some(earlier) = seen::find(db, key)?
    {
        return Ok(Accepted { seq: EventSeq(0), invocations: 0, fate: Fate::Duplicate(earlier) });
    }
    let wanted = wanted(db, arrival)?;
    let runs = wanted.iter().any(|(_, new)| new.dead.is_none());
    if runs && callback::url(&arrival.event).is_some() && !outbox::callback_fits(db, 0) {
        return Err(StoreError::Full);
    }
    // Only what will be stored needs room: nothing does of an event that nobody wants any more.
    let entries = wanted.len() + arrival.deliveries.len();
    if entries > 0 {
        let bytes = wanted_bytes(arrival, wanted.len());
        let verdict = full::make_room(db, Room::Ingest, lane_of(arrival), entries as u64, bytes)?;
        if verdict == Verdict::Dropped {
            return Ok(Accepted { seq: EventSeq(0), invocations: 0, fate: Fate::Dropped });
        }
    }
    if let Some(key) = &arrival.dedup {
        seen::remember(db, key, &arrival.event.id)?;
    }
    if let Some(tick) = &arrival.tick {
        ticks::set(db, tick)?;
    }
    add(db, arrival, &wanted)
}

pub(super) fn owe(db: &mut Db, deliveries: &[NewDelivery], events: &[Arrival]) -> Result<(), StoreError> {
    add_output(db, Room::Owe, &deliveries.iter().collect::<Vec<_>>(), events)
}

/// The first lane of those that it goes to.
fn lane_of(arrival: &Arrival) -> Lane {
    let invocations = arrival.invocations.iter().map(|new| new.lane);
    invocations.chain(arrival.deliveries.iter().map(|delivery| delivery.lane)).min().unwrap_or_default()
}

/// About what an arrival takes on disk.
pub(super) fn arrival_bytes(arrival: &Arrival) -> u64 {
    wanted_bytes(arrival, arrival.invocations.len())
}

/// The same, when only so many of its invocations are stored.
fn wanted_bytes(arrival: &Arrival, invocations: usize) -> u64 {
    let event = if invocations > 0 { event_bytes(&arrival.event) } else { 0 };
    event + invocations as u64 * 64 + arrival.deliveries.iter().map(outbox::delivery_bytes).sum::<u64>()
}

pub(super) fn output_bytes(deliveries: &[NewDelivery], events: &[Arrival]) -> u64 {
    deliveries.iter().map(outbox::delivery_bytes).sum::<u64>() + events.iter().map(arrival_bytes).sum::<u64>()
}

fn add_output(
    db: &mut Db,
    who: Room,
    deliveries: &[&NewDelivery],
    events: &[Arrival],
) -> Result<(), StoreError> {
    let mut bytes = deliveries.iter().map(|delivery| outbox::delivery_bytes(delivery)).sum::<u64>();
    let mut all_wanted = Vec::with_capacity(events.len());
    for arrival in events {
        let wanted = wanted(db, arrival)?;
        bytes += wanted_bytes(arrival, wanted.len());
        all_wanted.push(wanted);
    }
    let entries = deliveries.len() + all_wanted.iter().map(Vec::len).sum::<usize>();
    if entries > 0 {
        let lanes = deliveries.iter().map(|delivery| delivery.lane).chain(events.iter().map(lane_of));
        let lane = lanes.min().unwrap_or_default();
        if full::make_room(db, who, lane, entries as u64, bytes)? == Verdict::Dropped {
            return Ok(());
        }
    }
    for delivery in deliveries {
        outbox::add(db, delivery)?;
    }
    for (arrival, wanted) in events.iter().zip(&all_wanted) {
        add(db, arrival, wanted)?;
    }
    Ok(())
}

/// The invocations that are to be stored, with their functions: without those of functions that
/// are gone, and of retained values that are known.
fn wanted<'a>(db: &mut Db, arrival: &'a Arrival) -> Result<Vec<(i64, &'a NewInvocation)>, StoreError> {
    if arrival.invocations.len() as i64 > INVOCATIONS_PER_EVENT_MAX {
        return Err(StoreError::TooManyFunctions(INVOCATIONS_PER_EVENT_MAX as u32));
    }
    let mut wanted = Vec::with_capacity(arrival.invocations.len());
    for new in &arrival.invocations {
        let Some(function) = functions::deployed(db, &new.function)? else { continue };
        if let Some(value) = &new.once
            && !retained::is_new(db, function, value)?
        {
            continue;
        }
        wanted.push((function, new));
    }
    Ok(wanted)
}

fn add(db: &mut Db, arrival: &Arrival, wanted: &[(i64, &NewInvocation)]) -> Result<Accepted, StoreError> {
    let mut seq = EventSeq(0);
    if !wanted.is_empty() {
        seq = add_event(db, &arrival.event)?;
        for (index, (function, new)) in wanted.iter().enumerate() {
            add_invocation(db, first_of(seq.0) + index as i64, *function, new, &arrival.event)?;
        }
    }
    for delivery in &arrival.deliveries {
        outbox::add(db, delivery)?;
    }
    Ok(Accepted { seq, invocations: wanted.len(), fate: Fate::Stored })
}

fn add_event(db: &mut Db, event: &Event) -> Result<EventSeq, StoreError> {
    let seq = db.next(Id::Event)?;
    let columns = EventColumns::new(event);
    let [a, b, c, d, e, f, g, h] = columns.params();
    db.execute(
        "INSERT INTO events (seq, arrived_ms, arrived_node_ms, event_id, source, type, subject, time_ms,
             content_type, extras, data)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        rusqlite::params![seq, db.wall().0, db.node_ms(), a, b, c, d, e, f, g, h],
        "store an event",
    )?;
    Ok(EventSeq(seq))
}

fn add_invocation(
    db: &mut Db,
    id: i64,
    function: i64,
    new: &NewInvocation,
    event: &Event,
) -> Result<(), StoreError> {
    if let Some(failure) = &new.dead {
        let bytes = event_bytes(event);
        let dead = dead::Dead {
            id,
            function,
            lane: new.lane as i64,
            attempts: 0,
            lost: 0,
            error: failure.to_string(),
            output: &[],
            bytes,
        };
        return dead::add(db, &dead);
    }
    let expires_ms = new.expires.map(|expires| i64::try_from(expires.as_millis()).unwrap_or(i64::MAX));
    db.execute(
        "INSERT INTO invocations (id, function, lane, place, expires_ms) VALUES (?1, ?2, ?3, ?3, ?4)",
        (id, function, new.lane as i64, expires_ms),
        "store an invocation",
    )?;
    db.counters.add(function, Of::Ready, 1);
    Ok(())
}

pub(super) fn lease(db: &mut Db, wanted: &[(FunctionName, u32)]) -> Result<Vec<Leased>, StoreError> {
    let mut leased = Vec::new();
    for (name, limit) in wanted {
        if let Some(function) = functions::deployed(db, name)? {
            promote(db, function)?;
            lease_one(db, function, name, *limit, &mut leased)?;
        }
    }
    Ok(leased)
}

/// Waiting ones whose time has come go back in their lanes, by age with all the others.
fn promote(db: &mut Db, function: i64) -> Result<(), StoreError> {
    if db.counters.of(function, Of::Waiting) == 0 {
        return Ok(());
    }
    let promoted = db.execute(
        "UPDATE invocations SET place = lane WHERE id IN (
             SELECT id FROM invocations WHERE function = ?1 AND place BETWEEN 16 AND ?2
             ORDER BY place LIMIT ?3)",
        (function, WAITING_FROM + db.node_ms(), PROMOTED_PER_LEASE),
        "make due invocations ready",
    )?;
    db.counters.add(function, Of::Waiting, -(promoted as i64));
    db.counters.add(function, Of::Ready, promoted as i64);
    Ok(())
}

/// A ready invocation as `lease_one` finds it.
struct Ready {
    leased: Leased,
    arrived_node_ms: i64,
    expires_ms: Option<i64>,
}

fn lease_one(
    db: &mut Db,
    function: i64,
    name: &FunctionName,
    limit: u32,
    leased: &mut Vec<Leased>,
) -> Result<(), StoreError> {
    let doing = "lease invocations";
    let now = db.node_ms();
    let (mut found, mut expired) = (0, 0);
    while found < limit && expired < EXPIRED_PER_LEASE && db.counters.of(function, Of::Ready) > 0 {
        let rows = db.query(
            "SELECT i.id, i.attempts, i.lost, i.expires_ms, e.arrived_node_ms, i.lane, e.event_id,
                 e.source, e.type, e.subject, e.time_ms, e.content_type, e.extras, e.data
             FROM invocations i CROSS JOIN events e ON e.seq = i.id / 4096
             WHERE i.function = ?1 AND i.place < 16 ORDER BY i.place, i.id LIMIT ?2",
            (function, limit - found),
            doing,
            |row| Ok((row.get::<_, i64>(0)?, read_ready(row, name))),
        )?;
        if rows.is_empty() {
            break;
        }
        for (id, ready) in rows {
            let ready = match ready {
                Ok(ready) => ready,
                // It would stand before all others for ever.
                Err(error) if is_unreadable(&error) => {
                    let function_name = name.as_str();
                    tracing::error!(invocation = id, function = function_name, %error, "a damaged event can't be read: it is dropped");
                    remove(db, id, function, Of::Ready)?;
                    count_meta(db, "dead_dropped", Total::Dropped)?;
                    expired += 1;
                    continue;
                }
                Err(error) => return Err(error).doing(doing),
            };
            if ready.expires_ms.is_some_and(|expires| now.saturating_sub(ready.arrived_node_ms) > expires) {
                remove(db, id, function, Of::Ready)?;
                count_meta(db, "expired", Total::Expired)?;
                expired += 1;
            } else {
                db.execute("UPDATE invocations SET place = NULL WHERE id = ?1", [id], doing)?;
                db.counters.add(function, Of::Ready, -1);
                db.counters.add(function, Of::Running, 1);
                let mut lease = ready.leased;
                lease.event.correct_time(db.wall(), age(now, ready.arrived_node_ms));
                leased.push(lease);
                found += 1;
            }
        }
    }
    Ok(())
}

fn read_ready(row: &Row<'_>, name: &FunctionName) -> rusqlite::Result<Ready> {
    Ok(Ready {
        leased: Leased {
            id: InvocationId(row.get(0)?),
            function: name.clone(),
            attempts: row.get(1)?,
            lost: row.get(2)?,
            lane: lane(row.get(5)?),
            event: read_event(row, 6)?,
        },
        expires_ms: row.get(3)?,
        arrived_node_ms: row.get(4)?,
    })
}

/// How long ago something was, in node time.
pub(super) fn age(now_ms: i64, then_ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(now_ms.saturating_sub(then_ms)).unwrap_or(0))
}

pub(super) fn settle(db: &mut Db, id: InvocationId, settlement: &Settlement) -> Result<(), StoreError> {
    let id = id.0;
    let found: Option<(i64, u32, u32)> = db.query_opt(
        "SELECT i.function, i.attempts, i.lost FROM invocations i JOIN functions f ON f.id = i.function
         WHERE i.id = ?1 AND i.place IS NULL AND f.removed IS NULL",
        [id],
        "find a leased invocation",
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    let (function, attempts, lost) = found.ok_or(StoreError::NotFound)?;
    match settlement {
        Settlement::Done { deliveries, events } => {
            remove(db, id, function, Of::Running)?;
            let (callbacks, deliveries): (Vec<_>, Vec<_>) =
                deliveries.iter().partition(|delivery| delivery.target == Target::Callback);
            add_output(db, Room::Settle, &deliveries, events)?;
            callbacks.into_iter().try_for_each(|callback| outbox::add_callback(db, callback))
        }
        Settlement::Retry { counted: false, .. } if lost + 1 >= LOST_MAX => {
            let error = lost_too_often().to_string();
            die(db, id, function, (attempts, lost + 1), error, End { status: 500, output: &[] })
        }
        Settlement::Retry { delay, counted, error } => {
            let (attempts, lost) = if *counted { (attempts + 1, lost) } else { (attempts, lost + 1) };
            retry(db, id, function, attempts, lost, *delay, error)
        }
        Settlement::Defer { delay, error } => retry(db, id, function, attempts, lost, *delay, error),
        Settlement::Dead { failure, output } => {
            // One that could not have ended differently never ran.
            let attempts = attempts + u32::from(failure.retryable());
            let end = End { status: callback::status(failure), output };
            die(db, id, function, (attempts, lost), failure.to_string(), end)
        }
        Settlement::Release => {
            let doing = "release an invocation";
            db.execute("UPDATE invocations SET place = lane WHERE id = ?1", [id], doing)?;
            db.counters.add(function, Of::Running, -1);
            db.counters.add(function, Of::Ready, 1);
            Ok(())
        }
    }
}

fn lost_too_often() -> Failure {
    Failure::Refused(format!("{LOST_MAX} attempts were lost to a killed daemon or launcher"))
}

fn retry(
    db: &mut Db,
    id: i64,
    function: i64,
    attempts: u32,
    lost: u32,
    delay: Duration,
    error: &str,
) -> Result<(), StoreError> {
    let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX / 2).min(i64::MAX / 2);
    let (state, place) = match delay_ms {
        0 => (State::Ready, None),
        _ => (State::Waiting, Some(db.node_ms().saturating_add(WAITING_FROM + delay_ms))),
    };
    db.execute(
        "UPDATE invocations SET place = coalesce(?2, lane), attempts = ?3, lost = ?4, error = ?5 WHERE id = ?1",
        (id, place, attempts, lost, dead::head(error)),
        "put an invocation back for a retry",
    )?;
    db.counters.add(function, Of::Running, -1);
    db.counters.add(function, state.counter(), 1);
    db.save_time = true;
    Ok(())
}

/// What is told of a death to whoever asked for the result.
struct End<'a> {
    status: u16,
    output: &'a [u8],
}

/// From the living to the dead; the event stays. However it died, its callback is owed.
fn die(
    db: &mut Db,
    id: i64,
    function: i64,
    (attempts, lost): (u32, u32),
    error: String,
    end: End<'_>,
) -> Result<(), StoreError> {
    if let Some(callback) = callback_of(db, id, function, &end)? {
        outbox::add_callback(db, &callback)?;
    }
    let output = end.output;
    let bytes = db.query_one(
        "SELECT coalesce((SELECT length(data) FROM events WHERE seq = ?1), 0)",
        [seq_of(id)],
        "measure an event",
        |row| row.get::<_, u32>(0),
    )?;
    let lane = db.query_one(
        "DELETE FROM invocations WHERE id = ?1 RETURNING lane",
        [id],
        "set an invocation aside",
        |row| row.get(0),
    )?;
    db.counters.add(function, Of::Running, -1);
    let bytes = 256 + u64::from(bytes);
    copies::forget(db, id)?;
    dead::add(db, &dead::Dead { id, function, lane, attempts, lost, error, output, bytes })
}

fn callback_of(db: &Db, id: i64, function: i64, end: &End<'_>) -> Result<Option<NewDelivery>, StoreError> {
    // Few have one: the event is read only if it may.
    let event = db.query_opt(
        "SELECT event_id, source, type, subject, time_ms, content_type, extras, x'' FROM events
         WHERE seq = ?1 AND extras LIKE '%x-callback-url%'",
        [seq_of(id)],
        "look for a callback",
        |row| read_event(row, 0),
    )?;
    let (Some(event), Some(name)) = (event, functions::name(db, function)?) else { return Ok(None) };
    let output = &end.output[..end.output.len().min(super::OUTPUT_BYTES_MAX)];
    let ended = callback::Ended {
        status: end.status,
        body: output.to_vec(),
        content_type: None,
        took: Duration::ZERO,
    };
    Ok(callback::delivery(&event, &name, ended))
}

/// When the event of an invocation arrived, in node time.
pub(super) fn arrived_node_ms(db: &Db, id: i64) -> Result<i64, StoreError> {
    db.query_one(
        "SELECT arrived_node_ms FROM events WHERE seq = ?1",
        [seq_of(id)],
        "read an event's age",
        |row| row.get(0),
    )
}

/// The invocation goes, and its event with the last one.
pub(super) fn remove(db: &mut Db, id: i64, function: i64, from: Of) -> Result<(), StoreError> {
    db.execute("DELETE FROM invocations WHERE id = ?1", [id], "remove an invocation")?;
    copies::forget(db, id)?;
    db.counters.add(function, from, -1);
    drop_event(db, seq_of(id))
}

/// The event goes unless an invocation, living or dead, still needs it.
pub(super) fn drop_event(db: &Db, seq: i64) -> Result<(), StoreError> {
    let (first, last) = (first_of(seq), first_of(seq + 1) - 1);
    db.execute(
        "DELETE FROM events WHERE seq = ?1
             AND NOT EXISTS (SELECT 1 FROM invocations WHERE id BETWEEN ?2 AND ?3)
             AND NOT EXISTS (SELECT 1 FROM dead_invocations WHERE id BETWEEN ?2 AND ?3)",
        (seq, first, last),
        "remove an event",
    )
    .map(drop)
}

/// Counts one in table `meta` and in memory.
pub(super) fn count_meta(db: &mut Db, key: &'static str, total: Total) -> Result<(), StoreError> {
    db.execute("UPDATE meta SET value = value + 1 WHERE key = ?1", [key], "count what was dropped")?;
    db.counters.add_total(total, 1);
    Ok(())
}

/// Functions that have an invocation to run now, and the time until the next becomes due.
pub(super) fn due(db: &mut Db) -> Result<(Vec<FunctionName>, Option<Duration>), StoreError> {
    let now = db.node_ms();
    let mut due: Vec<i64> = db.counters.having(Of::Ready).collect();
    let mut next: Option<i64> = None;
    for function in db.counters.having(Of::Waiting) {
        // The index holds the waiting ones in order of time: this looks at two entries.
        let first: Option<i64> = db.query_one(
            "SELECT min(place) FROM invocations WHERE function = ?1 AND place BETWEEN 16 AND ?2",
            (function, WAITING_FROM + now),
            "look for due invocations",
            |row| row.get(0),
        )?;
        if first.is_some() {
            due.push(function);
        }
        let later: Option<i64> = db.query_one(
            "SELECT min(place) FROM invocations WHERE function = ?1 AND place > ?2",
            (function, WAITING_FROM + now),
            "look for due invocations",
            |row| row.get(0),
        )?;
        next = match (next, later) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    due.sort_unstable();
    due.dedup();
    let mut names = Vec::with_capacity(due.len());
    for function in due {
        names.extend(functions::name(db, function)?);
    }
    Ok((names, next.map(|ms| Duration::from_millis((ms - WAITING_FROM - now).max(0) as u64))))
}

/// What a daemon that did not stop cleanly had leased becomes ready again, a loss counted;
/// after a clean stop nothing was lost, only left. Returns how many losses were counted.
pub(super) fn recover(db: &mut Db, clean: bool) -> Result<u64, StoreError> {
    copies::forget_orphans(db)?;
    let running: Vec<i64> = db.counters.having(Of::Running).collect();
    let mut leases = 0;
    for function in running {
        let rows: Vec<(i64, u32, u32)> = db.query(
            "SELECT id, attempts, lost FROM invocations WHERE function = ?1 AND place IS NULL ORDER BY id",
            [function],
            "recover leases",
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )?;
        for (id, attempts, lost) in rows {
            let lost = lost + u32::from(!clean);
            leases += u64::from(!clean);
            if lost >= LOST_MAX {
                let end = End { status: 500, output: &[] };
                die(db, id, function, (attempts, lost), lost_too_often().to_string(), end)?;
                continue;
            }
            db.execute(
                "UPDATE invocations SET place = lane, lost = ?2 WHERE id = ?1",
                (id, lost),
                "recover leases",
            )?;
            db.counters.add(function, Of::Running, -1);
            db.counters.add(function, Of::Ready, 1);
        }
    }
    Ok(leases)
}

/// Removes some of what removed functions left behind; whether there is more to do.
pub(super) fn sweep(db: &mut Db, rows_max: u32) -> Result<bool, StoreError> {
    let doing = "sweep a removed function";
    let Some(function) = db.sweep.last().copied() else { return Ok(false) };
    // Its removal may have been rolled back.
    let deployed = functions::name(db, function)?.is_some();
    let ids: Vec<i64> = if deployed {
        Vec::new()
    } else {
        db.query(
            "SELECT id FROM invocations WHERE function = ?1 LIMIT ?2",
            (function, rows_max),
            doing,
            |row| row.get(0),
        )?
    };
    for id in &ids {
        db.execute("DELETE FROM invocations WHERE id = ?1", [id], doing)?;
        copies::forget(db, *id)?;
        drop_event(db, seq_of(*id))?;
    }
    if ids.is_empty() {
        db.sweep.pop();
    }
    Ok(!db.sweep.is_empty())
}
