//! OpenFaaS's workloads (openfaas/docs, reference/workloads.md): the classic watchdog,
//! of-watchdog, or any server on port 8080.
//!
//! Readiness is asked at `/_/health`, which both watchdogs have; `/_/ready` would run a function
//! behind the classic one, so it is asked where the manifest says `ready = "/_/ready"` alone. A
//! watchdog at its `max_inflight` answers 429: its instance gets nothing more until `ready` answers
//! 200, or for a second where there is none. An event waits meanwhile, or goes to another instance; a
//! caller, whose request is gone, gets the 429.

use super::{Contract, Looks, Ready};
use crate::instance::request::Head;
use crate::model::{Event, Revision};

pub(super) const CONTRACT: Contract = Contract {
    port: 8080,
    ready: Ready::AnswersOrLacks("/_/health"),
    environment: |_, _| Vec::new(),
    request,
    first: |_| None,
};

/// The gateway's headers; `X-Start-Time` counts nanoseconds.
fn request(_: &Revision, event: &Event, head: &mut Head) {
    head.set("x-call-id", event.id.as_str());
    if let Some(time) = event.time {
        head.set("x-start-time", &format!("{}000000", time.0));
    }
}

pub(super) fn looks_like(image: &Looks<'_>) -> bool {
    image.runs("fwatchdog") || image.runs("of-watchdog") || image.has_variable("fprocess")
}
