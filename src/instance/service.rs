//! The instances of one revision that stay up: started when `fleet` says so, proven ready, their
//! output logged, frozen, thawed and ended. What goes on inside a request is the handler's.
//!
//! Each instance is one task from its creation to its last line of log; that task alone owns the
//! container, everyone else asks it to stop.

use super::fleet::{Bounds, Fleet, Number, Order, Place as Found};
use super::lines::read_lines;
use super::runtime_api::RuntimeApi;
use crate::channels::{Kept, LogLine};
use crate::model::{Clock, EventId, Failure, FunctionName, Revision};
use crate::net::http::{Upstream, serve_inside};
use crate::runtime::{Exit, Inside, Parked, Running, Runtime, RuntimeError};
use crate::telemetry::logs::FunctionLogs;
use crate::watch::{Wake, Watch};
use futures_lite::future;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between SIGTERM and SIGKILL, as on Cloud Run.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// What a function wrote last, for the message that it never got ready.
const TAIL_LINES: usize = 8;
const TAIL_LINE_CHARS: usize = 200;

/// For the last lines of an instance that has ended.
const LAST_LINES: Duration = Duration::from_secs(1);

/// A kept-alive connection is not used after this: servers close idle ones, the hastiest after
/// two seconds (gunicorn), and a request that meets the close is lost.
const CONNECTION_IDLE: Duration = Duration::from_secs(1);

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// What services have in common.
pub struct Base {
    pub runtime: Runtime,
    pub executor: Arc<smol::Executor<'static>>,
    pub logs: FunctionLogs,
    pub clock: Arc<dyn Clock>,
    pub kept: Watch<Kept>,
    counts: Mutex<Kept>,
}

/// What a handler does to make an instance its own.
pub trait Setup: Send + Sync + 'static {
    /// Before it runs: what it finds in its environment beside the image's.
    fn before(&self, inside: &Inside, revision: &Revision) -> Result<Before, String>;

    /// Returns when it may be given requests; why not, for people.
    fn ready<'a>(
        &'a self,
        instance: &'a Arc<Instance>,
        revision: &'a Revision,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;
}

/// What an instance starts with.
pub struct Before {
    pub env: Vec<(String, String)>,
    /// Served to it for as long as it lives.
    pub api: Option<(smol::Async<TcpListener>, Arc<RuntimeApi>)>,
}

/// One revision's instances.
pub struct Service {
    pub revision: Revision,
    base: Arc<Base>,
    setup: Arc<dyn Setup>,
    fleet: Mutex<Fleet>,
    instances: Mutex<HashMap<Number, Arc<Instance>>>,
    /// How many starts have failed, and how the last one did: whoever waited for it fails alike.
    failed: Mutex<(u64, Option<NotStarted>)>,
    changed: Wake,
    closed: Watch<bool>,
}

/// Why there is no instance to serve a request.
#[derive(Clone, Debug)]
pub enum NotStarted {
    /// The function's own failure.
    Failed(Failure),
    /// The node's: not counted against it.
    Lost,
}

pub struct Instance {
    /// Unique on this node for this boot.
    pub name: String,
    pub inside: Inside,
    pub exit: Watch<Option<Exit>>,
    /// Of handler lambda.
    pub api: Option<Arc<RuntimeApi>>,
    /// Requests that got an answer.
    pub answered: AtomicU64,
    /// Whom its lines belong to: the event it was last given.
    event: Mutex<EventId>,
    connections: Mutex<Vec<(Upstream, Duration)>>,
    stop: Sender<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// SIGTERM, then SIGKILL.
    Gently,
    Now,
}

impl Base {
    pub fn new(
        runtime: Runtime,
        executor: Arc<smol::Executor<'static>>,
        logs: FunctionLogs,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let kept = Watch::new(Kept::new());
        Self { runtime, executor, logs, clock, kept, counts: Mutex::default() }
    }
}

/// One instance more, until it goes.
struct Counted {
    base: Arc<Base>,
    function: FunctionName,
}

impl Counted {
    fn new(base: Arc<Base>, function: FunctionName) -> Self {
        let mut counts = lock(&base.counts);
        *counts.entry(function.clone()).or_default() += 1;
        base.kept.set(counts.clone());
        drop(counts);
        Self { base, function }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = lock(&self.base.counts);
        if let Some(count) = counts.get_mut(&self.function) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.function);
            }
        }
        self.base.kept.set(counts.clone());
    }
}

/// A request's place on an instance, given back when this goes.
pub struct Place {
    pub instance: Arc<Instance>,
    service: Arc<Service>,
    number: Number,
    /// False: the instance takes nothing new and goes with its last request.
    pub keep: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let now = self.service.base.clock.monotonic();
        let order = lock(&self.service.fleet).release(self.number, self.keep, now);
        if let Some(Order::Remove(number)) = order {
            // It has shown that it doesn't answer.
            self.service.remove(number, Stop::Now);
        }
        self.service.changed.wake();
    }
}

/// A request that has no place yet.
struct Waiting<'a>(&'a Service);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.0.fleet).leave();
    }
}

impl Service {
    pub fn new(base: Arc<Base>, revision: Revision, setup: Arc<dyn Setup>) -> Arc<Self> {
        let (scale, serving) = (&revision.manifest.scale, &revision.manifest.serving);
        let bounds =
            Bounds { instances_max: scale.max, concurrency: serving.concurrency, idle: serving.idle };
        let service = Arc::new(Self {
            revision,
            base,
            setup,
            fleet: Mutex::new(Fleet::new(bounds)),
            instances: Mutex::default(),
            failed: Mutex::default(),
            changed: Wake::new(),
            closed: Watch::new(false),
        });
        let task = {
            let service = service.clone();
            async move { service.tend().await }
        };
        service.base.executor.spawn(task).detach();
        service
    }

