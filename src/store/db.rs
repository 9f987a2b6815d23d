//! The database as the writer thread owns it: statements, transactions, node time; its room and its
//! numbers stand beside it.
//!
//! **Node time** is the daemon's accumulated uptime: within a run it follows the monotonic clock
//! alone, so that a step of the wall clock changes no age and no delay. At an opening it goes on
//! from the last moment known of the run before, and what the wall clock says has passed since is
//! added, if both readings are plausible: an event ages while the node is off.

mod numbers;
mod room;

pub(super) use numbers::Id;
pub(super) use room::Room;

use super::ballast::Ballast;
use super::connection::{OpenFile, PAGE_BYTES, check, create, set_pragmas};
use super::counters::{Counters, Of, Total};
use super::error::{Doing, StoreError};
use super::full::Lack;
use super::schema;
use super::seen::Seen;
use super::{Options, Recovered, inbox, salvage, seen};
use crate::model::{Clock, DeliveryId, UnixMs};
use numbers::Numbers;
use room::{Limits, RESERVE_BYTES_MAX, RESERVE_BYTES_MIN, SLACK_PAGES};
use rusqlite::{CachedStatement, Connection, ErrorCode, Params};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Node time is saved at least this often while anything is written: what a kill can take
/// back from it. Each saving costs a page.
const SAVE_TIME_EVERY_MS: i64 = 10_000;

/// A wall clock before this is a gateway's without a battery that NTP has not reached yet:
/// 2026-01-01, before neap was built.
const WALL_PLAUSIBLE_FROM: UnixMs = UnixMs(1_767_225_600_000);

/// What SQLite has met while it ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Damage {
    None,
    /// That neap never wrote.
    Value,
    /// The database must be salvaged, and only a start can do that.
    Page,
}

/// What is held in memory at a savepoint, to come back to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    counters: usize,
    seen: usize,
}

pub(super) struct Db {
    conn: Connection,
    clock: Arc<dyn Clock>,
    pub counters: Counters,
    pub seen: Seen,
    numbers: [Numbers; 2],
    pub limits: Limits,
    reserve: u64,
    pages_max: u64,
    /// Node time minus the monotonic clock.
    node_offset_ms: i64,
    /// The latest wall time of earlier runs.
    latest: UnixMs,
    node_saved_ms: i64,
    /// Node time goes into this transaction: a delay was written that counts on it.
    pub save_time: bool,
    /// Functions that are gone while their invocations are still in the table.
    pub sweep: Vec<i64>,
    pub ballast: Ballast,
    /// The ballast was given up just now: what failed may go well at once.
    pub made_room: bool,
    /// Why the last event found no room, until one does.
    pub full: Option<Lack>,
    /// How often one found none since the start.
    pub refused: u64,
    pub age_looked_ms: i64,
    /// Deliveries that can't be read, and stand before others: housekeeping takes them away.
    pub unreadable: Vec<DeliveryId>,
    /// What SQLite has met of damage: the next start looks for more.
    damage: Damage,
    /// SQLite ran out of memory, so that what it holds there may be wrong: nothing is committed
    /// before a rollback has put that right, or a new connection.
    spoilt: bool,
    /// A new connection was wanted and could not be had: this one is empty, or not counted.
    lost: bool,
    file: OpenFile,
}

impl Db {
    pub fn open(options: &Options) -> Result<(Self, Recovered), StoreError> {
        salvage::finish(&options.path)?;
        let suspected = salvage::is_suspected(&options.path);
        let opened = match Self::open_once(options, None) {
            // Recovering writes too.
            Err(error) if error.may_be_full_disk() && Ballast::remove(&options.path) => {
                Self::open_once(options, None)
            }
            done => done,
        };
        let opened = match opened {
            Err(error) if error.is_damage() => {
                tracing::error!(error = crate::errors::chain(&error), "salvaging the database");
                let make = |path: &Path| {
                    let options = Options { path: path.to_owned(), ..options.clone() };
                    Self::open_once(&options, None)?.0.close()
                };
                let salvaged = salvage::replace(&options.path, make)?;
                let (db, recovered) = Self::open_once(options, None)?;
                (db, Recovered { clean: false, salvaged: Some(salvaged), ..recovered })
            }
            done => done?,
        };
        salvage::unsuspect(&options.path);
        Ok((opened.0, Recovered { suspected, ..opened.1 }))
    }

