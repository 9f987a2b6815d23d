//! Asks the store what is due, starts what `plan` allows, tells the store how it ended.
//!
//! Level-triggered: a wake, an ended instance and a period all mean "look again". The loop
//! itself never waits for the disk or a container: those run as tasks that report back.

use super::budget::Budget;
use super::gates::{self, Gates};
use super::parking::{Ahead, Parking};
use super::plan::{Capacity, Grant, Plan, Refusal, Ticket};
use super::pool::Bounds;
use super::pressure::Pressure;
use super::settle::{self, Context, Said};
use crate::channels::{
    CallError, Exchange, Instances, Invoke, Kept, LogLine, Parked, Reply, Response, Trials,
};
use crate::ingress::routes::Routes;
use crate::model::function::FunctionLoad;
use crate::model::{Clock, Event, Failure, FunctionName, Outcome, Revision};
use crate::net::http::Passing;
use crate::store::{Leased, Settlement, Store, StoreError};
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::{Ended, Metrics};
use crate::watch::{Wake, Watch};
use futures_lite::future;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a synchronous call waits for a slot before 503.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The loop looks by itself at least this often: a lost wake costs this much time.
const PERIOD: Duration = Duration::from_secs(5);

/// Pause before another try of what the store refused (a full disk).
const STORE_RETRY: Duration = Duration::from_secs(1);

/// What the scheduler needs; the daemon makes it.
pub struct Scheduler {
    pub store: Store,
    pub instances: Arc<dyn Instances>,
    pub routes: Watch<Routes>,
    pub calls: Receiver<Invoke>,
    /// New work in the inbox.
    pub inbox: Wake,
    /// To be woken when an outcome added deliveries.
    pub outbox: Wake,
    pub logs: FunctionLogs,
    pub metrics: Metrics,
    /// New revisions, which prove themselves by their first events.
    pub trials: Trials,
    pub clock: Arc<dyn Clock>,
    pub executor: Arc<smol::Executor<'static>>,
    pub budget_bytes: u64,
    /// Parked instances of all functions.
    pub parked_max: u32,
    /// How short memory is; whoever changes it wakes the inbox.
    pub pressure: Watch<Pressure>,
    pub load: Watch<Load>,
    /// Rates and circuit breakers; `neap status` looks at them.
    pub gates: Arc<Mutex<Gates>>,
    pub stop: Watch<Stop>,
}

/// What the scheduler is doing, for `neap status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// That run.
    pub instances: u64,
    pub parked: u64,
    /// By running and parked instances.
    pub reserved_bytes: u64,
    pub budget_bytes: u64,
    /// Those with anything to tell.
    pub functions: BTreeMap<FunctionName, FunctionLoad>,
}

/// How far the daemon's stop has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stop {
    #[default]
    Run,
    /// Nothing new starts; what runs may finish.
    Drain,
    /// What still runs is killed, its events go back in line.
    Abandon,
}

/// What was still running when the grace period ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Abandoned {
    pub instances: u64,
}

pub(super) enum Input {
    Call(Box<Invoke>),
    Due(Result<(Vec<FunctionName>, Option<Duration>), StoreError>),
    Leased(Result<Vec<Leased>, StoreError>, Vec<(FunctionName, Vec<Grant>)>),
    Ended(Grant, Arc<Revision>),
    /// An instance ahead of its event, or why there is none.
    Parked(Arc<Revision>, Result<Box<dyn Parked>, String>),
    /// A parked one, by its number.
    Died(Arc<Revision>, u64),
    Look,
    /// Somebody committed work.
    Woken,
    Routes(u64, Arc<Routes>),
    Kept(u64, Arc<Kept>),
    Stop(u64, Stop),
}

struct State {
    plan: Plan,
    routes: Arc<Routes>,
    waiting: HashMap<Ticket, (Invoke, Instant)>,
    next_ticket: Ticket,
    /// Running instances by revision, so that an old root goes with its last one.
    running: HashMap<String, (Arc<Revision>, u64)>,
    parking: Parking,
    /// The store should be asked (again) what is due.
    look: bool,
    /// It is being asked, or is leasing.
    asking: bool,
    next_due: Option<Instant>,
    stop: Stop,
}

