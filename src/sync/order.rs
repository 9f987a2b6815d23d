//! Which delivery goes next while a backlog drains. Pure.
//!
//! What is fresh goes at once: it takes the next place in the window. While there is more of it
//! than that, the backlog gets its share of the places, so that each comes to an end.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Live,
    Backlog,
}

/// Deals places out. Deterministic: of any hundred in a row for which both stood ready,
/// `live_percent` went to the live side.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    live_percent: u32,
    credit: u32,
}

impl Share {
    pub fn new(live_percent: u8) -> Self {
        // The first place of all is a fresh one's.
        Self { live_percent: u32::from(live_percent.min(100)), credit: 100 }
    }

    /// Whose the next place is; `None` when nothing waits.
    pub fn next(&mut self, live_waits: bool, backlog_waits: bool) -> Option<Side> {
        match (live_waits, backlog_waits) {
            (false, false) => None,
            (true, false) => Some(Side::Live),
            (false, true) => Some(Side::Backlog),
            (true, true) => {
                let credit = self.credit + self.live_percent;
                let live = credit >= 100 && self.live_percent > 0;
                self.credit = if live { credit - 100 } else { credit.min(100) };
                Some(if live { Side::Live } else { Side::Backlog })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live_of(percent: u8, places: u32) -> u32 {
        let mut share = Share::new(percent);
        (0..places).filter(|_| share.next(true, true) == Some(Side::Live)).count() as u32
    }

    #[test]
    fn both_sides_get_their_share_of_the_places() {
        for percent in [0, 1, 33, 50, 80, 99, 100] {
            let live = live_of(percent, 1_000);
            let fair = u32::from(percent) * 10;
            assert!((fair..=fair + 1).contains(&live), "{percent}: {live}");
        }
    }

    #[test]
    fn no_place_stays_empty_while_anything_waits() {
        for percent in [0, 50, 100] {
            let mut share = Share::new(percent);
            assert_eq!(share.next(true, false), Some(Side::Live));
            assert_eq!(share.next(false, true), Some(Side::Backlog));
            assert_eq!(share.next(false, false), None);
        }
    }

    #[test]
    fn fresh_one_behind_a_long_backlog_goes_next() {
        let mut share = Share::new(80);
        for _ in 0..1_000 {
            share.next(false, true);
        }
        assert_eq!(share.next(true, true), Some(Side::Live));
    }
}
