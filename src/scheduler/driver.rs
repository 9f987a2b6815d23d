//! Asks the store what is due, starts what `plan` allows, tells the store how it ended.
//!
//! Level-triggered: a wake, an ended instance and a period all mean "look again". The loop
//! itself never waits for the disk or a container: those run as tasks that report back. What the
//! inputs mean stands with their nouns: `calls`, `leases`, `attempt` (what both run), `parking`.

use super::budget::Budget;
use super::gates::Gates;
use super::keeping::Keeping;
use super::pace::Pace;
use super::parking::Parking;
use super::plan::{Capacity, Grant, Plan, Refusal, Ticket};
use super::pool::Bounds;
use super::pressure::Pressure;
use crate::channels::{Instances, Invoke, Kept, Parked, Stock, Trials};
use crate::ingress::routes::Routes;
use crate::model::function::FunctionLoad;
use crate::model::{Clock, FunctionName, Revision};
use crate::store::{Leased, Store, StoreError};
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use futures_lite::Stream;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::{BTreeMap, HashMap};
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// The loop looks by itself at least this often: a lost wake costs this much time.
const PERIOD: Duration = Duration::from_secs(5);

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
    /// What deploys have made ahead.
    pub stock: Stock,
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
    Ended(Ended),
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

/// An invocation that gives its place back.
pub(super) struct Ended {
    pub grant: Grant,
    pub revision: Arc<Revision>,
    /// How long it had its place.
    pub held: Duration,
    /// Of the inbox; else a call.
    pub of_event: bool,
}

/// The loop's timer. Set only when it is to ring sooner than it would: a timer that is set in
/// every round wakes the reactor in every round, and one that rings too early costs one look.
#[derive(Default)]
struct Alarm {
    timer: Option<(Timer, Instant)>,
}

