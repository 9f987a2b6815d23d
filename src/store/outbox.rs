//! The outbox: deliveries owed to a broker, in order, gone when it has acknowledged them. What a
//! broker refuses for good is set aside in a table of its own.
//!
//! Each broker has three lanes, a queue each; callbacks have one queue, the fourth place of the first
//! broker's. A row's key is its queue and its number, so that a
//! queue is a range of keys, in order, and needs no index. People and other modules see
//! `number * 8 + queue`, a `DeliveryId`: the order of all of them. Numbers are never reused.

use super::counters::Total;
use super::db::{Db, Id, Room};
use super::error::{Doing, StoreError, is_unreadable, listed};
use super::event_row::{EventColumns, broken, event_bytes, read_event};
use super::{
    CALLBACKS_MAX, DEAD_MAX, DeliveryRow, LISTING_MAX, Listed, Owed, OwedOrder, Position, dead, inbox,
};
use crate::model::{Delivery, DeliveryId, FunctionName, Lane, NewDelivery, Target, UnixMs};
use rusqlite::Row;
use rusqlite::fallible_streaming_iterator::FallibleStreamingIterator;
use rusqlite::types::Type;

const QUEUE_SHIFT: u32 = 56;
const NUMBER_MAX: i64 = (1 << QUEUE_SHIFT) - 1;

/// In the order of their queues' numbers.
const TARGETS: [Target; 3] = [Target::Uplink, Target::Local, Target::Callback];

const CALLBACKS: i64 = 3;

fn queue(target: Target, lane: Lane) -> i64 {
    match target {
        Target::Uplink => lane as i64,
        Target::Local => 4 + lane as i64,
        Target::Callback => CALLBACKS,
    }
}

/// Those that a target's deliveries can have.
fn lanes_of(target: Target) -> &'static [Lane] {
    match target {
        Target::Uplink | Target::Local => &Lane::ALL,
        Target::Callback => &[Lane::Low],
    }
}

fn lane(queue: i64) -> Lane {
    match queue & 3 {
        0 => Lane::High,
        1 => Lane::Normal,
        _ => Lane::Low,
    }
}

fn target(queue: i64) -> Target {
    match queue & 7 {
        CALLBACKS => Target::Callback,
        queue if queue & 4 == 0 => Target::Uplink,
        _ => Target::Local,
    }
}

pub(super) fn parts(id: DeliveryId) -> (Target, Lane, i64) {
    (target(id.0), lane(id.0), id.0 >> 3)
}

/// The row's key. A `DeliveryId` that names no lane has none.
fn key(id: DeliveryId) -> i64 {
    let (target, lane, number) = parts(id);
    if id.0 & 7 == 7 { -1 } else { queue(target, lane) << QUEUE_SHIFT | number.clamp(0, NUMBER_MAX) }
}

fn id_of(key: i64) -> DeliveryId {
    DeliveryId((key & NUMBER_MAX) << 3 | key >> QUEUE_SHIFT)
}

fn counter(target: Target) -> Total {
    match target {
        Target::Uplink => Total::OwedUplink,
        Target::Local => Total::OwedLocal,
        Target::Callback => Total::OwedCallbacks,
    }
}

pub(super) fn delivery_bytes(delivery: &NewDelivery) -> u64 {
    event_bytes(&delivery.event) + (delivery.topic.len() + 64) as u64
}

pub(super) fn add(db: &mut Db, delivery: &NewDelivery) -> Result<DeliveryId, StoreError> {
    let columns = EventColumns::new(&delivery.event);
    let [a, b, c, d, e, f, g, h] = columns.params();
    let function = delivery.function.as_ref().map(FunctionName::as_str);
    let key = queue(delivery.target, delivery.lane) << QUEUE_SHIFT | db.next(Id::Delivery)?;
    let (wall, node) = (db.wall().0, db.node_ms());
    db.execute(
        "INSERT INTO deliveries (id, created_ms, created_node_ms, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        rusqlite::params![key, wall, node, function, delivery.topic, a, b, c, d, e, f, g, h],
        "store a delivery",
    )?;
    count(db, delivery.target, 1, delivery.event.data.len() as i64);
    Ok(id_of(key))
}

