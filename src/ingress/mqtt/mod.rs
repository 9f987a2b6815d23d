//! Messages from a broker → committed events.
//!
//! ```text
//! sync::driver ── Incoming ──▶ match routes ─▶ store.accept (many at once) ─▶ in order ── Ack ──▶ sync::driver
//! ```
//!
//! A message is acknowledged only after its event is committed, and in the order in which it
//! came (MQTT 5.0 §4.6), though many commits are under way together: that is what makes one
//! fsync serve many messages.
//!
//! A full store withholds the acknowledgement and everything behind it, and the commit is tried
//! again every second, so that nothing is lost and nothing is read for which there is no room.
//! QoS 0 has no one who would send it again: then it is dropped and counted. What the store could
//! not hold even when empty would be withheld for ever: its head is kept as a dead letter.

mod arrival;
mod overlap;

use crate::channels::{Ack, Incoming};
use crate::ingress::routes::Routes;
use crate::model::{Clock, EventId, Failure, Target};
use crate::store::{Accepted, Arrival, Line, Store, StoreError};
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use arrival::Fate;
use futures_lite::future::poll_fn;
use overlap::Overlap;
use ring::rand::{SecureRandom, SystemRandom};
use smol::channel::{Receiver, Sender, TryRecvError};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// How long a refused commit rests: room comes from deliveries and outcomes, not from asking.
const RETRY: Duration = Duration::from_secs(1);

/// One for each link that messages come in by.
pub struct Ingress {
    pub target: Target,
    pub incoming: Receiver<Incoming>,
    pub acks: Sender<Ack>,
    pub store: Store,
    pub routes: Watch<Routes>,
    /// Woken when an invocation may be due.
    pub due: Wake,
    /// Woken when a forward became a delivery for the uplink.
    pub owed: Wake,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
}

type Commit = Pin<Box<dyn Future<Output = Result<Accepted, StoreError>> + Send>>;

struct Slot {
    ack: Ack,
    /// Kept for another try; QoS 0 gets none.
    arrival: Option<Arrival>,
    forwards: bool,
    state: SlotState,
    /// Held until the acknowledgement: memory is free only then.
    _permit: crate::channels::Permit,
}

/// What making events of messages needs besides the message.
struct Making {
    random: SystemRandom,
    overlap: Overlap,
}

enum SlotState {
    Committing(Commit),
    Committed,
    /// The store had no room; tried again when its turn comes.
    Refused(StoreError),
    /// The store has stopped: nothing more will be committed or acknowledged.
    Stopped,
}

