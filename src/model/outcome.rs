//! How an invocation ended.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What one attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Succeeded {
        output: Vec<u8>,
        content_type: Option<String>,
        took: Duration,
    },
    /// The function's own failure: counted against `retry.attempts`.
    Failed {
        failure: Failure,
        output: Vec<u8>,
        took: Duration,
    },
    /// Lost to a killed launcher or daemon: not the function's fault, counted apart.
    Lost,
}

/// Why an attempt failed; each is told apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    #[error("exited with code {0}")]
    Exit(i32),
    #[error("killed by signal {0}")]
    Signal(i32),
    #[error("out of memory: killed at its limit of {limit_bytes} bytes")]
    OutOfMemory { limit_bytes: u64 },
    #[error("timed out after {limit_ms} ms")]
    TimedOut { limit_ms: u64 },
    #[error("output is larger than limits.payload, {limit_bytes} bytes")]
    OutputTooLarge { limit_bytes: u64 },
    /// The container could not be made or its command not executed.
    #[error("could not start: {0}")]
    Start(String),
    #[error("event data is larger than limits.payload, {limit_bytes} bytes")]
    PayloadTooLarge { limit_bytes: u64 },
    /// An event that no function may run: oversized PUBLISH, a chain that is too long.
    #[error("refused: {0}")]
    Refused(String),
}

impl Failure {
    /// Whether another attempt could end differently.
    pub fn retryable(&self) -> bool {
        !matches!(self, Self::PayloadTooLarge { .. } | Self::Refused(_))
    }
}
