//! One connection, from greeting to end: the parts that run side by side and what they share.

use super::{Endpoint, Link, WINDOW, name};
use crate::channels::{Ack, Incoming};
use crate::model::DeliveryId;
use crate::net::mqtt::{
    Encoder, Greeting, Publish, PublishLimit, ReadError, Reader, Received, Version, Writer, reason_text,
};
use crate::sync::envelope::{Mode, mode};
use crate::sync::link::Input;
use crate::watch::Wake;
use bytes::BytesMut;
use futures_lite::future::or;
use smol::Timer;
use smol::channel::{Receiver, Sender};
use std::collections::VecDeque;
use std::future::Future;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A broker that owes us an answer to a ping has this long: a link with seconds of round trip
/// and losses must not be called dead.
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Pings go out at least this often, also when the broker wants none: to notice a dead link.
const PING_EVERY_MAX: Duration = Duration::from_secs(30);
/// Something is in flight and nothing was acknowledged for this long: begin anew.
const STUCK: Duration = Duration::from_secs(30);
/// How long reading stops for want of room. Then messages are let go unacknowledged instead
/// (see `Shared::shed`), because PUBACKs that make room in the store come by the same socket.
const HOLD: Duration = Duration::from_secs(2);
/// At the end: for what is in flight to be acknowledged, and for the last bytes to leave.
const LEAVE: Duration = Duration::from_secs(1);
/// A broker that closes this soon after a delivery may do so because of it.
pub(super) const POISON_WITHIN: Duration = Duration::from_secs(10);

/// How the socket says that the broker hung up.
const HUNG_UP: [ErrorKind; 3] = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::UnexpectedEof];

/// How a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// Stop, or another configuration; the broker was told goodbye.
    Interrupted(Input),
    /// There is room again for what was let go.
    Refresh,
    Lost {
        why: String,
        /// The broker closed in a way that our packets may be to blame for.
        suspicious: bool,
    },
}

impl SessionEnd {
    pub fn lost(why: impl Into<String>) -> Self {
        Self::Lost { why: why.into(), suspicious: false }
    }

    fn suspicious(why: impl Into<String>) -> Self {
        Self::Lost { why: why.into(), suspicious: true }
    }
}

/// A delivery that was sent and not acknowledged.
#[derive(Clone, Copy, Debug)]
pub(super) struct InFlight {
    pub pkid: u16,
    pub id: DeliveryId,
    pub bytes: usize,
    pub sent: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Bytes for the writer. Parts that add more than acknowledgements wait until it is small.
    pub out: BytesMut,
    /// At most `Session::window`, in the order in which they were sent.
    pub in_flight: VecDeque<InFlight>,
    pub in_flight_bytes: usize,
    /// Acknowledged, and not yet deleted.
    pub acked: Vec<DeliveryId>,
    /// Being deleted.
    pub deleting: Vec<DeliveryId>,
    /// Bytes of what was acknowledged or refused, not counted in the store yet.
    pub uncounted: u64,
    /// The day's sum, as the store last said; asked for where a day has a cap.
    pub spent: Option<u64>,
    /// Nothing more goes today, which was said.
    pub capped: bool,
    /// Refused for good, with the reason.
    pub refused: Vec<(DeliveryId, u8)>,
    /// The broker's quota is exceeded: from these deliveries on, again and later. At most the window.
    pub again: Vec<DeliveryId>,
    pub pubacks: u64,
    /// When a delivery was last acknowledged, or sent with nothing else in flight.
    pub moved: Duration,
    pub heard: Duration,
    pub sent: Duration,
    /// The reader waits for room: silence is ours then, not the broker's.
    holding: bool,
    /// Messages are let go, unacknowledged; the broker sends them again on the next connection.
    shed: bool,
    /// One of them was QoS 1: when there is room, begin anew to get it.
    missed: bool,
    /// Nothing new is begun.
    pub leaving: bool,
    /// The writer closes when all is written.
    goodbye: bool,
    last_pkid: u16,
}

