//! An event as the HTTP request that a function gets, and its answer's head as attributes of the
//! event that it makes. Pure.
//!
//! - A plain HTTP request goes on as it came: method, path, query, headers.
//! - Any other event goes in CloudEvents binary mode (HTTP binding 1.0.2 §3.1): attributes as
//!   `ce-…` headers, data as the body, `POST`, to `/` unless it came with a path of its own.
//!
//! A connection's own headers (RFC 9110 §7.6.1) go no further either way, but for `trailer`,
//! which announces what is passed on, and `te: trailers`, which asks for it.

use crate::model::cloudevents::{decode, encode};
use crate::model::event::{OF_A_CONNECTION, TYPE_HTTP};
use crate::model::{Event, EventId, UnixMs};
use std::collections::BTreeMap;
use std::time::Duration;

/// Method, target and header lines; names are lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    pub method: String,
    /// Path and query, percent-encoded.
    pub target: String,
    pub headers: Vec<(String, Vec<u8>)>,
}

impl Head {
    pub fn get(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(n, _)| n == name)?;
        std::str::from_utf8(value).ok()
    }

    /// Replaces all lines of that name. What can't be in a header is percent-encoded.
    pub fn set(&mut self, name: &str, value: &str) {
        self.headers.retain(|(n, _)| n != name);
        let good = value.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        let value = if good { value.trim().to_owned() } else { encode(value) };
        self.headers.push((name.to_owned(), value.into_bytes()));
    }

    pub fn set_if_absent(&mut self, name: &str, value: &str) {
        if !self.headers.iter().any(|(n, _)| n == name) {
            self.set(name, value);
        }
    }

    /// Takes out what belongs to the connection that it came by.
    pub fn leave_connection(&mut self) {
        let trailers =
            self.get("te").is_some_and(|te| te.split(',').any(|t| t.trim().eq_ignore_ascii_case("trailers")));
        leave_connection(&mut self.headers);
        if trailers {
            self.headers.push(("te".to_owned(), b"trailers".to_vec()));
        }
    }
}

/// What a function goes by: a caller may not have it taken out by naming it in `Connection`.
const OF_THE_MESSAGE: [&str; 8] = [
    "content-type",
    "forwarded",
    "host",
    "traceparent",
    "x-call-id",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
];

/// Drops hop-by-hop lines and those that `Connection` names.
pub fn leave_connection(headers: &mut Vec<(String, Vec<u8>)>) {
    let lists = headers.iter().filter(|(name, _)| name == "connection");
    let named: Vec<String> = lists
        .flat_map(|(_, list)| {
            let list = String::from_utf8_lossy(list).to_ascii_lowercase();
            list.split(',').map(|name| name.trim().to_owned()).collect::<Vec<_>>()
        })
        .filter(|name| !OF_THE_MESSAGE.contains(&name.as_str()))
        .collect();
    headers.retain(|(name, _)| !OF_A_CONNECTION.contains(&name.as_str()) && !named.contains(name));
}

/// The request that a stored event becomes; its data is the body.
pub fn head(event: &Event, host: &str) -> Head {
    let mut head = match &event.http {
        Some(http) => {
            let query = if http.query.is_empty() { String::new() } else { format!("?{}", http.query) };
            let lines = http.headers.iter().map(|(name, value)| (name.clone(), value.clone().into_bytes()));
            Head {
                method: http.method.clone(),
                target: encode_path(&http.path) + &query,
                headers: lines.collect(),
            }
        }
        None => Head { method: "POST".to_owned(), target: "/".to_owned(), headers: Vec::new() },
    };
    head.leave_connection();
    head.headers.retain(|(name, _)| name != "content-length");
    if event.kind != TYPE_HTTP || event.http.is_none() {
        attributes(event, &mut head);
    }
    head.set_if_absent("host", host);
    head
}

/// CloudEvents binary mode.
fn attributes(event: &Event, head: &mut Head) {
    head.headers.retain(|(name, _)| !name.starts_with("ce-") && name != "content-type");
    let mut put =
        |name: &str, value: &str| head.headers.push((format!("ce-{name}"), encode(value).into_bytes()));
    put("specversion", "1.0");
    put("id", event.id.as_str());
    put("source", &event.source);
    put("type", &event.kind);
    if let Some(subject) = &event.subject {
        put("subject", subject);
    }
    if let Some(time) = event.time {
        put("time", &time.rfc3339());
    }
    for (name, value) in &event.extensions {
        put(name, value);
    }
    if let Some(content_type) = &event.content_type {
        head.set("content-type", content_type);
    }
}

