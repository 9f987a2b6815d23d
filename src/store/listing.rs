//! Looking at the inbox, and acting on its dead: `neap events`, redrive, purge.

use super::db::Db;
use super::error::{Doing, StoreError, listed};
use super::event_row::read_event;
use super::{InvocationFilter, InvocationRow, InvocationState, LISTING_MAX, Listed, dead, functions, inbox};
use crate::model::{EventSeq, FunctionName, InvocationId, UnixMs};
use rusqlite::Row;
use rusqlite::types::Value;
use std::time::Duration;

/// Events looked at in one request when one is searched by its id. There is no index: random
/// ids would dirty a page of it for each event that arrives, to answer a question that a
/// person asks once in a while. So the search goes step by step, with room for others between.
const SEARCH_STEP: u32 = 2_048;

/// Events that may share one id (a sender repeats itself) in an answer.
pub(super) const SAME_ID_MAX: usize = 100;

/// A step of the search for an event id behind `after`: what was found, and where to go on.
pub(super) fn search(db: &mut Db, id: &str, after: i64) -> Result<(Vec<i64>, Option<i64>), StoreError> {
    let doing = "search an event";
    let mut statement =
        db.statement("SELECT seq, event_id FROM events WHERE seq > ?1 ORDER BY seq LIMIT ?2", doing)?;
    let mut rows = statement.query((after, SEARCH_STEP)).doing(doing)?;
    let (mut found, mut last, mut seen) = (Vec::new(), after, 0);
    while let Some(row) = rows.next().doing(doing)? {
        last = row.get(0).doing(doing)?;
        seen += 1;
        if row.get_ref(1).doing(doing)?.as_str_or_null().is_ok_and(|text| text == Some(id)) {
            found.push(last);
        }
    }
    Ok((found, (seen == SEARCH_STEP).then_some(last)))
}

/// A filter whose event has been looked up.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub by: InvocationFilter,
    /// `None`: any event.
    pub seqs: Option<Vec<i64>>,
}

/// CROSS JOIN and NOT INDEXED: walked in order of id, so that a page of a million rows costs a page.
const LIVING: &str = "SELECT i.id AS id, f.name, i.place IS NULL, i.attempts, i.lost, i.error, x'' AS output, i.place,
     e.arrived_ms, length(e.data), e.event_id, e.source, e.type, e.subject, e.time_ms, e.content_type, e.extras,
     DATA
 FROM invocations i NOT INDEXED CROSS JOIN functions f ON f.id = i.function CROSS JOIN events e ON e.seq = i.id / 4096
 WHERE f.removed IS NULL AND ";

const DEAD: &str = "SELECT d.id AS id, f.name, 3, d.attempts, d.lost, d.error, d.output, 0,
     e.arrived_ms, length(e.data), e.event_id, e.source, e.type, e.subject, e.time_ms, e.content_type, e.extras,
     DATA
 FROM dead_invocations d NOT INDEXED CROSS JOIN functions f ON f.id = d.function CROSS JOIN events e ON e.seq = d.id / 4096
 WHERE f.removed IS NULL AND ";

/// In order of id. `data`: with the events' data.
pub(super) fn list(
    db: &mut Db,
    filter: &Filter,
    data: bool,
) -> Result<Vec<Listed<InvocationRow>>, StoreError> {
    let limit = match filter.by.limit {
        0 => LISTING_MAX,
        limit => limit.min(LISTING_MAX),
    };
    let mut rows = Vec::new();
    match &filter.seqs {
        None => {
            let after = filter.by.after.map_or(0, |id| id.0);
            select(db, filter, data, (after + 1, i64::MAX), limit, &mut rows)?;
        }
        Some(seqs) => {
            for seq in seqs {
                let first = inbox::first_of(*seq).max(filter.by.after.map_or(0, |id| id.0 + 1));
                let range = (first, inbox::first_of(seq + 1) - 1);
                let left = limit - rows.len() as u32;
                select(db, filter, data, range, left, &mut rows)?;
            }
        }
    }
    Ok(rows)
}

