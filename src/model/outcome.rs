//! How an invocation ended.

use super::Event;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What one attempt came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Succeeded {
        output: Vec<u8>,
        content_type: Option<String>,
        /// The function answered with a CloudEvent: its attributes, which become those of what
        /// the output becomes. Its data is `output`, its own is empty.
        event: Option<Box<Event>>,
        took: Duration,
    },
    /// The function's own failure: counted against `retry.attempts`.
    Failed {
        failure: Failure,
        output: Vec<u8>,
        took: Duration,
        /// How long the function asked to be left alone (`Retry-After`): the next attempt comes
        /// no sooner.
        retry_after: Option<Duration>,
    },
    /// Lost to a killed launcher or daemon: not the function's fault, counted apart.
    Lost,
}

impl Outcome {
    /// Without a word about when to try again.
    pub fn failed(failure: Failure, output: Vec<u8>, took: Duration) -> Self {
        Self::Failed { failure, output, took, retry_after: None }
    }
}

/// What one copy of a job has behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyProgress {
    pub index: u32,
    /// That ended by themselves.
    pub attempts: u32,
    /// `None`: it has another one.
    pub ended: Option<Result<(), Failure>>,
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
    /// An http function's answer was none of 2xx.
    #[error("answered with HTTP status {0}")]
    Status(u16),
    /// An http function gave no answer, or none that HTTP knows; or a lambda function's runtime
    /// or its handler reported an error.
    #[error("{0}")]
    Answer(String),
    /// A job's copies that used up their attempts; what became of the first of them.
    #[error("{failed} of {copies} copies failed; copy {index}: {first}")]
    Copies { failed: u32, copies: u32, index: u32, first: String },
    #[error("event data is larger than limits.payload, {limit_bytes} bytes")]
    PayloadTooLarge { limit_bytes: u64 },
    /// An event that no function may run: oversized PUBLISH, a chain that is too long.
    #[error("refused: {0}")]
    Refused(String),
}

impl Failure {
    /// Whether another attempt could end differently.
    pub fn retryable(&self) -> bool {
        match self {
            Self::PayloadTooLarge { .. } | Self::Refused(_) => false,
            // The list of Knative's eventing: what says "this request is wrong" stays wrong.
            Self::Status(status) => matches!(status, 404 | 408 | 409 | 425 | 429) || *status >= 500,
            _ => true,
        }
    }
}