impl Scheduler {
    /// Runs until the stop has come to its end and nothing runs any more.
    pub async fn run(self) -> Abandoned {
        let this = Arc::new(self);
        // Bounded by running instances and parked ones.
        let (inputs_tx, inputs) = smol::channel::unbounded();
        let (mut routes_seen, routes) = this.routes.versioned();
        let (mut stop_seen, stop) = this.stop.versioned();
        let kept_watch = this.instances.kept();
        let (mut kept_seen, _) = kept_watch.versioned();
        let mut state = State {
            plan: Plan::new(Budget::new(this.budget_bytes)),
            routes: Arc::default(),
            waiting: HashMap::new(),
            next_ticket: 0,
            running: HashMap::new(),
            parking: Parking::default(),
            look: true,
            asking: false,
            next_due: None,
            stop: *stop,
        };
        this.take_routes(&mut state, routes);
        let mut abandoned = Abandoned::default();
        // Kept from round to round: a wake that comes together with another input is not lost.
        let mut woken = this.inbox.listen();
        loop {
            this.act(&mut state, &inputs_tx);
            if state.stop != Stop::Run && state.plan.taken() == 0 && !state.asking {
                return abandoned;
            }
            let input = {
                let call = async {
                    this.calls.recv().await.map_or_else(|_| None, |call| Some(Input::Call(Box::new(call))))
                };
                let call = async {
                    match call.await {
                        Some(input) => input,
                        None => future::pending().await,
                    }
                };
                let own = async { inputs.recv().await.unwrap_or(Input::Look) };
                let routes = async {
                    let (version, routes) = this.routes.changed(routes_seen).await;
                    Input::Routes(version, routes)
                };
                let kept = async {
                    let (version, kept) = kept_watch.changed(kept_seen).await;
                    Input::Kept(version, kept)
                };
                let stop = async {
                    let (version, stop) = this.stop.changed(stop_seen).await;
                    Input::Stop(version, *stop)
                };
                let timer = async {
                    Timer::after(state.pause()).await;
                    Input::Look
                };
                let woken = async {
                    (&mut woken).await;
                    Input::Woken
                };
                let changes = future::or(stop, future::or(routes, future::or(own, kept)));
                future::or(changes, future::or(call, future::or(woken, timer))).await
            };
            match input {
                Input::Call(call) => this.take_call(&mut state, *call),
                Input::Look => state.look = true,
                Input::Woken => {
                    woken = this.inbox.listen();
                    state.look = true;
                }
                Input::Due(due) => this.take_due(&mut state, due, &inputs_tx),
                Input::Leased(leased, held) => this.take_leased(&mut state, leased, held, &inputs_tx),
                Input::Ended(grant, revision) => {
                    state.plan.ended(grant);
                    this.leave(&mut state, &revision);
                    state.look = true;
                }
                Input::Parked(revision, made) => state.parking.made(&this, &revision, made, &inputs_tx),
                Input::Died(revision, number) => state.parking.died(&this, &revision, number),
                Input::Routes(version, routes) => {
                    routes_seen = version;
                    this.take_routes(&mut state, routes);
                    state.look = true;
                }
                Input::Kept(version, kept) => {
                    kept_seen = version;
                    state.plan.set_kept(&kept);
                    state.look = true;
                }
                Input::Stop(version, stop) => {
                    stop_seen = version;
                    state.stop = stop;
                    if stop == Stop::Abandon {
                        abandoned.instances = state.plan.taken();
                    }
                }
            }
        }
    }

