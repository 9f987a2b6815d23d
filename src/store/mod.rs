//! The node's memory: inbox, outbox, functions, in one SQLite file behind one writer thread.
//!
//! Callers send a request and wait for its answer; requests that arrive together share one
//! transaction and one fsync (group commit). An answer is sent only after its commit returned.

use crate::model::{
    Clock, Delivery, DeliveryId, Event, EventSeq, Failure, FunctionName, InvocationId, NewDelivery, Target,
    UnixMs,
};
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub struct Options {
    pub path: PathBuf,
    /// Size of the database at which ingestion is refused (`[buffer] max_bytes`).
    pub bytes_max: u64,
    pub commit_window: Duration,
    pub clock: Arc<dyn Clock>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// `[buffer] max_bytes` is reached: nothing was stored.
    #[error("the buffer is full ([buffer] max_bytes)")]
    Full,
    /// The file system has no room: nothing was stored.
    #[error("the disk is full")]
    DiskFull,
    #[error("no such entry")]
    NotFound,
    #[error(
        "the database was written by neap {written_by} and can be read by versions from {readable_by} on"
    )]
    TooNew { written_by: String, readable_by: String },
    #[error("{doing}")]
    Sqlite {
        doing: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("the store has stopped")]
    Stopped,
}

/// Something that arrived and what it obliges the node to: committed whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub event: Event,
    pub invocations: Vec<NewInvocation>,
    /// `[[forward]]`.
    pub deliveries: Vec<NewDelivery>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewInvocation {
    pub function: FunctionName,
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
}

/// An invocation handed to the scheduler; it stays leased until settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leased {
    pub id: InvocationId,
    pub function: FunctionName,
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

/// Which invocations a listing, redrive or purge means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InvocationFilter {
    pub function: Option<FunctionName>,
    pub state: Option<InvocationState>,
    pub event: Option<String>,
    /// Ids above this one.
    pub after: Option<InvocationId>,
    pub limit: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub ready: u64,
    pub running: u64,
    pub dead: u64,
    /// Arrival of the oldest invocation that is not dead.
    pub oldest: Option<UnixMs>,
    pub owed_uplink: u64,
    pub owed_local: u64,
    pub dead_deliveries: u64,
    pub oldest_owed: Option<UnixMs>,
    /// Dropped by `expires` since the database was made.
    pub expired: u64,
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

/// A handle; cloning it is cheap.
#[derive(Clone)]
pub struct Store {}

#[allow(unused_variables)]
impl Store {
    /// Opens or creates the database, migrates it, recovers leases, starts the writer thread.
    pub fn open(options: Options) -> Result<(Self, Recovered), StoreError> {
        todo!()
    }

    /// Commits what is queued, marks the stop as clean, ends the thread. Later calls get `Stopped`.
    pub async fn close(&self) {
        todo!()
    }

    /// Returns after the commit (fsync): only then may the sender be told.
    pub async fn accept(&self, arrival: Arrival) -> Result<Accepted, StoreError> {
        todo!()
    }

    /// Leases up to `limit` due invocations of each function named, oldest first. Expired ones
    /// are dropped and counted on the way.
    pub async fn lease(&self, wanted: Vec<(FunctionName, u32)>) -> Result<Vec<Leased>, StoreError> {
        todo!()
    }

    pub async fn settle(&self, id: InvocationId, settlement: Settlement) -> Result<(), StoreError> {
        todo!()
    }

    /// Functions that have a due invocation, and how long until the next one becomes due.
    pub async fn due(&self) -> Result<(Vec<FunctionName>, Option<Duration>), StoreError> {
        todo!()
    }

    /// What a synchronous call's output became; committed before the caller is answered.
    pub async fn owe(&self, deliveries: Vec<NewDelivery>, events: Vec<Arrival>) -> Result<(), StoreError> {
        todo!()
    }

    /// Living deliveries for one broker with ids above `after`, in order, at most `limit` and
    /// (but for the first) `bytes_max` of data.
    pub async fn owed(
        &self,
        target: Target,
        after: DeliveryId,
        limit: u32,
        bytes_max: u64,
    ) -> Result<Vec<Delivery>, StoreError> {
        todo!()
    }

    /// The broker has acknowledged these: they go.
    pub async fn delivered(&self, ids: Vec<DeliveryId>) -> Result<(), StoreError> {
        todo!()
    }

    /// Refused for good: kept as dead, with the reason; the queue moves on.
    pub async fn set_aside(&self, id: DeliveryId, reason: String) -> Result<(), StoreError> {
        todo!()
    }

    /// Counts a connection that ended while this delivery was alone in flight; returns the count.
    pub async fn lone_disconnect(&self, id: DeliveryId) -> Result<u32, StoreError> {
        todo!()
    }

    pub async fn functions(&self) -> Result<Vec<StoredFunction>, StoreError> {
        todo!()
    }

    /// The number and id range that `deploy` would give this function now.
    pub async fn next_revision(&self, name: FunctionName) -> Result<(u32, u32), StoreError> {
        todo!()
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
        todo!()
    }

    pub async fn set_paused(&self, name: FunctionName, paused: bool) -> Result<(), StoreError> {
        todo!()
    }

    /// The function goes, and its invocations and remembered retained values with it; its
    /// deliveries stay owed. Returns how many invocations went.
    pub async fn remove(&self, name: FunctionName) -> Result<u64, StoreError> {
        todo!()
    }

    pub async fn invocations(&self, filter: InvocationFilter) -> Result<Vec<InvocationRow>, StoreError> {
        todo!()
    }

    /// Invocations of one event, data included; by event id or sequence number.
    pub async fn event(&self, id: String) -> Result<Vec<InvocationRow>, StoreError> {
        todo!()
    }

    /// Dead invocations become ready again, attempts and losses from zero; returns how many.
    pub async fn redrive(&self, filter: InvocationFilter) -> Result<u64, StoreError> {
        todo!()
    }

    /// Removes dead invocations; returns how many.
    pub async fn purge(&self, filter: InvocationFilter) -> Result<u64, StoreError> {
        todo!()
    }

    pub async fn deliveries(
        &self,
        dead: bool,
        after: Option<DeliveryId>,
        limit: u32,
    ) -> Result<Vec<DeliveryRow>, StoreError> {
        todo!()
    }

    /// One delivery, data included.
    pub async fn delivery(&self, id: DeliveryId) -> Result<DeliveryRow, StoreError> {
        todo!()
    }

    /// Dead deliveries are owed again (all of them, or one); they join at the end of the queue.
    pub async fn redrive_deliveries(&self, id: Option<DeliveryId>) -> Result<u64, StoreError> {
        todo!()
    }

    pub async fn purge_deliveries(&self, id: Option<DeliveryId>) -> Result<u64, StoreError> {
        todo!()
    }

    pub async fn counts(&self) -> Result<Counts, StoreError> {
        todo!()
    }
}
