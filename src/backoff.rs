//! Exponential backoff with jitter. Pure: randomness is an argument.

use std::time::Duration;

/// Doubles from `first` to `max`; half of each wait is jitter, so that a fleet that lost its
/// uplink at one moment does not come back at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
}

impl Backoff {
    /// The wait after failure number `attempt`, counted from 0: between half and the whole of
    /// `min(max, first × 2^attempt)`.
    pub fn delay(&self, attempt: u32, random: u64) -> Duration {
        let factor = 1u32.checked_shl(attempt).unwrap_or(u32::MAX);
        let whole = self.first.saturating_mul(factor).min(self.max);
        let half = whole / 2;
        half + half.mul_f64(random as f64 / u64::MAX as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_jitter_by_half() {
        let backoff = Backoff { first: Duration::from_secs(1), max: Duration::from_secs(300) };

        for (attempt, whole) in [(0, 1), (1, 2), (5, 32), (9, 300), (31, 300), (32, 300), (u32::MAX, 300)] {
            let whole = Duration::from_secs(whole);
            assert_eq!(backoff.delay(attempt, 0), whole / 2);
            assert_eq!(backoff.delay(attempt, u64::MAX), whole);
        }
    }
}
