//! What is deployed: from manifests (the API's and those in functions_dir) to revisions whose
//! root is mounted and proven to start, published as `Routes`.
//!
//! Deploys take turns (`turns`), and none waits for another function's code. A manifest that can't be
//! deployed changes nothing: what ran before goes on. Files in functions_dir own their functions; a
//! directory that can't be read removes none.

mod ahead;
mod files;
mod keep;
mod once;
mod pull;
mod rollback;
mod scale;
mod standing;
mod stick;
mod switch;
mod turns;

pub use files::manifest_files;
pub use switch::missing_secrets;

use crate::channels::{
    Command, DeployError, Deployed, Instances, Reloaded, Removed, Reply, Stock, Trials, Verdict,
};
use crate::config::{self, Config, Machine};
use crate::image::{Goal, ImageStore};
use crate::ingress::routes::{Deployment, Routes};
use crate::model::permissions::VOLUMES_DIR;
use crate::model::{Clock, Digest, FunctionName, Reference};
use crate::runtime::Runtime;
use crate::secrets::Secrets;
use crate::store::Store;
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use ahead::Ahead;
use futures_lite::future;
use pull::Later;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use switch::Source;
pub use turns::Turns;

/// How often the disk's fill is looked at.
const COLLECT_EVERY: Duration = Duration::from_secs(300);
/// How often functions that can't run (an image that is not there yet) are looked at again.
const RETRY_UNUSABLE: Duration = Duration::from_secs(30);

/// What the deployer needs; the daemon makes it.
pub struct Deployer {
    pub store: Store,
    pub images: ImageStore,
    pub runtime: Runtime,
    pub secrets: Secrets,
    pub instances: Arc<dyn Instances>,
    pub logs: FunctionLogs,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
    pub executor: Arc<smol::Executor<'static>>,
    /// Where neap.toml is; read again by a reload.
    pub config_file: Option<PathBuf>,
    /// What `[node] memory` comes to on this machine.
    pub budget_bytes: u64,
    /// What of it nobody has reserved now.
    pub room_bytes: Box<dyn Fn() -> u64 + Send + Sync>,
    pub config: Watch<Config>,
    pub routes: Watch<Routes>,
    /// Functions that may have become runnable.
    pub inbox: Wake,
    /// What is wrong with what is deployed, a line each, for `neap status`.
    pub problems: Watch<Vec<String>>,
    /// New revisions that have not succeeded yet; the scheduler reports to it.
    pub trials: Trials,
    /// What is made before a switch, for the scheduler.
    pub stock: Stock,
    pub waiting: Waiting,
    pub turns: Turns,
}

/// What waits for images, and what is known of them; empty at the start.
pub struct Waiting {
    later: (Sender<Later>, Receiver<Later>),
    wanted: Mutex<BTreeMap<Reference, smol::Task<()>>>,
    /// Images that files in functions_dir ask for, and whether for want of them: `pull = "always"`
    /// asks for one that is here, too.
    files: Mutex<BTreeMap<Reference, bool>>,
    /// Which image a root is of, by its revision's key.
    roots: Mutex<HashMap<String, Digest>>,
    /// Layers that were found damaged: once one has been put in another's place, roots made of the
    /// old one are made again.
    damaged: Mutex<BTreeSet<Digest>>,
}

/// Deploys whose image has come and that wait for their turn; senders wait beyond that.
const LATER_MAX: usize = 16;

enum Input {
    Command(Command),
    Later(Later),
    Verdict(FunctionName, u32, Verdict),
    Look,
    Closed,
}

/// Why functions_dir is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// Nothing is removed: the directory may not be mounted yet, and nobody is there to see.
    Boot,
    Reload,
    /// One came that somebody waits for.
    Image,
}

impl Default for Waiting {
    fn default() -> Self {
        let later = smol::channel::bounded(LATER_MAX);
        Self {
            later,
            wanted: Mutex::default(),
            files: Mutex::default(),
            roots: Mutex::default(),
            damaged: Mutex::default(),
        }
    }
}

impl Deployer {
    /// Brings back what the database holds, then what functions_dir says. Never fails: what
    /// can't run is reported and its events wait.
    pub async fn restore(self: &Arc<Self>) -> Result<(), crate::store::StoreError> {
        let mut problems = Vec::new();
        self.note_damaged(self.images.damaged().unwrap_or_default());
        let config = self.config.get();
        let mut functions = BTreeMap::new();
        for stored in self.store.functions().await? {
            match self.deployment(&config, stored).await {
                Ok(deployment) => {
                    if let Some(why) = &deployment.unusable {
                        problems.push(format!("function `{}` can't run: {why}", deployment.revision.name()));
                    }
                    functions.insert(deployment.revision.name().clone(), deployment);
                }
                Err(lines) => problems.extend(lines),
            }
        }
        for deployment in functions.values() {
            self.begin_trial(&deployment.revision).await;
        }
        self.publish(&config, functions);
        let reloaded = self.reconcile_files(Why::Boot).await;
        problems.extend(reloaded.problems);
        self.report(problems);
        Ok(())
    }

