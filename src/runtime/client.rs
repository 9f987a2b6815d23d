//! The daemon's side: what it wants from a launcher, and another launcher when one died.
//!
//! Roots belong to the client: a session prepares one when it is first asked to create from it,
//! so that nothing needs replaying after a restart.
//!
//! A few creates at a time are on their way to a launcher: more would only take turns on the
//! same processors, and each takes a process and 1 MiB while it lasts.

use super::cgroup::{Cgroups, Missing, Usage};
use super::egress::{self, Found, Owner};
use super::inside::Inside;
use super::instance::{Instance, ParkedInside, Pipes};
use super::names::{self, Names, RESOLVER};
use super::node_volumes::NodeVolumes;
use super::session::{Answer, Expected, Launching, Process, Session};
use super::wire::{self, Orders, Refusal, Request, RootOrder};
use super::{Parked, Root, RuntimeError, Settings, sys, volumes};
use crate::config::LimitsWanted;
use crate::model::permissions::Allow;
use event_listener::Event;
use futures_lite::FutureExt;
use smol::Timer;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How long a request waits for another launcher before it fails as lost.
const RESTART_MAX: Duration = Duration::from_secs(10);

/// Until `drive` has noticed, too, that the launcher is gone.
const LOST_PAUSE: Duration = Duration::from_millis(20);

/// Between launchers that die at once.
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// A launcher that lived so long died of something new.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// Processes that were killed need a moment to leave their cgroups; an uninterruptible one more.
const SWEEP_MAX: Duration = Duration::from_secs(5);
const SWEEP_EVERY: Duration = Duration::from_millis(10);
pub struct Client {
    settings: Settings,
    /// The binary as it was at start: an upgrade must not bring a launcher that speaks otherwise.
    exe: File,
    cgroups: Cgroups,
    /// Of all instances.
    cgroup: String,
    /// Makes ids differ from those before a restart of the daemon.
    boot: u32,
    instances_made: AtomicU64,
    creating: smol::lock::Semaphore,
    pub node_volumes: NodeVolumes,
    /// What answers for names; `drive` runs it.
    answering: smol::Executor<'static>,
    asking: names::Count,
    state: Mutex<State>,
    /// `state.phase` changed.
    changed: Event,
}

struct State {
    phase: Phase,
    /// What has been prepared and not released: what failed leaves no entry.
    roots: HashMap<String, RootOrder>,
    warnings: Vec<String>,
}

enum Phase {
    /// Between two launchers.
    Down,
    Up(Arc<Session>),
    Stopped,
}

impl Client {
    pub fn start(settings: Settings) -> Result<Arc<Self>, RuntimeError> {
        sys::raise_open_files().map_err(RuntimeError::io("raise the limit of open files"))?;
        let exe = File::open(&settings.exe).map_err(RuntimeError::io("open neap's own binary"))?;
        let cgroups = Cgroups::detect().map_err(RuntimeError::io("find the cgroup file systems"))?;
        let cgroup = cgroups.parent(&settings.cgroup, &settings.data_dir);
        sweep_now(&cgroups, &cgroup);
        egress::sweep(&Owner::new(&cgroup));
        cgroups.make(&cgroup).map_err(RuntimeError::io("make the cgroup of all instances"))?;
        if settings.limits == LimitsWanted::Require {
            let vital: Vec<_> = cgroups.missing(&cgroup).into_iter().filter(Missing::is_vital).collect();
            if !vital.is_empty() {
                cgroups.remove(&cgroup);
                return Err(RuntimeError::Unlimited(vital.iter().map(|m| format!("{m}; ")).collect()));
            }
        }
        std::fs::create_dir_all(state_dir(&settings))
            .map_err(RuntimeError::io("make the launcher's directory"))?;
        let mut client = Self {
            node_volumes: NodeVolumes::new([&settings.data_dir, &settings.run_dir]),
            settings,
            exe,
            cgroups,
            cgroup,
            boot: fastrand::u32(..),
            instances_made: AtomicU64::new(0),
            creating: smol::lock::Semaphore::new(creating_max()),
            answering: smol::Executor::new(),
            asking: names::Count::default(),
            state: Mutex::new(State { phase: Phase::Down, roots: HashMap::new(), warnings: Vec::new() }),
            changed: Event::new(),
        };
        let (session, warnings) = client.launch()?.wait_until_ready()?;
        let state = client.state.get_mut().expect("nobody else has it yet");
        state.warnings = warnings;
        state.phase = Phase::Up(Arc::new(session));
        Ok(Arc::new(client))
    }

