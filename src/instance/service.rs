//! The instances of one revision that stay up: places for requests, and what `fleet` orders done
//! to each. How one lives is told in `life`; what goes on inside a request is the handler's.

use super::fleet::{Bounds, Fleet, Number, Order, Place as Found};
use super::life::{Instance, Stop};
use super::runtime_api::RuntimeApi;
use crate::channels::Kept;
use crate::deadline::Deadlines;
use crate::model::{Clock, Failure, FunctionName, Revision};
use crate::runtime::{Inside, Runtime};
use crate::telemetry::logs::FunctionLogs;
use crate::watch::{Wake, Watch};
use futures_lite::future;
use smol::Timer;
use std::collections::HashMap;
use std::future::Future;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What services have in common.
pub struct Base {
    pub runtime: Runtime,
    pub executor: Arc<smol::Executor<'static>>,
    pub logs: FunctionLogs,
    pub clock: Arc<dyn Clock>,
    pub kept: Watch<Kept>,
    /// Of requests.
    pub deadlines: Arc<Deadlines>,
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

    /// Returns when one that said it is full takes requests again, or is to be given one to see.
    fn until_room<'a>(
        &'a self,
        instance: &'a Arc<Instance>,
        revision: &'a Revision,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        let _ = (instance, revision);
        Box::pin(async {})
    }

    /// What one that is not ready in time is still waiting for.
    fn waits_for(&self, instance: &Instance) -> Option<String> {
        let _ = instance;
        None
    }

    /// A line for the log of one that never got ready.
    fn not_ready(&self, failure: &Failure, took: Duration) -> Option<String> {
        let _ = (failure, took);
        None
    }
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
    pub(super) base: Arc<Base>,
    pub(super) setup: Arc<dyn Setup>,
    pub(super) fleet: Mutex<Fleet>,
    pub(super) instances: Mutex<HashMap<Number, Arc<Instance>>>,
    /// How many starts have failed, and how the last one did: whoever waited for it fails alike.
    pub(super) failed: Mutex<(u64, Option<NotStarted>)>,
    /// For requests without a place: there may be one.
    pub(super) changed: Wake,
    /// For `tend`: something is due earlier than it thinks.
    due: Wake,
    /// When `tend` looks by itself. Changed with `fleet` locked alone.
    looks_at: Mutex<Option<Duration>>,
    pub(super) closed: Watch<bool>,
}

/// Why there is no instance to serve a request.
#[derive(Clone, Debug)]
pub enum NotStarted {
    /// The function's own failure.
    Failed(Failure),
    /// The node's: not counted against it.
    Lost,
}

impl Base {
    pub fn new(
        runtime: Runtime,
        executor: Arc<smol::Executor<'static>>,
        logs: FunctionLogs,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let kept = Watch::new(Kept::new());
        let deadlines = Arc::new(Deadlines::default());
        let driven = deadlines.clone();
        executor.spawn(async move { driven.drive().await }).detach();
        Self { runtime, executor, logs, clock, kept, deadlines, counts: Mutex::default() }
    }
}

/// One instance more, until it goes.
pub(super) struct Counted {
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
        let (order, sooner) = {
            let mut fleet = lock(&self.service.fleet);
            let order = fleet.release(self.number, self.keep, now);
            (order, self.service.is_due_sooner(&fleet))
        };
        if let Some(Order::Remove(number)) = order {
            // What has shown that it doesn't answer would sit its grace out.
            self.service.remove(number, if self.keep { Stop::Gently } else { Stop::Now });
        }
        self.service.changed.wake();
        if sooner {
            self.service.due.wake();
        }
    }
}

impl Place {
    pub fn give_back(mut self, keep: bool) {
        self.keep = keep;
    }

