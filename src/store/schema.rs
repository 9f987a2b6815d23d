//! The schema's versions: numbered SQL files, each applied once, in order, in a transaction.
//!
//! A gateway may be rolled back to the previous release, so the database says which versions
//! can read it (`readable_by`), and one that can't leaves it untouched. An older neap that can
//! works with a newer schema as it finds it.

use super::error::{Doing, StoreError};
use rusqlite::{Connection, OptionalExtension, Transaction};

struct Migration {
    number: i64,
    sql: &'static str,
    /// The oldest neap that can work with the database afterwards.
    readable_by: &'static str,
}

const MIGRATIONS: &[Migration] = &[
    Migration { number: 1, sql: include_str!("migrations/0001_first.sql"), readable_by: "0.1.0" },
    Migration { number: 2, sql: include_str!("migrations/0002_rollback.sql"), readable_by: "0.1.0" },
    Migration { number: 3, sql: include_str!("migrations/0003_copies.sql"), readable_by: "0.1.0" },
];

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// "neap" in ASCII, for `file` and whoever finds the database.
const APPLICATION_ID: i32 = 0x6e65_6170;

/// The database's version, read before anything is written. `None`: it is empty.
pub(super) fn check(conn: &Connection) -> Result<Option<i64>, StoreError> {
    let tables: i64 = conn
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .doing("read the database")?;
    if tables == 0 {
        return Ok(None);
    }
    let readable_by: Result<Option<String>, _> = meta(conn, "readable_by");
    let readable_by = match readable_by {
        Ok(Some(version)) if numbers(&version).is_some() => version,
        found => return Err(unreadable(conn, found.err())),
    };
    if !at_least(VERSION, &readable_by) {
        let written_by = meta(conn, "written_by")?.unwrap_or_default();
        return Err(StoreError::TooNew { written_by, readable_by });
    }
    meta(conn, "schema")
}

/// Not what neap writes: its own database is damaged then, another's is none of its business.
fn unreadable(conn: &Connection, error: Option<StoreError>) -> StoreError {
    let ours = conn.pragma_query_value(None, "application_id", |row| row.get(0));
    if error.is_some() && ours != Ok(APPLICATION_ID) {
        let source = std::io::Error::other("it is no database of neap's; move it away");
        return StoreError::Io { doing: "open the database", source };
    }
    StoreError::Damaged("its settings can't be read".to_owned())
}

/// Brings the schema from `version` to the newest.
pub(super) fn migrate(conn: &mut Connection, version: Option<i64>) -> Result<(), StoreError> {
    let doing = "migrate the database";
    let tx = conn.transaction().doing(doing)?;
    for migration in MIGRATIONS.iter().filter(|migration| migration.number > version.unwrap_or(0)) {
        tx.execute_batch(migration.sql).doing(doing)?;
        set_meta(&tx, "schema", migration.number)?;
        set_meta(&tx, "readable_by", migration.readable_by)?;
    }
    if version.is_none() {
        tx.pragma_update(None, "application_id", APPLICATION_ID).doing(doing)?;
        set_initial(&tx)?;
    }
    set_meta(&tx, "written_by", VERSION)?;
    tx.commit().doing(doing)
}

fn set_initial(tx: &Transaction<'_>) -> Result<(), StoreError> {
    // `clean`: an empty database has nothing to recover.
    for (key, value) in [
        ("clean", 1),
        ("node_ms", 0),
        ("expired", 0),
        ("dead_dropped", 0),
        ("dropped_full", 0),
        ("dropped_age", 0),
        ("revisions", 0),
    ] {
        set_meta(tx, key, value)?;
    }
    Ok(())
}

/// A value of table `meta`.
pub(super) fn meta<T: rusqlite::types::FromSql>(
    conn: &Connection,
    key: &'static str,
) -> Result<Option<T>, StoreError> {
    conn.prepare_cached("SELECT value FROM meta WHERE key = ?1")
        .and_then(|mut statement| statement.query_row([key], |row| row.get(0)).optional())
        .doing("read the database's settings")
}

pub(super) fn set_meta(
    conn: &Connection,
    key: &'static str,
    value: impl rusqlite::ToSql,
) -> Result<(), StoreError> {
    conn.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")
        .and_then(|mut statement| statement.execute((key, value)))
        .map(drop)
        .doing("write the database's settings")
}

/// Whether `version` is `least` or newer; false when either can't be understood.
fn at_least(version: &str, least: &str) -> bool {
    match (numbers(version), numbers(least)) {
        (Some(version), Some(least)) => version >= least,
        _ => false,
    }
}

/// `1.2.3` or `1.2.3-rc.1` as numbers; pre-releases count as the release.
fn numbers(version: &str) -> Option<[u32; 3]> {
    let core = version.split(['-', '+']).next()?;
    let mut parts = core.split('.').map(|part| part.parse().ok());
    let numbers = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(at_least("0.10.0", "0.9.1"));
        assert!(at_least("0.1.0", "0.1.0"));
        assert!(at_least("1.0.0-rc.1", "1.0.0"));
        assert!(!at_least("0.1.0", "0.2.0"));
        assert!(!at_least("0.1.0", ""));
        assert!(!at_least("0.1.0", "tomorrow"));
    }

    #[test]
    fn migrations_are_numbered_without_gaps() {
        for (index, migration) in MIGRATIONS.iter().enumerate() {
            assert_eq!(migration.number, index as i64 + 1);
        }
    }
}
