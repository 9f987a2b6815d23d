//! The channels on which the drivers meet. The daemon makes them; a driver holds one end and
//! knows nothing of who holds the other.

mod stock;
mod trial;

pub use stock::Stock;
pub use trial::{Trials, Verdict};

use crate::model::{CopyProgress, Event, Failure, FunctionName, Outcome, Revision};
use crate::net::http::{Passing, Returned};
use crate::watch::{Wake, Watch};
use smol::channel::{Receiver, Sender};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// One answer for one request.
pub type Reply<T> = Sender<T>;

/// A reply's two ends.
pub fn reply<T>() -> (Reply<T>, Receiver<T>) {
    smol::channel::bounded(1)
}

/// A synchronous call: ingress → scheduler. The receiver going away means that nobody waits
/// any longer: the instance is killed.
#[derive(Debug)]
pub struct Invoke {
    pub function: FunctionName,
    pub event: Event,
    /// The request as it came, when the function speaks HTTP itself: it is passed on, and the
    /// event's data is empty.
    pub passing: Option<Passing>,
    pub reply: Reply<Result<Response, CallError>>,
}

/// What a successful synchronous call returns, its deliveries already committed.
#[derive(Debug)]
pub enum Response {
    Output {
        output: Vec<u8>,
        took: Duration,
    },
    /// The function's own answer, whatever its status; its body may still be on its way.
    Passed(Returned),
}

