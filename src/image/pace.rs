//! A worker that must not take all of the link, or of the disk: it sleeps what it is ahead.

use std::time::{Duration, Instant};

/// Not more than so many bytes a second.
pub struct Pace {
    rate: Option<u64>,
    /// When what was taken so far is paid for; none yet.
    paid: Option<Instant>,
}

impl Pace {
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, paid: None }
    }

    pub fn spend(&mut self, bytes: u64) {
        std::thread::sleep(self.owes(bytes, Instant::now()));
    }

    /// How long to wait after so many bytes were taken. What was not used before is not saved up.
    fn owes(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let from = self.paid.map_or(now, |paid| paid.max(now));
        let paid = from + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        self.paid = Some(paid);
        paid.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_stretch_of_time_takes_more_than_its_share_and_one_piece() {
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let rate = random.u64(1024..50_000_000);
            let mut pace = Pace::new(Some(rate));
            let mut now = Instant::now();
            let mut taken: Vec<(Instant, u64)> = Vec::new();
            for _ in 0..100 {
                let bytes = random.u64(1..400_000);
                taken.push((now, bytes));
                now += pace.owes(bytes, now);
                // The link itself is slower now and then, or nothing comes for a while.
                now += Duration::from_millis(random.u64(0..5) * random.u64(0..200));
            }
            for (at, (start, _)) in taken.iter().enumerate() {
                let mut sum = 0;
                for (end, bytes) in &taken[at..] {
                    let share = end.duration_since(*start).as_secs_f64() * rate as f64;
                    assert!(sum as f64 <= share * 1.000_001 + 1.0, "{sum} bytes of {share} at {rate}/s");
                    sum += bytes; // the last piece is paid for after it was taken
                }
            }
        }
    }

    #[test]
    fn link_that_is_slower_than_the_cap_is_never_waited_for() {
        let mut pace = Pace::new(Some(1_000_000));
        let mut now = Instant::now();
        for _ in 0..50 {
            now += Duration::from_millis(100);
            assert!(pace.owes(50_000, now) <= Duration::from_millis(50));
        }
        assert_eq!(Pace::new(None).owes(u64::MAX, now), Duration::ZERO);
    }
}
