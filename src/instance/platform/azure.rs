//! Azure Functions' custom handlers (MicrosoftDocs/azure-docs, functions-custom-handlers.md): a
//! server on `FUNCTIONS_CUSTOMHANDLER_PORT` that gets `POST /{function}` with `{Data, Metadata}`
//! and answers `{Outputs, Logs, ReturnValue}`.
//!
//! A call over HTTP is `Data.req`, and `Outputs.res` its answer. Any other event is
//! `Data.<binding>`, named by `FUNCTIONS_BINDING` in the manifest's `env` (else `event`), as
//! text; its output is `ReturnValue`, else the only one of `Outputs`, else all of them.
//!
//! With `AzureFunctionsJobHost__customHandler__enableProxyingHttpRequest = "true"` in `env` (how
//! Azure overrides host.json; the older `enableForwardingHttpRequest` too) a call over HTTP goes
//! on as it came, to `/api/{function}` and what follows.
//!
//! Bindings are not declared here: there is no function.json. Bytes that are no UTF-8 are base64.

use super::{Contract, Looks, Message, Ready, Unwrapped, Wrap, var};
use crate::instance::request::Head;
use crate::model::event::TYPE_HTTP;
use crate::model::{Event, Revision};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

pub(super) const CONTRACT: Contract = Contract {
    // Of the samples.
    port: 8080,
    ready: Ready::Connects,
    environment: |revision, port| {
        vec![
            var("FUNCTIONS_CUSTOMHANDLER_PORT", port.to_string()),
            var("FUNCTIONS_WORKER_RUNTIME", "Custom"),
            var("FUNCTIONS_CUSTOMHANDLER_WORKER_ID", revision.key()),
        ]
    },
    request: proxied,
    first: |_| None,
};

const PROXYING: [&str; 2] = [
    "AzureFunctionsJobHost__customHandler__enableProxyingHttpRequest",
    "AzureFunctionsJobHost__customHandler__enableForwardingHttpRequest",
];

pub(super) fn looks_like(image: &Looks<'_>) -> bool {
    image.has_variable("FUNCTIONS_CUSTOMHANDLER_PORT")
}

/// Whether and how an event's request is wrapped.
pub(super) fn wrap(revision: &Revision, event: &Event) -> Option<Wrap> {
    let over_http = over_http(event);
    (!over_http || !proxying(revision))
        .then_some(Wrap { request: wrapped, answer: if over_http { http_answer } else { event_answer } })
}

fn over_http(event: &Event) -> bool {
    event.kind == TYPE_HTTP
}

fn proxying(revision: &Revision) -> bool {
    let env = &revision.manifest.env;
    PROXYING.iter().any(|name| env.get(*name).is_some_and(|value| value.eq_ignore_ascii_case("true")))
}

fn proxied(revision: &Revision, event: &Event, head: &mut Head) {
    if over_http(event) && proxying(revision) {
        let rest = if head.target == "/" { "" } else { head.target.as_str() };
        let slash = if rest.starts_with("/?") { &rest[1..] } else { rest };
        head.target = format!("/api/{}{slash}", revision.name());
    }
}

fn wrapped(revision: &Revision, event: &Event, head: Head, data: &[u8]) -> Message {
    let name = revision.name().as_str();
    let mut metadata = Map::new();
    let (binding, data) = if over_http(event) {
        let request = request(&head, data);
        for (key, value) in request["Query"].as_object().into_iter().flatten() {
            metadata.insert(key.clone(), value.clone());
        }
        ("req", request)
    } else {
        for (key, value) in [("Id", event.id.as_str()), ("Source", &event.source), ("Type", &event.kind)] {
            metadata.insert(key.to_owned(), value.into());
        }
        metadata.extend(event.subject.as_deref().map(|subject| ("Subject".to_owned(), subject.into())));
        let binding = revision.manifest.env.get("FUNCTIONS_BINDING").map_or("event", String::as_str);
        (binding, text(data))
    };
    let now = event.time.map_or(Value::Null, |time| time.rfc3339().into());
    metadata.insert("sys".to_owned(), json!({ "MethodName": name, "UtcNow": now, "RandGuid": event.id }));
    let body = json!({ "Data": { binding: data }, "Metadata": metadata });
    let mut new = Head { method: "POST".to_owned(), target: format!("/{name}"), headers: Vec::new() };
    for kept in ["traceparent", "tracestate", "host"] {
        if let Some(value) = head.get(kept) {
            new.set(kept, value);
        }
    }
    new.set("content-type", "application/json");
    new.set("x-azure-functions-invocationid", event.id.as_str());
    (new, body.to_string().into_bytes())
}

