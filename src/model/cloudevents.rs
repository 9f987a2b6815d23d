//! CloudEvents in structured mode (JSON format 1.0.2), however they came: the members of one
//! JSON object, still as the text they were. So a number keeps its digits (`21.50`, or more of
//! them than a float holds), and an event takes little more memory than its bytes. And how
//! attributes are encoded as header values. Pure.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::fmt;

/// Of one event: far more than attributes have ever been registered. A member costs several
/// times its shortest text, so a payload of nothing but members is refused at this many.
const MEMBERS_MAX: usize = 128;

/// Of one batch: each costs memory beside its bytes, so a body of nothing but brackets is
/// refused at this many.
pub const BATCH_MAX: usize = 1_000;

/// One event's members, borrowed from its bytes.
#[derive(Debug)]
pub struct Structured<'a>(BTreeMap<String, &'a RawValue>);

/// Several events, each still as the text it was (JSON batch format 1.0.2 §4).
#[derive(Debug)]
pub struct Batch<'a>(Vec<&'a RawValue>);

impl<'a> Batch<'a> {
    pub fn parse(body: &'a [u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }

    pub fn events(&self) -> impl Iterator<Item = &'a str> {
        self.0.iter().map(|event| event.get())
    }
}

impl<'de> Deserialize<'de> for Batch<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Events;
        impl<'de> Visitor<'de> for Events {
            type Value = Batch<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                let mut events = Vec::new();
                while let Some(event) = list.next_element::<&'de RawValue>()? {
                    events.push(event);
                    if events.len() > BATCH_MAX {
                        return Err(A::Error::custom(format!("more than {BATCH_MAX} events")));
                    }
                }
                Ok(Batch(events))
            }
        }
        deserializer.deserialize_seq(Events)
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    #[error("a CloudEvent has one of data and data_base64")]
    Both,
    #[error("data_base64 is not base64")]
    NotBase64,
    #[error("data is no text")]
    NotText,
}

impl<'a> Structured<'a> {
    pub fn parse(body: &'a [u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(body)
    }

    /// All attributes but those that are null; `None` is one that is no string, number or
    /// boolean.
    pub fn attributes(&self) -> impl Iterator<Item = (&str, Option<String>)> {
        let attributes = self.0.iter().filter(|(name, _)| !matches!(name.as_str(), "data" | "data_base64"));
        attributes.filter(|(_, value)| value.get() != "null").map(|(name, value)| {
            let value = match value.get().as_bytes().first() {
                Some(b'"') => text(value),
                Some(b'{' | b'[') | None => None,
                Some(_) => Some(value.get().to_owned()),
            };
            (name.as_str(), value)
        })
    }

    /// §3.1: `data` is JSON when nothing else is said.
    pub fn content_type(&self) -> Option<String> {
        let said = self.member("datacontenttype").and_then(text);
        said.or_else(|| self.member("data").map(|_| "application/json".to_owned()))
    }

    /// §3.1.1: a string is the data itself, unless the data is said to be JSON.
    pub fn data(&self) -> Result<Vec<u8>, DataError> {
        match (self.member("data"), self.member("data_base64")) {
            (None, None) => Ok(Vec::new()),
            (Some(_), Some(_)) => Err(DataError::Both),
            (None, Some(encoded)) => {
                let encoded = text(encoded).ok_or(DataError::NotBase64)?;
                STANDARD.decode(encoded).map_err(|_| DataError::NotBase64)
            }
            (Some(data), None) => {
                let json = self.content_type().is_none_or(|kind| kind.contains("json"));
                if json || !data.get().starts_with('"') {
                    return Ok(data.get().as_bytes().to_vec());
                }
                text(data).map(String::into_bytes).ok_or(DataError::NotText)
            }
        }
    }

    /// One that is there and not null, which means the same as not there (§2.2).
    fn member(&self, name: &str) -> Option<&'a RawValue> {
        self.0.get(name).copied().filter(|value| value.get() != "null")
    }
}

fn text(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok()
}

impl<'de> Deserialize<'de> for Structured<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Structured<'de>;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    members.insert(name, value);
                    if members.len() > MEMBERS_MAX {
                        return Err(A::Error::custom(format!("more than {MEMBERS_MAX} members")));
                    }
                }
                Ok(Structured(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Percent-decoding; `None` when what comes out is not UTF-8. A `%` without two digits stays.
pub fn decode(text: &str) -> Option<String> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(bytes.get(at + 1)), digit(bytes.get(at + 2))) {
            (b'%', Some(high), Some(low)) => {
                plain.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(plain).ok()
}

/// As the CloudEvents HTTP binding §3.1.3.2 has it for header values: space, `"`, `%` and all
/// that is not printable ASCII.
pub fn encode(text: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && byte != b'"' && byte != b'%' {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(json: &str) -> Result<Vec<u8>, DataError> {
        Structured::parse(json.as_bytes()).expect("an object").data()
    }

    #[test]
    fn numbers_keep_their_digits() {
        let json = br#"{"n":123456789012345678901234567890,"t":21.50,"data":{"v": 21.50, "big":18446744073709551617}}"#;
        let event = Structured::parse(json).expect("an object");

        let attributes: Vec<_> =
            event.attributes().map(|(name, value)| (name, value.unwrap_or_default())).collect();
        assert_eq!(
            attributes,
            [("n", "123456789012345678901234567890".to_owned()), ("t", "21.50".to_owned())]
        );
        assert_eq!(event.data().as_deref(), Ok(br#"{"v": 21.50, "big":18446744073709551617}"#.as_slice()));
    }

    #[test]
    fn text_is_the_data_itself_unless_it_is_json() {
        assert_eq!(data(r#"{"data":"a\n"}"#).as_deref(), Ok(br#""a\n""#.as_slice()));
        assert_eq!(
            data(r#"{"datacontenttype":"text/plain","data":"a\n"}"#).as_deref(),
            Ok(b"a\n".as_slice())
        );
        assert_eq!(data(r#"{"datacontenttype":"text/plain","data":7}"#).as_deref(), Ok(b"7".as_slice()));
        assert_eq!(data(r#"{"data":null,"data_base64":"/w=="}"#).as_deref(), Ok(b"\xff".as_slice()));
        assert_eq!(data(r#"{"data":1,"data_base64":"/w=="}"#), Err(DataError::Both));
        assert_eq!(data(r#"{"data_base64":7}"#), Err(DataError::NotBase64));
        assert_eq!(data(r#"{"datacontenttype":"text/plain","data":"\ud800"}"#), Err(DataError::NotText));
    }

    #[test]
    fn members_are_bounded_and_what_is_in_the_data_is_not_counted() {
        let list = |count: usize| (0..count).map(|n| format!("\"m{n}\":1")).collect::<Vec<_>>().join(",");

        assert!(Structured::parse(format!("{{{}}}", list(MEMBERS_MAX)).as_bytes()).is_ok());
        assert!(Structured::parse(format!("{{{}}}", list(MEMBERS_MAX + 1)).as_bytes()).is_err());
        assert!(Structured::parse(format!("{{\"data\":{{{}}}}}", list(1000)).as_bytes()).is_ok());
        assert!(Structured::parse(b"[]").is_err());
    }
}
