//! What each broker's session was last known to be subscribed to: the session outlives the
//! daemon, and filters that a manifest no longer names must be unsubscribed.

use super::db::Db;
use super::error::StoreError;
use super::schema;
use crate::model::Target;

fn key(target: Target) -> &'static str {
    match target {
        Target::Uplink => "subscribed.uplink",
        Target::Local => "subscribed.local",
        // No broker; never asked for.
        Target::Callback => "subscribed.callback",
    }
}

/// Empty when nothing is known.
pub(super) fn get(db: &mut Db, target: Target) -> Result<Vec<String>, StoreError> {
    let lines: Option<String> = schema::meta(db.connection(), key(target))?;
    // What can't be read is as good as unknown: the session is then subscribed afresh.
    Ok(lines.and_then(|lines| serde_json::from_str(&lines).ok()).unwrap_or_default())
}

pub(super) fn set(db: &mut Db, target: Target, lines: &[String]) -> Result<(), StoreError> {
    let lines = serde_json::to_string(lines).expect("strings are always JSON");
    schema::set_meta(db.connection(), key(target), lines)
}
