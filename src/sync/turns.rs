//! Which callbacks go now: a bounded number at once, to each receiver fewer, and none to one that
//! just failed. What one receiver keeps waiting keeps no other's waiting. Pure.
//!
//! The outbox is the only list of what is owed; this remembers how far it was read, what is under
//! way, and for each receiver the first that had to wait. So a backlog for a receiver that is away
//! is read again only when that one may have another. Where it could not be read to the end, it is read
//! again from the beginning.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// Under way at once, for all receivers.
pub const IN_FLIGHT_MAX: usize = 32;
/// Bodies under way at once, in memory; one goes however large it is.
const BYTES_IN_FLIGHT_MAX: u64 = 8 << 20;
/// As many as `IN_FLIGHT_MAX`, for one receiver.
const PER_RECEIVER_MAX: u32 = 2;
/// Receivers told apart: two of one place share their bounds, and wait for each other.
const PLACES: usize = 256;

#[derive(Clone, Debug, Default)]
struct Place {
    in_flight: u32,
    failures: u32,
    rests_until: Duration,
    /// The first that had to wait.
    behind: Option<i64>,
}

impl Place {
    fn is_free(&self, now: Duration) -> bool {
        // One that failed is asked with one.
        let most = if self.failures > 0 { 1 } else { PER_RECEIVER_MAX };
        self.in_flight < most && now >= self.rests_until
    }
}

pub struct Turns {
    places: Vec<Place>,
    /// By number: the bytes of their bodies.
    in_flight: BTreeMap<i64, u64>,
    /// The body of the first that found no room among them: the others wait behind it.
    too_large: Option<u64>,
    /// Up to here all were looked at.
    read: i64,
    /// There may be more.
    fresh: bool,
}

/// One sweep through the outbox.
pub struct Sweep {
    /// Reading goes on behind this.
    pub after: i64,
    hungry: Vec<usize>,
}

impl Default for Turns {
    fn default() -> Self {
        let places = vec![Place::default(); PLACES];
        Self { places, in_flight: BTreeMap::new(), too_large: None, read: 0, fresh: true }
    }
}

impl Turns {
    /// There may be new ones.
    pub fn wake(&mut self) {
        self.fresh = true;
    }

    /// A sweep broke off: what it was to look at again is forgotten, so all are looked at.
    pub fn broke_off(&mut self) {
        (self.read, self.fresh) = (0, true);
    }

    fn is_full(&self) -> bool {
        self.in_flight.len() >= IN_FLIGHT_MAX || self.too_large.is_some_and(|bytes| !self.has_room(bytes))
    }

    fn has_room(&self, bytes: u64) -> bool {
        let taken: u64 = self.in_flight.values().sum();
        self.in_flight.is_empty() || taken.saturating_add(bytes) <= BYTES_IN_FLIGHT_MAX
    }

    /// `None`: nothing could go.
    pub fn begin(&mut self, now: Duration) -> Option<Sweep> {
        if self.is_full() {
            return None;
        }
        self.too_large = None;
        let hungry: Vec<usize> = (0..self.places.len())
            .filter(|at| self.places[*at].behind.is_some() && self.places[*at].is_free(now))
            .collect();
        let first = hungry.iter().filter_map(|at| self.places[*at].behind.take()).min();
        let after = match (first, self.fresh) {
            (Some(first), true) => (first - 1).min(self.read),
            (Some(first), false) => first - 1,
            (None, true) => self.read,
            (None, false) => return None,
        };
        Some(Sweep { after, hungry })
    }

    /// Whether to read on; if not, what was not looked at is remembered.
    pub fn goes_on(&mut self, sweep: &mut Sweep, now: Duration) -> bool {
        let full = self.is_full();
        let looked_at = sweep.after < self.read;
        let nobody = sweep.hungry.iter().all(|at| !self.places[*at].is_free(now));
        if full || looked_at && nobody {
            if looked_at {
                for at in &sweep.hungry {
                    let behind = &mut self.places[*at].behind;
                    *behind = Some(behind.map_or(sweep.after + 1, |first| first.min(sweep.after + 1)));
                }
            }
            if full || !self.fresh {
                return false;
            }
            sweep.hungry.clear();
            sweep.after = self.read;
        }
        true
    }

