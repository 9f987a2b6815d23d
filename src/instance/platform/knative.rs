//! Knative Serving's runtime contract, which Cloud Run's container contract follows
//! (knative/specs, specs/serving/runtime-contract.md).

use super::{Contract, Looks, Ready, var};
use crate::model::Revision;

pub(super) const CONTRACT: Contract = Contract {
    port: 8080,
    // The default probe: TCP.
    ready: Ready::Connects,
    environment,
    request: |_, _, _| {},
    first: |_| None,
};

fn environment(revision: &Revision, _: u16) -> Vec<(String, String)> {
    let name = revision.name().as_str();
    vec![
        var("K_SERVICE", name),
        // As Knative names revisions by itself.
        var("K_REVISION", format!("{name}-{:05}", revision.number)),
        var("K_CONFIGURATION", name),
    ]
}

/// The functions frameworks and the buildpacks that build with them.
pub(super) fn looks_like(image: &Looks<'_>) -> bool {
    image.runs("functions-framework")
        || image.has_variable("FUNCTION_TARGET")
        || image.has_variable("GOOGLE_FUNCTION_TARGET")
}