    /// On a disk of a test's own.
    #[cfg(test)]
    pub fn open_in_vfs(options: &Options, vfs: &str) -> Result<(Self, Recovered), StoreError> {
        Self::open_once(options, Some(vfs))
    }

    /// `vfs`: on files that only SQLite knows.
    fn open_once(options: &Options, vfs: Option<&str>) -> Result<(Self, Recovered), StoreError> {
        if vfs.is_none() {
            create(&options.path)?;
        }
        let file = OpenFile { path: options.path.clone(), vfs: vfs.map(str::to_owned) };
        let mut conn = file.connect()?;
        let version = schema::check(&conn)?;
        let suspected = vfs.is_none() && salvage::is_suspected(&options.path);
        if version.is_some() && (suspected || schema::meta(&conn, "clean")?.unwrap_or(0) != 1) {
            check(&conn, suspected)?;
        }
        let bytes_max = options.buffer.bytes_max;
        let reserve = (bytes_max / 8).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX);
        let pages_max = (bytes_max + reserve) / PAGE_BYTES + SLACK_PAGES;
        set_pragmas(&conn, pages_max).doing("set up the database")?;
        schema::migrate(&mut conn, version)?;
        let folder = options.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if let (Some(folder), None) = (folder, vfs) {
            fs::File::open(folder).and_then(|folder| folder.sync_all()).doing("sync the data directory")?;
        }

