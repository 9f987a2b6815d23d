//! Events and deliveries are numbered, each in its own order, and no number is ever used twice:
//! order comes from them, not from a clock.

use super::Db;
use crate::store::error::StoreError;
use crate::store::schema;

/// Ids are set aside so many at a time: written down once for all of them, and skipped by a kill.
const IDS_RESERVED: i64 = 1024;

/// None is this large, at a million a second for eight years. One that is has a flipped bit, and to
/// go on behind it would leave the numbers that a row's key has room for.
const NUMBER_MAX: i64 = 1 << 48;

/// What is numbered, in its own order, no number ever used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::store) enum Id {
    Event,
    Delivery,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Numbers {
    last: i64,
    /// None above this is given before it is written down how far they go.
    reserved: i64,
}

impl Id {
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Event => "next_event",
            Self::Delivery => "next_delivery",
        }
    }
}

impl Db {
    /// Where numbers go on: behind all that may have been given.
    pub(super) fn find_numbers(&mut self) -> Result<(), StoreError> {
        let doing = "find the last number";
        let event: i64 = self.query_one(
            "SELECT coalesce((SELECT max(seq) FROM events WHERE seq < ?1), 0)",
            [NUMBER_MAX],
            doing,
            |row| row.get(0),
        )?;
        let mut delivery: i64 = self.query_one(
            "SELECT coalesce((SELECT max(id) >> 3 FROM dead_deliveries WHERE id < ?1 << 3), 0)",
            [NUMBER_MAX],
            doing,
            |row| row.get(0),
        )?;
        for queue in 0..8_i64 {
            let last: Option<i64> = self.query_one(
                "SELECT max(id) & (1 << 56) - 1 FROM deliveries WHERE id >= ?1 << 56 AND id < (?1 << 56) + ?2",
                [queue, NUMBER_MAX],
                doing,
                |row| row.get(0),
            )?;
            delivery = delivery.max(last.unwrap_or(0));
        }
        for (kind, found) in [(Id::Event, event), (Id::Delivery, delivery)] {
            let next: Option<i64> = schema::meta(&self.conn, kind.key())?;
            let next = next.filter(|next| (1..NUMBER_MAX).contains(next)).unwrap_or(1);
            self.numbers[kind as usize] = Numbers { last: found.max(next - 1), reserved: 0 };
        }
        Ok(())
    }

    /// The next number.
    pub fn next(&mut self, kind: Id) -> Result<i64, StoreError> {
        let numbers = &mut self.numbers[kind as usize];
        let next = numbers.last + 1;
        if next > numbers.reserved {
            numbers.reserved = next + IDS_RESERVED;
            schema::set_meta(&self.conn, kind.key(), next + IDS_RESERVED + 1)?;
        }
        self.numbers[kind as usize].last = next;
        Ok(next)
    }

    /// The last number that was given.
    pub fn last(&self, kind: Id) -> i64 {
        self.numbers[kind as usize].last
    }

    /// Whatever was written down is taken back: it is written again before the next number.
    pub(super) fn unreserve(&mut self) {
        for numbers in &mut self.numbers {
            numbers.reserved = 0;
        }
    }
}
