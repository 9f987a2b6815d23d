//! Outbox → broker: in order, a window at a time, deleted when acknowledged.
//!
//! Places in the outbox live and die with the session: the next one begins at the oldest row that
//! is left. So nothing is forgotten, and what was in flight goes out again. Where the outbox ends
//! when the session begins parts the backlog, which is marked as replayed, from what is fresh.

use super::Endpoint;
use super::session::{InFlight, Session, SessionEnd};
use crate::config::Order;
use crate::model::event::REPLAYED_EXTENSION;
use crate::model::{Delivery, DeliveryId};
use crate::net::mqtt::{Outgoing, reason_text};
use crate::store::{Owed, OwedOrder, Position, StoreError};
use crate::sync::envelope::envelope;
use crate::sync::order::{Share, Side};
use futures_lite::future::or;
use smol::Timer;
use std::collections::VecDeque;
use std::time::Duration;

/// Rows read ahead, and their bytes: a window's worth.
const FETCH: u32 = 128;
const FETCH_BYTES: u64 = 256 << 10;
/// Of fresh ones at least: a window of one must not ask for each.
const FETCH_FRESH: u32 = 16;
/// Unacknowledged bytes; one larger delivery goes alone.
const IN_FLIGHT_BYTES_MAX: usize = 256 << 10;
/// Bytes that wait for the socket before more is encoded.
const OUT_BYTES_MAX: usize = 64 << 10;
/// Acknowledged rows that wait to be deleted: a bound on what a crash sends again.
const ACKED_MAX: usize = 1024;
/// Acknowledgements are collected this long before rows are deleted: one fsync for many.
const COLLECT: Duration = Duration::from_millis(20);
/// The outbox is looked at this often without being woken.
const LOOK: Duration = Duration::from_secs(5);
/// First rest when the broker's quota is exceeded; doubles up to the second.
const QUOTA_REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Rest when the store can't answer.
const STORE_REST: Duration = Duration::from_secs(1);

const QUOTA_EXCEEDED: u8 = 0x97;
/// Connections that may end while a delivery is alone in flight before it is given up.
const LONE_DISCONNECTS_MAX: u32 = 3;

/// The outbox as one session reads it.
struct Outbox {
    /// Where it ended when the session began.
    end: Position,
    backlog: Part,
    /// Under `fifo` nothing: the backlog has no end then.
    live: Part,
    share: Share,
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
    fn read_again(&mut self) {
        self.ahead.clear();
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
    fn new(to: &Endpoint, end: Position) -> Self {
        let part = |taken, upto, order| Part { upto, order, taken, ahead: VecDeque::new() };
        let start = Position::default();
        let (backlog, live) = match to.order {
            Order::LiveFirst => (part(start, Some(end), OwedOrder::Lanes), part(end, None, OwedOrder::Lanes)),
            Order::Fifo => (part(start, None, OwedOrder::Arrival), part(end, Some(end), OwedOrder::Arrival)),
        };
        Self { end, backlog, live, share: Share::new(to.live_percent) }
    }

    /// Goes on with the first of these in its lane.
    fn back_to(&mut self, again: &[DeliveryId]) {
        for id in again {
            let fresh = self.live.upto.is_none() && !self.end.is_past(*id);
            let part = if fresh { &mut self.live } else { &mut self.backlog };
            part.taken.back_to(*id);
        }
        self.live.ahead.clear();
        self.backlog.ahead.clear();
    }
}

impl Session<'_> {
    /// Keeps the window full.
    pub(super) async fn drain(&self) -> SessionEnd {
        let Some(mut outbox) = self.begin().await else { return std::future::pending().await };
        let mut quota_rest = QUOTA_REST.0;
        let mut pubacks_at_quota = 0;
        loop {
            let (owed, moved) = (self.link.owed.listen(), self.drain.listen());
            let refused = std::mem::take(&mut self.shared().refused);
            self.set_aside(refused).await;
            let again = {
                let mut shared = self.shared();
                let ready = shared.in_flight.is_empty() && !shared.again.is_empty();
                let again = if ready { std::mem::take(&mut shared.again) } else { Vec::new() };
                if ready {
                    if shared.pubacks > pubacks_at_quota + 1 {
                        quota_rest = QUOTA_REST.0;
                    }
                    pubacks_at_quota = shared.pubacks;
                }
                again
            };
            if !again.is_empty() {
                Timer::after(quota_rest).await;
                quota_rest = (quota_rest * 2).min(QUOTA_REST.1);
                outbox.back_to(&again);
            }
            match self.fill(&mut outbox).await {
                Ok(()) => {}
                Err(StoreError::Stopped) => return std::future::pending().await,
                Err(error) => {
                    tracing::warn!(error = crate::errors::chain(&error), "could not read the outbox");
                    Timer::after(STORE_REST).await;
                }
            }
            let look = async {
                Timer::after(LOOK).await;
            };
            or(or(owed, moved), look).await;
        }
    }

