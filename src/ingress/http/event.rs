//! An HTTP request as an event: CloudEvents in binary and structured mode keep their own
//! attributes (CloudEvents HTTP binding 1.0.2 §3), anything else becomes `neap.http.request`.
//! Pure.

use super::problem::Refusal;
use crate::model::cloudevents::{Batch, Structured};
pub use crate::model::cloudevents::{decode, encode};
use crate::model::event::{OF_A_CONNECTION, TYPE_HTTP};
use crate::model::{Event, EventId, HttpRequest, UnixMs};
use std::collections::BTreeMap;
use std::net::IpAddr;

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// Attributes with a name of their own in `Event`, or none.
const NOT_EXTENSIONS: [&str; 8] =
    ["specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema"];

/// What `event` works from. Header names are lower case.
pub struct Parts<'a> {
    pub node: &'a str,
    pub method: &'a str,
    /// Behind the function's prefix, still percent-encoded.
    pub path: &'a str,
    pub query: &'a str,
    pub headers: Vec<(String, String)>,
    pub data: Vec<u8>,
    pub now: UnixMs,
    /// Used when the sender brings no id of its own.
    pub fresh_id: EventId,
}

pub fn event(parts: Parts<'_>) -> Result<Event, Refusal> {
    let Parts { node, method, path, query, headers, data, now, fresh_id } = parts;
    let path = decode(path).filter(|path| !path.chars().any(char::is_control));
    let path = path.ok_or_else(|| Refusal::bad_request("the path is not UTF-8 or has control characters"))?;
    let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let content_type = get("content-type").map(str::to_owned);
    let media = media_type(content_type.as_deref());
    let specversion = get("ce-specversion").map(str::to_owned);
    let call_id = get("x-call-id").and_then(EventId::parse);

    let connection = get("connection").unwrap_or("").to_ascii_lowercase();
    let dropped: Vec<&str> = connection.split(',').map(str::trim).collect();
    // An event has no trailers that `trailer` could announce.
    let hop_by_hop = |name: &str| name == "trailer" || OF_A_CONNECTION.contains(&name);
    let keep = |name: &str| !hop_by_hop(name) && !dropped.contains(&name);
    let ours = if specversion.is_some() { "ce-" } else { "\0" };
    let (attributes, headers): (Vec<_>, Vec<_>) =
        headers.into_iter().filter(|(name, _)| keep(name)).partition(|(name, _)| name.starts_with(ours));
    let http = HttpRequest { method: method.to_owned(), path, query: query.to_owned(), headers };

    if media == BATCH {
        return Err(Refusal::bad_request("a function is called with one event; POST /events takes batches"));
    }
    if media == STRUCTURED {
        return Ok(Event { http: Some(http), ..structured(&data)? });
    }
    if let Some(version) = specversion {
        return Ok(Event { content_type, http: Some(http), data, ..binary(attributes, version)? });
    }
    let mut event = Event {
        id: call_id.unwrap_or(fresh_id),
        source: format!("/{node}/http"),
        kind: TYPE_HTTP.to_owned(),
        subject: Some(http.path.clone()),
        time: Some(now),
        content_type,
        extensions: BTreeMap::new(),
        http: Some(http),
        data,
    };
    if !now.is_plausible() {
        event.doubt_time();
    }
    Ok(event)
}

/// What is sent to be handed to whom it concerns: one event or a batch, nothing but CloudEvents.
/// How they came is no part of them.
pub fn published(headers: &[(String, String)], data: Vec<u8>) -> Result<Vec<Event>, Refusal> {
    let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let media = media_type(get("content-type"));
    if media == BATCH {
        let batch = Batch::parse(&data)
            .map_err(|error| Refusal::bad_request(format!("a batch is one JSON array: {error}")))?;
        let one = |(number, text): (usize, &str)| {
            structured(text.as_bytes())
                .map_err(|refusal| refusal.about(&format!("event {number} of the batch")))
        };
        return batch.events().enumerate().map(one).collect();
    }
    if media == STRUCTURED {
        return Ok(vec![structured(&data)?]);
    }
    let Some(version) = get("ce-specversion") else {
        let modes = "ce-specversion and its like in headers, application/cloudevents+json or \
                     application/cloudevents-batch+json";
        return Err(Refusal::bad_request(format!("this is no CloudEvent; expected {modes}")));
    };
    let attributes = headers.iter().filter(|(name, _)| name.starts_with("ce-")).cloned().collect();
    let content_type = get("content-type").map(str::to_owned);
    Ok(vec![Event { content_type, data, ..binary(attributes, version.to_owned())? }])
}

