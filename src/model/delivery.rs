//! A delivery: an event owed to a broker, kept in the outbox until the broker has acknowledged it.

use super::{DeliveryId, Event, FunctionName, Lane};
use serde::{Deserialize, Serialize};

/// Which broker a delivery is owed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// `[uplink]`, the remote side.
    Uplink,
    /// `[mqtt]`, the broker on site: sensor → function → actuator without a cloud.
    Local,
    /// Whoever asked for an asynchronous call's result; the topic is the URL.
    Callback,
}

impl Target {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Local => "local",
            Self::Callback => "callback",
        }
    }
}

/// What is to be added to the outbox. Its event's id stays the same for every attempt, so that
/// a receiver can deduplicate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewDelivery {
    pub target: Target,
    pub lane: Lane,
    /// The function whose output this is; `None` for `[[forward]]`.
    pub function: Option<FunctionName>,
    /// The full topic, placeholders filled in.
    pub topic: String,
    pub event: Event,
}

/// An entry of the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub id: DeliveryId,
    pub body: NewDelivery,
    /// It has waited in the outbox while its broker was away, or comes again after it was dead:
    /// late and perhaps out of order, which its receiver is told (`neapreplayed`).
    pub replayed: bool,
    /// Connections that ended while this delivery was alone in flight (three make it dead).
    pub lone_disconnects: u32,
}
