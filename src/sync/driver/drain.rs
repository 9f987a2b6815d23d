//! Outbox → broker: in order, a window at a time, deleted when acknowledged.
//!
//! The position in the outbox lives and dies with the session: the next one begins at the
//! oldest row that is left. So nothing is forgotten, and what was in flight goes out again.

use super::session::{InFlight, Session, SessionEnd};
use crate::model::{Delivery, DeliveryId};
use crate::net::mqtt::{Outgoing, reason_text};
use crate::store::StoreError;
use crate::sync::envelope::envelope;
use futures_lite::future::or;
use smol::Timer;
use std::collections::VecDeque;
use std::time::Duration;

/// Rows read ahead, and their bytes: a window's worth.
const FETCH: u32 = 128;
const FETCH_BYTES: u64 = 256 << 10;
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

impl Session<'_> {
    /// Keeps the window full.
    pub(super) async fn drain(&self) -> SessionEnd {
        let mut after = DeliveryId(0);
        let mut ahead: VecDeque<Delivery> = VecDeque::new();
        let mut quota_rest = QUOTA_REST.0;
        let mut pubacks_at_quota = 0;
        loop {
            let (owed, moved) = (self.link.owed.listen(), self.drain.listen());
            let refused = std::mem::take(&mut self.shared().refused);
            self.set_aside(refused).await;
            let again = {
                let mut shared = self.shared();
                let from = shared.again_from.filter(|_| shared.in_flight.is_empty());
                if from.is_some() {
                    shared.again_from = None;
                    if shared.pubacks > pubacks_at_quota + 1 {
                        quota_rest = QUOTA_REST.0;
                    }
                    pubacks_at_quota = shared.pubacks;
                }
                from
            };
            if let Some(from) = again {
                Timer::after(quota_rest).await;
                quota_rest = (quota_rest * 2).min(QUOTA_REST.1);
                after = DeliveryId(from.0 - 1);
                ahead.clear();
            }
            match self.fill(&mut after, &mut ahead).await {
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

    async fn fill(&self, after: &mut DeliveryId, ahead: &mut VecDeque<Delivery>) -> Result<(), StoreError> {
        while self.has_room() {
            if ahead.is_empty() {
                let rows = self.link.store.owed(self.link.target, *after, FETCH, FETCH_BYTES).await?;
                *ahead = rows.into();
            }
            let Some(delivery) = ahead.pop_front() else { return Ok(()) };
            *after = delivery.id;
            self.deliver(delivery).await;
        }
        Ok(())
    }

    fn has_room(&self) -> bool {
        let shared = self.shared();
        // A broker that closed on us without a word gets one at a time until it acknowledges one.
        let window = if self.probe && shared.pubacks == 0 { 1 } else { self.window() };
        !shared.leaving
            && shared.again_from.is_none()
            && shared.in_flight.len() < window
            && shared.in_flight_bytes < IN_FLIGHT_BYTES_MAX
            && shared.out.len() < OUT_BYTES_MAX
            && shared.acked.len() < ACKED_MAX
    }

    async fn deliver(&self, delivery: Delivery) {
        let id = delivery.id;
        let bytes = delivery.body.event.data.len();
        let envelope = envelope(delivery.body.event, self.mode);
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
                let from = shared.again_from.map_or(sent.id, |from| from.min(sent.id));
                shared.again_from = Some(from);
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
