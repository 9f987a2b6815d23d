//! What is deployed: functions, their current and previous revision, and what must be
//! remembered of a function after it is gone: its last revision's number (never reused) and
//! its id range (files of a volume stay its own). Such rows give way, longest removed first,
//! when all id ranges are taken.

use super::counters::Of;
use super::db::Db;
use super::error::StoreError;
use super::event_row::broken;
use super::{StoredFunction, StoredRevision, dead, retained, schema, ticks};
use crate::model::function::{FUNCTIONS_MAX, UID_BASE_FIRST, UID_RANGE};
use crate::model::{FunctionName, UnixMs};
use rusqlite::Row;
use rusqlite::types::Type;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The id of a deployed function.
pub(super) fn deployed(db: &Db, name: &FunctionName) -> Result<Option<i64>, StoreError> {
    db.query_opt(
        "SELECT id FROM functions WHERE name = ?1 AND removed IS NULL",
        [name.as_str()],
        "look a function up",
        |row| row.get(0),
    )
}

/// The name of a function that is deployed.
pub(super) fn name(db: &Db, id: i64) -> Result<Option<FunctionName>, StoreError> {
    db.query_opt(
        "SELECT name FROM functions WHERE id = ?1 AND removed IS NULL",
        [id],
        "look a function up",
        |row| read_name(row, 0),
    )
}

pub(super) fn read_name(row: &Row<'_>, column: usize) -> rusqlite::Result<FunctionName> {
    let name: String = row.get(column)?;
    FunctionName::parse(&name).map_err(|error| broken(column, Type::Text, error))
}

pub(super) fn list(db: &mut Db) -> Result<Vec<StoredFunction>, StoreError> {
    db.query(
        "SELECT f.name, f.paused, f.file, f.uid_base, r.number, r.manifest, r.image, r.created_ms
         FROM functions f JOIN revisions r ON r.function = f.id AND r.number = f.revision
         WHERE f.removed IS NULL ORDER BY f.name",
        [],
        "list functions",
        read,
    )
}

pub(super) fn get(db: &Db, id: i64) -> Result<StoredFunction, StoreError> {
    db.query_opt(
        "SELECT f.name, f.paused, f.file, f.uid_base, r.number, r.manifest, r.image, r.created_ms
         FROM functions f JOIN revisions r ON r.function = f.id AND r.number = f.revision
         WHERE f.id = ?1 AND f.removed IS NULL",
        [id],
        "read a function",
        read,
    )?
    .ok_or(StoreError::NotFound)
}

fn read(row: &Row<'_>) -> rusqlite::Result<StoredFunction> {
    let file: Option<Vec<u8>> = row.get(2)?;
    Ok(StoredFunction {
        name: read_name(row, 0)?,
        paused: row.get(1)?,
        file: file.map(|path| PathBuf::from(OsString::from_vec(path))),
        uid_base: row.get(3)?,
        revision: StoredRevision {
            number: row.get(4)?,
            manifest: row.get(5)?,
            image: row.get(6)?,
            created: UnixMs(row.get(7)?),
        },
    })
}

pub(super) fn deploy(
    db: &mut Db,
    name: &FunctionName,
    manifest: &str,
    image: &str,
    file: Option<&Path>,
) -> Result<StoredFunction, StoreError> {
    let doing = "store a function";
    let file = file.map(|path| path.as_os_str().as_bytes());
    let id = match deployed(db, name)? {
        Some(id) => {
            db.execute("UPDATE functions SET file = ?2 WHERE id = ?1", (id, file), doing)?;
            let current = get(db, id)?;
            if current.revision.manifest == manifest && current.revision.image == image {
                return Ok(current);
            }
            db.execute("UPDATE functions SET revision = revision + 1 WHERE id = ?1", [id], doing)?;
            id
        }
        None => create(db, name, file)?,
    };
    db.execute(
        "INSERT INTO revisions (function, number, manifest, image, created_ms)
         SELECT id, revision, ?2, ?3, ?4 FROM functions WHERE id = ?1",
        (id, manifest, image, db.wall().0),
        doing,
    )?;
    // The previous one stays for a rollback.
    db.execute(
        "DELETE FROM revisions WHERE function = ?1
             AND number < (SELECT revision - 1 FROM functions WHERE id = ?1)",
        [id],
        doing,
    )?;
    get(db, id)
}

/// The number and id range that `deploy` would answer with, of a name that is known.
pub(super) fn next_revision(
    db: &mut Db,
    name: &FunctionName,
    manifest: &str,
    image: &str,
) -> Result<Option<(u32, u32)>, StoreError> {
    if let Some(id) = deployed(db, name)? {
        let current = get(db, id)?;
        let same = current.revision.manifest == manifest && current.revision.image == image;
        return Ok(Some((current.revision.number + u32::from(!same), current.uid_base)));
    }
    db.query_opt(
        "SELECT revision + 1, uid_base FROM functions WHERE name = ?1",
        [name.as_str()],
        "look a function up",
        |row| Ok((row.get(0)?, row.get(1)?)),
    )
}

