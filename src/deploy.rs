//! What is deployed: from manifests (the API's and those in functions_dir) to revisions whose
//! root is mounted and proven to start, published as `Routes`.
//!
//! One task owns this, so deploys come one after another. A manifest that can't be deployed
//! changes nothing: what ran before goes on. Files in functions_dir own their functions; a
//! directory that can't be read removes none.

use crate::channels::{Command, DeployError, Deployed, Instances, LogLine};
use crate::channels::{Reloaded, Removed, RunOnce, RunResult};
use crate::config::{self, Config, Machine};
use crate::image::{Image, ImageError, ImageStore};
use crate::ingress::routes::{Deployment, Routes};
use crate::model::function::{FUNCTIONS_MAX, Handler, UID_BASE_FIRST, UID_RANGE};
use crate::model::{
    Clock, Digest, Event, EventId, Failure, FunctionName, Manifest, Outcome, Reference, Revision,
};
use crate::runtime::{Root, Runtime, RuntimeError};
use crate::store::{Store, StoredFunction};
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_lite::future;
use smol::Timer;
use smol::channel::Receiver;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often functions that can't run (an image that is not there yet) are looked at again.
const RETRY_UNUSABLE: Duration = Duration::from_secs(30);

/// A manifest file larger than this is no manifest.
pub const MANIFEST_BYTES_MAX: u64 = 256 * 1024;

/// Only so much stderr of `neap run` is kept for its caller.
const RUN_STDERR_BYTES_MAX: usize = 1 << 20;

/// What the deployer needs; the daemon makes it.
pub struct Deployer {
    pub store: Store,
    pub images: ImageStore,
    pub runtime: Runtime,
    pub instances: Arc<dyn Instances>,
    pub logs: FunctionLogs,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
    pub executor: Arc<smol::Executor<'static>>,
    /// Where neap.toml is; read again by a reload.
    pub config_file: Option<PathBuf>,
    pub config: Watch<Config>,
    pub routes: Watch<Routes>,
    /// Functions that may have become runnable.
    pub inbox: Wake,
    /// What is wrong with what is deployed, a line each, for `neap status`.
    pub problems: Watch<Vec<String>>,
}

impl Deployer {
    /// Brings back what the database holds, then what functions_dir says. Never fails: what
    /// can't run is reported and its events wait.
    pub async fn restore(&self) -> Result<(), crate::store::StoreError> {
        let mut problems = Vec::new();
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
        self.publish(&config, functions);
        let reloaded = self.reconcile_files(&config).await;
        problems.extend(reloaded.problems);
        self.report(problems);
        Ok(())
    }

    /// Serves commands until their channel closes.
    pub async fn run(self: Arc<Self>, commands: Receiver<Command>) {
        loop {
            let command = async { commands.recv().await.map(Some) };
            let look = async {
                Timer::after(RETRY_UNUSABLE).await;
                Ok(None)
            };
            match future::or(command, look).await {
                Ok(Some(command)) => self.serve(command).await,
                Ok(None) => self.retry_unusable().await,
                Err(_) => return,
            }
        }
    }

    async fn serve(self: &Arc<Self>, command: Command) {
        match command {
            Command::Deploy { file, manifest, reply } => {
                let _ = reply.try_send(self.deploy(&file, &manifest, None).await);
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
                self.executor.spawn(task).detach();
            }
        }
    }