pub(super) struct Session<'a> {
    pub link: &'a Link,
    pub to: &'a Endpoint,
    pub greeting: Greeting,
    pub encoder: Encoder,
    pub mode: Mode,
    generation: u64,
    /// So many deliveries go one by one, each after the last one's acknowledgement.
    pub probe: u64,
    shared: Mutex<Shared>,
    publish_limit: AtomicU64,
    /// There are bytes to write.
    write: Wake,
    /// There may be room in the window.
    pub drain: Wake,
    pub delete: Wake,
    closed: Wake,
    pub subscribed: (Sender<Received>, Receiver<Received>),
}

impl<'a> Session<'a> {
    pub fn new(link: &'a Link, to: &'a Endpoint, greeting: Greeting, generation: u64, probe: u64) -> Self {
        let encoder = Encoder { version: greeting.version, packet_bytes_max: greeting.packet_bytes_max };
        let mode = mode(link.target, to.format, greeting.version == Version::V5);
        let now = link.clock.monotonic();
        let shared = Shared { moved: now, heard: now, sent: now, ..Shared::default() };
        Self {
            link,
            to,
            greeting,
            encoder,
            mode,
            generation,
            probe,
            shared: Mutex::new(shared),
            publish_limit: AtomicU64::new(link.routes.get().payload_bytes_max(link.target)),
            write: Wake::new(),
            drain: Wake::new(),
            delete: Wake::new(),
            closed: Wake::new(),
            // The subscriber asks a batch of questions at a time; a broker that answers more is wrong.
            subscribed: smol::channel::bounded(super::subscribe::BATCH),
        }
    }

    pub async fn run(
        &self,
        reader: Reader,
        writer: Writer,
        interrupt: impl Future<Output = Input>,
    ) -> SessionEnd {
        let wire = or(self.read(reader), self.write(writer));
        let outbox = or(self.drain(), self.delete());
        let rest = or(self.acknowledge(), or(self.subscribe(), self.keep()));
        or(or(wire, self.leave(interrupt)), or(outbox, rest)).await
    }

    /// Settles with the store what the session still knew. Returns how many deliveries the next
    /// session should send one by one, if this one could tell, and whether one was found to be poison.
    pub async fn finish(&self, end: &SessionEnd) -> (Option<u64>, bool) {
        let (mut delivered, refused, in_flight, pubacks, bytes) = {
            let mut shared = self.shared();
            let mut delivered = std::mem::take(&mut shared.deleting);
            delivered.append(&mut shared.acked);
            let refused = std::mem::take(&mut shared.refused);
            // What is in flight goes again, and has cost all the same.
            let bytes = std::mem::take(&mut shared.uncounted) + shared.in_flight_bytes as u64;
            (delivered, refused, std::mem::take(&mut shared.in_flight), shared.pubacks, bytes)
        };
        delivered.sort_unstable();
        let counts = bytes > 0 && self.to.limits.bytes_per_day > 0;
        if (counts || !delivered.is_empty())
            && let Err(error) = self.delivered(delivered, bytes).await
        {
            tracing::warn!(link = name(self.link.target), %error, "acknowledged deliveries will be sent again");
        }
        self.set_aside(refused).await;
        let untried = self.probe.saturating_sub(pubacks);
        let SessionEnd::Lost { suspicious: true, why } = end else {
            return ((pubacks > 0).then_some(untried), false);
        };
        let now = self.link.clock.monotonic();
        let fresh = |first: &&InFlight| now.saturating_sub(first.sent) < POISON_WITHIN;
        let Some(first) = in_flight.front().filter(fresh) else { return (None, false) };
        let found = in_flight.len() == 1 && self.lone_disconnect(first.id, why).await;
        // A broker may drop the good ones before the poison with it, unacknowledged: all of them are
        // suspects, until each has gone alone.
        let suspects = if pubacks == 0 { in_flight.len() as u64 } else { 0 };
        (Some(untried.max(suspects)), found)
    }

    pub fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn now(&self) -> Duration {
        self.link.clock.monotonic()
    }

    pub fn window(&self) -> usize {
        WINDOW.min(self.greeting.receive_max).into()
    }

    pub fn set_limit(&self, bytes: u64) {
        self.publish_limit.store(bytes, Ordering::Relaxed);
    }

    /// Adds to what will be written.
    pub fn send<T>(&self, add: impl FnOnce(&mut Shared) -> T) -> T {
        let result = add(&mut self.shared());
        self.write.wake();
        result
    }

