//! `neap daemon`: load, check, open, build, then start; a stop is the same list backwards, with
//! a grace period, and says what it abandoned. Wiring only: what happens is in the drivers.

use crate::channels::{Command, IncomingChannels};
use crate::config::{self, Config, Machine, MemoryShare};
use crate::deploy::Deployer;
use crate::image::ImageStore;
use crate::ingress;
use crate::ingress::routes::Routes;
use crate::instance::driver::Containers;
use crate::model::api::LinkStatus;
use crate::model::{Clock, SystemClock, Target};
use crate::runtime::Runtime;
use crate::scheduler::driver::{Load, Scheduler, Stop};
use crate::scheduler::gates::Gates;
use crate::scheduler::pool::parked_max;
use crate::scheduler::pressure::{Pressure, Reading};
use crate::scheduler::{keeping, parking};
use crate::secrets::Secrets;
use crate::store::Store;
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use crate::{errors, net, runtime, sync, telemetry};
use anyhow::Context;
use async_signal::{Signal, Signals};
use futures_lite::{StreamExt, future};
use sd_notify::NotifyState;
use smol::Timer;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What runs may finish for so long after SIGTERM; then it is killed and goes back in line.
const GRACE: Duration = Duration::from_secs(10);

/// For the parts to end after the grace period. Nothing is lost when it is too short.
const LAST: Duration = Duration::from_secs(3);

/// The kernel counts pressure in steps of two seconds.
const PRESSURE_PERIOD: Duration = Duration::from_secs(2);

/// A start that did not put damage right is not followed by another one sooner.
const BROKEN_AGAIN: Duration = Duration::from_secs(600);

/// Links have connected by then, where they can.
const SETTLED: Duration = Duration::from_secs(5);

/// Deploys, removals and reloads that may wait for the one before.
const COMMANDS_MAX: usize = 16;

/// Calls on their way to the scheduler, which itself lets 64 wait.
const CALLS_MAX: usize = 64;

/// Runs until SIGTERM or SIGINT. `config`: neap.toml; a file that isn't there is an error only
/// when it was named.
pub fn run(config: Option<PathBuf>) -> ExitCode {
    telemetry::trace::init();
    let (config, config_file) = match load(config.as_deref()) {
        Ok(loaded) => loaded,
        Err(lines) => {
            for line in lines {
                tracing::error!("{line}");
            }
            return ExitCode::FAILURE;
        }
    };
    match start(config, config_file) {
        Ok(Ended::Told) => ExitCode::SUCCESS,
        Ok(Ended::Broken) => start_anew(),
        Err(error) => {
            tracing::error!(error = errors::chain(&*error), "neap ends");
            ExitCode::FAILURE
        }
    }
}

