//! Outbox → broker: in order, a window at a time, deleted when acknowledged.
//!
//! Places in the outbox live and die with the session: the next one begins at the oldest row that
//! is left. So nothing is forgotten, and what was in flight goes out again. Where the outbox ends
//! when the session begins parts the backlog, which is marked as replayed, from what is fresh.

use super::outbox::Outbox;
use super::session::{InFlight, Session, SessionEnd};
use crate::model::{Delivery, DeliveryId};
use crate::net::mqtt::{Outgoing, reason_text};
use crate::store::{StoreError, Usage};
use crate::sync::allowance::{self, Allowance, SPENT};
use crate::sync::envelope::envelope;
use futures_lite::StreamExt;
use futures_lite::future::or;
use smol::Timer;
use std::time::Duration;

/// Unacknowledged bytes; one larger delivery goes alone.
const IN_FLIGHT_BYTES_MAX: usize = 256 << 10;
/// Bytes that wait for the socket before more is encoded.
const OUT_BYTES_MAX: usize = 64 << 10;
/// Acknowledged rows that wait to be deleted or are being: a bound on what a crash sends again.
const ACKED_MAX: usize = 1024;
/// Acknowledgements are collected this long before rows are deleted: one fsync for many.
const COLLECT: Duration = Duration::from_millis(20);
/// So many don't wait for more: as many again come while these are deleted, and sending never
/// stops for `ACKED_MAX`.
const DELETED_AT_ONCE: usize = ACKED_MAX / 2;
/// The outbox is looked at this often without being woken.
const LOOK: Duration = Duration::from_secs(5);
/// A broker whose oldest acknowledgement is not older than this answers at once: on a long link
/// the window is kept full.
const MOMENT: Duration = Duration::from_millis(2);
/// First rest when the broker's quota is exceeded; doubles up to the second.
const QUOTA_REST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Rest when the store can't answer.
const STORE_REST: Duration = Duration::from_secs(1);

const QUOTA_EXCEEDED: u8 = 0x97;
/// Connections that may end while a delivery is alone in flight before it is given up.
const LONE_DISCONNECTS_MAX: u32 = 3;

