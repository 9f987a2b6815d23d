//! What a receiver's answer to a batch means for the events in it (spec: promise 3). Pure.
//!
//! ```text
//!            2xx ──▶ taken
//!   408 425 429 ──▶ again, after Retry-After or a backoff
//!   1xx 3xx 5xx ──▶ again
//!       401 407 ──▶ denied: we are not known, no event is to blame
//!   403 404 405 421 ──▶ denied, unless others of the same batch are taken: then it is the event's
//!     other 4xx ──▶ refused: halves are tried until the one to blame is alone
//! ```
//!
//! Denied is what an expired token and a mistyped path look like. To set aside every delivery of a
//! site for that would lose what the outbox was there to keep.

use std::time::Duration;

/// A receiver that asks for longer is asked again all the same: nobody watches a gateway.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Taken,
    Again,
    Denied {
        /// Others that are taken show that the event is to blame.
        perhaps_event: bool,
    },
    Refused,
}

pub fn verdict(status: u16) -> Verdict {
    match status {
        200..=299 => Verdict::Taken,
        401 | 407 => Verdict::Denied { perhaps_event: false },
        403 | 404 | 405 | 421 => Verdict::Denied { perhaps_event: true },
        408 | 425 | 429 => Verdict::Again,
        400..=499 => Verdict::Refused,
        _ => Verdict::Again,
    }
}

/// A number of seconds or a date (RFC 9110 §10.2.3); `now` in milliseconds since 1970. What is
/// neither says nothing.
pub fn retry_after(value: &str, now_ms: i64) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(value).ok()?;
            Duration::from_millis(u64::try_from(date.as_millisecond().saturating_sub(now_ms)).ok()?)
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// The search through one batch for what the receiver does not take. Groups come out in order;
/// the answer to each decides what comes next.
#[derive(Debug)]
pub struct Search<T> {
    /// The next one last.
    groups: Vec<Vec<T>>,
    /// Alone when they were denied, none taken since the search began.
    denied: Vec<T>,
    taken: bool,
}

/// Single ones that are denied before the receiver is taken to deny all.
const DENIED_MAX: usize = 5;

#[derive(Debug, PartialEq, Eq)]
pub enum Found<T> {
    /// Out of the way, go on.
    Taken(Vec<T>),
    /// The events to blame: they are dead.
    Refused(Vec<T>),
    /// Go on with the next group.
    Split,
    /// The receiver does not want us: leave it all for later.
    Denied,
}

impl<T> Search<T> {
    pub fn new(batch: Vec<T>) -> Self {
        let groups = if batch.is_empty() { Vec::new() } else { vec![batch] };
        Self { groups, denied: Vec::new(), taken: false }
    }

    pub fn next_group(&mut self) -> Option<Vec<T>> {
        self.groups.pop()
    }

    /// All groups are through: what was denied and can't be told from a receiver that denies
    /// everything.
    pub fn undecided(&self) -> bool {
        !self.denied.is_empty()
    }

    pub fn taken(&mut self, group: Vec<T>) -> Found<T> {
        self.taken = true;
        Found::Taken(group)
    }

    /// Denied ones that an acknowledgement has shown to be to blame.
    pub fn shown(&mut self) -> Vec<T> {
        if self.taken { std::mem::take(&mut self.denied) } else { Vec::new() }
    }

    pub fn refused(&mut self, group: Vec<T>) -> Found<T> {
        if group.len() == 1 { Found::Refused(group) } else { self.split(group) }
    }

    pub fn denied(&mut self, group: Vec<T>, perhaps_event: bool) -> Found<T> {
        if !perhaps_event {
            return Found::Denied;
        }
        if group.len() > 1 {
            return self.split(group);
        }
        if self.taken {
            return Found::Refused(group);
        }
        self.denied.extend(group);
        if self.denied.len() >= DENIED_MAX { Found::Denied } else { Found::Split }
    }

