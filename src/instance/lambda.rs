//! Handler lambda: an event goes to a runtime that asks for it, as on AWS Lambda. The runtime
//! finds the Runtime API at `127.0.0.1:9001` inside its own network namespace (runtime_api.rs);
//! images made for Lambda run as they are.
//!
//! The event is the data when that is JSON; other text is a JSON string, bytes are base64 in
//! one. The client context and the trace are the caller's, if it gave them; else CloudEvents
//! attributes are in the context, under `custom`. The request id is the event's where that is a UUID, as
//! it is of Lambda's Invoke API, for each attempt the same. START, END and REPORT lines are in the log,
//! and INIT_REPORT of an instance that never got ready.
//!
//! Extensions in `/opt/extensions` run before the runtime does, and an event's end waits for theirs,
//! though its caller doesn't: nothing new comes to an instance, and it is not frozen, while an
//! extension still works on the last.
//!
//! An instance whose invocation timed out, or whose caller left, is killed: it still works on
//! what nobody waits for. So is one whose extension has ended.

use super::http::{Caller, Trouble};
use super::life::{Instance, exit_failure};
use super::platform;
use super::runtime_api::{Asker, Finished, Invocation, RuntimeApi, message};
use super::service::{Before, Place, Service, Setup};
use crate::channels::LogLine;
use crate::model::event::CUT_EXTENSION;
use crate::model::{Event, Failure, Outcome, Revision, prelude};
use crate::net::http::Returned;
use crate::runtime::{Exit, Inside};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_lite::future;
use smol::Timer;
use smol::channel::Sender;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Instances that turn out ended before an event is taken for lost.
const INSTANCES_TRIED: u32 = 4;

const INIT_FAILED: &str = "failed in its init: ";
const CLIENT_CONTEXT: &str = "x-amz-client-context";

/// Starts instances with the Runtime API in front of them.
pub struct Hosting;

impl Setup for Hosting {
    fn before(&self, inside: &Inside, revision: &Revision) -> Result<Before, String> {
        let port = platform::lambda::PORT;
        let listener = inside.listen(port).map_err(|error| format!("serve the Runtime API: {error}"))?;
        let manifest = &revision.manifest;
        let handler = manifest.command.as_ref().and_then(|command| command.last()).map_or("", String::as_str);
        let api = RuntimeApi::new(manifest.limits.payload_bytes, revision.name().as_str(), handler);
        let mut env = platform::environment(revision);
        env.retain(|(name, _)| name != "PORT");
        env.push(("AWS_LAMBDA_LOG_STREAM_NAME".to_owned(), format!("{:032x}", fastrand::u128(..))));
        Ok(Before { env, api: Some((listener, api)) })
    }

    fn ready<'a>(
        &'a self,
        instance: &'a Arc<Instance>,
        _: &'a Revision,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>> {
        Box::pin(async move {
            let Some(api) = &instance.api else { return Err("has no Runtime API".to_owned()) };
            let failed = |why| format!("{INIT_FAILED}{why}");
            if let Some(extensions) = &instance.extensions {
                api.registered().await.map_err(failed)?;
                extensions.go_on().await.map_err(|error| failed(error.to_string()))?;
            }
            api.initialized().await.map_err(failed)
        })
    }

    fn waits_for(&self, instance: &Instance) -> Option<String> {
        instance.api.as_ref()?.waits_for()
    }

    fn not_ready(&self, failure: &Failure, took: Duration) -> Option<String> {
        let what = match failure {
            Failure::Answer(why) => match why.strip_prefix(INIT_FAILED) {
                Some(why) => {
                    format!("error\tError Type: {}", why.split(':').next().unwrap_or("Runtime.Unknown"))
                }
                None => "timeout".to_owned(),
            },
            _ => "error\tError Type: Runtime.ExitError".to_owned(),
        };
        let ms = took.as_secs_f64() * 1000.0;
        Some(format!("INIT_REPORT Init Duration: {ms:.2} ms\tPhase: init\tStatus: {what}"))
    }
}

/// How an invocation ended, as far as its instance is concerned.
enum Ended {
    Finished(Finished),
    Exit(Exit),
    Late,
}

