//! Instances ahead of their events: does what `pool` decides, holds what was made, hands it to
//! the events that come.
//!
//! Making is a task that reports back; each one held has a task that reports its death. An event
//! that comes while one is being made waits for that one instead of beginning another.

use super::driver::{Input, Scheduler};
use super::pool::{Bounds, PARKED_BYTES, Pool, Source, Step, Wanted};
use crate::channels::{Instances, LogLine, Parked};
use crate::config::units;
use crate::ingress::routes::Routes;
use crate::model::function::ScaleMin;
use crate::model::{Event, FunctionName, Outcome, Revision};
use smol::channel::{Receiver, Sender};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

/// Between looks when nothing else is known: the loop's own period is shorter.
const LONG: Duration = Duration::from_secs(3600);

#[derive(Default)]
pub struct Parking {
    pool: Pool,
    /// By `Revision::key`; of current revisions only.
    shelves: HashMap<String, Shelf>,
    numbers: u64,
    /// From now.
    again: Option<Duration>,
}

#[derive(Default)]
struct Shelf {
    ready: Vec<Held>,
    /// Events that wait for one being made, in their order.
    claims: VecDeque<Sender<Box<dyn Parked>>>,
}

struct Held {
    number: u64,
    instance: Box<dyn Parked>,
    /// Tells of its death; ends with this.
    _watch: smol::Task<()>,
}

/// Where an event's instance comes from.
pub enum Ahead {
    Ready(Box<dyn Parked>),
    Coming(Receiver<Box<dyn Parked>>),
    None,
}

impl Ahead {
    pub async fn run(
        self,
        instances: &dyn Instances,
        revision: &Revision,
        event: &Event,
        log: &LogLine,
    ) -> Outcome {
        let parked = match self {
            Self::Ready(parked) => Some(parked),
            Self::Coming(coming) => coming.recv().await.ok(),
            Self::None => None,
        };
        match parked {
            Some(parked) => parked.run(revision, event, log).await,
            None => instances.run(revision, event, log).await,
        }
    }
}

/// What to tell when the functions' `scale.min` together ask for more than the node may ever
/// reserve.
pub fn without_room(
    asked: impl Iterator<Item = ScaleMin>,
    budget_bytes: u64,
    parked_max: u32,
) -> Option<String> {
    let counts = asked.map(|min| match min {
        ScaleMin::Fixed(count) => u64::from(count),
        ScaleMin::Auto => 0,
    });
    let asked: u64 = counts.sum();
    let fit = (budget_bytes / PARKED_BYTES).min(u64::from(parked_max));
    (asked > fit).then(|| {
        format!(
            "scale.min asks for {asked} parked instances in all, {fit} have room: each reserves {} of [node] memory, and {parked_max} is all there may be",
            units::show_size(PARKED_BYTES)
        )
    })
}

impl Parking {
    /// What is held for revisions that are gone is dropped; events that waited for one of those
    /// create their own.
    pub fn set_functions(&mut self, routes: &Routes) {
        let wanted = routes.functions.iter().map(|(name, deployment)| {
            let revision = &deployment.revision;
            let scale = &revision.manifest.scale;
            let runnable = deployment.runnable();
            // What stays up is kept started, not parked.
            let min = if revision.manifest.handler.stays_up() { ScaleMin::Fixed(0) } else { scale.min };
            let wanted = Wanted { revision: revision.number, min, max: scale.max, runnable };
            (name.clone(), wanted)
        });
        self.pool.set_functions(wanted);
        let mut old = std::mem::take(&mut self.shelves);
        for deployment in routes.functions.values() {
            let key = deployment.revision.key();
            if let Some(shelf) = old.remove(&key) {
                self.shelves.insert(key, shelf);
            }
        }
    }

    /// What deploys have made before their switch, once that is seen.
    pub(super) fn adopt(&mut self, scheduler: &Arc<Scheduler>, routes: &Routes, inputs: &Sender<Input>) {
        for (name, deployment) in &routes.functions {
            let revision = &deployment.revision;
            for instance in scheduler.stock.take(name, revision.number) {
                if self.pool.expect(name, revision.number) {
                    self.made(scheduler, revision, Ok(instance), inputs);
                }
            }
        }
    }

    pub fn arrived(&mut self, name: &FunctionName, now: Duration) {
        self.pool.arrived(name, now);
    }

