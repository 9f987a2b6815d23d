//! A Lambda function behind plain HTTP, as Function URLs have it: the request becomes an event of
//! payload format 2.0, the function's answer an HTTP response. Pure.
//! <https://docs.aws.amazon.com/lambda/latest/dg/urls-invocation.html>

use crate::model::event::OF_A_CONNECTION;
use crate::model::{Event, UnixMs};
use crate::net::http::Line;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// What `event` works from. Header names are lower case.
pub struct Parts<'a> {
    pub node: &'a str,
    pub method: &'a str,
    /// As it came, percent-encoded; so is the query.
    pub path: &'a str,
    pub query: &'a str,
    pub headers: &'a [(String, String)],
    pub source_ip: &'a str,
    pub now: UnixMs,
}

/// The event's data, around the body that it had until now.
pub fn event(event: &Event, parts: &Parts<'_>) -> Vec<u8> {
    let mut headers: BTreeMap<&str, String> = BTreeMap::new();
    let mut cookies = Vec::new();
    for (name, value) in parts.headers {
        if name == "cookie" {
            cookies.extend(value.split(';').map(|cookie| cookie.trim().to_owned()));
        }
        if OF_A_CONNECTION.contains(&name.as_str()) {
            continue;
        }
        let list = headers.entry(name).or_default();
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(value);
    }
    let mut parameters: BTreeMap<String, String> = BTreeMap::new();
    for pair in parts.query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let plain = |text: &str| {
            let text = text.replace('+', " ");
            crate::model::cloudevents::decode(&text).unwrap_or(text)
        };
        let list = parameters.entry(plain(name));
        list.and_modify(|list| list.extend([",", &plain(value)])).or_insert_with(|| plain(value));
    }
    let get = |name: &str| headers.get(name).map_or("", String::as_str);
    let host = get("host");
    let time = jiff::Timestamp::from_millisecond(parts.now.0).unwrap_or_default();
    let mut made = json!({
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": parts.path,
        "rawQueryString": parts.query,
        "headers": headers,
        "requestContext": {
            "accountId": "anonymous",
            "apiId": parts.node,
            "domainName": host,
            "domainPrefix": host.split('.').next().unwrap_or(""),
            "http": {
                "method": parts.method,
                "path": parts.path,
                "protocol": "HTTP/1.1",
                "sourceIp": parts.source_ip,
                "userAgent": get("user-agent"),
            },
            "requestId": event.id.as_str(),
            "routeKey": "$default",
            "stage": "$default",
            "time": log_time(time),
            "timeEpoch": parts.now.0,
        },
        "isBase64Encoded": false,
    });
    if !cookies.is_empty() {
        made["cookies"] = cookies.into();
    }
    if !parameters.is_empty() {
        made["queryStringParameters"] = json!(parameters);
    }
    if !event.data.is_empty() {
        match std::str::from_utf8(&event.data) {
            Ok(text) if is_text(get("content-type")) => made["body"] = text.into(),
            _ => {
                made["body"] = STANDARD.encode(&event.data).into();
                made["isBase64Encoded"] = true.into();
            }
        }
    }
    made.to_string().into_bytes()
}

/// What AWS hands over as text; everything else is base64.
fn is_text(content_type: &str) -> bool {
    let media = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    media.starts_with("text/")
        || media.ends_with("+json")
        || media.ends_with("+xml")
        || matches!(media.as_str(), "application/json" | "application/xml" | "application/javascript")
}

/// An HTTP response that a function's output describes.
#[derive(Debug, PartialEq, Eq)]
pub struct Described {
    pub status: u16,
    pub headers: Vec<Line>,
    pub body: Vec<u8>,
}

/// Of a description's headers, and of its cookies: as JSON.
const HEADERS_BYTES_MAX: usize = 64 << 10;

/// The head that a prelude describes, `{"statusCode", "headers", "cookies"}`, each of which may lack.
pub fn described_by(told: &[u8]) -> Result<Described, &'static str> {
    #[derive(Deserialize)]
    struct Prelude<'a> {
        #[serde(borrow, default, rename = "statusCode")]
        status: Option<&'a RawValue>,
        #[serde(borrow, default)]
        headers: Option<&'a RawValue>,
        #[serde(borrow, default)]
        cookies: Option<&'a RawValue>,
    }
    let told: Prelude<'_> = serde_json::from_slice(told).map_err(|_| "its prelude is no JSON object")?;
    head(told.status, told.headers, told.cookies, "application/octet-stream")
}

/// Each as it stands in the output: a large one is not taken apart into as many values.
#[derive(Deserialize)]
struct Description<'a> {
    #[serde(borrow, rename = "statusCode")]
    status: &'a RawValue,
    #[serde(borrow, default)]
    headers: Option<&'a RawValue>,
    #[serde(borrow, default)]
    cookies: Option<&'a RawValue>,
    #[serde(borrow, default)]
    body: Option<&'a RawValue>,
    #[serde(borrow, default, rename = "isBase64Encoded")]
    is_base64: Option<&'a RawValue>,
}

