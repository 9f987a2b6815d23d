//! One TLS stack (rustls with ring) for HTTP and MQTT.
//!
//! Certificates are checked against the latest of three times: the clock's, the last one that the
//! node has seen, and when this program was built. A gateway that boots in 1970 would else take
//! every certificate for one of the future, and NTP, which could mend its clock, may be behind
//! one.

pub mod client;
pub mod server;

use crate::model::UnixMs;
use crate::model::time::BUILT;
use futures_rustls::pki_types::UnixTime;
use futures_rustls::rustls::time_provider::TimeProvider;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A clock that stood far ahead for a moment must not make every certificate expire for ever:
/// longer ahead of the program than it is used is not believed.
const AHEAD_MAX_MS: i64 = 15 * 366 * 24 * 3_600_000;

static NOT_BEFORE_MS: AtomicI64 = AtomicI64::new(BUILT.0);

/// It is later than this, whatever the clock says.
pub fn not_before(time: UnixMs) {
    let time = time.0.min(BUILT.0.saturating_add(AHEAD_MAX_MS));
    NOT_BEFORE_MS.fetch_max(time, Ordering::Relaxed);
}

#[derive(Debug)]
struct Latest;

impl TimeProvider for Latest {
    fn current_time(&self) -> Option<UnixTime> {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Some(UnixTime::since_unix_epoch(latest(clock, NOT_BEFORE_MS.load(Ordering::Relaxed))))
    }
}

fn latest(clock: Duration, not_before_ms: i64) -> Duration {
    clock.max(Duration::from_millis(u64::try_from(not_before_ms).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_checked_against_the_latest_time_that_is_known() {
        let built = u64::try_from(BUILT.0).expect("after 1970");
        assert_eq!(latest(Duration::from_secs(5), BUILT.0), Duration::from_millis(built));
        let right = Duration::from_millis(built) + Duration::from_secs(9);
        assert_eq!(latest(right, BUILT.0), right);
    }
}