    /// `owner`: the file in functions_dir that this manifest was read from.
    async fn deploy(&self, file: &str, text: &str, owner: Option<&Path>) -> Result<Deployed, DeployError> {
        let config = self.config.get();
        let manifest = config::manifest::parse(file, text, &config).map_err(invalid)?;
        let name = manifest.name.clone();
        let routes = self.routes.get();
        let current = routes.functions.get(&name);
        match (current.map(|deployment| &deployment.file), owner) {
            (Some(Some(file)), None) => {
                return Err(DeployError::OwnedByFile { name, file: file.clone() });
            }
            (Some(None), Some(_)) => {
                return Err(DeployError::Invalid(vec![format!(
                    "{file}:1: function `{name}` was deployed with `neap deploy`; `neap rm {name}` first"
                )]));
            }
            (Some(Some(other)), Some(owner)) if other != owner && other.exists() => {
                let other = other.display();
                return Err(DeployError::Invalid(vec![format!(
                    "{file}:1: function `{name}` is already defined in {other}"
                )]));
            }
            _ => {}
        }
        self.check_beside_others(file, &manifest, &routes)?;
        let image = self.find_image(&manifest.image)?;
        let digest = image.digest.clone();
        let (number, uid_base) = self
            .store
            .next_revision(name.clone(), text.to_owned(), digest.to_string())
            .await
            .map_err(failed)?;
        let same = current.filter(|now| now.revision.manifest == manifest && now.revision.image == digest);
        if let Some(now) = same.filter(|now| now.unusable.is_none() && now.file.as_deref() == owner) {
            return Ok(Deployed {
                name: name.to_string(),
                revision: now.revision.number,
                image: digest.to_string(),
                changed: false,
            });
        }
        let revision = Revision { number, manifest, image: digest, uid_base };
        // The same revision again (its file moved, or it could not run before) keeps its root.
        let fresh = current.is_none_or(|now| now.revision.key() != revision.key());
        if let Err(error) = self.prove(&revision, &image).await {
            if fresh {
                self.instances.retire(&revision);
            }
            return Err(error);
        }
        let stored = self
            .store
            .deploy(name.clone(), text.to_owned(), revision.image.to_string(), owner.map(Path::to_owned))
            .await;
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => {
                if fresh {
                    self.instances.retire(&revision);
                }
                return Err(failed(error));
            }
        };
        debug_assert_eq!((stored.revision.number, stored.uid_base), (number, uid_base));
        let deployed = Deployed {
            name: name.to_string(),
            revision: number,
            image: revision.image.to_string(),
            changed: true,
        };
        let deployment = Deployment {
            revision: Arc::new(revision),
            paused: stored.paused,
            file: stored.file,
            created: stored.revision.created,
            unusable: None,
        };
        let mut functions = routes.functions.clone();
        functions.insert(name, deployment);
        self.publish(&config, functions);
        tracing::info!(function = deployed.name, revision = number, image = deployed.image, "deployed");
        Ok(deployed)
    }

    /// Mounts the root and starts nothing in it, but makes one container up to the point where
    /// it would: a missing command, user or directory shows now and not at three in the morning.
    async fn prove(&self, revision: &Revision, image: &Image) -> Result<(), DeployError> {
        let root = root(revision, image)?;
        let proven = async {
            self.runtime.prepare(root).await?;
            self.runtime.create(&revision.key()).await.map(drop)
        };
        proven.await.map_err(|error| {
            self.instances.retire(revision);
            match error {
                RuntimeError::Unusable(why) => {
                    DeployError::Invalid(vec![format!("image `{}`: {why}", revision.manifest.image)])
                }
                other => failed(other),
            }
        })
    }

    fn find_image(&self, reference: &Reference) -> Result<Image, DeployError> {
        self.images.find(reference.as_str()).map_err(|error| match error {
            ImageError::NotFound(_) => DeployError::NoImage(reference.to_string()),
            other => failed(other),
        })
    }

    fn check_beside_others(&self, file: &str, new: &Manifest, routes: &Routes) -> Result<(), DeployError> {
        let others = routes.functions.values().filter(|other| *other.revision.name() != new.name);
        let mut all: Vec<(String, Manifest)> = others
            .map(|other| {
                let file = other.file.as_ref().map(|file| file.display().to_string());
                let shown = file.unwrap_or_else(|| format!("function `{}`", other.revision.name()));
                (shown, other.revision.manifest.clone())
            })
            .collect();
        all.push((file.to_owned(), new.clone()));
        match config::check_together(&all) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(invalid(problems)),
        }
    }

    fn owned_through_api(&self, name: &FunctionName) -> Result<(), DeployError> {
        match self.routes.get().functions.get(name) {
            Some(Deployment { file: Some(file), .. }) => {
                Err(DeployError::OwnedByFile { name: name.clone(), file: file.clone() })
            }
            _ => Ok(()),
        }
    }

    async fn remove(&self, name: &FunctionName) -> Result<Removed, DeployError> {
        let removed = self.store.remove(name.clone()).await.map_err(|error| match error {
            crate::store::StoreError::NotFound => DeployError::Unknown(name.clone()),
            other => failed(other),
        })?;
        let mut functions = self.routes.get().functions.clone();
        functions.remove(name);
        self.publish(&self.config.get(), functions);
        self.logs.remove(name);
        self.metrics.remove(name);
        tracing::info!(function = name.as_str(), invocations = removed, "removed");
        Ok(Removed { invocations: removed })
    }

    async fn pause(&self, name: &FunctionName, paused: bool) -> Result<(), DeployError> {
        let mut functions = self.routes.get().functions.clone();
        let deployment = functions.get_mut(name).ok_or_else(|| DeployError::Unknown(name.clone()))?;
        self.store.set_paused(name.clone(), paused).await.map_err(failed)?;
        deployment.paused = paused;
        self.publish(&self.config.get(), functions);
        Ok(())
    }

    /// Configuration first (kept as it was when anything in it is wrong), then functions_dir.
    async fn reload(&self) -> Result<Reloaded, DeployError> {
        let mut notes = Vec::new();
        if let Some(file) = &self.config_file {
            let shown = file.display().to_string();
            let text = std::fs::read_to_string(file)
                .map_err(|error| DeployError::Invalid(vec![format!("{shown}: {error}")]))?;
            let new = Config::parse(&shown, &text, &Machine::read()).map_err(invalid)?;
            let old = self.config.get();
            notes = needs_restart(&old, &new);
            // What needs a restart stays as it is until then, so that all parts agree.
            let new = Config { node: old.node.clone(), buffer: old.buffer.clone(), ..new };
            let new = Config { http: config::Http { listen: old.http.listen, ..new.http }, ..new };
            self.config.set(new);
        }
        let config = self.config.get();
        let mut functions = BTreeMap::new();
        for (name, deployment) in &self.routes.get().functions {
            functions.insert(name.clone(), deployment.clone());
        }
        self.publish(&config, functions);
        let mut reloaded = self.reconcile_files(&config).await;
        self.report(reloaded.problems.clone());
        reloaded.problems.extend(notes);
        Ok(reloaded)
    }

    /// Deploys what changed in functions_dir and removes what went.
    async fn reconcile_files(&self, config: &Config) -> Reloaded {
        let mut result = Reloaded::default();
        let dir = &config.node.functions_dir;
        let files = match manifest_files(dir) {
            Ok(files) => files,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let owned = self.routes.get().functions.values().any(|function| function.file.is_some());
                if owned {
                    result
                        .problems
                        .push(format!("{}: {error}; its functions stay as they are", dir.display()));
                }
                return result;
            }
            Err(error) => {
                result.problems.push(format!("{}: {error}; its functions stay as they are", dir.display()));
                return result;
            }
        };
        let mut owned_now = BTreeSet::new();
        for file in &files {
            let shown = file.display().to_string();
            let text = match read_manifest(file) {
                Ok(text) => text,
                Err(error) => {
                    result.problems.push(format!("{shown}: {error}"));
                    continue;
                }
            };
            match self.deploy(&shown, &text, Some(file)).await {
                Ok(deployed) => {
                    owned_now.insert(deployed.name.clone());
                    if deployed.changed {
                        result.deployed.push(deployed);
                    }
                }
                Err(DeployError::Invalid(lines)) => result.problems.extend(lines),
                Err(error) => {
                    result.problems.push(format!("{shown}: {}", crate::errors::chain(&error)));
                }
            }
        }
        let functions = self.routes.get();
        let gone = functions.functions.iter().filter(|(name, deployment)| {
            let file_gone = deployment.file.as_ref().is_some_and(|file| !files.contains(file));
            file_gone && !owned_now.contains(name.as_str())
        });
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            match self.remove(&name).await {
                Ok(_) => result.removed.push(name.to_string()),
                Err(error) => {
                    result.problems.push(format!("remove `{name}`: {}", crate::errors::chain(&error)))
                }
            }
        }
        result
    }

    /// A stored function as a deployment; unusable ones too, so that their events are taken in
    /// and wait. Lines when not even its manifest can be read.
    async fn deployment(&self, config: &Config, stored: StoredFunction) -> Result<Deployment, Vec<String>> {
        let shown = stored
            .file
            .as_ref()
            .map_or_else(|| format!("function `{}`", stored.name), |file| file.display().to_string());
        let lines =
            |problems: Vec<config::Problem>| problems.iter().map(|p| p.to_string()).collect::<Vec<_>>();
        let manifest = config::manifest::parse(&shown, &stored.revision.manifest, config).map_err(lines)?;
        let image = Digest::parse(&stored.revision.image).map_err(|bad| vec![format!("{shown}: {bad}")])?;
        let revision =
            Revision { number: stored.revision.number, manifest, image, uid_base: stored.uid_base };
        let unusable = self.make_usable(&revision).await.err();
        Ok(Deployment {
            revision: Arc::new(revision),
            paused: stored.paused,
            file: stored.file,
            created: stored.revision.created,
            unusable,
        })
    }

    async fn make_usable(&self, revision: &Revision) -> Result<(), String> {
        let image =
            self.images.find(revision.image.as_str()).map_err(|error| crate::errors::chain(&error))?;
        let root = root(revision, &image).map_err(|error| crate::errors::chain(&error))?;
        self.runtime.prepare(root).await.map_err(|error| crate::errors::chain(&error))
    }

    async fn retry_unusable(&self) {
        let routes = self.routes.get();
        let mut functions = routes.functions.clone();
        let mut changed = false;
        for deployment in functions.values_mut().filter(|deployment| deployment.unusable.is_some()) {
            let now = self.make_usable(&deployment.revision).await.err();
            changed |= now != deployment.unusable;
            deployment.unusable = now;
        }
        if changed {
            self.publish(&self.config.get(), functions);
        }
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

    /// `neap run`: the image once, with the defaults of a manifest that says nothing else.
    async fn run_once(&self, run: RunOnce) -> Result<RunResult, DeployError> {
        let reference =
            Reference::parse(&run.image).map_err(|bad| DeployError::Invalid(vec![bad.to_string()]));
        let image = match self.images.find(&run.image) {
            Err(ImageError::NotFound(_)) => return Err(DeployError::NoImage(run.image)),
            found => found.map_err(failed)?,
        };
        // An image named by a part of its digest has no reference of its own.
        let reference =
            reference.or_else(|_| Reference::parse(&format!("run@{}", image.digest)).map_err(failed))?;
        let data = STANDARD
            .decode(&run.data)
            .map_err(|bad| DeployError::Invalid(vec![format!("data is not base64: {bad}")]))?;
        let random = fastrand::u32(..);
        let name = FunctionName::parse(&format!("run-{random:08x}")).map_err(failed)?;
        let manifest = Manifest {
            name,
            image: reference,
            handler: Handler::Stdio,
            command: run.command,
            env: run.env,
            limits: config::defaults::limits(),
            scale: config::defaults::scale(),
            retry: config::defaults::retry(),
            triggers: Vec::new(),
            outputs: Vec::new(),
        };
        // The last range of ids belongs to no function.
        let uid_base = UID_BASE_FIRST + FUNCTIONS_MAX.saturating_sub(1) * UID_RANGE;
        let revision = Revision { number: 1, manifest, image: image.digest.clone(), uid_base };
        let root = root(&revision, &image)?;
        self.runtime.prepare(root).await.map_err(|error| match error {
            RuntimeError::Unusable(why) => DeployError::Invalid(vec![why]),
            other => failed(other),
        })?;
        let retire = Retire(self.instances.clone(), revision);
        let now = self.clock.wall();
        let event = Event {
            id: EventId::from_random(fastrand::u128(..).to_le_bytes()),
            source: format!("/{}/run", self.config.get().node.id),
            kind: "neap.run".to_owned(),
            subject: None,
            time: Some(now),
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data,
        };
        let stderr = Arc::new(Mutex::new(String::new()));
        let kept = stderr.clone();
        let log: Box<LogLine> = Box::new(move |line: &str| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() + line.len() < RUN_STDERR_BYTES_MAX {
                kept.push_str(line);
                kept.push('\n');
            }
        });
        let started = std::time::Instant::now();
        let outcome = self.instances.run(&retire.1, &event, &*log).await;
        let (stdout, failure, code) = match outcome {
            Outcome::Succeeded { output, .. } => (output, None, 0),
            Outcome::Failed { failure, output, .. } => {
                let code = match &failure {
                    Failure::Exit(code) => *code,
                    Failure::Signal(signal) => 128 + signal,
                    Failure::OutOfMemory { .. } => 137,
                    Failure::TimedOut { .. } => 124,
                    _ => 125,
                };
                (output, Some(failure.to_string()), code)
            }
            Outcome::Lost => (Vec::new(), Some("the instance was lost".to_owned()), 125),
        };
        let stderr = std::mem::take(&mut *stderr.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(RunResult {
            stdout: STANDARD.encode(stdout),
            stderr: STANDARD.encode(stderr),
            failure,
            code,
            took_ms: started.elapsed().as_millis() as u64,
        })
    }
}

