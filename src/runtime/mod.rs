//! Everything that knows libcontainer: the launcher process and the daemon's client of it.

pub mod launcher;
pub mod probe;

use crate::config::UserNamespaces;
use crate::model::function::Limits;
use std::path::PathBuf;

#[derive(Clone, Debug)]
pub struct Settings {
    /// The neap binary: started again as `neap launcher`.
    pub exe: PathBuf,
    pub run_dir: PathBuf,
    pub data_dir: PathBuf,
    /// `[node] cgroup`: the parent of all instances; only what this data_dir made is swept.
    pub cgroup: String,
    pub user_namespaces: UserNamespaces,
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
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The image or manifest's fault: no such command, user or directory.
    #[error("{0}")]
    Unusable(String),
    /// The launcher died; it is being started again.
    #[error("the launcher was lost")]
    Lost,
    #[error("{0}")]
    Launcher(String),
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

/// The daemon's handle on the launcher; cheap to clone.
#[derive(Clone)]
pub struct Runtime {}

/// A container that is created and waits for its start signal. Dropping it removes it.
pub struct Parked {
    /// Unique on this node for this boot; also the cgroup's name.
    pub id: String,
}

/// A container that runs. Dropping it kills it. The pipes are the daemon's ends.
pub struct Running {
    pub stdin: Option<smol::Async<std::fs::File>>,
    pub stdout: Option<smol::Async<std::fs::File>>,
    pub stderr: Option<smol::Async<std::fs::File>>,
}

#[allow(unused_variables)]
impl Runtime {
    /// Sweeps what a killed daemon left, starts the launcher. To be called on the main thread:
    /// the launcher dies with the thread that started it (PR_SET_PDEATHSIG).
    pub fn start(settings: Settings) -> Result<Self, RuntimeError> {
        todo!()
    }

    /// Reads answers, watches the launcher, starts another when it dies (roots are prepared
    /// again by themselves). Spawned once on the main thread's executor; ends after `stop`.
    pub async fn drive(&self) {
        todo!()
    }

    /// Makes a revision's root ready: id map, overlay. Idempotent.
    pub async fn prepare(&self, root: Root) -> Result<(), RuntimeError> {
        todo!()
    }

    /// The revision is no longer needed; running instances keep their own copy.
    pub async fn release(&self, key: &str) {
        todo!()
    }

    pub async fn create(&self, key: &str) -> Result<Parked, RuntimeError> {
        todo!()
    }

    /// Kills every instance, ends the launcher, removes cgroups and run files.
    pub async fn stop(&self) {
        todo!()
    }

    /// What this kernel lacks and what neap does instead, a line each.
    pub fn warnings(&self) -> Vec<String> {
        todo!()
    }
}

#[allow(unused_variables)]
impl Parked {
    /// Executes the command with `env` added to the root's.
    pub async fn start(self, env: Vec<(String, String)>) -> Result<Running, RuntimeError> {
        todo!()
    }
}

#[allow(unused_variables)]
impl Running {
    pub async fn wait(&mut self) -> Exit {
        todo!()
    }

    /// To the container's first process; nothing when it has already ended.
    pub fn signal(&self, signal: i32) {
        todo!()
    }
}