    /// The next in the outbox: whether it goes now.
    pub fn next(
        &mut self,
        sweep: &mut Sweep,
        (number, bytes): (i64, u64),
        receiver: &str,
        now: Duration,
    ) -> bool {
        sweep.after = number;
        self.read = self.read.max(number);
        if self.in_flight.contains_key(&number) {
            return false;
        }
        let (full, has_room) = (self.is_full(), self.has_room(bytes));
        let place = &mut self.places[place_of(receiver)];
        let is_free = place.is_free(now);
        if full || !is_free || !has_room {
            if !full && is_free {
                self.too_large = Some(bytes);
            }
            place.behind = Some(place.behind.map_or(number, |first| first.min(number)));
            return false;
        }
        place.in_flight += 1;
        self.in_flight.insert(number, bytes);
        true
    }

    /// There is nothing behind what was read.
    pub fn ended(&mut self) {
        self.fresh = false;
    }

    /// One that went has come to an end. `rest`: it failed, and stays owed unless it is set aside.
    pub fn done(&mut self, number: i64, receiver: &str, rest: Option<Duration>, now: Duration) {
        self.in_flight.remove(&number);
        let place = &mut self.places[place_of(receiver)];
        place.in_flight = place.in_flight.saturating_sub(1);
        match rest {
            None => (place.failures, place.rests_until) = (0, Duration::ZERO),
            Some(rest) => {
                place.failures = place.failures.saturating_add(1);
                place.rests_until = place.rests_until.max(now + rest);
                place.behind = Some(place.behind.map_or(number, |first| first.min(number)));
            }
        }
    }

    /// Failures of a receiver since it last took one.
    pub fn failures(&self, receiver: &str) -> u32 {
        self.places[place_of(receiver)].failures
    }

    /// When a receiver that rests may be asked again.
    pub fn next_due(&self, now: Duration) -> Option<Duration> {
        let resting = self.places.iter().filter(|place| place.behind.is_some() && place.rests_until > now);
        resting.map(|place| place.rests_until - now).min()
    }
}

