//! What holds a function back although it has slots: its rate and its circuit breaker. Pure.
//!
//! Events that are held back wait in the inbox; a synchronous call over the rate is refused
//! with the time after which it would pass (429).

use super::breaker::{Breaker, Pass};
use super::rate::Bucket;
use crate::model::function::Rate;
use crate::model::{FunctionName, InvocationId};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Debug, Default)]
pub struct Gates(BTreeMap<FunctionName, Gate>);

#[derive(Debug, Default)]
struct Gate {
    /// Of this revision: another one begins with a closed breaker, it may be the mended one.
    revision: u32,
    breaker: Breaker,
    bucket: Option<Bucket>,
}

/// How an attempt that an event made ended, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Succeeded,
    /// In a way that another attempt could change.
    Failed,
    /// Lost, taken back, or refused before the function ran: it says nothing of the function.
    Other,
}

impl Gates {
    /// Replaces what is deployed: functions, their revisions and rates.
    pub fn set_functions(
        &mut self,
        functions: impl IntoIterator<Item = (FunctionName, u32, Option<Rate>)>,
        now: Duration,
    ) {
        let mut old = std::mem::take(&mut self.0);
        for (name, revision, rate) in functions {
            let mut gate = old.remove(&name).unwrap_or_default();
            if gate.revision != revision {
                gate.revision = revision;
                gate.breaker = Breaker::default();
            }
            match (&mut gate.bucket, rate) {
                (Some(bucket), Some(rate)) => bucket.set_rate(rate, now),
                (bucket, rate) => *bucket = rate.map(|rate| Bucket::new(rate, now)),
            }
            self.0.insert(name, gate);
        }
    }

    /// Events of this function that may be leased now.
    pub fn limit(&mut self, function: &FunctionName, now: Duration) -> u32 {
        let Some(gate) = self.0.get_mut(function) else { return u32::MAX };
        let tokens = gate.bucket.as_mut().map_or(u32::MAX, |bucket| bucket.tokens(now));
        match gate.breaker.pass(now) {
            Pass::All => tokens,
            Pass::One => tokens.min(1),
            Pass::Wait(_) | Pass::Probing => 0,
        }
    }