fn count(db: &mut Db, target: Target, n: i64, bytes: i64) {
    db.counters.add_total(counter(target), n);
    if target == Target::Callback {
        db.counters.add_total(Total::CallbackBytes, bytes);
    }
}

/// Whether one more may be owed, `bytes` long; one always may.
pub(super) fn callback_fits(db: &Db, bytes: u64) -> bool {
    let owed = db.counters.total(Total::OwedCallbacks).max(0) as u64;
    let held = db.counters.total(Total::CallbackBytes).max(0) as u64;
    owed == 0 || owed < CALLBACKS_MAX && held.saturating_add(bytes) <= db.callback_bytes_max()
}

/// Adds what asks for nobody else's room: without its own it is dropped, and counted.
pub(super) fn add_callback(db: &mut Db, callback: &NewDelivery) -> Result<(), StoreError> {
    let fits = callback_fits(db, callback.event.data.len() as u64);
    // As a new event's: not the reserve, in which running invocations leave their output.
    if fits && db.lacks(Room::Ingest, 1, delivery_bytes(callback))?.is_none() {
        add(db, callback)?;
        return Ok(());
    }
    tracing::debug!(event = callback.event.id.as_str(), "no room for a callback: it is dropped");
    inbox::count_meta(db, "dropped_full", Total::DroppedFull)
}

/// Where the outbox ends: what is added later stands behind it.
pub(super) fn end(db: &Db) -> Position {
    Position([db.last(Id::Delivery); 3])
}

/// For each lane the same, under a text of its own.
macro_rules! owed_sql {
    ($lane:literal) => {
        concat!(
            "SELECT id, lone_disconnects, replayed, function, topic, event_id, source, type, subject, time_ms,
                 content_type, extras, data, created_node_ms /* ",
            $lane,
            " */
             FROM deliveries WHERE id > ?1 AND id <= ?2 ORDER BY id LIMIT ?3"
        )
    };
}

/// Where any can't be read, none is given: they are taken away before it is asked again.
pub(super) fn owed(db: &mut Db, what: &Owed) -> Result<Vec<Delivery>, StoreError> {
    let doing = "read owed deliveries";
    let (now, wall) = (db.node_ms(), db.wall());
    let upto = what.upto.map_or([NUMBER_MAX; 3], |upto| upto.0);
    let range = |lane: Lane| {
        let first = queue(what.target, lane) << QUEUE_SHIFT;
        let (after, upto) = (what.after.0[lane as usize], upto[lane as usize]);
        let limit = if lanes_of(what.target).contains(&lane) { what.limit } else { 0 };
        (first | after.clamp(0, NUMBER_MAX), first | upto.clamp(0, NUMBER_MAX), limit)
    };
    // One statement of the cache would be parsed anew for the second and third lane.
    let mut statements = [
        db.statement(owed_sql!("high"), doing)?,
        db.statement(owed_sql!("normal"), doing)?,
        db.statement(owed_sql!("low"), doing)?,
    ];
    let mut lanes = Vec::with_capacity(3);
    for (statement, lane) in statements.iter_mut().zip(Lane::ALL) {
        let mut rows = statement.query(range(lane)).doing(doing)?;
        rows.advance().doing(doing)?;
        lanes.push(rows);
    }
    let (mut owed, mut bytes, mut unreadable) = (Vec::new(), 0, None);
    while owed.len() < what.limit as usize {
        let mut next: Option<(i64, usize)> = None;
        for (at, rows) in lanes.iter().enumerate() {
            let Some(row) = rows.get() else { continue };
            let key: i64 = row.get(0).doing(doing)?;
            let place = match what.order {
                OwedOrder::Lanes => key,
                OwedOrder::Arrival => key & NUMBER_MAX,
            };
            if next.is_none_or(|(first, _)| place < first) {
                next = Some((place, at));
            }
        }
        let Some((_, at)) = next else { break };
        let Some(row) = lanes[at].get() else { break };
        let read = row.get_ref(12).and_then(|data| {
            let len = data.as_bytes()?.len() as u64;
            Ok((len, read_owed(row)?, row.get::<_, i64>(13)?))
        });
        let (len, mut delivery, created) = match read {
            Ok(read) => read,
            Err(error) if is_unreadable(&error) => {
                let (ids, _) = unreadable.get_or_insert((Vec::new(), error));
                ids.push(id_of(row.get(0).doing(doing)?));
                lanes[at].advance().doing(doing)?;
                continue;
            }
            Err(error) => return Err(error).doing(doing),
        };
        bytes += len;
        if bytes > what.bytes_max && !owed.is_empty() {
            break;
        }
        delivery.body.event.correct_time(wall, inbox::age(now, created));
        owed.push(delivery);
        lanes[at].advance().doing(doing)?;
    }
    drop(lanes);
    drop(statements);
    if let Some((ids, error)) = unreadable {
        db.unreadable = ids;
        return Err(error).doing(doing);
    }
    Ok(owed)
}

