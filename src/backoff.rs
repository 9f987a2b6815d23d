//! How long to wait before trying again: exponential, bounded, with jitter, so that a hundred
//! gateways that lost the same broker don't come back in the same second.
//!
//! Pure: randomness is an argument. Jitter after
//! <https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/>.

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
}

impl Backoff {
    /// "Equal jitter": between half of the exponential delay and all of it. For retries, where
    /// some pause must remain. `attempt` counts the failures so far: 1 gives `first`.
    pub fn delay(self, attempt: u32, random: u64) -> Duration {
        let whole = self.ceiling(attempt).as_nanos() as u64;
        let half = whole / 2;
        Duration::from_nanos(half + scale(whole - half, random))
    }

    /// "Full jitter": anything up to the exponential delay. For reconnects of many to one.
    pub fn delay_full(self, attempt: u32, random: u64) -> Duration {
        Duration::from_nanos(scale(self.ceiling(attempt).as_nanos() as u64, random))
    }

    /// The delay without jitter: `first`, doubled with each failure after the first, at most
    /// `max`, and never beyond a year: nanoseconds then fit 64 bits, and nobody waits longer.
    pub fn ceiling(self, attempt: u32) -> Duration {
        const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
        let max = self.max.min(YEAR);
        let factor = 1u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.first.checked_mul(factor).map_or(max, |delay| delay.min(max))
    }
}

/// `random` as a share of `range`: 0 gives 0, `u64::MAX` gives `range`.
fn scale(range: u64, random: u64) -> u64 {
    (u128::from(range) * u128::from(random) / u128::from(u64::MAX)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BACKOFF: Backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(300) };

    #[test]
    fn delay_doubles_up_to_the_maximum() {
        let delays: Vec<u64> = (0..12).map(|n| BACKOFF.delay(n, u64::MAX).as_secs()).collect();

        assert_eq!(delays, [1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
        assert_eq!(BACKOFF.delay(u32::MAX, u64::MAX), BACKOFF.max);
    }

    #[test]
    fn no_backoff_is_no_delay() {
        let none = Backoff { first: Duration::ZERO, max: Duration::from_secs(1) };

        assert_eq!(none.delay(7, u64::MAX), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn jitter_stays_within_its_bounds(first_ms: u64, max_ms: u64, attempt: u32, random: u64) {
            let backoff =
                Backoff { first: Duration::from_millis(first_ms), max: Duration::from_millis(max_ms) };
            let ceiling = backoff.ceiling(attempt);

            prop_assert!(ceiling <= backoff.max);
            prop_assert!(backoff.delay(attempt, random) <= ceiling);
            prop_assert!(backoff.delay(attempt, random) >= ceiling / 2);
            prop_assert!(backoff.delay_full(attempt, random) <= ceiling);
        }
    }
}
