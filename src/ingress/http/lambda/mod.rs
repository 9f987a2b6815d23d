//! The AWS Lambda Invoke API, as SDKs and aws-cli speak it with an endpoint URL of this node:
//! <https://docs.aws.amazon.com/lambda/latest/api/API_Invoke.html>. Any function may be invoked,
//! whatever its handler; its data is the JSON payload.
//!
//! | `X-Amz-Invocation-Type` | |
//! |---|---|
//! | `RequestResponse` | waits; 200, also when the function failed: then `X-Amz-Function-Error` |
//! | `Event` | 202 once the event is committed |
//! | `DryRun` | 204 when the function is there and the caller may invoke it |
//!
//! A version is `$LATEST` or the number of the revision that is deployed. Errors are AWS's, by
//! name (`x-amzn-ErrorType`) and status. Where a token is asked for, a signature made with it as
//! the secret access key is as good (`signature`).

mod signature;
mod stream;
pub mod url;

pub use stream::invoke_streaming;

use super::functions::{self, ask, enqueue};
use super::problem::{Refusal, set_header};
use super::{Request, Shared, event};
use crate::channels::{CallError, Response as Answered};
use crate::ingress::routes::{Deployment, Routes};
use crate::model::event::TYPE_HTTP;
use crate::model::function::{Handler, Trigger};
use crate::model::{Event, EventId, Failure, FunctionName, HttpRequest};
use crate::net::http::{Peer, Returned};
use crate::telemetry::logs::LogQuery;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeMap;
use std::time::Duration;
use tide::{Response, StatusCode};

/// Of a request to a function that is not there: it is read for its signature's sake.
const BODY_BYTES_MAX: u64 = 1 << 20;
/// What AWS gives of a log.
const LOG_TAIL_BYTES: usize = 4096;
const LATEST: &str = "$LATEST";

/// POST /2015-03-31/functions/{name}/invocations?Qualifier=
pub async fn invoke(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    Ok(answer(&shared, &mut request).await.unwrap_or_else(Response::from))
}

async fn answer(shared: &Shared, request: &mut Request) -> Result<Response, Fault> {
    let Asked { deployment, version, event, kind, log_tail, place: _place } = asked(shared, request).await?;
    let id = event.id.clone();
    let name = deployment.revision.name().clone();
    let mut response = match kind {
        Kind::DryRun => Response::new(StatusCode::NoContent),
        Kind::Event => {
            enqueue(shared, &deployment, event, None).await.map_err(Fault::of)?;
            Response::new(StatusCode::Accepted)
        }
        Kind::RequestResponse => {
            let result = run(shared, &deployment, event).await?;
            let mut response = Response::new(StatusCode::Ok);
            let failed = result.is_err();
            let payload = result.unwrap_or_else(|payload| payload);
            response.set_body(shared.outputs.hold(payload).map_err(Fault::of)?);
            response.insert_header("content-type", "application/json");
            if failed {
                response.insert_header("x-amz-function-error", "Unhandled");
            }
            if log_tail {
                set_header(&mut response, "x-amz-log-result", &tail(shared, &name, &id));
            }
            response
        }
    };
    set_header(&mut response, "x-amz-executed-version", &version);
    set_header(&mut response, "x-amzn-requestid", id.as_str());
    Ok(response)
}

/// A request to invoke that is in order.
struct Asked {
    deployment: Deployment,
    /// As it was asked for.
    version: String,
    event: Event,
    kind: Kind,
    log_tail: bool,
    place: super::body::Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    RequestResponse,
    Event,
    DryRun,
}