    /// For an event that starts now.
    pub fn take(&mut self, revision: &Revision) -> Ahead {
        let source = self.pool.take(revision.name(), revision.number);
        if source == Source::Cold {
            return Ahead::None;
        }
        let shelf = self.shelves.entry(revision.key()).or_default();
        match source {
            Source::Ready => shelf.ready.pop().map_or(Ahead::None, |held| Ahead::Ready(held.instance)),
            Source::Making | Source::Cold => {
                let (sender, coming) = smol::channel::bounded(1);
                shelf.claims.push_back(sender);
                Ahead::Coming(coming)
            }
        }
    }

    pub(super) fn act(
        &mut self,
        scheduler: &Arc<Scheduler>,
        routes: &Routes,
        bounds: Bounds,
        inputs: &Sender<Input>,
    ) {
        let now = scheduler.clock.monotonic();
        let look = self.pool.look(now, bounds);
        self.again = look.again.map(|at| at.saturating_sub(now));
        for step in look.steps {
            let (Step::Make { function, .. } | Step::Drop { function, .. }) = &step;
            let deployment = routes.functions.get(function);
            let revision = deployment.expect("the pool knows the same functions").revision.clone();
            match step {
                Step::Make { .. } => {
                    let (instances, inputs) = (scheduler.instances.clone(), inputs.clone());
                    let make = async move {
                        let made = instances.park(&revision).await;
                        let _ = inputs.send(Input::Parked(revision, made)).await;
                    };
                    scheduler.executor.spawn(make).detach();
                }
                Step::Drop { count, .. } => {
                    if let Some(shelf) = self.shelves.get_mut(&revision.key()) {
                        shelf.ready.truncate(shelf.ready.len().saturating_sub(count as usize));
                    }
                }
            }
        }
    }

    pub(super) fn made(
        &mut self,
        scheduler: &Arc<Scheduler>,
        revision: &Arc<Revision>,
        made: Result<Box<dyn Parked>, String>,
        inputs: &Sender<Input>,
    ) {
        let (name, number) = (revision.name(), revision.number);
        let mut instance = match made {
            Ok(instance) if self.pool.made(name, number) => instance,
            Ok(_) => return,
            Err(why) => {
                tracing::warn!(function = name.as_str(), why, "no instance could be created ahead");
                self.pool.failed(name, number, scheduler.clock.monotonic(), fastrand::u64(..));
                let claims =
                    self.shelves.get_mut(&revision.key()).map(|shelf| std::mem::take(&mut shelf.claims));
                claims.into_iter().flatten().for_each(|_| self.pool.claim_ends(name, number, false));
                return;
            }
        };
        let shelf = self.shelves.entry(revision.key()).or_default();
        while let Some(claim) = shelf.claims.pop_front() {
            match claim.try_send(instance) {
                Ok(()) => {
                    self.pool.claim_ends(name, number, true);
                    return;
                }
                // Its caller has left.
                Err(refused) => {
                    self.pool.claim_ends(name, number, false);
                    instance = refused.into_inner();
                }
            }
        }
        self.numbers += 1;
        let number = self.numbers;
        let ended = instance.ended();
        let (revision, inputs) = (revision.clone(), inputs.clone());
        let watch = scheduler.executor.spawn(async move {
            ended.await;
            let _ = inputs.send(Input::Died(revision, number)).await;
        });
        shelf.ready.push(Held { number, instance, _watch: watch });
    }

    pub(super) fn died(&mut self, scheduler: &Scheduler, revision: &Revision, number: u64) {
        let Some(shelf) = self.shelves.get_mut(&revision.key()) else { return };
        let Some(at) = shelf.ready.iter().position(|held| held.number == number) else { return };
        shelf.ready.remove(at);
        tracing::debug!(function = revision.name().as_str(), "a parked instance has died");
        let now = scheduler.clock.monotonic();
        self.pool.died(revision.name(), revision.number, now, fastrand::u64(..));
    }

    /// Functions with ready ones.
    pub fn ready(&self) -> impl Iterator<Item = (&FunctionName, u32)> {
        self.pool.ready()
    }

    pub fn reserved_bytes(&self) -> u64 {
        self.pool.reserved_bytes()
    }

    /// Until `act` should be asked again.
    pub fn pause(&self) -> Duration {
        self.again.unwrap_or(LONG)
    }
}