/// Of a name that is not known: it is from now on, as one that was removed is. Others may be
/// deployed before it, and its id range stays its own.
pub(super) fn reserve(db: &mut Db, name: &FunctionName) -> Result<(u32, u32), StoreError> {
    let range = take_range(db)?;
    db.execute(
        "INSERT INTO functions (name, uid_base, revision, removed)
         VALUES (?1, ?2, ?3, (SELECT coalesce(max(removed), 0) + 1 FROM functions))",
        (name.as_str(), range.uid_base, range.revision),
        "keep an id range for a function",
    )?;
    Ok((range.revision + 1, range.uid_base))
}

/// A new row, with the number and id range of a removed function of this name.
fn create(db: &mut Db, name: &FunctionName, file: Option<&[u8]>) -> Result<i64, StoreError> {
    let doing = "store a function";
    let known: Option<(u32, u32)> = db.query_opt(
        "DELETE FROM functions WHERE name = ?1 RETURNING revision, uid_base",
        [name.as_str()],
        doing,
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let (revision, uid_base) = match known {
        Some(known) => known,
        None => {
            let range = take_range(db)?;
            (range.revision, range.uid_base)
        }
    };
    db.execute(
        "INSERT INTO functions (name, uid_base, revision, file) VALUES (?1, ?2, ?3, ?4)",
        (name.as_str(), uid_base, revision + 1, file),
        doing,
    )?;
    Ok(db.last_id())
}

/// Where a function that is not known starts.
struct Range {
    uid_base: u32,
    /// Above every number whose row had to give way: none is ever used twice.
    revision: u32,
    /// The removed function whose range this is, when all are taken.
    given_way: Option<i64>,
}

/// One that no row has any more.
fn take_range(db: &mut Db) -> Result<Range, StoreError> {
    let range = free_range(db)?;
    if let Some(id) = range.given_way {
        db.execute("DELETE FROM functions WHERE id = ?1", [id], "take an id range")?;
        schema::set_meta(db.connection(), "revisions", range.revision)?;
    }
    Ok(range)
}

/// The lowest range that no function has, or the one of the function removed longest ago.
fn free_range(db: &Db) -> Result<Range, StoreError> {
    let doing = "find an id range";
    let revision = schema::meta(db.connection(), "revisions")?.unwrap_or(0);
    let taken: Vec<u32> =
        db.query("SELECT uid_base FROM functions ORDER BY uid_base", [], doing, |row| row.get(0))?;
    let mut bases = (0..FUNCTIONS_MAX).map(|n| UID_BASE_FIRST + n * UID_RANGE);
    if let Some(uid_base) = bases.find(|base| taken.binary_search(base).is_err()) {
        return Ok(Range { uid_base, revision, given_way: None });
    }
    db.query_opt(
        "SELECT id, uid_base, revision FROM functions WHERE removed IS NOT NULL ORDER BY removed LIMIT 1",
        [],
        doing,
        |row| {
            let revision = revision.max(row.get(2)?);
            Ok(Range { given_way: Some(row.get(0)?), uid_base: row.get(1)?, revision })
        },
    )?
    .ok_or(StoreError::TooManyFunctions(FUNCTIONS_MAX))
}

pub(super) fn set_paused(db: &mut Db, name: &FunctionName, paused: bool) -> Result<(), StoreError> {
    let changed = db.execute(
        "UPDATE functions SET paused = ?2 WHERE name = ?1 AND removed IS NULL",
        (name.as_str(), paused),
        "pause a function",
    )?;
    if changed == 0 { Err(StoreError::NotFound) } else { Ok(()) }
}

/// The living invocations are out of sight at once and swept later, some at a time: deleting a
/// million rows in one transaction would stop everything else for seconds.
pub(super) fn remove(db: &mut Db, name: &FunctionName) -> Result<u64, StoreError> {
    let doing = "remove a function";
    let id = deployed(db, name)?.ok_or(StoreError::NotFound)?;
    let mut gone = dead::remove_all(db, id)?;
    retained::forget(db, id)?;
    ticks::keep(db, id, &[])?;
    db.execute("DELETE FROM revisions WHERE function = ?1", [id], doing)?;
    db.execute(
        "UPDATE functions SET paused = 0, file = NULL,
             removed = (SELECT coalesce(max(removed), 0) + 1 FROM functions)
         WHERE id = ?1",
        [id],
        doing,
    )?;
    for of in [Of::Ready, Of::Running, Of::Waiting] {
        let count = db.counters.of(id, of);
        db.counters.add(id, of, -count);
        gone += count as u64;
    }
    db.sweep.push(id);
    Ok(gone)
}
