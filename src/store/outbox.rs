//! The outbox: deliveries owed to a broker, in order of id, gone when it has acknowledged them.
//! What a broker refuses for good is set aside in a table of its own, so that the living ones
//! are always the head of an index.

use super::counters::Total;
use super::db::Db;
use super::error::StoreError;
use super::event_row::{EventColumns, broken, event_bytes, read_event};
use super::{DEAD_MAX, DeliveryRow, LISTING_MAX, dead, inbox};
use crate::model::{Delivery, DeliveryId, FunctionName, NewDelivery, Target, UnixMs};
use rusqlite::Row;
use rusqlite::types::Type;

fn column(target: Target) -> i64 {
    match target {
        Target::Uplink => 0,
        Target::Local => 1,
    }
}

fn target(column: i64) -> Target {
    if column == 1 { Target::Local } else { Target::Uplink }
}

fn counter(target: Target) -> Total {
    match target {
        Target::Uplink => Total::OwedUplink,
        Target::Local => Total::OwedLocal,
    }
}

pub(super) fn delivery_bytes(delivery: &NewDelivery) -> u64 {
    event_bytes(&delivery.event) + (delivery.topic.len() + 64) as u64
}

pub(super) fn add(db: &mut Db, delivery: &NewDelivery) -> Result<DeliveryId, StoreError> {
    let columns = EventColumns::new(&delivery.event);
    let [a, b, c, d, e, f, g, h] = columns.params();
    let function = delivery.function.as_ref().map(FunctionName::as_str);
    db.execute(
        "INSERT INTO deliveries (target, created_ms, function, topic, event_id, source, type, subject,
             time_ms, content_type, extras, data)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
        rusqlite::params![
            column(delivery.target),
            db.wall().0,
            function,
            delivery.topic,
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h
        ],
        "store a delivery",
    )?;
    let id = DeliveryId(db.last_id());
    db.counters.add_total(counter(delivery.target), 1);
    Ok(id)
}

pub(super) fn owed(
    db: &mut Db,
    target: Target,
    after: DeliveryId,
    limit: u32,
    bytes_max: u64,
) -> Result<Vec<Delivery>, StoreError> {
    let doing = "read owed deliveries";
    let mut statement = db.statement(
        "SELECT id, lone_disconnects, target, function, topic, event_id, source, type, subject, time_ms,
             content_type, extras, data
         FROM deliveries WHERE target = ?1 AND id > ?2 ORDER BY id LIMIT ?3",
        doing,
    )?;
    let failed = |source| StoreError::Sqlite { doing, source };
    let mut rows = statement.query((column(target), after.0, limit)).map_err(failed)?;
    let (mut owed, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next().map_err(failed)? {
        let size = row.get_ref(12).and_then(|data| Ok(data.as_bytes()?.len() as u64)).map_err(failed)?;
        bytes += size;
        if bytes > bytes_max && !owed.is_empty() {
            break;
        }
        owed.push(Delivery {
            id: DeliveryId(row.get(0).map_err(failed)?),
            lone_disconnects: row.get(1).map_err(failed)?,
            body: read_body(row, 2).map_err(failed)?,
        });
    }
    Ok(owed)
}

/// Reads target, function, topic and the event's columns from `first` on.
fn read_body(row: &Row<'_>, first: usize) -> rusqlite::Result<NewDelivery> {
    let function: Option<String> = row.get(first + 1)?;
    let function = match function {
        Some(name) => Some(FunctionName::parse(&name).map_err(|error| broken(first + 1, Type::Text, error))?),
        None => None,
    };
    Ok(NewDelivery {
        target: target(row.get(first)?),
        function,
        topic: row.get(first + 2)?,
        event: read_event(row, first + 3)?,
    })
}

pub(super) fn delivered(db: &mut Db, ids: &[DeliveryId]) -> Result<(), StoreError> {
    for id in ids {
        let gone: Option<i64> = db.query_opt(
            "DELETE FROM deliveries WHERE id = ?1 RETURNING target",
            [id.0],
            "remove a delivery",
            |row| row.get(0),
        )?;
        if let Some(column) = gone {
            db.counters.add_total(counter(target(column)), -1);
        }
    }
    Ok(())
}

pub(super) fn set_aside(db: &mut Db, id: DeliveryId, reason: &str) -> Result<(), StoreError> {
    let doing = "set a delivery aside";
    let bytes: Option<i64> = db.query_opt(
        "INSERT INTO dead_deliveries (id, target, created_ms, reason, bytes, function, topic, event_id,
             source, type, subject, time_ms, content_type, extras, data)
         SELECT id, target, created_ms, ?2, length(data) + 512, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM deliveries WHERE id = ?1 RETURNING bytes",
        (id.0, dead::head(reason)),
        doing,
        |row| row.get(0),
    )?;
    let bytes = bytes.ok_or(StoreError::NotFound)?;
    delivered(db, &[id])?;
    db.counters.add_total(Total::DeadDeliveries, 1);
    db.counters.add_total(Total::DeadDeliveryBytes, bytes);
    while db.counters.total(Total::DeadDeliveries) > DEAD_MAX as i64
        || (db.counters.total(Total::DeadDeliveryBytes) > db.dead_bytes_max()
            && db.counters.total(Total::DeadDeliveries) > 1)
    {
        let oldest: Option<i64> =
            db.query_one("SELECT min(id) FROM dead_deliveries", [], doing, |row| row.get(0))?;
        let Some(oldest) = oldest else { break };
        remove_dead(db, oldest)?;
        inbox::count_meta(db, "dead_dropped", Total::Dropped)?;
    }
    Ok(())
}

