//! Names and numbers that identify things. Parsed once at the border, trusted afterwards.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A function's name: `[a-z0-9]([-a-z0-9]*[a-z0-9])?`, at most 63 bytes (a DNS label).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct FunctionName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a function's name is 1 to 63 of a-z, 0-9 and -, and neither starts nor ends with -; got {0:?}")]
pub struct BadFunctionName(pub String);

impl FunctionName {
    pub fn parse(text: &str) -> Result<Self, BadFunctionName> {
        let bytes = text.as_bytes();
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let good = (1..=63).contains(&bytes.len())
            && bytes.iter().all(inner)
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-';
        if good { Ok(Self(text.to_owned())) } else { Err(BadFunctionName(text.chars().take(80).collect())) }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for FunctionName {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A CloudEvents `id`: unique together with the event's source. Ours are 32 hex digits of
/// randomness; a sender's own are kept as they came (1 to 256 bytes, no control characters).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventId(String);

impl EventId {
    pub const BYTES_MAX: usize = 256;

    /// From randomness that the caller brings, so that this layer stays pure.
    pub fn from_random(bytes: [u8; 16]) -> Self {
        use fmt::Write;
        let mut text = String::with_capacity(32);
        for byte in bytes {
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// A sender's own id; `None` when it is empty, too long or has control characters.
    pub fn parse(text: &str) -> Option<Self> {
        let good = (1..=Self::BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
        good.then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub i64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// The order in which events were committed on this node; never reused.
    EventSeq
);
number!(
    /// One invocation in the inbox.
    InvocationId
);
number!(
    /// One delivery in the outbox; also its order.
    DeliveryId
);