/// Takes away what `owed` could not read; it is counted with the dead that were dropped.
pub(super) fn drop_unreadable(db: &mut Db) -> Result<(), StoreError> {
    for id in std::mem::take(&mut db.unreadable) {
        if remove(db, id)? {
            tracing::error!(delivery = %id, "a damaged delivery can't be read: it is dropped");
            inbox::count_meta(db, "dead_dropped", Total::Dropped)?;
        }
    }
    Ok(())
}

fn read_owed(row: &Row<'_>) -> rusqlite::Result<Delivery> {
    let id = id_of(row.get(0)?);
    Ok(Delivery { id, lone_disconnects: row.get(1)?, replayed: row.get(2)?, body: read_body(row, id, 3)? })
}

/// Reads function, topic and the event's columns from `first` on.
fn read_body(row: &Row<'_>, id: DeliveryId, first: usize) -> rusqlite::Result<NewDelivery> {
    let function: Option<String> = row.get(first)?;
    let function = match function {
        Some(name) => Some(FunctionName::parse(&name).map_err(|error| broken(first, Type::Text, error))?),
        None => None,
    };
    let (target, lane, _) = parts(id);
    Ok(NewDelivery { target, lane, function, topic: row.get(first + 1)?, event: read_event(row, first + 2)? })
}

pub(super) fn delivered(db: &mut Db, ids: &[DeliveryId]) -> Result<(), StoreError> {
    for id in ids {
        remove(db, *id)?;
    }
    Ok(())
}

/// Whether it was there.
fn remove(db: &mut Db, id: DeliveryId) -> Result<bool, StoreError> {
    let doing = "remove a delivery";
    let target = parts(id).0;
    let bytes: i64 = match target {
        Target::Callback => db.query_one(
            "SELECT coalesce((SELECT length(data) FROM deliveries WHERE id = ?1), 0)",
            [key(id)],
            doing,
            |row| row.get(0),
        )?,
        Target::Uplink | Target::Local => 0,
    };
    let gone = db.execute("DELETE FROM deliveries WHERE id = ?1", [key(id)], doing)?;
    count(db, target, -(gone as i64), -bytes);
    Ok(gone > 0)
}

pub(super) fn set_aside(db: &mut Db, id: DeliveryId, reason: &str) -> Result<(), StoreError> {
    let doing = "set a delivery aside";
    let bytes: Option<i64> = db.query_opt(
        "INSERT INTO dead_deliveries (id, created_ms, reason, bytes, function, topic, event_id,
             source, type, subject, time_ms, content_type, extras, data)
         SELECT ?2, created_ms, ?3, length(data) + 512, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM deliveries WHERE id = ?1 RETURNING bytes",
        (key(id), id.0, dead::head(reason)),
        doing,
        |row| row.get(0),
    )?;
    let bytes = bytes.ok_or(StoreError::NotFound)?;
    remove(db, id)?;
    count_dead(db, id.0, 1, bytes);
    while db.counters.total(Total::DeadDeliveries) > DEAD_MAX as i64
        || (db.counters.total(Total::DeadDeliveryBytes) > db.dead_bytes_max()
            && db.counters.total(Total::DeadDeliveries) > 1)
    {
        // Callbacks first: a receiver that is gone costs no broker's letters.
        let callback: Option<i64> = match db.counters.total(Total::DeadCallbacks) {
            0 => None,
            _ => db.query_opt(
                "SELECT id FROM dead_deliveries WHERE id & 7 = 3 ORDER BY id LIMIT 1",
                [],
                doing,
                |row| row.get(0),
            )?,
        };
        let oldest: Option<i64> = match callback {
            Some(callback) => Some(callback),
            None => db.query_one("SELECT min(id) FROM dead_deliveries", [], doing, |row| row.get(0))?,
        };
        let Some(oldest) = oldest else { break };
        remove_dead(db, oldest)?;
        inbox::count_meta(db, "dead_dropped", Total::Dropped)?;
    }
    Ok(())
}