async fn asked(shared: &Shared, request: &mut Request) -> Result<Asked, Fault> {
    let name = event::decode(request.param("name").unwrap_or(""));
    let name = name.ok_or_else(|| Fault::parameter("the function's name is not UTF-8"))?;
    let (name, qualifier) = named(&name)?;
    let routes = shared.api.routes.get();
    let deployment = routes.function(name);
    let bytes_max = deployment.map_or(BODY_BYTES_MAX, |d| d.revision.manifest.limits.payload_bytes);
    // Before anything is said of what is deployed; and only for a signature's sake is a body read
    // of somebody unknown.
    let signed = is_signed(request);
    if !signed {
        authorize(shared, request, deployment, &[])?;
    }
    let body = shared.room.read(request, bytes_max).await.map_err(Fault::of)?;
    if signed {
        authorize(shared, request, deployment, &body.bytes)?;
    }

    let header = |name: &str| request.header(name).map(|values| values.last().as_str());
    let kind = match header("x-amz-invocation-type") {
        None | Some("RequestResponse") => Kind::RequestResponse,
        Some("Event") => Kind::Event,
        Some("DryRun") => Kind::DryRun,
        Some(_) => return Err(Fault::parameter("InvocationType is RequestResponse, Event or DryRun")),
    };
    let log_tail = match header("x-amz-log-type") {
        None | Some("None") => false,
        Some("Tail") => true,
        Some(_) => return Err(Fault::parameter("LogType is None or Tail")),
    };
    if header("x-amz-client-context").is_some_and(|text| !is_object_in_base64(text)) {
        let what = "Client context must be a valid Base64-encoded JSON object.";
        return Err(Fault::user(400, "InvalidRequestContentException", what));
    }
    let asked_for = request.url().query_pairs().find(|(key, _)| key == "Qualifier");
    let asked_for = asked_for.map(|(_, value)| value.into_owned()).filter(|value| !value.is_empty());
    if let (Some(one), Some(other)) = (qualifier, &asked_for)
        && one != other
    {
        return Err(Fault::parameter("the name's qualifier and Qualifier differ"));
    }
    let version = asked_for.as_deref().or(qualifier).unwrap_or(LATEST).to_owned();
    let deployment = deployed(&routes, name, &version)?.clone();
    if serde_json::from_slice::<serde::de::IgnoredAny>(&body.bytes).is_err() && !body.bytes.is_empty() {
        return Err(Fault::user(400, "InvalidRequestContentException", "the payload is not JSON"));
    }
    let event = as_event(shared, request, body.bytes);
    Ok(Asked { deployment, version, event, kind, log_tail, place: body.place })
}

/// A name, a partial or a whole ARN, each with or without a qualifier.
fn named(text: &str) -> Result<(&str, Option<&str>), Fault> {
    let parts: Vec<&str> = text.split(':').collect();
    match parts.as_slice() {
        ["arn", _, "lambda", _, _, "function", name] | [name] | [_, "function", name] => Ok((name, None)),
        ["arn", _, "lambda", _, _, "function", name, qualifier]
        | [_, "function", name, qualifier]
        | [name, qualifier] => Ok((name, Some(qualifier))),
        _ => Err(Fault::parameter("FunctionName is a name or an ARN of a Lambda function")),
    }
}

fn deployed<'a>(routes: &'a Routes, name: &str, version: &str) -> Result<&'a Deployment, Fault> {
    let missing = |what: String| Fault::user(404, "ResourceNotFoundException", &what);
    let shown = |text: &str| text.chars().take(80).collect::<String>();
    let deployment =
        routes.function(name).ok_or_else(|| missing(format!("Function not found: {}", shown(name))))?;
    let number = deployment.revision.number;
    if version == LATEST || version.parse() == Ok(number) {
        return Ok(deployment);
    }
    let version = shown(version);
    Err(missing(format!("Function {name} has version {number} and $LATEST here, not {version}")))
}

fn is_signed(request: &Request) -> bool {
    request.header("authorization").is_some_and(|v| signature::is_signature(v.last().as_str()))
}

/// As functions are invoked anywhere, and beyond loopback always with the token.
fn authorize(
    shared: &Shared,
    request: &Request,
    deployment: Option<&Deployment>,
    body: &[u8],
) -> Result<(), Fault> {
    let triggers = deployment.map_or(&[][..], |deployment| &deployment.revision.manifest.triggers);
    let asks = triggers.iter().any(|trigger| matches!(trigger, Trigger::Http(http) if http.token));
    let open = shared.api.http.listen.ip().is_loopback() && !shared.api.http.auth_functions && !asks;
    if open || matches!(shared.peer(request), Peer::Unix) {
        return Ok(());
    }
    let signed = is_signed(request);
    let denied = |kind: &'static str, what: String| Fault { kind, ..Fault::user(403, "", &what) };
    if !signed {
        return shared.known(request).map_err(|refusal| {
            if shared.token.is_configured() {
                denied("MissingAuthenticationTokenException", signature::Mismatch::Missing.to_string())
            } else {
                denied("AccessDeniedException", refusal.detail().to_owned())
            }
        });
    }
    let Some(secret) = shared.token.secret() else {
        return Err(denied("AccessDeniedException", "this node has no [http] token_file".to_owned()));
    };
    let lines: Vec<(String, String)> = request
        .iter()
        .flat_map(|(name, values)| values.iter().map(|value| (name.to_string(), value.as_str().to_owned())))
        .collect();
    let (target, method) = (functions::target(request), request.method());
    let signed = signature::Request {
        method: method.as_ref(),
        path: &target.path,
        query: &target.query,
        headers: &lines,
        body,
    };
    signature::verify(&signed, &secret, shared.api.clock.wall()).map_err(|mismatch| {
        use signature::Mismatch;
        let kind = match mismatch {
            Mismatch::Missing => "MissingAuthenticationTokenException",
            Mismatch::Malformed(_) => "IncompleteSignatureException",
            Mismatch::Unsigned(_) | Mismatch::Different | Mismatch::Expired(_) | Mismatch::Clock => {
                "InvalidSignatureException"
            }
        };
        denied(kind, mismatch.to_string())
    })
}