fn place_of(receiver: &str) -> usize {
    let mut hasher = DefaultHasher::new();
    receiver.hash(&mut hasher);
    (hasher.finish() % PLACES as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    /// An outbox of `(number, receiver)`; what goes now.
    fn sweep(turns: &mut Turns, owed: &[(i64, &str)], now: Duration) -> (Vec<i64>, usize) {
        sweep_of(turns, owed, 1, now)
    }

    fn sweep_of(turns: &mut Turns, owed: &[(i64, &str)], bytes: u64, now: Duration) -> (Vec<i64>, usize) {
        let (mut went, mut looked) = (Vec::new(), 0);
        let Some(mut sweep) = turns.begin(now) else { return (went, looked) };
        while turns.goes_on(&mut sweep, now) {
            let page: Vec<_> = owed.iter().filter(|(number, _)| *number > sweep.after).take(4).collect();
            if page.is_empty() {
                turns.ended();
                break;
            }
            for (number, receiver) in page {
                looked += 1;
                if turns.next(&mut sweep, (*number, bytes), receiver, now) {
                    went.push(*number);
                }
            }
        }
        (went, looked)
    }

    #[test]
    fn slow_receiver_keeps_nobody_elses_waiting() {
        let mut owed: Vec<(i64, &str)> = (1..=1000).map(|number| (number, "slow")).collect();
        owed.push((1001, "quick"));
        let mut turns = Turns::default();

        let (went, _) = sweep(&mut turns, &owed, NOW);
        assert_eq!(went, [1, 2, 1001], "two to each, whatever stands before it");
        owed.pop();
        turns.done(1001, "quick", None, NOW);
        owed.push((1002, "quick"));
        turns.wake();

        let (went, looked) = sweep(&mut turns, &owed, NOW);

        assert_eq!((went, looked), (vec![1002], 1), "the backlog is not read again for it");
    }

    #[test]
    fn each_goes_once_and_in_its_turn() {
        let mut owed: Vec<(i64, &str)> =
            (1..=200).map(|number| (number, ["a", "b", "c"][number as usize % 3])).collect();
        let (mut turns, mut all, mut looked) = (Turns::default(), Vec::new(), 0);
        while !owed.is_empty() {
            let (went, read) = sweep(&mut turns, &owed, NOW);
            assert!(!went.is_empty(), "{} are left", owed.len());
            looked += read;
            for number in went {
                let at = owed.iter().position(|(owed, _)| *owed == number).expect("it is owed");
                turns.done(number, owed.remove(at).1, None, NOW);
                all.push(number);
            }
        }

        let mut sorted = all.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!((all.len(), sorted.len()), (200, 200));
        assert!(looked < 200 * 8, "{looked} rows read for 200");
    }

    #[test]
    fn receiver_that_failed_rests_and_is_then_asked_with_one() {
        let owed = [(1, "a"), (2, "a"), (3, "a")];
        let mut turns = Turns::default();
        assert_eq!(sweep(&mut turns, &owed, NOW).0, [1, 2]);

        turns.done(1, "a", Some(Duration::from_secs(5)), NOW);
        turns.done(2, "a", Some(Duration::from_secs(5)), NOW);
        assert_eq!(sweep(&mut turns, &owed, NOW).0, [0; 0]);
        assert_eq!(turns.next_due(NOW), Some(Duration::from_secs(5)));

        assert_eq!(sweep(&mut turns, &owed, NOW + Duration::from_secs(5)).0, [1], "the oldest again");
        turns.done(1, "a", None, NOW + Duration::from_secs(6));
        assert_eq!(sweep(&mut turns, &owed[1..], NOW + Duration::from_secs(6)).0, [2, 3]);
    }

    #[test]
    fn sweep_that_breaks_off_leaves_nothing_behind() {
        let mut owed = vec![(1, "a"), (2, "a"), (3, "a"), (4, "b")];
        let mut turns = Turns::default();
        assert_eq!(sweep(&mut turns, &owed, NOW).0, [1, 2, 4]);
        turns.done(1, "a", None, NOW);
        owed.remove(0);

        turns.begin(NOW).expect("3 may go");
        turns.broke_off(); // the store could not be read

        assert_eq!(sweep(&mut turns, &owed, NOW).0, [3], "those under way go once");
        turns.done(2, "a", None, NOW);
        assert_eq!(sweep(&mut turns, &owed[1..], NOW).0, [0; 0]);
    }

    #[test]
    fn bodies_together_are_bounded_and_one_always_goes() {
        let owed = [(1, "a"), (2, "b"), (3, "c"), (4, "d")];
        let third = BYTES_IN_FLIGHT_MAX / 3;
        let mut turns = Turns::default();
        assert_eq!(sweep_of(&mut turns, &owed, third, NOW).0, [1, 2, 3]);
        assert_eq!(sweep_of(&mut turns, &owed, third, NOW), (vec![], 0), "nothing is read in vain");
        turns.done(2, "b", None, NOW);
        assert_eq!(sweep_of(&mut turns, &[owed[0], owed[2], owed[3]], third, NOW).0, [4]);

        let mut turns = Turns::default();
        assert_eq!(sweep_of(&mut turns, &owed, 2 * BYTES_IN_FLIGHT_MAX, NOW).0, [1]);
        turns.done(1, "a", None, NOW);
        assert_eq!(sweep_of(&mut turns, &owed[1..], 2 * BYTES_IN_FLIGHT_MAX, NOW).0, [2], "the next one");
    }

    #[test]
    fn all_together_are_bounded() {
        let names: Vec<String> = (0..100).map(|n| format!("receiver-{n}")).collect();
        let mut owed: Vec<(i64, &str)> =
            names.iter().zip(1..).map(|(name, number)| (number, name.as_str())).collect();
        let mut turns = Turns::default();

        let (went, _) = sweep(&mut turns, &owed, NOW);
        assert_eq!(went.len(), IN_FLIGHT_MAX);
        for number in went {
            let at = owed.iter().position(|(owed, _)| *owed == number).expect("it is owed");
            turns.done(number, owed.remove(at).1, None, NOW);
        }

        assert_eq!(sweep(&mut turns, &owed, NOW).0.len(), IN_FLIGHT_MAX, "the next ones");
    }
}
