//! Everything that knows libcontainer: the launcher process and the daemon's client of it.
//!
//! ```text
//!  daemon                        launcher (pid 1 of its namespace)    a maker for each create
//!  Runtime ── client ── session ──── wire ──── launcher ─────────────── maker ── libcontainer ── container
//!              │                                 ├ enclosure              ├ mounts, limits, spec,    │
//!              │                                 ├ cgroup (unified)       │ netns                    │
//!              │                                 └ rootfs (layers,        │                          │
//!              │                                   image_root, own_layer, └ executor, seccomp, ──────┤
//!              └ instance (Parked, Running)        user)                    extensions               │
//!                   │                                                       (in the container)       │
//!                   └─────────────────────── the event's environment ────────────────────────────────┘
//! ```
//!
//! A container is created ahead (`Parked`: all is done but execve), then started with its event's
//! environment (`Running`), then waited for. Dropping either kills it; the launcher removes what
//! is left. When the launcher dies, by whatever signal, all its containers die and end as
//! `Exit::Lost`, and another is started.
//!
//! What stays up between events is reached past the launcher: `inside`, its sockets and freezer.
//!
//! A way out (`allow.network = "egress"`) is the launcher's too: `egress`, which speaks to the
//! kernel by `netlink`. Names are the daemon's: `names`, with `dns` for the messages.

pub mod available;
mod cgroup;
mod client;
mod devices;
mod dns;
mod egress;
mod enclosure;
mod executor;
mod extensions;
mod image_root;
mod inside;
mod instance;
pub mod launcher;
mod layers;
mod limits;
mod maker;
mod mounted_volumes;
mod mounts;
mod names;
mod netlink;
mod netns;
mod node_volumes;
mod own_layer;
pub mod pressure;
pub mod probe;
mod rootfs;
mod seccomp;
mod secret_files;
mod session;
mod spec;
mod sys;
mod unified;
mod user;
pub mod volumes;
mod wire;

pub use cgroup::Usage;
pub use extensions::Extensions;
pub use inside::Inside;

use crate::config::{LimitsWanted, UserNamespaces};
use crate::model::Permissions;
use crate::model::function::Limits;
use crate::model::permissions::NodeVolume;
use crate::model::reach::Net;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

pub use sys::{forget_code, forget_stack};

#[derive(Clone, Debug)]
pub struct Settings {
    /// The neap binary: started again as `neap launcher`.
    pub exe: PathBuf,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    /// `[node] cgroup`: the parent of all instances; only what this data_dir made is swept.
    pub cgroup: String,
    pub user_namespaces: UserNamespaces,
    pub limits: LimitsWanted,
    /// `[node] egress_range`.
    pub egress_range: Net,
}

/// What an instance is made from; mounted once per revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Unique among revisions: `thermostat.3`.
    pub key: String,
    /// Unpacked layer directories, lowest first.
    pub layers: Vec<PathBuf>,
    /// First host id of the function's user namespace.
    pub uid_base: u32,
    /// argv; looked up in the image's PATH as execvp does.
    pub command: Vec<String>,
    /// `K=V`, the image's and the manifest's.
    pub env: Vec<String>,
    /// As in the image's config.
    pub user: String,
    pub working_dir: String,
    pub limits: Limits,
    pub permissions: Permissions,
    /// Absolute; each holds the function's secrets as files.
    pub secret_dirs: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The image or manifest's fault: no such command, user or directory.
    #[error("{0}")]
    Unusable(String),
    /// `allow.network = "egress"` can't be had on this machine now; not the function's fault.
    #[error("{0}")]
    NoWayOut(String),
    /// The launcher died; it is being started again.
    #[error("the launcher was lost")]
    Lost,
    #[error("{0}")]
    Launcher(String),
    /// What can't be limited here, each with its reason.
    #[error("{0}or set `limits = \"prefer\"` in [node] to run functions that may take the whole machine")]
    Unlimited(String),
    #[error("{doing}")]
    Io {
        doing: String,
        #[source]
        source: std::io::Error,
    },
}

/// How a container's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// Killed by the kernel at its memory limit.
    OutOfMemory,
    /// The launcher died with it.
    Lost,
}

impl RuntimeError {
    fn io(doing: &str) -> impl FnOnce(std::io::Error) -> Self {
        let doing = doing.to_owned();
        move |source| Self::Io { doing, source }
    }
}

/// The daemon's handle on the launcher; cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    client: Arc<client::Client>,
}

