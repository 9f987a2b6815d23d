//! How short memory is, and what follows. Pure.
//!
//! Reserved limits keep instances from taking more than the node may give; they say nothing of
//! what else runs on the machine. So the kernel is asked: how much of the time tasks wait for
//! memory (PSI, where it has it), and how much is left. Both, because a function that works at
//! its own limit makes the whole machine's tasks wait by PSI's count while there is memory in
//! plenty, and must not slow the others down.
//!
//! ```text
//!   calm ──▶ short: parked instances go ──▶ severe: one instance at a time, what waits waits
//!     ◀────────── at half the pressure ◀──────────────┘
//! ```

/// One look at the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Share of the last ten seconds in which some task waited for memory; `None`: no PSI.
    pub waited_percent: Option<f32>,
    /// Of the memory that neap may use; `None`: not known.
    pub available_percent: Option<f32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    #[default]
    Calm,
    Short,
    Severe,
}

/// A tenth of the time: people notice.
const SHORT_PERCENT: f32 = 10.0;
/// Nearly half: every start makes it worse.
const SEVERE_PERCENT: f32 = 40.0;
/// With more than this left, tasks wait because of a limit of their own.
const AVAILABLE_PERCENT: f32 = 20.0;
/// Below, memory is short whether anybody waits or not; for kernels that don't count it.
const LEFT_PERCENT: f32 = 5.0;

impl Pressure {
    /// For `neap status`.
    pub fn warning(self) -> Option<String> {
        match self {
            Self::Calm => None,
            Self::Short => Some("memory is short: no instances are parked".to_owned()),
            Self::Severe => {
                Some("memory is very short: none are parked, and one instance runs at a time".to_owned())
            }
        }
    }

    /// Back down at half of what led up, so that it doesn't go to and fro.
    pub fn next(self, reading: Reading) -> Self {
        let left = reading.available_percent.unwrap_or(0.0);
        let known = reading.available_percent.is_some();
        let waited = reading.waited_percent.filter(|_| left < AVAILABLE_PERCENT).unwrap_or(0.0);
        let over = |percent: f32, level: Self| waited >= if self >= level { percent / 2.0 } else { percent };
        let little = known && left < if self >= Self::Short { 2.0 * LEFT_PERCENT } else { LEFT_PERCENT };
        if over(SEVERE_PERCENT, Self::Severe) {
            Self::Severe
        } else if over(SHORT_PERCENT, Self::Short) || little {
            Self::Short
        } else {
            Self::Calm
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(readings: &[(f32, f32)]) -> Vec<Pressure> {
        let mut now = Pressure::Calm;
        let reading =
            |(waited, left)| Reading { waited_percent: Some(waited), available_percent: Some(left) };
        readings
            .iter()
            .map(|pair| {
                now = now.next(reading(*pair));
                now
            })
            .collect()
    }

    #[test]
    fn pools_give_way_before_starts_are_braked() {
        use Pressure::*;
        assert_eq!(after(&[(0.0, 60.0), (12.0, 12.0), (45.0, 6.0)]), [Calm, Short, Severe]);
    }

    #[test]
    fn relief_comes_at_half_the_pressure() {
        use Pressure::*;
        let falling = [(50.0, 6.0), (25.0, 15.0), (15.0, 15.0), (6.0, 15.0), (4.0, 15.0), (6.0, 15.0)];
        assert_eq!(after(&falling), [Severe, Severe, Short, Short, Calm, Calm]);
    }

    #[test]
    fn a_function_at_its_own_limit_brakes_nobody() {
        assert_eq!(after(&[(95.0, 70.0), (95.0, 70.0)]), [Pressure::Calm; 2]);
    }

    #[test]
    fn without_psi_only_what_is_left_counts() {
        let reading = |left| Reading { waited_percent: None, available_percent: left };

        assert_eq!(Pressure::Calm.next(reading(None)), Pressure::Calm);
        assert_eq!(Pressure::Calm.next(reading(Some(30.0))), Pressure::Calm);
        assert_eq!(Pressure::Calm.next(reading(Some(3.0))), Pressure::Short);
        assert_eq!(Pressure::Short.next(reading(Some(8.0))), Pressure::Short);
        assert_eq!(Pressure::Short.next(reading(Some(12.0))), Pressure::Calm);
    }

    #[test]
    fn where_what_is_left_is_not_known_waiting_counts() {
        let reading = Reading { waited_percent: Some(50.0), available_percent: None };

        assert_eq!(Pressure::Calm.next(reading), Pressure::Severe);
    }
}