/// `answers`: gets a streamed response as soon as it has begun.
pub async fn run(
    caller: &Caller<'_>,
    service: &Arc<Service>,
    event: &Event,
    answers: Option<&Sender<Returned>>,
    log: &LogLine,
) -> Outcome {
    let limits = &service.revision.manifest.limits;
    let cut = event.extensions.contains_key(CUT_EXTENSION);
    if cut || event.data.len() as u64 > limits.payload_bytes {
        let failure = Failure::PayloadTooLarge { limit_bytes: limits.payload_bytes };
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    // An instance may have ended between two events, and nobody has noticed yet.
    for _ in 0..INSTANCES_TRIED {
        let mut place = match service.place().await {
            Ok(place) => place,
            Err(why) => return Trouble::from(why).outcome(Duration::ZERO, log),
        };
        // Until it has answered: a dropped future leaves a runtime that is still at work.
        place.keep = false;
        let start = Instant::now();
        if let Some(outcome) = invoke(caller, &mut place, event, &service.revision, answers, log).await {
            leave(place, service, event, limits.timeout.saturating_sub(start.elapsed()));
            return outcome;
        }
    }
    Outcome::Lost
}

/// Gives the place back when the instance's extensions are through with the event, too.
fn leave(place: Place, service: &Arc<Service>, event: &Event, left: Duration) {
    let Some(api) = place.instance.api.clone().filter(|api| place.keep && api.waits_for().is_some()) else {
        return;
    };
    let (service, event) = (service.clone(), event.id.clone());
    let base = service.base.clone();
    let done = async move {
        let wait = async {
            api.extensions_wait().await;
            None
        };
        let gone = async {
            place.instance.ended().await;
            None
        };
        let late = async {
            Timer::after(left).await;
            api.waits_for()
        };
        let late = future::or(wait, future::or(gone, late)).await;
        if let Some(what) = &late {
            let timeout = service.revision.manifest.limits.timeout.as_secs_f64();
            let line = format!("Task timed out after {timeout:.2} seconds: {what}");
            service.base.logs.append(service.revision.name(), &event, service.base.clock.wall(), &line);
        }
        place.give_back(late.is_none() && !api.has_failed());
    };
    base.executor.spawn(done).detach();
}

/// `None`: the instance had ended before it saw the event.
async fn invoke(
    caller: &Caller<'_>,
    place: &mut Place,
    event: &Event,
    revision: &Revision,
    answers: Option<&Sender<Returned>>,
    log: &LogLine,
) -> Option<Outcome> {
    let limits = &revision.manifest.limits;
    let instance = place.instance.clone();
    let api = instance.api.clone()?;
    instance.begin(&event.id);
    let id = request_id(event);
    let deadline_ms = caller.clock.wall().0.saturating_add(limits.timeout.as_millis() as i64);
    let invocation = invocation(event, revision, &id, deadline_ms);
    let (finished, finishes) = smol::channel::bounded(Finished::MOST);
    if !api.offer(invocation, Asker { finished, streams: answers.is_some() }) {
        return None;
    }
    let start = Instant::now();
    let answered = async {
        loop {
            match (finishes.recv().await, answers) {
                (Ok(Finished::Fetched), _) => log(&format!("START RequestId: {id} Version: $LATEST")),
                (Ok(Finished::Begun(begun)), Some(answers)) => drop(answers.try_send(begun)),
                (Ok(Finished::Begun(_)), None) => {}
                (Ok(finished), _) => return Ended::Finished(finished),
                (Err(_), _) => future::pending().await,
            }
        }
    };
    let gone = async { Ended::Exit(instance.ended().await) };
    let late = async {
        Timer::after(limits.timeout).await;
        Ended::Late
    };
    let ended = future::or(answered, future::or(gone, late)).await;
    let took = start.elapsed();
    // It had its reasons, which are not this event's.
    if matches!(ended, Ended::Exit(_)) && api.is_untouched() {
        return None;
    }
    let init = api.take_init();
    place.keep = matches!(ended, Ended::Finished(_)) && !api.has_failed();
    let outcome = outcome(ended, &id, revision, took, log);
    log(&report(&id, took, init, limits.memory_bytes, instance.inside.memory_peak_bytes()));
    Some(outcome)
}

fn outcome(ended: Ended, id: &str, revision: &Revision, took: Duration, log: &LogLine) -> Outcome {
    let limits = &revision.manifest.limits;
    match ended {
        Ended::Finished(Finished::Streamed | Finished::Begun(_) | Finished::Fetched) => {
            Outcome::Succeeded { output: Vec::new(), content_type: None, event: None, took }
        }
        Ended::Finished(Finished::Response { body, content_type })
            if body.len() as u64 <= limits.payload_bytes =>
        {
            let (output, content_type) = without_prelude(body, content_type);
            Outcome::Succeeded { output, content_type, event: None, took }
        }
        Ended::Finished(Finished::Response { .. } | Finished::TooLarge) => {
            let limit_bytes = limits.payload_bytes;
            log(&format!(
                "Function.ResponseSizeTooLarge: Response payload size exceeded maximum allowed payload size ({limit_bytes} bytes)."
            ));
            Outcome::failed(Failure::OutputTooLarge { limit_bytes }, Vec::new(), took)
        }
        Ended::Finished(Finished::Error { kind, body }) => {
            let what = format!("the function reported {}", message(&kind, &body));
            Outcome::failed(Failure::Answer(what), body, took)
        }
        Ended::Late => {
            log(&format!("RequestId: {id} Task timed out after {:.2} seconds", limits.timeout.as_secs_f64()));
            let limit_ms = limits.timeout.as_millis() as u64;
            Outcome::failed(Failure::TimedOut { limit_ms }, Vec::new(), took)
        }
        Ended::Exit(Exit::Lost) => Outcome::Lost,
        Ended::Exit(exit) => {
            log(&format!("RequestId: {id} Error: {}\nRuntime.ExitError", exit_error(exit)));
            Outcome::failed(exit_failure(exit, revision), Vec::new(), took)
        }
    }
}

/// What was to be streamed to a caller over HTTP, status and headers first, and is collected: an output
/// has neither.
fn without_prelude(mut body: Vec<u8>, content_type: Option<String>) -> (Vec<u8>, Option<String>) {
    if !content_type.as_deref().is_some_and(prelude::is_announced_by) {
        return (body, content_type);
    }
    let _ = prelude::cut(&mut body);
    (body, None)
}

/// In Lambda's words, which are Go's.
fn exit_error(exit: Exit) -> String {
    match exit {
        Exit::Code(0) | Exit::Lost => "Runtime exited without providing a reason".to_owned(),
        Exit::Code(code) => format!("Runtime exited with error: exit status {code}"),
        Exit::OutOfMemory => "Runtime exited with error: signal: killed".to_owned(),
        Exit::Signal(signal) => {
            let name = match signal {
                6 => "aborted",
                9 => "killed",
                11 => "segmentation fault",
                15 => "terminated",
                _ => return format!("Runtime exited with error: signal {signal}"),
            };
            format!("Runtime exited with error: signal: {name}")
        }
    }
}

fn report(
    id: &str,
    took: Duration,
    init: Option<Duration>,
    memory_bytes: u64,
    peak_bytes: Option<u64>,
) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let mut line = format!(
        "END RequestId: {id}\nREPORT RequestId: {id}\tDuration: {:.2} ms\tBilled Duration: {:.0} ms\tMemory Size: {} MB",
        ms(took),
        ms(took).ceil(),
        memory_bytes >> 20,
    );
    if let Some(bytes) = peak_bytes {
        line += &format!("\tMax Memory Used: {} MB", bytes.div_ceil(1 << 20));
    }
    if let Some(init) = init {
        line += &format!("\tInit Duration: {:.2} ms", ms(init));
    }
    line
}

