//! What a delivery looks like on the wire (CloudEvents MQTT binding 1.0.2). Pure.
//!
//! MQTT 5: binary mode, always: the payload is the data alone, and the attributes are user
//! properties beside it, so "raw" and CloudEvents differ in nothing that a reader of the data
//! sees, and the id for deduplication is always there. MQTT 3.1.1 has no place beside the
//! payload: structured JSON, or with `raw` the data alone, without an id.

use crate::config::Format;
use crate::model::event::TOPIC_EXTENSION;
use crate::model::{Event, Target};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::borrow::Cow;

pub const STRUCTURED: &str = "application/cloudevents+json";

/// What it borrows is the event's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Envelope<'a> {
    pub payload: Cow<'a, [u8]>,
    pub content_type: Option<&'a str>,
    pub attributes: Vec<(&'a str, Cow<'a, str>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Binary,
    Structured,
    Raw,
}

/// Actuators on site speak no CloudEvents: the local broker gets the data as it is.
pub fn mode(target: Target, format: Format, properties: bool) -> Mode {
    match (properties, target, format) {
        (true, _, _) => Mode::Binary,
        (false, Target::Uplink, Format::Auto) => Mode::Structured,
        (false, _, _) => Mode::Raw,
    }
}

pub fn envelope(event: &Event, mode: Mode) -> Envelope<'_> {
    let data = Cow::from(&event.data);
    match mode {
        Mode::Raw => Envelope { payload: data, ..Envelope::default() },
        Mode::Structured => Envelope { payload: structured(event).into(), ..Envelope::default() },
        Mode::Binary => {
            let content_type = event.content_type.as_deref();
            Envelope { payload: data, content_type, attributes: attributes(event) }
        }
    }
}

/// For a receiver that has no topics: the topic is one more attribute.
pub fn structured_with_topic(event: &Event, topic: &str) -> Vec<u8> {
    let mut event = event.clone();
    event.extensions.insert(TOPIC_EXTENSION.to_owned(), topic.to_owned());
    structured(&event)
}

/// All but `datacontenttype`, which has a place of its own in both modes.
fn attributes(event: &Event) -> Vec<(&str, Cow<'_, str>)> {
    let mut attributes: Vec<(&str, Cow<'_, str>)> = Vec::with_capacity(6 + event.extensions.len());
    attributes.extend([
        ("specversion", "1.0".into()),
        ("id", event.id.as_str().into()),
        ("source", Cow::from(&event.source)),
        ("type", Cow::from(&event.kind)),
    ]);
    if let Some(subject) = &event.subject {
        attributes.push(("subject", subject.into()));
    }
    if let Some(time) = event.time {
        attributes.push(("time", time.rfc3339().into()));
    }
    attributes.extend(event.extensions.iter().map(|(name, value)| (name.as_str(), value.into())));
    attributes
}

/// CloudEvents JSON format 1.0.2. Data that is JSON stands there as JSON, digit for digit; text
/// as a string; anything else in base64.
fn structured(event: &Event) -> Vec<u8> {
    let mut object: Map<String, Value> =
        attributes(event).into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
    if let Some(content_type) = &event.content_type {
        object.insert("datacontenttype".to_owned(), Value::String(content_type.clone()));
    }
    let text = std::str::from_utf8(&event.data).ok();
    let json = text.filter(|_| is_json(event.content_type.as_deref()));
    let json = json.and_then(|text| serde_json::from_str::<&RawValue>(text).ok());
    let data = match (json, text) {
        _ if event.data.is_empty() => None,
        (Some(json), _) => Some(("data", json.get().to_owned())),
        (None, Some(text)) if is_text(event.content_type.as_deref()) => {
            Some(("data", Value::String(text.to_owned()).to_string()))
        }
        _ => Some(("data_base64", Value::String(STANDARD.encode(&event.data)).to_string())),
    };
    let mut body = Value::Object(object).to_string();
    if let Some((name, value)) = data {
        body.pop();
        body.push_str(",\"");
        body.push_str(name);
        body.push_str("\":");
        body.push_str(&value);
        body.push('}');
    }
    body.into_bytes()
}

/// Without a content type JSON is what the format assumes.
fn is_json(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else { return true };
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || essence == "text/json" || essence.ends_with("+json")
}

fn is_text(content_type: Option<&str>) -> bool {
    content_type.is_some_and(|t| t.trim_start().to_ascii_lowercase().starts_with("text/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EventId, UnixMs};

    fn event(content_type: Option<&str>, data: &[u8]) -> Event {
        Event {
            id: EventId::parse("id-1").expect("a good id"),
            source: "/gw/mqtt".to_owned(),
            kind: "neap.mqtt.message".to_owned(),
            subject: Some("a/b".to_owned()),
            time: Some(UnixMs(0)),
            content_type: content_type.map(str::to_owned),
            extensions: [("seq".to_owned(), "7".to_owned())].into(),
            http: None,
            data: data.to_vec(),
        }
    }

    fn json(content_type: Option<&str>, data: &[u8]) -> String {
        let event = event(content_type, data);
        String::from_utf8(envelope(&event, Mode::Structured).payload.into_owned()).expect("JSON is UTF-8")
    }

    #[test]
    fn structured_data_keeps_what_it_is() {
        assert!(json(Some("application/json"), b"{\"t\": 21.50}").ends_with(r#","data":{"t": 21.50}}"#));
        assert!(json(None, b"21.50").ends_with(r#","data":21.50}"#));
        assert!(json(Some("text/plain"), "grün".as_bytes()).ends_with(r#","data":"grün"}"#));
        assert!(json(Some("application/json"), b"{oops").ends_with(r#","data_base64":"e29vcHM="}"#));
        assert!(json(None, &[0xFF]).ends_with(r#","data_base64":"/w=="}"#));
        let empty = json(None, b"");
        assert!(!empty.contains("data"), "{empty}");
        let parsed: Value = serde_json::from_str(&json(Some("text/x"), b"x")).expect("JSON");
        assert_eq!(parsed["specversion"], "1.0");
        assert_eq!(parsed["seq"], "7");
        assert_eq!(parsed["time"], "1970-01-01T00:00:00.000Z");
        assert_eq!(parsed["datacontenttype"], "text/x");
    }

    #[test]
    fn properties_carry_attributes_and_leave_the_data_alone() {
        let event = event(Some("text/x"), b"x");

        let envelope = envelope(&event, Mode::Binary);

        assert_eq!(&*envelope.payload, b"x");
        assert_eq!(envelope.content_type, Some("text/x"));
        let names: Vec<&str> = envelope.attributes.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["specversion", "id", "source", "type", "subject", "time", "seq"]);
    }

    #[test]
    fn actuators_on_site_get_the_data_alone() {
        assert_eq!(mode(Target::Local, Format::Auto, false), Mode::Raw);
        assert_eq!(mode(Target::Local, Format::Auto, true), Mode::Binary);
        assert_eq!(mode(Target::Uplink, Format::Auto, false), Mode::Structured);
        assert_eq!(mode(Target::Uplink, Format::Raw, false), Mode::Raw);
    }
}
