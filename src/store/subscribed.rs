//! What the sessions at the brokers are subscribed to, as the links last knew it: a list of
//! lines for each broker, in table `meta` as JSON. The store doesn't look into it.

use super::db::Db;
use super::error::StoreError;
use super::schema;
use crate::model::Target;

fn key(target: Target) -> &'static str {
    match target {
        Target::Local => "subscribed_local",
        Target::Uplink => "subscribed_uplink",
    }
}

/// Empty when nothing is known: a list that can't be read is one that will be made anew.
pub(super) fn read(db: &mut Db, target: Target) -> Result<Vec<String>, StoreError> {
    let text: Option<String> = schema::meta(db.connection(), key(target))?;
    Ok(text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default())
}

pub(super) fn write(db: &mut Db, target: Target, lines: &[String]) -> Result<(), StoreError> {
    let text = serde_json::Value::from(lines).to_string();
    schema::set_meta(db.connection(), key(target), text)
}
