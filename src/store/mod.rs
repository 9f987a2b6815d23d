//! The node's memory: inbox, outbox, functions, in one SQLite file behind one writer thread.
//!
//! ```text
//!   callers ──bounded queue──▶ writer thread ──▶ SQLite (WAL, synchronous=FULL)
//!      ▲                          │ group: one transaction, a savepoint for each request
//!      └────── answers ◀──────────┘ only after COMMIT returned
//! ```
//!
//! Promises: an answer means that its change is on the disk (fsync). A request is committed
//! whole or not at all, whatever its neighbours in the group do. What is refused (`Full`,
//! `DiskFull`) has changed nothing: an invocation stays leased, a delivery stays owed, and the
//! caller asks again. A request that was sent runs even if its caller stops waiting; await
//! `lease` to its end, or what it leased stays leased until the next start.
//!
//! Order comes from ids that are never reused; delays and ages from node time (the daemon's
//! accumulated uptime and known downtime, see `db`), never from the wall clock alone. An event is stored once and
//! goes with its last invocation; dead ones are kept apart from the living, within a bound.
//!
//! A damaged database is found when the last stop was not clean, or as soon as a page of it can't be
//! read (`broken`): then a start puts what can be read of it into a new one (`salvage`). What has no room is refused or makes room by the operator's rule (`full`); a full disk takes
//! no more events and lets deliveries go on (`ballast`).

mod ballast;
mod connection;
mod copies;
mod counters;
mod db;
mod dead;
mod entry;
mod error;
mod event_row;
mod full;
mod functions;
mod inbox;
mod line;
mod listing;
mod outbox;
mod retained;
mod revisions;
mod salvage;
mod schema;
mod seen;
mod status;
mod subscribed;
#[cfg(test)]
mod tests;
mod ticks;
mod usage;
mod writer;

pub use entry::{
    Accepted, Arrival, Counts, DedupKey, DeliveryRow, Fate, FunctionCounts, InvocationFilter, InvocationRow,
    InvocationState, Leased, Listed, NewInvocation, Owed, OwedOrder, Position, Recovered, RetainedValue,
    Salvaged, Settlement, StoredFunction, StoredRevision, Tick, Unreadable, Usage,
};
pub use error::StoreError;
pub use line::Line;
pub use revisions::History;

use crate::config::Buffer;
use crate::model::{Clock, Delivery, DeliveryId, FunctionName, InvocationId, NewDelivery, Target, UnixMs};
use crate::watch::Watch;
use db::Db;
use listing::Filter;
use smol::channel::{Receiver, Sender};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use writer::{Call, Message};

/// Attempts that may be lost to a killed daemon or launcher; then the invocation is dead: what
/// is there each time that the daemon dies may be what kills it.
pub const LOST_MAX: u32 = 20;

/// Dead invocations kept, and dead deliveries: more than a person looks through. The oldest go.
pub const DEAD_MAX: u64 = 10_000;

/// Callbacks owed: results that nobody takes make no room scarce for anything else. Beyond it no
/// call that asks for one is taken, and what calls that run already leave is dropped, counted.
pub const CALLBACKS_MAX: u64 = 1_000;

/// Kept of a dead invocation's output and error, each.
pub const OUTPUT_BYTES_MAX: usize = 4096;

/// Topics whose last retained value is remembered for each function; the one that changed
/// longest ago is forgotten, and its value may come as an event once more.
pub const RETAINED_MAX: i64 = 10_000;

/// Ids by which senders' repetitions are told, the last ones: an hour of five a second, or all
/// that a broker and its clients hold in flight many times over. In memory: about 50 bytes each.
pub const SEEN_MAX: usize = 16_384;

/// Invocations of one event: above `model::function::FUNCTIONS_MAX`. An event's invocations
/// have the ids `seq * 4096 + n`; part of the schema.
const INVOCATIONS_PER_EVENT_MAX: i64 = 4096;