impl Ingress {
    /// Runs until the channel of messages is closed and all of it is committed, or the store
    /// has stopped.
    ///
    /// Wiring: make an `IncomingChannels` for each link; give the senders of `incoming`, the
    /// receiver of `acks` and `room` to `sync::driver::Link`, the other two ends to this.
    pub async fn run(self) {
        let mut slots: VecDeque<Slot> = VecDeque::new();
        // Said once, until all that was held back is in.
        let mut warned = false;
        let line = Line::default();
        let mut making = Making { random: SystemRandom::new(), overlap: Overlap::default() };
        loop {
            // Whatever is there is sent to the store at once, so that it shares a transaction.
            let full = slots.iter().any(|slot| matches!(slot.state, SlotState::Refused(_)));
            if !full {
                loop {
                    match self.incoming.try_recv() {
                        Ok(incoming) => self.begin(incoming, &mut making, &line, &mut slots).await,
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Closed) if slots.is_empty() => return,
                        Err(TryRecvError::Closed) => break,
                    }
                }
            }
            match slots.front() {
                None => match self.incoming.recv().await {
                    Ok(incoming) => self.begin(incoming, &mut making, &line, &mut slots).await,
                    Err(_) => return,
                },
                Some(Slot { state: SlotState::Refused(error), .. }) => {
                    if !warned {
                        warned = true;
                        tracing::warn!(
                            link = self.target.as_str(),
                            messages = slots.len(),
                            error = crate::errors::chain(error),
                            "messages are held back, none is read or acknowledged until there is room"
                        );
                    }
                    smol::Timer::after(RETRY).await;
                    // What was sent behind it is refused too, which must all be known before the
                    // line opens: then all again, in their order.
                    for slot in &mut slots {
                        poll_fn(|cx| self.poll_slot(slot, cx)).await;
                    }
                    line.reopen();
                    for slot in &mut slots {
                        if let (SlotState::Refused(_), Some(arrival)) = (&slot.state, &slot.arrival) {
                            slot.state = SlotState::Committing(self.commit(&line, arrival.clone()).await);
                        }
                    }
                }
                Some(_) => {
                    let ready = self.front_ready(&mut slots);
                    let more = async {
                        if full || self.incoming.is_closed() {
                            return std::future::pending().await;
                        }
                        self.incoming.recv().await.ok()
                    };
                    let progress = async {
                        ready.await;
                        None
                    };
                    if let Some(incoming) = futures_lite::future::or(progress, more).await {
                        self.begin(incoming, &mut making, &line, &mut slots).await;
                    }
                }
            }
            self.finish(&mut slots).await;
            warned &= !slots.is_empty();
            if slots.front().is_some_and(|slot| matches!(slot.state, SlotState::Stopped)) {
                return;
            }
        }
    }

    async fn begin(&self, incoming: Incoming, making: &mut Making, line: &Line, slots: &mut VecDeque<Slot>) {
        let mut id = [0; 16];
        // getrandom can't fail on a Linux that has booted; a fresh id is all that is lost if it does.
        if making.random.fill(&mut id).is_err() {
            id = fastrand::u128(..).to_ne_bytes();
        }
        let qos = incoming.publish.qos;
        let (version, routes) = self.routes.versioned();
        let copy = making.overlap.is_copy(incoming.ack.connection, version, &incoming.publish);
        let seen = arrival::Seen {
            target: self.target,
            old_version: incoming.old_version,
            now: self.clock.wall(),
            fresh_id: EventId::from_random(id),
        };
        let fate = match copy {
            true => Fate::Nobody("overlap"),
            false => arrival::arrival(&routes, seen, incoming.publish),
        };
        let arrival = match fate {
            Fate::Arrival(arrival) => Some(arrival),
            Fate::Nobody(reason) => {
                self.metrics.event_refused(reason);
                None
            }
        };
        let state = match &arrival {
            Some(arrival) => SlotState::Committing(self.commit(line, arrival.clone()).await),
            None => SlotState::Committed,
        };
        let forwards = arrival.as_ref().is_some_and(|a| !a.deliveries.is_empty());
        let arrival = arrival.filter(|_| qos > 0);
        slots.push_back(Slot { ack: incoming.ack, arrival, forwards, state, _permit: incoming.permit });
    }

    /// Returns when the arrival stands in the store's queue, behind those before it.
    async fn commit(&self, line: &Line, arrival: Arrival) -> Commit {
        match self.store.submit(line, arrival).await {
            Ok(receipt) => Box::pin(receipt.committed()),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    /// Waits until the first slot is decided.
    async fn front_ready(&self, slots: &mut VecDeque<Slot>) {
        poll_fn(|cx| match slots.front_mut() {
            Some(slot) => self.poll_slot(slot, cx),
            None => Poll::Ready(()),
        })
        .await;
    }

    fn poll_slot(&self, slot: &mut Slot, cx: &mut Context<'_>) -> Poll<()> {
        let SlotState::Committing(commit) = &mut slot.state else { return Poll::Ready(()) };
        let Poll::Ready(result) = commit.as_mut().poll(cx) else { return Poll::Pending };
        slot.state = match result {
            Ok(accepted) => {
                match &accepted.fate {
                    crate::store::Fate::Stored => self.metrics.event_accepted("mqtt"),
                    crate::store::Fate::Duplicate(_) => self.metrics.event_refused("duplicate"),
                    crate::store::Fate::Dropped => self.metrics.event_refused("buffer_full"),
                }
                if accepted.invocations > 0 {
                    self.due.wake();
                }
                SlotState::Committed
            }
            Err(error @ (StoreError::Full | StoreError::DiskFull)) if slot.arrival.is_some() => {
                SlotState::Refused(error)
            }
            Err(error @ StoreError::TooLarge { .. }) => {
                tracing::warn!(
                    link = self.target.as_str(),
                    error = crate::errors::chain(&error),
                    "a message is not kept whole"
                );
                self.metrics.event_refused("payload_too_large");
                let why = Failure::Refused(error.to_string());
                slot.forwards = false;
                slot.arrival = slot.arrival.take().and_then(|arrival| arrival::cut_down(arrival, &why));
                let Some(arrival) = &slot.arrival else {
                    slot.state = SlotState::Committed;
                    return Poll::Ready(());
                };
                // A dead letter's place in the order means nothing.
                let (store, arrival) = (self.store.clone(), arrival.clone());
                slot.state = SlotState::Committing(Box::pin(async move { store.accept(arrival).await }));
                return self.poll_slot(slot, cx); // once: what is cut down is not cut down again
            }
            Err(StoreError::Stopped) => SlotState::Stopped,
            Err(StoreError::Full | StoreError::DiskFull) => {
                self.metrics.event_refused("buffer_full");
                SlotState::Committed
            }
            Err(error) => {
                tracing::error!(error = crate::errors::chain(&error), "could not commit a message");
                self.metrics.event_refused("store_failed");
                if slot.arrival.is_some() { SlotState::Refused(error) } else { SlotState::Committed }
            }
        };
        Poll::Ready(())
    }

    /// Acknowledges from the front for as long as it is committed.
    async fn finish(&self, slots: &mut VecDeque<Slot>) {
        let mut forwarded = false;
        while let Some(front) = slots.front_mut() {
            let ready = poll_fn(|cx| Poll::Ready(self.poll_slot(front, cx).is_ready())).await;
            if !ready || !matches!(front.state, SlotState::Committed) {
                break;
            }
            let Some(slot) = slots.pop_front() else { break };
            forwarded |= slot.forwards;
            // A link that is gone needs no acknowledgements; the commits go on.
            let _ = self.acks.send(slot.ack).await;
        }
        if forwarded {
            self.owed.wake();
        }
    }
}
