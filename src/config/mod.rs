//! neap.toml and function manifests: from text to checked values, every mistake reported at
//! once with file, line and the way out.
//!
//! Defaults stand in `defaults` and nowhere else. What a later version of neap will know is
//! refused as "not in this version", never ignored. Pure, but for `Machine::read`, which looks
//! at two small files.
//!
//! `file` reads neap.toml; `manifest`, `permissions` and `trigger` read manifests; both walk tables with
//! `reader` and report to `problem`; `together` compares manifests.

pub mod defaults;
mod file;
pub mod images;
pub mod machine;
pub mod manifest;
mod permissions;
mod problem;
mod reader;
#[cfg(test)]
mod tests;
mod together;
mod trigger;
pub mod units;
mod url;

pub use machine::Machine;
pub use problem::Problem;
pub use reader::TEXT_BYTES_MAX;
pub use together::{Deployable, check_together};

use crate::model::reach::Net;
use crate::model::{Target, TopicFilter, TopicTemplate};
use std::path::PathBuf;
use std::time::Duration;

/// A checked neap.toml.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub node: Node,
    pub http: Http,
    /// The broker on site; `None`: off.
    pub mqtt: Option<Broker>,
    pub uplink: Option<Uplink>,
    pub forwards: Vec<Forward>,
    pub buffer: Buffer,
    pub images: images::Images,
    pub trust: images::Trust,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub id: String,
    pub data_dir: PathBuf,
    pub run_dir: PathBuf,
    pub functions_dir: PathBuf,
    /// Below the cgroup root, without a leading slash: `neap`.
    pub cgroup: String,
    /// What all instances together may reserve.
    pub memory: MemoryShare,
    pub user_namespaces: UserNamespaces,
    pub limits: LimitsWanted,
    /// Where instances with a way out get their addresses from.
    pub egress_range: Net,
    /// Directories that functions may mount, and what is below them.
    pub mounts: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryShare {
    Percent(u8),
    Bytes(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserNamespaces {
    Require,
    Prefer,
}

/// Of memory and processes: a function without them could take the whole machine down. That the
/// CPU can't be limited is only told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitsWanted {
    Require,
    Prefer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Http {
    pub listen: std::net::SocketAddr,
    pub token_file: Option<PathBuf>,
    pub auth_functions: bool,
    pub tls: Option<ServerTls>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTls {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub client_ca: Option<PathBuf>,
}

/// How to reach an MQTT broker. Files are read again at every connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broker {
    pub host: String,
    pub port: u16,
    /// `mqtts://`
    pub tls: Option<ClientTls>,
    pub version: MqttVersion,
    /// `{node}` already filled in.
    pub client_id: String,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// `None`: the system's roots.
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub alpn: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MqttVersion {
    /// 5, else 3.1.1.
    Auto,
    V311,
    V5,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    pub remote: Remote,
    /// For outputs without a topic of their own.
    pub topic: TopicTemplate,
    pub format: Format,
    pub limits: UplinkLimits,
}

/// What is at the other end of the uplink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    Mqtt(Broker),
    Https(Receiver),
}

/// Takes batches of CloudEvents by POST. Files are read again at every connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receiver {
    pub host: String,
    pub port: u16,
    /// Path and query, as the URL has them.
    pub target: String,
    pub tls: ClientTls,
    pub username: Option<String>,
    pub password_file: Option<PathBuf>,
    /// Sent as `Authorization: Bearer …`.
    pub token_file: Option<PathBuf>,
}

/// For links that cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UplinkLimits {
    /// When the backlog may drain, on the node's clock in UTC; `None`: always.
    pub window: Option<DayWindow>,
    /// 0: no cap.
    pub bytes_per_day: u64,
}

/// A span of each day, in minutes from midnight UTC; `until` lies on the next day when it is
/// not after `from`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DayWindow {
    pub from: u16,
    pub until: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// CloudEvents: binary on MQTT 5, structured on 3.1.1.
    Auto,
    /// The data alone.
    Raw,
}

/// Store and forward as it is, no function between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// On the `[mqtt]` broker.
    pub filter: TopicFilter,
    /// On the uplink.
    pub topic: TopicTemplate,
}

/// What gives way when there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// What is new: it is not acknowledged.
    Reject,
    DropOldest,
    /// The oldest of the lowest lane, what is new included.
    DropLowestPriority,
}

/// In which order deliveries go out after the uplink was away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// What is fresh at once, the backlog behind it at a share, each by lane.
    LiveFirst,
    /// As they came.
    Fifo,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Database size at which ingestion is refused (inbox and outbox together).
    pub bytes_max: u64,
    /// Older entries are dropped; zero: none is.
    pub age_max: Duration,
    /// Entries of inbox and outbox; 0: as many as have room.
    pub events_max: u64,
    pub when_full: WhenFull,
    pub order: Order,
    /// Of what is sent while a backlog drains: so much is fresh, when there is as much.
    pub live_percent: u8,
    pub commit_window: Duration,
}

impl Config {
    /// Reads a neap.toml; `file` is its name in messages.
    pub fn parse(file: &str, text: &str, machine: &Machine) -> Result<Self, Vec<Problem>> {
        let (config, problems) = Self::read(file, text, machine);
        if problems.is_empty() { Ok(config) } else { Err(problems) }
    }

    /// As far as it can be read, and what is wrong with it: to check further with, never to run.
    pub fn read(file: &str, text: &str, machine: &Machine) -> (Self, Vec<Problem>) {
        file::read(file, text, machine)
    }

    /// What an empty neap.toml means.
    pub fn defaults(machine: &Machine) -> Self {
        defaults::config(machine)
    }

    /// The same with everything that a manifest may need: to read one that was deployed under
    /// another configuration. Nothing is ever run by it.
    pub fn permissive(&self) -> Self {
        let broker = Broker {
            host: String::new(),
            port: 0,
            tls: None,
            version: MqttVersion::Auto,
            client_id: String::new(),
            username: None,
            password_file: None,
        };
        let uplink = Uplink {
            remote: Remote::Mqtt(broker.clone()),
            topic: defaults::uplink_topic(),
            format: Format::Auto,
            limits: UplinkLimits::default(),
        };
        let mut permissive = self.clone();
        permissive.mqtt.get_or_insert(broker);
        match &mut permissive.uplink {
            Some(there) if matches!(there.remote, Remote::Mqtt(_)) => {}
            other => *other = Some(uplink),
        }
        permissive.http.token_file.get_or_insert_with(PathBuf::new);
        permissive.node.memory = MemoryShare::Percent(100);
        permissive.node.mounts = vec![PathBuf::from("/")];
        permissive
    }

    pub fn broker(&self, target: Target) -> Option<&Broker> {
        match target {
            Target::Local => self.mqtt.as_ref(),
            Target::Uplink => match self.uplink.as_ref().map(|uplink| &uplink.remote) {
                Some(Remote::Mqtt(broker)) => Some(broker),
                Some(Remote::Https(_)) | None => None,
            },
            Target::Callback => None,
        }
    }

    /// Whether deliveries for this target have somewhere to go.
    pub fn delivers(&self, target: Target) -> bool {
        match target {
            Target::Local => self.mqtt.is_some(),
            Target::Uplink => self.uplink.is_some(),
            Target::Callback => true,
        }
    }
}