/// Rows of one listing; `after` brings the next.
pub const LISTING_MAX: u32 = 1_000;

#[derive(Clone)]
pub struct Options {
    pub path: PathBuf,
    pub buffer: Buffer,
    pub clock: Arc<dyn Clock>,
}

/// A handle; cloning it is cheap. When the last one goes without `close`, the thread ends as
/// after a kill: what was answered is stored, the stop is not clean.
#[derive(Clone)]
pub struct Store {
    thread: Arc<Thread>,
}

struct Thread {
    requests: Sender<Message>,
    broken: Watch<bool>,
    handle: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.requests.close();
        let handle = self.handle.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(handle) = handle {
            let _ = handle.join(); // the file is closed when this returns
        }
    }
}

/// A page of the outbox that is being read.
pub struct Reading(Receiver<Result<Vec<Delivery>, StoreError>>);

impl Reading {
    pub async fn rows(self) -> Result<Vec<Delivery>, StoreError> {
        self.0.recv().await.map_err(|_| StoreError::Stopped)?
    }
}

/// An arrival that stands in line to be committed.
pub struct Receipt(Receiver<Result<Accepted, StoreError>>);

impl Receipt {
    /// Returns after the commit (fsync): only then may the sender be told.
    pub async fn committed(self) -> Result<Accepted, StoreError> {
        self.0.recv().await.map_err(|_| StoreError::Stopped)?
    }
}

impl Store {
    /// Opens or creates the database, migrates it, recovers leases, starts the writer thread.
    /// Blocks for as long as it takes to count what is stored.
    pub fn open(options: Options) -> Result<(Self, Recovered), StoreError> {
        let (db, recovered) = Db::open(&options)?;
        Ok((Self::start(db, &options)?, recovered))
    }

    /// On a disk of a test's own.
    #[cfg(test)]
    fn open_in_vfs(options: Options, vfs: &str) -> Result<(Self, Recovered), StoreError> {
        let (db, recovered) = Db::open_in_vfs(&options, vfs)?;
        Ok((Self::start(db, &options)?, recovered))
    }

    fn start(db: Db, options: &Options) -> Result<Self, StoreError> {
        let (requests, queue) = smol::channel::bounded(writer::QUEUE_MAX);
        let window = options.buffer.commit_window;
        let broken = Watch::new(false);
        let tell = broken.clone();
        let handle = std::thread::Builder::new()
            .name("neap-store".to_owned())
            .spawn(move || writer::run(db, queue, window, &tell))
            .map_err(|source| StoreError::Io { doing: "start the store's thread", source })?;
        let thread = Thread { requests, broken, handle: Mutex::new(Some(handle)) };
        Ok(Self { thread: Arc::new(thread) })
    }

    /// Returns once SQLite has met a damaged page. What comes after that may fail, and only opening
    /// the database anew puts it right.
    pub async fn broken(&self) {
        let mut seen = self.thread.broken.versioned();
        while !*seen.1 {
            seen = self.thread.broken.changed(seen.0).await;
        }
    }

    /// Commits what is queued, marks the stop as clean, ends the thread. Later calls get `Stopped`.
    pub async fn close(&self) {
        let (reply, closed) = smol::channel::bounded(1);
        if self.thread.requests.send(Message::Close(reply)).await.is_ok() {
            let _ = closed.recv().await;
        }
    }

    async fn call<T, F>(&self, writes: bool, bytes: u64, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Db) -> Result<T, StoreError> + Send + 'static,
    {
        let answer = self.queue(writes, bytes, None, run).await?;
        answer.recv().await.map_err(|_| StoreError::Stopped)?
    }