pub(super) fn lone_disconnect(db: &mut Db, id: DeliveryId) -> Result<u32, StoreError> {
    db.query_opt(
        "UPDATE deliveries SET lone_disconnects = lone_disconnects + 1 WHERE id = ?1
         RETURNING lone_disconnects",
        [id.0],
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
) -> Result<Vec<DeliveryRow>, StoreError> {
    let sql = if dead {
        "SELECT id, reason, created_ms, length(data), target, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, x''
         FROM dead_deliveries WHERE id > ?1 ORDER BY id LIMIT ?2"
    } else {
        "SELECT id, NULL, created_ms, length(data), target, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, x''
         FROM deliveries WHERE id > ?1 ORDER BY id LIMIT ?2"
    };
    let limit = if limit == 0 { LISTING_MAX } else { limit.min(LISTING_MAX) };
    db.query(sql, (after.map_or(0, |id| id.0), limit), "list deliveries", read_row)
}

pub(super) fn get(db: &mut Db, id: DeliveryId) -> Result<DeliveryRow, StoreError> {
    db.query_opt(
        "SELECT id, NULL, created_ms, length(data), target, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM deliveries WHERE id = ?1
         UNION ALL
         SELECT id, reason, created_ms, length(data), target, function, topic, event_id, source, type,
             subject, time_ms, content_type, extras, data
         FROM dead_deliveries WHERE id = ?1",
        [id.0],
        "read a delivery",
        read_row,
    )?
    .ok_or(StoreError::NotFound)
}

fn read_row(row: &Row<'_>) -> rusqlite::Result<DeliveryRow> {
    Ok(DeliveryRow {
        id: DeliveryId(row.get(0)?),
        dead: row.get(1)?,
        created: UnixMs(row.get(2)?),
        data_bytes: row.get::<_, u32>(3)?.into(),
        body: read_body(row, 4)?,
    })
}

/// A new id: it joins at the end, so that what is in flight keeps its order.
pub(super) fn redrive(db: &mut Db, id: Option<DeliveryId>) -> Result<u64, StoreError> {
    let ids = dead_ids(db, id)?;
    for id in &ids {
        let target_column: i64 = db.query_one(
            "INSERT INTO deliveries (target, created_ms, function, topic, event_id, source, type, subject,
                 time_ms, content_type, extras, data)
             SELECT target, created_ms, function, topic, event_id, source, type, subject, time_ms,
                 content_type, extras, data
             FROM dead_deliveries WHERE id = ?1 RETURNING target",
            [id],
            "redrive a delivery",
            |row| row.get(0),
        )?;
        db.counters.add_total(counter(target(target_column)), 1);
        remove_dead(db, *id)?;
    }
    Ok(ids.len() as u64)
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
        "DELETE FROM dead_deliveries WHERE id = ?1 RETURNING bytes",
        [id],
        "remove a dead delivery",
        |row| row.get(0),
    )?;
    if let Some(bytes) = bytes {
        db.counters.add_total(Total::DeadDeliveries, -1);
        db.counters.add_total(Total::DeadDeliveryBytes, -bytes);
    }
    Ok(())
}
