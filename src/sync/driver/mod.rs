//! Owns the link to one broker: connects when `sync::link` says so, runs one session after the
//! other, tells everyone how the link is.
//!
//! ```text
//!   sync::link (decides) ──▶ net::mqtt::connect ──▶ session ─┬─ reader      ─▶ Incoming ─▶ ingress::mqtt
//!        ▲                                                   ├─ acknowledger ◀── Ack ◀──────┘
//!        └────────────── how it ended ◀──────────────────────┼─ drainer, deleter ◀─▶ store (outbox)
//!                                                            ├─ subscriber ◀── Routes
//!                                                            ├─ keeper: pings, watchdogs
//!                                                            └─ writer
//! ```
//!
//! The parts of a session run side by side in one task, so that none waits for another: pings
//! go out while a commit takes its time, deliveries are drained while messages are held back.
//! The first part that ends ends the session; the rows of the outbox are the only truth about
//! what is owed, and each session begins from them again.

pub mod callbacks;
mod drain;
pub mod https;
mod outbox;
mod session;
mod subscribe;

use crate::channels::{Ack, Incoming, Room};
use crate::config::{Broker, Format, MqttVersion, Order, UplinkLimits};
use crate::errors;
use crate::ingress::routes::Routes;
use crate::model::api::LinkStatus;
use crate::model::{Clock, Target};
use crate::net::mqtt::{self, ConnectError, Connection};
use crate::store::Store;
use crate::sync::link::{self, Effect, End, Input, Refusal, State};
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use futures_lite::future::or;
use session::{Session, SessionEnd};
use smol::channel::{Receiver, Sender};
use std::sync::Arc;
use std::time::Duration;

/// QoS 1 deliveries that we send unacknowledged: enough to hide a round trip of a good link, and
/// few to send again when it breaks.
const WINDOW: u16 = 64;
/// QoS 1 messages that a broker of MQTT 5 may send unacknowledged: as many as may be under way
/// to the store. Brokers overrun it, so no memory depends on it.
const RECEIVE_MAX: u16 = 256;

/// A broker and how to speak to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub broker: Broker,
    /// Of the uplink; the local broker gets `Format::Auto`, which is raw data there.
    pub format: Format,
    pub order: Order,
    pub live_percent: u8,
    /// Of the uplink.
    pub limits: UplinkLimits,
}

/// What a link is made of. Every field is a handle.
pub struct Link {
    pub target: Target,
    /// `None`: the link is off. A new value takes effect at once, the same value does nothing.
    pub endpoint: Watch<Option<Endpoint>>,
    pub store: Store,
    pub routes: Watch<Routes>,
    /// Woken when there may be new deliveries; looked at every 5 s besides.
    pub owed: Wake,
    pub incoming: Sender<Incoming>,
    pub acks: Receiver<Ack>,
    pub room: Room,
    pub status: Watch<LinkStatus>,
    pub metrics: Metrics,
    pub clock: Arc<dyn Clock>,
    /// True: leave the broker cleanly and end.
    pub stop: Watch<bool>,
}

/// What one session leaves for the next.
#[derive(Debug, Default)]
struct Memory {
    connections: u64,
    /// The broker closed on us without acknowledging anything: one of these that were in flight may
    /// be poison to it. So many go one by one.
    probe: u64,
    /// The last session ended with a delivery that was found to be poison and set aside.
    found_poison: bool,
    last_error: Option<String>,
}

/// The status of a link before it has run.
pub fn status_off(target: Target, clock: &dyn Clock) -> LinkStatus {
    LinkStatus {
        name: name(target).to_owned(),
        url: String::new(),
        state: "off".to_owned(),
        since: clock.wall(),
        last_error: None,
        retry_in_ms: None,
    }
}

fn name(target: Target) -> &'static str {
    match target {
        Target::Local => "mqtt",
        Target::Uplink => "uplink",
        Target::Callback => "callbacks",
    }
}

