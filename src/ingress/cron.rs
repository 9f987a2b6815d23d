//! The clock → committed events: one for each tick of a cron trigger.
//!
//! `ticks` decides; this looks at the clock often enough, stores what is due together with the
//! mark that it was, in one transaction, and keeps a tick that finds no room until there is some
//! or the next one takes its place: a node that was full for a week makes one event of it.
//!
//! It sleeps no longer than `PERIOD` at a time, because a clock that jumps wakes nobody.

use super::ticks::{Now, Ticks};
use crate::ingress::routes::Routes;
use crate::model::event::TYPE_CRON;
use crate::model::function::{CronTrigger, Trigger};
use crate::model::{Clock, Event, EventId, FunctionName, UnixMs};
use crate::store::{Arrival, Fate, NewInvocation, Store, StoreError, Tick};
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use futures_lite::future;
use ring::rand::{SecureRandom, SystemRandom};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How late a clock's jump is noticed at most.
const PERIOD: Duration = Duration::from_secs(10);
/// Rest when the store has no room.
const RETRY: Duration = Duration::from_secs(1);

pub struct Cron {
    pub store: Store,
    pub routes: Watch<Routes>,
    /// Woken when an invocation may be due.
    pub due: Wake,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
}

type Key = (FunctionName, String);

struct Entry {
    ticks: Ticks,
    /// Due, and not stored yet.
    pending: Option<UnixMs>,
}

impl Cron {
    /// Runs until it is dropped.
    pub async fn run(self) {
        let mut entries: BTreeMap<Key, Entry> = BTreeMap::new();
        let random = SystemRandom::new();
        let (mut version, mut routes) = self.routes.versioned();
        let mut known = self.stored().await;
        let mut was_believed = self.clock.wall().is_plausible();
        self.take_routes(&routes, &mut entries, &mut known).await;
        loop {
            let now = self.now();
            for ((name, _), entry) in &mut entries {
                let runnable = routes.functions.get(name).is_some_and(|d| d.runnable());
                if let Some(tick) = entry.ticks.look(now, was_believed, runnable) {
                    entry.pending = Some(tick);
                }
            }
            was_believed = now.believed;
            let mut held = false;
            for ((name, _), entry) in &mut entries {
                let Some(tick) = entry.pending else { continue };
                match self.store_tick(&routes, name, entry, tick, now, &random).await {
                    Ok(()) => entry.pending = None,
                    Err(StoreError::Stopped) => return,
                    Err(error) => {
                        let (function, error) = (name.as_str(), crate::errors::chain(&error));
                        tracing::warn!(function, error, "a tick is not stored; trying again");
                        held = true;
                    }
                }
            }
            let wall = self.clock.wall();
            let next = entries.values().filter_map(|entry| entry.ticks.wait(wall)).min();
            let wait = if held { RETRY } else { next.unwrap_or(PERIOD).min(PERIOD) };
            let due = async {
                // A tick of a clock in whole milliseconds is due when the next one has begun.
                smol::Timer::after(wait + Duration::from_millis(1)).await;
                None
            };
            let changed = async { Some(self.routes.changed(version).await) };
            if let Some((seen, new)) = future::or(changed, due).await {
                (version, routes) = (seen, new);
                known = self.stored().await;
                self.take_routes(&routes, &mut entries, &mut known).await;
            }
        }
    }

    fn now(&self) -> Now {
        let wall = self.clock.wall();
        Now { wall, believed: wall.is_plausible() }
    }

    /// What earlier runs left; a store that can't say is asked again.
    async fn stored(&self) -> BTreeMap<Key, UnixMs> {
        loop {
            match self.store.ticks().await {
                Ok(ticks) => return ticks.into_iter().map(|t| ((t.function, t.schedule), t.fired)).collect(),
                Err(StoreError::Stopped) => return BTreeMap::new(),
                Err(error) => {
                    tracing::warn!(error = crate::errors::chain(&error), "could not read ticks");
                    smol::Timer::after(RETRY).await;
                }
            }
        }
    }

    /// Makes an entry for each trigger and forgets those that are gone.
    async fn take_routes(
        &self,
        routes: &Routes,
        entries: &mut BTreeMap<Key, Entry>,
        known: &mut BTreeMap<Key, UnixMs>,
    ) {
        let now = self.now();
        let mut old = std::mem::take(entries);
        for (name, deployment) in &routes.functions {
            let mut schedules = Vec::new();
            for trigger in &deployment.revision.manifest.triggers {
                let Trigger::Cron(cron) = trigger else { continue };
                let CronTrigger { schedule, missed } = &**cron;
                let key = (name.clone(), schedule.key());
                schedules.push(key.1.clone());
                let same = old.remove(&key).filter(|entry| entry.ticks.missed() == *missed);
                let mark = known.remove(&key);
                let entry = same.unwrap_or_else(|| Entry {
                    ticks: Ticks::new(schedule.clone(), *missed, mark, now),
                    pending: None,
                });
                if mark.is_none() && now.believed {
                    // From here on, downtime is known.
                    self.remember(Tick { function: name.clone(), schedule: key.1.clone(), fired: now.wall })
                        .await;
                }
                entries.insert(key, entry);
            }
            let gone = known.keys().chain(old.keys()).any(|(function, _)| function == name);
            if gone && let Err(error) = self.store.keep_ticks(name.clone(), schedules).await {
                tracing::debug!(error = crate::errors::chain(&error), "could not forget old schedules");
            }
        }
    }

    async fn remember(&self, tick: Tick) {
        if let Err(error) = self.store.set_tick(tick).await {
            tracing::debug!(error = crate::errors::chain(&error), "could not remember a schedule");
        }
    }

    async fn store_tick(
        &self,
        routes: &Routes,
        name: &FunctionName,
        entry: &mut Entry,
        tick: UnixMs,
        now: Now,
        random: &SystemRandom,
    ) -> Result<(), StoreError> {
        let mut id = [0; 16];
        random.fill(&mut id).expect("the kernel gives random bytes once it is up");
        let schedule = entry.ticks.schedule();
        let mut event = Event {
            id: EventId::from_random(id),
            source: format!("/{}/cron", routes.node),
            kind: TYPE_CRON.to_owned(),
            subject: Some(schedule.text().to_owned()),
            time: Some(tick),
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data: Vec::new(),
        };
        if !now.believed {
            event.doubt_time();
        }
        let invocation = NewInvocation {
            function: name.clone(),
            lane: routes.lane(name),
            expires: None,
            once: None,
            dead: None,
        };
        let key = schedule.key();
        // Even a tick under a clock that is not believed is not to be forgotten with its mark.
        let fired = entry.ticks.mark(tick, now.believed);
        let tick = fired.map(|fired| Tick { function: name.clone(), schedule: key, fired });
        let arrival = Arrival { invocations: vec![invocation], tick, ..Arrival::of(event) };
        let accepted = self.store.accept(arrival).await?;
        match accepted.fate {
            Fate::Stored => self.metrics.event_accepted("cron"),
            Fate::Duplicate(_) => {}
            Fate::Dropped => self.metrics.event_refused("buffer_full"),
        }
        if accepted.invocations > 0 {
            self.due.wake();
        }
        Ok(())
    }
}
