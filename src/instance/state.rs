//! What a stdio instance's ending means. Pure.
//!
//! ```text
//!   created ──▶ started ──▶ exit ────────────────▶ outcome
//!                  ├─ deadline ──▶ killed ──▶ exit ──▶ timed out
//!                  ├─ output over the limit ──▶ killed ──▶ exit ──▶ too large
//!                  └─ launcher gone ──▶ lost
//! ```

use crate::model::function::Limits;
use crate::model::{Event, Failure, Outcome};
use std::collections::BTreeMap;
use std::time::Duration;

/// How the container's process ended, as the runtime tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Code(i32),
    Signal(i32),
    OutOfMemory,
    Lost,
}

/// Why the daemon killed it, if it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Killed {
    Deadline,
    OutputTooLarge,
}

/// Once killed by us, how it ended says nothing more; being lost always does.
pub fn outcome(
    ending: Ending,
    killed: Option<Killed>,
    output: Vec<u8>,
    limits: &Limits,
    took: Duration,
) -> Outcome {
    let failure = match (ending, killed) {
        (Ending::Lost, _) => return Outcome::Lost,
        (_, Some(Killed::Deadline)) => Failure::TimedOut { limit_ms: limits.timeout.as_millis() as u64 },
        (_, Some(Killed::OutputTooLarge)) => Failure::OutputTooLarge { limit_bytes: limits.payload_bytes },
        (Ending::OutOfMemory, None) => Failure::OutOfMemory { limit_bytes: limits.memory_bytes },
        (Ending::Signal(signal), None) => Failure::Signal(signal),
        (Ending::Code(0), None) => {
            return Outcome::Succeeded { output, content_type: None, event: None, took };
        }
        (Ending::Code(code), None) => Failure::Exit(code),
    };
    Outcome::failed(failure, output, took)
}

/// The largest single variable that the kernel takes (MAX_ARG_STRLEN, 32 pages of 4 KiB).
const VARIABLE_BYTES_MAX: usize = 131_072;

/// All of an event's attributes together: they travel to the container in one datagram.
const ENVIRONMENT_BYTES_MAX: usize = 48 * 1024;

/// The event's attributes as environment variables: `CE_ID`, …; for HTTP also `Http_Method`,
/// `Http_<Header>` as OpenFaaS's classic watchdog has them. What does not fit is left out from
/// the end, headers first, never cut.
pub fn environment(event: &Event) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::new();
    let mut room = ENVIRONMENT_BYTES_MAX;
    let mut put = |name: String, value: &str| {
        let bytes = name.len() + value.len() + 2;
        if !value.contains('\0') && bytes < VARIABLE_BYTES_MAX && bytes <= room {
            room -= bytes;
            env.push((name, value.to_owned()));
        }
    };
    put("CE_SPECVERSION".into(), "1.0");
    put("CE_ID".into(), event.id.as_str());
    put("CE_SOURCE".into(), &event.source);
    put("CE_TYPE".into(), &event.kind);
    if let Some(time) = event.time {
        put("CE_TIME".into(), &time.rfc3339());
    }
    if let Some(subject) = &event.subject {
        put("CE_SUBJECT".into(), subject);
    }
    if let Some(content_type) = &event.content_type {
        put("CE_DATACONTENTTYPE".into(), content_type);
    }
    for (name, value) in &event.extensions {
        put(format!("CE_{}", name.to_ascii_uppercase()), value);
    }
    if let Some(http) = &event.http {
        for (name, value) in HTTP_VARIABLES.into_iter().zip([&http.method, &http.path, &http.query]) {
            put(name.to_owned(), value);
        }
        // The caller chooses header names: none may stand in for what neap says of the request.
        let mut headers: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in &http.headers {
            let Some(name) = header_variable(name) else { continue };
            if HTTP_VARIABLES.contains(&name.as_str()) {
                continue;
            }
            // Lines of one name are one list (RFC 9110 §5.3).
            let all = headers.entry(name).or_default();
            if !all.is_empty() {
                all.push_str(", ");
            }
            all.push_str(value);
        }
        for (name, value) in headers {
            put(name, &value);
        }
    }
    env
}

/// What neap says of a request.
const HTTP_VARIABLES: [&str; 3] = ["Http_Method", "Http_Path", "Http_Query"];

