//! A worker that must not take all of the link, or of the disk: it sleeps what it is ahead.

use std::time::{Duration, Instant};

/// Not more than so many bytes a second.
pub struct Pace {
    rate: Option<u64>,
    /// When what was taken so far is paid for.
    paid: Instant,
}

impl Pace {
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, paid: Instant::now() }
    }

    pub fn spend(&mut self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let now = Instant::now();
        // What was not used a moment ago is not saved up.
        self.paid = self.paid.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        std::thread::sleep(self.paid.saturating_duration_since(now));
    }
}
