//! AWS Lambda's environment for container images (docs.aws.amazon.com/lambda, "Defined runtime
//! environment variables"). `_HANDLER`, which is the image's CMD, is set where the image is
//! known: `deploy`. With `AWS_LAMBDA_RUNTIME_API` set, AWS's base images leave their bundled
//! emulator alone.
//!
//! There is no region, no account and no credential here; SDKs want a region all the same.

use super::{Contract, Looks, Ready, var};
use crate::model::Revision;

/// The Runtime API's, inside the instance's own network.
pub const PORT: u16 = 9001;
pub const REGION: &str = "us-east-1";

pub(super) const CONTRACT: Contract =
    Contract { port: PORT, ready: Ready::Connects, environment, request: |_, _, _| {}, first: |_| None };

fn environment(revision: &Revision, port: u16) -> Vec<(String, String)> {
    let name = revision.name().as_str();
    vec![
        var("AWS_LAMBDA_RUNTIME_API", format!("127.0.0.1:{port}")),
        var("AWS_LAMBDA_FUNCTION_NAME", name),
        var("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        var("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", (revision.manifest.limits.memory_bytes >> 20).to_string()),
        var("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{name}")),
        var("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
        var("AWS_REGION", REGION),
        var("AWS_DEFAULT_REGION", REGION),
        var("LAMBDA_TASK_ROOT", "/var/task"),
        var("LAMBDA_RUNTIME_DIR", "/var/runtime"),
        var("TZ", ":UTC"),
    ]
}

pub(super) fn looks_like(image: &Looks<'_>) -> bool {
    image.runs("lambda-entrypoint.sh")
        || image.runs("awslambdaric")
        || image.runs("aws-lambda-rie")
        || image.runs("bootstrap")
        || image.has_variable("LAMBDA_TASK_ROOT")
}
