//! A function as its manifest describes it, checked and with defaults filled in, and the
//! revision that pins it to one image digest. `config::manifest` makes these from TOML.

use super::{
    Digest, Failure, FunctionName, Lane, Permissions, Reference, Schedule, TopicFilter, TopicTemplate,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// A checked manifest. Defaults stand in `config::manifest`, nowhere else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Manifest {
    pub name: FunctionName,
    pub image: Reference,
    pub pull: Pull,
    pub rollback: Rollback,
    pub handler: Handler,
    /// Whose contract the image was made for.
    pub platform: Platform,
    /// What a handler that stays up between events needs to know.
    pub serving: Serving,
    /// The lane of its events and deliveries.
    pub priority: Lane,
    /// Replaces the image's entrypoint and cmd.
    pub command: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    #[serde(flatten)]
    pub permissions: Permissions,
    pub limits: Limits,
    pub scale: Scale,
    pub retry: Retry,
    /// `None`: as often as there are instances for it.
    pub rate: Option<Rate>,
    pub triggers: Vec<Trigger>,
    pub outputs: Vec<Output>,
    #[serde(flatten)]
    pub marks: Marks,
}

/// What tools write on a function and read again; it means nothing to the node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Marks {
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// Instances that one event takes at once: of a job, as many of its copies as `scale.max` and
    /// the memory that the node may reserve allow.
    pub fn instances_each(&self, budget_bytes: u64) -> u32 {
        if self.handler != Handler::Job {
            return 1;
        }
        let fit = budget_bytes / self.limits.memory_bytes.max(1);
        let fit = u32::try_from(fit).unwrap_or(u32::MAX);
        self.scale.copies.min(self.scale.max).min(fit).max(1)
    }
}

/// When a registry is asked for the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pull {
    /// When it is not on the node.
    Missing,
    Never,
    /// At each deploy.
    Always,
}

/// What becomes of a new revision that fails at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rollback {
    /// It gives way to the old one.
    Auto,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Handler {
    /// One fresh container for each event: data on stdin, output on stdout.
    Stdio,
    /// A container that listens on a port; each event is an HTTP request.
    Http,
    /// A container that asks the Lambda Runtime API for events.
    Lambda,
    /// Containers that run to their end, several for one event.
    Job,
}

impl Handler {
    pub fn word(self) -> &'static str {
        match self {
            Self::Stdio => "stdio",
            Self::Http => "http",
            Self::Lambda => "lambda",
            Self::Job => "job",
        }
    }

    /// Instances outlive their events.
    pub fn stays_up(self) -> bool {
        matches!(self, Self::Http | Self::Lambda)
    }
}

/// A platform whose functions run here as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Platform {
    None,
    Knative,
    Openfaas,
    Lambda,
    Fc,
    Fission,
    Azure,
}

