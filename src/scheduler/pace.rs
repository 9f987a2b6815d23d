//! When a caller who is refused should come again: Retry-After at the line's own pace. Pure.
//!
//! A fixed second would bring everyone back at once, to be refused again by a line that moves
//! once in a minute. So the answer is the time that the line ahead takes: how many wait, through
//! how many places, and how long a place has usually been taken. Places are those in use just
//! now, whatever keeps them from being more (`scale.max`, memory, the brake).

use crate::model::FunctionName;
use std::collections::BTreeMap;
use std::time::Duration;

/// What Retry-After can say: whole seconds.
const SHORTEST: Duration = Duration::from_secs(1);

/// Nobody plans by more; the line may be another by then.
const LONGEST: Duration = Duration::from_secs(300);

/// Of the usual time, for each invocation that ends: a change is believed after a few.
const WEIGHT: u32 = 4;

/// How long invocations of each function have been taking their places.
#[derive(Debug, Default)]
pub struct Pace {
    usual: BTreeMap<FunctionName, Duration>,
}

/// Where a caller who is refused would stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Callers of the same function before it.
    pub ahead: usize,
    /// Invocations of the function that run.
    pub places: u32,
    /// In vain, so far.
    pub waited: Duration,
}

impl Pace {
    /// An invocation gave its place back.
    pub fn ended(&mut self, name: &FunctionName, held: Duration) {
        match self.usual.get_mut(name) {
            Some(usual) => *usual = (*usual * (WEIGHT - 1) + held) / WEIGHT,
            None => {
                self.usual.insert(name.clone(), held);
            }
        }
    }

    /// Those that are gone are forgotten: there are as many as functions.
    pub fn keep(&mut self, is_there: impl Fn(&FunctionName) -> bool) {
        self.usual.retain(|name, _| is_there(name));
    }

    /// Until a caller would be served; as long again as one has just waited in vain, at least.
    pub fn wait(&self, name: &FunctionName, standing: Standing) -> Duration {
        let Standing { ahead, places, waited } = standing;
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        let turns = ahead.saturating_add(1).div_ceil(places.max(1));
        let line = self.usual.get(name).map_or(Duration::ZERO, |usual| usual.saturating_mul(turns));
        line.max(waited).clamp(SHORTEST, LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> FunctionName {
        FunctionName::parse(text).expect("a good name")
    }

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn standing(ahead: usize, places: u32) -> Standing {
        Standing { ahead, places, waited: Duration::ZERO }
    }

    #[test]
    fn a_caller_is_told_the_time_that_the_line_ahead_takes() {
        let mut pace = Pace::default();
        pace.ended(&name("slow"), secs(4));

        assert_eq!(pace.wait(&name("slow"), standing(0, 1)), secs(4));
        assert_eq!(pace.wait(&name("slow"), standing(9, 1)), secs(40));
        assert_eq!(pace.wait(&name("slow"), standing(9, 5)), secs(8));
        assert_eq!(pace.wait(&name("slow"), standing(3, 0)), secs(16), "the next place is the first");
    }

    #[test]
    fn the_pace_follows_what_ends() {
        let mut pace = Pace::default();
        pace.ended(&name("f"), secs(100));

        let waits: Vec<u64> = (0..20)
            .map(|_| {
                pace.ended(&name("f"), secs(2));
                pace.wait(&name("f"), standing(0, 1)).as_secs()
            })
            .collect();

        assert!(waits.is_sorted_by(|a, b| a >= b), "{waits:?}");
        assert_eq!(waits.last(), Some(&2));
    }

    #[test]
    fn the_answer_is_a_second_at_least_and_minutes_at_most() {
        let mut pace = Pace::default();
        pace.ended(&name("quick"), Duration::from_millis(3));
        pace.ended(&name("slow"), secs(3600));

        assert_eq!(pace.wait(&name("quick"), standing(63, 4)), SHORTEST);
        assert_eq!(pace.wait(&name("slow"), standing(usize::MAX >> 1, 1)), LONGEST);
    }

    #[test]
    fn what_was_waited_in_vain_is_the_least() {
        let mut pace = Pace::default();
        pace.ended(&name("stuck"), secs(2));

        assert_eq!(pace.wait(&name("stuck"), Standing { waited: secs(10), ..standing(0, 1) }), secs(10));
        assert_eq!(pace.wait(&name("new"), standing(5, 1)), SHORTEST);
        assert_eq!(pace.wait(&name("new"), Standing { waited: secs(10), ..standing(5, 1) }), secs(10));
    }

    #[test]
    fn a_function_that_went_is_forgotten() {
        let mut pace = Pace::default();
        pace.ended(&name("gone"), secs(60));
        pace.ended(&name("here"), secs(60));

        pace.keep(|other| *other == name("here"));

        assert_eq!(pace.wait(&name("gone"), standing(0, 1)), SHORTEST);
        assert_eq!(pace.wait(&name("here"), standing(0, 1)), secs(60));
    }
}