impl Link {
    /// Runs until `stop` is true.
    ///
    /// Wiring, for each of `Target::Local` and `Target::Uplink`: make an `IncomingChannels`;
    /// this gets the sender of `incoming`, the receiver of `acks` and `room`; an
    /// `ingress::mqtt::Ingress` gets the other two ends. `owed` is the wake that scheduler and
    /// ingress fire when they commit a delivery. Spawn both on the daemon's executor. To stop:
    /// set `stop`, wait for this to end (it takes at most 3 s), then close the channel of
    /// messages, wait for the ingress, close the store.
    pub async fn run(self) {
        let mut machine = link::Link::default();
        let mut memory = Memory::default();
        let mut connection = None;
        let mut endpoint = self.endpoint.get();
        let mut input = Input::Configured(versions(&endpoint));
        loop {
            let before = machine.state;
            let (next, effect) = machine.step(input, self.clock.monotonic(), fastrand::u64(..));
            machine = next;
            if machine.state != before || matches!(input, Input::Configured(_)) {
                self.report(&machine.state, &endpoint, &memory);
            }
            input = match (machine.state, effect) {
                (State::Stopped, _) => return,
                (_, Effect::Connect(version)) => {
                    let interrupted = async { Err(self.interrupt(&endpoint).await) };
                    let attempt = async { Ok(self.attempt(&endpoint, version).await) };
                    match or(interrupted, attempt).await {
                        Err(input) => input,
                        Ok(Ok(made)) => {
                            connection = Some(made);
                            Input::Greeted
                        }
                        Ok(Err(refusal)) => self.failed(refusal, &mut memory),
                    }
                }
                (State::Up { .. }, _) => match (connection.take(), endpoint.as_ref()) {
                    (Some(connection), Some(to)) => {
                        let end = self.session(connection, to, &mut memory, &endpoint).await;
                        self.ended(end, &mut memory)
                    }
                    _ => Input::Ended(End::Lost),
                },
                (_, Effect::WaitUntil(until)) => {
                    let due = async {
                        smol::Timer::after(until.saturating_sub(self.clock.monotonic())).await;
                        Input::Tick
                    };
                    or(self.interrupt(&endpoint), due).await
                }
                _ => self.interrupt(&endpoint).await,
            };
            if let Input::Configured(_) = input {
                endpoint = self.endpoint.get();
                input = Input::Configured(versions(&endpoint));
                memory = Memory { connections: memory.connections, ..Memory::default() };
            }
        }
    }

    /// What a link drops everything for: the end, or another broker.
    async fn interrupt(&self, endpoint: &Option<Endpoint>) -> Input {
        let stop = async {
            let (mut seen, mut stop) = self.stop.versioned();
            while !*stop {
                (seen, stop) = self.stop.changed(seen).await;
            }
            Input::Stop
        };
        let configured = async {
            let (mut seen, mut now) = self.endpoint.versioned();
            while *now == *endpoint {
                (seen, now) = self.endpoint.changed(seen).await;
            }
            Input::Configured(None)
        };
        or(stop, configured).await
    }

    async fn attempt(
        &self,
        endpoint: &Option<Endpoint>,
        version: link::Version,
    ) -> Result<Connection, ConnectError> {
        let Some(endpoint) = endpoint else { return Err(ConnectError::ClosedOnConnect) };
        let version = match version {
            link::Version::V311 => mqtt::Version::V311,
            link::Version::V5 => mqtt::Version::V5,
        };
        let publish_limit = mqtt::PublishLimit(self.routes.get().payload_bytes_max(self.target));
        let options = mqtt::Options { version, publish_limit, receive_max: RECEIVE_MAX };
        mqtt::connect(&endpoint.broker, &options).await
    }

    fn failed(&self, error: ConnectError, memory: &mut Memory) -> Input {
        let refusal = match &error {
            ConnectError::UnsupportedVersion(_) => Refusal::UnsupportedVersion,
            ConnectError::ClosedOnConnect => Refusal::ClosedOnConnect,
            _ => Refusal::Other,
        };
        let text = errors::chain(&error);
        // A site may be offline for days: each cause is a warning once.
        if memory.last_error.as_ref() == Some(&text) {
            tracing::debug!(link = name(self.target), error = text, "could not connect");
        } else {
            tracing::warn!(link = name(self.target), error = text, "could not connect; will keep trying");
        }
        memory.last_error = Some(text);
        Input::Failed(refusal)
    }