    /// `None`: the store has stopped.
    async fn begin(&self) -> Option<Outbox> {
        loop {
            match self.link.store.outbox_end().await {
                Ok(end) => return Some(Outbox::new(self.to, end)),
                Err(StoreError::Stopped) => return None,
                Err(error) => {
                    tracing::warn!(error = crate::errors::chain(&error), "could not read the outbox");
                    Timer::after(STORE_REST).await;
                }
            }
        }
    }

    async fn fill(&self, outbox: &mut Outbox) -> Result<(), StoreError> {
        // What came since may be in a higher lane than what was read ahead.
        outbox.live.read_again();
        while self.has_room() {
            self.read_ahead(&mut outbox.live).await?;
            self.read_ahead(&mut outbox.backlog).await?;
            let (live, backlog) = (!outbox.live.ahead.is_empty(), !outbox.backlog.ahead.is_empty());
            let Some(side) = outbox.share.next(live, backlog) else { return Ok(()) };
            let part = match side {
                Side::Live => &mut outbox.live,
                Side::Backlog => &mut outbox.backlog,
            };
            let Some(mut delivery) = part.ahead.pop_front() else { return Ok(()) };
            part.taken.pass(delivery.id);
            delivery.replayed |= outbox.end.is_past(delivery.id);
            self.deliver(delivery).await;
        }
        Ok(())
    }

