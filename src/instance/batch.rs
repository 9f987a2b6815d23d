//! The copies of one job: which is started next, and what became of them all. Pure; time is an
//! argument.
//!
//! ```text
//!             ┌────── failed, attempts left: after its backoff ──────┐
//!             ▼                                                      │
//!   Waiting { due } ──▶ Running ──▶ Succeeded                        │
//!                          ├──▶ Failed: no attempt left ◀────────────┤
//!                          └──────── ended ──────────────────────────┘
//! ```
//!
//! Copies start in the order of their index, never more than `at_once` at a time; one that waits
//! for its next attempt lets others go ahead. All of them run to their end, also when one has
//! failed for good: a batch that is nearly done is worth more than none.

use crate::backoff::Backoff;
use crate::model::function::Retry;
use crate::model::{CopyProgress, Failure, Outcome};
use std::time::Duration;

/// Wait after an attempt that was lost with its launcher, which is being started again.
const LOST_BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(60) };

/// Attempts of one copy that may be lost, as of an event's (Promise 2); then the job is.
const LOST_MAX: u32 = 20;

/// Of what a failed copy said, in the list.
const ERROR_CHARS: usize = 200;

#[derive(Debug)]
pub struct Batch {
    retry: Retry,
    at_once: u32,
    copies: Vec<Member>,
    /// A copy was lost too often.
    lost: bool,
}

#[derive(Debug)]
struct Member {
    state: State,
    /// That ended by themselves.
    attempts: u32,
    lost: u32,
}

#[derive(Debug, PartialEq)]
enum State {
    Waiting { due: Duration },
    Running,
    Succeeded,
    Failed(Failure),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Start {
        index: u32,
        /// From 0.
        attempt: u32,
    },
    /// Ask again when a copy has ended, or at this time.
    Wait(Option<Duration>),
    /// `outcome` knows.
    Done,
}

impl Batch {
    pub fn new(copies: u32, at_once: u32, retry: &Retry) -> Self {
        let copies = (0..copies)
            .map(|_| Member { state: State::Waiting { due: Duration::ZERO }, attempts: 0, lost: 0 })
            .collect();
        Self { retry: retry.clone(), at_once: at_once.max(1), copies, lost: false }
    }

    /// What had happened before the job was cut off. Copies that have ended don't run again.
    pub fn resume(&mut self, known: &[CopyProgress]) {
        for past in known {
            let Some(copy) = self.copies.get_mut(past.index as usize) else { continue };
            copy.attempts = past.attempts;
            copy.state = match &past.ended {
                None => State::Waiting { due: Duration::ZERO },
                Some(Ok(())) => State::Succeeded,
                Some(Err(failure)) => State::Failed(failure.clone()),
            };
        }
    }

    /// How many copies have ended for good.
    pub fn done(&self) -> usize {
        self.copies.iter().filter(|copy| matches!(copy.state, State::Succeeded | State::Failed(_))).count()
    }

    /// What to do at `now`; a copy that it starts runs from here on.
    pub fn next(&mut self, now: Duration) -> Next {
        if self.lost {
            return Next::Done;
        }
        let running = self.copies.iter().filter(|copy| copy.state == State::Running).count();
        if running < self.at_once as usize {
            for (index, copy) in self.copies.iter_mut().enumerate() {
                if matches!(copy.state, State::Waiting { due } if due <= now) {
                    copy.state = State::Running;
                    return Next::Start { index: index as u32, attempt: copy.attempts };
                }
            }
        }
        let due = self.copies.iter().filter_map(|copy| match copy.state {
            State::Waiting { due } => Some(due),
            _ => None,
        });
        match due.min() {
            // What is due waits for one that runs to end.
            Some(due) => Next::Wait((running < self.at_once as usize).then_some(due)),
            None if running > 0 => Next::Wait(None),
            None => Next::Done,
        }
    }

    /// A copy has ended; `random` is for jitter. What is worth remembering of it: nothing of an
    /// attempt that was lost.
    pub fn ended(
        &mut self,
        index: u32,
        outcome: Outcome,
        now: Duration,
        random: u64,
    ) -> Option<CopyProgress> {
        let copy = self.copies.get_mut(index as usize)?;
        let lost = outcome == Outcome::Lost;
        copy.state = match outcome {
            Outcome::Succeeded { .. } => {
                copy.attempts += 1;
                State::Succeeded
            }
            Outcome::Failed { failure, .. } => {
                copy.attempts += 1;
                if self.retry.is_worth(&failure) && copy.attempts < self.retry.attempts {
                    let backoff = Backoff { first: self.retry.backoff, max: self.retry.backoff_max };
                    State::Waiting { due: now + backoff.delay(copy.attempts, random) }
                } else {
                    State::Failed(failure)
                }
            }
            Outcome::Lost => {
                copy.lost += 1;
                self.lost |= copy.lost >= LOST_MAX;
                State::Waiting { due: now + LOST_BACKOFF.delay(copy.lost, random) }
            }
        };
        let ended = match &copy.state {
            State::Waiting { .. } | State::Running => None,
            State::Succeeded => Some(Ok(())),
            State::Failed(failure) => Some(Err(failure.clone())),
        };
        (!lost).then_some(CopyProgress { index, attempts: copy.attempts, ended })
    }

