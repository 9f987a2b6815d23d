//! What a link that costs may carry, and when: the time of the day for the backlog, the bytes of
//! a day for all. Pure.
//!
//! Days and times are UTC's, by the node's own clock, right or wrong: one that never learns the
//! time has days as long as others.

use crate::config::{DayWindow, UplinkLimits};
use crate::model::{NewDelivery, UnixMs};

const MINUTE_MS: i64 = 60_000;
const DAY_MINUTES: i64 = 24 * 60;

/// What `neap status` says of a link whose day is spent.
pub const SPENT: &str = "bytes_per_day is used up; deliveries wait for the next day (UTC)";

/// Attributes, topic and packet: about what they take beside the data.
const OVERHEAD_BYTES: u64 = 320;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowance {
    pub limits: UplinkLimits,
    /// Of today's bytes.
    pub spent: u64,
}

impl Allowance {
    pub fn backlog_may_go(&self, wall: UnixMs) -> bool {
        let Some(DayWindow { from, until }) = self.limits.window else { return true };
        let minute = wall.0.div_euclid(MINUTE_MS).rem_euclid(DAY_MINUTES);
        let (from, until) = (i64::from(from), i64::from(until));
        if from < until { (from..until).contains(&minute) } else { minute >= from || minute < until }
    }

    /// `under_way`: sent, and not counted yet. One that is larger than a whole day's allowance
    /// goes when the day is new: it would wait for ever.
    pub fn may_send(&self, under_way: u64, cost: u64) -> bool {
        let (most, used) = (self.limits.bytes_per_day, self.spent.saturating_add(under_way));
        most == 0 || used == 0 || used.saturating_add(cost) <= most
    }
}

/// The days that `bytes_per_day` counts.
pub fn day(wall: UnixMs) -> i64 {
    wall.0.div_euclid(MINUTE_MS * DAY_MINUTES)
}

/// About what a delivery takes on the wire.
pub fn cost(delivery: &NewDelivery) -> u64 {
    (delivery.event.data.len() + delivery.topic.len()) as u64 + OVERHEAD_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hour: i64, minute: i64) -> UnixMs {
        UnixMs((20_000 * DAY_MINUTES + hour * 60 + minute) * MINUTE_MS)
    }

    fn window(from: u16, until: u16) -> Allowance {
        let window = Some(DayWindow { from: from * 60, until: until * 60 });
        Allowance { limits: UplinkLimits { window, bytes_per_day: 0 }, spent: 0 }
    }

    #[test]
    fn backlog_goes_within_its_window_also_over_midnight() {
        let may = |window: Allowance| {
            (0..24).filter(|hour| window.backlog_may_go(at(*hour, 0))).collect::<Vec<_>>()
        };

        assert_eq!(may(window(2, 4)), [2, 3]);
        assert_eq!(may(window(22, 2)), [0, 1, 22, 23]);
        assert!(window(2, 4).backlog_may_go(at(3, 59)) && !window(2, 4).backlog_may_go(at(4, 0)));
        assert!(Allowance { limits: UplinkLimits::default(), spent: 0 }.backlog_may_go(UnixMs(-1)));
    }

    #[test]
    fn a_day_carries_what_is_allowed_and_one_that_is_too_large_goes_alone() {
        let day = |spent| Allowance { limits: UplinkLimits { window: None, bytes_per_day: 1000 }, spent };

        assert!(day(400).may_send(500, 100));
        assert!(!day(400).may_send(500, 101));
        assert!(day(0).may_send(0, 5000));
        assert!(!day(0).may_send(1, 5000));
        assert!(Allowance { limits: UplinkLimits::default(), spent: u64::MAX }.may_send(9, 9));
    }

    #[test]
    fn days_are_utcs() {
        assert_eq!(day(UnixMs(0)), 0);
        assert_eq!(day(UnixMs(86_399_999)), 0);
        assert_eq!(day(UnixMs(86_400_000)), 1);
        assert_eq!(day(UnixMs(-1)), -1);
    }
}