    async fn read(&self, mut reader: Reader) -> SessionEnd {
        let end = |error: ReadError| match error {
            ReadError::Closed => SessionEnd::suspicious("the broker closed the connection"),
            // A reset is the other side's; a timeout or a missing route is the network's.
            ReadError::Io(ref source) if !HUNG_UP.contains(&source.kind()) => {
                SessionEnd::lost(crate::errors::chain(&error))
            }
            ReadError::Io(_) => SessionEnd::suspicious(crate::errors::chain(&error)),
            // What the broker sends is not our deliveries' fault.
            ReadError::Malformed(_) => SessionEnd::lost(crate::errors::chain(&error)),
        };
        loop {
            // A burst of small packets must not keep the executor from everything else.
            for _ in 0..64 {
                // Before each packet: the subscription that brings larger ones may be a moment old.
                reader.set_limit(PublishLimit(self.publish_limit.load(Ordering::Relaxed)));
                match reader.buffered() {
                    Ok(Some(packet)) => {
                        if let Err(end) = self.received(packet).await {
                            return end;
                        }
                    }
                    Ok(None) => {
                        if let Err(error) = reader.fill().await {
                            return end(error);
                        }
                        self.shared().heard = self.now();
                    }
                    Err(error) => return end(error),
                }
            }
            smol::future::yield_now().await;
        }
    }

    async fn received(&self, packet: Received) -> Result<(), SessionEnd> {
        match packet {
            Received::Publish(publish) => self.publish(publish).await,
            Received::PubAck { pkid, reason } => {
                self.puback(pkid, reason);
                Ok(())
            }
            Received::PingResp => Ok(()),
            Received::SubAck { .. } | Received::UnsubAck { .. } => {
                let answer = self.subscribed.0.try_send(packet);
                answer.map_err(|_| SessionEnd::lost("the broker acknowledges what nobody asked"))
            }
            Received::Disconnect { reason } => {
                let why = format!("the broker closed the connection: {}", reason_text(reason));
                // These speak of the broker, the session or the load, not of a packet of ours.
                let innocent =
                    matches!(reason, 0 | 0x89 | 0x8B | 0x8D | 0x8E | 0x96..=0x98 | 0x9C | 0x9D | 0x9F | 0xA0);
                Err(if innocent { SessionEnd::lost(why) } else { SessionEnd::suspicious(why) })
            }
        }
    }

    async fn publish(&self, publish: Publish) -> Result<(), SessionEnd> {
        let bytes = cost(&publish);
        let (shed, leaving) = {
            let shared = self.shared();
            (shared.shed, shared.leaving)
        };
        let permit = match self.link.room.try_take(bytes) {
            _ if shed || leaving => None,
            Some(permit) => Some(permit),
            None => {
                self.shared().holding = true;
                let late = async {
                    Timer::after(HOLD).await;
                    None
                };
                let room = async { Some(self.link.room.take(bytes).await) };
                let permit = or(room, late).await;
                let mut shared = self.shared();
                (shared.holding, shared.heard) = (false, self.now());
                permit
            }
        };
        let Some(permit) = permit else {
            if publish.qos == 0 {
                self.link.metrics.event_refused("buffer_full");
            }
            let mut shared = self.shared();
            shared.shed = true;
            shared.missed |= publish.qos > 0;
            return Ok(());
        };
        let ack = Ack { connection: self.generation, pkid: publish.pkid };
        let old_version = self.greeting.version == Version::V311;
        let incoming = Incoming { publish, old_version, ack, permit };
        // The channel has room for all that `Room` lets in.
        self.link.incoming.send(incoming).await.map_err(|_| SessionEnd::lost("neap is stopping"))
    }

    /// Tells the broker what was committed.
    async fn acknowledge(&self) -> SessionEnd {
        while let Ok(first) = self.link.acks.recv().await {
            self.send(|shared| {
                let more = std::iter::from_fn(|| self.link.acks.try_recv().ok());
                for ack in std::iter::once(first).chain(more) {
                    if ack.connection == self.generation && ack.pkid != 0 {
                        self.encoder.puback(&mut shared.out, ack.pkid);
                    }
                }
            });
        }
        // Nobody commits any more; the outbox may still drain until the link is stopped.
        std::future::pending().await
    }