/// `content-type` → `Http_Content_Type`; `None` for names that are no variable name.
fn header_variable(header: &str) -> Option<String> {
    let word = |word: &str| {
        let mut letters = word.chars();
        let first = letters.next().map(|c| c.to_ascii_uppercase());
        first.into_iter().chain(letters).collect::<String>()
    };
    let good = header.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    good.then(|| format!("Http_{}", header.split('-').map(word).collect::<Vec<_>>().join("_")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{EventId, HttpRequest, UnixMs};

    fn limits() -> Limits {
        Limits {
            memory_bytes: 1 << 20,
            cpu_millis: 500,
            pids: 8,
            timeout: Duration::from_secs(1),
            payload_bytes: 10,
            disk_bytes: 0,
        }
    }

    #[test]
    fn endings_are_told_apart() {
        let of = |ending, killed| outcome(ending, killed, Vec::new(), &limits(), Duration::ZERO);
        let failure = |outcome| match outcome {
            Outcome::Failed { failure, .. } => Some(failure),
            Outcome::Succeeded { .. } | Outcome::Lost => None,
        };

        assert!(matches!(of(Ending::Code(0), None), Outcome::Succeeded { .. }));
        assert_eq!(failure(of(Ending::Code(3), None)), Some(Failure::Exit(3)));
        assert_eq!(failure(of(Ending::Signal(11), None)), Some(Failure::Signal(11)));
        assert_eq!(
            failure(of(Ending::OutOfMemory, None)),
            Some(Failure::OutOfMemory { limit_bytes: 1 << 20 })
        );
        let timed_out = Some(Failure::TimedOut { limit_ms: 1000 });
        assert_eq!(failure(of(Ending::Signal(9), Some(Killed::Deadline))), timed_out);
        assert_eq!(failure(of(Ending::Code(0), Some(Killed::Deadline))), timed_out);
        assert_eq!(of(Ending::Lost, Some(Killed::Deadline)), Outcome::Lost);
    }

    fn event() -> Event {
        Event {
            id: EventId::from_random([1; 16]),
            source: "/gw/http".into(),
            kind: "neap.http.request".into(),
            subject: Some("/x".into()),
            time: Some(UnixMs(0)),
            content_type: None,
            extensions: [("neapchain".to_owned(), "1".to_owned())].into(),
            http: None,
            data: Vec::new(),
        }
    }

    #[test]
    fn attributes_become_variables() {
        let headers = vec![("content-type".into(), "text/plain".into()), ("x-é".into(), "y".into())];
        let http = HttpRequest { method: "POST".into(), path: "/p".into(), query: "a=1".into(), headers };
        let env = environment(&Event { http: Some(http), ..event() });

        let get = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
        assert_eq!(get("CE_SUBJECT"), Some("/x"));
        assert_eq!(get("CE_TIME"), Some("1970-01-01T00:00:00.000Z"));
        assert_eq!(get("CE_NEAPCHAIN"), Some("1"));
        assert_eq!(get("Http_Content_Type"), Some("text/plain"));
        assert_eq!(get("Http_Method"), Some("POST"));
        assert_eq!(env.iter().filter(|(n, _)| n.starts_with("Http_")).count(), 4);
    }

    #[test]
    fn headers_do_not_stand_in_for_the_request_and_lines_of_one_name_are_a_list() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let headers = vec![
            header("path", "/evil"),
            header("method", "DELETE"),
            header("query", "admin=1"),
            header("x-a", "first"),
            header("x-a", "second"),
        ];
        let http = HttpRequest { method: "POST".into(), path: "/p".into(), query: String::new(), headers };

        let env = environment(&Event { http: Some(http), ..event() });

        let all =
            |name: &str| env.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect::<Vec<_>>();
        assert_eq!(all("Http_Path"), ["/p"]);
        assert_eq!(all("Http_Method"), ["POST"]);
        assert_eq!(all("Http_Query"), [""]);
        assert_eq!(all("Http_X_A"), ["first, second"]);
    }

    #[test]
    fn hostile_attributes_stay_within_bounds() {
        let headers = (0..100).map(|n| (format!("x-{n}"), "v".repeat(4000))).collect();
        let http = HttpRequest { headers, ..HttpRequest::default() };
        let subject = Some("a\0b".to_owned());

        let env = environment(&Event { http: Some(http), subject, ..event() });

        let bytes: usize = env.iter().map(|(n, v)| n.len() + v.len() + 2).sum();
        assert!(bytes <= ENVIRONMENT_BYTES_MAX);
        assert!(env.iter().all(|(n, v)| !v.contains('\0') && n != "CE_SUBJECT"));
    }
}
