//! What goes into the store and comes out of it.

use crate::model::{
    DeliveryId, Event, EventId, EventSeq, Failure, FunctionName, InvocationId, Lane, NewDelivery, Target,
    UnixMs,
};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

/// Something that arrived and what it obliges the node to: committed whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub event: Event,
    pub invocations: Vec<NewInvocation>,
    /// `[[forward]]`.
    pub deliveries: Vec<NewDelivery>,
    /// By which a repetition is told, when the sender gave something to tell it by.
    pub dedup: Option<DedupKey>,
    /// Stored with the event: a schedule fires once, whatever is killed between.
    pub tick: Option<Tick>,
}

impl Arrival {
    /// One that nothing is known of but the event.
    pub fn of(event: Event) -> Self {
        Self { event, invocations: Vec::new(), deliveries: Vec::new(), dedup: None, tick: None }
    }
}

/// What a sender gave to tell a repetition by, as a hash: two differ for all purposes when what
/// they were made of differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DedupKey(pub(super) [u8; 16]);

impl DedupKey {
    /// A CloudEvent's source and id, which its producer gives to one event alone (§3.1.1).
    pub fn cloud_event(source: &str, id: &str) -> Self {
        Self::of(&["cloudevent", source, id])
    }

    /// An `Idempotency-Key`: it counts for one path, which is the function's own.
    pub fn idempotency(path: &str, key: &str) -> Self {
        Self::of(&["idempotency", path, key])
    }

    fn of(parts: &[&str]) -> Self {
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        for part in parts {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part.as_bytes());
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hash.finish().as_ref()[..16]);
        Self(key)
    }
}

/// A schedule of a function that fired, or was looked at for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tick {
    pub function: FunctionName,
    /// The caller's own name for it, such as `UTC */5 * * * *`.
    pub schedule: String,
    pub fired: UnixMs,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewInvocation {
    pub function: FunctionName,
    pub lane: Lane,
    /// Dropped, counted, when older than this at its turn.
    pub expires: Option<Duration>,
    /// `retained = "new"`: skipped when this function has already seen the same value (a hash
    /// of the payload) on this topic.
    pub once: Option<RetainedValue>,
    /// Born dead: acknowledged to its sender, kept for a person to see, never run.
    pub dead: Option<Failure>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetainedValue {
    pub topic: String,
    pub hash: [u8; 32],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accepted {
    pub seq: EventSeq,
    /// Invocations really added (`once` may have left some out).
    pub invocations: usize,
    pub fate: Fate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Stored, or nobody is deployed who would want it.
    Stored,
    /// Its sender has sent it before: nothing was stored. The id under which it was.
    Duplicate(EventId),
    /// `drop-lowest-priority`: the buffer is full of what goes before it, so it is what was
    /// dropped, and counted.
    Dropped,
}

/// An invocation handed to the scheduler; it stays leased until settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    pub id: InvocationId,
    pub function: FunctionName,
    pub lane: Lane,
    pub event: Event,
    /// The function's own attempts that failed before.
    pub attempts: u32,
    /// Attempts lost to a killed daemon or launcher.
    pub lost: u32,
}

/// How a lease ends. One transaction, whatever it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Succeeded: the invocation goes, what its output became comes.
    Done { deliveries: Vec<NewDelivery>, events: Vec<Arrival> },
    /// Runs again after `delay`; `counted`: against `retry.attempts`, else against losses.
    Retry { delay: Duration, counted: bool, error: String },
    /// Runs again after `delay`, and this attempt counts for nothing: the function fails
    /// whatever it is given.
    Defer { delay: Duration, error: String },
    /// Kept for a person, with the last error and the head of the last output.
    Dead { failure: Failure, output: Vec<u8> },
    /// Back in line as if never leased (shutdown).
    Release,
}

/// What was found at opening.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Leases of a daemon that did not stop cleanly: their losses were counted.
    pub leases: u64,
    pub clean: bool,
    /// Damage was met while the last one ran: all of the database was checked.
    pub suspected: bool,
    /// The database was damaged.
    pub salvaged: Option<Salvaged>,
}

/// What became of a damaged database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Salvaged {
    /// Where it was set aside.
    pub set_aside: PathBuf,
    pub functions: u64,
    pub invocations: u64,
    pub deliveries: u64,
    /// Rows that could be read and were of no use: of a lost event, or not what neap writes.
    pub lost: u64,
    /// Stretches that could not be read; how much stood there is not known.
    pub gaps: u64,
}

impl Salvaged {
    /// For people.
    pub fn told(&self) -> String {
        format!(
            "the database was damaged: {} invocations, {} deliveries and {} functions were salvaged, {} rows and \
             {} unreadable stretches were lost; the old one lies in {}",
            self.invocations,
            self.deliveries,
            self.functions,
            self.lost,
            self.gaps,
            self.set_aside.display()
        )
    }
}

