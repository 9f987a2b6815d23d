//! How long to wait before trying again: exponential, bounded, with jitter, so that a fleet
//! that lost its uplink at one moment does not come back at one moment. Pure: randomness is an
//! argument.
//!
//! Jitter after <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>.

use std::time::Duration;

/// Doubles from `first` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
}

impl Backoff {
    /// The wait after failure number `attempt`, counted from 0: between half and the whole of
    /// `min(max, first × 2^attempt)` ("equal jitter"). For whoever must leave some pause.
    pub fn delay(&self, attempt: u32, random: u64) -> Duration {
        let whole = self.whole(attempt);
        let half = whole / 2;
        half + share(whole - half, random)
    }

    /// Anything up to the same whole ("full jitter"): spreads many that share one target best.
    pub fn delay_full(&self, attempt: u32, random: u64) -> Duration {
        share(self.whole(attempt), random)
    }

    fn whole(&self, attempt: u32) -> Duration {
        let factor = 1u32.checked_shl(attempt).unwrap_or(u32::MAX);
        self.first.saturating_mul(factor).min(self.max)
    }
}

/// `random` as a share of `whole`: 0 gives nothing, `u64::MAX` all of it. To the nanosecond, for
/// waits of up to 584 years.
fn share(whole: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(whole.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos((u128::from(nanos) * u128::from(random) / u128::from(u64::MAX)) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn waits_double_up_to_the_longest_and_jitter_by_half() {
        let backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(300) };

        for (attempt, whole) in [(0, 1), (1, 2), (5, 32), (9, 300), (31, 300), (32, 300), (u32::MAX, 300)] {
            let whole = Duration::from_secs(whole);
            assert_eq!(backoff.delay(attempt, 0), whole / 2);
            assert_eq!(backoff.delay(attempt, u64::MAX), whole);
            assert_eq!(backoff.delay_full(attempt, 0), Duration::ZERO);
            assert_eq!(backoff.delay_full(attempt, u64::MAX), whole);
        }
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_the_longest(first_ms: u64, max_ms: u64, attempt: u32, random: u64) {
            let backoff =
                Backoff { first: Duration::from_millis(first_ms), max: Duration::from_millis(max_ms) };

            prop_assert!(backoff.delay(attempt, random) <= backoff.max);
            prop_assert!(backoff.delay_full(attempt, random) <= backoff.max);
        }
    }
}
