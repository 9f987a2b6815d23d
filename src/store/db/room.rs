//! How much there may be, and whether so much more fits.
//!
//! **Quota.** Ingestion finds no room when used pages reach `bytes_max`, or the entries that wait
//! `events_max`; what happens then is `full`'s. Work that already exists must go on, so what a
//! finished invocation leaves may go `reserve` above. `max_page_count` stands a little above both:
//! deleting and leasing always find room.

use super::{Db, PAGE_BYTES};
use crate::config::{Buffer, WhenFull};
use crate::store::counters::{Of, Total};
use crate::store::error::{Doing, StoreError};
use crate::store::full::Lack;

/// Above `bytes_max`, for what existing work becomes: an eighth, but at least the outputs of a
/// few finished invocations (limits.payload is 1 MiB by default) and at most what a small disk
/// can spare.
pub(super) const RESERVE_BYTES_MIN: u64 = 4 << 20;
pub(super) const RESERVE_BYTES_MAX: u64 = 32 << 20;

/// Above everything, for pages that a delete or an update needs for a moment.
pub(super) const SLACK_PAGES: u64 = 2048;

/// The dead may hold this share of `bytes_max`, invocations and deliveries each: a function
/// that always fails must not stop ingestion for good.
const DEAD_SHARE: u64 = 8;

/// Owed callbacks the same: receivers that are away must not, either.
const CALLBACK_SHARE: u64 = 8;

/// Taken when nothing waits: the schema, functions with their manifests, some retained values.
/// More than this and what asks for room together never fit.
const KEPT_BYTES: u64 = 256 << 10;

/// What a status page takes for an event when it says whether there is room.
const SMALL_BYTES: u64 = 1024;

/// Who asks for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Room {
    /// A new event.
    Ingest,
    /// The output of a synchronous call, which nobody accepted before.
    Owe,
    /// The output of a finished invocation.
    Settle,
}

/// `[buffer]`, as it is counted here.
#[derive(Clone, Copy, Debug)]
pub(in crate::store) struct Limits {
    pub bytes_max: u64,
    /// Entries of inbox and outbox.
    pub events_max: Option<u64>,
    pub age_max_ms: Option<i64>,
    pub when_full: WhenFull,
}

impl Limits {
    pub(super) fn of(buffer: &Buffer) -> Self {
        let age = i64::try_from(buffer.age_max.as_millis()).unwrap_or(i64::MAX);
        Self {
            bytes_max: buffer.bytes_max,
            events_max: Some(buffer.events_max).filter(|max| *max > 0),
            age_max_ms: Some(age).filter(|age| *age > 0),
            when_full: buffer.when_full,
        }
    }
}

impl Db {
    /// Bytes in use, free pages not counted.
    pub fn bytes_used(&self) -> Result<u64, StoreError> {
        let pages = self.pages()?;
        let free = self.pragma("PRAGMA freelist_count")?;
        Ok(pages.saturating_sub(free) * PAGE_BYTES)
    }

    pub(super) fn pages(&self) -> Result<u64, StoreError> {
        self.pragma("PRAGMA page_count")
    }

    fn pragma(&self, sql: &'static str) -> Result<u64, StoreError> {
        self.query_one(sql, [], "read the database's size", |row| row.get::<_, u32>(0)).map(u64::from)
    }

    pub fn dead_bytes_max(&self) -> i64 {
        (self.limits.bytes_max / DEAD_SHARE) as i64
    }

    /// What owed callbacks may hold together.
    pub fn callback_bytes_max(&self) -> u64 {
        self.limits.bytes_max / CALLBACK_SHARE
    }

    fn bytes_limit(&self, who: Room) -> u64 {
        self.limits.bytes_max + if who == Room::Settle { self.reserve } else { 0 }
    }

    /// Refuses as `TooLarge` what would find no room in an empty database.
    pub fn fits_at_all(&self, who: Room, bytes: u64) -> Result<(), StoreError> {
        let bytes_max = self.bytes_limit(who).saturating_sub(KEPT_BYTES);
        if bytes > bytes_max { Err(StoreError::TooLarge { bytes, bytes_max }) } else { Ok(()) }
    }

    /// What there is not enough of for so much more.
    pub fn lacks(&self, who: Room, entries: u64, bytes: u64) -> Result<Option<Lack>, StoreError> {
        // What runs already may leave its output: the ballast was given up for that.
        if self.ballast.stalled() && who != Room::Settle {
            return Ok(Some(Lack::Disk));
        }
        // Output takes the place of what ran, so without dropping it is only counted.
        let counts = who != Room::Settle || self.limits.when_full != WhenFull::Reject;
        if counts && self.limits.events_max.is_some_and(|max| self.entries() + entries > max) {
            return Ok(Some(Lack::Events));
        }
        let lacks = self.bytes_used()? + bytes > self.bytes_limit(who);
        Ok(lacks.then_some(Lack::Bytes))
    }

    /// Living ones, in inbox and outbox.
    fn entries(&self) -> u64 {
        let invocations = [Of::Ready, Of::Waiting, Of::Running].map(|of| self.counters.sum(of));
        let owed = [Total::OwedUplink, Total::OwedLocal, Total::OwedCallbacks]
            .map(|total| self.counters.total(total));
        invocations.iter().chain(&owed).sum::<i64>().max(0) as u64
    }

    /// Whether a small event would find no room now, or the last one found none by dropping.
    pub fn still_full(&self) -> Result<Option<Lack>, StoreError> {
        let lacks = self.lacks(Room::Ingest, 1, SMALL_BYTES)?;
        Ok(lacks.or(self.full.filter(|lack| *lack != Lack::Disk && self.near(*lack))))
    }

    /// Room for less than a sixteenth: one that was full and has not been emptied since.
    fn near(&self, lack: Lack) -> bool {
        match lack {
            Lack::Events => self.limits.events_max.is_some_and(|max| self.entries() + max / 16 >= max),
            _ => {
                self.bytes_used().is_ok_and(|used| used + self.limits.bytes_max / 16 >= self.limits.bytes_max)
            }
        }
    }

    /// Whether most of the file is free: then it is worth the writing to give it back.
    pub fn worth_shrinking(&self) -> Result<bool, StoreError> {
        let free = self.pragma("PRAGMA freelist_count")?;
        Ok(free > SLACK_PAGES && free * 2 >= self.pages()?)
    }

    /// Gives free pages back to the file system, `pages` at most.
    pub fn shrink(&mut self, pages: u32) -> Result<(), StoreError> {
        let doing = "shrink the database";
        // Not cached: the number is part of the text. Stepped to its end: each step frees a page.
        let mut statement = self.conn.prepare(&format!("PRAGMA incremental_vacuum({pages})")).doing(doing)?;
        let mut rows = statement.query([]).doing(doing)?;
        while rows.next().doing(doing)?.is_some() {}
        Ok(())
    }
}
