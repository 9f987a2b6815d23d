//! A connection to the database's file and how it is set up.

use super::error::{Doing, StoreError};
use rusqlite::{Connection, OpenFlags};
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Half a block of most disks. A transaction writes whole pages, most of them for a few small
/// rows: from accept to delete an event of 256 bytes costs 2.7 KB of writing with these, 3.9 KB
/// with 4 KiB. Alone, one of 1 KiB is cheaper too; only large groups of those cost a third more.
pub(super) const PAGE_BYTES: u64 = 2048;

/// The WAL is emptied into the database when it has grown to this: 1 MiB.
const CHECKPOINT_PAGES: u64 = 512;

/// How long another process (`sqlite3` in an operator's hand) may hold the lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the connection is to, to open it anew.
#[derive(Clone, Debug)]
pub(super) struct OpenFile {
    pub path: PathBuf,
    /// On files that only SQLite knows.
    pub vfs: Option<String>,
}

impl OpenFile {
    pub fn connect(&self) -> Result<Connection, StoreError> {
        let doing = "open the database";
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let conn = match &self.vfs {
            Some(vfs) => {
                let flags = flags | OpenFlags::SQLITE_OPEN_CREATE;
                Connection::open_with_flags_and_vfs(&self.path, flags, vfs.as_str())
            }
            None => Connection::open_with_flags(&self.path, flags),
        };
        let conn = conn.doing(doing)?;
        conn.busy_timeout(BUSY_TIMEOUT).doing(doing)?;
        conn.set_prepared_statement_cache_capacity(96); // all there are: none is ever parsed twice
        // Ahead of the time when there may be no memory for it.
        conn.prepare_cached("ROLLBACK").map(drop).doing(doing)?;
        Ok(conn)
    }
}

/// Events may be confidential; SQLite gives the WAL the mode of the database.
pub(super) fn create(path: &Path) -> Result<(), StoreError> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map(drop).doing("create the database")
}

/// Looks at all of it, for as long as it takes to read: only after a stop that was not clean.
/// `suspected`: SQLite has met damage while it ran, and that the indexes say what the tables say is
/// looked at too, which takes a few times as long.
pub(super) fn check(conn: &Connection, suspected: bool) -> Result<(), StoreError> {
    let sql = if suspected { "PRAGMA integrity_check(1)" } else { "PRAGMA quick_check(1)" };
    let found: String = conn.query_row(sql, [], |row| row.get(0)).doing("check the database")?;
    if found == "ok" { Ok(()) } else { Err(StoreError::Damaged(found)) }
}

pub(super) fn set_pragmas(conn: &Connection, pages_max: u64) -> rusqlite::Result<()> {
    let set = |name: &str, value: &dyn rusqlite::ToSql| conn.pragma_update(None, name, value);
    set("page_size", &(PAGE_BYTES as i64))?;
    set("auto_vacuum", &"INCREMENTAL")?; // only works before the first table
    // Becoming a WAL database is the one transaction with a rollback journal. Were its deleted name
    // back after a power cut, it would be played into a database that has moved on: EXTRA syncs
    // the folder.
    set("synchronous", &"EXTRA")?;
    set("journal_mode", &"WAL")?;
    set("synchronous", &"FULL")?; // NORMAL loses the last commits in a power cut
    set("wal_autocheckpoint", &(CHECKPOINT_PAGES as i64))?;
    set("journal_size_limit", &((CHECKPOINT_PAGES * PAGE_BYTES) as i64))?;
    set("cache_size", &-512)?; // KiB
    set("mmap_size", &0)?;
    set("temp_store", &"MEMORY")?;
    set("trusted_schema", &"OFF")?;
    set("cell_size_check", &"ON")?;
    set("foreign_keys", &"OFF")?; // the bundled build turns them on; the schema has none
    set("max_page_count", &(pages_max.min(u32::MAX.into()) as i64))
}
