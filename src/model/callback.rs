//! Callbacks: where the result of an asynchronous call is sent, when its caller says so by
//! `X-Callback-Url`. The event keeps the URL among its headers; when the invocation has ended the
//! result becomes a delivery of its own, in the same transaction. Headers are OpenFaaS's.

use super::{Event, Failure, FunctionName, HttpRequest, Lane, NewDelivery, Target};
use std::collections::BTreeMap;
use std::time::Duration;

/// In lower case, as events keep headers.
pub const HEADER: &str = "x-callback-url";
const TYPE: &str = "neap.function.result";
const URL_BYTES_MAX: usize = 2048;

/// Where a URL leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallbackUrl {
    pub tls: bool,
    /// A name, an IPv4 address, or an IPv6 address without its brackets.
    pub host: String,
    pub port: u16,
    /// Path and query.
    pub target: String,
}

impl CallbackUrl {
    pub fn parse(url: &str) -> Result<Self, String> {
        let bad = |what: &str| Err(format!("X-Callback-Url is no http:// or https:// URL: {what}"));
        if url.len() > URL_BYTES_MAX {
            return bad("it is longer than 2048 bytes");
        }
        if !url.bytes().all(|byte| byte.is_ascii_graphic()) || url.contains('#') {
            return bad("it has spaces, a fragment or odd characters");
        }
        let (tls, rest) = match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return bad("another scheme"),
        };
        let (authority, target) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if authority.contains('@') {
            return bad("credentials would be kept with the event");
        }
        let (host, port) = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, port)) if host.parse::<std::net::Ipv6Addr>().is_ok() => {
                (host, port.strip_prefix(':'))
            }
            Some(_) => return bad("the address in brackets"),
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
        if host.is_empty() || host.len() > 253 || !host.bytes().all(name) {
            return bad("the host");
        }
        let port = match port {
            None => Some(if tls { 443 } else { 80 }),
            Some(port) => port.parse().ok().filter(|port| *port > 0),
        };
        let Some(port) = port else { return bad("the port") };
        let target = if target.starts_with('/') { target.to_owned() } else { format!("/{target}") };
        Ok(Self { tls, host: host.to_owned(), port, target })
    }
}

/// Where the result of this event's invocation goes.
pub fn url(event: &Event) -> Option<&str> {
    let headers = &event.http.as_ref()?.headers;
    headers.iter().find(|(name, _)| name == HEADER).map(|(_, value)| value.as_str())
}

/// How an invocation came to its end.
#[derive(Clone, Debug)]
pub struct Ended {
    pub status: u16,
    pub body: Vec<u8>,
    pub content_type: Option<String>,
    pub took: Duration,
}

/// What a failure looks like to a receiver.
pub fn status(failure: &Failure) -> u16 {
    match failure {
        Failure::Status(status) => *status,
        Failure::TimedOut { .. } => 504,
        Failure::PayloadTooLarge { .. } => 413,
        // It did not run: as the gateway says of it.
        Failure::Start(_) => 503,
        _ => 500,
    }
}

/// The delivery that is owed for it; `None` when nobody asked for one.
pub fn delivery(event: &Event, function: &FunctionName, ended: Ended) -> Option<NewDelivery> {
    let topic = url(event)?.to_owned();
    let line = |name: &str, value: String| (name.to_owned(), value);
    let headers = vec![
        line("x-call-id", super::cloudevents::encode(event.id.as_str())),
        line("x-function-name", function.to_string()),
        line("x-function-status", ended.status.to_string()),
        line("x-duration-seconds", format!("{:.6}", ended.took.as_secs_f64())),
    ];
    let http = HttpRequest { method: "POST".to_owned(), path: String::new(), query: String::new(), headers };
    let event = Event {
        id: event.id.clone(),
        source: format!("/function/{function}"),
        kind: TYPE.to_owned(),
        subject: None,
        time: None,
        content_type: ended.content_type,
        extensions: BTreeMap::new(),
        http: Some(http),
        data: ended.body,
    };
    Some(NewDelivery {
        target: Target::Callback,
        lane: Lane::Low,
        function: Some(function.clone()),
        topic,
        event,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart_or_refused_with_a_reason() {
        let good = |url: &str| CallbackUrl::parse(url).map(|url| (url.tls, url.host, url.port, url.target));
        let is = |tls, host: &str, port, target: &str| Ok((tls, host.to_owned(), port, target.to_owned()));

        assert_eq!(good("http://h"), is(false, "h", 80, "/"));
        assert_eq!(good("https://h.example:8443/a/b?x=1"), is(true, "h.example", 8443, "/a/b?x=1"));
        assert_eq!(good("http://[::1]:81?x"), is(false, "::1", 81, "/?x"));
        for bad in [
            "",
            "h",
            "ftp://h",
            "http://",
            "http://:80",
            "http://h:0",
            "http://h:x",
            "http://u:p@h/",
            "http://h/ a",
            "http://h/#f",
            "http://[::1",
            "http://[x]",
            "http://h/\u{e9}",
            "HTTP//h",
        ] {
            assert!(CallbackUrl::parse(bad).is_err(), "{bad}");
        }
    }
}