impl Alarm {
    fn ring_within(&mut self, pause: Duration) {
        let at = Instant::now() + pause;
        if self.timer.as_ref().is_none_or(|(_, rings)| at < *rings) {
            self.timer = Some((Timer::at(at), at));
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some((timer, _)) = &mut self.timer else { return Poll::Pending };
        ready!(Pin::new(timer).poll(cx));
        self.timer = None;
        Poll::Ready(())
    }
}

pub(super) struct State {
    pub(super) plan: Plan,
    pub(super) routes: Arc<Routes>,
    pub(super) waiting: HashMap<Ticket, (Invoke, Instant)>,
    pub(super) next_ticket: Ticket,
    /// Running instances by revision, so that an old root goes with its last one.
    pub(super) running: HashMap<String, (Arc<Revision>, u64)>,
    pub(super) pace: Pace,
    pub(super) parking: Parking,
    pub(super) keeping: Keeping,
    /// The store should be asked (again) what is due.
    pub(super) look: bool,
    /// It is being asked, or is leasing.
    pub(super) asking: bool,
    /// Events were due when it was last asked, and not all of them may have had a place.
    pub(super) unserved: bool,
    pub(super) next_due: Option<Instant>,
    pub(super) stop: Stop,
}

impl Scheduler {
    /// Runs until the stop has come to its end and nothing runs any more.
    pub async fn run(self) -> Abandoned {
        let this = Arc::new(self);
        // Bounded by running instances and parked ones.
        let (inputs_tx, inputs) = smol::channel::unbounded();
        let (routes_seen, routes) = this.routes.versioned();
        let (stop_seen, stop) = this.stop.versioned();
        let kept_watch = this.instances.kept();
        let (kept_seen, _) = kept_watch.versioned();
        let mut state = State {
            plan: Plan::new(Budget::new(this.budget_bytes)),
            routes: Arc::default(),
            waiting: HashMap::new(),
            next_ticket: 0,
            running: HashMap::new(),
            pace: Pace::default(),
            parking: Parking::default(),
            keeping: Keeping::default(),
            look: true,
            asking: false,
            unserved: false,
            next_due: None,
            stop: *stop,
        };
        this.take_routes(&mut state, routes);
        let routes = state.routes.clone();
        state.parking.adopt(&this, &routes, &inputs_tx);
        let mut abandoned = Abandoned::default();
        // Kept from round to round: a wake that comes together with another input is not lost, and a
        // round registers nothing anew but what has happened.
        let mut woken = this.inbox.listen();
        let mut stops = pin!(this.stop.changed(stop_seen));
        let mut routes_changed = pin!(this.routes.changed(routes_seen));
        let mut kept_changed = pin!(kept_watch.changed(kept_seen));
        let (mut inputs, mut calls) = (pin!(inputs), pin!(this.calls.clone()));
        let mut alarm = Alarm::default();
        loop {
            this.act(&mut state, &inputs_tx);
            if state.stop != Stop::Run && state.plan.taken() == 0 && !state.asking {
                return abandoned;
            }
            alarm.ring_within(state.pause());
            let input = poll_fn(|cx| {
                if let Poll::Ready((version, stop)) = stops.as_mut().poll(cx) {
                    return Poll::Ready(Input::Stop(version, *stop));
                }
                if let Poll::Ready((version, routes)) = routes_changed.as_mut().poll(cx) {
                    return Poll::Ready(Input::Routes(version, routes));
                }
                if let Poll::Ready(Some(input)) = inputs.as_mut().poll_next(cx) {
                    return Poll::Ready(input);
                }
                if let Poll::Ready((version, kept)) = kept_changed.as_mut().poll(cx) {
                    return Poll::Ready(Input::Kept(version, kept));
                }
                if let Poll::Ready(Some(call)) = calls.as_mut().poll_next(cx) {
                    return Poll::Ready(Input::Call(Box::new(call)));
                }
                if Pin::new(&mut woken).poll(cx).is_ready() {
                    return Poll::Ready(Input::Woken);
                }
                alarm.poll(cx).map(|()| Input::Look)
            });
            match input.await {
                Input::Call(call) => this.take_call(&mut state, *call),
                Input::Look => state.look = true,
                Input::Woken => {
                    woken = this.inbox.listen();
                    state.look = true;
                }
                Input::Due(due) => this.take_due(&mut state, due, &inputs_tx),
                Input::Leased(leased, held) => this.take_leased(&mut state, leased, held, &inputs_tx),
                Input::Ended(ended) => {
                    state.pace.ended(ended.revision.name(), ended.held);
                    state.plan.ended(ended.grant);
                    this.leave(&mut state, &ended.revision);
                    // The store has nothing new to tell after a call, which it never knew of: asking
                    // it costs every call two threads' turns.
                    state.look |= ended.of_event || state.unserved;
                }
                Input::Parked(revision, made) => state.parking.made(&this, &revision, made, &inputs_tx),
                Input::Died(revision, number) => state.parking.died(&this, &revision, number),
                Input::Routes(version, routes) => {
                    routes_changed.set(this.routes.changed(version));
                    this.take_routes(&mut state, routes);
                    let routes = state.routes.clone();
                    state.parking.adopt(&this, &routes, &inputs_tx);
                    state.look = true;
                }
                Input::Kept(version, kept) => {
                    kept_changed.set(kept_watch.changed(version));
                    state.plan.set_kept(&kept);
                    state.look = true;
                }
                Input::Stop(version, stop) => {
                    stops.set(this.stop.changed(version));
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
        state.turn_away(pressure);
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
        let now = self.clock.monotonic();
        state.keeping.act(&*self.instances, &state.routes, &state.plan, bounds, now);
        state.parking.act(self, &state.routes, bounds, inputs);
        let load = state.load();
        if *self.load.get() != load {
            self.load.set(load);
        }
    }

    fn take_routes(&self, state: &mut State, routes: Arc<Routes>) {
        let capacity = |(name, deployment): (&FunctionName, &crate::ingress::routes::Deployment)| {
            let manifest = &deployment.revision.manifest;
            let each = manifest.instances_each(self.budget_bytes);
            let capacity = Capacity {
                instances_max: (manifest.scale.max / each).max(1),
                memory_bytes: manifest.limits.memory_bytes * u64::from(each),
                lane: manifest.priority,
                runnable: deployment.runnable(),
                shared_by: manifest.handler.stays_up().then_some(manifest.serving.concurrency),
            };
            (name.clone(), capacity)
        };
        state.plan.set_functions(routes.functions.iter().map(capacity));
        // What a deploy started ahead was counted before the plan knew its function.
        state.plan.set_kept(&self.instances.kept().get());
        let gated = routes.functions.iter().map(|(name, deployment)| {
            (name.clone(), deployment.revision.number, deployment.revision.manifest.rate)
        });
        self.gates().set_functions(gated, self.clock.monotonic());
        state.parking.set_functions(&routes);
        state.keeping.set_functions(&routes);
        state.pace.keep(|name| routes.functions.contains_key(name));
        let old = std::mem::replace(&mut state.routes, routes);
        for deployment in old.functions.values() {
            let key = deployment.revision.key();
            let current = state.routes.functions.get(deployment.revision.name());
            let still = current.is_some_and(|now| now.revision.key() == key);
            if still {
                continue;
            }
            if !state.running.contains_key(&key) {
                self.instances.retire(&deployment.revision);
            } else if deployment.revision.manifest.handler.stays_up() {
                // It only ends what it has begun.
                self.instances.keep(&deployment.revision, 0);
            }
        }
        for (ticket, name) in state.plan.stranded() {
            if let Some((call, _)) = state.waiting.remove(&ticket) {
                let _ = call.reply.try_send(Err(state.refusal(Refusal::NotRunnable, &name)));
            }
        }
    }

    pub(super) fn enter(&self, state: &mut State, revision: &Arc<Revision>) {
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

    pub(super) fn gates(&self) -> MutexGuard<'_, Gates> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// How long the loop may sleep.
    fn pause(&self) -> Duration {
        let due = self.next_due.map_or(PERIOD, |due| due.saturating_duration_since(Instant::now()));
        let wait = if self.waiting.is_empty() { PERIOD } else { Duration::from_secs(1) };
        due.min(wait).min(self.parking.pause()).min(self.keeping.pause()).max(Duration::from_millis(1))
    }

    /// A request of this function has come to the line, or an event to its turn.
    pub(super) fn arrived(&mut self, revision: &Revision, now: Duration) {
        let name = revision.name();
        self.parking.arrived(name, now);
        let at_once = || {
            let running = self.running.get(&revision.key()).map_or(0, |(_, count)| *count);
            let waiting = self.plan.waiting().filter(|waiting| *waiting == name).count();
            u32::try_from(running).unwrap_or(u32::MAX).saturating_add(waiting as u32)
        };
        self.keeping.arrived(name, now, at_once);
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
