//! An event: an immutable fact that arrived, with the attributes of CloudEvents 1.0.

use super::{EventId, UnixMs};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// CloudEvents 1.0 attributes and data. `data` is opaque bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub id: EventId,
    /// URI reference, for example `/gw-042/mqtt`.
    pub source: String,
    /// For example `neap.mqtt.message`.
    pub kind: String,
    /// For MQTT the topic, for HTTP the path.
    pub subject: Option<String>,
    /// When it happened as far as this node knows; `None` when nobody said.
    pub time: Option<UnixMs>,
    pub content_type: Option<String>,
    /// CloudEvents extension attributes: names `[a-z0-9]{1,20}`.
    pub extensions: BTreeMap<String, String>,
    /// Set when the event came as an HTTP request.
    pub http: Option<HttpRequest>,
    pub data: Vec<u8>,
}

/// The parts of an HTTP request that a function may want to see, bounded by the HTTP layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpRequest {
    pub method: String,
    /// The path behind the function's prefix, beginning with `/`.
    pub path: String,
    /// Without the `?`; empty when there is none.
    pub query: String,
    /// Lower-case names; values that were not UTF-8 are left out by the HTTP layer.
    pub headers: Vec<(String, String)>,
}

pub const TYPE_MQTT: &str = "neap.mqtt.message";
pub const TYPE_HTTP: &str = "neap.http.request";
pub const TYPE_CRON: &str = "neap.cron.tick";
/// What a successful outcome's output becomes when no `type` is given for it.
pub const TYPE_OUTPUT: &str = "neap.function.output";

/// How often an output that became an event may do so again before the chain is cut:
/// two functions that feed each other must not fill a gateway. The extension counts it.
pub const CHAIN_MAX: u32 = 16;
pub const CHAIN_EXTENSION: &str = "neapchain";

/// Which input an output came from: the CloudEvents id of the event that was handled.
pub const CAUSE_EXTENSION: &str = "neapcause";

/// Set on the event of a dead letter whose data was too large to keep: the whole size, in bytes.
/// What is left is a head for people; no function is ever run on it.
pub const CUT_EXTENSION: &str = "neapcut";

/// Where a delivery would have gone by MQTT, for receivers that have no topics.
pub const TOPIC_EXTENSION: &str = "neaptopic";

/// Set to `true` on what is sent late: it waited while the uplink was away.
pub const REPLAYED_EXTENSION: &str = "neapreplayed";

/// What this node's clock had to do with `time`: `uncertain`, it said less than is possible, and
/// no time is given; `corrected`, the clock came to be right and the time was worked out from
/// how long ago it was. Left out: the clock could be believed, or the time is the sender's own.
pub const CLOCK_EXTENSION: &str = "neapclock";
const UNCERTAIN: &str = "uncertain";
const CORRECTED: &str = "corrected";

/// What an output is, when nobody says: JSON objects and arrays, UTF-8 text, else bytes.
pub fn guess_content_type(data: &[u8]) -> &'static str {
    let is_json = || serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok();
    match data.iter().find(|b| !b.is_ascii_whitespace()) {
        Some(b'{' | b'[') if is_json() => "application/json",
        _ if std::str::from_utf8(data).is_ok() => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

impl Event {
    /// Its time is this node's, whose clock can't be right.
    pub fn doubt_time(&mut self) {
        self.time = None;
        self.extensions.insert(CLOCK_EXTENSION.to_owned(), UNCERTAIN.to_owned());
    }

    /// Gives a doubted event the time that the clock, right by now, says it was: it arrived
    /// `age` ago.
    pub fn correct_time(&mut self, wall: UnixMs, age: std::time::Duration) {
        let doubted = self.time.is_none()
            && self.extensions.get(CLOCK_EXTENSION).is_some_and(|clock| clock == UNCERTAIN);
        let age = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
        let time = UnixMs(wall.0.saturating_sub(age));
        if doubted && wall.is_plausible() {
            self.time = Some(time);
            self.extensions.insert(CLOCK_EXTENSION.to_owned(), CORRECTED.to_owned());
        }
    }

    /// How many functions this event has already come through.
    pub fn chain(&self) -> u32 {
        self.extensions.get(CHAIN_EXTENSION).and_then(|n| n.parse().ok()).unwrap_or(0)
    }
}

/// Request headers that mean something on their own connection only (RFC 9110 §7.6.1), and
/// `expect`, which is settled before the body is read.
pub const OF_A_CONNECTION: [&str; 9] = [
    "connection",
    "expect",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubted_time_is_worked_out_once_the_clock_is_right() {
        let mut event = Event {
            id: EventId::from_random([0; 16]),
            source: "/gw/mqtt".into(),
            kind: TYPE_MQTT.into(),
            subject: None,
            time: Some(UnixMs(9_000)),
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data: Vec::new(),
        };
        let right = UnixMs(crate::model::time::BUILT.0 + 3_600_000);
        let (minute, own) = (std::time::Duration::from_secs(60), event.clone());

        event.correct_time(right, minute);
        assert_eq!(event, own, "nobody doubted it");
        event.doubt_time();
        event.correct_time(UnixMs(10_000), minute);
        assert_eq!(event.time, None);
        assert_eq!(event.extensions.get(CLOCK_EXTENSION).map(String::as_str), Some("uncertain"));
        event.correct_time(right, minute);
        event.correct_time(UnixMs(right.0 + 5), minute);

        assert_eq!(event.time, Some(UnixMs(right.0 - 60_000)));
        assert_eq!(event.extensions.get(CLOCK_EXTENSION).map(String::as_str), Some("corrected"));
    }

    #[test]
    fn outputs_are_told_apart_by_what_they_are() {
        assert_eq!(guess_content_type(b" {\"a\":1}\n"), "application/json");
        assert_eq!(guess_content_type(b"[1]"), "application/json");
        assert_eq!(guess_content_type(b"{not json"), "text/plain; charset=utf-8");
        assert_eq!(guess_content_type(b"21.5"), "text/plain; charset=utf-8");
        assert_eq!(guess_content_type(b"\xff\x00"), "application/octet-stream");
    }
}