fn is_object_in_base64(text: &str) -> bool {
    let json = STANDARD.decode(text).ok();
    json.is_some_and(|json| {
        serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&json).is_ok()
    })
}

fn as_event(shared: &Shared, request: &Request, data: Vec<u8>) -> Event {
    let kept = |name: &str| matches!(name, "content-type" | "x-amz-client-context" | "x-amzn-trace-id");
    let mut headers: Vec<(String, String)> = request
        .iter()
        .filter(|(name, _)| kept(name.as_str()))
        .map(|(name, values)| (name.to_string(), values.last().as_str().to_owned()))
        .collect();
    headers.sort();
    let now = shared.api.clock.wall();
    let mut event = Event {
        id: request_id(shared),
        source: format!("/{}/http", shared.api.node),
        kind: TYPE_HTTP.to_owned(),
        subject: Some("/".to_owned()),
        time: Some(now),
        content_type: Some("application/json".to_owned()),
        extensions: BTreeMap::new(),
        http: Some(HttpRequest { method: "POST".into(), path: "/".into(), query: String::new(), headers }),
        data,
    };
    if !now.is_plausible() {
        event.doubt_time();
    }
    event
}

/// A UUID, as clients expect of AWS.
fn request_id(shared: &Shared) -> EventId {
    let hex = functions::random_id(shared).to_string();
    let uuid = format!("{}-{}-4{}-a{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..]);
    EventId::parse(&uuid).expect("36 characters of hex and dashes")
}

/// `Err`: the function's failure as a payload.
async fn run(
    shared: &Shared,
    deployment: &Deployment,
    event: Event,
) -> Result<Result<Vec<u8>, Vec<u8>>, Fault> {
    let (id, revision) = (event.id.clone(), &deployment.revision);
    match ask(shared, revision.name().clone(), event, None).await {
        Ok(Answered::Output { output, .. }) => Ok(Ok(output)),
        Ok(Answered::Passed(Returned { status, body, .. })) => {
            let limit_bytes = revision.manifest.limits.payload_bytes;
            let mut output = Vec::new();
            if body.whole(limit_bytes, &mut output).await.is_err() {
                return Ok(Err(described(&Failure::OutputTooLarge { limit_bytes }, &id)));
            }
            if (200..300).contains(&status) { Ok(Ok(output)) } else { Ok(Err(output)) }
        }
        Err(CallError::Failed { failure, output }) => match failed(deployment, &failure, output, &id) {
            Some(payload) => Ok(Err(payload)),
            None => Err(CallError::Failed { failure, output: Vec::new() }.into()),
        },
        Err(error) => Err(error.into()),
    }
}

/// `None`: what was sent is to blame.
fn failed(deployment: &Deployment, failure: &Failure, output: Vec<u8>, id: &EventId) -> Option<Vec<u8>> {
    match failure {
        Failure::PayloadTooLarge { .. } => None,
        // What the runtime said of it.
        Failure::Answer(_)
            if deployment.revision.manifest.handler == Handler::Lambda && !output.is_empty() =>
        {
            Some(output)
        }
        failure => Some(described(failure, id)),
    }
}

/// A failure in AWS's words, where it has some.
fn described(failure: &Failure, id: &EventId) -> Vec<u8> {
    let exited = |how: String| {
        ("Runtime.ExitError", format!("RequestId: {id} Error: Runtime exited with error: {how}"))
    };
    let (kind, message) = match failure {
        Failure::Exit(code) => exited(format!("exit status {code}")),
        Failure::Signal(signal) => exited(format!("signal: {signal}")),
        Failure::OutOfMemory { .. } => exited(format!("signal: killed ({failure})")),
        Failure::TimedOut { limit_ms } => {
            let seconds = *limit_ms as f64 / 1000.0;
            ("Sandbox.Timedout", format!("RequestId: {id} Error: Task timed out after {seconds:.2} seconds"))
        }
        Failure::OutputTooLarge { limit_bytes } => (
            "Function.ResponseSizeTooLarge",
            format!("Response payload size exceeded maximum allowed payload size ({limit_bytes} bytes)."),
        ),
        Failure::Start(_) => ("Runtime.Unknown", failure.to_string()),
        Failure::Status(_)
        | Failure::Answer(_)
        | Failure::Copies { .. }
        | Failure::PayloadTooLarge { .. }
        | Failure::Refused(_) => ("Function.Unknown", failure.to_string()),
    };
    serde_json::json!({ "errorType": kind, "errorMessage": message }).to_string().into_bytes()
}

/// The end of what the function wrote for this event.
fn tail(shared: &Shared, function: &FunctionName, id: &EventId) -> String {
    let wanted = LogQuery { tail: None, since: None, event: Some(id.clone()) };
    let lines = shared.api.logs.read(function, &wanted).unwrap_or_default();
    let text: String = lines.iter().flat_map(|line| [line.text.as_str(), "\n"]).collect();
    STANDARD.encode(&text.as_bytes()[text.len().saturating_sub(LOG_TAIL_BYTES)..])
}

/// An answer that is none: AWS's name for it, and what is wrong here.
#[derive(Debug)]
struct Fault {
    status: u16,
    kind: &'static str,
    message: String,
    retry_after: Option<Duration>,
}

impl Fault {
    fn user(status: u16, kind: &'static str, message: &str) -> Self {
        Self { status, kind, message: message.to_owned(), retry_after: None }
    }

    fn parameter(message: &str) -> Self {
        Self::user(400, "InvalidParameterValueException", message)
    }

    fn of(refusal: Refusal) -> Self {
        let (status, kind) = match u16::from(refusal.status()) {
            404 => (404, "ResourceNotFoundException"),
            413 => (413, "RequestTooLargeException"),
            429 => (429, "TooManyRequestsException"),
            status @ 400..500 => (status, "InvalidRequestContentException"),
            // SDKs try again.
            503 | 507 => (503, "ServiceException"),
            _ => (500, "ServiceException"),
        };
        Self { retry_after: refusal.retry_after(), ..Self::user(status, kind, refusal.detail()) }
    }
}

impl From<CallError> for Fault {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Paused(_) => Self::user(409, "ResourceConflictException", &error.to_string()),
            CallError::NoCapacity { wait, .. } => Self {
                retry_after: Some(wait),
                ..Self::user(429, "TooManyRequestsException", &error.to_string())
            },
            other => Self::of(other.into()),
        }
    }
}

