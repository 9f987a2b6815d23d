//! A function's past: the revision before, whether the current one has proven itself, and why
//! one was rolled back. What a rollback needs is all here: it works without a network.

use super::db::Db;
use super::error::StoreError;
use super::{Store, StoredFunction, StoredRevision, functions};
use crate::model::{FunctionName, UnixMs};

/// A reason is a failure's text; a function can't write a book into the database.
const REASON_BYTES_MAX: usize = 1024;

/// What is known besides the current revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The one before, if there is one.
    pub previous: Option<StoredRevision>,
    /// The current one has succeeded.
    pub proven: bool,
    /// The current one took this newer one's place, and why.
    pub rolled_back: Option<(u32, String)>,
}

impl Store {
    pub async fn history(&self, name: FunctionName) -> Result<History, StoreError> {
        self.read(move |db| history(db, &name)).await
    }

    /// Image digests of every revision that is stored: current ones, and those to go back to.
    pub async fn images_pinned(&self) -> Result<Vec<String>, StoreError> {
        self.read(|db| {
            let sql = "SELECT DISTINCT r.image FROM revisions r JOIN functions f ON f.id = r.function
                       WHERE f.removed IS NULL";
            db.query(sql, [], "list pinned images", |row| row.get(0))
        })
        .await
    }

    /// The revision before once more, as a new one; `NotFound`: there is none.
    pub async fn roll_back(&self, name: FunctionName, reason: String) -> Result<StoredFunction, StoreError> {
        self.write(move |db| roll_back(db, &name, &reason)).await
    }

    pub async fn mark_proven(&self, name: FunctionName, number: u32) -> Result<(), StoreError> {
        self.write(move |db| {
            db.execute(
                "INSERT INTO revision_notes (function, number, proven) VALUES (?1, ?2, 1)
                 ON CONFLICT (function, number) DO UPDATE SET proven = 1",
                (name.as_str(), number),
                "note that a revision works",
            )?;
            forget_old(db, &name)
        })
        .await
    }
}

fn history(db: &Db, name: &FunctionName) -> Result<History, StoreError> {
    let doing = "read a function's history";
    let Some(id) = functions::deployed(db, name)? else { return Ok(History::default()) };
    let previous = db.query_opt(
        "SELECT r.number, r.manifest, r.image, r.created_ms FROM revisions r JOIN functions f ON f.id = r.function
         WHERE f.id = ?1 AND r.number < f.revision ORDER BY r.number DESC LIMIT 1",
        [id],
        doing,
        |row| {
            Ok(StoredRevision {
                number: row.get(0)?,
                manifest: row.get(1)?,
                image: row.get(2)?,
                created: UnixMs(row.get(3)?),
            })
        },
    )?;
    let note: Option<(bool, Option<u32>, Option<String>)> = db.query_opt(
        "SELECT n.proven, n.instead_of, n.reason FROM revision_notes n
         JOIN functions f ON f.name = n.function AND f.revision = n.number WHERE f.id = ?1",
        [id],
        doing,
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
    )?;
    let (proven, instead_of, reason) = note.unwrap_or_default();
    Ok(History { previous, proven, rolled_back: instead_of.zip(reason) })
}

fn roll_back(db: &mut Db, name: &FunctionName, reason: &str) -> Result<StoredFunction, StoreError> {
    let id = functions::deployed(db, name)?.ok_or(StoreError::NotFound)?;
    let current = functions::get(db, id)?;
    let previous = history(db, name)?.previous.ok_or(StoreError::NotFound)?;
    let file = current.file.as_deref();
    let stored = functions::deploy(db, name, &previous.manifest, &previous.image, file)?;
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    db.execute(
        "INSERT OR REPLACE INTO revision_notes (function, number, proven, instead_of, reason)
         VALUES (?1, ?2, 1, ?3, ?4)",
        (name.as_str(), stored.revision.number, current.revision.number, &reason[..end]),
        "note why a revision was rolled back",
    )?;
    forget_old(db, name)?;
    Ok(stored)
}

/// Of revisions that are gone, and of functions that nothing remembers.
fn forget_old(db: &mut Db, name: &FunctionName) -> Result<(), StoreError> {
    db.execute(
        "DELETE FROM revision_notes WHERE function NOT IN (SELECT name FROM functions)
             OR function = ?1 AND number < (SELECT revision - 1 FROM functions WHERE name = ?1)",
        [name.as_str()],
        "forget old revisions",
    )
    .map(drop)
}
