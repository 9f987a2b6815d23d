//! The store at a glance; costs the same with ten rows as with a million.

use super::counters::{Of, Total};
use super::db::Db;
use super::error::StoreError;
use super::full::Lack;
use super::{Counts, FunctionCounts, full, functions, outbox};

pub(super) fn counts(db: &mut Db) -> Result<Counts, StoreError> {
    let doing = "read the status";
    // The first living row of each table is the oldest: ids are given in order of arrival. Rows
    // of removed functions may still stand before it; they are swept shortly.
    let oldest: Option<i64> = db.query_opt(
        "SELECT e.arrived_node_ms FROM invocations i CROSS JOIN events e ON e.seq = i.id / 4096 ORDER BY i.id LIMIT 1",
        [],
        doing,
        |row| row.get(0),
    )?;
    let oldest_owed = outbox::oldest(db)?.map(|oldest| full::age(db, oldest.created_node_ms));
    let deployed: Vec<(i64, _)> =
        db.query("SELECT id, name FROM functions WHERE removed IS NULL ORDER BY name", [], doing, |row| {
            Ok((row.get(0)?, functions::read_name(row, 1)?))
        })?;
    let full = db.still_full()?;
    let counters = &db.counters;
    let of = |function, of| counters.of(function, of) as u64;
    let total = |total| counters.total(total) as u64;
    let per_function = deployed
        .into_iter()
        .map(|(id, function)| FunctionCounts {
            function,
            ready: of(id, Of::Ready) + of(id, Of::Waiting),
            running: of(id, Of::Running),
            dead: of(id, Of::Dead),
        })
        .collect();
    Ok(Counts {
        ready: (counters.sum(Of::Ready) + counters.sum(Of::Waiting)) as u64,
        running: counters.sum(Of::Running) as u64,
        dead: total(Total::Dead),
        oldest: oldest.map(|arrived| full::age(db, arrived)),
        owed_uplink: total(Total::OwedUplink),
        owed_local: total(Total::OwedLocal),
        owed_callbacks: total(Total::OwedCallbacks),
        dead_deliveries: total(Total::DeadDeliveries),
        oldest_owed,
        expired: total(Total::Expired),
        dead_dropped: total(Total::Dropped),
        dropped_full: total(Total::DroppedFull),
        dropped_age: total(Total::DroppedAge),
        full: full.map(Lack::as_str),
        bytes: db.bytes_used()?,
        bytes_max: db.limits.bytes_max,
        per_function,
    })
}