/// The configuration, checked; its own file when there is one.
pub fn load(named: Option<&Path>) -> Result<(Config, Option<PathBuf>), Vec<String>> {
    let machine = Machine::read();
    let path = named.unwrap_or(Path::new(config::defaults::CONFIG_FILE));
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

/// Why the daemon has stopped.
enum Ended {
    /// By a signal.
    Told,
    /// Its database is broken, and a start salvages it.
    Broken,
}

/// In the same process, so that it goes on where nothing supervises it; systemd is left to do
/// that itself, for what it was told of this start no longer holds.
fn start_anew() -> ExitCode {
    if std::env::var_os("NOTIFY_SOCKET").is_some() {
        tracing::error!("neap ends; the next start salvages the database");
        return ExitCode::FAILURE;
    }
    tracing::error!("neap starts anew to salvage the database");
    let error = match own_executable() {
        Ok(exe) => process::Command::new(exe).args(std::env::args_os().skip(1)).exec().into(),
        Err(error) => error,
    };
    tracing::error!(error = errors::chain(&*error), "neap could not be started anew");
    ExitCode::FAILURE
}

fn start(config: Config, config_file: Option<PathBuf>) -> anyhow::Result<Ended> {
    let _lock = lock(&config.node.data_dir)?;
    let parked_max = parked_max(raise_open_files());
    // Taken early, so that a port in use is the first thing said; served last.
    let listeners = net::http::Listeners::bind(&config)?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (store, recovered) = Store::open(crate::store::Options {
        path: config.node.data_dir.join("neap.db"),
        buffer: config.buffer.clone(),
        clock: clock.clone(),
    })
    .context("open the database")?;
    if let Some(salvaged) = &recovered.salvaged {
        tracing::error!("{}", salvaged.told());
    }
    if !recovered.clean {
        tracing::info!(
            leases = recovered.leases,
            "the last stop was not clean, events that ran go back in line"
        );
    }
    let exe = own_executable()?;
    let secrets = Secrets::open(&config.node.data_dir).context("open the secrets")?;
    let images = ImageStore::open(&config.node.data_dir, exe.clone()).context("open the image store")?;
    let logs = FunctionLogs::open(&config.node.run_dir).context("open the functions' logs")?;
    let runtime = Runtime::start(crate::runtime::Settings {
        exe,
        run_dir: config.node.run_dir.clone(),
        data_dir: config.node.data_dir.clone(),
        cgroup: config.node.cgroup.clone(),
        user_namespaces: config.node.user_namespaces,
        limits: config.node.limits,
        egress_range: config.node.egress_range,
    })
    .context("start the launcher")?;
    for warning in runtime.warnings() {
        tracing::warn!(warning, "this kernel");
    }
    let executor = Arc::new(smol::Executor::new());
    let parts = Parts {
        config,
        config_file,
        clock,
        store,
        images,
        secrets,
        logs,
        runtime,
        damage: recovered.salvaged.map(|salvaged| salvaged.told()),
        suspected: recovered.suspected,
        executor: executor.clone(),
        parked_max,
    };
    crate::runtime::forget_stack();
    crate::drive::on_io_thread(async move { executor.run(parts.serve(listeners)).await })
        .context("drive the daemon")?
}

/// What is open before anything runs.
struct Parts {
    config: Config,
    config_file: Option<PathBuf>,
    clock: Arc<dyn Clock>,
    store: Store,
    images: ImageStore,
    secrets: Secrets,
    logs: FunctionLogs,
    runtime: Runtime,
    /// What became of a damaged database, until the next start.
    damage: Option<String>,
    /// This start was one that looked for damage.
    suspected: bool,
    executor: Arc<smol::Executor<'static>>,
    /// What the limit of open files leaves for parked instances.
    parked_max: u32,
}

/// A broker link's two tasks and what others see of it.
struct LinkTasks {
    status: Watch<LinkStatus>,
    endpoint: Watch<Option<sync::driver::Endpoint>>,
    link: smol::Task<()>,
    ingress: smol::Task<()>,
}

impl Parts {
    /// Builds the drivers, starts them, waits for a signal, stops them in the opposite order.
    async fn serve(self, listeners: net::http::Listeners) -> anyhow::Result<Ended> {
        let executor = self.executor.clone();
        // Signals first: one that comes while images are mounted must not kill half a start.
        let mut signals = Signals::new([Signal::Term, Signal::Int, Signal::Hup]).context("catch signals")?;
        let driving = executor.spawn({
            let runtime = self.runtime.clone();
            async move { runtime.drive().await }
        });

        if let Ok(latest) = self.store.latest_wall().await {
            net::tls::not_before(latest);
        }
        let (inbox, outbox) = (Wake::new(), Wake::new());
        let config = Watch::new(self.config.clone());
        let parked_max = self.parked_max;
        let routes = Watch::new(Routes::default());
        let metrics = Metrics::default();
        let load = Watch::new(Load::default());
        let gates = Arc::new(std::sync::Mutex::new(Gates::default()));
        let pressure = Watch::new(Pressure::Calm);
        let problems = Watch::new(Vec::new());
        let trials = crate::channels::Trials::default();
        let stock = crate::channels::Stock::default();
        let (stop_work, stop_http, stop_links) =
            (Watch::new(Stop::Run), Watch::new(false), Watch::new(false));
        let budget_bytes = memory_budget(self.config.node.memory);
        let instances: Arc<dyn crate::channels::Instances> = Arc::new(Containers::new(
            self.runtime.clone(),
            executor.clone(),
            self.logs.clone(),
            self.clock.clone(),
            budget_bytes,
        ));

        let deployer = Arc::new(Deployer {
            store: self.store.clone(),
            images: self.images.clone(),
            runtime: self.runtime.clone(),
            secrets: self.secrets.clone(),
            instances: instances.clone(),
            logs: self.logs.clone(),
            metrics: metrics.clone(),
            clock: self.clock.clone(),
            executor: executor.clone(),
            config_file: self.config_file.clone(),
            budget_bytes,
            room_bytes: {
                let load = load.clone();
                Box::new(move || budget_bytes.saturating_sub(load.get().reserved_bytes))
            },
            config: config.clone(),
            routes: routes.clone(),
            inbox: inbox.clone(),
            problems: problems.clone(),
            trials: trials.clone(),
            stock: stock.clone(),
            waiting: crate::deploy::Waiting::default(),
            turns: crate::deploy::Turns::default(),
        });
        self.images.configure(&self.config.images, &self.config.trust);
        deployer.restore().await.context("restore what is deployed")?;

        let (commands_tx, commands) = smol::channel::bounded(COMMANDS_MAX);
        let (calls_tx, calls) = smol::channel::bounded(CALLS_MAX);
        let keeping = [
            executor.spawn(deployer.clone().watch_imports()),
            executor.spawn(deployer.clone().watch_layers()),
        ];
        let deploying = executor.spawn(deployer.run(commands));
        let pulling = executor.spawn({
            let images = self.images.clone();
            async move { images.drive().await }
        });
        let scheduling = executor.spawn(
            Scheduler {
                store: self.store.clone(),
                instances,
                routes: routes.clone(),
                calls,
                inbox: inbox.clone(),
                outbox: outbox.clone(),
                logs: self.logs.clone(),
                metrics: metrics.clone(),
                trials,
                stock,
                clock: self.clock.clone(),
                executor: executor.clone(),
                budget_bytes,
                parked_max,
                pressure: pressure.clone(),
                load: load.clone(),
                gates: gates.clone(),
                stop: stop_work.clone(),
            }
            .run(),
        );
        let ticking = executor.spawn(
            ingress::cron::Cron {
                store: self.store.clone(),
                routes: routes.clone(),
                due: inbox.clone(),
                metrics: metrics.clone(),
                clock: self.clock.clone(),
            }
            .run(),
        );
        let links = [Target::Local, Target::Uplink]
            .map(|target| self.link(target, &routes, (&inbox, &outbox), &metrics, &stop_links));
        let post_to = Watch::new(post_to(&self.config));
        let post_status = Watch::new(sync::driver::status_off(Target::Uplink, &*self.clock));
        let posting = executor.spawn(
            sync::driver::https::Post {
                endpoint: post_to.clone(),
                store: self.store.clone(),
                owed: outbox.clone(),
                status: post_status.clone(),
                metrics: metrics.clone(),
                clock: self.clock.clone(),
                stop: stop_links.clone(),
            }
            .run(),
        );
        let calling_back = executor.spawn(
            sync::driver::callbacks::Callbacks {
                store: self.store.clone(),
                routes: routes.clone(),
                owed: outbox.clone(),
                metrics: metrics.clone(),
                clock: self.clock.clone(),
                executor: executor.clone(),
                offline: {
                    let statuses = links.each_ref().map(|link| link.status.clone());
                    let post = post_status.clone();
                    Arc::new(move || {
                        let links = link_statuses(&statuses, &post);
                        let uplink = links.iter().find(|link| link.name == Target::Uplink.as_str());
                        uplink.is_some_and(|link| !["up", "off"].contains(&link.state.as_str()))
                    })
                },
                stop: stop_links.clone(),
            }
            .run(),
        );
        let endpoints = links.each_ref().map(|link| link.endpoint.clone());
        let following = executor.spawn(follow(config, endpoints, post_to));

        let statuses = links.each_ref().map(|link| link.status.clone());
        let facts = {
            let (runtime, data_dir) = (self.runtime.clone(), self.config.node.data_dir.clone());
            let clock = self.clock.clone();
            let (routes, pressure) = (routes.clone(), pressure.clone());
            let damage = self.damage.clone();
            move || {
                let load = load.get();
                let mut warnings = runtime.warnings();
                warnings.extend(damage.clone());
                warnings.extend(problems.get().iter().cloned());
                warnings.extend(broken(&gates, clock.monotonic()));
                warnings.extend(pressure.get().warning());
                let routes = routes.get();
                let runnable = routes.functions.values().filter(|deployment| deployment.runnable());
                let parks = runnable.filter(|deployment| !deployment.revision.manifest.handler.stays_up());
                let asked = parks.map(|deployment| deployment.revision.manifest.scale.min);
                warnings.extend(parking::without_room(asked, load.budget_bytes, parked_max));
                warnings.extend(keeping::without_memory(&routes, load.budget_bytes));
                ingress::http::Facts {
                    not_ready: None,
                    links: link_statuses(&statuses, &post_status),
                    memory_reserved_bytes: load.reserved_bytes,
                    memory_budget_bytes: load.budget_bytes,
                    disk_free_bytes: disk_free(&data_dir),
                    instances: load.instances,
                    parked: load.parked,
                    functions: load.functions.clone(),
                    warnings,
                }
            }
        };
        let wake = inbox.clone();
        let api = ingress::http::Api {
            node: self.config.node.id.clone(),
            http: self.config.http.clone(),
            store: self.store.clone(),
            images: self.images.clone(),
            secrets: self.secrets.clone(),
            logs: self.logs.clone(),
            metrics,
            routes,
            invoke: calls_tx,
            commands: commands_tx.clone(),
            wake: inbox,
            outbox,
            clock: self.clock.clone(),
            facts: Arc::new(facts),
            usage: Arc::new({
                let runtime = self.runtime.clone();
                move || runtime.usage()
            }),
        };
        let address = listeners.address();
        let serving = executor.spawn(ingress::http::serve(Arc::new(api), listeners, stop_http.clone()));
        let _watchdog = executor.spawn(watchdog());
        let _pressure = executor.spawn(follow_pressure(pressure, wake));
        let _settling = executor.spawn(async {
            Timer::after(SETTLED).await;
            crate::runtime::forget_code();
        });
        let serving_since = Instant::now();
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        tracing::info!(node = self.config.node.id, http = %address, "neap runs");

        let told = async {
            while let Some(signal) = signals.next().await {
                match signal {
                    Ok(Signal::Hup) => reload(&commands_tx).await,
                    Ok(_) => break,
                    Err(error) => tracing::warn!(%error, "signals"),
                }
            }
            Ended::Told
        };
        let broken = async {
            self.store.broken().await;
            if self.suspected {
                // The disk goes on spoiling it, or it is something else than damage.
                Timer::at(serving_since + BROKEN_AGAIN).await;
            }
            Ended::Broken
        };
        let why = future::or(told, broken).await;
        tracing::info!("neap stops: what runs may finish");
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        let begun = Instant::now();
        drop(ticking);
        stop_http.set(true);
        stop_work.set(Stop::Drain);
        let abandoned = {
            let mut scheduling = std::pin::pin!(scheduling);
            let hurried = async {
                // A second signal: somebody is in a hurry.
                while !matches!(signals.next().await, Some(Ok(Signal::Term | Signal::Int)) | None) {}
                None
            };
            let done = async { Some(scheduling.as_mut().await) };
            match within(GRACE, future::or(done, hurried)).await.flatten() {
                Some(abandoned) => abandoned,
                None => {
                    stop_work.set(Stop::Abandon);
                    within(LAST, scheduling).await.unwrap_or_default()
                }
            }
        };
        within(LAST, serving).await;
        stop_links.set(true);
        let [local, uplink] = links;
        for tasks in [local, uplink] {
            within(LAST, tasks.link).await;
            within(LAST, tasks.ingress).await;
        }
        within(LAST, posting).await;
        within(LAST, calling_back).await;
        drop((deploying, following, pulling, keeping));
        self.store.close().await;
        self.runtime.stop().await;
        within(LAST, driving).await;
        tracing::info!(
            abandoned = abandoned.instances,
            took_ms = begun.elapsed().as_millis() as u64,
            "neap has stopped; abandoned events go back in line"
        );
        Ok(why)
    }

    fn link(
        &self,
        target: Target,
        routes: &Watch<Routes>,
        (inbox, outbox): (&Wake, &Wake),
        metrics: &Metrics,
        stop: &Watch<bool>,
    ) -> LinkTasks {
        let channels = IncomingChannels::new();
        let status = Watch::new(sync::driver::status_off(target, &*self.clock));
        let endpoint = Watch::new(endpoint(&self.config, target));
        let link = sync::driver::Link {
            target,
            endpoint: endpoint.clone(),
            store: self.store.clone(),
            routes: routes.clone(),
            owed: outbox.clone(),
            incoming: channels.incoming.0,
            acks: channels.acks.1,
            room: channels.room,
            status: status.clone(),
            metrics: metrics.clone(),
            clock: self.clock.clone(),
            stop: stop.clone(),
        };
        let ingress = ingress::mqtt::Ingress {
            target,
            incoming: channels.incoming.1,
            acks: channels.acks.0,
            store: self.store.clone(),
            routes: routes.clone(),
            due: inbox.clone(),
            owed: outbox.clone(),
            metrics: metrics.clone(),
            clock: self.clock.clone(),
        };
        LinkTasks {
            status,
            endpoint,
            link: self.executor.spawn(link.run()),
            ingress: self.executor.spawn(ingress.run()),
        }
    }
}

/// Functions that fail whatever they are given, for `neap status`.
fn broken(gates: &std::sync::Mutex<Gates>, now: Duration) -> Vec<String> {
    let open = gates.lock().unwrap_or_else(std::sync::PoisonError::into_inner).open(now);
    let line = |(name, wait): (crate::model::FunctionName, Duration)| {
        let wait = wait.as_secs();
        format!("function `{name}` fails whatever it is given; its events wait, the next try is in {wait} s")
    };
    open.into_iter().map(line).collect()
}

/// Where a link goes, by the configuration.
fn endpoint(config: &Config, target: Target) -> Option<sync::driver::Endpoint> {
    let broker = config.broker(target)?.clone();
    let format = match target {
        Target::Uplink => config.uplink.as_ref()?.format,
        Target::Local | Target::Callback => config::Format::Auto,
    };
    let config::Buffer { order, live_percent, .. } = config.buffer;
    let limits = match target {
        Target::Uplink => config.uplink.as_ref()?.limits,
        Target::Local | Target::Callback => config::UplinkLimits::default(),
    };
    Some(sync::driver::Endpoint { broker, format, order, live_percent, limits })
}

/// The same for an uplink that takes batches.
fn post_to(config: &Config) -> Option<sync::driver::https::PostTo> {
    let uplink = config.uplink.as_ref()?;
    let config::Remote::Https(receiver) = &uplink.remote else { return None };
    let config::Buffer { order, live_percent, .. } = config.buffer;
    let (receiver, limits) = (receiver.clone(), uplink.limits);
    Some(sync::driver::https::PostTo { receiver, order, live_percent, limits })
}

/// The uplink is one of two, and the other one is off.
fn link_statuses(brokers: &[Watch<LinkStatus>; 2], post: &Watch<LinkStatus>) -> Vec<LinkStatus> {
    let [local, uplink] = brokers.each_ref().map(|status| (*status.get()).clone());
    let post = (*post.get()).clone();
    vec![local, if post.state == "off" { uplink } else { post }]
}

/// Passes a reloaded configuration on to the links.
async fn follow(
    config: Watch<Config>,
    endpoints: [Watch<Option<sync::driver::Endpoint>>; 2],
    posts: Watch<Option<sync::driver::https::PostTo>>,
) {
    let (mut seen, _) = config.versioned();
    loop {
        let (version, config) = config.changed(seen).await;
        seen = version;
        for (target, watch) in [Target::Local, Target::Uplink].into_iter().zip(&endpoints) {
            let new = endpoint(&config, target);
            if *watch.get() != new {
                watch.set(new);
            }
        }
        let new = post_to(&config);
        if *posts.get() != new {
            posts.set(new);
        }
    }
}

/// Looks how short memory is, and has the scheduler look when that changed.
async fn follow_pressure(pressure: Watch<Pressure>, inbox: Wake) {
    loop {
        let was = *pressure.get();
        let now = was.next(Reading {
            waited_percent: runtime::pressure::memory().map(|pressure| pressure.some.avg10_percent),
            available_percent: runtime::available::percent(),
        });
        if now != was {
            tracing::warn!(?was, ?now, "memory pressure");
            pressure.set(now);
            inbox.wake();
        }
        Timer::after(PRESSURE_PERIOD).await;
    }
}

/// SIGHUP; `neap reload` goes the same way and gets the answer.
async fn reload(commands: &smol::channel::Sender<Command>) {
    let (reply, answer) = crate::channels::reply();
    if commands.send(Command::Reload { reply }).await.is_err() {
        return;
    }
    match answer.recv().await {
        Ok(Ok(reloaded)) => {
            for problem in &reloaded.problems {
                tracing::warn!(problem, "reload");
            }
            let (deployed, removed) = (reloaded.deployed.len(), reloaded.removed.len());
            tracing::info!(deployed, removed, problems = reloaded.problems.len(), "reloaded");
        }
        Ok(Err(error)) => {
            tracing::error!(error = errors::chain(&error), "reload refused, all stays as it was");
        }
        Err(_) => {}
    }
}

/// Tells systemd that the executor still turns, at half the period that it asked for.
async fn watchdog() {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    loop {
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        Timer::after(period / 2).await;
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let late = async {
        Timer::after(limit).await;
        None
    };
    future::or(async { Some(work.await) }, late).await
}

/// Bytes that instances may reserve together.
fn memory_budget(share: MemoryShare) -> u64 {
    match share {
        MemoryShare::Bytes(bytes) => bytes,
        MemoryShare::Percent(percent) => {
            let total = rustix::system::sysinfo();
            #[allow(clippy::useless_conversion, reason = "32-bit kernels count in 32 bits")]
            let bytes = u64::from(total.totalram).saturating_mul(u64::from(total.mem_unit));
            // Whole MiB: it is told to people.
            (bytes / 100 * u64::from(percent)) & !((1 << 20) - 1)
        }
    }
}

fn disk_free(path: &Path) -> u64 {
    rustix::fs::statvfs(path).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
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
/// Returns how many there may be.
fn raise_open_files() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1024; // what kernels give
    };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        return soft;
    }
    hard
}

/// An upgrade replaces the file: the launcher and the workers of this daemon stay what it is.
fn own_executable() -> anyhow::Result<PathBuf> {
    Ok(PathBuf::from(format!("/proc/{}/exe", std::process::id())))
}
