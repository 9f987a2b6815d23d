//! The shapes of `/v1/…`, which the HTTP server writes and the command line reads. JSON.
//! Fields are only ever added. Errors are `Problem` (RFC 9457).
//!
//! | method, path | body | answer |
//! |---|---|---|
//! | GET `/v1/status` | | `Status` |
//! | POST `/v1/reload` | | `channels::Reloaded` |
//! | POST `/v1/run` | `channels::RunOnce` | `channels::RunResult` |
//! | GET `/v1/functions` | | `[FunctionSummary]` |
//! | POST `/v1/functions?file=NAME` | the manifest's TOML | `channels::Deployed`; 400 with `Problem::errors` |
//! | GET `/v1/functions/{name}` | | `FunctionDetail` |
//! | DELETE `/v1/functions/{name}` | | `channels::Removed` |
//! | POST `/v1/functions/{name}/pause`, `/resume` | | 204 |
//! | POST `/v1/functions/{name}/rollback` | | `channels::Deployed` |
//! | GET `/v1/functions/{name}/logs?follow=1&tail=N&since=UNIX_MS&event=ID` | | `LogLine` as NDJSON, chunked |
//! | GET `/v1/images` | | `[ImageSummary]` |
//! | POST `/v1/images?name=REF` | a tar stream | `Progress` as NDJSON, chunked; the last line holds `done` or `error` |
//! | POST `/v1/pull?name=REF` | | `Progress`, in the same way |
//! | POST `/v1/collect?dry_run=1` | | `Collected`: images that no function needs |
//! | GET `/v1/images/{reference or digest, percent-encoded}` | | `ImageDetail` |
//! | DELETE `/v1/images/{same}` | | 204; 409 when a function needs it |
//! | GET `/v1/secrets` | | `[SecretSummary]`; what is in them is never told |
//! | PUT `/v1/secrets/{name}` | the secret, as it is | 204 |
//! | DELETE `/v1/secrets/{name}` | | 204; 409 when a function needs it |
//! | GET `/v1/events?state=&function=&after=ID&limit=N` | | `[EventSummary]` |
//! | GET `/v1/events/{id}` | | `[EventDetail]`: one for each function |
//! | POST `/v1/events/redrive?event=ID\|function=NAME\|all=1` | | `Count` |
//! | POST `/v1/events/purge?event=ID\|function=NAME\|all=1` | | `Count`: dead ones only |
//! | GET `/v1/deliveries?dead=1&after=ID&limit=N` | | `[DeliverySummary]` |
//! | GET `/v1/deliveries/{id}` | | `DeliveryDetail` |
//! | POST `/v1/deliveries/redrive?id=N\|all=1`, `/purge?id=N\|all=1` | | `Count` |
//!
//! Invoking goes through `/function/{name}` and `/async-function/{name}`.

