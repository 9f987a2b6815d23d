//! When a cron trigger ticks: five fields (minute, hour, day of month, month, day of week) or
//! six (a second in front), in a time zone. Parsed once, trusted afterwards.
//!
//! Patterns, and what happens to them when clocks change for summer, are croner's, which
//! follows Vixie cron: a fixed time that does not exist that day comes right after the gap, one
//! that exists twice comes once, and `*/5` goes on every five minutes.

use super::UnixMs;
use croner::parser::{CronParser, Year};
use jiff::{Timestamp, Zoned, tz::TimeZone};
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::fmt;

/// Longer than any pattern that says something: four lists of every value.
const TEXT_BYTES_MAX: usize = 512;

#[derive(Clone)]
pub struct Schedule {
    text: String,
    zone_name: String,
    cron: croner::Cron,
    zone: TimeZone,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSchedule {
    #[error("a schedule has 5 fields (minute hour day month weekday) or 6 (a second in front), not {0}")]
    Fields(usize),
    #[error("{0}")]
    Pattern(String),
    #[error("there is no such time, ever")]
    Never,
    #[error("a schedule is at most {TEXT_BYTES_MAX} bytes")]
    TooLong,
}

impl Schedule {
    /// `zone_name` is what `zone` was made of.
    pub fn parse(text: &str, zone_name: &str, zone: TimeZone) -> Result<Self, BadSchedule> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(BadSchedule::TooLong);
        }
        let fields = text.split_whitespace().count();
        if !text.trim_start().starts_with('@') && !matches!(fields, 5 | 6) {
            return Err(BadSchedule::Fields(fields));
        }
        let parser = CronParser::builder().year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|error| BadSchedule::Pattern(said(&error)))?;
        let schedule = Self { text: text.to_owned(), zone_name: zone_name.to_owned(), cron, zone };
        // Found on the 29th of February, or never.
        let from = UnixMs(1_704_067_200_000);
        match schedule.next(from) {
            Some(_) => Ok(schedule),
            None => Err(BadSchedule::Never),
        }
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Tells two schedules apart that are written alike and meant for other places.
    pub fn key(&self) -> String {
        format!("{} {}", self.text, self.zone_name)
    }

    /// The first tick after `time`.
    pub fn next(&self, time: UnixMs) -> Option<UnixMs> {
        // croner counts whole seconds and would take one that has begun for one to come.
        let second = UnixMs(time.0.div_euclid(1000) * 1000);
        let next = self.cron.find_next_occurrence(&self.local(second)?, false).ok()?;
        Some(UnixMs(next.timestamp().as_millisecond()))
    }

    /// The last tick at `time` or before.
    pub fn last(&self, time: UnixMs) -> Option<UnixMs> {
        let second = UnixMs(time.0.div_euclid(1000) * 1000);
        let last = self.cron.find_previous_occurrence(&self.local(second)?, true).ok()?;
        Some(UnixMs(last.timestamp().as_millisecond()))
    }

    fn local(&self, time: UnixMs) -> Option<Zoned> {
        Some(Timestamp::from_millisecond(time.0).ok()?.to_zoned(self.zone.clone()))
    }
}

/// croner's words, in the style of ours.
fn said(error: &croner::errors::CronError) -> String {
    use croner::errors::CronError::{ComponentError, IllegalCharacters, InvalidPattern};
    let text = match error {
        ComponentError(text) | IllegalCharacters(text) | InvalidPattern(text) => text.clone(),
        other => other.to_string(),
    };
    let mut letters = text.trim_end_matches('.').chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

impl PartialEq for Schedule {
    fn eq(&self, other: &Self) -> bool {
        (&self.text, &self.zone_name) == (&other.text, &other.zone_name)
    }
}

impl Eq for Schedule {}

impl fmt::Debug for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in {}", self.text, self.zone_name)
    }
}

impl Serialize for Schedule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("cron", &self.text)?;
        map.serialize_entry("zone", &self.zone_name)?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::zone;

    fn schedule(text: &str, name: &str) -> Schedule {
        Schedule::parse(text, name, zone::by_name(name).expect("a zone")).expect("a good schedule")
    }

    fn at(text: &str) -> UnixMs {
        UnixMs(text.parse::<Timestamp>().expect("a time").as_millisecond())
    }

    fn ticks(schedule: &Schedule, from: &str, count: usize) -> Vec<String> {
        let mut now = at(from);
        let next = |now: &mut UnixMs| {
            *now = schedule.next(*now).expect("a next tick");
            Timestamp::from_millisecond(now.0).expect("a time").to_string()
        };
        (0..count).map(|_| next(&mut now)).collect()
    }

    #[test]
    fn five_fields_are_minutes_and_six_are_seconds() {
        assert_eq!(
            ticks(&schedule("*/5 * * * *", "UTC"), "2026-03-01T10:03:20.5Z", 2),
            ["2026-03-01T10:05:00Z", "2026-03-01T10:10:00Z"]
        );
        assert_eq!(
            ticks(&schedule("*/20 * * * * *", "UTC"), "2026-03-01T10:03:20Z", 2),
            ["2026-03-01T10:03:40Z", "2026-03-01T10:04:00Z"]
        );
        assert_eq!(
            ticks(&schedule("30 9 * * MON-FRI", "Europe/Berlin"), "2026-03-06T12:00:00Z", 1),
            ["2026-03-09T08:30:00Z"]
        );
    }

    #[test]
    fn last_is_the_tick_that_has_come() {
        let hourly = schedule("0 * * * *", "UTC");

        assert_eq!(hourly.last(at("2026-03-01T10:00:00Z")), Some(at("2026-03-01T10:00:00Z")));
        assert_eq!(hourly.last(at("2026-03-01T10:59:59.999Z")), Some(at("2026-03-01T10:00:00Z")));
        assert_eq!(hourly.next(at("2026-03-01T10:00:00.4Z")), Some(at("2026-03-01T11:00:00Z")));
    }

    #[test]
    fn a_fixed_time_comes_once_a_day_when_clocks_change() {
        let night = schedule("30 2 * * *", "Europe/Berlin");

        // Spring: 02:00 becomes 03:00. Autumn: 03:00 becomes 02:00.
        assert_eq!(
            ticks(&night, "2026-03-28T12:00:00Z", 2),
            ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]
        );
        assert_eq!(
            ticks(&night, "2026-10-24T12:00:00Z", 2),
            ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]
        );
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        let refused = |text: &str| Schedule::parse(text, "UTC", TimeZone::UTC).err();

        for (text, fields) in [("", 0), ("* * * *", 4), ("* * * * * * *", 7)] {
            assert_eq!(refused(text), Some(BadSchedule::Fields(fields)), "{text:?}");
        }
        for bad in
            ["60 * * * *", "* 24 * * *", "* * 0 * *", "a b c d e", "*/0 * * * *", "5-1 * * * *", "@never"]
        {
            assert!(matches!(refused(bad), Some(BadSchedule::Pattern(_))), "{bad:?}: {:?}", refused(bad));
        }
        assert_eq!(refused("0 0 30 2 *"), Some(BadSchedule::Never));
        assert_eq!(refused(&"1,".repeat(300)), Some(BadSchedule::TooLong));
        assert!(schedule("0 0 29 2 *", "UTC").next(at("2026-01-01T00:00:00Z")).is_some());
    }
}