    /// Serves commands until their channel closes.
    pub async fn run(self: Arc<Self>, commands: Receiver<Command>) {
        let mut collected = Instant::now();
        // What was restored may lack images.
        self.want_images();
        loop {
            let command = async { commands.recv().await.map_or(Input::Closed, Input::Command) };
            let look = async {
                Timer::after(RETRY_UNUSABLE).await;
                Input::Look
            };
            let later = async { self.waiting.later.1.recv().await.map_or(Input::Closed, Input::Later) };
            let verdict = async {
                let (name, number, verdict) = self.trials.decided().await;
                Input::Verdict(name, number, verdict)
            };
            let input = future::or(future::or(command, verdict), future::or(later, look)).await;
            if matches!(input, Input::Closed) {
                return;
            }
            let (this, room) = (self.clone(), self.turns.room().await);
            let task = async move {
                this.take(input).await;
                this.want_images();
                drop(room);
            };
            self.executor.spawn(task).detach();
            if collected.elapsed() >= COLLECT_EVERY {
                self.collect_by_watermark().await;
                collected = Instant::now();
            }
        }
    }

    async fn take(self: &Arc<Self>, input: Input) {
        match input {
            Input::Command(command) => self.serve(command).await,
            Input::Look => {
                self.retry_unusable().await;
                // One that is under way sees it, or the next look does.
                if self.file_image_came()
                    && let Some(_files) = self.turns.files.try_lock()
                {
                    let reloaded = self.reconcile_files(Why::Image).await;
                    self.report(reloaded.problems);
                }
            }
            Input::Later(Later::Damaged) => {
                let mut problems = (*self.problems.get()).clone();
                problems.extend(self.damage());
                self.problems.set(problems);
            }
            Input::Later(Later::Deploy { file, manifest, reply }) => {
                self.deploy_for(&file, &manifest, &reply).await;
            }
            Input::Later(Later::Look(image)) => {
                tracing::info!(%image, "an image that functions wait for is here");
                self.waiting.files.lock().unwrap_or_else(PoisonError::into_inner).remove(&image);
                self.image_came().await;
            }
            Input::Verdict(name, number, verdict) => self.take_verdict(name, number, verdict).await,
            Input::Closed => {}
        }
    }

    async fn deploy_for(&self, file: &str, text: &str, reply: &Reply<Result<Deployed, DeployError>>) {
        let source = Source { file, text, owner: None, pinned: None };
        let _ = reply.try_send(self.deploy(source, Ahead::Ready).await);
    }

    /// By whatever way it came.
    async fn image_came(self: &Arc<Self>) {
        self.remake_roots().await;
        self.retry_unusable().await;
        let _files = self.turns.files.lock().await;
        let reloaded = self.reconcile_files(Why::Image).await;
        self.report(reloaded.problems);
    }

    /// Whether an image that a file lacked was imported meanwhile.
    fn file_image_came(&self) -> bool {
        let missing = self.waiting.files.lock().unwrap_or_else(PoisonError::into_inner);
        missing.iter().any(|(image, lacks)| *lacks && self.images.find(image.as_str()).is_ok())
    }

    fn want_images(self: &Arc<Self>) {
        let mut images = self.lacking();
        let missing = self.waiting.files.lock().unwrap_or_else(PoisonError::into_inner);
        images.extend(missing.keys().cloned());
        drop(missing);
        self.want(images);
    }

    async fn serve(self: &Arc<Self>, command: Command) {
        match command {
            Command::Deploy { file, manifest, reply } => match self.to_pull(&file, &manifest) {
                Some(image) => self.deploy_when_pulled(image, file, manifest, reply),
                None => self.deploy_for(&file, &manifest, &reply).await,
            },
            Command::Scale { name, min, reply } => {
                let _ = reply.try_send(self.scale(&name, min).await);
            }
            Command::Rollback { name, reply } => {
                let _ = reply.try_send(self.roll_back(&name, "asked for with `neap rollback`").await);
            }
            Command::ImageCame => self.image_came().await,
            Command::CollectImages { dry_run, reply } => {
                let _ = reply.try_send(self.collect(dry_run).await);
            }
            Command::Remove { name, reply } => {
                let result = match self.owned_through_api(&name) {
                    Ok(()) => self.remove(&name).await,
                    Err(error) => Err(error),
                };
                let _ = reply.try_send(result);
            }
            Command::Pause { name, paused, reply } => {
                let _ = reply.try_send(self.pause(&name, paused).await);
            }
            Command::SecretsChanged { reply } => {
                self.runtime.refresh_secrets().await;
                self.retry_unusable().await;
                let _ = reply.try_send(Ok(()));
            }
            Command::Reload { reply } => {
                let _ = reply.try_send(self.reload().await);
            }
            Command::Run { run, reply } => {
                let this = self.clone();
                let task = async move {
                    let left = async {
                        reply.closed().await;
                        None
                    };
                    let result = async { Some(this.run_once(run).await) };
                    if let Some(result) = future::or(result, left).await {
                        let _ = reply.try_send(result);
                    }
                };
                // It changes nothing that is deployed, and may take for ever: not in anybody's room.
                self.executor.spawn(task).detach();
            }
        }
    }

