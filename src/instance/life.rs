//! One instance that stays up: created, started, proven ready, its output logged, ended.
//!
//! ```text
//!   created ──▶ started ──ready──▶ serving ──▶ ended ──▶ its last lines
//!                  │                  │  Stop::Gently: extensions told, SIGTERM, SIGKILL
//!                  │                  └─ Stop::Now: SIGKILL
//!                  └─ failed, ended, late ──▶ SIGKILL ──▶ why, with its last lines
//! ```
//!
//! An instance is one task from its creation to its last line of log; that task alone owns the
//! container, everyone else asks it to stop.

use super::fleet::{CONNECTION_IDLE, Number};
use super::lines::read_lines;
use super::runtime_api::RuntimeApi;
use super::service::{Before, Counted, NotStarted, Service, lock};
use crate::channels::LogLine;
use crate::model::{EventId, Failure, Revision};
use crate::net::http::{Upstream, serve_inside};
use crate::runtime::{Exit, Extensions, Inside, Parked, Running, RuntimeError};
use crate::watch::Watch;
use futures_lite::future;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Between SIGTERM and SIGKILL, as on Cloud Run.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// For Lambda's extensions, which are told first: what AWS gives them.
const EXTENSIONS_GRACE: Duration = Duration::from_secs(2);

/// An extension whose instance has not ended so long after it has ended by itself. Generous: the
/// instance's end is told by way of the launcher, and says more.
const EXTENSION_ALONE: Duration = Duration::from_secs(2);

/// What a function wrote last, for the message that it never got ready.
const TAIL_LINES: usize = 8;
const TAIL_LINE_CHARS: usize = 200;

/// For the last lines of an instance that has ended.
const LAST_LINES: Duration = Duration::from_secs(1);

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

pub struct Instance {
    /// Unique on this node for this boot.
    pub name: String,
    pub inside: Inside,
    pub exit: Watch<Option<Exit>>,
    /// Of handler lambda.
    pub api: Option<Arc<RuntimeApi>>,
    /// Of handler lambda, when its image has any.
    pub extensions: Option<Extensions>,
    /// Requests that got an answer.
    pub answered: AtomicU64,
    /// Whom its lines belong to: the event it was last given.
    event: Mutex<EventId>,
    connections: Mutex<Vec<(Upstream, Duration)>>,
    stop: Sender<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// SIGTERM, then SIGKILL.
    Gently,
    Now,
}

impl Service {
    /// From the container's creation to its end.
    pub(super) async fn live(self: Arc<Self>, number: Number, counted: Counted) {
        let why = self.serve_until_ended(number).await.err();
        let fails_waiting = {
            let mut fleet = lock(&self.fleet);
            let fails_waiting = fleet.fails_waiting(number);
            // Who is removed on purpose is no member any more.
            if fleet.has(number) {
                fleet.gone(number);
                fleet.ended_by_itself(self.base.clock.monotonic(), fastrand::u64(..));
            }
            fails_waiting
        };
        lock(&self.instances).remove(&number);
        if let Some(why) = why.filter(|_| fails_waiting) {
            let mut failed = lock(&self.failed);
            *failed = (failed.0 + 1, Some(why));
        }
        drop(counted);
        self.wake();
    }

    async fn serve_until_ended(&self, number: Number) -> Result<(), NotStarted> {
        let revision = &self.revision;
        let key = revision.key();
        let parked = self.base.runtime.create(&key).await.map_err(|error| not_started(&key, error))?;
        let name = parked.id.clone();
        let inside = self.base.runtime.inside(&parked).map_err(|error| not_started(&key, error))?;
        let unusable = |why| NotStarted::Failed(Failure::Start(why));
        let Before { env, api } = self.setup.before(&inside, revision).map_err(unusable)?;
        let (listener, api) = api.unzip();
        let (running, instance, stops) = self.start(parked, name, inside, env, api.clone()).await?;
        let live = self.run(number, running, &instance, &stops);
        let serve = async {
            if let Some((listener, api)) = listener.zip(api) {
                serve_inside(listener, api.answer()).await;
            }
            future::pending().await
        };
        let watch = async {
            if let Some(extensions) = &instance.extensions {
                self.watch(&instance, extensions).await;
            }
            future::pending().await
        };
        future::or(live, future::or(serve, watch)).await
    }

    /// An extension that ends by itself ends its instance, as on AWS.
    async fn watch(&self, instance: &Instance, extensions: &Extensions) {
        let name = extensions.one_ended().await;
        // With the command all of them end, and before it is reaped.
        if instance.ended_within(EXTENSION_ALONE).await.is_some() {
            return;
        }
        if instance.api.as_ref().is_some_and(|api| api.extension_ended(name)) {
            let event = lock(&instance.event).clone();
            let line = format!("Extension.Crash: extension `{name}` has ended");
            self.base.logs.append(self.revision.name(), &event, self.base.clock.wall(), &line);
            instance.stop(Stop::Now);
        }
    }

