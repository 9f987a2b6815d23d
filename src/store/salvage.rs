//! A damaged database: what can be read of it goes into a new one, the rest is set aside, and the
//! node runs.
//!
//! The new one is made beside the old one under another name and takes its place only when it is
//! complete, so that a kill between leaves either one or the other. Rows are read in order of
//! their keys; where a page can't be read, reading goes on behind it.

use super::Salvaged;
use super::ballast::Ballast;
use super::error::{Doing, StoreError};
use crate::model::{EventId, FunctionName};
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};
use std::fs;
use std::path::{Path, PathBuf};

/// Rows in one transaction of the new database.
const ROWS_PER_COMMIT: u64 = 1_000;

/// A page that can't be read ends a stretch; more of them than this, and the rest is given up.
const GAPS_MAX: u64 = 10_000;

/// With a number as key. What others refer to comes first.
const NUMBERED: [&str; 8] = [
    "functions",
    "events",
    "invocations",
    "dead_invocations",
    "retained",
    "deliveries",
    "dead_deliveries",
    "seen",
];

/// Ends the name of the file that says so.
const SUSPECTED: &str = ".suspected";

const DOING: &str = "salvage the database";

/// Small ones: read forwards, then backwards from the end.
const KEYED: [&str; 6] = ["meta", "revisions", "revision_notes", "ticks", "usage", "copies"];

/// Tables that an older neap did not have yet.
const LATER: [&str; 2] = ["revision_notes", "copies"];

/// In `meta`, what a new database says of itself.
const OWN_META: &str = "('schema', 'written_by', 'readable_by', 'clean')";

/// What must agree, and does not where a page is lost: row by row, in this order.
const TIDY: [&str; 6] = [
    "DELETE FROM functions WHERE removed IS NULL AND NOT EXISTS
         (SELECT 1 FROM revisions r WHERE r.function = functions.id AND r.number = functions.revision)",
    // Their numbers would be those of the next function that gets the lost one's id.
    "DELETE FROM revisions WHERE NOT EXISTS (SELECT 1 FROM functions f WHERE f.id = revisions.function)",
    "DELETE FROM invocations WHERE NOT EXISTS (SELECT 1 FROM events WHERE seq = invocations.id / 4096)
         OR NOT EXISTS (SELECT 1 FROM functions f WHERE f.id = invocations.function)",
    "DELETE FROM dead_invocations WHERE NOT EXISTS (SELECT 1 FROM events WHERE seq = dead_invocations.id / 4096)
         OR NOT EXISTS (SELECT 1 FROM functions f WHERE f.id = dead_invocations.function)",
    // Both in line and dead: it was on its way.
    "DELETE FROM invocations WHERE id IN (SELECT id FROM dead_invocations)",
    "DELETE FROM events WHERE NOT EXISTS
             (SELECT 1 FROM invocations i WHERE i.id BETWEEN events.seq * 4096 AND events.seq * 4096 + 4095)
         AND NOT EXISTS
             (SELECT 1 FROM dead_invocations d WHERE d.id BETWEEN events.seq * 4096 AND events.seq * 4096 + 4095)",
];

fn beside(database: &Path, end: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// Damage was met, which the next start must look for, whatever else happens until then.
pub(super) fn suspect(database: &Path) {
    let marked = fs::File::create(beside(database, SUSPECTED)).and_then(|mark| mark.sync_all());
    if let Err(error) = marked {
        tracing::warn!(%error, "the next start checks less of the database");
    }
}

pub(super) fn is_suspected(database: &Path) -> bool {
    beside(database, SUSPECTED).exists()
}

pub(super) fn unsuspect(database: &Path) {
    let _ = fs::remove_file(beside(database, SUSPECTED));
}

/// Finishes what a kill interrupted: the new database was complete, and the old one was gone.
pub(super) fn finish(database: &Path) -> Result<(), StoreError> {
    let complete = beside(database, ".salvaged");
    if complete.exists() {
        if database.exists() {
            set_aside(database)?;
        }
        fs::rename(&complete, database).doing("put the salvaged database in place")?;
    }
    Ok(())
}

/// Replaces a damaged database. Where even that fails an empty one will take its place.
pub(super) fn replace(
    database: &Path,
    make: impl Fn(&Path) -> Result<(), StoreError>,
) -> Result<Salvaged, StoreError> {
    let new = beside(database, ".salvaging");
    let attempt = || {
        for end in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(beside(&new, end)); // of an attempt that was killed
        }
        make(&new).and_then(|()| copy(database, &new))
    };
    let salvaged = match attempt() {
        Err(error) if error.may_be_full_disk() && make_room(database) => attempt(),
        done => done,
    };
    let mut salvaged = match salvaged {
        Ok(salvaged) => {
            fs::rename(&new, beside(database, ".salvaged")).doing("keep the salvaged database")?;
            salvaged
        }
        Err(error) => {
            tracing::error!(error = crate::errors::chain(&error), "nothing could be salvaged");
            let _ = fs::remove_file(&new);
            Salvaged::default()
        }
    };
    salvaged.set_aside = set_aside(database)?;
    finish(database)?;
    Ok(salvaged)
}

