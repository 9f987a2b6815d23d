//! The instances of one revision whose handler stays up: who serves the next request, when
//! another is started, when an idle one is frozen and when it goes. Pure; time is an argument.
//!
//! ```text
//!   Start ──▶ Starting ──ready──▶ Ready { busy: n } ◀──acquire── Idle { since, frozen }
//!                 │                    │  ▲                        │      │
//!               failed          closed │  └──acquire / release─────┘      │ scale.idle
//!                 ▼                    ▼                                  ▼
//!               gone ◀──── last one released, died ─────────────────── removed
//! ```
//!
//! Starts follow demand: as many instances are under way as the waiting requests would fill,
//! never more than `scale.max` in all. Requests go to the instance that is busiest, so that the
//! others become idle and go. So many as are to be kept are started ahead of any request, one at a
//! time, and stay when they are idle; after one that ended by itself the next such start waits,
//! longer each time. One that says that it is full gets no request until it says otherwise; for the
//! others that wait another is started, within `scale.max`.

use crate::backoff::Backoff;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// An instance without a request is frozen after this: at once for people, late enough for a
/// server to finish what follows an answer, and for a caller in a hurry to find it running.
pub const FREEZE_AFTER: Duration = Duration::from_millis(100);

/// A kept-alive connection is not used after this: servers close idle ones, the hastiest after
/// two seconds (gunicorn), and a request that meets the close is lost. Their clocks go on while
/// they are frozen.
pub const CONNECTION_IDLE: Duration = Duration::from_secs(1);

/// Before an instance that ended by itself, or gave its memory up, is started again unasked.
const AGAIN: Backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(60) };
const GIVEN_UP: Duration = Duration::from_secs(30);