    /// Starts what may start and asks for more work where there is room.
    fn act(self: &Arc<Self>, state: &mut State, inputs: &Sender<Input>) {
        let pressure = *self.pressure.get();
        let late: Vec<Ticket> = state
            .waiting
            .iter()
            .filter(|(_, (call, since))| {
                call.reply.is_closed() || since.elapsed() > WAIT_MAX || state.stop != Stop::Run
            })
            .map(|(ticket, _)| *ticket)
            .collect();
        for ticket in late {
            state.plan.cancel(ticket);
            if let Some((call, _)) = state.waiting.remove(&ticket) {
                let error = match state.stop {
                    Stop::Run if pressure == Pressure::Severe => {
                        CallError::NoCapacity("the node is short of memory")
                    }
                    Stop::Run => CallError::NoCapacity("all instances are busy"),
                    Stop::Drain | Stop::Abandon => CallError::Stopping,
                };
                let _ = call.reply.try_send(Err(error));
            }
        }
        state.plan.set_braked(pressure == Pressure::Severe);
        if state.stop == Stop::Run {
            for (ticket, grant) in state.plan.startable() {
                match state.waiting.remove(&ticket) {
                    Some((call, _)) => self.start_call(state, call, grant, inputs),
                    None => state.plan.ended(grant),
                }
            }
            if pressure != Pressure::Calm || state.plan.short_of_memory(&[]) {
                self.instances.give_up_one();
            }
            if state.look && !state.asking {
                (state.look, state.asking) = (false, true);
                let (store, inputs) = (self.store.clone(), inputs.clone());
                let ask = async move {
                    let _ = inputs.send(Input::Due(store.due().await)).await;
                };
                self.executor.spawn(ask).detach();
            }
        }
        let budget = state.plan.budget();
        let bounds = Bounds {
            room_bytes: budget.total_bytes().saturating_sub(budget.reserved_bytes()),
            parked_max: self.parked_max,
            busy: !state.running.is_empty(),
            give_way: state.stop != Stop::Run || pressure != Pressure::Calm,
        };
        state.parking.act(self, &state.routes, bounds, inputs);
        let load = state.load();
        if *self.load.get() != load {
            self.load.set(load);
        }
    }

    fn take_routes(&self, state: &mut State, routes: Arc<Routes>) {
        let capacity = |(name, deployment): (&FunctionName, &crate::ingress::routes::Deployment)| {
            let manifest = &deployment.revision.manifest;
            let capacity = Capacity {
                instances_max: manifest.scale.max,
                memory_bytes: manifest.limits.memory_bytes,
                lane: manifest.priority,
                runnable: deployment.runnable(),
                shared_by: manifest.handler.stays_up().then_some(manifest.serving.concurrency),
            };
            (name.clone(), capacity)
        };
        state.plan.set_functions(routes.functions.iter().map(capacity));
        let gated = routes.functions.iter().map(|(name, deployment)| {
            (name.clone(), deployment.revision.number, deployment.revision.manifest.rate)
        });
        self.gates().set_functions(gated, self.clock.monotonic());
        state.parking.set_functions(&routes);
        let old = std::mem::replace(&mut state.routes, routes);
        for deployment in old.functions.values() {
            let key = deployment.revision.key();
            let current = state.routes.functions.get(deployment.revision.name());
            let still = current.is_some_and(|now| now.revision.key() == key);
            if !still && !state.running.contains_key(&key) {
                self.instances.retire(&deployment.revision);
            }
        }
        for (ticket, name) in state.plan.stranded() {
            if let Some((call, _)) = state.waiting.remove(&ticket) {
                let _ = call.reply.try_send(Err(refusal_error(Refusal::NotRunnable, &name, &state.routes)));
            }
        }
    }

    fn enter(&self, state: &mut State, revision: &Arc<Revision>) {
        state.running.entry(revision.key()).or_insert_with(|| (revision.clone(), 0)).1 += 1;
    }

    fn leave(&self, state: &mut State, revision: &Revision) {
        let key = revision.key();
        let Some((_, count)) = state.running.get_mut(&key) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        state.running.remove(&key);
        let current = state.routes.functions.get(revision.name());
        if current.is_none_or(|now| now.revision.key() != key) {
            self.instances.retire(revision);
        }
    }