    /// Returns when the request stands in the queue: what is queued later is done later.
    async fn queue<T, F>(
        &self,
        writes: bool,
        bytes: u64,
        line: Option<Line>,
        run: F,
    ) -> Result<Receiver<Result<T, StoreError>>, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Db) -> Result<T, StoreError> + Send + 'static,
    {
        let (reply, answer) = smol::channel::bounded(1);
        let request = Box::new(Call { run, line, closed: false, writes, bytes, result: None, reply });
        let sent = self.thread.requests.send(Message::Request(request)).await;
        sent.map_err(|_| StoreError::Stopped)?;
        Ok(answer)
    }

    async fn write<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Db) -> Result<T, StoreError> + Send + 'static,
    {
        self.call(true, 0, run).await
    }

    async fn read<T, F>(&self, run: F) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: FnMut(&mut Db) -> Result<T, StoreError> + Send + 'static,
    {
        self.call(false, 0, run).await
    }

    // -- inbox

    /// Returns after the commit (fsync): only then may the sender be told. Invocations of
    /// functions that are not deployed (any more) are left out, as if they had been removed
    /// with their function; when nothing is left to store, `seq` is 0.
    pub async fn accept(&self, arrival: Arrival) -> Result<Accepted, StoreError> {
        let bytes = inbox::arrival_bytes(&arrival);
        self.call(true, bytes, move |db| inbox::accept(db, &arrival)).await
    }

    /// The first half of `accept`, for senders whose order counts: what is submitted in order,
    /// one awaited after the other, is stored in order, and still shares its commits. One that
    /// finds no room closes the line.
    pub async fn submit(&self, line: &Line, arrival: Arrival) -> Result<Receipt, StoreError> {
        let bytes = inbox::arrival_bytes(&arrival);
        let run = move |db: &mut Db| inbox::accept(db, &arrival);
        Ok(Receipt(self.queue(true, bytes, Some(line.clone()), run).await?))
    }

    /// Leases up to `limit` due invocations of each function named, oldest first. Expired ones
    /// are dropped and counted on the way.
    pub async fn lease(&self, wanted: Vec<(FunctionName, u32)>) -> Result<Vec<Leased>, StoreError> {
        self.write(move |db| inbox::lease(db, &wanted)).await
    }

    /// `NotFound`: it is not leased, or its function was removed.
    pub async fn settle(&self, id: InvocationId, settlement: Settlement) -> Result<(), StoreError> {
        let bytes = match &settlement {
            Settlement::Done { deliveries, events } => inbox::output_bytes(deliveries, events),
            _ => 0,
        };
        self.call(true, bytes, move |db| inbox::settle(db, id, &settlement)).await
    }

    /// Functions that have a due invocation, and how long until the next one becomes due.
    pub async fn due(&self) -> Result<(Vec<FunctionName>, Option<Duration>), StoreError> {
        self.read(inbox::due).await
    }

    /// What a synchronous call's output became; committed before the caller is answered.
    pub async fn owe(&self, deliveries: Vec<NewDelivery>, events: Vec<Arrival>) -> Result<(), StoreError> {
        let bytes = inbox::output_bytes(&deliveries, &events);
        self.call(true, bytes, move |db| inbox::owe(db, &deliveries, &events)).await
    }

    /// In order of id, living and dead together.
    pub async fn invocations(
        &self,
        filter: InvocationFilter,
    ) -> Result<Vec<Listed<InvocationRow>>, StoreError> {
        let filter = self.look_up(filter).await?;
        self.read(move |db| listing::list(db, &filter, false)).await
    }

    /// Invocations of one event, data included; by event id or sequence number. Empty when
    /// there are none.
    pub async fn event(&self, id: String) -> Result<Vec<InvocationRow>, StoreError> {
        let filter = InvocationFilter { event: Some(id), ..InvocationFilter::default() };
        let filter = self.look_up(filter).await?;
        let rows = self.read(move |db| listing::list(db, &filter, true)).await?;
        rows.into_iter().map(|row| row.map_err(|damaged| StoreError::Damaged(damaged.why))).collect()
    }

    /// Dead invocations become ready again, attempts and losses from zero; returns how many.
    /// `expires` no longer counts for them.
    pub async fn redrive(&self, filter: InvocationFilter) -> Result<u64, StoreError> {
        let filter = self.look_up(filter).await?;
        self.write(move |db| listing::redrive(db, &filter)).await
    }

    /// Removes dead invocations; returns how many.
    pub async fn purge(&self, filter: InvocationFilter) -> Result<u64, StoreError> {
        let filter = self.look_up(filter).await?;
        self.write(move |db| listing::purge(db, &filter)).await
    }

    /// Finds the events that a filter names, a step at a time.
    async fn look_up(&self, filter: InvocationFilter) -> Result<Filter, StoreError> {
        let Some(id) = filter.event.clone() else { return Ok(Filter { by: filter, seqs: None }) };
        let (mut seqs, mut after) = (Vec::new(), 0);
        loop {
            let id = id.clone();
            let (found, next) = self.read(move |db| listing::search(db, &id, after)).await?;
            seqs.extend(found);
            match next {
                Some(next) if seqs.len() < listing::SAME_ID_MAX => after = next,
                _ => break,
            }
        }
        let number = id.parse().ok().filter(|seq| (1..i64::MAX / INVOCATIONS_PER_EVENT_MAX).contains(seq));
        if seqs.is_empty() {
            seqs.extend(number);
        }
        Ok(Filter { by: filter, seqs: Some(seqs) })
    }

    // -- outbox

    /// Living deliveries for one broker, from a place on, in order.
    pub async fn owed(&self, what: Owed) -> Result<Vec<Delivery>, StoreError> {
        self.read_owed(what).await?.rows().await
    }

    /// The first half of `owed`: it is read while the caller goes on with what it has.
    pub async fn read_owed(&self, what: Owed) -> Result<Reading, StoreError> {
        Ok(Reading(self.queue(false, 0, None, move |db| outbox::owed(db, &what)).await?))
    }

    /// Where the outbox ends now: what is owed already stands at or before it, what comes later
    /// behind it.
    pub async fn outbox_end(&self) -> Result<Position, StoreError> {
        self.read(|db| Ok(outbox::end(db))).await
    }

    /// The broker has acknowledged these: they go. Ids that are gone already are no error.
    pub async fn delivered(&self, ids: Vec<DeliveryId>) -> Result<(), StoreError> {
        self.write(move |db| outbox::delivered(db, &ids)).await
    }

    /// The same, and what was sent is added to the day's count, whose sum returns; days are
    /// numbered by the caller, one after another.
    pub async fn delivered_counting(
        &self,
        ids: Vec<DeliveryId>,
        kind: Usage,
        day: i64,
        amount: u64,
    ) -> Result<u64, StoreError> {
        self.write(move |db| {
            outbox::delivered(db, &ids)?;
            usage::add(db, kind, day, amount)
        })
        .await
    }

    /// What was counted on this day.
    pub async fn usage(&self, kind: Usage, day: i64) -> Result<u64, StoreError> {
        self.read(move |db| usage::get(db, kind, day)).await
    }

    /// Refused for good: kept as dead, with the reason; the queue moves on.
    pub async fn set_aside(&self, id: DeliveryId, reason: String) -> Result<(), StoreError> {
        self.write(move |db| outbox::set_aside(db, id, &reason)).await
    }

    /// Counts a connection that ended while this delivery was alone in flight; returns the count.
    pub async fn lone_disconnect(&self, id: DeliveryId) -> Result<u32, StoreError> {
        self.write(move |db| outbox::lone_disconnect(db, id)).await
    }

    pub async fn deliveries(
        &self,
        dead: bool,
        after: Option<DeliveryId>,
        limit: u32,
    ) -> Result<Vec<Listed<DeliveryRow>>, StoreError> {
        self.read(move |db| outbox::list(db, dead, after, limit)).await
    }

    /// One delivery, data included.
    pub async fn delivery(&self, id: DeliveryId) -> Result<DeliveryRow, StoreError> {
        self.read(move |db| outbox::get(db, id)).await
    }

    /// Dead deliveries are owed again (all of them, or one); they join at the end of the queue.
    pub async fn redrive_deliveries(&self, id: Option<DeliveryId>) -> Result<u64, StoreError> {
        self.write(move |db| outbox::redrive(db, id)).await
    }

    pub async fn purge_deliveries(&self, id: Option<DeliveryId>) -> Result<u64, StoreError> {
        self.write(move |db| outbox::purge(db, id)).await
    }

    // -- functions

    pub async fn functions(&self) -> Result<Vec<StoredFunction>, StoreError> {
        self.read(functions::list).await
    }

    /// The number and id range that `deploy` with the same arguments will give; a new name's range
    /// is kept for it from now on.
    pub async fn next_revision(
        &self,
        name: FunctionName,
        manifest: String,
        image: String,
    ) -> Result<(u32, u32), StoreError> {
        let known = name.clone();
        match self.read(move |db| functions::next_revision(db, &known, &manifest, &image)).await? {
            Some(next) => Ok(next),
            None => self.write(move |db| functions::reserve(db, &name)).await,
        }
    }

    /// A new revision of a new or known function (number and id range are chosen here). Returns
    /// the function as stored. The same manifest and image as the current revision's make no
    /// new one.
    pub async fn deploy(
        &self,
        name: FunctionName,
        manifest: String,
        image: String,
        file: Option<PathBuf>,
    ) -> Result<StoredFunction, StoreError> {
        self.write(move |db| functions::deploy(db, &name, &manifest, &image, file.as_deref())).await
    }

    pub async fn set_paused(&self, name: FunctionName, paused: bool) -> Result<(), StoreError> {
        self.write(move |db| functions::set_paused(db, &name, paused)).await
    }

    /// The function goes, and its invocations and remembered retained values with it; its
    /// deliveries stay owed. Returns how many invocations went.
    pub async fn remove(&self, name: FunctionName) -> Result<u64, StoreError> {
        self.write(move |db| functions::remove(db, &name)).await
    }

    /// When each schedule last fired, of the functions that are deployed.
    /// The latest time that the wall clock has ever shown on this node.
    pub async fn latest_wall(&self) -> Result<UnixMs, StoreError> {
        self.read(|db| Ok(db.latest())).await
    }

    pub async fn ticks(&self) -> Result<Vec<Tick>, StoreError> {
        self.read(ticks::list).await
    }

    /// Remembers a time without an event: a schedule that is looked at for the first time, or
    /// whose missed runs are skipped.
    pub async fn set_tick(&self, tick: Tick) -> Result<(), StoreError> {
        self.write(move |db| ticks::set(db, &tick)).await
    }

    /// Forgets the ticks of schedules that the function no longer has.
    pub async fn keep_ticks(&self, function: FunctionName, schedules: Vec<String>) -> Result<(), StoreError> {
        self.write(move |db| match functions::deployed(db, &function)? {
            Some(id) => ticks::keep(db, id, &schedules),
            None => Ok(()),
        })
        .await
    }

    /// What the session at this broker was last known to be subscribed to, as `set_subscribed`
    /// stored it: it outlives the daemon, as the broker's session does.
    pub async fn subscribed(&self, target: Target) -> Result<Vec<String>, StoreError> {
        self.read(move |db| subscribed::get(db, target)).await
    }

    /// Replaces the list. The lines are the caller's own, each below 65 KiB.
    pub async fn set_subscribed(&self, target: Target, lines: Vec<String>) -> Result<(), StoreError> {
        self.write(move |db| subscribed::set(db, target, &lines)).await
    }

    pub async fn counts(&self) -> Result<Counts, StoreError> {
        self.read(status::counts).await
    }
}