    /// What a copy that waits for another attempt has behind it; for the log.
    pub fn attempts(&self, index: u32) -> u32 {
        self.copies.get(index as usize).map_or(0, |copy| copy.attempts)
    }

    /// Of the whole: its output lists each copy's end.
    pub fn outcome(&self, took: Duration) -> Outcome {
        if self.lost {
            return Outcome::Lost;
        }
        let output = self.list().to_string().into_bytes();
        let mut failed = self.copies.iter().enumerate().filter_map(|(index, copy)| match &copy.state {
            State::Failed(failure) => Some((index as u32, failure)),
            _ => None,
        });
        let Some((index, first)) = failed.next() else {
            let content_type = Some("application/json".to_owned());
            return Outcome::Succeeded { output, content_type, event: None, took };
        };
        let failure = Failure::Copies {
            failed: 1 + failed.count() as u32,
            copies: self.copies.len() as u32,
            index,
            first: shortened(first),
        };
        Outcome::failed(failure, output, took)
    }

    fn list(&self) -> serde_json::Value {
        let copies = self.copies.iter().enumerate().map(|(index, copy)| {
            let mut said = serde_json::json!({ "index": index, "attempts": copy.attempts });
            match &copy.state {
                State::Succeeded => said["exit"] = 0.into(),
                State::Failed(failure) => {
                    if let Failure::Exit(code) = failure {
                        said["exit"] = (*code).into();
                    }
                    said["error"] = shortened(failure).into();
                }
                State::Waiting { .. } | State::Running => {}
            }
            said
        });
        serde_json::json!({ "copies": copies.collect::<Vec<_>>() })
    }
}

fn shortened(failure: &Failure) -> String {
    failure.to_string().chars().take(ERROR_CHARS).collect()
}