impl From<Fault> for Response {
    fn from(fault: Fault) -> Self {
        let mut response =
            Response::new(StatusCode::try_from(fault.status).unwrap_or(StatusCode::InternalServerError));
        let whose = if fault.status < 500 { "User" } else { "Service" };
        let body = serde_json::json!({ "Type": whose, "Message": fault.message, "message": fault.message });
        response.set_body(body.to_string());
        response.insert_header("content-type", "application/json");
        response.insert_header("x-amzn-errortype", fault.kind);
        if let Some(wait) = fault.retry_after {
            set_header(&mut response, "retry-after", &wait.as_secs_f64().ceil().max(1.0).to_string());
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_named_in_all_of_awss_ways() {
        let arn = "arn:aws:lambda:eu-west-1:123456789012:function:f";

        for (text, qualifier) in [("f", None), ("f:7", Some("7")), ("1:function:f:a", Some("a")), (arn, None)]
        {
            assert_eq!(named(text).expect("a name"), ("f", qualifier), "{text}");
        }
        assert_eq!(named(&format!("{arn}:$LATEST")).expect("a name"), ("f", Some("$LATEST")));
        assert!(named("arn:aws:sqs:eu-west-1:1:f:f").is_err());
        assert!(named("a:b:c").is_err());
    }

    #[test]
    fn platforms_own_failures_have_awss_names() {
        let id = EventId::from_random([0; 16]);
        let kind = |failure| {
            let told: serde_json::Value = serde_json::from_slice(&described(&failure, &id)).expect("JSON");
            (told["errorType"].as_str().unwrap_or("").to_owned(), told["errorMessage"].to_string())
        };

        assert_eq!(kind(Failure::Exit(1)).0, "Runtime.ExitError");
        let (late, text) = kind(Failure::TimedOut { limit_ms: 3000 });
        assert_eq!(late, "Sandbox.Timedout");
        assert!(text.contains("Task timed out after 3.00 seconds"), "{text}");
        assert_eq!(kind(Failure::OutputTooLarge { limit_bytes: 1 }).0, "Function.ResponseSizeTooLarge");
    }
}