    fn take_call(&self, state: &mut State, call: Invoke) {
        if state.stop != Stop::Run {
            let _ = call.reply.try_send(Err(CallError::Stopping));
            return;
        }
        // Calls of functions that can't run are refused for that, and take no token.
        let runnable = state.routes.functions.get(&call.function).is_some_and(|d| d.runnable());
        if runnable && let Err(wait) = self.gates().try_call(&call.function, self.clock.monotonic()) {
            let _ = call.reply.try_send(Err(CallError::TooFast { function: call.function, wait }));
            return;
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        match state.plan.call(ticket, &call.function) {
            Ok(()) => {
                state.parking.arrived(&call.function, self.clock.monotonic());
                state.waiting.insert(ticket, (call, Instant::now()));
            }
            Err(refusal) => {
                let error = refusal_error(refusal, &call.function, &state.routes);
                let _ = call.reply.try_send(Err(error));
            }
        }
    }

    fn take_due(
        self: &Arc<Self>,
        state: &mut State,
        due: Result<(Vec<FunctionName>, Option<Duration>), StoreError>,
        inputs: &Sender<Input>,
    ) {
        state.asking = false;
        let (due, next) = match due {
            Ok(answer) => answer,
            Err(error) => {
                self.store_trouble(state, "ask what is due", &error);
                return;
            }
        };
        let (limits, gated) = self.limits(&due);
        let next = next.into_iter().chain(gated).min();
        state.next_due = next.map(|wait| Instant::now() + wait);
        if state.stop != Stop::Run {
            return;
        }
        let held = state.plan.leases_within(&due, |name| limits.get(name).copied().unwrap_or(0));
        if state.plan.short_of_memory(&due) {
            self.instances.give_up_one();
        }
        if held.is_empty() {
            return;
        }
        state.asking = true;
        let wanted = held.iter().map(|(name, grants)| (name.clone(), grants.len() as u32)).collect();
        let (store, inputs) = (self.store.clone(), inputs.clone());
        let ask = async move {
            let leased = store.lease(wanted).await;
            let _ = inputs.send(Input::Leased(leased, held)).await;
        };
        self.executor.spawn(ask).detach();
    }

    fn take_leased(
        self: &Arc<Self>,
        state: &mut State,
        leased: Result<Vec<Leased>, StoreError>,
        held: Vec<(FunctionName, Vec<Grant>)>,
        inputs: &Sender<Input>,
    ) {
        state.asking = false;
        let mut held: HashMap<FunctionName, Vec<Grant>> = held.into_iter().collect();
        let leased = leased.unwrap_or_else(|error| {
            self.store_trouble(state, "lease events", &error);
            Vec::new()
        });
        for lease in leased {
            let grant = held.get_mut(&lease.function).and_then(Vec::pop);
            // It may have been removed or paused, or the stop begun, while the store leased.
            let deployment = state.routes.functions.get(&lease.function);
            let deployment = deployment.filter(|d| d.runnable() && state.stop == Stop::Run);
            match (grant, deployment) {
                (Some(grant), Some(deployment)) => {
                    let revision = deployment.revision.clone();
                    self.gates().started(&lease.function, lease.id, self.clock.monotonic());
                    self.start_lease(state, lease, revision, grant, inputs);
                    state.look = true;
                }
                (grant, _) => {
                    grant.into_iter().for_each(|grant| state.plan.ended(grant));
                    let store = self.store.clone();
                    let give_back = async move {
                        let _ = store.settle(lease.id, Settlement::Release).await;
                    };
                    self.executor.spawn(give_back).detach();
                }
            }
        }
        held.into_values().flatten().for_each(|grant| state.plan.ended(grant));
    }

    fn gates(&self) -> MutexGuard<'_, Gates> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many events of each due function its rate and breaker let through, and when to look
    /// again for those that get none.
    fn limits(&self, due: &[FunctionName]) -> (HashMap<FunctionName, u32>, Option<Duration>) {
        let (mut gates, now) = (self.gates(), self.clock.monotonic());
        let limits: HashMap<_, _> = due.iter().map(|name| (name.clone(), gates.limit(name, now))).collect();
        let held = due.iter().filter(|name| limits.get(*name) == Some(&0));
        let wait = held.filter_map(|name| gates.wait(name, now)).min();
        (limits, wait)
    }

    /// What the breaker makes of an attempt. False: its failure counts against no event.
    fn tell_gates(&self, lease: &Leased, revision: &Revision, outcome: Option<&Outcome>) -> bool {
        let ended = match outcome {
            Some(Outcome::Succeeded { .. }) => gates::Ended::Succeeded,
            Some(Outcome::Failed { failure, .. }) if failure.retryable() => gates::Ended::Failed,
            Some(Outcome::Failed { .. } | Outcome::Lost) | None => gates::Ended::Other,
        };
        let (name, now, random) = (revision.name(), self.clock.monotonic(), fastrand::u64(..));
        let mut gates = self.gates();
        let was = gates.is_open(name);
        let counted = gates.ended((name, revision.number), lease.id, ended, now, random);
        let is = gates.is_open(name);
        drop(gates);
        let (function, event) = (name.as_str(), lease.event.id.as_str());
        match (was, is) {
            (false, true) => {
                tracing::warn!(function, event, "every event fails: the others wait until one succeeds")
            }
            (true, false) => tracing::info!(function, event, "an event succeeded: those that waited run"),
            _ => {}
        }
        counted
    }

    fn store_trouble(&self, state: &mut State, doing: &'static str, error: &StoreError) {
        if !matches!(error, StoreError::Stopped) {
            tracing::warn!(doing, error = crate::errors::chain(error), "store refused");
        }
        state.next_due = Some(Instant::now() + STORE_RETRY);
    }

    fn start_lease(
        self: &Arc<Self>,
        state: &mut State,
        lease: Leased,
        revision: Arc<Revision>,
        grant: Grant,
        inputs: &Sender<Input>,
    ) {
        self.enter(state, &revision);
        state.parking.arrived(revision.name(), self.clock.monotonic());
        let ahead = self.take_ahead(state, &revision);
        let (this, inputs) = (self.clone(), inputs.clone());
        let task = async move {
            let outcome = this.run_or_abandon(&revision, &lease.event, ahead).await;
            let settlement = match outcome {
                None => {
                    this.tell_gates(&lease, &revision, None);
                    Settlement::Release
                }
                Some(outcome) => {
                    this.count(&revision, &outcome);
                    this.trials.report(&revision, &lease.event.id, &outcome);
                    let counted = this.tell_gates(&lease, &revision, Some(&outcome));
                    let routes = this.routes.get();
                    let context = Context { counted, ..this.context(&routes, &revision) };
                    let settlement = settle::settle(&lease, outcome, &context);
                    this.log_failure(&lease, &revision, &settlement);
                    settlement
                }
            };
            this.settle_until_stored(&lease, &revision, settlement).await;
            let _ = inputs.send(Input::Ended(grant, revision)).await;
        };
        self.executor.spawn(task).detach();
    }

    fn start_call(self: &Arc<Self>, state: &mut State, call: Invoke, grant: Grant, inputs: &Sender<Input>) {
        let Some(deployment) = state.routes.functions.get(&call.function) else {
            let _ = call.reply.try_send(Err(CallError::Unknown(call.function)));
            state.plan.ended(grant);
            return;
        };
        let revision = deployment.revision.clone();
        self.enter(state, &revision);
        let ahead = self.take_ahead(state, &revision);
        let (this, inputs) = (self.clone(), inputs.clone());
        let task = async move {
            let Invoke { event, passing, reply, .. } = call;
            match passing {
                None => {
                    let left = async {
                        reply.closed().await;
                        None
                    };
                    // Nobody waits any more: the future is dropped, the instance killed.
                    let answer = async { Some(this.answer(&revision, &event, ahead).await) };
                    if let Some(answer) = future::or(answer, left).await {
                        let _ = reply.try_send(answer);
                    }
                }
                Some(passing) => this.pass(&revision, &event, passing, &reply).await,
            }
            let _ = inputs.send(Input::Ended(grant, revision)).await;
        };
        self.executor.spawn(task).detach();
    }

    /// A call that is passed on: answered as soon as the function's answer has begun, or, when
    /// it has outputs, as soon as their deliveries are committed.
    async fn pass(
        &self,
        revision: &Revision,
        event: &Event,
        passing: Passing,
        reply: &Reply<Result<Response, CallError>>,
    ) {
        let whole = !revision.manifest.outputs.is_empty();
        let (answer, answers) = smol::channel::bounded(1);
        let exchange = Exchange { passing, answer, whole };
        // Once answered, its receiver goes: that is no caller who left.
        let replied = AtomicBool::new(false);
        let left = async {
            reply.closed().await;
            if replied.load(Ordering::Relaxed) {
                future::pending::<()>().await;
            }
            None
        };
        let hand_on = async {
            if !whole && let Ok(answer) = answers.recv().await {
                replied.store(true, Ordering::Relaxed);
                let _ = reply.try_send(Ok(Response::Passed(answer)));
            }
            future::pending().await
        };
        let run = async { Some(self.exchange_or_abandon(revision, event, exchange).await) };
        let Some(outcome) = future::or(hand_on, future::or(run, left)).await else { return };
        let Some(outcome) = outcome else {
            let _ = reply.try_send(Err(CallError::Stopping));
            return;
        };
        self.count(revision, &outcome);
        let ended = match outcome {
            Outcome::Succeeded { output, content_type, event: said, .. } => {
                let said = Said { content_type: content_type.as_deref(), event: said.as_deref() };
                self.owe(revision, event, output, said).await
            }
            Outcome::Failed { failure, output, .. } => Err(CallError::Failed { failure, output }),
            Outcome::Lost => Err(CallError::Lost),
        };
        let answer = match (ended, answers.try_recv()) {
            // What the function says of a failure of its own is the caller's to see.
            (Ok(()) | Err(CallError::Failed { failure: Failure::Status(_), .. }), Ok(answer)) => {
                Ok(Response::Passed(answer))
            }
            (Ok(()), Err(_)) => Err(CallError::Lost),
            (Err(error), _) => Err(error),
        };
        let _ = reply.try_send(answer); // refused when it was answered before
    }

    fn take_ahead(&self, state: &mut State, revision: &Revision) -> Ahead {
        let ahead = state.parking.take(revision);
        self.metrics.started(revision.name(), !matches!(ahead, Ahead::None));
        ahead
    }

    async fn answer(&self, revision: &Revision, event: &Event, ahead: Ahead) -> Result<Response, CallError> {
        let outcome = self.run_or_abandon(revision, event, ahead).await.ok_or(CallError::Stopping)?;
        self.count(revision, &outcome);
        self.trials.report(revision, &event.id, &outcome);
        let (output, took) = match outcome {
            Outcome::Succeeded { output, took, .. } => {
                self.gates().call_succeeded(revision.name(), revision.number);
                (output, took)
            }
            Outcome::Failed { failure, output, .. } => return Err(CallError::Failed { failure, output }),
            Outcome::Lost => return Err(CallError::Lost),
        };
        self.owe(revision, event, output.clone(), Said::default()).await?;
        Ok(Response::Output { output, took })
    }

    /// Commits what a synchronous call's output becomes.
    async fn owe(
        &self,
        revision: &Revision,
        event: &Event,
        output: Vec<u8>,
        said: Said<'_>,
    ) -> Result<(), CallError> {
        if !revision.manifest.outputs.is_empty() {
            let routes = self.routes.get();
            let (deliveries, events) =
                settle::effects(event, output.clone(), said, &self.context(&routes, revision))
                    .map_err(|failure| CallError::Failed { failure, output: output.clone() })?;
            if !deliveries.is_empty() || !events.is_empty() {
                self.store.owe(deliveries, events).await.map_err(CallError::NotStored)?;
                self.outbox.wake();
                self.inbox.wake();
            }
        }
        Ok(())
    }

    async fn exchange_or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        exchange: Exchange,
    ) -> Option<Outcome> {
        let log = self.log(revision, event);
        self.or_abandon(revision, event, self.instances.exchange(revision, event, exchange, &*log)).await
    }