/// What waits in this one is worth more than what could not be read of the last one.
fn make_room(database: &Path) -> bool {
    let older = beside(database, ".damaged");
    let _ = fs::remove_file(beside(&older, "-wal"));
    let dropped = fs::remove_file(older).is_ok();
    Ballast::remove(database) || dropped
}

/// The one that was set aside before gives way: a second copy may be more than the disk has.
fn set_aside(database: &Path) -> Result<PathBuf, StoreError> {
    let doing = "set the damaged database aside";
    let to = beside(database, ".damaged");
    let _ = fs::remove_file(beside(&to, "-wal"));
    fs::rename(database, &to).doing(doing)?;
    if beside(database, "-wal").exists() {
        fs::rename(beside(database, "-wal"), beside(&to, "-wal")).doing(doing)?;
    }
    let _ = fs::remove_file(beside(database, "-shm")); // made anew by whoever opens it
    Ok(to)
}

fn copy(from: &Path, to: &Path) -> Result<Salvaged, StoreError> {
    let doing = DOING;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let old = Connection::open_with_flags(from, flags).doing(doing)?;
    old.pragma_update(None, "query_only", "ON").doing(doing)?;
    let new = Connection::open_with_flags(to, flags).doing(doing)?;
    new.pragma_update(None, "synchronous", "OFF").doing(doing)?; // synced once, when complete
    let mut salvaged = Salvaged::default();
    for table in KEYED {
        if LATER.contains(&table) && !has(&old, table) {
            continue;
        }
        let mut copier = Copier::new(&old, &new, table, &mut salvaged)?;
        copier.keyed()?;
        copier.finish()?;
    }
    for table in NUMBERED {
        let mut copier = Copier::new(&old, &new, table, &mut salvaged)?;
        copier.numbered()?;
        copier.finish()?;
    }
    new.execute_batch("BEGIN").doing(doing)?;
    for sql in TIDY {
        salvaged.lost += new.execute(sql, []).doing(doing)? as u64;
    }
    new.execute_batch("COMMIT").doing(doing)?;
    let count = |sql: &str| new.query_row(sql, [], |row| row.get::<_, i64>(0)).doing(doing);
    salvaged.functions = count("SELECT count(*) FROM functions WHERE removed IS NULL")? as u64;
    salvaged.invocations =
        count("SELECT (SELECT count(*) FROM invocations) + (SELECT count(*) FROM dead_invocations)")? as u64;
    salvaged.deliveries =
        count("SELECT (SELECT count(*) FROM deliveries) + (SELECT count(*) FROM dead_deliveries)")? as u64;
    new.pragma_update(None, "synchronous", "FULL").doing(doing)?;
    new.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).doing(doing)?;
    new.close().map_err(|(_, error)| error).doing(doing)?;
    fs::File::open(to).and_then(|file| file.sync_all()).doing(doing)?;
    Ok(salvaged)
}

/// Not told from a definition that can't be read: either way there is nothing to copy.
fn has(database: &Connection, table: &str) -> bool {
    let sql = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?1";
    database.query_row(sql, [table], |_| Ok(())).is_ok()
}

struct Copier<'a> {
    old: &'a Connection,
    new: &'a Connection,
    table: &'static str,
    columns: Vec<String>,
    salvaged: &'a mut Salvaged,
    rows: u64,
}

impl<'a> Copier<'a> {
    fn new(
        old: &'a Connection,
        new: &'a Connection,
        table: &'static str,
        salvaged: &'a mut Salvaged,
    ) -> Result<Self, StoreError> {
        // Those of the new one, should the old one have more.
        let columns = new
            .prepare(&format!("SELECT name FROM pragma_table_info('{table}') ORDER BY cid"))
            .and_then(|mut statement| statement.query_map([], |row| row.get(0))?.collect())
            .doing(DOING)?;
        new.execute_batch("BEGIN").doing(DOING)?;
        Ok(Self { old, new, table, columns, salvaged, rows: 0 })
    }

    fn finish(self) -> Result<(), StoreError> {
        self.new.execute_batch("COMMIT").doing(DOING)
    }

