//! Time as an argument. Wall time is for people and for CloudEvents; durations come from the
//! monotonic clock, because a gateway boots in 1970 and jumps when NTP arrives.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Milliseconds since 1970-01-01 UTC, as the wall clock had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMs(pub i64);

/// When this program was built: no clock that says less is right.
pub const BUILT: UnixMs = UnixMs(seconds(env!("NEAP_BUILT_SECONDS")) * 1000);
/// A gateway's clock may be slow, and the building machine's fast.
const SLACK_MS: i64 = 24 * 3_600_000;

const fn seconds(digits: &str) -> i64 {
    let (bytes, mut at, mut sum) = (digits.as_bytes(), 0, 0);
    while at < bytes.len() {
        sum = sum * 10 + (bytes[at] - b'0') as i64;
        at += 1;
    }
    sum
}

impl UnixMs {
    /// False: the clock that said so can't be right, it is a gateway's without a battery that
    /// NTP has not reached yet.
    pub fn is_plausible(self) -> bool {
        self.0 >= BUILT.0 - SLACK_MS
    }

    /// RFC 3339 with milliseconds, UTC: `2026-03-01T09:00:00.000Z` (CloudEvents `time`).
    pub fn rfc3339(self) -> String {
        self.to_string()
    }
}

impl fmt::Display for UnixMs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(time) => write!(f, "{time:.3}"),
            Err(_) => write!(f, "{} ms", self.0), // beyond year 9999: only a broken clock says so
        }
    }
}

/// Where time comes from. Tests move their own.
pub trait Clock: Send + Sync + 'static {
    fn wall(&self) -> UnixMs;
    /// Since some fixed moment of this process; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The machine's clocks.
#[derive(Debug, Clone)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> UnixMs {
        let ms = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => since.as_millis() as i64,
            Err(before) => -(before.duration().as_millis() as i64),
        };
        UnixMs(ms)
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::UnixMs;

    #[test]
    fn wall_time_prints_as_rfc3339() {
        assert_eq!(UnixMs(0).rfc3339(), "1970-01-01T00:00:00.000Z");
        assert_eq!(UnixMs(1_709_210_096_007).rfc3339(), "2024-02-29T12:34:56.007Z");
        assert_eq!(UnixMs(-1).rfc3339(), "1969-12-31T23:59:59.999Z");
    }
}