    /// `None`: the daemon's grace period ended first.
    async fn run_or_abandon(&self, revision: &Revision, event: &Event, ahead: Ahead) -> Option<Outcome> {
        let log = self.log(revision, event);
        self.or_abandon(revision, event, ahead.run(&*self.instances, revision, event, &*log)).await
    }

    fn log(&self, revision: &Revision, event: &Event) -> Box<LogLine> {
        let (logs, clock, name, id) =
            (self.logs.clone(), self.clock.clone(), revision.name().clone(), event.id.clone());
        Box::new(move |text: &str| logs.append(&name, &id, clock.wall(), text))
    }

    async fn or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        run: impl Future<Output = Outcome>,
    ) -> Option<Outcome> {
        let run = async { Some(run.await) };
        let abandon = async {
            let (mut seen, mut stop) = self.stop.versioned();
            while *stop != Stop::Abandon {
                (seen, stop) = self.stop.changed(seen).await;
            }
            let (function, event) = (revision.name().as_str(), event.id.as_str());
            tracing::warn!(function, event, "abandoned: it ran longer than the grace period");
            None
        };
        future::or(run, abandon).await
    }

    fn context<'a>(&self, routes: &'a Routes, revision: &'a Revision) -> Context<'a> {
        Context { routes, revision, now: self.clock.wall(), counted: true, random: fastrand::u64(..) }
    }

    fn count(&self, revision: &Revision, outcome: &Outcome) {
        let (ended, took) = match outcome {
            Outcome::Succeeded { took, .. } => (Ended::Succeeded, *took),
            Outcome::Failed { took, .. } => (Ended::Failed, *took),
            Outcome::Lost => (Ended::Lost, Duration::ZERO),
        };
        self.metrics.invocation(revision.name(), ended, took);
    }

    fn log_failure(&self, lease: &Leased, revision: &Revision, settlement: &Settlement) {
        let text = match settlement {
            Settlement::Done { .. } | Settlement::Release => return,
            Settlement::Retry { delay, error, .. } => format!("neap: {error}; again in {delay:.1?}"),
            Settlement::Defer { error, .. } => {
                format!("neap: {error}; every event fails, so this one waits and keeps its attempts")
            }
            Settlement::Dead { failure, .. } => {
                format!(
                    "neap: {failure}; kept as dead, `neap events redrive {}` runs it again",
                    lease.event.id
                )
            }
        };
        self.logs.append(revision.name(), &lease.event.id, self.clock.wall(), &text);
    }

    /// An outcome is never thrown away because the disk is full just now: the slot stays taken,
    /// which holds new work back, until the store has it.
    async fn settle_until_stored(&self, lease: &Leased, revision: &Revision, mut settlement: Settlement) {
        let (wakes_outbox, wakes_inbox) = match &settlement {
            Settlement::Done { deliveries, events } => (!deliveries.is_empty(), !events.is_empty()),
            _ => (false, false),
        };
        loop {
            match self.store.settle(lease.id, settlement.clone()).await {
                Ok(()) => break,
                // Purged or removed with its function while it ran.
                Err(StoreError::NotFound | StoreError::Stopped) => return,
                // Room will never come: only a `Done` asks for any, so this is said once.
                Err(error @ StoreError::TooLarge { .. }) if matches!(settlement, Settlement::Done { .. }) => {
                    settlement = settle::output_refused(settlement, error.to_string());
                    self.log_failure(lease, revision, &settlement);
                }
                Err(error) => {
                    tracing::warn!(
                        event = lease.event.id.as_str(),
                        error = crate::errors::chain(&error),
                        "outcome not stored, trying again"
                    );
                    Timer::after(STORE_RETRY).await;
                }
            }
        }
        if wakes_outbox {
            self.outbox.wake();
        }
        if wakes_inbox {
            self.inbox.wake();
        }
    }
}