use super::{EventId, UnixMs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `application/problem+json` (RFC 9457).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    pub title: String,
    pub status: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Every mistake of a refused manifest, a line each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSummary {
    pub name: String,
    pub bytes: u64,
    pub changed: UnixMs,
    /// Functions whose manifests name it.
    pub used_by: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub node: String,
    pub uptime_ms: u64,
    pub links: Vec<LinkStatus>,
    pub inbox: QueueStatus,
    pub outbox: QueueStatus,
    pub dead_events: u64,
    pub dead_deliveries: u64,
    /// Events dropped by `expires`.
    pub expired: u64,
    /// Entries dropped by `[buffer] when_full`, and by `max_age`.
    #[serde(default)]
    pub dropped_full: u64,
    #[serde(default)]
    pub dropped_age: u64,
    /// What new events find no room for: `max_bytes`, `max_events` or `disk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<String>,
    pub database_bytes: u64,
    pub database_bytes_max: u64,
    pub disk_free_bytes: u64,
    /// Reserved by the limits of running instances and by parked ones, and what may be reserved.
    pub memory_reserved_bytes: u64,
    pub memory_budget_bytes: u64,
    pub instances: u64,
    /// Instances that wait for their event.
    #[serde(default)]
    pub parked: u64,
    pub functions: Vec<FunctionSummary>,
    /// What the node works without, a line each (`neap doctor` says more).
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct LinkStatus {
    /// `mqtt` or `uplink`
    pub name: String,
    pub url: String,
    /// `up`, `connecting`, `waiting`, `off`
    pub state: String,
    pub since: UnixMs,
    pub last_error: Option<String>,
    pub retry_in_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QueueStatus {
    pub depth: u64,
    /// Of the oldest entry; `None` when it is empty.
    pub age_ms: Option<u64>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FunctionSummary {
    pub name: String,
    pub revision: u32,
    pub image: String,
    pub handler: String,
    /// `ready`, `paused`, or `failed: why`
    pub state: String,
    pub triggers: Vec<String>,
    /// Instances that wait for their event.
    #[serde(default)]
    pub parked: u64,
    /// Events that wait.
    pub queued: u64,
    /// Synchronous calls that wait.
    #[serde(default)]
    pub waiting: u64,
    pub running: u64,
    pub dead: u64,
    pub succeeded: u64,
    pub failed: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FunctionDetail {
    #[serde(flatten)]
    pub summary: FunctionSummary,
    pub image_digest: String,
    pub created: UnixMs,
    /// The file in functions_dir that owns it.
    pub file: Option<String>,
    pub uid_base: u32,
    /// What `neap rollback` would go back to.
    #[serde(default)]
    pub previous: Option<PreviousRevision>,
    /// Why this revision took the place of a newer one.
    #[serde(default)]
    pub rolled_back: Option<String>,
    /// The checked manifest, defaults filled in.
    pub manifest: serde_json::Value,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PreviousRevision {
    pub revision: u32,
    pub image_digest: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub time: UnixMs,
    /// The invocation's event.
    pub event: EventId,
    pub text: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    pub references: Vec<String>,
    pub digest: String,
    /// `linux/arm64`
    pub platform: String,
    /// Unpacked, layers counted once.
    pub bytes: u64,
    pub imported: UnixMs,
    /// Functions whose current revision pins it.
    pub used_by: Vec<String>,
    /// Not here yet: digest and platform are empty, `imported` is when it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull: Option<PullStatus>,
}

/// An image on its way from a registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullStatus {
    /// `waiting`, `window`, `fetching`, `unpacking`, `resting`
    pub state: String,
    /// Of the layers that were not here.
    pub bytes: u64,
    pub of: u64,
    pub last_error: Option<String>,
    pub retry_in_ms: Option<u64>,
}

/// What a garbage collection removed, or would remove.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    pub dry_run: bool,
    pub images: Vec<ImageSummary>,
    /// Of layers that went with them, and of blobs that nobody came back for.
    pub bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDetail {
    #[serde(flatten)]
    pub summary: ImageSummary,
    /// Why it was taken, a line for each name that it came in under.
    #[serde(default)]
    pub trust: Vec<String>,
    pub layers: Vec<LayerDetail>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub env: Vec<String>,
    pub user: String,
    pub working_dir: String,
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDetail {
    pub diff_id: String,
    pub bytes: u64,
}

/// One line of an import's answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// Of a pull: why it waits, and for how long.
    Waiting {
        why: String,
        ms: u64,
    },
    /// Of a pull: bytes of the layers that are here, and that there will be.
    Fetching {
        bytes: u64,
        of: u64,
    },
    /// Bytes of the archive read so far.
    Read(u64),
    Unpacking {
        layer: u32,
        of: u32,
        digest: String,
    },
    /// For example a device node that was left out.
    Warning(String),
    Done(ImageSummary),
    Error(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventSummary {
    pub id: String,
    pub seq: i64,
    pub function: String,
    /// `ready`, `running`, `dead`; `damaged`: bits have flipped in it, `last_error` says which
    /// column, and nothing else is known but its place
    pub state: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub subject: Option<String>,
    pub arrived: UnixMs,
    pub attempts: u32,
    pub lost: u32,
    pub due_in_ms: u64,
    pub last_error: Option<String>,
    pub data_bytes: u64,
    /// The listing's position: pass as `after`.
    pub invocation: i64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EventDetail {
    #[serde(flatten)]
    pub summary: EventSummary,
    pub source: String,
    pub time: Option<String>,
    pub datacontenttype: Option<String>,
    pub extensions: BTreeMap<String, String>,
    pub data_base64: String,
    pub last_output_base64: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeliverySummary {
    pub id: i64,
    /// `uplink` or `local`
    pub target: String,
    pub function: Option<String>,
    pub topic: String,
    pub event: String,
    pub created: UnixMs,
    /// Why it is dead. `damaged: …`: bits have flipped in it, and nothing else is known but its id.
    pub dead: Option<String>,
    pub data_bytes: u64,
}

impl EventSummary {
    pub fn damaged(invocation: i64, why: &str) -> Self {
        Self {
            id: String::new(),
            seq: 0,
            function: String::new(),
            state: "damaged".to_owned(),
            kind: String::new(),
            subject: None,
            arrived: UnixMs(0),
            attempts: 0,
            lost: 0,
            due_in_ms: 0,
            last_error: Some(why.to_owned()),
            data_bytes: 0,
            invocation,
        }
    }
}

impl DeliverySummary {
    pub fn damaged(id: i64, why: &str) -> Self {
        Self {
            id,
            target: String::new(),
            function: None,
            topic: String::new(),
            event: String::new(),
            created: UnixMs(0),
            dead: Some(format!("damaged: {why}")),
            data_bytes: 0,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeliveryDetail {
    #[serde(flatten)]
    pub summary: DeliverySummary,
    pub source: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub data_base64: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    pub count: u64,
}

/// A line of `neap doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `cgroup`, `overlayfs`, `user namespaces`, …
    pub name: String,
    pub level: Level,
    pub found: String,
    /// What to do; empty when all is well.
    pub advice: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    Warning,
    Failing,
}