    /// When to ask again for one that `limit` gave nothing; `None`: an end will be told first.
    pub fn wait(&mut self, function: &FunctionName, now: Duration) -> Option<Duration> {
        let gate = self.0.get_mut(function)?;
        let tokens = gate.bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now));
        match gate.breaker.pass(now) {
            Pass::All | Pass::One => Some(tokens),
            Pass::Wait(wait) => Some(wait.max(tokens)),
            Pass::Probing => None,
        }
    }

    /// An event was leased and starts.
    pub fn started(&mut self, function: &FunctionName, event: InvocationId, now: Duration) {
        let Some(gate) = self.0.get_mut(function) else { return };
        if let Some(bucket) = &mut gate.bucket {
            // A call may have taken the last token since `limit`: one event more than allowed,
            // once, is better than one leased in vain.
            let _ = bucket.try_take(now);
        }
        gate.breaker.probing(event);
    }

    /// A synchronous call; refused with the time after which it would pass.
    pub fn try_call(&mut self, function: &FunctionName, now: Duration) -> Result<(), Duration> {
        let bucket = self.0.get_mut(function).and_then(|gate| gate.bucket.as_mut());
        let Some(bucket) = bucket else { return Ok(()) };
        if bucket.try_take(now) { Ok(()) } else { Err(bucket.wait(now)) }
    }

    /// A synchronous call succeeded: the function works.
    pub fn call_succeeded(&mut self, function: &FunctionName, revision: u32) {
        if let Some(gate) = self.0.get_mut(function)
            && gate.revision == revision
        {
            gate.breaker.succeeded();
        }
    }

    /// An event's attempt ended. False: its failure counts against no event, it waits.
    #[must_use]
    pub fn ended(
        &mut self,
        (function, revision): (&FunctionName, u32),
        event: InvocationId,
        ended: Ended,
        now: Duration,
        random: u64,
    ) -> bool {
        let gate = self.0.get_mut(function).filter(|gate| gate.revision == revision);
        // Of a revision that is gone: its failure is the event's own, as ever.
        let Some(gate) = gate else { return true };
        match ended {
            Ended::Succeeded => gate.breaker.succeeded(),
            Ended::Failed => return gate.breaker.failed(event, now, random),
            Ended::Other => gate.breaker.probe_lost(event, now),
        }
        true
    }

    pub fn is_open(&self, function: &FunctionName) -> bool {
        self.0.get(function).is_some_and(|gate| !gate.breaker.is_closed())
    }

    /// Functions whose breaker is not closed, and how long until the next try; for people.
    pub fn open(&self, now: Duration) -> Vec<(FunctionName, Duration)> {
        let open = self.0.iter().filter(|(_, gate)| !gate.breaker.is_closed());
        let wait = |gate: &Gate| match gate.breaker.pass(now) {
            Pass::Wait(wait) => wait,
            Pass::All | Pass::One | Pass::Probing => Duration::ZERO,
        };
        open.map(|(name, gate)| (name.clone(), wait(gate))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::breaker::FAILED_MAX;

    const NOW: Duration = Duration::from_secs(100);

    fn name() -> FunctionName {
        FunctionName::parse("f").expect("a good name")
    }

    fn gates(rate: Option<Rate>) -> Gates {
        let mut gates = Gates::default();
        gates.set_functions([(name(), 1, rate)], NOW);
        gates
    }

    fn fail(gates: &mut Gates, revision: u32, events: std::ops::Range<i64>) {
        for event in events {
            let _ = gates.ended((&name(), revision), InvocationId(event), Ended::Failed, NOW, u64::MAX);
        }
    }

    #[test]
    fn rate_holds_events_and_refuses_calls_with_the_time_to_wait() {
        let mut gates = gates(Some(Rate { per_second_millis: 1000, burst: 2 }));

        assert_eq!(gates.limit(&name(), NOW), 2);
        gates.started(&name(), InvocationId(1), NOW);
        assert_eq!(gates.try_call(&name(), NOW), Ok(()));
        assert_eq!(gates.limit(&name(), NOW), 0);
        assert_eq!(gates.wait(&name(), NOW), Some(Duration::from_secs(1)));
        assert_eq!(gates.try_call(&name(), NOW), Err(Duration::from_secs(1)));
    }

    #[test]
    fn a_broken_function_gets_one_event_at_a_time_until_one_succeeds() {
        let mut gates = gates(None);
        fail(&mut gates, 1, 0..FAILED_MAX as i64);

        assert_eq!(gates.limit(&name(), NOW), 0);
        let due = NOW + gates.wait(&name(), NOW).expect("a time to try again");
        assert_eq!(gates.limit(&name(), due), 1);
        gates.started(&name(), InvocationId(9), due);
        assert_eq!((gates.limit(&name(), due), gates.wait(&name(), due)), (0, None));
        assert!(gates.ended((&name(), 1), InvocationId(9), Ended::Succeeded, due, 0));

        assert_eq!(gates.limit(&name(), due), u32::MAX);
        assert!(gates.open(due).is_empty());
    }

    #[test]
    fn a_new_revision_begins_closed_and_hears_nothing_of_the_old_one() {
        let mut gates = gates(None);
        fail(&mut gates, 1, 0..FAILED_MAX as i64);
        assert_eq!(gates.open(NOW).len(), 1);

        gates.set_functions([(name(), 2, None)], NOW);
        fail(&mut gates, 1, 10..20);

        assert_eq!(gates.limit(&name(), NOW), u32::MAX);
    }

    #[test]
    fn a_probe_that_never_ran_gives_its_place_to_another() {
        let mut gates = gates(None);
        fail(&mut gates, 1, 0..FAILED_MAX as i64);
        let due = NOW + gates.wait(&name(), NOW).expect("a time to try again");

        gates.started(&name(), InvocationId(9), due);
        let _ = gates.ended((&name(), 1), InvocationId(9), Ended::Other, due, 0);

        assert_eq!(gates.limit(&name(), due), 1);
    }
}
