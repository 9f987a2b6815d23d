//! Which ticks of a cron trigger become events, under a clock that lies. Pure.
//!
//! The wall clock is all that a schedule can go by, and a gateway's boots in 1970, jumps years
//! when NTP arrives, or goes back an hour. So:
//!
//! - One look makes one event at most, however many ticks lie between it and the last look.
//! - A tick that is late by more than `FRESH` was missed: the node was down or its clock
//!   jumped. `missed` says whether that is made up for, once.
//! - Times that were already looked at are not looked at again when the clock goes back by up
//!   to `BACK_MAX`: no tick comes twice. A clock that went back further was wrong before, and
//!   what comes now counts.
//! - A clock before the build time is not believed: ticks go by it, for a node that never learns
//!   the time still works, but when the right time comes, only what is stored says what was
//!   missed.

use crate::model::function::Missed;
use crate::model::{Schedule, UnixMs};
use std::time::Duration;

/// A restart, or a store that had no room for a moment, makes a tick no later than this.
pub const FRESH: Duration = Duration::from_secs(60);
/// As Vixie cron has it: more than summer time and a wrong time zone explain.
pub const BACK_MAX: Duration = Duration::from_secs(3 * 3600);

/// One trigger's place in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticks {
    schedule: Schedule,
    missed: Missed,
    /// Everything in (`from`, `looked`] was looked at.
    from: UnixMs,
    looked: UnixMs,
    /// What was looked at before the clock went back.
    done: Option<(UnixMs, UnixMs)>,
    /// The last tick that was stored, under a clock that could be believed.
    mark: Option<UnixMs>,
}

/// What the clock says and whether it can be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    pub wall: UnixMs,
    /// Not before the build time.
    pub believed: bool,
}

impl Ticks {
    /// `mark`: what is stored of an earlier run; `None` for a trigger that is new.
    pub fn new(schedule: Schedule, missed: Missed, mark: Option<UnixMs>, now: Now) -> Self {
        let known = mark.filter(|mark| now.believed && mark.0 <= now.wall.0 + ms(BACK_MAX));
        let at = known.unwrap_or(now.wall);
        let mut ticks = Self { schedule, missed, from: at, looked: at, done: None, mark };
        if at > now.wall {
            ticks.went_back(now.wall);
        }
        ticks
    }

    /// The tick that is due, if any. Looking again gives the next one: whoever takes this one
    /// keeps it until it is stored.
    pub fn look(&mut self, now: Now, was_believed: bool, runnable: bool) -> Option<UnixMs> {
        if now.wall < self.looked {
            self.went_back(now.wall);
        } else if now.believed && !was_believed {
            // The right time has come. What ticked by the wrong one says nothing of it.
            let known = self.mark.filter(|mark| *mark <= now.wall);
            (self.from, self.looked) = (known.unwrap_or(now.wall), known.unwrap_or(now.wall));
            self.done = None;
        }
        let last = self.schedule.last(now.wall).filter(|last| *last > self.looked);
        self.looked = now.wall;
        let last = last.filter(|last| !self.done.is_some_and(|(from, to)| from < *last && *last <= to))?;
        let late = now.wall.0 - last.0 > ms(FRESH);
        (runnable && (!late || self.missed == Missed::Once)).then_some(last)
    }

    /// What is to be stored with the event of this tick; `None`: under a clock that is not
    /// believed, what is stored stays.
    pub fn mark(&mut self, tick: UnixMs, believed: bool) -> Option<UnixMs> {
        if believed {
            self.mark = Some(tick);
        }
        believed.then_some(tick)
    }

    /// How long until the next look is worth it.
    pub fn wait(&self, now: UnixMs) -> Option<Duration> {
        let next = self.schedule.next(now)?;
        Some(Duration::from_millis(u64::try_from(next.0 - now.0).unwrap_or(0)))
    }

    pub fn schedule(&self) -> &Schedule {
        &self.schedule
    }

    pub fn missed(&self) -> Missed {
        self.missed
    }

    fn went_back(&mut self, wall: UnixMs) {
        let looked = (self.from, self.looked);
        self.done = (self.looked.0 - wall.0 <= ms(BACK_MAX)).then(|| match self.done {
            Some((from, to)) => (from.min(looked.0), to.max(looked.1)),
            None => looked,
        });
        (self.from, self.looked) = (wall, wall);
    }
}