fn media_type(content_type: Option<&str>) -> String {
    content_type.unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// From headers that begin with `ce-`.
fn binary(attributes: Vec<(String, String)>, version: String) -> Result<Event, Refusal> {
    let mut map = BTreeMap::new();
    for (name, value) in attributes {
        let name = name["ce-".len()..].to_owned();
        let value = decode(value.trim().trim_matches('"'));
        let value = value.ok_or_else(|| Refusal::bad_request(format!("ce-{name} is not UTF-8")))?;
        map.insert(name, value);
    }
    map.insert("specversion".to_owned(), version);
    from_attributes(map)
}

/// Of a request whose body is passed on unread: its attributes, without data. One in structured
/// mode is a plain request here, its attributes are for the function to read; so is one whose
/// attributes are wrong, which is for the function to say.
pub fn unread(parts: Parts<'_>) -> Result<Event, Refusal> {
    let Parts { node, method, path, query, mut headers, now, fresh_id, .. } = parts;
    headers.retain(|(name, _)| name != "content-type");
    let of = |headers: Vec<(String, String)>, fresh_id| {
        event(Parts { node, method, path, query, headers, data: Vec::new(), now, fresh_id })
    };
    of(headers.clone(), fresh_id.clone()).or_else(|_| {
        headers.retain(|(name, _)| !name.starts_with("ce-"));
        of(headers, fresh_id)
    })
}

/// Says who sent a request and how (RFC 7239, and the headers that were there before it): lists
/// grow by one, the first host and protocol stay. `None`: through the Unix socket.
pub fn forwarded(headers: &mut Vec<(String, String)>, from: Option<IpAddr>, proto: &str) {
    let get = |headers: &[(String, String)], name: &str| {
        headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone())
    };
    let host = get(headers, "host");
    let mut add = |name: &str, value: &str| match headers.iter_mut().find(|(n, _)| n == name) {
        Some((_, list)) => list.extend([", ", value]),
        None => headers.push((name.to_owned(), value.to_owned())),
    };
    let node = match from {
        Some(IpAddr::V6(address)) => format!("\"[{address}]\""),
        Some(IpAddr::V4(address)) => address.to_string(),
        None => "_unix".to_owned(), // §6.3, an obfuscated identifier
    };
    let mut element = format!("for={node};proto={proto}");
    if let Some(host) = &host {
        // A host with a port or brackets is no token.
        let quoted = host.replace('\\', "\\\\").replace('"', "\\\"");
        element.extend([";host=\"", quoted.as_str(), "\""]);
    }
    add("forwarded", &element);
    if let Some(address) = from {
        add("x-forwarded-for", &address.to_string());
    }
    for (name, value) in [("x-forwarded-proto", Some(proto)), ("x-forwarded-host", host.as_deref())] {
        if let Some(value) = value
            && get(headers, name).is_none()
        {
            headers.push((name.to_owned(), value.to_owned()));
        }
    }
}

fn structured(body: &[u8]) -> Result<Event, Refusal> {
    let members = Structured::parse(body).map_err(|error| {
        Refusal::bad_request(format!("a structured CloudEvent is one JSON object: {error}"))
    })?;
    let mut map = BTreeMap::new();
    for (name, value) in members.attributes() {
        let value = value.ok_or_else(|| {
            let name = cut(name);
            Refusal::bad_request(format!("CloudEvents attribute `{name}` is no string, number or boolean"))
        })?;
        map.insert(name.to_owned(), value);
    }
    let data = members.data().map_err(|error| Refusal::bad_request(error.to_string()))?;
    Ok(Event { content_type: members.content_type(), data, ..from_attributes(map)? })
}

