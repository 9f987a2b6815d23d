//! Fission's environments (fission/environments): a server on port 8888 that is no function yet.
//! `POST /v2/specialize` tells it once which code to load; after that every method and path is the
//! function's. `FISSION_VERSION = "1"` in the environment: one of version 1, which loads
//! `/userfunc/user` at a `POST /specialize` that says nothing.
//!
//! The code is in a directory of the node that the manifest mounts (`[[volume]]` with `from`), or in
//! the image: `FISSION_FILEPATH` in the environment says where, `/userfunc` when nothing does, and
//! `FISSION_FUNCTION` names the function in it as `fission function create --entrypoint` does
//! (`main.main`). Python's environments write down what they were told, in `/userfunc` as Fission has
//! it; here that can't be written to, and `USERFUNCVOL` leads them elsewhere.

use super::{Contract, First, Ready, var};
use crate::instance::request::Head;
use crate::model::{Event, Revision};

pub(super) const CONTRACT: Contract = Contract {
    port: 8888,
    ready: Ready::AnswersOrLacks("/healthz"),
    environment: |_, _| vec![var("USERFUNCVOL", "/tmp")],
    request,
    first: |revision| Some(specialize(revision)),
};

fn specialize(revision: &Revision) -> First {
    let said = |name: &str| revision.manifest.env.get(name).map_or("", String::as_str);
    let path = match said("FISSION_FILEPATH") {
        "" => "/userfunc",
        path => path,
    };
    if said("FISSION_VERSION") == "1" {
        let head = Head { method: "POST".to_owned(), target: "/specialize".to_owned(), headers: Vec::new() };
        return First { head, body: Vec::new(), may_lack: false };
    }
    let body = serde_json::json!({
        "filepath": path,
        "functionName": said("FISSION_FUNCTION"),
        "url": "",
        "FunctionMetadata": { "name": revision.name(), "namespace": "default" },
    });
    let mut head =
        Head { method: "POST".to_owned(), target: "/v2/specialize".to_owned(), headers: Vec::new() };
    head.set("content-type", "application/json");
    First { head, body: body.to_string().into_bytes(), may_lack: false }
}

/// The router's headers.
fn request(revision: &Revision, event: &Event, head: &mut Head) {
    head.headers.retain(|(name, _)| !name.starts_with("x-fission-"));
    head.set("x-fission-function-name", revision.name().as_str());
    head.set("x-fission-function-namespace", "default");
    head.set("x-fission-request-id", event.id.as_str());
}
