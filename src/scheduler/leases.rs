//! Events of the inbox: asks what is due, leases what the plan has room for, runs it, and tells
//! the store how it ended.

use super::driver::{Ended, Input, Scheduler, State, Stop};
use super::gates;
use super::plan::Grant;
use super::settle::{self, Context};
use crate::channels::{NotedFuture, PastFuture, Progress};
use crate::model::callback;
use crate::model::function::Handler;
use crate::model::{CopyProgress, FunctionName, InvocationId, Outcome, Revision};
use crate::store::{Leased, Settlement, Store, StoreError};
use smol::Timer;
use smol::channel::Sender;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause before another try of what the store refused (a full disk).
const STORE_RETRY: Duration = Duration::from_secs(1);

/// A leased job's copies, with their invocation.
struct StoredProgress<'a> {
    store: &'a Store,
    id: InvocationId,
    revision: u32,
}

impl Progress for StoredProgress<'_> {
    fn known(&self) -> PastFuture<'_> {
        Box::pin(async {
            self.store.copies(self.id, self.revision).await.unwrap_or_else(|error| {
                tracing::warn!(error = crate::errors::chain(&error), "all copies run again");
                Vec::new()
            })
        })
    }

    fn ended(&self, copy: CopyProgress) -> NotedFuture<'_> {
        Box::pin(async move {
            let index = copy.index;
            if let Err(error) = self.store.copy_ended(self.id, self.revision, copy).await {
                let error = crate::errors::chain(&error);
                tracing::warn!(copy = index, error, "a copy's end is not stored, it may run again");
            }
        })
    }
}

impl Scheduler {
    pub(super) fn take_due(
        self: &Arc<Self>,
        state: &mut State,
        due: Result<(Vec<FunctionName>, Option<Duration>), StoreError>,
        inputs: &Sender<Input>,
    ) {
        state.asking = false;
        let (due, next) = match due {
            Ok(answer) => answer,
            Err(error) => {
                state.unserved = true;
                self.store_trouble(state, "ask what is due", &error);
                return;
            }
        };
        state.unserved = !due.is_empty();
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

    pub(super) fn take_leased(
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

    /// How many events of each due function its rate and breaker let through, and when to look
    /// again for those that get none.
    fn limits(&self, due: &[FunctionName]) -> (HashMap<FunctionName, u32>, Option<Duration>) {
        let (mut gates, now) = (self.gates(), self.clock.monotonic());
        let limits: HashMap<_, _> = due.iter().map(|name| (name.clone(), gates.limit(name, now))).collect();
        let held = due.iter().filter(|name| limits.get(*name) == Some(&0));
        let wait = held.filter_map(|name| gates.wait(name, now)).min();
        (limits, wait)
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
        state.arrived(&revision, self.clock.monotonic());
        let ahead = self.take_ahead(state, &revision);
        let (this, inputs) = (self.clone(), inputs.clone());
        let begun = Instant::now();
        let task = async move {
            let outcome = if revision.manifest.handler == Handler::Job {
                let stored = StoredProgress { store: &this.store, id: lease.id, revision: revision.number };
                this.run_job_or_abandon(&revision, &lease.event, &stored).await
            } else {
                this.run_or_abandon(&revision, &lease.event, ahead).await
            };
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
            let _ = inputs
                .send(Input::Ended(Ended { grant, revision, held: begun.elapsed(), of_event: true }))
                .await;
        };
        self.executor.spawn(task).detach();
    }

    /// What the breaker makes of an attempt. False: its failure counts against no event.
    fn tell_gates(&self, lease: &Leased, revision: &Revision, outcome: Option<&Outcome>) -> bool {
        let ended = match outcome {
            Some(Outcome::Succeeded { .. }) => gates::Ended::Succeeded,
            Some(Outcome::Failed { failure, .. }) if revision.manifest.retry.is_worth(failure) => {
                gates::Ended::Failed
            }
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
            // The result is told however it ends; one that is lost may have been lost too often.
            Settlement::Dead { .. } | Settlement::Retry { counted: false, .. } => {
                (callback::url(&lease.event).is_some(), false)
            }
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

    fn store_trouble(&self, state: &mut State, doing: &'static str, error: &StoreError) {
        if !matches!(error, StoreError::Stopped) {
            tracing::warn!(doing, error = crate::errors::chain(error), "store refused");
        }
        state.next_due = Some(Instant::now() + STORE_RETRY);
    }
}
