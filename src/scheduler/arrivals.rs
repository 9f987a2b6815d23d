//! When a function's next events are due, learned from its last ones. Pure: time is an argument.
//!
//! What comes within a second is one burst; learned are the gaps between bursts and their sizes,
//! sixteen of each. The next burst is expected no sooner than the shortest and no later than the
//! longest of those gaps, strays left out, each with a margin; once more after a second such
//! gap, because messages get lost. Then the function is silent and nothing is expected until it
//! speaks again.
//!
//! ```text
//!  burst ────── gaps' shortest ▒▒▒▒▒▒▒ longest ────── 2 × shortest ▒▒▒▒▒▒▒ 2 × longest ── silent
//!                              expected               expected: one was missed
//! ```
//!
//! A sensor that reports every minute has its instance for some seconds of each. Arrivals of no
//! rhythm are expected from the last one on, for as long as it may take; where that would be
//! more than ten minutes of waiting, half of the gaps are made do with, and when even those
//! don't fit, nothing is expected: an instance would wait in vain for most of the time.
//!
//! Lost with the daemon, and learned again from a handful of events.

use std::collections::VecDeque;
use std::time::Duration;

/// What comes so close together is one burst: making an instance for each takes about as long.
const BURST: Duration = Duration::from_secs(1);

/// Gaps and sizes remembered: enough to tell a rhythm from strays, and a new rhythm is learned
/// in as many events.
const REMEMBERED: usize = 16;

/// An instance is not kept waiting for longer than this for one burst.
const PATIENCE: Duration = Duration::from_secs(600);

/// For making the instances, on a board with other things to do.
const LEAD: Duration = Duration::from_millis(500);

/// The same for instances that are started: a server takes its time until it listens.
const LEAD_STARTED: Duration = Duration::from_secs(5);

/// After the first burst ever, whose gap is not known: what comes again soon, and no more.
const FIRST: Duration = Duration::from_secs(60);

/// What is there is kept over so short a silence: making it again would cost more.
const LINGER: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    /// Between the beginnings of bursts, oldest first.
    gaps: VecDeque<Duration>,
    sizes: VecDeque<u32>,
    /// The latest.
    burst: Option<Burst>,
    /// Instances serve one after the other, see `shared`.
    shared: bool,
}

#[derive(Clone, Copy, Debug)]
struct Burst {
    start: Duration,
    size: u32,
}

/// What to have at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// So many should be there.
    pub want: u32,
    /// So many may stay where they are there already; at least `want`.
    pub keep: u32,
    /// Until when this holds, unless something arrives.
    pub until: Option<Duration>,
}

impl Arrivals {
    /// Of a function whose instances stay up and serve one event after the other: what counts of a
    /// burst is not how many came but how many were there at once, and what is wanted are instances
    /// in all, busy or not.
    pub fn shared() -> Self {
        Self { shared: true, ..Self::default() }
    }

    pub fn arrived(&mut self, now: Duration) {
        self.arrived_among(1, now);
    }

    /// One of so many that are served or wait.
    pub fn arrived_among(&mut self, at_once: u32, now: Duration) {
        match &mut self.burst {
            Some(burst) if now.saturating_sub(burst.start) < BURST => {
                burst.size = if self.shared { burst.size.max(at_once) } else { burst.size.saturating_add(1) };
            }
            latest => {
                if let Some(burst) = latest.take() {
                    remember(&mut self.gaps, now.saturating_sub(burst.start));
                    remember(&mut self.sizes, burst.size);
                }
                *latest = Some(Burst { start: now, size: if self.shared { at_once } else { 1 } });
            }
        }
    }

    pub fn demand(&self, now: Duration) -> Demand {
        let Some(burst) = self.burst else { return Demand::default() };
        let since = now.saturating_sub(burst.start);
        let size = self.size(burst);
        let expected = self.expected();
        let mut want = 0;
        let mut keep = 0;
        let mut changes = vec![BURST];
        for (from, to) in expected.into_iter().flatten() {
            let early = from.saturating_sub(LINGER);
            if (from..to).contains(&since) {
                want = size;
            }
            if (early..to).contains(&since) {
                keep = size;
            }
            changes.extend([early, from, to]);
        }
        if since < BURST {
            // The rest of this burst.
            let rest = if self.shared { size.max(burst.size) } else { size.saturating_sub(burst.size) };
            want = want.max(rest);
        }
        let until = changes.into_iter().filter(|at| *at > since).min().map(|at| burst.start + at);
        Demand { want, keep: keep.max(want), until }
    }

    /// The largest of the remembered bursts, but for strays: one in eight. The first ever is all
    /// that is known.
    fn size(&self, burst: Burst) -> u32 {
        let mut sizes: Vec<u32> = self.sizes.iter().copied().collect();
        sizes.sort_unstable();
        let strays = sizes.len() / 8;
        sizes.len().checked_sub(1 + strays).map_or(burst.size, |at| sizes[at])
    }

    /// From and to, since the latest burst's start; the second when the first has passed.
    fn expected(&self) -> [Option<(Duration, Duration)>; 2] {
        let n = self.gaps.len() as u32;
        if n == 0 {
            return [Some((Duration::ZERO, FIRST)), None];
        }
        let Some((shortest, longest)) = self.usual_gaps() else { return [None, None] };
        // Sixteen samples don't show the ends; few samples show little.
        let lead = if self.shared { LEAD_STARTED } else { LEAD };
        let margin = lead + (longest - shortest) / 4 + longest / (4 * n);
        let span = |times: u32| {
            let from = (shortest * times).saturating_sub(margin);
            let to = longest * times + margin;
            // Where the longest gap is long, a second one would be more waiting than is worth it.
            (to - from <= PATIENCE).then_some((from, to))
        };
        [span(1), span(2)]
    }