    async fn session(
        &self,
        connection: Connection,
        to: &Endpoint,
        memory: &mut Memory,
        endpoint: &Option<Endpoint>,
    ) -> SessionEnd {
        memory.connections += 1;
        memory.last_error = None;
        let greeting = &connection.greeting;
        tracing::info!(
            link = name(self.target),
            version = %greeting.version,
            session_present = greeting.session_present,
            receive_max = greeting.receive_max,
            "link is up"
        );
        self.report_up(endpoint);
        let session = Session::new(self, to, connection.greeting.clone(), memory.connections, memory.probe);
        let end = session.run(connection.reader, connection.writer, self.interrupt(endpoint)).await;
        let (probe, found) = session.finish(&end).await;
        memory.found_poison = found;
        memory.probe = probe.unwrap_or(memory.probe);
        end
    }

    fn ended(&self, end: SessionEnd, memory: &mut Memory) -> Input {
        match end {
            SessionEnd::Interrupted(input) => input,
            SessionEnd::Refresh => {
                tracing::info!(
                    link = name(self.target),
                    "there is room again; asking for what was held back"
                );
                Input::Ended(End::Refresh)
            }
            SessionEnd::Lost { why, .. } => {
                tracing::warn!(link = name(self.target), error = why, "link is down");
                memory.last_error = Some(why);
                let found = std::mem::take(&mut memory.found_poison);
                Input::Ended(if found { End::Progress } else { End::Lost })
            }
        }
    }

    fn report(&self, state: &State, endpoint: &Option<Endpoint>, memory: &Memory) {
        let retry = match state {
            State::Waiting { until } => Some(until.saturating_sub(self.clock.monotonic())),
            _ => None,
        };
        let state = match state {
            State::Off | State::Stopped => "off",
            State::Waiting { .. } => "waiting",
            State::Connecting { .. } => "connecting",
            State::Up { .. } => return, // reported when the session begins
        };
        self.set_status(state, endpoint, memory.last_error.clone(), retry);
    }

    /// The link is up, but not all is well.
    fn complain(&self, error: String) {
        let status = LinkStatus { last_error: Some(error), ..(*self.status.get()).clone() };
        self.status.set(status);
    }

    /// All is well again.
    fn recovered(&self) {
        let status = LinkStatus { last_error: None, ..(*self.status.get()).clone() };
        self.status.set(status);
    }

    fn report_up(&self, endpoint: &Option<Endpoint>) {
        self.set_status("up", endpoint, None, None);
    }

    fn set_status(
        &self,
        state: &str,
        endpoint: &Option<Endpoint>,
        last_error: Option<String>,
        retry: Option<Duration>,
    ) {
        let url = endpoint.as_ref().map(|e| {
            let scheme = if e.broker.tls.is_some() { "mqtts" } else { "mqtt" };
            let host = &e.broker.host;
            let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
            format!("{scheme}://{open}{host}{close}:{}", e.broker.port)
        });
        // An attempt that fails is no news: a link is down since it was last up.
        let down = |state: &str| matches!(state, "waiting" | "connecting");
        let before = self.status.get();
        let same = before.state == state || (down(&before.state) && down(state));
        self.status.set(LinkStatus {
            name: name(self.target).to_owned(),
            url: url.unwrap_or_default(),
            state: state.to_owned(),
            since: if same { before.since } else { self.clock.wall() },
            last_error,
            retry_in_ms: retry.map(|d| d.as_millis() as u64),
        });
    }
}

fn versions(endpoint: &Option<Endpoint>) -> Option<link::Versions> {
    endpoint.as_ref().map(|endpoint| match endpoint.broker.version {
        MqttVersion::Auto => link::Versions::Auto,
        MqttVersion::V311 => link::Versions::Only(link::Version::V311),
        MqttVersion::V5 => link::Versions::Only(link::Version::V5),
    })
}