fn text(data: &[u8]) -> Value {
    std::str::from_utf8(data).map_or_else(|_| STANDARD.encode(data).into(), Value::from)
}

/// `Data.req`.
fn request(head: &Head, data: &[u8]) -> Value {
    let mut headers: Map<String, Value> = Map::new();
    for (name, value) in &head.headers {
        let value = String::from_utf8_lossy(value).into_owned();
        match headers.get_mut(name) {
            Some(Value::Array(values)) => values.push(value.into()),
            _ => drop(headers.insert(name.clone(), json!([value]))),
        }
    }
    let query = head.target.split_once('?').map_or("", |(_, query)| query);
    let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let plain = |text: &str| {
            let text = text.replace('+', " ");
            crate::model::cloudevents::decode(&text).unwrap_or(text)
        };
        (plain(name), Value::from(plain(value)))
    });
    json!({
        "Url": format!("http://{}{}", head.get("host").unwrap_or("localhost"), head.target),
        "Method": head.method,
        "Query": pairs.collect::<Map<_, _>>(),
        "Headers": headers,
        "Params": {},
        "Body": text(data),
    })
}

/// `Outputs.res`, or `ReturnValue` in its place.
fn http_answer(body: &[u8]) -> Result<Unwrapped, String> {
    let (mut answer, logs) = answer(body)?;
    // Whatever type it is: assigning by index panics on what is no object.
    let res = answer.get_mut("Outputs").and_then(|outputs| outputs.get_mut("res"));
    let mut res = res.map_or(Value::Null, Value::take);
    if res.is_null() {
        res = answer["ReturnValue"].take();
    }
    let Value::Object(mut res) = res else {
        let (body, content_type) = bytes(res);
        return Ok(Unwrapped { status: 200, headers: content_type, body, logs });
    };
    let status = ["statusCode", "status"].iter().find_map(|key| match res.get(*key)? {
        Value::String(text) => text.trim().parse().ok(),
        number => number.as_u64().and_then(|number| u16::try_from(number).ok()),
    });
    let status = status.unwrap_or(200);
    if !(200..=599).contains(&status) {
        return Err(format!("says HTTP status {status}"));
    }
    let mut headers = Vec::new();
    for (name, value) in res.get("headers").and_then(Value::as_object).into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        headers.push((name.to_ascii_lowercase(), value.into_bytes()));
    }
    let (body, content_type) = bytes(res.remove("body").unwrap_or(Value::Null));
    if !headers.iter().any(|(name, _)| name == "content-type") {
        headers.extend(content_type);
    }
    Ok(Unwrapped { status, headers, body, logs })
}

fn event_answer(body: &[u8]) -> Result<Unwrapped, String> {
    let (mut answer, logs) = answer(body)?;
    let mut output = answer["ReturnValue"].take();
    if output.is_null() {
        output = match answer["Outputs"].take() {
            Value::Object(mut outputs) if outputs.len() <= 1 => {
                outputs.values_mut().next().map_or(Value::Null, Value::take)
            }
            outputs => outputs,
        };
    }
    let (body, headers) = bytes(output);
    Ok(Unwrapped { status: 200, headers, body, logs })
}

fn answer(body: &[u8]) -> Result<(Value, Vec<String>), String> {
    // Azure takes an empty answer for "no outputs".
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok((json!({}), Vec::new()));
    }
    let answer: Value = serde_json::from_slice(body).map_err(|error| {
        format!("answered with something else than {{Outputs, Logs, ReturnValue}}: {error}")
    })?;
    if !answer.is_object() {
        return Err("answered with something else than {Outputs, Logs, ReturnValue}".to_owned());
    }
    let logs = answer["Logs"].as_array().into_iter().flatten();
    let logs = logs.map(|line| line.as_str().map_or_else(|| line.to_string(), str::to_owned)).collect();
    Ok((answer, logs))
}

