//! Repetitions: what senders gave to tell one by, over a window of the last ones.
//!
//! The table is only appended to at one end and trimmed at the other, and the keys are held in
//! memory: an index over random keys would dirty a page for each event. A plain MQTT publish has
//! nothing to be told by and is never dropped (DUP says nothing: MQTT 3.1.1 §3.3.1.1).

use super::DedupKey;
use super::SEEN_MAX;
use super::db::Db;
use super::error::StoreError;
use super::event_row::broken;
use crate::model::EventId;
use rusqlite::types::Type;
use std::collections::HashMap;

#[derive(Debug, Default)]
pub(super) struct Seen {
    keys: HashMap<DedupKey, i64>,
    last: i64,
    /// What the open transaction added and forgot, in order.
    changes: Vec<(DedupKey, i64, Change)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Added,
    Forgotten,
}

impl Seen {
    pub fn mark(&self) -> usize {
        self.changes.len()
    }

    pub fn undo_to(&mut self, mark: usize) {
        while self.changes.len() > mark {
            match self.changes.pop() {
                Some((key, _, Change::Added)) => drop(self.keys.remove(&key)),
                Some((key, id, Change::Forgotten)) => drop(self.keys.insert(key, id)),
                None => break,
            }
        }
    }

    pub fn committed(&mut self) {
        self.changes.clear();
    }

    fn add(&mut self, key: DedupKey, id: i64) {
        self.keys.insert(key, id);
        self.changes.push((key, id, Change::Added));
    }

    fn forget(&mut self, key: DedupKey, id: i64) {
        self.keys.remove(&key);
        self.changes.push((key, id, Change::Forgotten));
    }
}

pub(super) fn load(db: &mut Db) -> Result<(), StoreError> {
    let rows: Vec<(i64, [u8; 16])> =
        db.query("SELECT id, key FROM seen ORDER BY id", [], "read senders' ids", |row| {
            Ok((row.get(0)?, row.get(1)?))
        })?;
    db.seen.last = rows.last().map_or(0, |(id, _)| *id);
    db.seen.keys = rows.into_iter().map(|(id, key)| (DedupKey(key), id)).collect();
    Ok(())
}

/// The id of the event that this key came with before.
pub(super) fn find(db: &Db, key: &DedupKey) -> Result<Option<EventId>, StoreError> {
    let Some(id) = db.seen.keys.get(key) else { return Ok(None) };
    db.query_opt("SELECT event_id FROM seen WHERE id = ?1", [id], "look a sender's id up", |row| {
        let text: String = row.get(0)?;
        EventId::parse(&text).ok_or_else(|| broken(0, Type::Text, "not an event id"))
    })
}

pub(super) fn remember(db: &mut Db, key: &DedupKey, event: &EventId) -> Result<(), StoreError> {
    let doing = "remember a sender's id";
    let id = db.seen.last + 1;
    db.execute(
        "INSERT INTO seen (id, key, event_id) VALUES (?1, ?2, ?3)",
        (id, &key.0[..], event.as_str()),
        doing,
    )?;
    db.seen.last = id; // not undone: a number is as good as another
    db.seen.add(*key, id);
    while db.seen.keys.len() > SEEN_MAX {
        let oldest: Option<(i64, [u8; 16])> = db.query_opt(
            "DELETE FROM seen WHERE id = (SELECT min(id) FROM seen) RETURNING id, key",
            [],
            doing,
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        let Some((id, key)) = oldest else { break };
        db.seen.forget(DedupKey(key), id);
    }
    Ok(())
}
