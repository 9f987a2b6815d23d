//! New revisions on trial: the scheduler tells how their first events fared, `deploy` acts on it.
//!
//! A revision has proven itself with its first success. It has failed when three different events
//! failed before any succeeded: one event may be at fault itself, and its retries are no news.

use crate::model::{EventId, Failure, FunctionName, Outcome, Revision};
use event_listener::Event;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const EVENTS_FAILED: usize = 3;

/// What a trial has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Proven,
    /// Why, for people.
    Failed(String),
}

#[derive(Clone, Default)]
pub struct Trials(Arc<Inner>);

#[derive(Default)]
struct Inner {
    on: Mutex<BTreeMap<FunctionName, Trial>>,
    decided: Event,
}

struct Trial {
    revision: u32,
    failed: Vec<EventId>,
    verdict: Option<Verdict>,
}

impl Trials {
    /// The trial of a revision that runs from now on; the one before it is over.
    pub fn begin(&self, name: FunctionName, revision: u32) {
        self.on().insert(name, Trial { revision, failed: Vec::new(), verdict: None });
    }

    pub fn end(&self, name: &FunctionName) {
        self.on().remove(name);
    }

    /// How an event fared. What is lost to a killed launcher is nobody's failure, and an event
    /// that no revision could take is none of this one's.
    pub fn report(&self, revision: &Revision, event: &EventId, outcome: &Outcome) {
        let mut on = self.on();
        let Some(trial) = on.get_mut(revision.name()) else { return };
        if trial.revision != revision.number || trial.verdict.is_some() {
            return;
        }
        match outcome {
            Outcome::Succeeded { .. } => trial.verdict = Some(Verdict::Proven),
            Outcome::Failed { failure: Failure::PayloadTooLarge { .. } | Failure::Refused(_), .. }
            | Outcome::Lost => {}
            Outcome::Failed { failure, .. } => {
                if !trial.failed.contains(event) {
                    trial.failed.push(event.clone());
                }
                if trial.failed.len() >= EVENTS_FAILED {
                    let text = format!("its first {EVENTS_FAILED} events failed, at last: {failure}");
                    trial.verdict = Some(Verdict::Failed(text));
                }
            }
        }
        if trial.verdict.is_some() {
            drop(on);
            self.0.decided.notify(usize::MAX);
        }
    }

    /// Waits for a trial to be decided, and ends it.
    pub async fn decided(&self) -> (FunctionName, u32, Verdict) {
        loop {
            let listener = self.0.decided.listen();
            if let Some(decided) = self.take() {
                return decided;
            }
            listener.await;
        }
    }

    fn take(&self) -> Option<(FunctionName, u32, Verdict)> {
        let mut on = self.on();
        let name = on.iter().find(|(_, trial)| trial.verdict.is_some()).map(|(name, _)| name.clone())?;
        let trial = on.remove(&name)?;
        trial.verdict.map(|verdict| (name, trial.revision, verdict))
    }

    fn on(&self) -> MutexGuard<'_, BTreeMap<FunctionName, Trial>> {
        // A map that every change leaves whole.
        self.0.on.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