fn invocation(event: &Event, revision: &Revision, id: &str, deadline_ms: i64) -> Invocation {
    let arn =
        format!("arn:aws:lambda:{}:000000000000:function:{}", platform::lambda::REGION, revision.name());
    let trace = given(event, "x-amzn-trace-id").map(str::to_owned).unwrap_or_else(|| {
        format!("Root=1-{:08x}-{:024x};Sampled=0", deadline_ms / 1000, fastrand::u128(..) >> 32)
    });
    let lines = [
        ("content-type", "application/json".to_owned()),
        ("lambda-runtime-aws-request-id", id.to_owned()),
        ("lambda-runtime-deadline-ms", deadline_ms.to_string()),
        ("lambda-runtime-invoked-function-arn", arn.clone()),
        ("lambda-runtime-trace-id", trace.clone()),
        ("lambda-runtime-client-context", client_context(event)),
    ];
    let headers = lines.into_iter().map(|(name, value)| (name.to_owned(), value.into_bytes())).collect();
    Invocation { id: id.to_owned(), payload: payload(&event.data), headers, deadline_ms, arn, trace }
}

fn payload(data: &[u8]) -> Vec<u8> {
    if data.is_empty() {
        return b"{}".to_vec();
    }
    if serde_json::from_slice::<serde::de::IgnoredAny>(data).is_ok() {
        return data.to_vec();
    }
    let text = match std::str::from_utf8(data) {
        Ok(text) => serde_json::Value::from(text),
        Err(_) => serde_json::Value::from(STANDARD.encode(data)),
    };
    text.to_string().into_bytes()
}

/// A header of the call that it came by.
fn given<'a>(event: &'a Event, name: &str) -> Option<&'a str> {
    let headers = &event.http.as_ref()?.headers;
    headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// What the caller gave as base64 of a JSON object, or `{"custom":{"id":…}}`; in ASCII, for it is a
/// header.
fn client_context(event: &Event) -> String {
    let given = given(event, CLIENT_CONTEXT).and_then(|text| STANDARD.decode(text).ok());
    let given = given.and_then(|json| serde_json::from_slice::<serde_json::Value>(&json).ok());
    ascii(&given.filter(serde_json::Value::is_object).unwrap_or_else(|| attributes(event)).to_string())
}

