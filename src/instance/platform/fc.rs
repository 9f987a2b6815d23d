//! Alibaba Cloud Function Compute's custom containers (code-development-in-custom-container-
//! runtimes): a server on port 9000. A request of HTTP comes as it is; any other event is
//! `POST /invoke` with the event as its body. `POST /initialize` comes once, before anything
//! else; a function without an initializer answers 404 or 405. `x-fc-control-path` tells one from the
//! other. An answer of 200 may say by `x-fc-status` that the function has failed (event-handlers-1).
//!
//! Credentials, region, account and log store are the cloud's, and there is none here: their
//! headers are left out.

use super::{Contract, First, Ready};
use crate::instance::request::Head;
use crate::model::event::TYPE_HTTP;
use crate::model::{Event, Revision};

pub(super) const CONTRACT: Contract = Contract {
    port: 9000,
    ready: Ready::Connects,
    environment: |_, _| Vec::new(),
    request,
    first: |revision| {
        let mut head =
            Head { method: "POST".to_owned(), target: "/initialize".to_owned(), headers: Vec::new() };
        head.set("x-fc-control-path", "/initialize");
        facts(revision, &mut head);
        Some(First { head, body: Vec::new(), may_lack: true })
    },
};

fn request(revision: &Revision, event: &Event, head: &mut Head) {
    head.headers.retain(|(name, _)| !name.starts_with("x-fc-"));
    if event.kind != TYPE_HTTP || event.http.is_none() {
        head.method = "POST".to_owned();
        head.target = "/invoke".to_owned();
        head.set("content-type", "application/octet-stream");
        head.set("x-fc-control-path", "/invoke");
    } else {
        head.set("x-fc-control-path", "/http-invoke");
    }
    head.set("x-fc-request-id", event.id.as_str());
    facts(revision, head);
}

/// Where an answer says how it went.
pub(super) const STATUS: &str = "x-fc-status";

/// What an answer's status is worth, with what it `said` there.
pub(super) fn judged(status: u16, said: Option<&str>) -> u16 {
    let said = said.and_then(|said| said.trim().parse().ok());
    if (200..300).contains(&status) { said.unwrap_or(status) } else { status }
}

fn facts(revision: &Revision, head: &mut Head) {
    let limits = &revision.manifest.limits;
    head.set("x-fc-function-name", revision.name().as_str());
    head.set("x-fc-function-memory", &(limits.memory_bytes >> 20).to_string());
    head.set("x-fc-function-timeout", &limits.timeout.as_secs().max(1).to_string());
    let start = revision.manifest.serving.start.as_secs().max(1).to_string();
    head.set("x-fc-initialization-timeout", &start);
    head.set("x-fc-version-id", &revision.number.to_string());
    head.set("x-fc-qualifier", "LATEST");
}

#[cfg(test)]
mod tests {
    use super::judged;

    #[test]
    fn function_that_says_it_failed_has_failed() {
        assert_eq!((judged(200, None), judged(500, None)), (200, 500));
        assert_eq!((judged(200, Some("200")), judged(200, Some(" 404"))), (200, 404));
        assert_eq!((judged(500, Some("200")), judged(200, Some("fine"))), (500, 200));
    }
}
