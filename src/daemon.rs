//! `neap daemon`: load, check, open, build, then start; a stop is the same list backwards, with
//! a grace period, and says what it abandoned. Wiring only: what happens is in the drivers.

use crate::channels::IncomingChannels;
use crate::config::{self, Config, Machine, MemoryShare};
use crate::deploy::Deployer;
use crate::image::ImageStore;
use crate::ingress;
use crate::ingress::routes::Routes;
use crate::instance::driver::Containers;
use crate::model::api::LinkStatus;
use crate::model::{Clock, SystemClock, Target};
use crate::runtime::Runtime;
use crate::scheduler::driver::{Abandoned, Load, Scheduler, Stop};
use crate::store::Store;
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use crate::{errors, net, sync, telemetry};
use anyhow::Context;
use futures_lite::{StreamExt, future};
use smol::Timer;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Read when nobody names another; it need not exist.
pub const CONFIG_FILE: &str = "/etc/neap/neap.toml";

/// What runs may finish for so long after SIGTERM; then it is killed and goes back in line.
const GRACE: Duration = Duration::from_secs(10);

/// For the parts to end after the grace period. Nothing is lost when it is too short.
const LAST: Duration = Duration::from_secs(3);

/// Runs until SIGTERM or SIGINT. `config`: neap.toml; a file that isn't there is an error only
/// when it was named.
pub fn run(config: Option<PathBuf>) -> ExitCode {
    telemetry::init();
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = errors::chain(&*error), "neap ends");
            ExitCode::FAILURE
        }
    }
}

/// The configuration, checked; its own file when there is one.
pub fn load(named: Option<&Path>) -> Result<(Config, Option<PathBuf>), Vec<String>> {
    let machine = Machine::read();
    let path = named.unwrap_or(Path::new(CONFIG_FILE));
    let shown = path.display().to_string();
    match std::fs::read_to_string(path) {
        Ok(text) => Config::parse(&shown, &text, &machine)
            .map(|config| (config, Some(path.to_owned())))
            .map_err(|problems| problems.iter().map(config::Problem::to_string).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => {
            Ok((Config::defaults(&machine), None))
        }
        Err(error) => Err(vec![format!("{shown}: {error}")]),
    }
}

fn start(named: Option<PathBuf>) -> anyhow::Result<()> {
    let (config, config_file) = load(named.as_deref()).map_err(|lines| anyhow::anyhow!(lines.join("\n")))?;
    let _lock = lock(&config.node.data_dir)?;
    raise_open_files();
    // Taken early, so that a port in use is the first thing said; served last.
    let listeners = net::http::Listeners::bind(&config)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (store, recovered) = Store::open(crate::store::Options {
        path: config.node.data_dir.join("neap.db"),
        bytes_max: config.buffer.bytes_max,
        commit_window: config.buffer.commit_window,
        clock: clock.clone(),
    })
    .context("open the database")?;
    if !recovered.clean {
        tracing::info!(
            leases = recovered.leases,
            "the last stop was not clean, events that ran go back in line"
        );
    }
    let exe = own_executable()?;
    let images = ImageStore::open(&config.node.data_dir, exe.clone()).context("open the image store")?;
    let logs = FunctionLogs::open(&config.node.run_dir).context("open the functions' logs")?;
    let runtime = Runtime::start(crate::runtime::Settings {
        exe,
        run_dir: config.node.run_dir.clone(),
        data_dir: config.node.data_dir.clone(),
        cgroup: config.node.cgroup.clone(),
        user_namespaces: config.node.user_namespaces,
    })
    .context("start the launcher")?;
    for warning in runtime.warnings() {
        tracing::warn!(warning, "this kernel");
    }
    let executor = Arc::new(smol::Executor::new());
    let daemon =
        Daemon { config, config_file, clock, store, images, logs, runtime, executor: executor.clone() };
    smol::block_on(executor.run(daemon.serve(listeners)))
}

struct Daemon {
    config: Config,
    config_file: Option<PathBuf>,
    clock: Arc<dyn Clock>,
    store: Store,
    images: ImageStore,
    logs: FunctionLogs,
    runtime: Runtime,
    executor: Arc<smol::Executor<'static>>,
}

/// One data directory, one daemon.
fn lock(data_dir: &Path) -> anyhow::Result<File> {
    use std::os::unix::fs::DirBuilderExt;
    let shown = data_dir.display();
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(data_dir)
        .with_context(|| format!("create data_dir `{shown}`"))?;
    let path = data_dir.join("lock");
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("data_dir `{shown}` must be writable: open `{}`", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            anyhow::bail!(
                "another neap daemon runs on data_dir `{shown}`; stop it, or give this one its own [node] data_dir, run_dir and cgroup"
            )
        }
        Err(std::fs::TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("lock `{}`", path.display()))
        }
    }
}

/// An instance takes up to six descriptors, a connection one; the soft limit is often 1,024.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// By descriptor, so that an upgrade that replaces the file does not change what this daemon's
/// children are.
fn own_executable() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("find the own executable")
}
