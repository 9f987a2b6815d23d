//! The outbox as one session reads it: the backlog, what is fresh, and whose turn it is.
//!
//! Places live and die with the session: the next one begins at the oldest row that is left.
//! Where the outbox ended when the session began parts the backlog from what is fresh.

use crate::config::Order;
use crate::model::event::REPLAYED_EXTENSION;
use crate::model::{Delivery, DeliveryId, Target};
use crate::store::{Owed, OwedOrder, Position, Store, StoreError};
use crate::sync::order::{Share, Side};
use smol::Timer;
use std::collections::VecDeque;
use std::time::Duration;

/// Rows read ahead, and their bytes: a window's worth.
const FETCH: u32 = 128;
const FETCH_BYTES: u64 = 256 << 10;
/// Of fresh ones at least: a window of one must not ask for each.
const FETCH_FRESH: u32 = 16;
/// Rest when the store can't answer.
const STORE_REST: Duration = Duration::from_secs(1);

pub(super) struct Outbox {
    target: Target,
    /// Where it ended when the session began.
    end: Position,
    backlog: Part,
    /// Under `fifo` nothing: the backlog has no end then.
    live: Part,
    share: Share,
    /// Whose turn it is, decided and not taken yet.
    turn: Option<Side>,
}

struct Part {
    upto: Option<Position>,
    order: OwedOrder,
    /// Sent, or given up.
    taken: Position,
    /// Read, in the order in which they go.
    ahead: VecDeque<Delivery>,
}

impl Part {
    async fn read_ahead(&mut self, store: &Store, target: Target, room: usize) -> Result<(), StoreError> {
        if !self.ahead.is_empty() || self.upto == Some(self.taken) {
            return Ok(());
        }
        let what = Owed {
            target,
            after: self.taken,
            upto: self.upto,
            order: self.order,
            limit: self.limit(room),
            bytes_max: FETCH_BYTES,
        };
        self.ahead = store.owed(what).await?.into();
        if let (true, Some(upto)) = (self.ahead.is_empty(), self.upto) {
            self.taken = upto; // nothing is ever added to it
        }
        Ok(())
    }

    /// What is fresh is read as there is room for it, so that little is read twice.
    fn limit(&self, room: usize) -> u32 {
        if self.upto.is_some() || self.order == OwedOrder::Arrival {
            FETCH
        } else {
            (room as u32).clamp(FETCH_FRESH, FETCH)
        }
    }
}

impl Outbox {
    /// `None`: the store has stopped.
    pub async fn begin(store: &Store, target: Target, order: Order, live_percent: u8) -> Option<Self> {
        loop {
            match store.outbox_end().await {
                Ok(end) => return Some(Self::new(target, order, live_percent, end)),
                Err(StoreError::Stopped) => return None,
                Err(error) => {
                    tracing::warn!(error = crate::errors::chain(&error), "could not read the outbox");
                    Timer::after(STORE_REST).await;
                }
            }
        }
    }

    fn new(target: Target, order: Order, live_percent: u8, end: Position) -> Self {
        let part = |taken, upto, order| Part { upto, order, taken, ahead: VecDeque::new() };
        let start = Position::default();
        let (backlog, live) = match order {
            Order::LiveFirst => (part(start, Some(end), OwedOrder::Lanes), part(end, None, OwedOrder::Lanes)),
            Order::Fifo => (part(start, None, OwedOrder::Arrival), part(end, Some(end), OwedOrder::Arrival)),
        };
        Self { target, end, backlog, live, share: Share::new(live_percent), turn: None }
    }

    /// Goes on with the first of these in its lane.
    pub fn back_to(&mut self, again: &[DeliveryId]) {
        for id in again {
            let fresh = self.live.upto.is_none() && !self.end.is_past(*id);
            let part = if fresh { &mut self.live } else { &mut self.backlog };
            part.taken.back_to(*id);
        }
        self.live.ahead.clear();
        self.backlog.ahead.clear();
        self.turn = None;
    }

    /// What came since may be in a higher lane than what was read ahead.
    pub fn look_again(&mut self) {
        self.live.ahead.clear();
        self.turn = None;
    }

    /// The one that goes next; it stays until it is taken. `room`: how many may go now. The
    /// backlog is left alone while it may not go.
    pub async fn peek(
        &mut self,
        store: &Store,
        room: usize,
        backlog_may_go: bool,
    ) -> Result<Option<&Delivery>, StoreError> {
        if self.turn.is_none() {
            self.live.read_ahead(store, self.target, room).await?;
            if backlog_may_go {
                self.backlog.read_ahead(store, self.target, room).await?;
            }
            let backlog = backlog_may_go && !self.backlog.ahead.is_empty();
            self.turn = self.share.next(!self.live.ahead.is_empty(), backlog);
        }
        Ok(match self.turn {
            None => None,
            Some(Side::Live) => self.live.ahead.front(),
            Some(Side::Backlog) => self.backlog.ahead.front(),
        })
    }

    /// Takes the one that `peek` showed, marked when it is late.
    pub fn take(&mut self) -> Option<Delivery> {
        let part = match self.turn.take()? {
            Side::Live => &mut self.live,
            Side::Backlog => &mut self.backlog,
        };
        let mut delivery = part.ahead.pop_front()?;
        part.taken.pass(delivery.id);
        if delivery.replayed || self.end.is_past(delivery.id) {
            delivery.replayed = true;
            delivery.body.event.extensions.insert(REPLAYED_EXTENSION.to_owned(), "true".to_owned());
        }
        Some(delivery)
    }
}