impl Platform {
    pub fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Knative => "knative",
            Self::Openfaas => "openfaas",
            Self::Lambda => "lambda",
            Self::Fc => "fc",
            Self::Fission => "fission",
            Self::Azure => "azure",
        }
    }

    /// What its functions are, when the manifest doesn't say.
    pub fn handler(self) -> Handler {
        match self {
            Self::None => Handler::Stdio,
            Self::Lambda => Handler::Lambda,
            Self::Knative | Self::Openfaas | Self::Fc | Self::Fission | Self::Azure => Handler::Http,
        }
    }

    /// Whether a function of this platform may have that handler. Cloud Run has jobs too.
    pub fn has(self, handler: Handler) -> bool {
        match self {
            Self::None => true,
            Self::Knative if handler == Handler::Job => true,
            other => other.handler() == handler,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Serving {
    /// `None`: the platform's.
    pub port: Option<u16>,
    /// A path that answers 200 when the instance is ready. `None`: the platform's, else it is
    /// ready when its port takes a connection.
    pub ready: Option<String>,
    /// To be ready in.
    #[serde(serialize_with = "as_millis")]
    pub start: Duration,
    /// An idle instance is removed after this.
    #[serde(serialize_with = "as_millis")]
    pub idle: Duration,
    /// Invocations at once in one instance.
    pub concurrency: u32,
    /// lambda: calls over HTTP come as a Function URL's events.
    pub function_url: bool,
    /// lambda: what the image has in /opt/extensions is started.
    pub extensions: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Limits {
    pub memory_bytes: u64,
    /// Thousandths of a CPU: 500 is `cpu = 0.5`.
    pub cpu_millis: u32,
    pub pids: u32,
    #[serde(serialize_with = "as_millis")]
    pub timeout: Duration,
    /// Event data and output, each.
    pub payload_bytes: u64,
    /// What /tmp may take; memory-backed, inside `memory_bytes`.
    pub disk_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Scale {
    /// Instances kept ready: created ahead, started by an event.
    pub min: ScaleMin,
    /// Instances at once.
    pub max: u32,
    /// Of handler job: how many run for each event.
    pub copies: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleMin {
    Fixed(u32),
    /// As many as the function's own arrivals call for, none while it is silent.
    Auto,
}

impl Serialize for ScaleMin {
    /// As the manifest has it.
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Fixed(count) => s.serialize_u32(*count),
            Self::Auto => s.serialize_str("auto"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Retry {
    /// Attempts in all, the first included; at least 1.
    pub attempts: u32,
    #[serde(serialize_with = "as_millis")]
    pub backoff: Duration,
    #[serde(serialize_with = "as_millis")]
    pub backoff_max: Duration,
    /// HTTP statuses of a function's answer that are worth another attempt, instead of those that
    /// `Failure::retryable` names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codes: Option<Vec<u16>>,
}

impl Retry {
    /// Whether another attempt could end differently.
    pub fn is_worth(&self, failure: &Failure) -> bool {
        match (failure, &self.codes) {
            (Failure::Status(status), Some(codes)) => codes.contains(status),
            _ => failure.retryable(),
        }
    }
}

/// How often it may start: a token bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rate {
    /// Thousandths of a start: 50,000 is `per_second = 50`.
    pub per_second_millis: u32,
    /// Starts that may come at once after a rest; at least 1.
    pub burst: u32,
}

/// A rule that turns something outside into an event for the function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Trigger {
    Mqtt(MqttTrigger),
    Http(HttpTrigger),
    Cron(Box<CronTrigger>),
    /// A CloudEvents type that another function's output made.
    Event {
        #[serde(rename = "type")]
        kind: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MqttTrigger {
    pub filter: TopicFilter,
    /// 0 or 1.
    pub qos: u8,
    pub from: super::Target,
    /// Events older than this when their turn comes are dropped and counted.
    pub expires: Option<Duration>,
    pub retained: Retained,
}

/// What becomes of retained messages that a subscription brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Retained {
    /// Once per value.
    New,
    Each,
    Ignore,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HttpTrigger {
    /// Begins with `/`; matches this path only.
    pub path: String,
    /// Upper case; empty means every method.
    pub methods: Vec<String>,
    /// `auth = "token"`.
    pub token: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CronTrigger {
    #[serde(flatten)]
    pub schedule: Schedule,
    pub missed: Missed,
}

/// What becomes of ticks that fell into downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missed {
    Skip,
    /// However many they were.
    Once,
}

/// What a successful outcome's output becomes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "to", rename_all = "lowercase")]
pub enum Output {
    /// A delivery; without a topic of its own `[uplink] topic` is used.
    Uplink { topic: Option<TopicTemplate> },
    /// Published to the `[mqtt]` broker.
    Local { topic: TopicTemplate },
    /// An event on the node.
    Event {
        #[serde(rename = "type")]
        kind: String,
    },
}

/// One immutable version of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Revision {
    /// Counts up from 1 for each function, never reused.
    pub number: u32,
    pub manifest: Manifest,
    /// The image's manifest digest that this revision pins.
    pub image: Digest,
    /// First of the 65,536 host ids that the function's user namespace maps; stable per function.
    pub uid_base: u32,
}

impl Revision {
    /// Names the revision's root and, in front of the dot, its containers' host name.
    pub fn key(&self) -> String {
        format!("{}.{}", self.manifest.name, self.number)
    }

    pub fn name(&self) -> &FunctionName {
        &self.manifest.name
    }
}

/// What a function is doing at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionLoad {
    /// Instances that wait for their event.
    pub parked: u32,
    pub running: u32,
    /// Synchronous calls that wait for an instance.
    pub waiting: u32,
}

/// First host id of the first function's range: above what systemd and Debian hand out
/// (systemd's "UIDs and GIDs" table ends its container range at 1,879,048,191).
pub const UID_BASE_FIRST: u32 = 1_879_048_192;
pub const UID_RANGE: u32 = 65_536;
/// Functions that can have a range of their own below 2^31, where kernels and tools agree on ids.
pub const FUNCTIONS_MAX: u32 = (i32::MAX as u32 - UID_BASE_FIRST) / UID_RANGE;

fn as_millis<S: serde::Serializer>(time: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u64(time.as_millis() as u64)
}