/// One instance, within its fleet.
pub type Number = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// `scale.max`
    pub instances_max: u32,
    /// `scale.concurrency`
    pub concurrency: u32,
    /// `scale.idle`
    pub idle: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Member {
    Starting {
        /// A request is to have it.
        asked: bool,
    },
    Busy {
        /// Requests; at least one.
        requests: u32,
        /// It takes no more and goes with its last one.
        closing: bool,
    },
    Idle {
        since: Duration,
        rest: Rest,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rest {
    Awake,
    /// Frozen; its connections may carry another request.
    Frozen,
    /// Frozen, and its connections are too old.
    Alone,
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    On {
        number: Number,
        /// It has to be thawed first.
        frozen: bool,
    },
    /// Start this one, and ask again.
    Start(Number),
    /// Ask again when something has changed.
    Wait,
}

/// What is to be done to an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Freeze(Number),
    /// Its connections carry no other request.
    Disconnect(Number),
    /// It is no longer part of the fleet.
    Remove(Number),
}

#[derive(Debug)]
pub struct Fleet {
    bounds: Bounds,
    members: BTreeMap<Number, Member>,
    /// Those of them that take nothing new for now.
    full: BTreeSet<Number>,
    made: Number,
    /// Requests that have no place yet.
    waiting: u32,
    /// Instances to be kept ready.
    kept: u32,
    /// None is started unasked before this.
    again: Duration,
    /// Instances that ended by themselves since one served a request.
    failures: u32,
}

impl Fleet {
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            members: BTreeMap::new(),
            full: BTreeSet::new(),
            made: 0,
            waiting: 0,
            kept: 0,
            again: Duration::ZERO,
            failures: 0,
        }
    }

    /// Instances, those under way included.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn has(&self, number: Number) -> bool {
        self.members.contains_key(&number)
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// So many are to be ready from now on, requests or not.
    pub fn keep(&mut self, count: u32) {
        self.kept = count;
    }

    /// One that is to be started unasked. Starts take the CPU that calls need, and a function that
    /// can't start shows that with one as well as with all: while one is under way no other is.
    pub fn missing(&mut self, now: Duration) -> Option<Number> {
        if !self.lacks() || now < self.again {
            return None;
        }
        self.made += 1;
        self.members.insert(self.made, Member::Starting { asked: false });
        Some(self.made)
    }

    /// One may be started unasked, as soon as `again` has come.
    fn lacks(&self) -> bool {
        self.members.len() < self.kept.min(self.bounds.instances_max) as usize && self.starting() == 0
    }

    fn starting(&self) -> u32 {
        self.members.values().filter(|member| matches!(member, Member::Starting { .. })).count() as u32
    }

    /// Whether requests that have no place yet fail as this start did. Where nobody asked for it and
    /// others serve, these will have a place for them.
    pub fn fails_waiting(&self, number: Number) -> bool {
        let asked = self.members.get(&number) != Some(&Member::Starting { asked: false });
        let serves =
            |member: &Member| matches!(member, Member::Busy { closing: false, .. } | Member::Idle { .. });
        asked || !self.members.values().any(serves)
    }

    /// It ended, and nobody had asked for that; `random` is for jitter.
    pub fn ended_by_itself(&mut self, now: Duration, random: u64) {
        self.again = now + AGAIN.delay(self.failures, random);
        self.failures = self.failures.saturating_add(1);
    }

    /// A request comes and has no place yet; it leaves again by `leave`.
    pub fn enter(&mut self) {
        self.waiting += 1;
    }

    /// It has its place, or has given up.
    pub fn leave(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }

    /// A place for a request that has entered.
    pub fn acquire(&mut self) -> Place {
        let most = self.bounds.concurrency;
        let takes = self.members.iter().filter(|(number, _)| !self.full.contains(number));
        let free = takes.filter_map(|(number, member)| match member {
            Member::Busy { requests, closing: false } if *requests < most => Some((*requests + 1, *number)),
            // The last that became idle is the likeliest to be still warm.
            Member::Idle { rest, .. } => Some((u32::from(*rest == Rest::Awake), *number)),
            _ => None,
        });
        if let Some((_, number)) = free.max() {
            let member = self.members.get_mut(&number).expect("it was just found");
            let (requests, frozen) = match *member {
                Member::Busy { requests, .. } => (requests + 1, false),
                Member::Idle { rest, .. } => (1, rest != Rest::Awake),
                Member::Starting { .. } => unreachable!("a starting instance is not free"),
            };
            *member = Member::Busy { requests, closing: false };
            return Place::On { number, frozen };
        }
        let full = self.members.len() >= self.bounds.instances_max as usize;
        if full || self.starting().saturating_mul(most) >= self.waiting {
            return Place::Wait;
        }
        self.made += 1;
        self.members.insert(self.made, Member::Starting { asked: true });
        Place::Start(self.made)
    }

    /// It has said that it takes no more. False: it is known, or gone.
    pub fn full(&mut self, number: Number) -> bool {
        self.has(number) && self.full.insert(number)
    }

    /// It takes requests again.
    pub fn roomy(&mut self, number: Number) {
        self.full.remove(&number);
    }

    pub fn ready(&mut self, number: Number, now: Duration) {
        if let Some(member @ Member::Starting { .. }) = self.members.get_mut(&number) {
            *member = Member::Idle { since: now, rest: Rest::Awake };
        }
    }

    /// It could not be started, or has died: it is no longer part of the fleet.
    pub fn gone(&mut self, number: Number) {
        self.members.remove(&number);
    }

    /// A request is done. `keep`: its instance may serve others; else it goes, with its last.
    pub fn release(&mut self, number: Number, keep: bool, now: Duration) -> Option<Order> {
        let member = self.members.get_mut(&number)?;
        let Member::Busy { requests, closing } = *member else { return None };
        let closing = closing || !keep;
        if keep {
            self.failures = 0;
        }
        *member = match (requests - 1, closing) {
            (0, true) => {
                self.members.remove(&number);
                return Some(Order::Remove(number));
            }
            (0, false) => Member::Idle { since: now, rest: Rest::Awake },
            (requests, closing) => Member::Busy { requests, closing },
        };
        None
    }

    /// What is due by now.
    pub fn due(&mut self, now: Duration) -> Vec<Order> {
        let mut old: Vec<(Duration, Number)> = self
            .members
            .iter()
            .filter_map(|(number, member)| match member {
                Member::Idle { since, .. } if *since + self.bounds.idle <= now => Some((*since, *number)),
                _ => None,
            })
            .collect();
        old.sort_unstable();
        old.truncate(self.spare());
        for (_, number) in &old {
            self.members.remove(number);
        }
        let mut orders: Vec<Order> = old.into_iter().map(|(_, number)| Order::Remove(number)).collect();
        for (number, member) in &mut self.members {
            let Member::Idle { since, rest } = member else { continue };
            // One that is full is asked whether it still is.
            if *rest == Rest::Awake && *since + FREEZE_AFTER <= now && !self.full.contains(number) {
                *rest = Rest::Frozen;
                orders.push(Order::Freeze(*number));
            }
            if *rest == Rest::Frozen && *since + CONNECTION_IDLE <= now {
                *rest = Rest::Alone;
                orders.push(Order::Disconnect(*number));
            }
        }
        orders
    }

    /// Those that need not be kept.
    fn spare(&self) -> usize {
        self.members.len().saturating_sub(self.kept as usize)
    }

    /// When `due` has something to say again, if nothing else happens before.
    pub fn next(&self) -> Option<Duration> {
        let times = self.members.iter().filter_map(|(number, member)| match member {
            Member::Idle { since, rest: Rest::Awake } if !self.full.contains(number) => {
                Some(*since + FREEZE_AFTER)
            }
            Member::Idle { since, rest } => {
                let removed = (self.spare() > 0).then_some(*since + self.bounds.idle);
                let disconnected = (*rest == Rest::Frozen).then_some(*since + CONNECTION_IDLE);
                removed.into_iter().chain(disconnected).min()
            }
            _ => None,
        });
        times.chain(self.lacks().then_some(self.again)).min()
    }

    /// The one that has been idle for longest goes: its memory is needed elsewhere, so for a
    /// while none is started unasked.
    pub fn give_up_one(&mut self, now: Duration) -> Option<(Number, Duration)> {
        let idle = self.members.iter().filter_map(|(number, member)| match member {
            Member::Idle { since, .. } => Some((*since, *number)),
            _ => None,
        });
        let (since, number) = idle.min()?;
        self.members.remove(&number);
        self.again = self.again.max(now + GIVEN_UP);
        Some((number, since))
    }

    /// Since when the longest idle one has been so, behind whether it is to be kept: those that need
    /// not be go first.
    pub fn gives_up(&self) -> Option<(bool, Duration)> {
        let idle = self.members.values().filter_map(|member| match member {
            Member::Idle { since, .. } => Some(*since),
            _ => None,
        });
        Some((self.spare() == 0, idle.min()?))
    }

    /// Nothing new comes: the idle go now, the others with their last request.
    pub fn close(&mut self) -> Vec<Order> {
        let mut orders = Vec::new();
        self.bounds.instances_max = 0;
        self.members.retain(|number, member| match member {
            Member::Starting { .. } | Member::Idle { .. } => {
                orders.push(Order::Remove(*number));
                false
            }
            Member::Busy { closing, .. } => {
                *closing = true;
                true
            }
        });
        orders
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDLE: Duration = Duration::from_secs(60);

    fn fleet(instances_max: u32, concurrency: u32) -> Fleet {
        Fleet::new(Bounds { instances_max, concurrency, idle: IDLE })
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Enters, and starts what is to be started, until there is a place.
    fn place(fleet: &mut Fleet, now: Duration) -> Option<(Number, bool)> {
        fleet.enter();
        loop {
            match fleet.acquire() {
                Place::On { number, frozen } => {
                    fleet.leave();
                    return Some((number, frozen));
                }
                Place::Start(number) => fleet.ready(number, now),
                Place::Wait => {
                    fleet.leave();
                    return None;
                }
            }
        }
    }

    #[test]
    fn instance_is_started_used_frozen_thawed_and_removed() {
        let mut fleet = fleet(1, 1);

        let first = place(&mut fleet, at(0));
        assert_eq!(first, Some((1, false)));
        assert_eq!(fleet.release(1, true, at(50)), None);
        assert_eq!(fleet.next(), Some(at(50) + FREEZE_AFTER));
        assert_eq!(fleet.due(at(50) + FREEZE_AFTER), [Order::Freeze(1)]);
        assert_eq!(fleet.due(at(50) + FREEZE_AFTER), []);

        assert_eq!(place(&mut fleet, at(1000)), Some((1, true)));
        assert_eq!(fleet.next(), None, "a busy one is not on the clock");
        fleet.release(1, true, at(2000));
        assert_eq!(fleet.due(at(2000) + IDLE), [Order::Remove(1)]);
        assert!(fleet.is_empty());
    }

    #[test]
    fn starts_follow_demand() {
        let mut fleet = fleet(3, 2);

        (0..3).for_each(|_| fleet.enter());

        assert_eq!(fleet.acquire(), Place::Start(1));
        assert_eq!(fleet.acquire(), Place::Start(2));
        assert_eq!(fleet.acquire(), Place::Wait, "two instances have room for four");
        (0..6).for_each(|_| fleet.enter());
        assert_eq!(fleet.acquire(), Place::Start(3));
        assert_eq!(fleet.acquire(), Place::Wait, "scale.max");
    }

    #[test]
    fn requests_go_to_the_busiest_that_has_room() {
        let mut fleet = fleet(2, 2);
        let places: Vec<_> = (0..4).filter_map(|_| place(&mut fleet, at(0))).map(|(n, _)| n).collect();
        assert_eq!(places, [1, 1, 2, 2]);
        fleet.release(1, true, at(1));
        fleet.release(2, true, at(1));
        fleet.release(2, true, at(1));

        assert_eq!(place(&mut fleet, at(2)), Some((1, false)));
    }

    #[test]
    fn instance_that_is_not_to_be_kept_goes_with_its_last_request() {
        let mut fleet = fleet(1, 2);
        place(&mut fleet, at(0));
        place(&mut fleet, at(0));

        assert_eq!(fleet.release(1, false, at(1)), None);
        assert_eq!(place(&mut fleet, at(1)), None);
        assert_eq!(fleet.release(1, true, at(2)), Some(Order::Remove(1)));
        assert_eq!(place(&mut fleet, at(3)), Some((2, false)), "another is started");
    }

    #[test]
    fn kept_ones_are_started_unasked_and_stay() {
        let mut fleet = fleet(3, 1);
        fleet.keep(2);

        assert_eq!((fleet.missing(at(0)), fleet.missing(at(0))), (Some(1), None), "one at a time");
        assert_eq!(fleet.next(), None, "its end is waited for, not the clock");
        fleet.ready(1, at(10));
        assert_eq!(fleet.next(), Some(at(0)));
        assert_eq!((fleet.missing(at(10)), fleet.missing(at(10))), (Some(2), None));
        fleet.ready(2, at(20));
        assert_eq!(fleet.missing(at(20)), None, "two are there");
        assert_eq!(fleet.due(at(20) + FREEZE_AFTER), [Order::Freeze(1), Order::Freeze(2)]);
        assert_eq!(fleet.next(), Some(at(10) + CONNECTION_IDLE));
        let disconnected = [Order::Disconnect(1), Order::Disconnect(2)];
        assert_eq!(fleet.due(at(20) + CONNECTION_IDLE), disconnected);
        assert_eq!(fleet.next(), None, "nothing will happen by itself");
        assert_eq!(fleet.due(at(20) + IDLE), [], "idle ones stay");

        let (first, second) = (place(&mut fleet, at(0)), place(&mut fleet, at(0)));
        assert_eq!((first, second), (Some((2, true)), Some((1, true))));
        assert_eq!(place(&mut fleet, at(0)), Some((3, false)), "demand has another");
        for number in [1, 2, 3] {
            fleet.release(number, true, at(number));
        }
        fleet.due(at(3) + FREEZE_AFTER);
        fleet.due(at(3) + CONNECTION_IDLE);
        assert_eq!(fleet.next(), Some(at(1) + IDLE));
        assert_eq!(fleet.due(at(3) + IDLE), [Order::Remove(1)], "which is one too many again");
    }

    #[test]
    fn start_that_nobody_asked_for_fails_no_request_while_another_serves() {
        let mut fleet = fleet(3, 1);
        fleet.keep(3);
        let first = fleet.missing(at(0)).expect("it is missing");
        assert!(fleet.fails_waiting(first), "who waits has nothing else");
        fleet.ready(first, at(1));
        let second = fleet.missing(at(1)).expect("it is missing");
        assert!(!fleet.fails_waiting(second));

        assert_eq!(place(&mut fleet, at(2)), Some((first, false)));
        assert!(!fleet.fails_waiting(second), "a busy one will have room");
        fleet.gone(second);
        fleet.enter();
        let Place::Start(asked) = fleet.acquire() else { panic!("it has no place") };
        assert!(fleet.fails_waiting(asked));
        assert_eq!(fleet.missing(at(3)), None, "one is under way");
    }

    #[test]
    fn instance_that_ends_by_itself_comes_again_ever_later() {
        let mut fleet = fleet(1, 1);
        fleet.keep(1);
        let mut now = at(0);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let number = fleet.missing(now).expect("it is missing");
            fleet.gone(number);
            fleet.ended_by_itself(now, u64::MAX);
            assert_eq!(fleet.missing(now), None);
            let next = fleet.next().expect("it will be started again");
            waits.push((next - now).as_secs());
            now = next;
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn memory_that_was_given_up_is_not_taken_again_at_once() {
        let mut fleet = fleet(1, 1);
        fleet.keep(1);
        let number = fleet.missing(at(0)).expect("it is missing");
        fleet.ready(number, at(0));

        assert_eq!(fleet.give_up_one(at(5)), Some((number, at(0))));
        assert_eq!(fleet.missing(at(6)), None);
        assert_eq!(fleet.next(), Some(at(5) + GIVEN_UP));
        assert_eq!(place(&mut fleet, at(7)), Some((number + 1, false)), "but a request has its instance");
    }

    #[test]
    fn full_one_gets_nothing_until_it_has_room_and_others_serve_meanwhile() {
        let mut fleet = fleet(2, 2);
        assert_eq!(place(&mut fleet, at(0)), Some((1, false)));
        assert!(fleet.full(1));
        assert!(!fleet.full(1) && !fleet.full(7), "known, and none of them");

        assert_eq!(place(&mut fleet, at(0)), Some((2, false)), "another is started");
        assert!(fleet.full(2));
        assert_eq!(place(&mut fleet, at(0)), None, "scale.max");
        fleet.release(1, true, at(1));
        assert_eq!(fleet.due(at(1) + FREEZE_AFTER), [], "it can't answer when it is frozen");
        assert_eq!(fleet.next(), Some(at(1) + IDLE));
        assert_eq!(place(&mut fleet, at(2)), None);

        fleet.roomy(1);
        assert_eq!(place(&mut fleet, at(3)), Some((1, false)));
        fleet.release(1, true, at(3));
        fleet.full(1);
        assert_eq!(fleet.due(at(3) + IDLE), [Order::Remove(1)], "nobody wants it");
        assert_eq!(place(&mut fleet, at(9)), Some((3, false)));
    }

    #[test]
    fn longest_idle_one_is_given_up_first() {
        let mut fleet = fleet(2, 1);
        place(&mut fleet, at(0));
        place(&mut fleet, at(0));
        assert_eq!(fleet.give_up_one(at(0)), None, "both are busy");

        fleet.release(2, true, at(1));
        fleet.release(1, true, at(2));

        assert_eq!(fleet.gives_up(), Some((false, at(1))));
        assert_eq!(fleet.give_up_one(at(3)), Some((2, at(1))));
        assert_eq!(fleet.len(), 1);
        fleet.keep(1);
        assert_eq!(fleet.gives_up(), Some((true, at(2))), "after others' that need not be kept");
    }

    proptest! {
        #[test]
        fn bounds_hold_whatever_happens(
            max in 1u32..4, concurrency in 1u32..4,
            steps in proptest::collection::vec((0u8..6, 0u64..200_000), 1..200),
        ) {
            let mut fleet = fleet(max, concurrency);
            let mut held: Vec<Number> = Vec::new();
            let mut now = Duration::ZERO;
            for (step, ms) in steps {
                match step {
                    0 | 1 => held.extend(place(&mut fleet, now).map(|(number, _)| number)),
                    2 => if let Some(number) = held.pop() { fleet.release(number, true, now); },
                    3 => if let Some(number) = held.pop() { fleet.release(number, false, now); },
                    4 => { now += at(ms); fleet.due(now); }
                    _ => if let Some(number) = held.first().copied() {
                        fleet.gone(number);
                        held.retain(|other| *other != number);
                    },
                }
                prop_assert!(fleet.len() <= max as usize);
                prop_assert!(held.len() <= (max * concurrency) as usize);
                for number in &held {
                    prop_assert!(fleet.members.contains_key(number), "a busy instance was removed");
                }
                prop_assert_eq!(fleet.waiting, 0);
            }
        }
    }
}