#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("no function named `{0}`")]
    Unknown(FunctionName),
    #[error("function `{0}` is paused; `neap resume {0}` lets it run again")]
    Paused(FunctionName),
    /// 429 with Retry-After.
    #[error("function `{function}` is called more often than its [rate] allows")]
    TooFast { function: FunctionName, wait: Duration },
    /// 503 with Retry-After.
    #[error("no capacity: {why}")]
    NoCapacity { why: &'static str, wait: Duration },
    #[error("function failed: {failure}")]
    Failed { failure: Failure, output: Vec<u8> },
    /// 507: the output became deliveries that could not be stored.
    #[error("the function ran, but its output could not be stored")]
    NotStored(#[source] crate::store::StoreError),
    #[error("neap is stopping")]
    Stopping,
    /// The launcher was killed while the function ran.
    #[error("the instance was lost")]
    Lost,
}

/// A change of what is deployed: ingress (the control API) or reload → `deploy`.
#[derive(Debug)]
pub enum Command {
    /// A manifest's text, as `neap deploy` sends it; `file` is its name for messages.
    Deploy {
        file: String,
        manifest: String,
        reply: Reply<Result<Deployed, DeployError>>,
    },
    Remove {
        name: FunctionName,
        reply: Reply<Result<Removed, DeployError>>,
    },
    Pause {
        name: FunctionName,
        paused: bool,
        reply: Reply<Result<(), DeployError>>,
    },
    /// Configuration and functions_dir are read again.
    Reload {
        reply: Reply<Result<Reloaded, DeployError>>,
    },
    /// Functions that have one see it, and what lacked one is looked at again.
    SecretsChanged {
        reply: Reply<Result<(), DeployError>>,
    },
    /// So many instances are kept ready, in a new revision of the same image.
    Scale {
        name: FunctionName,
        min: u32,
        reply: Reply<Result<Deployed, DeployError>>,
    },
    /// Back to the revision before.
    Rollback {
        name: FunctionName,
        reply: Reply<Result<Deployed, DeployError>>,
    },
    /// One was imported or pulled: what waits for it, or ran on a damaged layer of it, is looked at.
    ImageCame,
    /// Removes images that no function needs, or tells which.
    CollectImages {
        dry_run: bool,
        reply: Reply<Result<crate::model::api::Collected, DeployError>>,
    },
    /// `neap run`: an image once, nothing deployed.
    Run {
        run: RunOnce,
        reply: Reply<Result<RunResult, DeployError>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Deployed {
    pub name: String,
    pub revision: u32,
    pub image: String,
    /// False: the same manifest and image were already deployed.
    pub changed: bool,
    /// What keeps it from working, though it is deployed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Removed {
    /// Invocations that went with the function.
    pub invocations: u64,
    /// Where its volumes are; they stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volumes: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Reloaded {
    pub deployed: Vec<Deployed>,
    pub removed: Vec<String>,
    /// One line for each mistake; what was deployed before stays.
    pub problems: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunOnce {
    pub image: String,
    pub command: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    /// Base64.
    pub data: String,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunResult {
    /// Both base64; stdout is bounded by the default limits.payload.
    pub stdout: String,
    pub stderr: String,
    pub failure: Option<String>,
    /// The exit code to pass on: 0, the function's own, or 128 + signal.
    pub code: i32,
    pub took_ms: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// Every mistake, each `file:line: what; what to do`.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
    #[error("no function named `{0}`")]
    Unknown(FunctionName),
    #[error("function `{name}` belongs to {}; change or remove that file and run `neap reload`", file.display())]
    OwnedByFile { name: FunctionName, file: PathBuf },
    #[error("no image `{0}` on this node; `neap image pull` or `neap image import` brings one")]
    NoImage(String),
    /// It was asked for, and did not come.
    #[error("pull image `{0}`: {1}")]
    NotPulled(String, String),
    #[error("function `{0}` has no revision before this one")]
    NothingBefore(FunctionName),
    #[error("{0}")]
    Failed(String),
}

/// Where a job that is cut off finds its copies again.
pub trait Progress: Send + Sync {
    fn known(&self) -> PastFuture<'_>;

    /// Returns when it is remembered, or can't be: then the copy may run again.
    fn ended(&self, copy: CopyProgress) -> NotedFuture<'_>;
}

/// Of a call, whose caller leaves when the daemon does.
pub struct NoProgress;

impl Progress for NoProgress {
    fn known(&self) -> PastFuture<'_> {
        Box::pin(async { Vec::new() })
    }

    fn ended(&self, _: CopyProgress) -> NotedFuture<'_> {
        Box::pin(async {})
    }
}

/// Runs invocations: what the scheduler asks of whoever owns containers. The daemon gives it
/// real instances, tests give it others.
pub trait Instances: Send + Sync + 'static {
    /// From the event to the outcome. Dropping the future kills the instance.
    fn run<'a>(&'a self, revision: &'a Revision, event: &'a Event, log: &'a LogLine) -> RunFuture<'a>;

    /// The same of a job, whose copies may have ended already.
    fn run_job<'a>(
        &'a self,
        revision: &'a Revision,
        event: &'a Event,
        progress: &'a dyn Progress,
        log: &'a LogLine,
    ) -> RunFuture<'a> {
        let _ = progress;
        self.run(revision, event, log)
    }

    /// A call to a handler that answers by itself. Returns when the answer's body has been handed
    /// over or has broken off; an answer that was not handed over is the outcome's output.
    fn exchange<'a>(
        &'a self,
        revision: &'a Revision,
        event: &'a Event,
        exchange: Exchange,
        log: &'a LogLine,
    ) -> RunFuture<'a> {
        drop(exchange);
        self.run(revision, event, log)
    }

    /// How many instances there are of functions that keep some, busy or not; those that are
    /// just starting or ending are counted too. Their memory stays reserved.
    fn kept(&self) -> Watch<Kept> {
        Watch::new(Kept::new())
    }

    /// Of a handler that stays up: so many instances are to be ready from now on, events or not.
    fn keep(&self, revision: &Revision, count: u32) {
        let _ = (revision, count);
    }

    /// Of a handler that stays up: returns when an instance is ready; why none gets so. That may
    /// take `limits.start`, and longer where all are busy.
    fn warm<'a>(&'a self, revision: &'a Revision) -> WarmFuture<'a> {
        let _ = revision;
        Box::pin(async { Ok(()) })
    }

    /// Memory is short: one that is idle may go. False: there is none.
    fn give_up_one(&self) -> bool {
        false
    }
    /// Creates an instance ahead of its event; an error is told as a whole.
    fn park<'a>(&'a self, revision: &'a Revision) -> ParkFuture<'a>;

    /// A revision that nothing new will run: its root may go.
    fn retire(&self, revision: &Revision);
}

/// Why no instance gets ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotReady {
    /// The function's own failure.
    Failed(String),
    /// The node's: another try may fare better.
    Lost,
}

/// Instances by function.
pub type Kept = BTreeMap<FunctionName, u32>;

/// A synchronous call whose answer may come in pieces.
#[derive(Debug)]
pub struct Exchange {
    /// As it came, to a function that speaks HTTP.
    pub passing: Option<Passing>,
    /// Gets the answer as soon as its head is there; nothing when the call fails before.
    pub answer: Sender<Returned>,
    /// The answer is needed whole, for the function's outputs: the outcome has its body and
    /// `answer` gets it again, both within `limits.payload`.
    pub whole: bool,
}

