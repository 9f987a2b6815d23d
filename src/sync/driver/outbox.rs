//! The outbox as one session reads it: the backlog, what is fresh, and whose turn it is.
//!
//! Places live and die with the session: the next one begins at the oldest row that is left.
//! Where the outbox ended when the session began parts the backlog from what is fresh.

use crate::config::Order;
use crate::model::event::REPLAYED_EXTENSION;
use crate::model::{Delivery, DeliveryId, Target};
use crate::store::{Owed, OwedOrder, Position, Reading, Store, StoreError};
use crate::sync::order::{Share, Side};
use smol::Timer;
use std::collections::VecDeque;
use std::time::Duration;

/// Rows of a page, and the bytes of their data: a few windows' worth. Two pages are held at most.
const FETCH: u32 = 256;
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
    /// What stands behind those, asked for before the last of them goes: a commit may keep the
    /// store for milliseconds, in which the window would run empty.
    asked: Option<Reading>,
    /// The last page was a full one: there is more.
    more: bool,
    /// Nothing stood there, and nobody has said since that something does.
    dry: bool,
}

impl Part {
    fn new(taken: Position, upto: Option<Position>, order: OwedOrder) -> Self {
        Self { upto, order, taken, ahead: VecDeque::new(), asked: None, more: false, dry: false }
    }

    async fn read_ahead(&mut self, store: &Store, target: Target, room: usize) -> Result<(), StoreError> {
        if self.ahead.is_empty()
            && let Some(reading) = self.asked.take()
        {
            self.page(reading.rows().await?);
        }
        if self.ahead.is_empty() && !self.dry && self.upto != Some(self.taken) {
            let what = self.what(target, self.taken, room);
            self.page(store.owed(what).await?);
            self.dry = self.ahead.is_empty();
            if let (true, Some(upto)) = (self.dry, self.upto) {
                self.taken = upto; // nothing is ever added to it
            }
        }
        if self.more && self.asked.is_none() && self.ahead.len() <= FETCH as usize / 2 {
            let mut behind = self.taken;
            self.ahead.iter().for_each(|delivery| behind.pass(delivery.id));
            self.asked = Some(store.read_owed(self.what(target, behind, room)).await?);
        }
        Ok(())
    }

    fn what(&self, target: Target, after: Position, room: usize) -> Owed {
        // What is fresh is read as there is room for it, so that little is read twice.
        let limit = if self.grows_at_its_end() { FETCH } else { (room as u32).clamp(FETCH_FRESH, FETCH) };
        Owed { target, after, upto: self.upto, order: self.order, limit, bytes_max: FETCH_BYTES }
    }

    fn page(&mut self, rows: Vec<Delivery>) {
        let bytes: usize = rows.iter().map(|delivery| delivery.body.event.data.len()).sum();
        let full = rows.len() >= FETCH as usize || bytes as u64 > FETCH_BYTES / 2;
        self.more = self.grows_at_its_end() && full;
        self.ahead = rows.into();
    }

    /// Nothing that comes later goes before what was read.
    fn grows_at_its_end(&self) -> bool {
        self.upto.is_some() || self.order == OwedOrder::Arrival
    }

    /// What was read is read again.
    fn forget(&mut self) {
        self.ahead.clear();
        (self.asked, self.more, self.dry) = (None, false, false);
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
        let part = Part::new;
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
        self.live.forget();
        self.backlog.forget();
        self.turn = None;
    }

    /// There is more than there was, perhaps in a higher lane than what was read ahead.
    pub fn look_again(&mut self) {
        self.backlog.dry = false;
        self.live.forget();
        self.turn = None;
    }

    /// Whose turn it is may be another's by now: a window has closed.
    pub fn decide_again(&mut self) {
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
