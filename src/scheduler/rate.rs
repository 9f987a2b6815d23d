//! How often a function may start: a token bucket (`[rate]`). Pure: time is an argument.
//!
//! Counted in millionths of a token and of whole nanoseconds of a monotonic clock, so that no
//! fraction is lost however often somebody looks: a bucket asked ten thousand times a second
//! gives as many tokens as one asked once.

use crate::model::function::Rate;
use std::time::Duration;

const TOKEN: u128 = 1_000_000;
const NANOS: u128 = 1_000_000_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    rate: Rate,
    /// In millionths of a token; never above the burst.
    level: u128,
    /// When `level` was true, and what of a millionth had come by then, in nano-millionths.
    at: Duration,
    rest: u128,
}

impl Bucket {
    /// Full: a daemon that starts lets a whole burst through.
    pub fn new(rate: Rate, now: Duration) -> Self {
        let mut bucket = Self { rate, level: 0, at: now, rest: 0 };
        bucket.level = bucket.burst();
        bucket
    }

    /// Another rate for the same bucket: what is in it stays, as far as it fits.
    pub fn set_rate(&mut self, rate: Rate, now: Duration) {
        self.fill(now);
        self.rate = rate;
        self.level = self.level.min(self.burst());
    }

    /// Starts that are allowed now.
    pub fn tokens(&mut self, now: Duration) -> u32 {
        self.fill(now);
        u32::try_from(self.level / TOKEN).unwrap_or(u32::MAX)
    }

    pub fn try_take(&mut self, now: Duration) -> bool {
        let there = self.tokens(now) > 0;
        if there {
            self.level -= TOKEN;
        }
        there
    }

    /// Until one more start is allowed; zero when it is now.
    pub fn wait(&mut self, now: Duration) -> Duration {
        self.fill(now);
        let missing = TOKEN.saturating_sub(self.level);
        if missing == 0 {
            return Duration::ZERO;
        }
        let nanos = (missing * NANOS - self.rest).div_ceil(self.per_second());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn fill(&mut self, now: Duration) {
        // A monotonic clock does not go back; one that did would only give nothing.
        let nanos = now.saturating_sub(self.at).as_nanos();
        self.at = self.at.max(now);
        let came = nanos.saturating_mul(self.per_second()).saturating_add(self.rest);
        self.rest = came % NANOS;
        self.level = self.level.saturating_add(came / NANOS);
        if self.level >= self.burst() {
            (self.level, self.rest) = (self.burst(), 0);
        }
    }

    fn burst(&self) -> u128 {
        u128::from(self.rate.burst.max(1)) * TOKEN
    }

    /// Millionths of a token.
    fn per_second(&self) -> u128 {
        u128::from(self.rate.per_second_millis.max(1)) * (TOKEN / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(per_second_millis: u32, burst: u32) -> Rate {
        Rate { per_second_millis, burst }
    }

    #[test]
    fn a_burst_passes_at_once_and_then_as_many_as_the_rate_gives() {
        let start = Duration::from_secs(100);
        let mut bucket = Bucket::new(rate(50_000, 3), start);

        assert_eq!((0..9).filter(|_| bucket.try_take(start)).count(), 3);
        assert_eq!(bucket.wait(start), Duration::from_millis(20));
        assert!(!bucket.try_take(start + Duration::from_millis(19)));
        assert!(bucket.try_take(start + Duration::from_millis(20)));
        assert_eq!(bucket.tokens(start + Duration::from_secs(3600)), 3);
    }

    #[test]
    fn less_than_one_a_second_is_a_rate_too() {
        let mut bucket = Bucket::new(rate(100, 1), Duration::ZERO);

        assert!(bucket.try_take(Duration::ZERO));
        assert_eq!(bucket.wait(Duration::ZERO), Duration::from_secs(10));
        assert!(bucket.try_take(Duration::from_secs(10)));
    }

    proptest! {
        /// However the looks are spread, no more pass than burst + rate × time, and with a look
        /// at every `wait` no fewer.
        #[test]
        fn no_more_pass_than_the_rate_allows(
            per_second_millis in 1u32..10_000_000,
            burst in 1u32..1000,
            steps in prop::collection::vec(0u64..2_000_000_000, 1..200),
        ) {
            let mut bucket = Bucket::new(rate(per_second_millis, burst), Duration::ZERO);
            let (mut now, mut passed) = (Duration::ZERO, 0u128);
            for step in steps {
                now += Duration::from_nanos(step);
                while bucket.try_take(now) {
                    passed += 1;
                }
                let allowed = u128::from(burst) * 1000 * NANOS
                    + now.as_nanos() * u128::from(per_second_millis);
                prop_assert!(passed * 1000 * NANOS <= allowed);
                let wait = bucket.wait(now);
                prop_assert!(wait > Duration::ZERO);
                prop_assert!(bucket.clone().try_take(now + wait));
                prop_assert!(!bucket.clone().try_take(now + wait - Duration::from_nanos(1)));
            }
        }
    }
}
