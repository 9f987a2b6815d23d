//! An event as columns: `events`, `deliveries` and `dead_deliveries` hold the same eight.

use crate::model::{Event, EventId, HttpRequest, UnixMs};
use rusqlite::types::Type;
use rusqlite::{Row, ToSql};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `event_id, source, type, subject, time_ms, content_type, extras, data`
pub(super) struct EventColumns<'a> {
    event: &'a Event,
    id: &'a str,
    time_ms: Option<i64>,
    extras: Option<String>,
}

/// What most events don't have.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Extras {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    extensions: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: Option<HttpRequest>,
}

#[derive(Serialize)]
struct ExtrasRef<'a> {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    extensions: &'a BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    http: &'a Option<HttpRequest>,
}

impl<'a> EventColumns<'a> {
    pub fn new(event: &'a Event) -> Self {
        let plain = event.extensions.is_empty() && event.http.is_none();
        let extras = ExtrasRef { extensions: &event.extensions, http: &event.http };
        let extras = (!plain).then(|| {
            serde_json::to_string(&extras).expect("maps with string keys and plain structs always serialize")
        });
        Self { event, id: event.id.as_str(), time_ms: event.time.map(|time| time.0), extras }
    }

    /// In the order of the columns.
    pub fn params(&self) -> [&dyn ToSql; 8] {
        let event = self.event;
        [
            &self.id,
            &event.source,
            &event.kind,
            &event.subject,
            &self.time_ms,
            &event.content_type,
            &self.extras,
            &event.data,
        ]
    }
}

/// About what an event takes on disk: its bytes, and some for record headers and keys.
pub(super) fn event_bytes(event: &Event) -> u64 {
    let text = event.id.as_str().len()
        + event.source.len()
        + event.kind.len()
        + event.subject.as_ref().map_or(0, String::len)
        + event.content_type.as_ref().map_or(0, String::len);
    let extensions: usize = event.extensions.iter().map(|(name, value)| name.len() + value.len() + 6).sum();
    let http = event.http.as_ref().map_or(0, |http| {
        let headers: usize = http.headers.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        64 + http.method.len() + http.path.len() + http.query.len() + headers
    });
    // A large one stands on pages of its own, each with a pointer to the next.
    (128 + text + extensions + http + event.data.len() + event.data.len() / 256) as u64
}

/// Reads the eight columns from `first` on.
pub(super) fn read_event(row: &Row<'_>, first: usize) -> rusqlite::Result<Event> {
    let id: String = row.get(first)?;
    let id = EventId::parse(&id).ok_or_else(|| broken(first, Type::Text, "not an event id"))?;
    let extras: Option<String> = row.get(first + 6)?;
    let extras: Extras = match extras {
        Some(text) => serde_json::from_str(&text).map_err(|error| broken(first + 6, Type::Text, error))?,
        None => Extras::default(),
    };
    Ok(Event {
        id,
        source: row.get(first + 1)?,
        kind: row.get(first + 2)?,
        subject: row.get(first + 3)?,
        time: row.get::<_, Option<i64>>(first + 4)?.map(UnixMs),
        content_type: row.get(first + 5)?,
        extensions: extras.extensions,
        http: extras.http,
        data: row.get(first + 7)?,
    })
}

/// A column that holds what neap never writes.
pub(super) fn broken(
    column: usize,
    kind: Type,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, kind, error.into())
}
