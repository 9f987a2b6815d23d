//! How refusals look: `application/problem+json` (RFC 9457), the same error always with the
//! same status.

use crate::channels::{CallError, DeployError};
use crate::errors::chain;
use crate::image::ImageError;
use crate::model::Failure;
use crate::net::http::problem;
use crate::store::StoreError;
use http_types::StatusCode;
use std::time::Duration;
use tide::Response;
use tracing::warn;

/// Soon: a place may become free any moment.
const RETRY_SOON: Duration = Duration::from_secs(1);
/// When the buffer drains, or somebody resumes the function.
const RETRY_LATER: Duration = Duration::from_secs(30);
/// A daemon that is stopping is usually being restarted.
const RETRY_AFTER_RESTART: Duration = Duration::from_secs(5);

/// An answer that is not what was asked for.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    detail: String,
    errors: Vec<String>,
    retry_after: Option<Duration>,
    headers: Vec<(&'static str, String)>,
}

impl Refusal {
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new(), retry_after: None, headers: Vec::new() }
    }

    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BadRequest, detail)
    }

    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NotFound, detail)
    }

    pub fn unknown_function(name: &str) -> Self {
        Self::not_found(format!("no function named `{}`", name.chars().take(80).collect::<String>()))
    }

    pub fn not_yet(what: &str) -> Self {
        Self::new(StatusCode::NotImplemented, format!("{what}: not in this version of neap"))
    }

    pub fn too_large(bytes_max: u64) -> Self {
        Self::new(StatusCode::PayloadTooLarge, format!("the body is larger than {bytes_max} bytes"))
    }

    pub fn method_not_allowed(allowed: &str) -> Self {
        Self::new(StatusCode::MethodNotAllowed, format!("allowed here: {allowed}")).with("allow", allowed)
    }

    pub fn stopping() -> Self {
        Self::new(StatusCode::ServiceUnavailable, "neap is stopping").after(RETRY_AFTER_RESTART)
    }

    pub fn busy(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::ServiceUnavailable, detail).after(RETRY_SOON)
    }

    pub fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        warn!(error, "request failed");
        Self::new(StatusCode::InternalServerError, chain(error))
    }

    /// The same, said of one of several things.
    pub fn about(self, what: &str) -> Self {
        Self { detail: format!("{what}: {}", self.detail), ..self }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub fn status(&self) -> StatusCode {
        self.status
    }

    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// Every mistake of a refused manifest.
    pub fn errors(&self) -> &[String] {
        &self.errors
    }

    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    fn after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Self {
        let detail = (!refusal.detail.is_empty()).then_some(refusal.detail);
        let mut response = Response::from_res(problem(refusal.status, detail, refusal.errors));
        if let Some(wait) = refusal.retry_after {
            set_header(&mut response, "retry-after", &wait.as_secs_f64().ceil().max(1.0).to_string());
        }
        for (name, value) in &refusal.headers {
            if *name == "www-authenticate" {
                append_header(&mut response, name, value);
            } else {
                set_header(&mut response, name, value);
            }
        }
        response
    }
}