/// A container that is created and waits for its start signal. Dropping it removes it.
pub struct Parked {
    /// Unique on this node for this boot; also the cgroup's name.
    pub id: String,
    inside: Box<instance::ParkedInside>,
}

/// A container that runs. Dropping it kills it. The pipes are the daemon's ends.
pub struct Running {
    pub stdin: Option<smol::Async<std::fs::File>>,
    pub stdout: Option<smol::Async<std::fs::File>>,
    pub stderr: Option<smol::Async<std::fs::File>>,
    inside: instance::RunningInside,
}

impl Runtime {
    /// Sweeps what a killed daemon left, starts the launcher. To be called on a thread that lives as
    /// long as the daemon: the launcher dies with the one that started it (PR_SET_PDEATHSIG).
    pub fn start(settings: Settings) -> Result<Self, RuntimeError> {
        Ok(Self { client: client::Client::start(settings)? })
    }

    /// Reads answers, watches the launcher, starts another when it dies (roots are prepared
    /// again by themselves). Spawned once, where the same holds; ends after `stop`.
    pub async fn drive(&self) {
        self.client.drive().await;
    }

    /// Makes a revision's root ready: id map, overlay, user, command. Idempotent.
    pub async fn prepare(&self, root: Root) -> Result<(), RuntimeError> {
        self.client.prepare(&root).await
    }

    /// Keys of the revisions whose layers are mounted: their images must stay.
    pub fn prepared(&self) -> Vec<String> {
        self.client.prepared()
    }

    /// Whether the directories of the node that a function mounts are there.
    pub async fn look_for(&self, volumes: &[NodeVolume]) -> Result<(), RuntimeError> {
        self.client.node_volumes.open(volumes).await.map(drop)
    }

    /// The revision is no longer needed; running instances keep its root until they end.
    pub async fn release(&self, key: &str) {
        self.client.release(key).await;
    }

    /// From a revision that was prepared. Waits while a launcher is being started again.
    pub async fn create(&self, key: &str) -> Result<Parked, RuntimeError> {
        self.client.create(key).await
    }

    /// What the daemon may do to the instance by itself, from now until it ends.
    pub fn inside(&self, parked: &Parked) -> Result<Inside, RuntimeError> {
        self.client.inside(&parked.inside.instance)
    }

    /// Kills every instance, ends the launcher, removes cgroups and run files.
    pub async fn stop(&self) {
        self.client.stop().await;
    }

    /// A secret was set: functions that have it see it, also those that run.
    pub async fn refresh_secrets(&self) {
        self.client.refresh_secrets().await;
    }

    /// What the instances of each function use that has any, parked ones included.
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        self.client.usage()
    }

    /// Firewalls of others that drop what functions with `allow.network = "egress"` send, a line each
    /// with the way out. Asks the kernel, each time.
    pub fn hindrances() -> Vec<String> {
        let told = |egress::Hindrance { chain, advice }: egress::Hindrance| {
            format!(
                "the firewall's chain {chain} drops what functions with network = \"egress\" send; {advice}"
            )
        };
        egress::hindrances().into_iter().map(told).collect()
    }

    /// What this kernel lacks and what neap does instead, a line each.
    pub fn warnings(&self) -> Vec<String> {
        self.client.warnings()
    }
}

impl Parked {
    /// Until it has ended though nobody started it: killed from outside, or with its launcher.
    /// Whoever starts it stops waiting for this first.
    pub fn ended(&self) -> impl Future<Output = ()> + Send + 'static {
        let exit = self.inside.instance.exit.clone();
        async move {
            let _ = exit.recv().await;
        }
    }

    /// Executes the command with `env` added to the root's. Returns when it is being executed:
    /// a command that can't be is an error that names it.
    pub async fn start(self, env: Vec<(String, String)>) -> Result<Running, RuntimeError> {
        Ok(self.inside.start(&env, executor::First::Command).await?.0)
    }

    /// The same of a Lambda function: returns when what its image has in /opt/extensions runs, and
    /// the command with `Extensions::go_on`; without any it is being executed.
    pub async fn start_with_extensions(
        self,
        env: Vec<(String, String)>,
    ) -> Result<(Running, Option<Extensions>), RuntimeError> {
        self.inside.start(&env, executor::First::Extensions).await
    }
}

impl Running {
    /// Any number of times; the answer stays the same.
    pub async fn wait(&mut self) -> Exit {
        self.inside.wait().await
    }

    /// To the container's first process; nothing when it has already ended. As pid 1 of its
    /// namespace it ignores what it has no handler for, but SIGKILL.
    pub fn signal(&self, signal: i32) {
        self.inside.signal(signal);
    }
}