fn ms(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: i64 = 60_000;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    /// A midnight in 2026.
    const START: i64 = 1_772_323_200_000;

    fn schedule(text: &str) -> Schedule {
        Schedule::parse(text, "UTC", jiff::tz::TimeZone::UTC).expect("a good schedule")
    }

    fn now(wall: i64) -> Now {
        Now { wall: UnixMs(wall), believed: wall >= START }
    }

    fn ticks(text: &str, missed: Missed, mark: Option<i64>, at: i64) -> Ticks {
        Ticks::new(schedule(text), missed, mark.map(UnixMs), now(at))
    }

    /// Looks at each of these times; the ticks that came.
    fn look(ticks: &mut Ticks, walls: impl IntoIterator<Item = i64>) -> Vec<i64> {
        let mut believed = ticks.looked.0 >= START;
        let mut look = |wall: i64| {
            let now = now(wall);
            let tick = ticks.look(now, believed, true);
            believed = now.believed;
            tick.inspect(|tick| {
                ticks.mark(*tick, now.believed);
            })
        };
        walls.into_iter().filter_map(|wall| look(wall).map(|tick| tick.0)).collect()
    }

    #[test]
    fn every_tick_comes_once_when_the_clock_is_right() {
        let mut hourly = ticks("0 * * * *", Missed::Skip, None, START + 1);

        let came = look(&mut hourly, (1..=3 * 3600).map(|s| START + s * 1000));

        assert_eq!(came, [START + HOUR, START + 2 * HOUR, START + 3 * HOUR]);
    }

    #[test]
    fn downtime_is_skipped_or_made_up_for_once() {
        let up = START + 10 * DAY + 5 * HOUR + 30 * MINUTE;
        let mut skip = ticks("0 * * * *", Missed::Skip, Some(START), up);
        let mut once = ticks("0 * * * *", Missed::Once, Some(START), up);

        assert_eq!(look(&mut skip, [up, up + 1000, up + 30 * MINUTE]), [up + 30 * MINUTE]);
        let last = up - 30 * MINUTE;
        assert_eq!(look(&mut once, [up, up + 1000, up + 30 * MINUTE]), [last, up + 30 * MINUTE]);
    }

    #[test]
    fn a_short_restart_misses_nothing() {
        let mut ticks = ticks("0 * * * *", Missed::Skip, Some(START), START + HOUR + 3000);

        assert_eq!(look(&mut ticks, [START + HOUR + 3000]), [START + HOUR]);
    }

    #[test]
    fn a_tick_that_was_stored_does_not_come_again_after_a_restart() {
        let mut ticks = ticks("0 * * * *", Missed::Once, Some(START + HOUR), START + HOUR + 3000);

        assert_eq!(look(&mut ticks, [START + HOUR + 3000, START + HOUR + 9000]), [0i64; 0]);
    }

    #[test]
    fn fifty_years_at_once_are_no_flood() {
        for (missed, mark, expected) in [
            (Missed::Skip, Some(START - DAY), vec![]),
            (Missed::Once, Some(START - DAY), vec![START + HOUR]),
            // A new node has missed nothing.
            (Missed::Once, None, vec![]),
        ] {
            let mut ticks = ticks("0 * * * *", missed, mark, 5000);
            let booted = look(&mut ticks, (5..7300).map(|s| s * 1000));
            assert_eq!(booted, [HOUR, 2 * HOUR], "a node that never learns the time still works");

            let right = START + HOUR + 10 * MINUTE;
            assert_eq!(look(&mut ticks, [right, right + 1000]), expected, "{missed:?} {mark:?}");
        }
    }

    #[test]
    fn an_hour_back_gives_no_tick_twice() {
        for text in ["0 2 * * *", "*/5 * * * *", "0 * * * * *"] {
            let mut ticks = ticks(text, Missed::Once, None, START);
            let forth = look(&mut ticks, (0..=3 * 3600).map(|s| START + s * 1000));
            let again = look(&mut ticks, (2 * 3600..=4 * 3600).map(|s| START + s * 1000));

            let mut all = [forth, again].concat();
            let count = all.len();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), count, "{text}");
            if text != "0 2 * * *" {
                assert_eq!(all.last(), Some(&(START + 4 * HOUR)), "{text} goes on");
            }
        }
    }

    #[test]
    fn a_clock_that_boots_an_hour_ahead_does_not_silence_the_hour_to_come() {
        let mut ticks = ticks("*/5 * * * *", Missed::Skip, None, START + HOUR);

        look(&mut ticks, (3600..3605).map(|s| START + s * 1000));
        let corrected = look(&mut ticks, (5..=3600).map(|s| START + s * 1000));

        // The one at the full hour is not among them: (START + HOUR] was where it began.
        assert!(corrected.len() >= 11, "{corrected:?}");
    }

    #[test]
    fn a_clock_that_was_years_ahead_is_forgotten() {
        let mut ticks = ticks("0 * * * *", Missed::Skip, Some(START + 400 * DAY), START + 1);

        assert_eq!(look(&mut ticks, (1..=3600).map(|s| START + s * 1000)), [START + HOUR]);
    }

    #[test]
    fn a_paused_function_has_no_ticks_and_none_to_make_up_for() {
        let mut ticks = ticks("0 * * * *", Missed::Once, Some(START), START);

        assert_eq!(ticks.look(now(START + HOUR), true, false), None);
        assert_eq!(ticks.look(now(START + HOUR + 1000), true, true), None);
    }

    proptest! {
        /// However the clock jumps within `BACK_MAX` of the furthest it has been: no tick comes
        /// twice, and no look gives two.
        #[test]
        fn no_tick_comes_twice(jumps in prop::collection::vec((-170i64..300, 1i64..40), 1..60)) {
            let mut ticks = ticks("*/7 * * * *", Missed::Once, None, START + DAY);
            let (mut wall, mut furthest) = (START + DAY, START + DAY);
            let mut came = Vec::new();
            for (jump, steps) in jumps {
                wall = (wall + jump * MINUTE).max(furthest - 170 * MINUTE);
                for _ in 0..steps {
                    wall += 20_000;
                    came.extend(look(&mut ticks, [wall]));
                }
                furthest = furthest.max(wall);
            }
            let count = came.len();
            came.sort_unstable();
            came.dedup();
            prop_assert_eq!(came.len(), count);
        }
    }
}