    /// The narrowest range that holds most gaps: all but one in eight, else half of them.
    fn usual_gaps(&self) -> Option<(Duration, Duration)> {
        let mut gaps: Vec<Duration> = self.gaps.iter().copied().collect();
        gaps.sort_unstable();
        let n = gaps.len();
        [n - n / 8, n.div_ceil(2)].into_iter().find_map(|held| {
            let ranges = gaps.windows(held).map(|range| (range[0], range[held - 1]));
            let (from, to) = ranges.min_by_key(|(from, to)| *to - *from)?;
            // Also with the margin it must stay within the patience, see `expected`.
            (to - from <= PATIENCE / 2).then_some((from, to))
        })
    }
}

fn remember<T>(into: &mut VecDeque<T>, value: T) {
    if into.len() == REMEMBERED {
        into.pop_front();
    }
    into.push_back(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secs(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn after(times: &[f64]) -> Arrivals {
        let mut arrivals = Arrivals::default();
        times.iter().for_each(|at| arrivals.arrived(secs(*at)));
        arrivals
    }

    #[test]
    fn what_never_spoke_is_not_expected() {
        assert_eq!(Arrivals::default().demand(secs(5.0)), Demand::default());
    }

    #[test]
    fn a_rhythm_is_expected_when_due_and_not_between() {
        let minutes: Vec<f64> = (0..10).map(|n| f64::from(n) * 60.0).collect();
        let arrivals = after(&minutes);

        let want = |since: f64| arrivals.demand(secs(540.0 + since)).want;

        assert_eq!([want(2.0), want(30.0), want(55.0)], [0, 0, 0]);
        assert_eq!([want(59.0), want(60.0), want(61.0)], [1, 1, 1]);
        assert_eq!(want(70.0), 0, "it did not come");
        assert_eq!(want(120.0), 1, "one may get lost");
        assert_eq!([want(180.0), want(86_400.0)], [0, 0], "silent");
        assert_eq!(arrivals.demand(secs(90_000.0)).until, None, "nothing to wake up for");
    }

    #[test]
    fn two_messages_at_once_are_one_burst_of_two() {
        let pairs: Vec<f64> =
            (0..10).flat_map(|n| [f64::from(n) * 60.0, f64::from(n) * 60.0 + 0.2]).collect();
        let mut arrivals = after(&pairs);

        assert_eq!(arrivals.demand(secs(540.0 + 30.0)).want, 0);
        assert_eq!(arrivals.demand(secs(540.0 + 60.0)).want, 2);
        arrivals.arrived(secs(600.0));
        assert_eq!(arrivals.demand(secs(600.1)).want, 1, "the second is still to come");
    }

    #[test]
    fn a_night_of_silence_is_not_taken_for_the_rhythm() {
        let mut times: Vec<f64> = (0..16).map(|n| f64::from(n) * 30.0).collect();
        times.extend((0..3).map(|n| 30_000.0 + f64::from(n) * 30.0));
        let arrivals = after(&times);

        assert_eq!(arrivals.demand(secs(30_060.0 + 15.0)).want, 0);
        assert_eq!(arrivals.demand(secs(30_060.0 + 30.0)).want, 1);
    }

    #[test]
    fn rare_arrivals_of_no_rhythm_are_not_waited_for() {
        // Gaps of 20 to 90 minutes.
        let mut random = fastrand::Rng::with_seed(7);
        let mut at = 0.0;
        let times: Vec<f64> = (0..20)
            .map(|_| {
                at += 1200.0 + 4200.0 * random.f64();
                at
            })
            .collect();
        let arrivals = after(&times);

        let waited = (0..7200).filter(|s| arrivals.demand(secs(at + f64::from(*s))).want > 0).count();

        assert!(waited <= PATIENCE.as_secs() as usize, "{waited} s");
    }

    #[test]
    fn frequent_arrivals_of_no_rhythm_are_expected_all_the_time() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut at = 0.0;
        let times: Vec<f64> = (0..20)
            .map(|_| {
                at += 1.0 + 20.0 * random.f64();
                at
            })
            .collect();
        let arrivals = after(&times);

        assert!((1..20).all(|s| arrivals.demand(secs(at + f64::from(s))).want >= 1));
        assert_eq!(arrivals.demand(secs(at + 120.0)).want, 0);
    }

    #[test]
    fn a_demand_holds_until_it_says() {
        let arrivals = after(&[0.0, 0.3, 7.0, 15.0, 21.0, 28.5]);

        let mut at = secs(28.5);
        let mut looks = 0;
        while let Some(until) = arrivals.demand(at).until {
            assert!(until > at);
            let (want, keep) = (arrivals.demand(at).want, arrivals.demand(at).keep);
            for part in 0..10 {
                let between = at + (until - at) / 10 * part;
                assert_eq!((arrivals.demand(between).want, arrivals.demand(between).keep), (want, keep));
            }
            at = until;
            looks += 1;
        }

        assert!(looks < 10, "{looks} looks for one burst");
        assert_eq!(arrivals.demand(at).keep, 0);
    }
}