/// The head of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Head {
    pub id: DeliveryId,
    pub created_node_ms: i64,
}

pub(super) fn head(db: &Db, target: Target, lane: Lane) -> Result<Option<Head>, StoreError> {
    let first = queue(target, lane) << QUEUE_SHIFT;
    db.query_opt(
        "SELECT id, created_node_ms FROM deliveries WHERE id BETWEEN ?1 AND ?2
         ORDER BY id LIMIT 1",
        (first, first | NUMBER_MAX),
        "read the oldest delivery",
        |row| Ok(Head { id: id_of(row.get(0)?), created_node_ms: row.get(1)? }),
    )
}

/// The callback that was added first.
pub(super) fn oldest_callback(db: &Db) -> Result<Option<Head>, StoreError> {
    match db.counters.total(Total::OwedCallbacks) {
        0 => Ok(None),
        _ => head(db, Target::Callback, Lane::Low),
    }
}

/// The one that was added first, of all that are left.
pub(super) fn oldest(db: &Db) -> Result<Option<Head>, StoreError> {
    oldest_of(db, &Lane::ALL)
}

/// The same, of these lanes.
pub(super) fn oldest_of(db: &Db, lanes: &[Lane]) -> Result<Option<Head>, StoreError> {
    let mut oldest: Option<Head> = None;
    for target in TARGETS {
        if db.counters.total(counter(target)) == 0 {
            continue;
        }
        for lane in lanes.iter().filter(|lane| lanes_of(target).contains(lane)) {
            let head = head(db, target, *lane)?;
            oldest = oldest.into_iter().chain(head).min_by_key(|head| head.id);
        }
    }
    Ok(oldest)
}

pub(super) fn lone_disconnect(db: &mut Db, id: DeliveryId) -> Result<u32, StoreError> {
    db.query_opt(
        "UPDATE deliveries SET lone_disconnects = lone_disconnects + 1 WHERE id = ?1
         RETURNING lone_disconnects",
        [key(id)],
        "count a disconnect",
        |row| row.get(0),
    )?
    .ok_or(StoreError::NotFound)
}

pub(super) fn list(
    db: &mut Db,
    dead: bool,
    after: Option<DeliveryId>,
    limit: u32,
) -> Result<Vec<Listed<DeliveryRow>>, StoreError> {
    let doing = "list deliveries";
    let read = |row: &Row<'_>, id: DeliveryId| listed(id.0, read_row(row, id));
    let limit = if limit == 0 { LISTING_MAX } else { limit.min(LISTING_MAX) };
    let after = after.map_or(0, |id| id.0);
    if dead {
        return db.query(
            "SELECT id, reason, created_ms, length(data), function, topic, event_id, source, type,
                 subject, time_ms, content_type, extras, x''
             FROM dead_deliveries WHERE id > ?1 ORDER BY id LIMIT ?2",
            (after, limit),
            doing,
            |row| read(row, DeliveryId(row.get(0)?)),
        );
    }
    let mut all = Vec::new();
    for target in TARGETS {
        for lane in lanes_of(target) {
            let queue = queue(target, *lane);
            let first = queue << QUEUE_SHIFT;
            // The first number whose id is above `after`.
            let number = (after - queue).div_euclid(8).clamp(-1, NUMBER_MAX - 1) + 1;
            all.extend(db.query(
                "SELECT id, NULL, created_ms, length(data), function, topic, event_id, source, type,
                     subject, time_ms, content_type, extras, x''
                 FROM deliveries WHERE id BETWEEN ?1 AND ?2 ORDER BY id LIMIT ?3",
                (first | number, first | NUMBER_MAX, limit),
                doing,
                |row| read(row, id_of(row.get(0)?)),
            )?);
        }
    }
    all.sort_unstable_by_key(|row| row.as_ref().map_or_else(|damaged| damaged.id, |row| row.id.0));
    all.truncate(limit as usize);
    Ok(all)
}