/// A deployed function as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredFunction {
    pub name: FunctionName,
    pub paused: bool,
    /// The file in functions_dir that owns it; `None`: deployed through the API.
    pub file: Option<PathBuf>,
    pub uid_base: u32,
    pub revision: StoredRevision,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredRevision {
    pub number: u32,
    /// TOML as it was deployed.
    pub manifest: String,
    pub image: String,
    pub created: UnixMs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvocationState {
    Ready,
    Running,
    Dead,
}

/// A row of `neap events`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvocationRow {
    pub id: InvocationId,
    pub seq: EventSeq,
    pub function: FunctionName,
    pub state: InvocationState,
    pub attempts: u32,
    pub lost: u32,
    pub last_error: Option<String>,
    /// Head of the last failed output, at most 4 KiB.
    pub last_output: Vec<u8>,
    /// Until the next attempt; zero when it is due.
    pub due_in: Duration,
    pub arrived: UnixMs,
    /// With `data` left empty in listings.
    pub event: Event,
    pub data_bytes: u64,
}

/// A row of `neap deliveries`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryRow {
    pub id: DeliveryId,
    pub dead: Option<String>,
    pub created: UnixMs,
    /// With `data` left empty in listings.
    pub body: NewDelivery,
    pub data_bytes: u64,
}

/// A row of a listing, or that there is one: damage to one hides no other.
pub type Listed<T> = Result<T, Unreadable>;

/// A row in which bits have flipped. It can be purged, like any other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Of the invocation or the delivery, which is its place in the listing.
    pub id: i64,
    pub why: String,
}

/// Which invocations a listing, redrive or purge means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InvocationFilter {
    pub function: Option<FunctionName>,
    pub state: Option<InvocationState>,
    /// Event id, or sequence number when no event has that id.
    pub event: Option<String>,
    /// Ids above this one.
    pub after: Option<InvocationId>,
    /// 0: as many as there may be (`LISTING_MAX` in a listing).
    pub limit: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub ready: u64,
    pub running: u64,
    pub dead: u64,
    /// Age of the oldest invocation that is not dead.
    pub oldest: Option<Duration>,
    pub owed_uplink: u64,
    pub owed_local: u64,
    pub owed_callbacks: u64,
    pub dead_deliveries: u64,
    pub oldest_owed: Option<Duration>,
    /// Dropped by `expires` since the database was made.
    pub expired: u64,
    /// Dead ones dropped because there were more than `DEAD_MAX` or more bytes than their
    /// share, since the database was made.
    pub dead_dropped: u64,
    /// Dropped by `when_full` since the database was made.
    pub dropped_full: u64,
    /// Dropped by `max_age`.
    pub dropped_age: u64,
    /// Why the last event found no room of its own: `max_bytes`, `max_events` or `disk`.
    pub full: Option<&'static str>,
    pub bytes: u64,
    pub bytes_max: u64,
    pub per_function: Vec<FunctionCounts>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FunctionCounts {
    pub function: FunctionName,
    pub ready: u64,
    pub running: u64,
    pub dead: u64,
}

/// A place in one broker's outbox: how far each lane was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position(pub(super) [i64; 3]);

impl Position {
    /// Behind a delivery's number, whatever its lane.
    pub fn behind(number: i64) -> Self {
        Self([number; 3])
    }

    /// This one was taken: reading goes on behind it.
    pub fn pass(&mut self, id: DeliveryId) {
        let (_, lane, number) = super::outbox::parts(id);
        let last = &mut self.0[lane as usize];
        *last = number.max(*last);
    }

    /// Reading goes on with this one, if it had been passed.
    pub fn back_to(&mut self, id: DeliveryId) {
        let (_, lane, number) = super::outbox::parts(id);
        let last = &mut self.0[lane as usize];
        *last = (number - 1).min(*last);
    }

    /// Whether `id` stands at or before this place.
    pub fn is_past(&self, id: DeliveryId) -> bool {
        let (_, lane, number) = super::outbox::parts(id);
        number <= self.0[lane as usize]
    }
}

/// What to read of the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    pub target: Target,
    pub after: Position,
    /// Nothing behind this: `Store::outbox_end` at the beginning of a connection parts the
    /// backlog from what comes fresh.
    pub upto: Option<Position>,
    pub order: OwedOrder,
    pub limit: u32,
    /// Of data; the first one comes whatever its size.
    pub bytes_max: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwedOrder {
    /// All of the high lane, then all of the normal one, then the low one.
    Lanes,
    /// As they came, whatever their lane.
    Arrival,
}

/// What is counted by the day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// Sent to the uplink, for `bytes_per_day`.
    UplinkBytes,
}