    async fn start(
        &self,
        parked: Parked,
        name: String,
        inside: Inside,
        env: Vec<(String, String)>,
        api: Option<Arc<RuntimeApi>>,
    ) -> Result<(Running, Arc<Instance>, Receiver<Stop>), NotStarted> {
        let failed = |error| not_started(&self.revision.key(), error);
        let (running, extensions) = match &api {
            Some(_) if self.revision.manifest.serving.extensions => {
                parked.start_with_extensions(env).await.map_err(failed)?
            }
            _ => (parked.start(env).await.map_err(failed)?, None),
        };
        if let (Some(api), Some(extensions)) = (&api, &extensions) {
            api.extensions_started(&extensions.names);
        }
        let (stop, stops) = smol::channel::bounded(2);
        let own = EventId::parse(&name).unwrap_or_else(|| EventId::from_random([0; 16]));
        let instance = Arc::new(Instance {
            name,
            inside,
            api,
            extensions,
            exit: Watch::new(None),
            answered: AtomicU64::new(0),
            event: Mutex::new(own),
            connections: Mutex::default(),
            stop,
        });
        Ok((running, instance, stops))
    }

    async fn run(
        &self,
        number: Number,
        mut running: Running,
        instance: &Arc<Instance>,
        stops: &Receiver<Stop>,
    ) -> Result<(), NotStarted> {
        drop(running.stdin.take()); // the contract: end of file
        let (stdout, stderr) = (running.stdout.take(), running.stderr.take());
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let log: Box<LogLine> = {
            let (base, name) = (self.base.clone(), self.revision.name().clone());
            let (instance, tail) = (instance.clone(), tail.clone());
            Box::new(move |text: &str| {
                let event = lock(&instance.event).clone();
                base.logs.append(&name, &event, base.clock.wall(), text);
                remember(&mut lock(&tail), text);
            })
        };
        let log = &*log;
        let lines = async {
            let stdout = async {
                if let Some(stdout) = stdout {
                    read_lines(stdout, None, log).await;
                }
            };
            let stderr = async {
                if let Some(stderr) = stderr {
                    read_lines(stderr, None, log).await;
                }
            };
            future::zip(stdout, stderr).await;
        };
        let mut lines = std::pin::pin!(lines);
        let mut written = false;
        let start = Instant::now();
        let (exit, why) = {
            let logging = async {
                lines.as_mut().await;
                written = true;
                future::pending().await
            };
            future::or(self.phases(number, &mut running, instance, stops), logging).await
        };
        let took = start.elapsed();
        instance.exit.set(Some(exit));
        if !written {
            let late = async {
                Timer::after(LAST_LINES).await;
            };
            future::or(lines, late).await;
        }
        tracing::debug!(instance = instance.name, ?exit, "instance ended");
        if let Some(NotStarted::Failed(failure)) = &why
            && let Some(line) = self.setup.not_ready(failure, took)
        {
            let event = lock(&instance.event).clone();
            self.base.logs.append(self.revision.name(), &event, self.base.clock.wall(), &line);
        }
        match why {
            None => Ok(()),
            Some(_) if exit == Exit::Lost => Err(NotStarted::Lost),
            Some(NotStarted::Failed(failure)) => {
                let said: Vec<String> = lock(&tail).drain(..).collect();
                Err(NotStarted::Failed(Failure::Start(described(&failure, &said))))
            }
            Some(lost) => Err(lost),
        }
    }