/// An object with a `statusCode` is a description; anything else is the body itself, in JSON.
pub fn response(output: Vec<u8>) -> Result<Described, &'static str> {
    let object = output.trim_ascii_start().starts_with(b"{");
    let described = object.then(|| serde_json::from_slice::<Description<'_>>(&output).ok()).flatten();
    let Some(described) = described else {
        let headers = vec![("content-type".to_owned(), b"application/json".to_vec())];
        return Ok(Described { status: 200, headers, body: output });
    };
    let head = head(Some(described.status), described.headers, described.cookies, "application/json");
    let is_base64 = described.is_base64.is_some_and(|it| it.get() == "true");
    let body = match described.body.map(RawValue::get) {
        None => Vec::new(),
        Some(raw) => match serde_json::from_str::<String>(raw) {
            Ok(text) if is_base64 => {
                STANDARD.decode(text).map_err(|_| "its body is not base64, as it says")?
            }
            Ok(text) => text.into_bytes(),
            Err(_) => raw.as_bytes().to_vec(),
        },
    };
    Ok(Described { body, ..head? })
}

/// Without a body yet.
fn head(
    status: Option<&RawValue>,
    headers: Option<&RawValue>,
    cookies: Option<&RawValue>,
    content_type: &str,
) -> Result<Described, &'static str> {
    let status = status.map_or("200", RawValue::get);
    let status: Option<u64> = match serde_json::from_str::<String>(status) {
        Ok(text) => text.parse().ok(),
        Err(_) => status.parse().ok(),
    };
    let status = status.and_then(|status| u16::try_from(status).ok()).filter(|s| (200..600).contains(s));
    let status = status.ok_or("its statusCode is no HTTP status from 200 to 599")?;
    let mut lines = Vec::new();
    let none = Map::new();
    let told = small(headers).ok_or("its headers are larger than 64 KiB")?;
    for (name, value) in told.as_object().unwrap_or(&none) {
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Number(_) | Value::Bool(_) => value.to_string(),
            _ => continue,
        };
        add(&mut lines, name, text);
    }
    let cookies = small(cookies).ok_or("its cookies are larger than 64 KiB")?;
    for cookie in cookies.as_array().into_iter().flatten() {
        add(&mut lines, "set-cookie", cookie.as_str().unwrap_or("").to_owned());
    }
    if !lines.iter().any(|(name, _)| name == "content-type") {
        add(&mut lines, "content-type", content_type.to_owned());
    }
    Ok(Described { status, headers: lines, body: Vec::new() })
}

/// `None`: it is too large.
fn small(raw: Option<&RawValue>) -> Option<Value> {
    let Some(raw) = raw.map(RawValue::get) else { return Some(Value::Null) };
    (raw.len() <= HEADERS_BYTES_MAX).then(|| serde_json::from_str(raw).unwrap_or_default())
}

/// What would say how the body is framed is for the connection to say; a name or a value that is
/// none is left out rather than sent split.
fn add(headers: &mut Vec<Line>, name: &str, value: String) {
    let name = name.to_ascii_lowercase();
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let good = !name.is_empty()
        && name.bytes().all(token)
        && value.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b));
    if good && name != "content-length" && !OF_A_CONNECTION.contains(&name.as_str()) {
        headers.push((name, value.into_bytes()));
    }
}