/// RFC 3986 §3.3: what a path may hold stays, the rest is percent-encoded.
fn encode_path(path: &str) -> String {
    use std::fmt::Write;
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    if encoded.starts_with('/') { encoded } else { format!("/{encoded}") }
}

/// Longest attribute that is taken from an answer: a head holds 64 KiB in all.
const ATTRIBUTE_BYTES_MAX: usize = 4096;

/// The event that an answer in binary mode is; its data is the answer's body. `None`: the answer
/// is none, or not a good one.
pub fn answered(headers: &[(String, Vec<u8>)]) -> Option<Event> {
    let mut attributes = BTreeMap::new();
    for (name, value) in headers {
        let Some(name) = name.strip_prefix("ce-") else { continue };
        let value = std::str::from_utf8(value).ok()?.trim();
        let plain = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
        let plain =
            decode(plain).filter(|plain| plain.len() <= ATTRIBUTE_BYTES_MAX && !plain.contains('\0'))?;
        attributes.insert(name.to_owned(), plain);
    }
    if attributes.remove("specversion")? != "1.0" {
        return None;
    }
    let id = EventId::parse(&attributes.remove("id")?)?;
    let mut required =
        |name: &str| attributes.remove(name).filter(|v| !v.is_empty() && !v.chars().any(char::is_control));
    let (source, kind) = (required("source")?, required("type")?);
    let subject = attributes.remove("subject").filter(|subject| !subject.is_empty());
    let time = attributes.remove("time").and_then(|text| text.parse::<jiff::Timestamp>().ok());
    for name in ["datacontenttype", "dataschema"] {
        attributes.remove(name);
    }
    let good = |name: &String| {
        (1..=20).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    attributes.retain(|name, _| good(name));
    Some(Event {
        id,
        source,
        kind,
        subject,
        time: time.map(|time| UnixMs(time.as_millisecond())),
        content_type: None,
        extensions: attributes,
        http: None,
        data: Vec::new(),
    })
}

/// The longest that a function's word is taken for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(86_400);

/// `Retry-After` (RFC 9110 §10.2.3): seconds, or a date.
pub fn retry_after(value: &str, now: UnixMs) -> Option<Duration> {
    let value = value.trim();
    let wait = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds.min(RETRY_AFTER_MAX.as_secs())),
        Err(_) => {
            let date = jiff::fmt::rfc2822::parse(value).ok()?;
            let ms = date.timestamp().as_millisecond().saturating_sub(now.0);
            Duration::from_millis(u64::try_from(ms).unwrap_or(0))
        }
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// `traceparent` of a trace that begins here (W3C Trace Context, §3.2), from randomness that the
/// caller brings; sampled.
pub fn traceparent(random: [u64; 3]) -> String {
    // All zeroes is no id.
    format!("00-{:016x}{:016x}-{:016x}-01", random[0] | 1, random[1], random[2] | 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HttpRequest;

    fn event(kind: &str, http: Option<HttpRequest>) -> Event {
        Event {
            id: EventId::from_random([1; 16]),
            source: "/gw/mqtt".into(),
            kind: kind.into(),
            subject: Some("a b/\u{e9}\"%".into()),
            time: Some(UnixMs(0)),
            content_type: Some("text/plain".into()),
            extensions: [("site".to_owned(), "north".to_owned())].into(),
            http,
            data: b"21".to_vec(),
        }
    }

    fn request(path: &str, headers: &[(&str, &str)]) -> HttpRequest {
        HttpRequest {
            method: "PUT".into(),
            path: path.into(),
            query: "x=1&y".into(),
            headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        }
    }

    #[test]
    fn message_becomes_a_binary_cloudevent() {
        let head = head(&event("neap.mqtt.message", None), "f");

        assert_eq!((head.method.as_str(), head.target.as_str()), ("POST", "/"));
        assert_eq!(head.get("ce-specversion"), Some("1.0"));
        assert_eq!(head.get("ce-type"), Some("neap.mqtt.message"));
        // HTTP binding §3.1.3.2, upper-case hex.
        assert_eq!(head.get("ce-subject"), Some("a%20b/%C3%A9%22%25"));
        assert_eq!(head.get("ce-time"), Some("1970-01-01T00:00:00.000Z"));
        assert_eq!(head.get("ce-site"), Some("north"));
        assert_eq!(head.get("content-type"), Some("text/plain"));
        assert_eq!(head.get("ce-datacontenttype"), None);
        assert_eq!(head.get("host"), Some("f"));
    }

    #[test]
    fn plain_request_goes_on_as_it_came() {
        let headers =
            [("host", "h"), ("x-a", "1"), ("content-length", "2"), ("connection", "x-gone"), ("x-gone", "1")];
        let head = head(&event(TYPE_HTTP, Some(request("/caf\u{e9}/a b", &headers))), "f");

        assert_eq!((head.method.as_str(), head.target.as_str()), ("PUT", "/caf%C3%A9/a%20b?x=1&y"));
        let names: Vec<_> = head.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["host", "x-a"]);
    }

    #[test]
    fn cloudevent_that_came_over_http_keeps_its_path_and_is_binary_again() {
        let headers = [("content-type", "application/cloudevents+json"), ("ce-id", "stale")];
        let head = head(&event("door.opened", Some(request("/doors", &headers))), "f");

        assert_eq!((head.method.as_str(), head.target.as_str()), ("PUT", "/doors?x=1&y"));
        assert_eq!(head.get("ce-type"), Some("door.opened"));
        assert_ne!(head.get("ce-id"), Some("stale"));
        assert_eq!(head.get("content-type"), Some("text/plain"));
    }

    #[test]
    fn trailers_may_be_asked_for_and_nothing_else_of_a_connection_passes() {
        let line = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
        let mut head = Head {
            headers: vec![
                line("te", "gzip, trailers"),
                line("connection", "te, X-Hop, x-forwarded-for"),
                line("x-forwarded-for", "10.0.0.1"),
                line("x-hop", "1"),
                line("upgrade", "h2c"),
                line("trailer", "x-sum"),
            ],
            ..Head::default()
        };

        head.leave_connection();

        assert_eq!(
            head.headers,
            [line("x-forwarded-for", "10.0.0.1"), line("trailer", "x-sum"), line("te", "trailers")]
        );
    }

    #[test]
    fn answer_with_attributes_is_an_event() {
        let line = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
        let mut lines = vec![
            line("ce-specversion", "1.0"),
            line("ce-id", "7"),
            line("ce-source", "/f"),
            line("ce-type", "door.closed"),
            line("ce-subject", "caf%C3%A9"),
            line("ce-site", "\"south\""),
            line("content-type", "text/plain"),
        ];

        let event = answered(&lines).expect("an event");

        assert_eq!((event.kind.as_str(), event.subject.as_deref()), ("door.closed", Some("caf\u{e9}")));
        assert_eq!(event.extensions.get("site").map(String::as_str), Some("south"));
        assert_eq!(answered(&lines[..2]), None);
        lines[0].1 = b"0.3".to_vec();
        assert_eq!(answered(&lines), None);
        lines[0].1 = vec![0xff];
        assert_eq!(answered(&lines), None);
    }

    #[test]
    fn values_that_no_header_holds_are_encoded() {
        let mut head = Head::default();
        head.set("x-a", "a\r\nx-b: 1");
        assert_eq!(head.get("x-a"), Some("a%0D%0Ax-b:%201"));
    }

    #[test]
    fn function_says_when_to_come_again() {
        let now = UnixMs(784_111_777_000); // Sun, 06 Nov 1994 08:49:37 GMT
        let of = |value| retry_after(value, now).map(|wait| wait.as_secs());

        assert_eq!(of("120"), Some(120));
        assert_eq!(of("Sun, 06 Nov 1994 08:50:37 GMT"), Some(60));
        assert_eq!(of("Sun, 06 Nov 1994 08:00:00 GMT"), Some(0));
        assert_eq!(of("99999999999999999"), Some(86_400));
        assert_eq!(of("soon"), None);
    }

    #[test]
    fn new_trace_has_the_standards_form() {
        let text = traceparent([0, 0, 0]);
        assert_eq!(text.len(), 55);
        assert_eq!(text, "00-00000000000000010000000000000000-0000000000000001-01");
    }
}