    async fn write(&self, mut writer: Writer) -> SessionEnd {
        loop {
            let more = self.write.listen();
            let (mut bytes, goodbye) = {
                let mut shared = self.shared();
                (std::mem::take(&mut shared.out), shared.goodbye)
            };
            if bytes.is_empty() {
                if goodbye {
                    let _ = writer.close().await;
                    self.closed.wake();
                    return std::future::pending().await;
                }
                more.await;
                continue;
            }
            if let Err(error) = writer.write(&mut bytes).await {
                let why = format!("write to the broker: {error}");
                let hung_up = HUNG_UP.contains(&error.kind());
                return if hung_up { SessionEnd::suspicious(why) } else { SessionEnd::lost(why) };
            }
            self.shared().sent = self.now();
            self.drain.wake();
        }
    }

    /// Pings, and notices when nothing moves.
    async fn keep(&self) -> SessionEnd {
        let every = match self.greeting.keep_alive {
            Duration::ZERO => PING_EVERY_MAX,
            given => (given / 2).min(PING_EVERY_MAX),
        };
        let tick = (every / 2).clamp(Duration::from_millis(250), Duration::from_secs(5));
        let mut pinged: Option<Duration> = None;
        loop {
            Timer::after(tick).await;
            let now = self.now();
            let mut shared = self.shared();
            if shared.holding {
                pinged = pinged.map(|_| now);
                shared.moved = now;
            }
            if pinged.is_some_and(|at| shared.heard >= at) {
                pinged = None;
            }
            if pinged.is_some_and(|at| now.saturating_sub(at) > PING_TIMEOUT) {
                return SessionEnd::lost(format!("no answer to a ping for {} s", PING_TIMEOUT.as_secs()));
            }
            if !shared.in_flight.is_empty() && now.saturating_sub(shared.moved) > STUCK {
                return SessionEnd::lost(format!(
                    "nothing was acknowledged for {} s with deliveries in flight",
                    STUCK.as_secs()
                ));
            }
            if shared.shed && !shared.leaving && self.link.room.messages() == 0 {
                if shared.missed {
                    return SessionEnd::Refresh;
                }
                shared.shed = false;
            }
            if pinged.is_none() && now.saturating_sub(shared.sent.min(shared.heard)) >= every {
                self.encoder.ping(&mut shared.out);
                pinged = Some(now);
                drop(shared);
                self.write.wake();
            }
        }
    }

    /// Waits for a reason to leave, then leaves in order: what is in flight gets a moment, then
    /// DISCONNECT, so that the broker fires no will and frees nothing of ours too late.
    async fn leave(&self, interrupt: impl Future<Output = Input>) -> SessionEnd {
        let input = interrupt.await;
        self.shared().leaving = true;
        let quiet = async {
            loop {
                let drained = self.drain.listen();
                if self.shared().in_flight.is_empty() && self.link.room.messages() == 0 {
                    return;
                }
                let soon = async {
                    Timer::after(Duration::from_millis(20)).await;
                };
                or(drained, soon).await;
            }
        };
        let late = async {
            Timer::after(LEAVE).await;
        };
        or(quiet, late).await;
        let closed = self.closed.listen();
        self.send(|shared| {
            self.encoder.disconnect(&mut shared.out);
            shared.goodbye = true;
        });
        let late = async {
            Timer::after(LEAVE).await;
        };
        or(closed, late).await;
        SessionEnd::Interrupted(input)
    }
}

impl Shared {
    /// A packet id that nothing in flight has.
    pub fn pkid(&mut self) -> u16 {
        loop {
            self.last_pkid = self.last_pkid.checked_add(1).unwrap_or(1);
            if !self.in_flight.iter().any(|sent| sent.pkid == self.last_pkid) {
                return self.last_pkid;
            }
        }
    }
}

/// What a message takes of our memory until it is committed.
fn cost(publish: &Publish) -> usize {
    let properties: usize = publish.user_properties.iter().map(|(n, v)| n.len() + v.len() + 48).sum();
    size_of::<Incoming>() + publish.topic.len() + publish.payload.len() + properties
}