/// Lets a root go when a run ends, however it ends.
struct Retire(Arc<dyn Instances>, Revision);

impl Drop for Retire {
    fn drop(&mut self) {
        self.0.retire(&self.1);
    }
}

/// What the runtime needs to know, from the image and the manifest.
fn root(revision: &Revision, image: &Image) -> Result<Root, DeployError> {
    let manifest = &revision.manifest;
    let command = match &manifest.command {
        Some(command) => command.clone(),
        None => [image.config.entrypoint.as_slice(), image.config.cmd.as_slice()].concat(),
    };
    if command.is_empty() {
        return Err(DeployError::Invalid(vec![format!(
            "image `{}` names no entrypoint or cmd; say `command = [\"…\"]` in the manifest",
            manifest.image
        )]));
    }
    let replaced = |variable: &&String| {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        !manifest.env.contains_key(name)
    };
    let mut env: Vec<String> = image.config.env.iter().filter(replaced).cloned().collect();
    env.extend(manifest.env.iter().map(|(name, value)| format!("{name}={value}")));
    Ok(Root {
        key: revision.key(),
        layers: image.layers.clone(),
        uid_base: revision.uid_base,
        command,
        env,
        user: image.config.user.clone(),
        working_dir: image.config.working_dir.clone(),
        limits: manifest.limits.clone(),
    })
}

/// Every `*.toml` in `dir`, sorted by name.
pub fn manifest_files(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|end| end == "toml") && !hidden {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn read_manifest(file: &Path) -> std::io::Result<String> {
    let bytes = std::fs::metadata(file)?.len();
    if bytes > MANIFEST_BYTES_MAX {
        return Err(std::io::Error::other(format!(
            "{bytes} bytes are more than a manifest may have ({MANIFEST_BYTES_MAX})"
        )));
    }
    std::fs::read_to_string(file)
}

/// What a reload can't change, a line each.
fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = |changed: bool, what: &str| {
        if changed {
            lines.push(format!("{what} changed: takes effect when neap is started again"));
        }
    };
    line(old.node != new.node, "[node]");
    line(old.buffer != new.buffer, "[buffer]");
    line(old.http.listen != new.http.listen, "[http] listen");
    lines
}

fn invalid(problems: Vec<config::Problem>) -> DeployError {
    DeployError::Invalid(problems.iter().map(|problem| problem.to_string()).collect())
}

fn failed(error: impl std::error::Error + 'static) -> DeployError {
    DeployError::Failed(crate::errors::chain(&error))
}