fn from_attributes(mut map: BTreeMap<String, String>) -> Result<Event, Refusal> {
    if map.get("specversion").map(String::as_str) != Some("1.0") {
        return Err(Refusal::bad_request("CloudEvents specversion is not 1.0"));
    }
    let mut required = |name: &str| {
        let value =
            map.remove(name).filter(|value| !value.is_empty() && !value.chars().any(char::is_control));
        value.ok_or_else(|| {
            Refusal::bad_request(format!("CloudEvents attribute `{name}` is missing or empty"))
        })
    };
    let id = required("id")?;
    let id = EventId::parse(&id).ok_or_else(|| {
        Refusal::bad_request(format!("CloudEvents id is longer than {} bytes", EventId::BYTES_MAX))
    })?;
    let (source, kind) = (required("source")?, required("type")?);
    let subject = map.remove("subject").filter(|subject| !subject.is_empty());
    let time = match map.remove("time") {
        Some(text) => {
            let time: jiff::Timestamp = text
                .parse()
                .map_err(|_| Refusal::bad_request("CloudEvents time is not an RFC 3339 timestamp"))?;
            Some(UnixMs(time.as_millisecond()))
        }
        None => None,
    };
    let mut extensions = BTreeMap::new();
    for (name, value) in map {
        if NOT_EXTENSIONS.contains(&name.as_str()) {
            continue;
        }
        let good = (1..=20).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !good {
            let detail =
                format!("CloudEvents attribute names are 1 to 20 of a-z and 0-9, not `{}`", cut(&name));
            return Err(Refusal::bad_request(detail));
        }
        extensions.insert(name, value);
    }
    if [&source, &kind]
        .into_iter()
        .chain(subject.as_ref())
        .chain(extensions.values())
        .any(|value| value.contains('\0'))
    {
        return Err(Refusal::bad_request("a CloudEvents attribute holds NUL"));
    }
    Ok(Event {
        id,
        source,
        kind,
        subject,
        time,
        content_type: None,
        extensions,
        http: None,
        data: Vec::new(),
    })
}

fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts<'a>(path: &'a str, headers: &[(&str, &str)], data: &[u8]) -> Parts<'a> {
        Parts {
            node: "gw",
            method: "POST",
            path,
            query: "a=1",
            headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            data: data.to_vec(),
            now: UnixMs(5),
            fresh_id: EventId::from_random([7; 16]),
        }
    }

    #[test]
    fn plain_request_becomes_an_event_of_the_node() {
        let headers = [("x-a", "1"), ("connection", "X-Gone, close"), ("x-gone", "1"), ("te", "trailers")];

        let event = event(parts("/caf%C3%A9", &headers, b"data")).expect("a good request");

        assert_eq!((event.kind.as_str(), event.source.as_str()), (TYPE_HTTP, "/gw/http"));
        assert_eq!(event.subject.as_deref(), Some("/caf\u{e9}"));
        assert_eq!(event.id, EventId::from_random([7; 16]));
        let http = event.http.expect("it came over HTTP");
        assert_eq!((http.path.as_str(), http.query.as_str()), ("/caf\u{e9}", "a=1"));
        assert_eq!(http.headers, [("x-a".to_owned(), "1".to_owned())]);
    }

    #[test]
    fn sender_is_told_beside_those_before_it() {
        let line = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut headers = vec![
            line("host", "gw:8080"),
            line("x-forwarded-for", "10.0.0.1"),
            line("x-forwarded-proto", "https"),
        ];

        forwarded(&mut headers, Some("::1".parse().expect("an address")), "http");

        let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(get("forwarded"), Some("for=\"[::1]\";proto=http;host=\"gw:8080\""));
        assert_eq!(get("x-forwarded-for"), Some("10.0.0.1, ::1"));
        assert_eq!(get("x-forwarded-proto"), Some("https"));
        assert_eq!(get("x-forwarded-host"), Some("gw:8080"));
    }

    #[test]
    fn callers_own_call_id_is_kept() {
        let event = event(parts("/", &[("x-call-id", "mine")], b"")).expect("a good request");

        assert_eq!(event.id.as_str(), "mine");
    }

    #[test]
    fn path_that_is_no_text_is_refused() {
        for bad in ["/%ff", "/%00", "/a%0Ab"] {
            assert!(event(parts(bad, &[], b"")).is_err(), "{bad}");
        }
    }

    #[test]
    fn binary_cloudevent_keeps_its_attributes() {
        let headers = [
            ("ce-specversion", "1.0"),
            ("ce-id", "a%20%C3%A9"),
            ("ce-source", "/door"),
            ("ce-type", "door.opened"),
            ("ce-time", "2026-03-01T10:00:00+01:00"),
            ("ce-site", "\"north\""),
            ("content-type", "text/plain"),
        ];

        let event = event(parts("/", &headers, b"x")).expect("a good event");

        assert_eq!(event.id.as_str(), "a \u{e9}");
        assert_eq!(
            (event.source.as_str(), event.kind.as_str(), event.subject),
            ("/door", "door.opened", None)
        );
        assert_eq!(event.time, Some(UnixMs(1_772_355_600_000)));
        assert_eq!(event.extensions, BTreeMap::from([("site".to_owned(), "north".to_owned())]));
        assert_eq!(
            (event.content_type.as_deref(), event.data.as_slice()),
            (Some("text/plain"), b"x".as_slice())
        );
        assert_eq!(event.http.map(|http| http.headers.len()), Some(1));
    }

    #[test]
    fn structured_cloudevent_keeps_its_attributes() {
        let body = br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","n":3,"data":{"a":[1]}}"#;
        let headers = [("content-type", "application/CloudEvents+json; charset=utf-8")];

        let good = event(parts("/", &headers, body)).expect("a good event");

        assert_eq!((good.kind.as_str(), good.data.as_slice()), ("t", br#"{"a":[1]}"#.as_slice()));
        assert_eq!(good.extensions, BTreeMap::from([("n".to_owned(), "3".to_owned())]));
        let bad: [&[u8]; 6] = [
            b"[]",
            br#"{"specversion":"0.3","id":"1","source":"/s","type":"t"}"#,
            br#"{"specversion":"1.0","source":"/s","type":"t"}"#,
            br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","data":1,"data_base64":"QQ=="}"#,
            br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","Bad_Name":"x"}"#,
            br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","time":"yesterday"}"#,
        ];
        for body in bad {
            assert!(event(parts("/", &headers, body)).is_err(), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn structured_cloudevent_keeps_its_numbers() {
        let body = br#"{"specversion":"1.0","id":"1","source":"/s","type":"t","n":21.50,
            "data":[21.50, 123456789012345678901234567890]}"#;

        let event = event(parts("/", &[("content-type", "application/cloudevents+json")], body));

        let event = event.expect("a good event");
        assert_eq!(event.extensions.get("n").map(String::as_str), Some("21.50"));
        assert_eq!(event.data, b"[21.50, 123456789012345678901234567890]");
        assert_eq!(event.content_type.as_deref(), Some("application/json"));
    }

    #[test]
    fn events_are_published_in_three_modes() {
        let one =
            |id: &str| format!(r#"{{"specversion":"1.0","id":"{id}","source":"/s","type":"t","data":1}}"#);
        let headers = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
        };
        let ids = |headers: &[(String, String)], body: &str| -> Vec<String> {
            let events = published(headers, body.as_bytes().to_vec()).expect("good events");
            assert!(events.iter().all(|event| event.http.is_none()));
            events.into_iter().map(|event| event.id.to_string()).collect()
        };

        let batch = headers(&[("content-type", "application/cloudevents-batch+json; charset=utf-8")]);
        assert_eq!(ids(&batch, &format!("[{}, {}]", one("a"), one("b"))), ["a", "b"]);
        assert_eq!(ids(&batch, "[]"), [""; 0]);
        let structured = headers(&[("content-type", "application/cloudevents+json")]);
        assert_eq!(ids(&structured, &one("c")), ["c"]);
        let attributes = [("ce-specversion", "1.0"), ("ce-id", "d"), ("ce-source", "/s"), ("ce-type", "t")];
        assert_eq!(ids(&headers(&attributes), "data"), ["d"]);

        let broken = format!("[{}, {{\"id\":7}}]", one("a"));
        for (headers, body) in
            [(&batch, "{}"), (&batch, broken.as_str()), (&structured, "[]"), (&headers(&[]), "x")]
        {
            assert!(published(headers, body.as_bytes().to_vec()).is_err(), "{body}");
        }
    }

    #[test]
    fn a_clock_that_can_not_be_right_gives_no_time() {
        let event = event(parts("/", &[], b"")).expect("a good request");

        assert_eq!(event.time, None);
        assert_eq!(event.extensions.get("neapclock").map(String::as_str), Some("uncertain"));
    }

    #[test]
    fn encoding_is_undone_by_decoding() {
        for text in ["plain", "a b\"%\u{e9}", "100%", ""] {
            assert_eq!(decode(&encode(text)).as_deref(), Some(text));
        }
    }
}
