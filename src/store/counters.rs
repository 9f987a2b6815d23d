//! How much of everything there is, kept in memory so that a status page costs nothing with a
//! million rows. Counted from the tables at opening; afterwards each change goes in here as it
//! goes into the transaction, and out again when that is rolled back.

use std::collections::HashMap;

/// Counted for each function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Ready,
    Running,
    Waiting,
    Dead,
    /// Remembered retained values.
    Retained,
}

/// Counted once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Total {
    Dead,
    DeadBytes,
    OwedUplink,
    OwedLocal,
    OwedCallbacks,
    /// Of their data.
    CallbackBytes,
    DeadDeliveries,
    DeadDeliveryBytes,
    /// Of the dead deliveries.
    DeadCallbacks,
    Expired,
    /// Dead ones that had to go because there were too many.
    Dropped,
    /// Dropped because there was no room.
    DroppedFull,
    /// Dropped because they were older than `max_age`.
    DroppedAge,
}

const OFS: usize = Of::Retained as usize + 1;
const TOTALS: usize = Total::DroppedAge as usize + 1;

#[derive(Debug, Default)]
pub(super) struct Counters {
    functions: HashMap<i64, [i64; OFS]>,
    totals: [i64; TOTALS],
    /// What the open transaction changed, in order.
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Of(i64, Of, i64),
    Total(Total, i64),
}

impl Counters {
    pub fn of(&self, function: i64, of: Of) -> i64 {
        self.functions.get(&function).map_or(0, |counts| counts[of as usize])
    }

    pub fn total(&self, total: Total) -> i64 {
        self.totals[total as usize]
    }

    /// Functions that have any of `of`.
    pub fn having(&self, of: Of) -> impl Iterator<Item = i64> {
        self.functions.iter().filter(move |(_, counts)| counts[of as usize] > 0).map(|(id, _)| *id)
    }

    pub fn sum(&self, of: Of) -> i64 {
        self.functions.values().map(|counts| counts[of as usize]).sum()
    }

    pub fn add(&mut self, function: i64, of: Of, n: i64) {
        if n != 0 {
            self.functions.entry(function).or_default()[of as usize] += n;
            self.changes.push(Change::Of(function, of, n));
        }
    }

    pub fn add_total(&mut self, total: Total, n: i64) {
        if n != 0 {
            self.totals[total as usize] += n;
            self.changes.push(Change::Total(total, n));
        }
    }

    /// Where `undo_to` comes back to: taken at each savepoint.
    pub fn mark(&self) -> usize {
        self.changes.len()
    }

    pub fn undo_to(&mut self, mark: usize) {
        while self.changes.len() > mark {
            match self.changes.pop() {
                Some(Change::Of(function, of, n)) => {
                    self.functions.entry(function).or_default()[of as usize] -= n;
                }
                Some(Change::Total(total, n)) => self.totals[total as usize] -= n,
                None => break,
            }
        }
    }

    pub fn committed(&mut self) {
        for change in self.changes.drain(..) {
            if let Change::Of(function, ..) = change
                && self.functions.get(&function).is_some_and(|counts| counts.iter().all(|n| *n == 0))
            {
                self.functions.remove(&function);
            }
        }
    }
}