impl From<CallError> for Refusal {
    fn from(error: CallError) -> Self {
        let detail = error.to_string();
        match error {
            CallError::Unknown(_) => Self::not_found(detail),
            CallError::Paused(_) => Self::new(StatusCode::ServiceUnavailable, detail).after(RETRY_LATER),
            CallError::TooFast { wait, .. } => Self::new(StatusCode::TooManyRequests, detail).after(wait),
            CallError::NoCapacity { wait, .. } => {
                Self::new(StatusCode::ServiceUnavailable, detail).after(wait)
            }
            CallError::Lost => Self::busy(detail),
            CallError::Stopping => Self::stopping(),
            // The output, not what was sent.
            CallError::NotStored(error @ StoreError::TooLarge { .. }) => {
                Self::new(StatusCode::InsufficientStorage, format!("{detail}: {error}"))
            }
            CallError::NotStored(error) => {
                let cause = Self::from(error);
                Self { detail: format!("{detail}: {}", cause.detail), ..cause }
            }
            CallError::Failed { failure, .. } => {
                let status = match failure {
                    Failure::TimedOut { .. } => StatusCode::GatewayTimeout,
                    Failure::PayloadTooLarge { .. } => StatusCode::PayloadTooLarge,
                    _ => StatusCode::BadGateway,
                };
                Self::new(status, detail).with("x-neap-failure", failure_word(&failure))
            }
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let detail = error.to_string();
        match error {
            StoreError::Full | StoreError::DiskFull => {
                Self::new(StatusCode::InsufficientStorage, detail).after(RETRY_LATER)
            }
            StoreError::TooLarge { .. } => Self::new(StatusCode::PayloadTooLarge, detail),
            StoreError::NotFound => Self::not_found(detail),
            StoreError::Stopped => Self::stopping(),
            StoreError::TooManyFunctions(_)
            | StoreError::TooNew { .. }
            | StoreError::Sqlite { .. }
            | StoreError::Io { .. }
            | StoreError::Damaged(_) => Self::internal(&error),
        }
    }
}

impl From<DeployError> for Refusal {
    fn from(error: DeployError) -> Self {
        let detail = error.to_string();
        match error {
            DeployError::Invalid(errors) => {
                let count = errors.len();
                let detail = format!("{count} mistake{}", if count == 1 { "" } else { "s" });
                Self { errors, ..Self::bad_request(detail) }
            }
            DeployError::Unknown(_) => Self::not_found(detail),
            DeployError::OwnedByFile { .. }
            | DeployError::NoImage(_)
            | DeployError::NotPulled(..)
            | DeployError::NothingBefore(_) => Self::new(StatusCode::Conflict, detail),
            DeployError::Failed(_) => Self::new(StatusCode::InternalServerError, detail),
        }
    }
}

impl From<ImageError> for Refusal {
    fn from(error: ImageError) -> Self {
        match error {
            ImageError::NotFound(_) => Self::not_found(error.to_string()),
            ImageError::Refused(_)
            | ImageError::Deadly(_)
            | ImageError::Later { .. }
            | ImageError::NoSpace { .. }
            | ImageError::Lacks { .. } => Self::bad_request(error.to_string()),
            ImageError::Io { .. } => Self::internal(&error),
        }
    }
}

/// One word for programs, beside the sentence for people.
fn failure_word(failure: &Failure) -> &'static str {
    match failure {
        Failure::Exit(_) => "exit",
        Failure::Signal(_) => "signal",
        Failure::OutOfMemory { .. } => "out_of_memory",
        Failure::TimedOut { .. } => "timed_out",
        Failure::OutputTooLarge { .. } => "output_too_large",
        Failure::Start(_) => "start",
        Failure::Status(_) => "status",
        Failure::Answer(_) => "answer",
        Failure::Copies { .. } => "copies",
        Failure::PayloadTooLarge { .. } => "payload_too_large",
        Failure::Refused(_) => "refused",
    }
}

/// Sets a header to outside text: http_types panics on what isn't ASCII, so that is left out.
pub fn set_header(response: &mut Response, name: &'static str, value: &str) {
    if let Ok(value) = http_types::headers::HeaderValue::from_bytes(value.as_bytes().to_vec()) {
        response.insert_header(name, value);
    }
}

fn append_header(response: &mut Response, name: &'static str, value: &str) {
    if let Ok(value) = http_types::headers::HeaderValue::from_bytes(value.as_bytes().to_vec()) {
        response.append_header(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FunctionName;

    fn status(error: impl Into<Refusal>) -> (u16, bool) {
        let response = Response::from(error.into());
        assert_eq!(
            response.content_type().map(|c| c.to_string()).as_deref(),
            Some("application/problem+json")
        );
        (response.status().into(), response.header("retry-after").is_some())
    }

    #[test]
    fn every_error_of_a_call_has_its_status() {
        let name = FunctionName::parse("f").expect("a good name");
        let failed = |failure| CallError::Failed { failure, output: Vec::new() };

        assert_eq!(status(CallError::Unknown(name.clone())), (404, false));
        assert_eq!(status(CallError::Paused(name)), (503, true));
        assert_eq!(status(CallError::NoCapacity { why: "memory", wait: RETRY_SOON }), (503, true));
        assert_eq!(status(CallError::Stopping), (503, true));
        assert_eq!(status(CallError::Lost), (503, true));
        assert_eq!(status(CallError::NotStored(StoreError::Full)), (507, true));
        let too_large = || StoreError::TooLarge { bytes: 2, bytes_max: 1 };
        assert_eq!(status(CallError::NotStored(too_large())), (507, false));
        assert_eq!(status(too_large()), (413, false));
        assert_eq!(status(failed(Failure::Exit(3))), (502, false));
        assert_eq!(status(failed(Failure::TimedOut { limit_ms: 1 })), (504, false));
    }

    #[test]
    fn outside_text_in_a_header_never_panics() {
        let response = Response::from(Refusal::method_not_allowed("P\u{d6}ST"));

        assert_eq!(response.status(), 405);
    }
}