fn select(
    db: &Db,
    filter: &Filter,
    data: bool,
    (first, last): (i64, i64),
    limit: u32,
    rows: &mut Vec<Listed<InvocationRow>>,
) -> Result<(), StoreError> {
    let doing = "list invocations";
    let mut parts = Vec::new();
    let mut params: Vec<Value> = vec![first.into(), last.into(), i64::from(limit).into()];
    let mut of_function = "";
    if let Some(name) = &filter.by.function {
        let Some(id) = functions::deployed(db, name)? else { return Ok(()) };
        params.push(id.into());
        of_function = " AND function = ?4";
    }
    let state = filter.by.state;
    if state != Some(InvocationState::Dead) {
        let of_state = match state {
            Some(InvocationState::Ready) => " AND i.place IS NOT NULL",
            Some(InvocationState::Running) => " AND i.place IS NULL",
            _ => "",
        };
        parts.push(format!("{LIVING} i.id BETWEEN ?1 AND ?2{of_function}{of_state}"));
    }
    if state.is_none() || state == Some(InvocationState::Dead) {
        parts.push(format!("{DEAD} d.id BETWEEN ?1 AND ?2{of_function}"));
    }
    let column = if data { "e.data" } else { "x''" };
    let sql = parts.join(" UNION ALL ").replace("DATA", column) + " ORDER BY id LIMIT ?3";
    let now = db.node_ms();
    let mut statement = db.connection().prepare(&sql).doing(doing)?;
    let found = statement.query_map(rusqlite::params_from_iter(params), |row| {
        let id: i64 = row.get(0)?;
        listed(id, read_row(row, id, now))
    });
    for row in found.doing(doing)? {
        rows.push(row.doing(doing)?);
    }
    Ok(())
}

fn read_row(row: &Row<'_>, id: i64, now: i64) -> rusqlite::Result<InvocationRow> {
    let state = match row.get(2)? {
        1 => InvocationState::Running,
        3 => InvocationState::Dead,
        _ => InvocationState::Ready,
    };
    let place: Option<i64> = row.get(7)?;
    let due_ms = place.unwrap_or(0).saturating_sub(inbox::WAITING_FROM);
    Ok(InvocationRow {
        id: InvocationId(id),
        seq: EventSeq(inbox::seq_of(id)),
        function: functions::read_name(row, 1)?,
        state,
        attempts: row.get(3)?,
        lost: row.get(4)?,
        last_error: row.get(5)?,
        last_output: row.get(6)?,
        due_in: Duration::from_millis(if due_ms < 0 { 0 } else { due_ms.saturating_sub(now).max(0) as u64 }),
        arrived: UnixMs(row.get(8)?),
        data_bytes: row.get::<_, u32>(9)?.into(),
        event: read_event(row, 10)?,
    })
}

pub(super) fn redrive(db: &mut Db, filter: &Filter) -> Result<u64, StoreError> {
    let mut count = 0;
    for id in dead_ids(db, filter)? {
        count += u64::from(dead::redrive(db, id)?);
    }
    Ok(count)
}

pub(super) fn purge(db: &mut Db, filter: &Filter) -> Result<u64, StoreError> {
    let mut count = 0;
    for id in dead_ids(db, filter)? {
        count += u64::from(dead::remove(db, id)?);
    }
    Ok(count)
}

/// The dead ones that a filter means; there are at most `DEAD_MAX`.
fn dead_ids(db: &Db, filter: &Filter) -> Result<Vec<i64>, StoreError> {
    if filter.by.state.is_some_and(|state| state != InvocationState::Dead) {
        return Ok(Vec::new());
    }
    let function = match &filter.by.function {
        Some(name) => Some(id_or_none(db, name)?),
        None => None,
    };
    let ids: Vec<i64> = db.query(
        "SELECT id FROM dead_invocations WHERE id > ?1 AND (?2 IS NULL OR function = ?2) ORDER BY id",
        (filter.by.after.map_or(0, |id| id.0), function),
        "list dead invocations",
        |row| row.get(0),
    )?;
    let limit = if filter.by.limit == 0 { usize::MAX } else { filter.by.limit as usize };
    let meant = |id: &i64| filter.seqs.as_ref().is_none_or(|seqs| seqs.contains(&inbox::seq_of(*id)));
    Ok(ids.into_iter().filter(meant).take(limit).collect())
}

/// No function has id 0.
fn id_or_none(db: &Db, name: &FunctionName) -> Result<i64, StoreError> {
    Ok(functions::deployed(db, name)?.unwrap_or(0))
}