pub(super) fn get(db: &mut Db, id: DeliveryId) -> Result<DeliveryRow, StoreError> {
    read_one(db, id)?.map_err(|damaged| StoreError::Damaged(damaged.why))
}

fn read_one(db: &Db, id: DeliveryId) -> Result<Listed<DeliveryRow>, StoreError> {
    db.query_opt(
        "SELECT id, NULL, created_ms, length(data), function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM deliveries WHERE id = ?1
         UNION ALL
         SELECT id, reason, created_ms, length(data), function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM dead_deliveries WHERE id = ?2",
        (key(id), id.0),
        "read a delivery",
        |row| listed(id.0, read_row(row, id)),
    )?
    .ok_or(StoreError::NotFound)
}

fn read_row(row: &Row<'_>, id: DeliveryId) -> rusqlite::Result<DeliveryRow> {
    Ok(DeliveryRow {
        id,
        dead: row.get(1)?,
        created: UnixMs(row.get(2)?),
        data_bytes: row.get::<_, u32>(3)?.into(),
        body: read_body(row, id, 4)?,
    })
}

/// A new number in its old lane: it joins at the end, so that what is in flight keeps its order.
/// Those that can't be read stay: at their turn they would be dropped.
pub(super) fn redrive(db: &mut Db, id: Option<DeliveryId>) -> Result<u64, StoreError> {
    let mut count_redriven = 0;
    for id in &dead_ids(db, id)? {
        if let Err(damaged) = read_one(db, DeliveryId(*id))? {
            tracing::warn!(delivery = %id, error = damaged.why, "a damaged delivery can't be read: it stays dead");
            continue;
        }
        let (target, lane, _) = parts(DeliveryId(*id));
        let key = queue(target, lane) << QUEUE_SHIFT | db.next(Id::Delivery)?;
        let node = db.node_ms();
        // A person's word: CALLBACKS_MAX does not hold for these.
        let bytes = db.query_one(
            "SELECT coalesce(length(data), 0) FROM dead_deliveries WHERE id = ?1",
            [id],
            "redrive a delivery",
            |row| row.get(0),
        )?;
        db.execute(
            "INSERT INTO deliveries (id, created_ms, created_node_ms, replayed, function, topic, event_id,
                 source, type, subject, time_ms, content_type, extras, data)
             SELECT ?2, created_ms, ?3, 1, function, topic, event_id, source, type, subject, time_ms,
                 content_type, extras, data
             FROM dead_deliveries WHERE id = ?1",
            (id, key, node),
            "redrive a delivery",
        )?;
        count(db, target, 1, bytes);
        remove_dead(db, *id)?;
        count_redriven += 1;
    }
    Ok(count_redriven)
}

pub(super) fn purge(db: &mut Db, id: Option<DeliveryId>) -> Result<u64, StoreError> {
    let ids = dead_ids(db, id)?;
    for id in &ids {
        remove_dead(db, *id)?;
    }
    Ok(ids.len() as u64)
}

fn dead_ids(db: &Db, id: Option<DeliveryId>) -> Result<Vec<i64>, StoreError> {
    db.query(
        "SELECT id FROM dead_deliveries WHERE ?1 IS NULL OR id = ?1 ORDER BY id",
        [id.map(|id| id.0)],
        "list dead deliveries",
        |row| row.get(0),
    )
}

fn remove_dead(db: &mut Db, id: i64) -> Result<(), StoreError> {
    let bytes: Option<i64> = db.query_opt(
        // What can't be read must go all the same.
        "DELETE FROM dead_deliveries WHERE id = ?1 RETURNING CAST(bytes AS INTEGER)",
        [id],
        "remove a dead delivery",
        |row| row.get(0),
    )?;
    if let Some(bytes) = bytes {
        count_dead(db, id, -1, -bytes);
    }
    Ok(())
}

fn count_dead(db: &mut Db, id: i64, n: i64, bytes: i64) {
    db.counters.add_total(Total::DeadDeliveries, n);
    db.counters.add_total(Total::DeadDeliveryBytes, bytes);
    if target(id) == Target::Callback {
        db.counters.add_total(Total::DeadCallbacks, n);
    }
}
