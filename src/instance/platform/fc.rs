//! Alibaba Cloud Function Compute's custom containers (code-development-in-custom-container-
//! runtimes): a server on port 9000. A request of HTTP comes as it is; any other event is
//! `POST /invoke` with the event as its body. `POST /initialize` comes once, before anything
//! else; a function without an initializer answers 404 or 405.
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
    }
    head.set("x-fc-request-id", event.id.as_str());
    facts(revision, head);
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