    fn split(&mut self, mut group: Vec<T>) -> Found<T> {
        let second = group.split_off(group.len() / 2);
        self.groups.push(second);
        self.groups.push(group);
        Found::Split
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_mean_what_the_promises_say() {
        for status in [200, 202, 204] {
            assert_eq!(verdict(status), Verdict::Taken);
        }
        for status in [301, 307, 408, 425, 429, 500, 502, 503, 504, 599] {
            assert_eq!(verdict(status), Verdict::Again, "{status}");
        }
        for status in [400, 402, 409, 410, 411, 413, 415, 422, 451] {
            assert_eq!(verdict(status), Verdict::Refused, "{status}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_has_a_bound() {
        let now = 784_111_777_000;
        assert_eq!(retry_after("120", now), Some(Duration::from_secs(120)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:50:37 GMT", now), Some(Duration::from_secs(60)));
        assert_eq!(retry_after("99999999", now), Some(RETRY_AFTER_MAX));
        for bad in ["", "soon", "-1", "Sun, 06 Nov 1994 08:00:00 GMT"] {
            assert_eq!(retry_after(bad, now), None, "{bad}");
        }
    }

    /// A receiver that answers a group with `status` for the worst in it.
    fn search(batch: Vec<u32>, answer: impl Fn(&[u32]) -> u16) -> (Vec<u32>, Vec<u32>, bool, usize) {
        let (mut taken, mut dead, mut posts) = (Vec::new(), Vec::new(), 0);
        let mut search = Search::new(batch);
        while let Some(group) = search.next_group() {
            posts += 1;
            let found = match verdict(answer(&group)) {
                Verdict::Taken => search.taken(group),
                Verdict::Refused => search.refused(group),
                Verdict::Denied { perhaps_event } => search.denied(group, perhaps_event),
                Verdict::Again => panic!("no such answer here"),
            };
            dead.extend(search.shown());
            match found {
                Found::Taken(group) => taken.extend(group),
                Found::Refused(group) => dead.extend(group),
                Found::Split => {}
                Found::Denied => return (taken, dead, true, posts),
            }
        }
        (taken, dead, search.undecided(), posts)
    }

    #[test]
    fn a_receiver_that_denies_all_costs_no_delivery_and_few_requests() {
        for status in [401, 403, 404] {
            let (taken, dead, undecided, posts) = search((0..256).collect(), |_| status);
            assert_eq!((taken.len(), dead.len(), undecided), (0, 0, true), "{status}");
            assert!(posts <= 16, "{posts}");
        }
        let (_, dead, undecided, _) = search(vec![1], |_| 404);
        assert_eq!((dead.len(), undecided), (0, true));
    }

    #[test]
    fn one_that_is_denied_beside_others_that_are_taken_is_to_blame() {
        let (taken, dead, undecided, _) =
            search(vec![1, 2, 3], |group| if group.contains(&1) { 403 } else { 202 });
        assert_eq!((taken, dead, undecided), (vec![2, 3], vec![1], false));
    }

    proptest! {
        /// Every event is taken or dead, exactly those to blame are dead, those taken are in their
        /// order, and each one to blame costs a logarithm of requests.
        #[test]
        fn the_search_finds_those_to_blame_and_keeps_the_order(
            count in 1u32..200,
            poison in prop::collection::btree_set(0u32..200, 0..6),
        ) {
            let bad = |group: &[u32]| group.iter().any(|event| poison.contains(event));
            let (taken, dead, undecided, posts) =
                search((0..count).collect(), |group| if bad(group) { 422 } else { 200 });
            let expected: Vec<u32> = (0..count).filter(|event| poison.contains(event)).collect();
            prop_assert!(!undecided);
            prop_assert_eq!(&dead, &expected);
            prop_assert_eq!(taken, (0..count).filter(|event| !poison.contains(event)).collect::<Vec<_>>());
            prop_assert!(posts <= 1 + expected.len() * 16);
        }
    }
}