type Lines = Vec<(String, Vec<u8>)>;

fn bytes(value: Value) -> (Vec<u8>, Lines) {
    let kind = |kind: &str| vec![("content-type".to_owned(), kind.as_bytes().to_vec())];
    match value {
        Value::Null => (Vec::new(), Vec::new()),
        Value::String(text) => (text.into_bytes(), kind("text/plain; charset=utf-8")),
        other => (other.to_string().into_bytes(), kind("application/json")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unwrapped(wrap: fn(&[u8]) -> Result<Unwrapped, String>, answer: &Value) -> Unwrapped {
        wrap(answer.to_string().as_bytes()).expect("a good answer")
    }

    #[test]
    fn call_is_told_as_azure_tells_it() {
        let head = Head {
            method: "POST".to_owned(),
            target: "/orders?name=J%C3%BCrgen+M&x".to_owned(),
            headers: vec![("host".to_owned(), b"gw".to_vec()), ("accept".to_owned(), b"*/*".to_vec())],
        };

        let said = request(&head, b"21");

        assert_eq!(said["Url"], "http://gw/orders?name=J%C3%BCrgen+M&x");
        assert_eq!(said["Query"], json!({ "name": "J\u{fc}rgen M", "x": "" }));
        assert_eq!(said["Headers"]["accept"], json!(["*/*"]));
        assert_eq!((&said["Method"], &said["Body"]), (&json!("POST"), &json!("21")));
    }

    #[test]
    fn res_is_the_answer_of_a_call() {
        let res = json!({ "statusCode": "201", "headers": { "X-A": "1" }, "body": { "ok": true } });
        let found = unwrapped(http_answer, &json!({ "Outputs": { "res": res }, "Logs": ["one", 2] }));

        assert_eq!((found.status, found.body.as_slice()), (201, br#"{"ok":true}"#.as_slice()));
        assert_eq!(found.headers[0], ("x-a".to_owned(), b"1".to_vec()));
        assert_eq!(found.logs, ["one", "2"]);
        let plain = unwrapped(http_answer, &json!({ "Outputs": null, "ReturnValue": "hello" }));
        assert_eq!((plain.status, plain.body.as_slice()), (200, b"hello".as_slice()));
        assert_eq!(http_answer(b"").expect("no outputs").body, b"");
        assert!(http_answer(b"<html>").is_err() && http_answer(b"[]").is_err());
        assert!(http_answer(br#"{"Outputs":{"res":{"status":99}}}"#).is_err());
    }

    #[test]
    fn outputs_of_any_type_are_no_end_of_the_node() {
        for outputs in [json!([]), json!("x"), json!(1), json!(true), json!(null), json!({ "res": null })] {
            let answer = json!({ "Outputs": outputs, "ReturnValue": "hello" });

            let found = unwrapped(http_answer, &answer);

            assert_eq!((found.status, found.body.as_slice()), (200, b"hello".as_slice()), "{outputs}");
            assert_eq!(unwrapped(event_answer, &answer).body, b"hello", "{outputs}");
        }
    }

    #[test]
    fn output_of_an_event_is_what_the_handler_returns() {
        let body = |answer: Value| unwrapped(event_answer, &answer).body;

        assert_eq!(body(json!({ "Outputs": { "a": 1 }, "ReturnValue": "x" })), b"x");
        assert_eq!(body(json!({ "Outputs": { "a": { "b": 1 } } })), br#"{"b":1}"#);
        assert_eq!(body(json!({ "Outputs": { "a": [1, 2] } })), b"[1,2]");
        assert_eq!(body(json!({ "Outputs": { "a": 1, "b": 2 } })), br#"{"a":1,"b":2}"#);
        assert_eq!(body(json!({ "Outputs": {} })), b"");
    }
}