/// As in a web server's log: `28/Nov/2026:09:05:00 +0000`.
fn log_time(time: jiff::Timestamp) -> String {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let at = time.to_zoned(jiff::tz::TimeZone::UTC).datetime();
    let month = MONTHS.get(usize::from(at.month().unsigned_abs()).wrapping_sub(1)).unwrap_or(&"Jan");
    let (hour, minute, second) = (at.hour(), at.minute(), at.second());
    format!("{:02}/{month}/{:04}:{hour:02}:{minute:02}:{second:02} +0000", at.day(), at.year())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::EventId;
    use crate::model::prelude;

    fn made(headers: &[(&str, &str)], data: &[u8]) -> Value {
        let headers: Vec<(String, String)> =
            headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let plain = Event {
            id: EventId::from_random([7; 16]),
            source: "/gw/http".into(),
            kind: "neap.http.request".into(),
            subject: None,
            time: None,
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data: data.to_vec(),
        };
        let parts = Parts {
            node: "gw",
            method: "POST",
            path: "/a%20b",
            query: "x=1&x=2&y=caf%C3%A9+au",
            headers: &headers,
            source_ip: "192.0.2.1",
            now: UnixMs(1_583_348_638_390),
        };
        serde_json::from_slice(&event(&plain, &parts)).expect("JSON")
    }

    #[test]
    fn a_prelude_is_cut_off_wherever_the_pieces_end_and_says_the_head() {
        let whole = b"{\"statusCode\":418,\"headers\":{\"X-A\":\"b\",\"Content-Length\":\"9\"},\"cookies\":[\"c=d\"]}\0\0\0\0\0\0\0\0\0tea";
        for cut in 0..whole.len() {
            let mut come = whole[..cut].to_vec();
            let early = prelude::cut(&mut come);
            come.extend_from_slice(&whole[cut..]);
            let told = early.or_else(|| prelude::cut(&mut come)).expect("it is there");

            assert_eq!(come, b"\0tea", "a body may begin with what ends a prelude");
            let head = described_by(&told).expect("JSON");
            assert_eq!(head.status, 418);
            let lines: Vec<_> =
                head.headers.iter().map(|(name, value)| (name.as_str(), &value[..])).collect();
            let expected: [(&str, &[u8]); 3] =
                [("x-a", b"b"), ("set-cookie", b"c=d"), ("content-type", b"application/octet-stream")];
            assert_eq!(lines, expected);
        }
        assert_eq!(described_by(b"{}").expect("JSON").status, 200);
        assert!(described_by(b"no JSON").is_err() && described_by(b"{\"statusCode\":99}").is_err());
    }

    #[test]
    fn request_becomes_an_event_of_format_2() {
        let headers = [
            ("host", "gw.example:8080"),
            ("cookie", "a=1; b=2"),
            ("x-many", "1"),
            ("x-many", "2"),
            ("te", "trailers"),
            ("content-type", "application/json"),
        ];

        let event = made(&headers, b"{\"a\":1}");

        assert_eq!((&event["version"], &event["rawPath"]), (&json!("2.0"), &json!("/a%20b")));
        assert_eq!(event["rawQueryString"], "x=1&x=2&y=caf%C3%A9+au");
        assert_eq!(event["queryStringParameters"], json!({ "x": "1,2", "y": "caf\u{e9} au" }));
        assert_eq!(event["cookies"], json!(["a=1", "b=2"]));
        assert_eq!((&event["headers"]["x-many"], &event["headers"]["te"]), (&json!("1,2"), &Value::Null));
        let http = &event["requestContext"]["http"];
        assert_eq!((&http["method"], &http["sourceIp"]), (&json!("POST"), &json!("192.0.2.1")));
        assert_eq!(event["requestContext"]["time"], "04/Mar/2020:19:03:58 +0000");
        assert_eq!((&event["body"], &event["isBase64Encoded"]), (&json!("{\"a\":1}"), &json!(false)));
        let form = [("content-type", "application/x-www-form-urlencoded")];
        let event = made(&form, b"a=1");
        assert_eq!((&event["body"], &event["isBase64Encoded"]), (&json!("YT0x"), &json!(true)));
        assert_eq!(made(&[], b"").get("body"), None);
    }

    #[test]
    fn output_that_describes_a_response_becomes_it() {
        let described =
            br#"{"statusCode": 418, "headers": {"X-Pot": "tea", "Content-Length": "9", "Bad Name": "x",
            "X-Bad": "a\r\nSet-Cookie: x"}, "cookies": ["a=1"], "body": "AP8=", "isBase64Encoded": true}"#;

        let made = response(described.to_vec()).expect("a description");

        assert_eq!((made.status, made.body.as_slice()), (418, b"\0\xff".as_slice()));
        let names: Vec<&str> = made.headers.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["x-pot", "set-cookie", "content-type"]);
        let plain = response(b"[1]".to_vec()).expect("a body");
        assert_eq!((plain.status, plain.body.as_slice()), (200, b"[1]".as_slice()));
        assert_eq!(response(br#"{"statusCode":"201"}"#.to_vec()).map(|made| made.status), Ok(201));
        let body = |text: &[u8]| response(text.to_vec()).map(|made| (made.status, made.body));
        assert_eq!(body(br#" {"statusCode":200,"body":{"a": [1]}}"#), Ok((200, br#"{"a": [1]}"#.to_vec())));
        assert_eq!(body(br#"{"statusCode":204,"body":null}"#), Ok((204, Vec::new())));
        assert_eq!(body(br#"{"a":1}"#), Ok((200, br#"{"a":1}"#.to_vec())));
        assert_eq!(body(b"{\xff"), Ok((200, b"{\xff".to_vec())));
        let long = "x".repeat(HEADERS_BYTES_MAX);
        assert!(body(format!(r#"{{"statusCode":200,"headers":{{"a":"{long}"}}}}"#).as_bytes()).is_err());
        assert!(body(format!(r#"{{"statusCode":200,"cookies":["{long}"]}}"#).as_bytes()).is_err());
        assert!(body(br#"{"statusCode":null}"#).is_err());
        assert!(response(br#"{"statusCode":99}"#.to_vec()).is_err());
        assert!(response(br#"{"statusCode":200,"isBase64Encoded":true,"body":"!"}"#.to_vec()).is_err());
    }
}
