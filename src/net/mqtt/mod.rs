//! The MQTT wire: one connection to one broker, as a client, 3.1.1 or 5, QoS 0 and 1.
//!
//! `connect` ends with the broker's greeting; then a `Reader` and a `Writer` are driven by
//! whoever owns the link. There is no session here, no retry and no memory beyond one
//! connection: what is owed stands in the store, what is subscribed is the owner's to know.
//!
//! Packets are rumqttc's codec behind a guard of our own (`decode`, `encode`). Its event loop
//! stays unused: that one drops queued messages when a broker has lost the session.
//!
//! Bounds: a PUBLISH is buffered up to `PublishLimit`; what is larger is read past, and its
//! topic, packet id and the head of its payload are all that is kept (`Publish::cut`). We do
//! not announce a Maximum Packet Size on MQTT 5: a broker that knows it throws larger messages
//! away without a word (MQTT 5.0 §3.1.2.11.4), and nobody would learn that they were lost.

mod connection;
mod decode;
mod encode;
mod properties;

pub use connection::{ConnectError, Connection, Options, ReadError, Reader, Writer, connect};
pub use decode::{Decoder, Malformed, PublishLimit};
pub use encode::{EncodeError, Encoder, Outgoing, SubscribeFilter};

use std::fmt;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    V311,
    V5,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V311 => "3.1.1",
            Self::V5 => "5",
        })
    }
}

/// What the broker said in its CONNACK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    pub version: Version,
    /// The broker still has our subscriptions and what it owes us.
    pub session_present: bool,
    /// How many of our QoS 1 messages may be unacknowledged at once. 65,535 when not given.
    pub receive_max: u16,
    /// The broker's largest packet; `None`: MQTT's own limit.
    pub packet_bytes_max: Option<u32>,
    /// The broker's wish goes over ours; zero: no keep-alive.
    pub keep_alive: Duration,
    pub shared_available: bool,
    pub wildcard_available: bool,
    pub identifiers_available: bool,
}

/// The identifier that a filter is subscribed with (MQTT 5.0 §3.8.2.1.2), 1 to 268,435,455: the
/// same for the same filter at any time, because sessions and what is queued in them outlive us.
pub fn subscription_identifier(filter: &str) -> u32 {
    // FNV-1a. Two filters that share one may give a message twice, no worse.
    let hash =
        filter.bytes().fold(0x811C_9DC5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    hash % 268_435_455 + 1
}

/// A message from the broker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Publish {
    pub topic: String,
    /// 0 or 1.
    pub qos: u8,
    /// Zero for QoS 0.
    pub pkid: u16,
    pub retain: bool,
    pub payload: Vec<u8>,
    /// `Some(whole length)` when the payload was larger than the limit: `payload` is its head.
    pub cut: Option<u64>,
    /// MQTT 5.
    pub content_type: Option<String>,
    /// MQTT 5: Message Expiry Interval.
    pub expires: Option<Duration>,
    /// MQTT 5: the identifiers of the subscriptions that this copy is for; empty when the
    /// broker gives none.
    pub subscriptions: Vec<u32>,
    /// MQTT 5, in the order in which they came.
    pub user_properties: Vec<(String, String)>,
}

/// A packet from the broker, after its greeting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Publish(Publish),
    /// `reason` is 0 on MQTT 3.1.1.
    PubAck {
        pkid: u16,
        reason: u8,
    },
    /// One code for each filter: the granted QoS, or from 0x80 up a refusal.
    SubAck {
        pkid: u16,
        codes: Vec<u8>,
    },
    UnsubAck {
        pkid: u16,
    },
    PingResp,
    /// MQTT 5: the broker says why it closes.
    Disconnect {
        reason: u8,
    },
}

/// A reason code in words (MQTT 5.0 §2.4), for logs and for what a person reads.
pub fn reason_text(code: u8) -> &'static str {
    match code {
        0x00 => "success",
        0x10 => "no matching subscribers",
        0x80 => "unspecified error",
        0x81 => "malformed packet",
        0x82 => "protocol error",
        0x83 => "implementation specific error",
        0x84 => "unsupported protocol version",
        0x85 => "client identifier not valid",
        0x86 => "bad user name or password",
        0x87 => "not authorized",
        0x88 => "server unavailable",
        0x89 => "server busy",
        0x8A => "banned",
        0x8B => "server shutting down",
        0x8C => "bad authentication method",
        0x8D => "keep alive timeout",
        0x8E => "session taken over by another client with the same client id",
        0x8F => "topic filter invalid",
        0x90 => "topic name invalid",
        0x91 => "packet identifier in use",
        0x93 => "receive maximum exceeded",
        0x95 => "packet too large",
        0x96 => "message rate too high",
        0x97 => "quota exceeded",
        0x98 => "administrative action",
        0x99 => "payload format invalid",
        0x9B => "QoS not supported",
        0x9C => "use another server",
        0x9D => "server moved",
        0x9E => "shared subscriptions not supported",
        0x9F => "connection rate exceeded",
        0xA0 => "maximum connect time",
        0xA1 => "subscription identifiers not supported",
        0xA2 => "wildcard subscriptions not supported",
        _ => "unknown reason",
    }
}