    fn launch(&self) -> Result<Launching, RuntimeError> {
        let orders = Orders {
            state_dir: state_dir(&self.settings),
            data_dir: self.settings.data_dir.clone(),
            cgroup: self.cgroup.clone(),
            user_namespaces: self.settings.user_namespaces.into(),
            egress_range: self.settings.egress_range,
        };
        Launching::execute(&self.exe, &orders)
    }

    /// Reads answers, watches the launcher, starts another when it died. Ends after `stop`.
    pub async fn drive(&self) {
        self.answering.run(self.keep_up()).await;
    }

    async fn keep_up(&self) {
        let mut backoff = BACKOFF_FIRST;
        loop {
            let session = match &self.lock().phase {
                Phase::Up(session) => Some(Arc::clone(session)),
                Phase::Down => None,
                Phase::Stopped => return,
            };
            match session {
                Some(session) => {
                    session.serve().await;
                    if session.started.elapsed() >= STABLE_AFTER {
                        backoff = BACKOFF_FIRST;
                    }
                    let stopped = self.enter(Phase::Down);
                    session.close();
                    self.cgroups.thaw_all(&self.cgroup);
                    session.end().await;
                    self.sweep().await;
                    self.sweep_egress().await;
                    if stopped {
                        return;
                    }
                    tracing::warn!(
                        backoff_ms = backoff.as_millis() as u64,
                        "launcher died, its instances are lost"
                    );
                }
                None => match self.relaunch().await {
                    Ok(()) => tracing::info!("launcher started"),
                    Err(err) => {
                        let cause = std::error::Error::source(&err).map(ToString::to_string);
                        tracing::error!(error = %err, cause, "launcher can't be started");
                    }
                },
            }
            if matches!(self.lock().phase, Phase::Down) {
                Timer::after(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            }
        }
    }

    async fn relaunch(&self) -> Result<(), RuntimeError> {
        let launching = self.launch()?;
        let (session, warnings) = launching.ready().await?;
        self.lock().warnings = warnings;
        let session = Arc::new(session);
        if self.enter(Phase::Up(Arc::clone(&session))) {
            session.kill();
            session.end().await;
        }
        Ok(())
    }

    /// Whether it is too late, because the runtime was stopped.
    fn enter(&self, phase: Phase) -> bool {
        let mut state = self.lock();
        let stopped = matches!(state.phase, Phase::Stopped);
        if !stopped {
            state.phase = phase;
        }
        drop(state);
        self.changed.notify(usize::MAX);
        stopped
    }

    pub async fn prepare(&self, root: &Root) -> Result<(), RuntimeError> {
        check_key(&root.key)?;
        let order = RootOrder::new(root, &self.settings.data_dir);
        wire::encode(&Request::Prepare { request: u64::MAX, root: Box::new(order.clone()) })
            .map_err(|err| RuntimeError::Unusable(format!("command and environment are too large: {err}")))?;
        let mut made = Vec::new();
        if !order.volumes.is_empty() {
            let volumes = order.volumes.clone();
            let provided = smol::unblock(move || volumes::provide(&volumes)).await;
            made = provided.map_err(RuntimeError::Unusable)?;
        }
        let is_new = {
            let mut state = self.lock();
            let is_new = state.roots.get(&order.key) != Some(&order);
            if is_new {
                state.roots.remove(&order.key);
            }
            is_new
        };
        let mut done = self.prepare_once(order.clone(), is_new).await;
        if let Err(RuntimeError::Lost) = done {
            Timer::after(LOST_PAUSE).await;
            done = self.prepare_once(order.clone(), is_new).await;
        }
        if done.is_ok() {
            self.lock().roots.insert(order.key.clone(), order);
        } else if !made.is_empty() {
            smol::unblock(move || volumes::remove(&made)).await;
        }
        done
    }

    async fn prepare_once(&self, order: RootOrder, is_new: bool) -> Result<(), RuntimeError> {
        let session = self.session().await?;
        if is_new || !session.knows_root(&order.key) {
            session.forget_root(&order.key);
            self.prepare_in(&session, order).await?;
        }
        Ok(())
    }

    async fn prepare_in(&self, session: &Session, order: RootOrder) -> Result<(), RuntimeError> {
        let key = order.key.clone();
        let order = Box::new(order);
        match session.call(|request| Request::Prepare { request, root: order }, &[]).await? {
            Answer::Refused(refusal) => Err(refusal.into()),
            _ => {
                session.remember_root(key);
                Ok(())
            }
        }
    }

    /// Keys of the roots that are there: prepared and not released.
    pub fn prepared(&self) -> Vec<String> {
        self.lock().roots.keys().cloned().collect()
    }

    pub async fn release(&self, key: &str) {
        let session = {
            let mut state = self.lock();
            state.roots.remove(key);
            match &state.phase {
                Phase::Up(session) => Arc::clone(session),
                _ => return,
            }
        };
        session.forget_root(key);
        if let Ok(bytes) = wire::encode(&Request::Release { key: key.to_owned() }) {
            let _ = session.send(&bytes, &[]).await; // a lost launcher has released everything
        }
    }

    pub async fn refresh_secrets(&self) {
        let session = match &self.lock().phase {
            Phase::Up(session) => Arc::clone(session),
            _ => return, // the next launcher reads them anew
        };
        if let Ok(bytes) = wire::encode(&Request::RefreshSecrets) {
            let _ = session.send(&bytes, &[]).await;
        }
    }

    /// Lets a revision's instances go where names of its led to.
    pub async fn admit(&self, key: &str, found: Vec<Found>) -> Result<(), RuntimeError> {
        let session = self.session().await?;
        let key = key.to_owned();
        match session.call(|request| Request::Admit { request, key, found }, &[]).await? {
            Answer::Refused(refusal) => Err(refusal.into()),
            _ => Ok(()),
        }
    }

    pub async fn create(self: &Arc<Self>, key: &str) -> Result<Parked, RuntimeError> {
        // Once more when the launcher was lost on the way, which is rarely this caller's fault; not
        // a third time: what kills launchers must not take everyone's instances along for long.
        match self.create_once(key).await {
            Err(RuntimeError::Lost) => {}
            done => return done,
        }
        Timer::after(LOST_PAUSE).await;
        self.create_once(key).await
    }

    async fn create_once(self: &Arc<Self>, key: &str) -> Result<Parked, RuntimeError> {
        let session = self.session().await?;
        let of_the_node = self.lock().roots.get(key).map(|order| order.permissions.node_volumes.clone());
        // Whose file system does not answer keeps nobody else's turn.
        let mounts = self.node_volumes.open(&of_the_node.unwrap_or_default()).await?;
        let turn = self.creating.acquire().await;
        let order = self.lock().roots.get(key).cloned();
        let Some(order) = order else {
            return Err(RuntimeError::Launcher(format!("revision {key} was not prepared")));
        };
        let allow = order.permissions.allow.clone();
        if !session.knows_root(key) {
            self.prepare_in(&session, order).await?;
        }
        let number = self.instances_made.fetch_add(1, Ordering::Relaxed);
        let id = format!("{key}.{:08x}.{number}", self.boot);

        let make = RuntimeError::io("make an instance's pipes");
        let (pipes, theirs) = Pipes::make().map_err(make)?;
        let (expected, exit) = Expected::new(&session, &id)?;
        let descriptors: Vec<BorrowedFd<'_>> = theirs.iter().chain(&mounts).map(AsFd::as_fd).collect();
        let asked = (key.to_owned(), id.clone());
        let answer = session
            .call(|request| Request::Create { request, key: asked.0, id: asked.1 }, &descriptors)
            .await;
        drop((theirs, mounts));
        drop(turn);
        match answer? {
            Answer::Created(process) => {
                expected.came();
                let names = self.names(key, allow, &process).map_err(RuntimeError::io("answer for names"))?;
                let instance = Instance { id: id.clone(), process, exit, _names: names };
                Ok(Parked { id, inside: Box::new(ParkedInside { instance, pipes }) })
            }
            Answer::Refused(refusal) => Err(refusal.into()),
            Answer::Done => Err(RuntimeError::Launcher("an answer that was not asked for".to_owned())),
        }
    }

    /// What answers an instance's questions for names, until the instance goes.
    fn names(
        self: &Arc<Self>,
        key: &str,
        allow: Allow,
        process: &Process,
    ) -> io::Result<Option<smol::Task<()>>> {
        if !allow.asks_for_names() {
            return Ok(None);
        }
        let sockets = Inside::new(process.watched()?, None, None).name_sockets(RESOLVER)?;
        let (client, key) = (Arc::downgrade(self), key.to_owned());
        let names = Names::new(allow.to, Arc::clone(&self.asking), move |found| {
            let (client, key) = (client.upgrade(), key.clone());
            async move {
                match client {
                    Some(client) => client.admit(&key, found).await.is_ok(),
                    None => false,
                }
            }
        });
        Ok(Some(self.answering.spawn(names.serve(sockets))))
    }

    pub fn inside(&self, instance: &Instance) -> Result<Inside, RuntimeError> {
        let process = instance.process.watched().map_err(RuntimeError::io("watch an instance"))?;
        let freezer = self.cgroups.freezer(&self.cgroup, &instance.id);
        Ok(Inside::new(process, freezer, self.cgroups.memory_peak(&self.cgroup, &instance.id)))
    }

    pub fn usage(&self) -> BTreeMap<String, Usage> {
        self.cgroups.usage(&self.cgroup)
    }

    /// The launcher in being, waiting for one that is being started.
    async fn session(&self) -> Result<Arc<Session>, RuntimeError> {
        let found = async {
            loop {
                let changed = self.changed.listen();
                match &self.lock().phase {
                    Phase::Up(session) => return Ok(Arc::clone(session)),
                    Phase::Stopped => return Err(RuntimeError::Lost),
                    Phase::Down => {}
                }
                changed.await;
            }
        };
        let late = async {
            Timer::after(RESTART_MAX).await;
            Err(RuntimeError::Lost)
        };
        found.or(late).await
    }

    pub async fn stop(&self) {
        let phase = std::mem::replace(&mut self.lock().phase, Phase::Stopped);
        self.changed.notify(usize::MAX);
        if let Phase::Up(session) = phase {
            session.kill();
            session.close();
            self.cgroups.thaw_all(&self.cgroup);
            session.end().await;
        }
        self.sweep().await;
        self.sweep_egress().await;
        self.cgroups.remove(&self.cgroup);
        let _ = std::fs::remove_dir(state_dir(&self.settings));
    }

    /// Removes the cgroups of a launcher that has ended.
    async fn sweep(&self) {
        let start = Instant::now();
        loop {
            let left = self.cgroups.sweep(&self.cgroup);
            if left == 0 {
                return;
            }
            if start.elapsed() > SWEEP_MAX {
                tracing::warn!(left, "cgroups of lost instances are still in use");
                return;
            }
            Timer::after(SWEEP_EVERY).await;
        }
    }

    /// Hundreds of lines take the kernel seconds.
    async fn sweep_egress(&self) {
        let owner = Owner::new(&self.cgroup);
        smol::unblock(move || egress::sweep(&owner)).await;
    }

    pub fn warnings(&self) -> Vec<String> {
        self.lock().warnings.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the state")
    }
}

impl Drop for Client {
    /// Without `stop`: the launcher must not outlive its client, nor its cgroups.
    fn drop(&mut self) {
        if let Ok(state) = self.state.get_mut()
            && let Phase::Up(session) = &state.phase
        {
            session.kill();
            self.cgroups.thaw_all(&self.cgroup);
            session.end_now();
            sweep_now(&self.cgroups, &self.cgroup);
            egress::sweep(&Owner::new(&self.cgroup));
            self.cgroups.remove(&self.cgroup);
        }
    }
}

/// Before the executor runs: leftovers of a daemon that was killed.
fn sweep_now(cgroups: &Cgroups, cgroup: &str) {
    let start = Instant::now();
    while cgroups.sweep(cgroup) > 0 && start.elapsed() < SWEEP_MAX {
        std::thread::sleep(SWEEP_EVERY);
    }
}

/// Creates at once: they wait for the kernel a third of their time.
fn creating_max() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get() * 2).clamp(2, 16)
}

/// Becomes part of an instance's id, which is a cgroup's name and a state directory's.
fn check_key(key: &str) -> Result<(), RuntimeError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    if (1..=128).contains(&key.len()) && key.chars().all(good) && !key.starts_with('.') {
        return Ok(());
    }
    Err(RuntimeError::Unusable(format!("revision key `{key}` has characters that a name can't have")))
}

fn state_dir(settings: &Settings) -> PathBuf {
    settings.run_dir.join("launcher")
}

impl From<Refusal> for RuntimeError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unusable(why) => Self::Unusable(why),
            Refusal::NoWayOut(why) => Self::NoWayOut(why),
            Refusal::Failed(why) => Self::Launcher(why),
        }
    }
}
