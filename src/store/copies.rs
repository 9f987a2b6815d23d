//! Copies of jobs that ended while their job goes on: after a kill they need not run again. They
//! go with their invocation.

use super::db::Db;
use super::error::StoreError;
use super::{LISTING_MAX, Store};
use crate::model::{CopyProgress, Failure, InvocationId};

const SUCCEEDED: &str = "succeeded";

impl Store {
    /// Remembers how far a copy has come. `NotFound`: its invocation is not leased (any more).
    pub async fn copy_ended(
        &self,
        id: InvocationId,
        revision: u32,
        copy: CopyProgress,
    ) -> Result<(), StoreError> {
        let ended = match &copy.ended {
            None => None,
            Some(Ok(())) => Some(SUCCEEDED.to_owned()),
            Some(Err(failure)) => {
                Some(serde_json::to_string(failure).expect("strings and numbers always serialise"))
            }
        };
        self.write(move |db| set(db, id.0, revision, &copy, ended.as_deref())).await
    }

    /// What is remembered of an invocation's copies, of this revision. One that can't be read is
    /// left out: it runs again.
    pub async fn copies(&self, id: InvocationId, revision: u32) -> Result<Vec<CopyProgress>, StoreError> {
        self.read(move |db| get(db, id.0, revision)).await
    }
}

fn set(
    db: &mut Db,
    id: i64,
    revision: u32,
    copy: &CopyProgress,
    ended: Option<&str>,
) -> Result<(), StoreError> {
    let stored = db.execute(
        "INSERT OR REPLACE INTO copies (invocation, copy, revision, attempts, ended)
         SELECT id, ?2, ?3, ?4, ?5 FROM invocations WHERE id = ?1 AND place IS NULL",
        (id, copy.index, revision, copy.attempts, ended),
        "remember how a copy ended",
    )?;
    if stored == 0 { Err(StoreError::NotFound) } else { Ok(()) }
}

fn get(db: &Db, id: i64, revision: u32) -> Result<Vec<CopyProgress>, StoreError> {
    let rows = db.query(
        "SELECT copy, attempts, ended FROM copies WHERE invocation = ?1 AND revision = ?2 ORDER BY copy LIMIT ?3",
        (id, revision, LISTING_MAX),
        "read how copies ended",
        |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, Option<String>>(2)?)),
    )?;
    let progress = |(index, attempts, ended): (u32, u32, Option<String>)| {
        let ended = match ended.as_deref() {
            None => None,
            Some(SUCCEEDED) => Some(Ok(())),
            Some(failure) => Some(Err(serde_json::from_str::<Failure>(failure).ok()?)),
        };
        Some(CopyProgress { index, attempts, ended })
    };
    Ok(rows.into_iter().filter_map(progress).collect())
}

/// With its invocation.
pub(super) fn forget(db: &Db, id: i64) -> Result<(), StoreError> {
    db.execute("DELETE FROM copies WHERE invocation = ?1", [id], "forget a job's copies").map(drop)
}

/// Those that an older neap left when it removed their invocation.
pub(super) fn forget_orphans(db: &Db) -> Result<(), StoreError> {
    let orphans = "DELETE FROM copies WHERE NOT EXISTS
                       (SELECT 1 FROM invocations WHERE id = copies.invocation)";
    db.execute(orphans, [], "forget jobs' copies").map(drop)
}
