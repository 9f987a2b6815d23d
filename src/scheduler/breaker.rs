//! The circuit breaker of one function: when everything that it is given fails, the function is
//! broken and not the events, and running through the queue would only turn it into dead
//! letters. Pure: time and randomness are arguments.
//!
//! ```text
//!             five different events failed,
//!             none succeeded between                     wait is over, one event tries
//!   Closed ───────────────────────────────▶ Open ─────────────────────────────────────▶ Probing
//!     ▲                                       ▲                                          │  │
//!     │                                       └── it failed (the wait doubles) ──────────┘  │
//!     └────────────────────────── an event succeeded ───────────────────────────────────────┘
//! ```
//!
//! Failures while it is not closed count against no event: they wait, however long the function
//! stays broken, and run when it is mended. One event that fails again and again is that
//! event's own trouble: it opens nothing, and ends as a dead letter.
//!
//! Synchronous calls are not looked at, but for one that succeeds: who calls sees what fails,
//! and could otherwise, with five bad requests, hold up everybody's events.

use crate::backoff::Backoff;
use crate::model::InvocationId;
use std::time::Duration;

/// Different events that fail one after another before the function is taken for broken.
pub const FAILED_MAX: usize = 5;

/// A function whose database was restarting is tried again soon; one that is broken costs a
/// container start each minute.
const WAIT: Backoff = Backoff { first: Duration::from_secs(5), max: Duration::from_secs(60) };

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    /// The events that failed since the last success, at most `FAILED_MAX`.
    Closed {
        failed: Vec<InvocationId>,
    },
    /// `probes`: how many have failed.
    Open {
        until: Duration,
        probes: u32,
    },
    Probing {
        event: InvocationId,
        probes: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Breaker(State);

/// What a breaker lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    All,
    /// One, to see whether it succeeds: say `probing` when it starts.
    One,
    /// Nothing for so long.
    Wait(Duration),
    /// Nothing until the probe has ended.
    Probing,
}

impl Default for Breaker {
    fn default() -> Self {
        Self(State::Closed { failed: Vec::new() })
    }
}

impl Breaker {
    pub fn pass(&self, now: Duration) -> Pass {
        match &self.0 {
            State::Closed { .. } => Pass::All,
            State::Open { until, .. } if now >= *until => Pass::One,
            State::Open { until, .. } => Pass::Wait(*until - now),
            State::Probing { .. } => Pass::Probing,
        }
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.0, State::Closed { .. })
    }

    /// The one that `Pass::One` let through was started.
    pub fn probing(&mut self, event: InvocationId) {
        if let State::Open { probes, .. } = self.0 {
            self.0 = State::Probing { event, probes };
        }
    }

    /// The probe came to no end of its own: it was lost or taken back. Another may try at once.
    pub fn probe_lost(&mut self, lost: InvocationId, now: Duration) {
        if let State::Probing { event, probes } = self.0
            && event == lost
        {
            self.0 = State::Open { until: now, probes };
        }
    }

    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// An event's attempt failed. False: it counts against the function, not the event, which
    /// waits. What was running when the breaker opened and fails later is no news.
    #[must_use]
    pub fn failed(&mut self, event: InvocationId, now: Duration, random: u64) -> bool {
        match &mut self.0 {
            State::Closed { failed } => {
                if !failed.contains(&event) {
                    failed.push(event);
                }
                if failed.len() < FAILED_MAX {
                    return true;
                }
                self.0 = State::Open { until: now + WAIT.delay(0, random), probes: 0 };
            }
            State::Open { .. } => {}
            State::Probing { event: probe, .. } if *probe != event => {}
            State::Probing { probes, .. } => {
                let probes = probes.saturating_add(1);
                self.0 = State::Open { until: now + WAIT.delay(probes, random), probes };
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    fn open() -> Breaker {
        let mut breaker = Breaker::default();
        for event in 0..FAILED_MAX as i64 {
            let _ = breaker.failed(InvocationId(event), NOW, u64::MAX);
        }
        breaker
    }

    #[test]
    fn five_different_events_failing_one_after_another_open_it() {
        let mut breaker = Breaker::default();

        for event in 1..5 {
            assert!(breaker.failed(InvocationId(event), NOW, 0), "the event's own failure");
            assert_eq!(breaker.pass(NOW), Pass::All);
        }
        assert!(!breaker.failed(InvocationId(5), NOW, u64::MAX), "the fifth waits");

        assert_eq!(breaker.pass(NOW), Pass::Wait(WAIT.first));
    }

    #[test]
    fn one_event_that_always_fails_opens_nothing() {
        let mut breaker = Breaker::default();

        for _ in 0..100 {
            assert!(breaker.failed(InvocationId(7), NOW, 0));
        }

        assert!(breaker.is_closed());
    }

    #[test]
    fn a_success_between_failures_begins_the_count_anew() {
        let mut breaker = Breaker::default();
        for round in 0..10 {
            for event in 0..4 {
                assert!(breaker.failed(InvocationId(round * 4 + event), NOW, 0));
            }
            breaker.succeeded();
        }

        assert!(breaker.is_closed());
    }

    #[test]
    fn one_probe_at_a_time_and_each_failure_doubles_the_wait_up_to_its_longest() {
        let mut breaker = open();
        let mut now = NOW;
        let mut waits = Vec::new();

        for event in 10..20 {
            let Pass::Wait(wait) = breaker.pass(now) else { panic!("{breaker:?}") };
            waits.push(wait.as_secs());
            now += wait;
            assert_eq!(breaker.pass(now), Pass::One);
            breaker.probing(InvocationId(event));
            assert_eq!(breaker.pass(now + WAIT.max * 9), Pass::Probing);
            assert!(!breaker.failed(InvocationId(99), now, 0), "one that ran before the probe");
            assert_eq!(breaker.pass(now), Pass::Probing);
            assert!(!breaker.failed(InvocationId(event), now, u64::MAX));
        }

        assert_eq!(waits, [5, 10, 20, 40, 60, 60, 60, 60, 60, 60]);
    }

    #[test]
    fn a_probe_that_succeeds_closes_and_one_that_is_lost_is_tried_again_at_once() {
        let mut breaker = open();
        let due = NOW + WAIT.first;

        breaker.probing(InvocationId(9));
        breaker.probe_lost(InvocationId(8), due);
        assert_eq!(breaker.pass(due), Pass::Probing);
        breaker.probe_lost(InvocationId(9), due);
        assert_eq!(breaker.pass(due), Pass::One);
        breaker.probing(InvocationId(9));
        breaker.succeeded();

        assert_eq!(breaker.pass(due), Pass::All);
    }

    #[test]
    fn failures_of_what_ran_when_it_opened_neither_count_nor_lengthen_the_wait() {
        let mut breaker = open();
        let before = breaker.pass(NOW);

        assert!(!breaker.failed(InvocationId(99), NOW, u64::MAX));

        assert_eq!(breaker.pass(NOW), before);
    }
}