    /// Waits for an instance that has room, starting one where `fleet` wants it.
    pub async fn place(self: &Arc<Self>) -> Result<Place, NotStarted> {
        lock(&self.fleet).enter();
        let _waiting = Waiting(self);
        let failed_before = lock(&self.failed).0;
        loop {
            let changed = self.changed.listen();
            {
                let failed = lock(&self.failed);
                if let (count, Some(why)) = &*failed
                    && *count > failed_before
                {
                    return Err(why.clone());
                }
            }
            if *self.closed.get() {
                return Err(NotStarted::Lost);
            }
            let found = lock(&self.fleet).acquire();
            match found {
                Found::On { number, frozen } => {
                    let instance = lock(&self.instances).get(&number).cloned();
                    let Some(instance) = instance else {
                        lock(&self.fleet).gone(number);
                        continue;
                    };
                    if frozen && let Err(error) = instance.inside.thaw() {
                        tracing::warn!(instance = instance.name, %error, "not thawed");
                    }
                    return Ok(Place { instance, service: self.clone(), number, keep: true });
                }
                Found::Start(number) => {
                    let service = self.clone();
                    let counted = Counted::new(self.base.clone(), self.revision.name().clone());
                    let life = async move { service.live(number, counted).await };
                    self.base.executor.spawn(life).detach();
                }
                Found::Wait => changed.await,
            }
        }
    }

    /// Since when its longest idle instance has been so.
    pub fn idle_since(&self) -> Option<Duration> {
        lock(&self.fleet).idle_since()
    }

    pub fn give_up_one(&self) -> bool {
        let given = lock(&self.fleet).give_up_one();
        if let Some((number, _)) = given {
            // Somebody waits for its memory, and a first process without a handler for SIGTERM would
            // sit its grace out.
            self.remove(number, Stop::Now);
        }
        given.is_some()
    }

    /// Nothing new comes to this revision.
    pub fn close(&self) {
        let orders = lock(&self.fleet).close();
        self.closed.set(true);
        for order in orders {
            self.carry_out(order);
        }
        self.changed.wake();
    }

    /// Freezes and removes when it is time to.
    async fn tend(self: Arc<Self>) {
        loop {
            let changed = self.changed.listen();
            // Decided and done without waiting in between: on the one thread that all of this runs
            // on, nobody thaws an instance between the two.
            let orders = lock(&self.fleet).due(self.base.clock.monotonic());
            orders.into_iter().for_each(|order| self.carry_out(order));
            let (closed, next) = {
                let fleet = lock(&self.fleet);
                (*self.closed.get() && fleet.is_empty(), fleet.next())
            };
            if closed {
                return;
            }
            match next {
                None => changed.await,
                Some(next) => {
                    let wait = next.saturating_sub(self.base.clock.monotonic());
                    let late = async {
                        Timer::after(wait).await;
                    };
                    future::or(changed, late).await;
                }
            }
        }
    }

    fn carry_out(&self, order: Order) {
        match order {
            Order::Remove(number) => self.remove(number, Stop::Gently),
            Order::Freeze(number) => {
                let instance = lock(&self.instances).get(&number).cloned();
                let Some(instance) = instance else { return };
                // A server that was frozen closes what was idle as soon as it is thawed.
                lock(&instance.connections).clear();
                if let Err(error) = instance.inside.freeze() {
                    tracing::debug!(instance = instance.name, %error, "not frozen");
                }
            }
        }
    }

    fn remove(&self, number: Number, how: Stop) {
        if let Some(instance) = lock(&self.instances).remove(&number) {
            lock(&instance.connections).clear();
            let _ = instance.stop.try_send(how); // it may be stopping already
        }
    }

    /// From the container's creation to its end.
    async fn live(self: Arc<Self>, number: Number, counted: Counted) {
        let why = self.serve_until_ended(number).await.err();
        lock(&self.fleet).gone(number);
        lock(&self.instances).remove(&number);
        if let Some(why) = why {
            let mut failed = lock(&self.failed);
            *failed = (failed.0 + 1, Some(why));
        }
        drop(counted);
        self.changed.wake();
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
        future::or(live, serve).await
    }

    async fn start(
        &self,
        parked: Parked,
        name: String,
        inside: Inside,
        env: Vec<(String, String)>,
        api: Option<Arc<RuntimeApi>>,
    ) -> Result<(Running, Arc<Instance>, Receiver<Stop>), NotStarted> {
        let running = parked.start(env).await.map_err(|error| not_started(&self.revision.key(), error))?;
        let (stop, stops) = smol::channel::bounded(2);
        let own = EventId::parse(&name).unwrap_or_else(|| EventId::from_random([0; 16]));
        let instance = Arc::new(Instance {
            name,
            inside,
            api,
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
        let (exit, why) = {
            let logging = async {
                lines.as_mut().await;
                written = true;
                future::pending().await
            };
            future::or(self.phases(number, &mut running, instance, stops), logging).await
        };
        instance.exit.set(Some(exit));
        if !written {
            let late = async {
                Timer::after(LAST_LINES).await;
            };
            future::or(lines, late).await;
        }
        tracing::debug!(instance = instance.name, ?exit, "instance ended");
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
                Next::NotReady(format!("was not ready after {limit:?}"))
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
        self.changed.wake();
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