    async fn read_ahead(&self, part: &mut Part) -> Result<(), StoreError> {
        if !part.ahead.is_empty() || part.upto == Some(part.taken) {
            return Ok(());
        }
        let what = Owed {
            target: self.link.target,
            after: part.taken,
            upto: part.upto,
            order: part.order,
            limit: part.limit(self.room()),
            bytes_max: FETCH_BYTES,
        };
        part.ahead = self.link.store.owed(what).await?.into();
        if let (true, Some(upto)) = (part.ahead.is_empty(), part.upto) {
            part.taken = upto; // nothing is ever added to it
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.window().saturating_sub(self.shared().in_flight.len())
    }

    fn has_room(&self) -> bool {
        let shared = self.shared();
        // A broker that closed on us without a word gets one at a time until it acknowledges one.
        let window = if self.probe && shared.pubacks == 0 { 1 } else { self.window() };
        !shared.leaving
            && shared.again.is_empty()
            && shared.in_flight.len() < window
            && shared.in_flight_bytes < IN_FLIGHT_BYTES_MAX
            && shared.out.len() < OUT_BYTES_MAX
            && shared.acked.len() < ACKED_MAX
    }

    async fn deliver(&self, delivery: Delivery) {
        let id = delivery.id;
        let bytes = delivery.body.event.data.len();
        let mut event = delivery.body.event;
        if delivery.replayed {
            event.extensions.insert(REPLAYED_EXTENSION.to_owned(), "true".to_owned());
        }
        let envelope = envelope(event, self.mode);
        let message = Outgoing {
            topic: delivery.body.topic,
            payload: envelope.payload,
            content_type: envelope.content_type,
            user_properties: envelope.attributes,
        };
        let now = self.now();
        let sent = self.send(|shared| {
            let pkid = shared.pkid();
            self.encoder.publish(&mut shared.out, pkid, message)?;
            if shared.in_flight.is_empty() {
                shared.moved = now;
            }
            shared.in_flight.push_back(InFlight { pkid, id, bytes, sent: now });
            shared.in_flight_bytes += bytes;
            Ok(())
        });
        if let Err(error) = sent {
            let error: crate::net::mqtt::EncodeError = error;
            self.give_up(id, error.to_string()).await;
        }
    }

    pub(super) fn puback(&self, pkid: u16, reason: u8) {
        let mut shared = self.shared();
        let Some(at) = shared.in_flight.iter().position(|sent| sent.pkid == pkid) else {
            tracing::debug!(pkid, "an acknowledgement that nothing waits for");
            return;
        };
        let Some(sent) = shared.in_flight.remove(at) else { return };
        shared.in_flight_bytes -= sent.bytes;
        shared.pubacks += 1;
        shared.moved = self.now();
        match reason {
            QUOTA_EXCEEDED => {
                shared.again.push(sent.id);
            }
            0x80.. => shared.refused.push((sent.id, reason)),
            _ => shared.acked.push(sent.id),
        }
        drop(shared);
        self.delete.wake();
        self.drain.wake();
    }

    /// Takes what was acknowledged out of the outbox.
    pub(super) async fn delete(&self) -> SessionEnd {
        loop {
            let acked = self.delete.listen();
            if self.shared().acked.is_empty() {
                acked.await;
                continue;
            }
            Timer::after(COLLECT).await;
            let ids = {
                let mut shared = self.shared();
                shared.deleting = std::mem::take(&mut shared.acked);
                shared.deleting.clone()
            };
            let count = ids.len() as u64;
            match self.link.store.delivered(ids).await {
                Ok(()) => {
                    self.link.metrics.delivered(self.link.target.as_str(), count);
                    self.shared().deleting.clear();
                    self.drain.wake();
                }
                Err(StoreError::Stopped) => return std::future::pending().await,
                Err(error) => {
                    tracing::warn!(error = crate::errors::chain(&error), "could not delete deliveries");
                    self.keep_acked();
                    Timer::after(STORE_REST).await;
                }
            }
        }
    }

    fn keep_acked(&self) {
        let mut shared = self.shared();
        let mut ids = std::mem::take(&mut shared.deleting);
        shared.acked.append(&mut ids);
    }

    pub(super) async fn set_aside(&self, refused: Vec<(DeliveryId, u8)>) {
        for (id, code) in refused {
            self.give_up(id, format!("the broker refused it: {} (0x{code:02X})", reason_text(code))).await;
        }
    }

    pub(super) async fn lone_disconnect(&self, id: DeliveryId, why: &str) {
        match self.link.store.lone_disconnect(id).await {
            Ok(count) if count >= LONE_DISCONNECTS_MAX => {
                self.give_up(id, format!("{count} connections ended while it was alone in flight: {why}"))
                    .await;
            }
            Ok(_) | Err(StoreError::NotFound | StoreError::Stopped) => {}
            Err(error) => {
                tracing::warn!(error = crate::errors::chain(&error), "could not count a disconnect")
            }
        }
    }

    async fn give_up(&self, id: DeliveryId, reason: String) {
        tracing::warn!(delivery = %id, reason, "a delivery is set aside; `neap deliveries --dead` shows it");
        match self.link.store.set_aside(id, reason).await {
            Ok(()) | Err(StoreError::NotFound | StoreError::Stopped) => {}
            // It stays owed and comes up again with the next connection.
            Err(error) => {
                tracing::warn!(error = crate::errors::chain(&error), "could not set a delivery aside")
            }
        }
    }
}