impl State {
    /// How long the loop may sleep.
    fn pause(&self) -> Duration {
        let due = self.next_due.map_or(PERIOD, |due| due.saturating_duration_since(Instant::now()));
        let wait = if self.waiting.is_empty() { PERIOD } else { Duration::from_secs(1) };
        due.min(wait).min(self.parking.pause()).max(Duration::from_millis(1))
    }

    fn load(&self) -> Load {
        let budget = self.plan.budget();
        let mut functions: BTreeMap<FunctionName, FunctionLoad> = BTreeMap::new();
        let mut tell = |name: &FunctionName, change: &dyn Fn(&mut FunctionLoad)| {
            if !functions.contains_key(name) {
                functions.insert(name.clone(), FunctionLoad::default());
            }
            functions.get_mut(name).into_iter().for_each(change);
        };
        self.plan.running().for_each(|(name, count)| tell(name, &|load| load.running = count));
        self.plan.waiting().for_each(|name| tell(name, &|load| load.waiting += 1));
        self.parking.ready().for_each(|(name, count)| tell(name, &|load| load.parked = count));
        Load {
            instances: self.plan.instances(),
            parked: functions.values().map(|load| u64::from(load.parked)).sum(),
            reserved_bytes: budget.reserved_bytes() + self.parking.reserved_bytes(),
            budget_bytes: budget.total_bytes(),
            functions,
        }
    }
}

fn refusal_error(refusal: Refusal, function: &FunctionName, routes: &Routes) -> CallError {
    match refusal {
        Refusal::Unknown => CallError::Unknown(function.clone()),
        Refusal::NeverFits => CallError::NoCapacity("limits.memory is more than [node] memory allows"),
        Refusal::QueueFull => CallError::NoCapacity("too many calls are waiting"),
        Refusal::NotRunnable => match routes.functions.get(function) {
            Some(deployment) if deployment.paused => CallError::Paused(function.clone()),
            Some(_) => CallError::NoCapacity("the function can't run on this node, see `neap show`"),
            None => CallError::Unknown(function.clone()),
        },
    }
}