/// A copy's own variables: neap's, and those of Cloud Run's jobs.
pub fn environment(job: &str, event: &str, index: u32, copies: u32, attempt: u32) -> Vec<(String, String)> {
    let numbers = [("INDEX", index), ("COUNT", copies), ("ATTEMPT", attempt)];
    let both = |(word, number): (&str, u32)| {
        ["NEAP_COPY_", "CLOUD_RUN_TASK_"].map(|prefix| (format!("{prefix}{word}"), number.to_string()))
    };
    let mut environment: Vec<_> = numbers.into_iter().flat_map(both).collect();
    environment.push(("CLOUD_RUN_JOB".to_owned(), job.to_owned()));
    environment.push(("CLOUD_RUN_EXECUTION".to_owned(), format!("{job}-{event}")));
    environment
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn batch(copies: u32, at_once: u32, attempts: u32) -> Batch {
        let (backoff, backoff_max) = (Duration::from_secs(1), Duration::from_secs(60));
        Batch::new(copies, at_once, &Retry { attempts, backoff, backoff_max, codes: None })
    }

    fn succeeded() -> Outcome {
        Outcome::Succeeded { output: Vec::new(), content_type: None, event: None, took: Duration::ZERO }
    }

    fn exit(code: i32) -> Outcome {
        Outcome::failed(Failure::Exit(code), Vec::new(), Duration::ZERO)
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn list(outcome: &Outcome) -> serde_json::Value {
        let (Outcome::Succeeded { output, .. } | Outcome::Failed { output, .. }) = outcome else {
            panic!("{outcome:?}")
        };
        serde_json::from_slice(output).expect("the list is JSON")
    }

    #[test]
    fn copies_that_had_ended_do_not_run_again_and_others_have_the_attempts_they_had() {
        let mut before = batch(4, 4, 3);
        let started: Vec<_> = (0..4).map(|_| before.next(Duration::ZERO)).collect();
        assert!(started.iter().all(|next| matches!(next, Next::Start { attempt: 0, .. })));
        let exit = |code| Outcome::failed(Failure::Exit(code), Vec::new(), Duration::ZERO);
        let succeeded =
            Outcome::Succeeded { output: Vec::new(), content_type: None, event: None, took: Duration::ZERO };
        let refused = Outcome::failed(Failure::Refused("x".into()), Vec::new(), Duration::ZERO);
        let ends = [(0, succeeded), (1, refused), (2, exit(1)), (3, Outcome::Lost)];
        let known: Vec<_> = ends
            .into_iter()
            .filter_map(|(index, outcome)| before.ended(index, outcome, Duration::ZERO, 0))
            .collect();
        assert_eq!(known.iter().map(|copy| copy.index).collect::<Vec<_>>(), [0, 1, 2], "a loss is no end");

        let mut after = batch(4, 4, 3);
        after.resume(&known);

        assert_eq!(after.done(), 2);
        assert_eq!(after.next(Duration::ZERO), Next::Start { index: 2, attempt: 1 });
        assert_eq!(after.next(Duration::ZERO), Next::Start { index: 3, attempt: 0 });
        assert_eq!(after.next(Duration::ZERO), Next::Wait(None));
        let list = after.list();
        assert_eq!(
            (&list["copies"][0]["exit"], &list["copies"][1]["error"]),
            (&0.into(), &"refused: x".into())
        );
    }

    #[test]
    fn copies_start_in_order_and_so_many_at_once() {
        let mut batch = batch(3, 2, 1);

        assert_eq!(batch.next(at(0)), Next::Start { index: 0, attempt: 0 });
        assert_eq!(batch.next(at(0)), Next::Start { index: 1, attempt: 0 });
        assert_eq!(batch.next(at(0)), Next::Wait(None), "two at once");
        batch.ended(1, succeeded(), at(1), 0);
        assert_eq!(batch.next(at(1)), Next::Start { index: 2, attempt: 0 });
        batch.ended(0, succeeded(), at(2), 0);
        assert_eq!(batch.next(at(2)), Next::Wait(None));
        batch.ended(2, succeeded(), at(3), 0);

        assert_eq!(batch.next(at(3)), Next::Done);
        let exits = serde_json::json!({ "copies": [
            { "index": 0, "attempts": 1, "exit": 0 },
            { "index": 1, "attempts": 1, "exit": 0 },
            { "index": 2, "attempts": 1, "exit": 0 },
        ]});
        assert_eq!(list(&batch.outcome(at(3))), exits);
    }

    #[test]
    fn each_copy_has_attempts_of_its_own() {
        let mut batch = batch(2, 1, 2);

        batch.next(at(0));
        batch.ended(0, exit(3), at(1), u64::MAX);
        assert_eq!(batch.next(at(1)), Next::Start { index: 1, attempt: 0 }, "while the first waits");
        batch.ended(1, succeeded(), at(2), 0);
        assert_eq!(batch.next(at(2)), Next::Wait(Some(at(3))), "after its backoff");
        assert_eq!(batch.next(at(3)), Next::Start { index: 0, attempt: 1 });
        batch.ended(0, exit(4), at(4), 0);

        assert_eq!(batch.next(at(4)), Next::Done);
        let outcome = batch.outcome(at(4));
        let Outcome::Failed { failure, .. } = &outcome else { panic!("{outcome:?}") };
        assert_eq!(failure.to_string(), "1 of 2 copies failed; copy 0: exited with code 4");
        assert_eq!(list(&outcome)["copies"][0]["exit"], 4);
        assert_eq!(list(&outcome)["copies"][1]["exit"], 0);
    }

    #[test]
    fn what_is_lost_is_tried_again_and_not_counted() {
        let mut batch = batch(1, 1, 1);
        let mut now = at(0);
        for _ in 0..LOST_MAX {
            now += at(60);
            assert_eq!(batch.next(now), Next::Start { index: 0, attempt: 0 });
            batch.ended(0, Outcome::Lost, now, 0);
        }

        assert_eq!(batch.next(now + at(60)), Next::Done);
        assert_eq!(batch.outcome(now), Outcome::Lost);
    }

    proptest! {
        #[test]
        fn every_copy_ends_within_its_attempts(
            copies in 1u32..20, at_once in 1u32..5, attempts in 1u32..4,
            ends in proptest::collection::vec(0u8..4, 0..200),
        ) {
            let mut batch = batch(copies, at_once, attempts);
            let mut ends = ends.into_iter();
            let mut running = Vec::new();
            let mut now = Duration::ZERO;
            loop {
                match batch.next(now) {
                    Next::Start { index, attempt } => {
                        prop_assert!(attempt < attempts && !running.contains(&index));
                        running.push(index);
                        prop_assert!(running.len() <= at_once as usize);
                    }
                    Next::Wait(until) => {
                        if let Some(index) = running.pop() {
                            let outcome = match ends.next() {
                                Some(0) => exit(1),
                                Some(1) => Outcome::Lost,
                                _ => succeeded(),
                            };
                            batch.ended(index, outcome, now, 7);
                        } else {
                            now = until.expect("nothing runs, so something is due");
                        }
                    }
                    Next::Done => break,
                }
            }
            prop_assert!(running.is_empty() || batch.lost);
        }
    }
}