    async fn collect(&self, dry_run: bool) -> Result<crate::model::api::Collected, DeployError> {
        let _turn = self.turns.take().await;
        let needed = self.images_needed().await?;
        let images = self.images.clone();
        let collected = smol::unblock(move || images.gc(&needed, Goal::Unneeded, dry_run)).await;
        collected.map_err(failed)
    }

    fn owned_through_api(&self, name: &FunctionName) -> Result<(), DeployError> {
        match self.routes.get().functions.get(name) {
            // A function whose file is gone is kept only while its events wait: it may be removed.
            Some(Deployment { file: Some(file), .. }) if file.exists() => {
                Err(DeployError::OwnedByFile { name: name.clone(), file: file.clone() })
            }
            _ => Ok(()),
        }
    }

    async fn remove(&self, name: &FunctionName) -> Result<Removed, DeployError> {
        let _held = self.turns.hold(name).await;
        let _turn = self.turns.take().await;
        let removed = self.store.remove(name.clone()).await.map_err(|error| match error {
            crate::store::StoreError::NotFound => DeployError::Unknown(name.clone()),
            other => failed(other),
        })?;
        let mut functions = self.routes.get().functions.clone();
        functions.remove(name);
        self.publish(&self.config.get(), functions);
        self.trials.end(name);
        self.logs.remove(name);
        self.metrics.remove(name);
        tracing::info!(function = name.as_str(), invocations = removed, "removed");
        let volumes = self.config.get().node.data_dir.join(VOLUMES_DIR).join(name.as_str());
        Ok(Removed { invocations: removed, volumes: volumes.is_dir().then_some(volumes) })
    }

    async fn pause(&self, name: &FunctionName, paused: bool) -> Result<(), DeployError> {
        let _turn = self.turns.take().await;
        let mut functions = self.routes.get().functions.clone();
        let deployment = functions.get_mut(name).ok_or_else(|| DeployError::Unknown(name.clone()))?;
        self.store.set_paused(name.clone(), paused).await.map_err(failed)?;
        deployment.paused = paused;
        self.publish(&self.config.get(), functions);
        Ok(())
    }

    /// Configuration first (kept as it was when anything in it is wrong), then functions_dir.
    async fn reload(self: &Arc<Self>) -> Result<Reloaded, DeployError> {
        let _files = self.turns.files.lock().await;
        let turn = self.turns.take().await;
        let mut notes = Vec::new();
        if let Some(file) = &self.config_file {
            let shown = file.display().to_string();
            let text = std::fs::read_to_string(file)
                .map_err(|error| DeployError::Invalid(vec![format!("{shown}: {error}")]))?;
            let new = Config::parse(&shown, &text, &Machine::read()).map_err(invalid)?;
            let old = self.config.get();
            notes = needs_restart(&old, &new);
            // What needs a restart stays as it is until then, so that all parts agree.
            let (node, http, buffer) = (old.node.clone(), old.http.clone(), old.buffer.clone());
            // The links' client ids are made of the node's: another id is another session.
            let same_node = old.node.id == new.node.id;
            let (mqtt, uplink) =
                if same_node { (new.mqtt, new.uplink) } else { (old.mqtt.clone(), old.uplink.clone()) };
            let (forwards, images, trust) = (new.forwards, new.images, new.trust);
            self.config.set(Config { node, http, buffer, mqtt, uplink, forwards, images, trust });
        }
        let config = self.config.get();
        self.configure_images(&config);
        let functions = self.refreshed(&config).await;
        self.publish(&config, functions);
        drop(turn);
        let mut reloaded = self.reconcile_files(Why::Reload).await;
        self.report(reloaded.problems.clone());
        reloaded.problems.extend(notes);
        Ok(reloaded)
    }

    fn publish(&self, config: &Config, functions: BTreeMap<FunctionName, Deployment>) {
        self.routes.set(Routes {
            functions,
            forwards: config.forwards.clone(),
            node: config.node.id.clone(),
            uplink_topic: config.uplink.as_ref().map(|uplink| uplink.topic.clone()),
        });
        self.inbox.wake();
    }

    fn report(&self, problems: Vec<String>) {
        for problem in &problems {
            tracing::warn!(problem, "not deployed as described");
        }
        self.problems.set(problems);
    }
}

/// What a reload can't change, a line each.
fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |changed: bool, what: &str| {
        if changed {
            lines.push(format!("{what} changed: takes effect when neap is started again"));
        }
    };
    line(old.node.id != new.node.id, "[node] id, and [mqtt] and [uplink] with it,");
    line(config::Node { id: new.node.id.clone(), ..old.node.clone() } != new.node, "[node]");
    line(old.buffer != new.buffer, "[buffer]");
    line(old.http != new.http, "[http]");
    lines
}

fn invalid(problems: Vec<config::Problem>) -> DeployError {
    DeployError::Invalid(problems.iter().map(|problem| problem.to_string()).collect())
}

fn failed(error: impl std::error::Error + 'static) -> DeployError {
    DeployError::Failed(crate::errors::chain(&error))
}