    /// How it ended, and why it never got ready if it didn't.
    async fn phases(
        &self,
        number: Number,
        running: &mut Running,
        instance: &Arc<Instance>,
        stops: &Receiver<Stop>,
    ) -> (Exit, Option<NotStarted>) {
        enum Next {
            Ready,
            NotReady(String),
            Ended(Exit),
            Stop(Stop),
        }
        let told = || async {
            match stops.recv().await {
                Ok(stop) => Next::Stop(stop),
                Err(_) => future::pending().await,
            }
        };
        let limit = self.revision.manifest.serving.start;
        let first = {
            let ended = async { Next::Ended(running.wait().await) };
            let ready = async {
                match self.setup.ready(instance, &self.revision).await {
                    Ok(()) => Next::Ready,
                    Err(why) => Next::NotReady(why),
                }
            };
            let late = async {
                Timer::after(limit).await;
                let missing = self.setup.waits_for(instance).map(|what| format!(": {what}"));
                Next::NotReady(format!("was not ready after {limit:?}{}", missing.unwrap_or_default()))
            };
            // An end says more than a connection that it broke.
            future::or(ended, future::or(ready, future::or(told(), late))).await
        };
        match first {
            Next::Ready => {}
            Next::Ended(exit) => {
                let failure = NotStarted::Failed(exit_failure(exit, &self.revision));
                return (exit, Some(failure));
            }
            Next::NotReady(why) => {
                running.signal(SIGKILL);
                return (running.wait().await, Some(NotStarted::Failed(Failure::Answer(why))));
            }
            Next::Stop(_) => {
                running.signal(SIGKILL);
                return (running.wait().await, Some(NotStarted::Lost));
            }
        }
        {
            // Together: who gets the place finds the instance, and who closes finds both.
            let mut fleet = lock(&self.fleet);
            lock(&self.instances).insert(number, instance.clone());
            fleet.ready(number, self.base.clock.monotonic());
            if *self.closed.get() && !fleet.has(number) {
                drop(fleet);
                self.remove(number, Stop::Gently);
            }
        }
        self.wake();
        tracing::debug!(instance = instance.name, "instance is ready");

        let stop = {
            let ended = async { Next::Ended(running.wait().await) };
            match future::or(ended, told()).await {
                Next::Ended(exit) => return (exit, None),
                Next::Stop(stop) => stop,
                Next::Ready | Next::NotReady(_) => Stop::Now,
            }
        };
        if stop == Stop::Gently {
            let _ = instance.inside.thaw();
            let deadline_ms = self.base.clock.wall().0 + EXTENSIONS_GRACE.as_millis() as i64;
            if instance.api.as_ref().is_some_and(|api| api.shut_down(deadline_ms)) {
                let ended = async { Some(running.wait().await) };
                let late = async {
                    Timer::after(EXTENSIONS_GRACE).await;
                    None
                };
                let done = async {
                    match &instance.extensions {
                        Some(extensions) => extensions.all_ended().await,
                        None => future::pending().await,
                    }
                    None
                };
                if let Some(exit) = future::or(ended, future::or(done, late)).await {
                    return (exit, None);
                }
            }
            running.signal(SIGTERM);
            let ended = async { Some(running.wait().await) };
            let late = async {
                Timer::after(STOP_GRACE).await;
                None
            };
            let hurried = async {
                told().await;
                None
            };
            if let Some(exit) = future::or(ended, future::or(late, hurried)).await {
                return (exit, None);
            }
        }
        running.signal(SIGKILL);
        // v1: the frozen don't die. It can't run any further.
        let _ = instance.inside.thaw();
        (running.wait().await, None)
    }
}

impl Instance {
    /// From here on its lines belong to this event.
    pub fn begin(&self, event: &EventId) {
        *lock(&self.event) = event.clone();
    }

    pub(super) fn stop(&self, how: Stop) {
        let _ = self.stop.try_send(how); // it may be stopping already
    }

    pub(super) fn drop_connections(&self) {
        lock(&self.connections).clear();
    }

    /// A kept connection that is still fresh.
    pub fn connection(&self, now: Duration) -> Option<Upstream> {
        let mut connections = lock(&self.connections);
        connections.retain(|(upstream, since)| upstream.is_open() && *since + CONNECTION_IDLE > now);
        connections.pop().map(|(upstream, _)| upstream)
    }

    pub fn keep(&self, upstream: Upstream, now: Duration) {
        if upstream.is_open() {
            lock(&self.connections).push((upstream, now));
        }
    }

    pub fn count_answer(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// Until it has ended.
    pub async fn ended(&self) -> Exit {
        loop {
            let (seen, exit) = self.exit.versioned();
            if let Some(exit) = *exit {
                return exit;
            }
            self.exit.changed(seen).await;
        }
    }

    /// How it ended, if it does within a moment: what ended is likelier the reason for a broken
    /// connection than the connection itself.
    pub async fn ended_within(&self, moment: Duration) -> Option<Exit> {
        let ended = async { Some(self.ended().await) };
        let late = async {
            Timer::after(moment).await;
            None
        };
        future::or(ended, late).await
    }
}

/// An ending that nobody ordered.
pub fn exit_failure(exit: Exit, revision: &Revision) -> Failure {
    match exit {
        Exit::Code(code) => Failure::Exit(code),
        Exit::Signal(signal) => Failure::Signal(signal),
        Exit::OutOfMemory => Failure::OutOfMemory { limit_bytes: revision.manifest.limits.memory_bytes },
        Exit::Lost => Failure::Answer("the instance was lost".to_owned()),
    }
}

fn not_started(key: &str, error: RuntimeError) -> NotStarted {
    match error {
        RuntimeError::Unusable(why) => NotStarted::Failed(Failure::Start(why)),
        error => {
            tracing::warn!(root = key, error = crate::errors::chain(&error), "instance not started");
            NotStarted::Lost
        }
    }
}

fn described(failure: &Failure, said: &[String]) -> String {
    let what = match failure {
        Failure::Answer(why) => why.clone(),
        other => format!("{other} before it was ready"),
    };
    if said.is_empty() {
        format!("the function {what}; it wrote nothing")
    } else {
        format!("the function {what}; its last lines: {}", said.join(" | "))
    }
}

fn remember(tail: &mut VecDeque<String>, text: &str) {
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(line.chars().take(TAIL_LINE_CHARS).collect());
    }
}