pub type RunFuture<'a> = Pin<Box<dyn Future<Output = Outcome> + Send + 'a>>;
pub type PastFuture<'a> = Pin<Box<dyn Future<Output = Vec<CopyProgress>> + Send + 'a>>;
pub type NotedFuture<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
pub type ParkFuture<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Parked>, String>> + Send + 'a>>;
pub type WarmFuture<'a> = Pin<Box<dyn Future<Output = Result<(), NotReady>> + Send + 'a>>;
pub type EndFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// An instance that waits for its one event. Dropping it removes it.
pub trait Parked: Send + Sync + 'static {
    /// Like `Instances::run`, for the revision it was made for; falls back to a new one when it
    /// has died unseen.
    fn run<'a>(self: Box<Self>, revision: &'a Revision, event: &'a Event, log: &'a LogLine) -> RunFuture<'a>;

    /// Until it has died by itself. Not to be waited for while it runs.
    fn ended(&self) -> EndFuture;
}

/// Takes what a function wrote to stderr: one line or more, without the last line break.
pub type LogLine = LogTo<'static>;
/// The same, for as long as what it writes to is there.
pub type LogTo<'a> = dyn Fn(&str) + Send + Sync + 'a;

/// A message from a broker: `sync::driver` → `ingress::mqtt`, in the order of arrival.
#[derive(Debug)]
pub struct Incoming {
    pub publish: crate::net::mqtt::Publish,
    /// MQTT 3.1.1 has no content type; structured CloudEvents are told by their looks there.
    pub old_version: bool,
    pub ack: Ack,
    /// Its share of `Room`, given back when the message is dropped.
    pub permit: Permit,
}

/// `ingress::mqtt` → `sync::driver`, in the order of arrival, one for each `Incoming`: its
/// events are committed, or it was dropped for good; the broker may be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// Packet ids mean something on their own connection only; acks for an earlier one come to
    /// nothing, and the broker sends the message again.
    pub connection: u64,
    /// Zero for QoS 0.
    pub pkid: u16,
}

/// Both ends of the way between one link and its ingress.
pub struct IncomingChannels {
    pub incoming: (Sender<Incoming>, Receiver<Incoming>),
    pub acks: (Sender<Ack>, Receiver<Ack>),
    pub room: Room,
}

/// Messages under way between a link and its ingress, commits included: enough for group
/// commits to be worth their fsync.
const INCOMING_MAX: usize = 256;
/// And their bytes; one larger message passes alone.
const INCOMING_BYTES_MAX: usize = 1 << 20;

impl IncomingChannels {
    pub fn new() -> Self {
        Self {
            // `room` is its bound: a link takes a share of it for each message that it hands on. A
            // bounded channel would be 50 KiB for each of two links, in use or not.
            incoming: smol::channel::unbounded(),
            // Never full: no more acks than messages under way.
            acks: smol::channel::bounded(INCOMING_MAX + 1),
            room: Room::new(INCOMING_MAX, INCOMING_BYTES_MAX),
        }
    }
}

impl Default for IncomingChannels {
    fn default() -> Self {
        Self::new()
    }
}

/// Room for messages under way, counted and in bytes. Who finds none waits; what waits is not
/// read from the socket.
#[derive(Clone, Debug)]
pub struct Room(Arc<RoomInner>);

#[derive(Debug)]
struct RoomInner {
    messages_max: usize,
    bytes_max: usize,
    messages: AtomicUsize,
    bytes: AtomicUsize,
    freed: Wake,
}

/// A share of a `Room`; dropping it gives it back.
#[derive(Debug)]
pub struct Permit {
    room: Arc<RoomInner>,
    bytes: usize,
}

impl Room {
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        let (messages, bytes) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Self(Arc::new(RoomInner { messages_max, bytes_max, messages, bytes, freed: Wake::new() }))
    }

    /// One message at a time may ask: a link has one reader.
    pub async fn take(&self, bytes: usize) -> Permit {
        loop {
            let freed = self.0.freed.listen();
            if let Some(permit) = self.try_take(bytes) {
                return permit;
            }
            freed.await;
        }
    }

    pub fn try_take(&self, bytes: usize) -> Option<Permit> {
        let (messages, used) =
            (self.0.messages.load(Ordering::Acquire), self.0.bytes.load(Ordering::Acquire));
        let fits = messages == 0 || (messages < self.0.messages_max && used + bytes <= self.0.bytes_max);
        fits.then(|| {
            self.0.messages.fetch_add(1, Ordering::AcqRel);
            self.0.bytes.fetch_add(bytes, Ordering::AcqRel);
            Permit { room: self.0.clone(), bytes }
        })
    }

    /// Messages under way.
    pub fn messages(&self) -> usize {
        self.0.messages.load(Ordering::Acquire)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.room.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.room.messages.fetch_sub(1, Ordering::AcqRel);
        self.room.freed.wake();
    }
}