        let mut db = Self {
            conn,
            clock: options.clock.clone(),
            counters: Counters::default(),
            seen: Seen::default(),
            numbers: Default::default(),
            limits: Limits::of(&options.buffer),
            reserve,
            pages_max,
            node_offset_ms: 0,
            latest: UnixMs(0),
            node_saved_ms: 0,
            save_time: false,
            sweep: Vec::new(),
            ballast: if vfs.is_some() { Ballast::none() } else { Ballast::take(&options.path) },
            unreadable: Vec::new(),
            damage: Damage::None,
            made_room: false,
            full: None,
            refused: 0,
            age_looked_ms: i64::MIN / 2,
            spoilt: false,
            lost: false,
            file,
        };
        db.begin(true)?;
        let recovered = db.recover()?;
        db.commit()?;
        Ok((db, recovered))
    }

    fn recover(&mut self) -> Result<Recovered, StoreError> {
        let clean = schema::meta(&self.conn, "clean")?.unwrap_or(0) == 1;
        schema::set_meta(&self.conn, "clean", 0)?;
        let saved: i64 = schema::meta(&self.conn, "node_ms")?.unwrap_or(0);
        let saved_wall = UnixMs(schema::meta(&self.conn, "wall_ms")?.unwrap_or(0));
        let last: Option<(i64, i64)> = self.query_opt(
            "SELECT arrived_node_ms, arrived_ms FROM events ORDER BY seq DESC LIMIT 1",
            [],
            "read the last event's time",
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
        self.latest = UnixMs(schema::meta(&self.conn, "latest_ms")?.unwrap_or(0)).max(saved_wall);
        let (node_ms, wall) = match last {
            Some((node_ms, wall_ms)) if node_ms > saved => (node_ms, UnixMs(wall_ms)),
            _ => (saved, saved_wall),
        };
        self.node_saved_ms = node_ms.saturating_add(downtime_ms(wall, self.wall()));
        self.node_offset_ms = self.node_saved_ms - self.monotonic_ms();
        self.save_time = true; // or the downtime would be counted again
        self.count()?;
        seen::load(self)?;
        self.find_numbers()?;
        let leases = inbox::recover(self, clean)?;
        Ok(Recovered { leases, clean, ..Recovered::default() })
    }

    /// Fills the counters from the tables.
    fn count(&mut self) -> Result<(), StoreError> {
        let doing = "count what is stored";
        let deployed: Vec<i64> =
            self.query("SELECT id FROM functions WHERE removed IS NULL", [], doing, |row| row.get(0))?;
        // The rows are walked once: what runs is in no index.
        let states: Vec<(i64, Option<i64>, i64)> = self.query(
            "SELECT function, iif(place < 16, 0, 16 + 0 * place) AS state, count(*) FROM invocations
             GROUP BY function, state",
            [],
            doing,
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )?;
        for (function, state, count) in states {
            if deployed.contains(&function) {
                self.counters.add(function, inbox::State::of(state).counter(), count);
            } else if !self.sweep.contains(&function) {
                self.sweep.push(function);
            }
        }
        for (sql, of) in [
            ("SELECT function, count(*) FROM dead_invocations GROUP BY function", Of::Dead),
            ("SELECT function, count(*) FROM retained GROUP BY function", Of::Retained),
        ] {
            let counts: Vec<(i64, i64)> = self.query(sql, [], doing, |row| Ok((row.get(0)?, row.get(1)?)))?;
            for (function, count) in counts {
                self.counters.add(function, of, count);
            }
        }
        for (sql, total) in [
            ("SELECT count(*) FROM dead_invocations", Total::Dead),
            ("SELECT coalesce(sum(bytes), 0) FROM dead_invocations", Total::DeadBytes),
            ("SELECT count(*) FROM deliveries WHERE id < 3 << 56", Total::OwedUplink),
            ("SELECT count(*) FROM deliveries WHERE id >= 3 << 56 AND id < 4 << 56", Total::OwedCallbacks),
            ("SELECT count(*) FROM deliveries WHERE id >= 4 << 56", Total::OwedLocal),
            (
                "SELECT coalesce(sum(length(data)), 0) FROM deliveries WHERE id >= 3 << 56 AND id < 4 << 56",
                Total::CallbackBytes,
            ),
            ("SELECT count(*) FROM dead_deliveries", Total::DeadDeliveries),
            ("SELECT count(*) FROM dead_deliveries WHERE id & 7 = 3", Total::DeadCallbacks),
            ("SELECT coalesce(sum(bytes), 0) FROM dead_deliveries", Total::DeadDeliveryBytes),
            ("SELECT coalesce((SELECT value FROM meta WHERE key = 'expired'), 0)", Total::Expired),
            ("SELECT coalesce((SELECT value FROM meta WHERE key = 'dead_dropped'), 0)", Total::Dropped),
            ("SELECT coalesce((SELECT value FROM meta WHERE key = 'dropped_full'), 0)", Total::DroppedFull),
            ("SELECT coalesce((SELECT value FROM meta WHERE key = 'dropped_age'), 0)", Total::DroppedAge),
        ] {
            let count = self.query_one(sql, [], doing, |row| row.get(0))?;
            self.counters.add_total(total, count);
        }
        Ok(())
    }

    // -- statements

    pub fn statement(
        &self,
        sql: &'static str,
        doing: &'static str,
    ) -> Result<CachedStatement<'_>, StoreError> {
        self.conn.prepare_cached(sql).doing(doing)
    }

    /// Runs one statement; how many rows it changed.
    pub fn execute(
        &self,
        sql: &'static str,
        params: impl Params,
        doing: &'static str,
    ) -> Result<usize, StoreError> {
        self.statement(sql, doing)?.execute(params).doing(doing)
    }

    pub fn query<T>(
        &self,
        sql: &'static str,
        params: impl Params,
        doing: &'static str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let mut statement = self.statement(sql, doing)?;
        let rows = statement.query_map(params, read).doing(doing)?;
        rows.collect::<Result<_, _>>().doing(doing)
    }

    pub fn query_opt<T>(
        &self,
        sql: &'static str,
        params: impl Params,
        doing: &'static str,
        read: impl FnOnce(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, StoreError> {
        match self.statement(sql, doing)?.query_row(params, read) {
            Ok(value) => Ok(Some(value)),
            Err(rusqlite::Error::QueryReturnedNoRows) => Ok(None),
            Err(source) => Err(StoreError::Sqlite { doing, source }),
        }
    }

    pub fn query_one<T>(
        &self,
        sql: &'static str,
        params: impl Params,
        doing: &'static str,
        read: impl FnOnce(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        self.statement(sql, doing)?.query_row(params, read).doing(doing)
    }

    /// For statements that are not always the same text.
    pub fn connection(&self) -> &Connection {
        &self.conn
    }

    pub fn last_id(&self) -> i64 {
        self.conn.last_insert_rowid()
    }

    // -- transactions

    pub fn begin(&mut self, writes: bool) -> Result<(), StoreError> {
        if !self.lost && (self.spoilt || !self.conn.is_autocommit()) {
            self.rollback();
        }
        if self.lost || self.spoilt {
            self.reconnect()?;
        }
        let sql = if writes { "BEGIN IMMEDIATE" } else { "BEGIN" };
        self.execute(sql, [], "begin a transaction").map(drop)
    }

    /// Whether SQLite has rolled the transaction back by itself, as it does when the disk is full.
    pub fn transaction_is_gone(&self) -> bool {
        self.conn.is_autocommit()
    }

    /// Whether the transaction must not be committed: it would write what is wrong in memory.
    pub fn is_spoilt(&self) -> bool {
        self.spoilt
    }

    /// A new connection to the same file, counted anew: the way out of a transaction that can't be
    /// rolled back. The file is sound; a commit that failed may have come true, as after a kill.
    pub fn reconnect(&mut self) -> Result<(), StoreError> {
        // Until this is through, no rollback's success may make the connection believed again.
        self.lost = true;
        // The old one is closed first: it may hold the lock.
        self.conn = Connection::open_in_memory().doing("open the database anew")?;
        let conn = self.file.connect()?;
        set_pragmas(&conn, self.pages_max).doing("set up the database")?;
        self.conn = conn;
        self.counters = Counters::default();
        self.seen = Seen::default();
        self.sweep.clear();
        self.unreserve();
        self.count()?;
        seen::load(self)?;
        self.counters.committed();
        (self.spoilt, self.lost) = (false, false);
        tracing::warn!("the database was opened anew: what SQLite held in memory was in doubt");
        Ok(())
    }

    pub fn savepoint(&self) -> Result<Mark, StoreError> {
        self.execute("SAVEPOINT request", [], "begin a request")?;
        Ok(Mark { counters: self.counters.mark(), seen: self.seen.mark() })
    }

    pub fn release(&self) -> Result<(), StoreError> {
        self.execute("RELEASE request", [], "end a request").map(drop)
    }

    pub fn rollback_to(&mut self, mark: Mark) -> Result<(), StoreError> {
        self.counters.undo_to(mark.counters);
        self.seen.undo_to(mark.seen);
        self.unreserve();
        self.execute("ROLLBACK TO request", [], "roll a request back")?;
        self.release()
    }

    /// When this returns, all of the transaction is on the disk; on an error, nothing of it.
    pub fn commit(&mut self) -> Result<(), StoreError> {
        let now = self.node_ms();
        let saves = self.save_time || now - self.node_saved_ms >= SAVE_TIME_EVERY_MS;
        let done = match saves {
            true => schema::set_meta(&self.conn, "node_ms", now)
                .and_then(|()| schema::set_meta(&self.conn, "wall_ms", self.wall().0))
                .and_then(|()| schema::set_meta(&self.conn, "latest_ms", self.latest().0)),
            false => Ok(()),
        };
        let done = done.and_then(|()| match self.spoilt {
            true => Err(StoreError::out_of_memory("commit")),
            false => self.execute("COMMIT", [], "commit").map(drop),
        });
        if let Err(error) = done {
            let error = self.classify(error);
            self.rollback();
            return Err(error);
        }
        self.counters.committed();
        self.seen.committed();
        self.save_time = false;
        if saves {
            self.node_saved_ms = now;
        }
        Ok(())
    }

    /// Ends a transaction that only read.
    pub fn end_read(&mut self) -> Result<(), StoreError> {
        self.execute("COMMIT", [], "end a read").map(drop)
    }

    pub fn rollback(&mut self) {
        self.counters.undo_to(0);
        self.seen.undo_to(0);
        self.unreserve();
        let gone = self.conn.is_autocommit();
        let done = if gone { Ok(()) } else { self.execute("ROLLBACK", [], "roll back").map(drop) };
        // SQLite takes a rollback that met no memory for a good one, and goes on with the pages that
        // it should have put back, until it has written them: none that it holds is believed. (Its
        // own errors of the disk it remembers.)
        let forgot = self.conn.release_memory();
        self.spoilt = done.is_err() || forgot.is_err() || !self.conn.is_autocommit();
        if let Err(error) = done {
            tracing::warn!(error = %error, "transaction could not be rolled back");
        }
    }

    /// Marks the stop as clean and empties the WAL into the database.
    pub fn close(mut self) -> Result<(), StoreError> {
        self.save_time = true;
        self.begin(true)?;
        schema::set_meta(&self.conn, "clean", i64::from(self.damage == Damage::None))?;
        for kind in [Id::Event, Id::Delivery] {
            schema::set_meta(&self.conn, kind.key(), self.last(kind) + 1)?;
        }
        self.commit()?;
        let doing = "checkpoint the database";
        self.query_one("PRAGMA wal_checkpoint(TRUNCATE)", [], doing, |_| Ok(()))?;
        self.conn.flush_prepared_statement_cache();
        self.conn.close().map_err(|(_, source)| source).doing("close the database")
    }

    /// Tells a full quota from a full disk: SQLite says the same of both. `Room` refuses long
    /// before `max_page_count`, so unless the database stands near it, it was the disk.
    pub fn classify(&mut self, error: StoreError) -> StoreError {
        let full = match error.code() {
            Some(ErrorCode::OutOfMemory) => {
                self.spoilt = true;
                false
            }
            Some(ErrorCode::DiskFull) => {
                let near = self.pages().is_ok_and(|pages| pages + SLACK_PAGES / 2 >= self.pages_max);
                if near {
                    return StoreError::Full;
                }
                true
            }
            // Growing the WAL's index on a full disk is an I/O error to SQLite.
            Some(ErrorCode::SystemIoFailure) => self.disk_is_full(),
            _ => false,
        };
        if !full {
            self.note_damage(&error);
            return error;
        }
        self.full = Some(Lack::Disk);
        self.made_room |= self.ballast.give_up();
        StoreError::DiskFull
    }

    fn note_damage(&mut self, error: &StoreError) {
        let met = match error {
            error if error.is_broken() => Damage::Page,
            error if error.is_damage() => Damage::Value,
            _ => Damage::None,
        };
        if met <= self.damage {
            return;
        }
        self.damage = met;
        let error = crate::errors::chain(error);
        if met == Damage::Page {
            tracing::error!(error, "the database is damaged");
            if self.file.vfs.is_none() {
                salvage::suspect(&self.file.path);
            }
        } else {
            tracing::error!(error, "a value in the database is damaged: the next start checks the rest");
        }
    }

    /// Nothing but a start can put it right.
    pub fn is_broken(&self) -> bool {
        self.damage == Damage::Page
    }

    fn disk_is_full(&self) -> bool {
        let Some(path) = self.conn.path() else { return false };
        rustix::fs::statvfs(path).is_ok_and(|fs| fs.f_bavail * fs.f_frsize < 64 * 1024)
    }

    // -- time

    /// The latest time that the wall clock has ever shown here.
    pub fn latest(&self) -> UnixMs {
        self.latest.max(self.wall())
    }

    pub fn wall(&self) -> UnixMs {
        self.clock.wall()
    }

    pub fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    pub fn node_ms(&self) -> i64 {
        self.node_offset_ms + self.monotonic_ms()
    }

    fn monotonic_ms(&self) -> i64 {
        self.clock.monotonic().as_millis() as i64
    }
}

/// How long the node was off, as far as the wall clock can be believed.
fn downtime_ms(last_seen: UnixMs, now: UnixMs) -> i64 {
    let plausible = last_seen >= WALL_PLAUSIBLE_FROM && now >= WALL_PLAUSIBLE_FROM;
    if plausible { now.0.saturating_sub(last_seen.0).max(0) } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: i64 = WALL_PLAUSIBLE_FROM.0;

    #[test]
    fn downtime_is_taken_from_a_plausible_wall_clock_alone() {
        for (last_seen, now, expected) in [
            (GOOD, GOOD + 3_000, 3_000),
            (17, GOOD + 3_000, 0),
            (GOOD, 17, 0),
            (GOOD + 3_000, GOOD, 0),
            (GOOD, i64::MAX, i64::MAX - GOOD),
        ] {
            assert_eq!(downtime_ms(UnixMs(last_seen), UnixMs(now)), expected, "{last_seen} {now}");
        }
    }
}
