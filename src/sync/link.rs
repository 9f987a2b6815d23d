//! The state of a link to one broker: when to connect, with which version, when to wait. Pure:
//! time and randomness come in, what to do comes out; `sync::driver` does it.
//!
//! ```text
//!            broker configured              greeted
//!   Off ───────────────────▶ Connecting ──────────────▶ Up
//!    ▲                        ▲      │ failed            │ ended
//!    │ broker removed         │ due  ▼                   ▼
//!    └──────────────────── Waiting (backoff) ◀───────────┘
//! ```
//!
//! The first retry comes after 0.2 s, because most broken links are brokers that restart; then
//! the wait doubles up to 30 s, each with jitter, so that a site's gateways don't return in
//! step. A link that has been up for 10 s begins anew; one that breaks sooner does not: two
//! nodes with one client id throw each other out for ever, and must not do it 5 times a second.
//!
//! MQTT 5 is tried first when the version is left open. An explicit "unsupported version" tries
//! 3.1.1 at once and is remembered; so does a connection that the broker closes without an
//! answer, but only until 5 has been greeted once, and only for that attempt: a broker that is
//! killed while it greets looks the same, and 3.1.1 has no place for a CloudEvent's attributes.

use crate::backoff::Backoff;
use std::time::Duration;

const BACKOFF: Backoff = Backoff { first: Duration::from_millis(200), max: Duration::from_secs(30) };
/// A link that held this long was a good one.
const UP_GOOD: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V311,
    V5,
}

/// What the configuration allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Versions {
    Only(Version),
    Auto,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No broker is configured.
    Off,
    Waiting {
        until: Duration,
    },
    Connecting {
        version: Version,
    },
    Up {
        since: Duration,
        version: Version,
    },
    /// The daemon stops; nothing follows.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// The configuration at start, and whenever it changes.
    Configured(Option<Versions>),
    /// Time went on.
    Tick,
    Greeted,
    Failed(Refusal),
    /// The connection was up and is gone.
    Ended(End),
    Stop,
}

/// Why an attempt came to nothing, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    UnsupportedVersion,
    ClosedOnConnect,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By the broker, the network, or a protocol error.
    Lost,
    /// By ourselves, to begin anew: what was held back can be taken now.
    Refresh,
    /// By the broker, over a delivery that it would never have taken: that one is out of the way,
    /// and the next attempt is a first one.
    Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Connect(Version),
    /// Come back with `Tick` at this time.
    WaitUntil(Duration),
    /// Leave, if connected, and drop the attempt, if any.
    HangUp,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub state: State,
    versions: Versions,
    /// The version to try next under `Versions::Auto`.
    next: Version,
    /// This broker has greeted MQTT 5 before: a silent close then says nothing of versions.
    knows_v5: bool,
    /// 3.1.1 is tried because 5 was closed on in silence: by an old broker, or by one that was
    /// dying just then. It is not remembered.
    guessed: bool,
    /// Attempts and short-lived connections since the link was last good.
    failures: u32,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            state: State::Off,
            versions: Versions::Auto,
            next: Version::V5,
            knows_v5: false,
            guessed: false,
            failures: 0,
        }
    }
}

impl Link {
    /// `now` is a monotonic clock's; `random` is for jitter.
    pub fn step(self, input: Input, now: Duration, random: u64) -> (Self, Effect) {
        match (self.state, input) {
            (State::Stopped, _) => (self, Effect::None),
            (_, Input::Stop) => (Self { state: State::Stopped, ..self }, Effect::HangUp),
            (_, Input::Configured(None)) => (Self::default(), Effect::HangUp),
            (_, Input::Configured(Some(versions))) => {
                let next = match versions {
                    Versions::Only(version) => version,
                    Versions::Auto => Version::V5,
                };
                Self { versions, next, ..Self::default() }.connect()
            }
            (State::Waiting { until }, Input::Tick) if now >= until => self.connect(),
            (State::Waiting { until }, Input::Tick) => (self, Effect::WaitUntil(until)),
            (State::Connecting { version }, Input::Greeted) => {
                let next = if self.guessed { Version::V5 } else { version };
                let knows_v5 = self.knows_v5 || version == Version::V5;
                let state = State::Up { since: now, version };
                (Self { state, next, knows_v5, guessed: false, ..self }, Effect::None)
            }
            (State::Connecting { version }, Input::Failed(refusal)) => {
                self.refused(version, refusal, now, random)
            }
            (State::Up { since, .. }, Input::Ended(end)) => {
                let good = end != End::Lost || now.saturating_sub(since) >= UP_GOOD;
                Self { failures: if good { 0 } else { self.failures }, ..self }.wait(now, random)
            }
            // A Tick while connecting or up, an end of what has already ended: nothing to do.
            _ => (self, Effect::None),
        }
    }