fn attributes(event: &Event) -> serde_json::Value {
    let mut custom = serde_json::Map::new();
    let mut put = |name: &str, value: &str| custom.insert(name.to_owned(), value.into());
    put("id", event.id.as_str());
    put("source", &event.source);
    put("type", &event.kind);
    if let Some(subject) = &event.subject {
        put("subject", subject);
    }
    if let Some(content_type) = &event.content_type {
        put("datacontenttype", content_type);
    }
    for (name, value) in &event.extensions {
        put(name, value);
    }
    serde_json::json!({ "custom": custom })
}

/// JSON has anything outside of it in strings alone.
fn ascii(text: &str) -> String {
    let mut ascii = String::with_capacity(text.len());
    for unit in text.chars() {
        if unit.is_ascii() {
            ascii.push(unit);
        } else {
            let mut pair = [0; 2];
            for code in unit.encode_utf16(&mut pair) {
                ascii.push_str(&format!("\\u{code:04x}"));
            }
        }
    }
    ascii
}

fn request_id(event: &Event) -> String {
    let id = event.id.as_str();
    let mut parts = id.split('-');
    let lengths = [8, 4, 4, 4, 12];
    let hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_uuid =
        lengths.iter().all(|length| parts.next().is_some_and(|part| part.len() == *length && hex(part)))
            && parts.next().is_none();
    if is_uuid { id.to_owned() } else { uuid(fastrand::u128(..)) }
}

fn uuid(random: u128) -> String {
    // RFC 9562 §5.4: version 4, variant 10.
    let bits = random & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_that_is_no_json_becomes_a_json_string() {
        assert_eq!(payload(b"{\"a\": 1}"), b"{\"a\": 1}");
        assert_eq!(payload(b"21.5"), b"21.5");
        assert_eq!(payload(b"on \"x\""), br#""on \"x\"""#);
        assert_eq!(payload(b"\xff"), br#""/w==""#);
        assert_eq!(payload(b""), b"{}");
    }

    #[test]
    fn caller_brings_its_own_context_trace_and_request_id() {
        let mut event = Event {
            id: crate::model::EventId::parse("6f1d2a30-0000-4000-a000-00000000000a").expect("an id"),
            source: "/gw/http".into(),
            kind: "t".into(),
            subject: None,
            time: None,
            content_type: None,
            extensions: [("a".to_owned(), "\u{e9}".to_owned())].into(),
            http: None,
            data: Vec::new(),
        };
        assert_eq!(request_id(&event), event.id.as_str());
        assert!(client_context(&event).contains("\\u00e9"), "{}", client_context(&event));

        let line = |name: &str, value: String| (name.to_owned(), value);
        let context = STANDARD.encode("{ \"client\":\n{\"installation_id\": \"\u{e9}\"} }");
        let headers = vec![line(CLIENT_CONTEXT, context), line("x-amzn-trace-id", "Root=1-2-3".into())];
        let (method, path, query) = ("POST".into(), "/".into(), String::new());
        event.http = Some(crate::model::HttpRequest { method, path, query, headers });
        event.id = crate::model::EventId::from_random([1; 16]);
        assert_ne!(request_id(&event), event.id.as_str(), "no UUID");
        assert_eq!(client_context(&event), "{\"client\":{\"installation_id\":\"\\u00e9\"}}");
        assert_eq!(given(&event, "x-amzn-trace-id"), Some("Root=1-2-3"));
        event.http.as_mut().expect("it is there").headers[0].1 = STANDARD.encode("no JSON");
        assert!(client_context(&event).contains("custom"));
    }

    #[test]
    fn init_that_failed_is_reported_as_lambda_does() {
        let report = |failure| Hosting.not_ready(&failure, Duration::from_micros(12_340));
        let head = "INIT_REPORT Init Duration: 12.34 ms\tPhase: init\tStatus: ";
        for (failure, status) in [
            (Failure::Exit(1), "error\tError Type: Runtime.ExitError"),
            (
                Failure::Answer("failed in its init: ImportError: no x".into()),
                "error\tError Type: ImportError",
            ),
            (Failure::Answer("was not ready after 10s".into()), "timeout"),
        ] {
            assert_eq!(report(failure).as_deref(), Some(&*format!("{head}{status}")));
        }
    }

    #[test]
    fn output_has_no_prelude() {
        let kind = || Some("application/vnd.awslambda.http-integration-response; charset=x".to_owned());
        let stripped = |body: &[u8]| without_prelude(body.to_vec(), kind());

        assert_eq!(stripped(b"{}\0\0\0\0\0\0\0\0one"), (b"one".to_vec(), None));
        assert_eq!(stripped(b"none"), (b"none".to_vec(), None));
        let json = Some("application/json".to_owned());
        assert_eq!(without_prelude(vec![0; 9], json.clone()), (vec![0; 9], json));
    }

    #[test]
    fn request_ids_are_uuids_of_version_4() {
        assert_eq!(uuid(0), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