    fn select(&self, rest: &str) -> String {
        format!("SELECT {} FROM {}{rest}", self.columns.join(", "), self.table)
    }

    /// Forwards, and if that does not reach the end, backwards too.
    fn keyed(&mut self) -> Result<(), StoreError> {
        let own = if self.table == "meta" { format!(" WHERE key NOT IN {OWN_META}") } else { String::new() };
        for order in ["", " ORDER BY 1 DESC"] {
            let sql = self.select(&format!("{own}{order}"));
            if self.read(&sql, None)?.0 {
                return Ok(());
            }
            self.salvaged.gaps += 1;
        }
        Ok(())
    }

    /// In order of their numbers; behind a page that can't be read it goes on.
    fn numbered(&mut self) -> Result<(), StoreError> {
        let sql = self.select(" NOT INDEXED WHERE rowid > ?1 ORDER BY rowid");
        let mut last = -1;
        for _ in 0..GAPS_MAX {
            let (whole, reached) = self.read(&sql, Some(last))?;
            if whole {
                return Ok(());
            }
            self.salvaged.gaps += 1;
            match self.behind(reached.max(last)) {
                Some(next) => last = next,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Copies what a query gives: whether to its end, and the last number.
    fn read(&mut self, sql: &str, after: Option<i64>) -> Result<(bool, i64), StoreError> {
        let mut last = after.unwrap_or(-1);
        let Ok(mut statement) = self.old.prepare(sql) else { return Ok((false, last)) };
        let rows = match after {
            Some(after) => statement.query([after]),
            None => statement.query([]),
        };
        let Ok(mut rows) = rows else { return Ok((false, last)) };
        let verb = if after.is_some() { "IGNORE" } else { "REPLACE" };
        let marks = vec!["?"; self.columns.len()].join(", ");
        let insert =
            format!("INSERT OR {verb} INTO {} ({}) VALUES ({marks})", self.table, self.columns.join(", "));
        let mut insert = self.new.prepare(&insert).doing(DOING)?;
        loop {
            let row = match rows.next() {
                Ok(Some(row)) => row,
                Ok(None) => return Ok((true, last)),
                Err(_) => return Ok((false, last)),
            };
            if after.is_some() {
                match row.get::<_, i64>(0) {
                    Ok(number) if number > last => last = number,
                    _ => return Ok((false, last)), // pages that lead in a circle
                }
            }
            let values: Result<Vec<Value>, _> = (0..self.columns.len()).map(|at| row.get(at)).collect();
            let stored = match values.ok().filter(|values| self.is_ours(values)) {
                Some(values) => match insert.execute(rusqlite::params_from_iter(values)) {
                    Ok(changed) => changed > 0,
                    Err(error) if error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation) => false,
                    Err(error) => return Err(error).doing(DOING),
                },
                None => false,
            };
            self.salvaged.lost += u64::from(!stored);
            self.rows += 1;
            if self.rows.is_multiple_of(ROWS_PER_COMMIT) {
                self.new.execute_batch("COMMIT; BEGIN").doing(DOING)?;
            }
        }
    }

    /// Whether neap could have written these: one that can't be read would stop all behind it.
    fn is_ours(&self, values: &[Value]) -> bool {
        self.columns.iter().zip(values).all(|(column, value)| match (column.as_str(), value) {
            ("event_id", Value::Text(id)) => EventId::parse(id).is_some(),
            ("function" | "name", Value::Text(name)) => FunctionName::parse(name).is_ok(),
            ("extras", Value::Text(text)) => serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok(),
            _ => true,
        })
    }

    /// A number behind which something can be read again.
    fn behind(&mut self, last: i64) -> Option<i64> {
        // Only the row itself can't be read.
        if let Ok(Some(bad)) = self.first_behind(last) {
            self.salvaged.lost += 1;
            return Some(bad);
        }
        let (mut bad, mut step) = (last, 1_i64);
        let mut good = loop {
            let at = last.checked_add(step)?;
            match self.first_behind(at) {
                Ok(_) => break at,
                Err(_) => bad = at,
            }
            step = step.checked_mul(2)?;
        };
        while good - bad > 1 {
            let middle = bad + (good - bad) / 2;
            match self.first_behind(middle) {
                Ok(_) => good = middle,
                Err(_) => bad = middle,
            }
        }
        Some(good)
    }

    fn first_behind(&self, number: i64) -> rusqlite::Result<Option<i64>> {
        let sql =
            format!("SELECT rowid FROM {} NOT INDEXED WHERE rowid > ?1 ORDER BY rowid LIMIT 1", self.table);
        self.old.prepare_cached(&sql)?.query_row([number], |row| row.get(0)).optional()
    }
}