    fn connect(self) -> (Self, Effect) {
        (Self { state: State::Connecting { version: self.next }, ..self }, Effect::Connect(self.next))
    }

    fn refused(self, version: Version, refusal: Refusal, now: Duration, random: u64) -> (Self, Effect) {
        let silent = refusal == Refusal::ClosedOnConnect;
        let about_version = silent || refusal == Refusal::UnsupportedVersion;
        match (self.versions, version) {
            // Only from 5 to 3.1.1 at once, so that two refusals can't chase each other.
            (Versions::Auto, Version::V5) if about_version && !(silent && self.knows_v5) => {
                Self { next: Version::V311, guessed: silent, ..self }.connect()
            }
            (Versions::Auto, Version::V311) if about_version => {
                Self { next: Version::V5, guessed: false, ..self }.wait(now, random)
            }
            _ => self.wait(now, random),
        }
    }

    fn wait(self, now: Duration, random: u64) -> (Self, Effect) {
        let until = now + BACKOFF.delay(self.failures, random);
        let failures = self.failures.saturating_add(1);
        (Self { state: State::Waiting { until }, failures, ..self }, Effect::WaitUntil(until))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(1000);

    fn configured(versions: Versions) -> Link {
        Link::default().step(Input::Configured(Some(versions)), START, 7).0
    }

    #[test]
    fn poison_that_was_found_lets_the_next_search_begin_at_once() {
        let mut link = configured(Versions::Only(Version::V5));
        for _ in 0..9 {
            link = link.step(Input::Failed(Refusal::Other), START, u64::MAX).0;
            link = link.step(Input::Tick, START + BACKOFF.max, 7).0;
        }
        let (link, _) = link.step(Input::Greeted, START, 7);

        let (link, _) = link.step(Input::Ended(End::Progress), START, u64::MAX);

        assert_eq!(link.state, State::Waiting { until: START + BACKOFF.first });
    }

    #[test]
    fn first_retry_comes_within_a_fifth_of_a_second() {
        let (link, _) = configured(Versions::Auto).step(Input::Failed(Refusal::Other), START, u64::MAX);

        assert_eq!(link.state, State::Waiting { until: START + BACKOFF.first });
    }

    #[test]
    fn old_brokers_are_asked_again_at_once_in_their_version_and_it_is_remembered() {
        let link = configured(Versions::Auto);
        assert_eq!(link.state, State::Connecting { version: Version::V5 });

        let (link, effect) = link.step(Input::Failed(Refusal::UnsupportedVersion), START, 7);
        assert_eq!(effect, Effect::Connect(Version::V311));
        let (link, _) = link.step(Input::Greeted, START, 7);
        let (link, _) = link.step(Input::Ended(End::Lost), START + UP_GOOD, 7);
        let (_, effect) = link.step(Input::Tick, START + UP_GOOD * 2, 7);

        assert_eq!(effect, Effect::Connect(Version::V311));
    }

    #[test]
    fn broker_that_dies_while_it_greets_is_not_taken_for_an_old_one() {
        let (link, effect) =
            configured(Versions::Auto).step(Input::Failed(Refusal::ClosedOnConnect), START, 7);
        assert_eq!(effect, Effect::Connect(Version::V311));
        let (link, _) = link.step(Input::Greeted, START, 7);

        // Greeted as 3.1.1 after a silence: the next connection asks for 5 again.
        let (link, _) = link.step(Input::Ended(End::Lost), START + BACKOFF.max, 7);
        let (link, effect) = link.step(Input::Tick, START + BACKOFF.max * 3, 7);
        assert_eq!(effect, Effect::Connect(Version::V5));
        let (link, _) = link.step(Input::Greeted, START + BACKOFF.max * 3, 7);

        // Greeted as 5 once: no later silence makes it 3.1.1.
        let (link, _) = link.step(Input::Ended(End::Lost), START + BACKOFF.max * 4, 7);
        let (link, effect) = link.step(Input::Tick, START + BACKOFF.max * 6, 7);
        assert_eq!(effect, Effect::Connect(Version::V5));
        let (link, _) = link.step(Input::Failed(Refusal::ClosedOnConnect), START + BACKOFF.max * 6, 7);
        assert!(matches!(link.state, State::Waiting { .. }), "{link:?}");
    }

    #[test]
    fn broker_that_closes_on_both_versions_is_asked_in_turns() {
        let (link, effect) =
            configured(Versions::Auto).step(Input::Failed(Refusal::ClosedOnConnect), START, 7);
        assert_eq!(effect, Effect::Connect(Version::V311));
        let (link, effect) = link.step(Input::Failed(Refusal::ClosedOnConnect), START, 7);
        assert!(matches!(effect, Effect::WaitUntil(_)));
        let (_, effect) = link.step(Input::Tick, START * 2, 7);

        assert_eq!(effect, Effect::Connect(Version::V5));
    }

    #[test]
    fn pinned_version_is_never_left() {
        let (link, effect) = configured(Versions::Only(Version::V5)).step(
            Input::Failed(Refusal::UnsupportedVersion),
            START,
            7,
        );

        assert!(matches!(effect, Effect::WaitUntil(_)));
        let (_, effect) = link.step(Input::Tick, START * 2, 7);
        assert_eq!(effect, Effect::Connect(Version::V5));
    }

    /// Two nodes with one client id: each connection lives for a moment.
    #[test]
    fn links_that_break_at_once_back_off() {
        let (mut link, mut now) = (configured(Versions::Auto), START);
        let mut waits = Vec::new();
        for _ in 0..12 {
            link = link.step(Input::Greeted, now, 7).0;
            let (ended, effect) =
                link.step(Input::Ended(End::Lost), now + Duration::from_millis(50), u64::MAX);
            let Effect::WaitUntil(until) = effect else { panic!("a wait") };
            waits.push(until - now);
            now = until;
            link = ended.step(Input::Tick, now, 7).0;
        }

        assert!(waits.last() > Some(&Duration::from_secs(29)), "{waits:?}");
    }

    /// Thousands of random lives of a link: whatever comes, it never stops trying, never waits
    /// longer than the bound, and never connects when it is off, up or stopped.
    #[test]
    fn no_history_leaves_a_link_stuck() {
        for seed in 0..5000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut link, mut now) = (Link::default(), START);
            let mut configured = false;
            for _ in 0..100 {
                now += Duration::from_millis(random.u64(0..40_000));
                let input = match random.u8(0..14) {
                    0 => Input::Configured(None),
                    1 => Input::Configured(Some(Versions::Auto)),
                    2 => Input::Configured(Some(Versions::Only(Version::V311))),
                    3 | 4 => Input::Greeted,
                    5 => Input::Failed(Refusal::UnsupportedVersion),
                    6 => Input::Failed(Refusal::ClosedOnConnect),
                    7 | 8 => Input::Failed(Refusal::Other),
                    9 => Input::Ended(End::Lost),
                    10 => Input::Ended(End::Refresh),
                    _ => Input::Tick,
                };
                if let Input::Configured(broker) = input {
                    configured = broker.is_some();
                }
                let before = link;

                let (after, effect) = link.step(input, now, random.u64(..));

                link = after;
                assert_eq!(link.state == State::Off, !configured, "seed {seed}: {before:?} {input:?}");
                if let State::Waiting { until } = link.state {
                    assert!(until <= now + BACKOFF.max || link == before, "seed {seed}: {link:?}");
                }
                if let Effect::Connect(version) = effect {
                    assert_eq!(link.state, State::Connecting { version }, "seed {seed}");
                }
                if matches!(before.state, State::Up { .. }) && !matches!(input, Input::Configured(_)) {
                    assert!(!matches!(effect, Effect::Connect(_)), "seed {seed}");
                }
            }
            if configured {
                // Left alone with a broker that answers, every history ends up.
                link = link.step(Input::Failed(Refusal::Other), now, random.u64(..)).0;
                link = link.step(Input::Ended(End::Lost), now, random.u64(..)).0;
                link = link.step(Input::Tick, now + BACKOFF.max, random.u64(..)).0;
                link = link.step(Input::Greeted, now + BACKOFF.max, random.u64(..)).0;
                assert!(matches!(link.state, State::Up { .. }), "seed {seed}: {link:?}");
            }
            let (stopped, effect) = link.step(Input::Stop, now, 7);
            assert_eq!((stopped.state, effect), (State::Stopped, Effect::HangUp));
        }
    }
}