impl Session<'_> {
    /// Keeps the window full.
    pub(super) async fn drain(&self) -> SessionEnd {
        let begun = Outbox::begin(&self.link.store, self.link.target, self.to.order, self.to.live_percent);
        let Some(mut outbox) = begun.await else { return std::future::pending().await };
        let mut quota_rest = QUOTA_REST.0;
        let mut pubacks_at_quota = 0;
        // One for all: setting a timer wakes the reactor, which costs as much as sending.
        let mut look = Timer::interval(LOOK);
        let (mut news, mut owed) = (true, self.link.owed.listen());
        loop {
            let moved = self.drain.listen();
            if news {
                owed = self.link.owed.listen();
                outbox.look_again();
            }
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
            let told = async {
                (&mut owed).await;
                true
            };
            let moved = async {
                moved.await;
                false
            };
            let looks = async { look.next().await.is_some() };
            news = or(or(told, looks), moved).await;
        }
    }

    async fn fill(&self, outbox: &mut Outbox) -> Result<(), StoreError> {
        if self.more_room_is_near() {
            return Ok(());
        }
        outbox.decide_again();
        while self.has_room() {
            let allowance = self.allowance().await?;
            let backlog = allowance.backlog_may_go(self.link.clock.wall());
            let room = self.window().saturating_sub(self.shared().in_flight.len());
            let Some(delivery) = outbox.peek(&self.link.store, room, backlog).await? else { return Ok(()) };
            let (under_way, cost) = (self.under_way(), allowance::cost(&delivery.body));
            if !allowance.may_send(under_way, cost) {
                if !std::mem::replace(&mut self.shared().capped, true) {
                    self.link.complain(SPENT.to_owned());
                }
                return Ok(());
            }
            if std::mem::replace(&mut self.shared().capped, false) {
                self.link.recovered();
            }
            let Some(delivery) = outbox.take() else { return Ok(()) };
            self.deliver(delivery).await;
        }
        Ok(())
    }

    /// What may be sent today. Asked of the store when nothing is known or all is spent: a new
    /// day may have begun.
    async fn allowance(&self) -> Result<Allowance, StoreError> {
        let limits = self.to.limits;
        let known = {
            let shared = self.shared();
            if shared.capped { None } else { shared.spent }
        };
        let spent = match known {
            _ if limits.bytes_per_day == 0 => 0,
            Some(spent) => spent,
            None => {
                let today = allowance::day(self.link.clock.wall());
                let spent = self.link.store.usage(Usage::UplinkBytes, today).await?;
                self.shared().spent = Some(spent);
                spent
            }
        };
        Ok(Allowance { limits, spent })
    }

    /// Bytes that were sent and are not counted in the store yet.
    fn under_way(&self) -> u64 {
        let shared = self.shared();
        shared.in_flight_bytes as u64 + shared.uncounted
    }

    fn has_room(&self) -> bool {
        let shared = self.shared();
        // A broker that closed on us without a word gets what it may have meant one at a time.
        let window = if shared.pubacks < self.probe { 1 } else { self.window() };
        !shared.leaving
            && shared.again.is_empty()
            && shared.in_flight.len() < window
            && shared.in_flight_bytes < IN_FLIGHT_BYTES_MAX
            && shared.out.len() < OUT_BYTES_MAX
            && shared.acked.len() + shared.deleting.len() < ACKED_MAX
    }

    /// A broker that answers within a moment gets the next ones by the handful: each alone costs
    /// both sides several system calls. The next acknowledgement comes soon, and wakes.
    fn more_room_is_near(&self) -> bool {
        let window = self.window();
        let shared = self.shared();
        let free = window.saturating_sub(shared.in_flight.len());
        let Some(oldest) = shared.in_flight.front() else { return false };
        free < window / 2 && self.now().saturating_sub(oldest.sent) < MOMENT
    }

    async fn deliver(&self, delivery: Delivery) {
        let id = delivery.id;
        let envelope = envelope(&delivery.body.event, self.mode);
        let message = Outgoing {
            topic: &delivery.body.topic,
            payload: &envelope.payload,
            content_type: envelope.content_type,
            user_properties: &envelope.attributes,
        };
        let now = self.now();
        let sent = self.send(|shared| {
            let pkid = shared.pkid();
            let before = shared.out.len();
            self.encoder.publish(&mut shared.out, pkid, &message)?;
            let bytes = shared.out.len() - before;
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
        // Refused ones cost as much.
        shared.uncounted += sent.bytes as u64;
        shared.pubacks += 1;
        shared.moved = self.now();
        match reason {
            QUOTA_EXCEEDED => {
                shared.again.push(sent.id);
            }
            0x80.. => shared.refused.push((sent.id, reason)),
            _ => shared.acked.push(sent.id),
        }
        // In between there is nothing to do: either it waits for more, or it is at work.
        let deletes = shared.acked.len() == 1 || shared.acked.len() >= DELETED_AT_ONCE;
        drop(shared);
        if deletes {
            self.delete.wake();
        }
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
            let late = async {
                Timer::after(COLLECT).await;
            };
            let enough = async {
                loop {
                    let more = self.delete.listen();
                    if self.shared().acked.len() >= DELETED_AT_ONCE {
                        return;
                    }
                    more.await;
                }
            };
            or(enough, late).await;
            let (ids, bytes) = {
                let mut shared = self.shared();
                shared.deleting = std::mem::take(&mut shared.acked);
                (shared.deleting.clone(), shared.uncounted)
            };
            let count = ids.len() as u64;
            match self.delivered(ids, bytes).await {
                Ok(spent) => {
                    self.link.metrics.delivered(self.link.target.as_str(), count);
                    let mut shared = self.shared();
                    shared.deleting.clear();
                    shared.uncounted -= bytes;
                    shared.spent = spent;
                    drop(shared);
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

    /// Takes them out of the outbox and counts what was sent; the day's sum, where it matters.
    pub(super) async fn delivered(
        &self,
        ids: Vec<DeliveryId>,
        bytes: u64,
    ) -> Result<Option<u64>, StoreError> {
        let store = &self.link.store;
        if self.to.limits.bytes_per_day == 0 {
            return store.delivered(ids).await.map(|()| None);
        }
        let today = allowance::day(self.link.clock.wall());
        store.delivered_counting(ids, Usage::UplinkBytes, today, bytes).await.map(Some)
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

    /// True: it was one too many, the delivery is set aside.
    pub(super) async fn lone_disconnect(&self, id: DeliveryId, why: &str) -> bool {
        match self.link.store.lone_disconnect(id).await {
            Ok(count) if count >= LONE_DISCONNECTS_MAX => {
                self.give_up(id, format!("{count} connections ended while it was alone in flight: {why}"))
                    .await;
                return true;
            }
            Ok(_) | Err(StoreError::NotFound | StoreError::Stopped) => {}
            Err(error) => {
                tracing::warn!(error = crate::errors::chain(&error), "could not count a disconnect")
            }
        }
        false
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