    /// The instance has said that it takes no more requests than it has: none comes until it does.
    pub fn full(&self) {
        let (service, number) = (self.service.clone(), self.number);
        if !lock(&service.fleet).full(number) {
            return;
        }
        tracing::debug!(instance = self.instance.name, "instance is full");
        let instance = self.instance.clone();
        let asked = async move {
            let ended = async {
                instance.ended().await;
            };
            future::or(service.setup.until_room(&instance, &service.revision), ended).await;
            lock(&service.fleet).roomy(number);
            service.wake();
        };
        self.service.base.executor.spawn(asked).detach();
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
            due: Wake::new(),
            looks_at: Mutex::default(),
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
        // Most find a place at once.
        let mut changed = None;
        loop {
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
                Found::Start(number) => self.begin(number),
                // Looked for once more after listening: no change is lost in between.
                Found::Wait => match changed.take() {
                    None => changed = Some(self.changed.listen()),
                    Some(listener) => listener.await,
                },
            }
        }
    }

    /// What there is to do or to wait for has changed.
    pub(super) fn wake(&self) {
        self.changed.wake();
        self.due.wake();
    }

    /// A request costs `tend` no round: at the most one in `FREEZE_AFTER` does.
    fn is_due_sooner(&self, fleet: &Fleet) -> bool {
        let sooner = match (fleet.next(), *lock(&self.looks_at)) {
            (Some(next), Some(looks_at)) => next < looks_at,
            (next, _) => next.is_some(),
        };
        sooner || *self.closed.get()
    }

    fn begin(self: &Arc<Self>, number: Number) {
        let service = self.clone();
        let counted = Counted::new(self.base.clone(), self.revision.name().clone());
        let life = async move { service.live(number, counted).await };
        self.base.executor.spawn(life).detach();
    }

    /// So many instances are to be ready from now on.
    pub fn keep(&self, count: u32) {
        lock(&self.fleet).keep(count);
        self.wake();
    }

    /// Whether its longest idle instance is to be kept, and since when it has been idle.
    pub fn gives_up(&self) -> Option<(bool, Duration)> {
        lock(&self.fleet).gives_up()
    }

    pub fn give_up_one(&self) -> bool {
        let given = lock(&self.fleet).give_up_one(self.base.clock.monotonic());
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
        self.wake();
    }

    /// Freezes and removes when it is time to.
    async fn tend(self: Arc<Self>) {
        loop {
            let due = self.due.listen();
            // Decided and done without waiting in between: on the one thread that all of this runs
            // on, nobody thaws an instance between the two.
            let orders = lock(&self.fleet).due(self.base.clock.monotonic());
            orders.into_iter().for_each(|order| self.carry_out(order));
            let missing = lock(&self.fleet).missing(self.base.clock.monotonic());
            if let Some(number) = missing {
                self.begin(number);
            }
            let (closed, next) = {
                let fleet = lock(&self.fleet);
                let next = fleet.next();
                *lock(&self.looks_at) = next;
                (*self.closed.get() && fleet.is_empty(), next)
            };
            if closed {
                return;
            }
            match next {
                None => due.await,
                Some(next) => {
                    let wait = next.saturating_sub(self.base.clock.monotonic());
                    let late = async {
                        Timer::after(wait).await;
                    };
                    future::or(due, late).await;
                }
            }
        }
    }

    fn carry_out(&self, order: Order) {
        match order {
            Order::Remove(number) => self.remove(number, Stop::Gently),
            Order::Disconnect(number) => {
                if let Some(instance) = lock(&self.instances).get(&number) {
                    instance.drop_connections();
                }
            }
            Order::Freeze(number) => {
                let instance = lock(&self.instances).get(&number).cloned();
                let Some(instance) = instance else { return };
                if let Err(error) = instance.inside.freeze() {
                    tracing::debug!(instance = instance.name, %error, "not frozen");
                }
            }
        }
    }

    pub(super) fn remove(&self, number: Number, how: Stop) {
        if let Some(instance) = lock(&self.instances).remove(&number) {
            instance.drop_connections();
            instance.stop(how);
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
