//! The Lambda Runtime API and its Extensions API, as one instance sees them at
//! `127.0.0.1:9001` in its own network namespace (AWS's runtime interface emulator is the
//! model: internal/lambda/rapi).
//!
//! ```text
//!   Init ──next──▶ Waiting ──invoke──▶ Running(id) ──response or error──▶ Waiting
//!    └─init/error─▶ Failed
//! ```
//!
//! One invocation at a time. A call with a wrong id is 400, one out of state 403. A response may
//! come in pieces; it is collected within `limits.payload`, and an error in its trailers makes it
//! one. The logs and telemetry APIs say that they are not supported, as the emulator's do.

use super::fleet::Number;
use crate::net::http::{Asked, Line, Returned, Told, WholeError, header};
use crate::watch::Watch;
use smol::channel::Sender;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What AWS takes above its limit before it says no.
const SLACK_BYTES: u64 = 100;

/// An error's description: message, type and stack trace.
const ERROR_BYTES_MAX: u64 = 256 * 1024;

/// AWS registers ten at most.
const EXTENSIONS_MAX: usize = 10;

/// An event on its way to the runtime.
#[derive(Clone, Debug)]
pub struct Invocation {
    pub id: String,
    pub payload: Vec<u8>,
    pub headers: Vec<Line>,
    /// For extensions.
    pub deadline_ms: i64,
    pub arn: String,
}

/// How the runtime ended it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    Response {
        body: Vec<u8>,
        content_type: Option<String>,
    },
    /// The function's own error, described in JSON.
    Error {
        kind: String,
        body: Vec<u8>,
    },
    TooLarge,
}

/// One instance's API.
pub struct RuntimeApi {
    payload_bytes: u64,
    function: String,
    handler: String,
    state: Mutex<State>,
    /// Counts what changes the state.
    changed: Watch<Number>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    extensions: BTreeMap<String, Extension>,
    /// The runtime waits for something to do.
    runtime_waits: bool,
}

#[derive(Default)]
enum Phase {
    #[default]
    Init,
    Waiting,
    /// Not yet fetched by the runtime.
    Offered(Invocation, Sender<Finished>),
    Running(Invocation, Sender<Finished>),
    Failed(String),
}

struct Extension {
    name: String,
    invokes: bool,
    waits: bool,
    /// The invocation that it was last told of.
    told: Option<String>,
}

impl RuntimeApi {
    pub fn new(payload_bytes: u64, function: &str, handler: &str) -> Arc<Self> {
        Arc::new(Self {
            payload_bytes,
            function: function.to_owned(),
            handler: handler.to_owned(),
            state: Mutex::default(),
            changed: Watch::new(0),
        })
    }

    /// Until the runtime and every extension wait for their first event; why it failed if it did.
    pub async fn initialized(&self) -> Result<(), String> {
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let state = self.lock();
                match &state.phase {
                    Phase::Failed(why) => return Err(why.clone()),
                    Phase::Init => {}
                    _ if state.extensions.values().all(|extension| extension.waits) => return Ok(()),
                    _ => {}
                }
            }
            self.changed.changed(seen).await;
        }
    }

    /// Gives the runtime an event. False: it has one, or is not one any more.
    pub fn offer(&self, invocation: Invocation, finished: Sender<Finished>) -> bool {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Waiting) {
            return false;
        }
        state.phase = Phase::Offered(invocation, finished);
        drop(state);
        self.change();
        true
    }

    /// Whether the event was not even fetched.
    pub fn is_untouched(&self) -> bool {
        matches!(self.lock().phase, Phase::Offered(..))
    }

    /// What answers requests from inside.
    pub fn answer(self: &Arc<Self>) -> Arc<dyn Fn(Asked) -> Told + Send + Sync> {
        let this = self.clone();
        Arc::new(move |asked| {
            let this = this.clone();
            Box::pin(async move { this.respond(asked).await })
        })
    }

    async fn respond(&self, asked: Asked) -> Returned {
        let path = asked.path.clone();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match (asked.method.as_str(), parts.as_slice()) {
            ("GET", ["2018-06-01", "ping"]) => plain(200, b"pong".to_vec()),
            ("GET", ["2018-06-01", "runtime", "invocation", "next"]) => self.next().await,
            ("POST", ["2018-06-01", "runtime", "invocation", id, "response"]) => {
                self.response(id, asked).await
            }
            ("POST", ["2018-06-01", "runtime", "invocation", id, "error"]) => self.error(id, asked).await,
            ("POST", ["2018-06-01", "runtime", "init", "error"]) => self.init_error(asked).await,
            ("POST", ["2020-01-01", "extension", "register"]) => self.register(asked).await,
            ("GET", ["2020-01-01", "extension", "event", "next"]) => self.extension_next(&asked).await,
            ("POST", ["2020-01-01", "extension", "init" | "exit", "error"]) => self.extension_error(&asked),
            ("PUT", ["2020-08-15", "logs"]) => unsupported("Logs"),
            ("PUT", ["2022-07-01", "telemetry"]) => unsupported("Telemetry"),
            _ => refusal(404, "NotFound", "no such path in the Runtime API"),
        }
    }

    /// The long poll: AWS has no limit for it, nor have we.
    async fn next(&self) -> Returned {
        {
            let mut state = self.lock();
            match state.phase {
                Phase::Init => state.phase = Phase::Waiting,
                Phase::Failed(_) => return out_of_state(),
                // Without an answer to the last: that one never comes.
                Phase::Running(..) => return out_of_state(),
                Phase::Waiting | Phase::Offered(..) => {}
            }
            state.runtime_waits = true;
        }
        self.change();
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let mut state = self.lock();
                match std::mem::take(&mut state.phase) {
                    Phase::Offered(invocation, finished) => {
                        let told = given(&invocation);
                        state.phase = Phase::Running(invocation, finished);
                        state.runtime_waits = false;
                        drop(state);
                        self.change();
                        return told;
                    }
                    other => state.phase = other,
                }
            }
            self.changed.changed(seen).await;
        }
    }

    /// 400 for another's id, 403 when nothing runs.
    fn check(&self, id: &str) -> Result<(), Returned> {
        match &self.lock().phase {
            Phase::Running(invocation, _) if invocation.id == id => Ok(()),
            Phase::Running(..) => Err(refusal(400, "InvalidRequestID", "Invalid request ID")),
            _ => Err(out_of_state()),
        }
    }

    fn finish(&self, id: &str, how: Finished) -> Result<(), Returned> {
        self.check(id)?;
        let mut state = self.lock();
        if let Phase::Running(_, finished) = std::mem::replace(&mut state.phase, Phase::Waiting) {
            let _ = finished.try_send(how); // its caller may have left
        }
        drop(state);
        self.change();
        Ok(())
    }

    async fn response(&self, id: &str, asked: Asked) -> Returned {
        if let Err(refused) = self.check(id) {
            return refused;
        }
        if let Some(mode) = header(&asked.headers, "lambda-runtime-function-response-mode")
            && !mode.eq_ignore_ascii_case("streaming")
        {
            let why = "Invalid header Lambda-Runtime-Function-Response-Mode";
            return refusal(400, "Runtime.InvalidResponseModeHeader", why);
        }
        let content_type = header(&asked.headers, "content-type").map(str::to_owned);
        let mut body = Vec::new();
        let mut trailers = Vec::new();
        match asked.body.whole_with_trailers(self.payload_bytes + SLACK_BYTES, &mut body, &mut trailers).await
        {
            Ok(()) => {}
            Err(WholeError::TooLarge(_)) => {
                return match self.finish(id, Finished::TooLarge) {
                    Ok(()) => refusal(413, "RequestEntityTooLarge", "Exceeded maximum allowed payload size"),
                    Err(refused) => refused,
                };
            }
            Err(WholeError::Broken(_)) => {
                let kind = "Runtime.TruncatedResponse".to_owned();
                let _ = self.finish(id, Finished::Error { kind, body: b"{}".to_vec() });
                return refusal(400, "Runtime.TruncatedResponse", "the response broke off");
            }
        }
        let how = match header(&trailers, "lambda-runtime-function-error-type") {
            None => Finished::Response { body, content_type },
            // Base64, by the streaming contract.
            Some(kind) => {
                use base64::Engine;
                let told = header(&trailers, "lambda-runtime-function-error-body").unwrap_or("");
                let plain = base64::engine::general_purpose::STANDARD.decode(told);
                Finished::Error {
                    kind: known(kind),
                    body: plain.unwrap_or_else(|_| told.as_bytes().to_vec()),
                }
            }
        };
        self.finish(id, how).err().unwrap_or_else(accepted)
    }

    async fn error(&self, id: &str, asked: Asked) -> Returned {
        if let Err(refused) = self.check(id) {
            return refused;
        }
        let (kind, body) = described(asked).await;
        self.finish(id, Finished::Error { kind, body }).err().unwrap_or_else(accepted)
    }

    async fn init_error(&self, asked: Asked) -> Returned {
        if !matches!(self.lock().phase, Phase::Init) {
            return out_of_state();
        }
        let (kind, body) = described(asked).await;
        self.lock().phase = Phase::Failed(message(&kind, &body));
        self.change();
        accepted()
    }

    async fn register(&self, asked: Asked) -> Returned {
        let Some(name) = header(&asked.headers, "lambda-extension-name").map(str::to_owned) else {
            return refusal(403, "Extension.InvalidExtensionName", "Lambda-Extension-Name is missing");
        };
        let mut body = Vec::new();
        if asked.body.whole(ERROR_BYTES_MAX, &mut body).await.is_err() {
            return refusal(400, "InvalidRequestFormat", "the body is too large");
        }
        let events: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        let invokes =
            events["events"].as_array().is_some_and(|events| events.iter().any(|event| event == "INVOKE"));
        let id = {
            let mut state = self.lock();
            if !matches!(state.phase, Phase::Init) {
                return refusal(403, "Extension.RegistrationClosed", "extensions register during init");
            }
            if state.extensions.len() >= EXTENSIONS_MAX {
                return refusal(403, "Extension.TooManyExtensions", "ten extensions are all there may be");
            }
            let id = format!("{:032x}", fastrand::u128(..));
            state.extensions.insert(id.clone(), Extension { name, invokes, waits: false, told: None });
            id
        };
        let told = serde_json::json!({
            "functionName": self.function, "functionVersion": "$LATEST", "handler": self.handler,
        });
        let mut answer = json(200, &told);
        answer.headers.push(("lambda-extension-identifier".to_owned(), id.into_bytes()));
        answer
    }

    async fn extension_next(&self, asked: &Asked) -> Returned {
        let Some(id) = header(&asked.headers, "lambda-extension-identifier").map(str::to_owned) else {
            return unknown_extension();
        };
        {
            let mut state = self.lock();
            let Some(extension) = state.extensions.get_mut(&id) else { return unknown_extension() };
            extension.waits = true;
        }
        self.change();
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let mut state = self.lock();
                let State { phase, extensions, .. } = &mut *state;
                let Some(extension) = extensions.get_mut(&id) else { return unknown_extension() };
                if let Phase::Running(invocation, _) = phase
                    && extension.invokes
                    && extension.told.as_ref() != Some(&invocation.id)
                {
                    extension.told = Some(invocation.id.clone());
                    extension.waits = false;
                    let event = serde_json::json!({
                        "eventType": "INVOKE",
                        "deadlineMs": invocation.deadline_ms,
                        "requestId": invocation.id,
                        "invokedFunctionArn": invocation.arn,
                        "tracing": { "type": "X-Amzn-Trace-Id", "value": "" },
                    });
                    let mut answer = json(200, &event);
                    let number = format!("{:032x}", fastrand::u128(..)).into_bytes();
                    answer.headers.push(("lambda-extension-event-identifier".to_owned(), number));
                    return answer;
                }
            }
            self.changed.changed(seen).await;
        }
    }

    fn extension_error(&self, asked: &Asked) -> Returned {
        let id = header(&asked.headers, "lambda-extension-identifier").unwrap_or("");
        let kind =
            header(&asked.headers, "lambda-extension-function-error-type").unwrap_or("Extension.Error");
        let mut state = self.lock();
        let Some(extension) = state.extensions.remove(id) else { return unknown_extension() };
        if matches!(state.phase, Phase::Init) {
            state.phase = Phase::Failed(format!("extension {} failed: {kind}", extension.name));
        }
        drop(state);
        self.change();
        accepted()
    }

    fn change(&self) {
        self.changed.set(self.changed.get().wrapping_add(1));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn given(invocation: &Invocation) -> Returned {
    Returned { status: 200, headers: invocation.headers.clone(), body: invocation.payload.clone().into() }
}

/// The type and the description of an error that is being reported.
async fn described(asked: Asked) -> (String, Vec<u8>) {
    let said = header(&asked.headers, "lambda-runtime-function-error-type").unwrap_or("").to_owned();
    let mut body = Vec::new();
    // One that is too large is kept as far as it came.
    let _ = asked.body.whole(ERROR_BYTES_MAX, &mut body).await;
    (known(&said), body)
}

/// AWS's own types stay, what looks like none becomes one.
fn known(kind: &str) -> String {
    let good = |rest: &str| {
        rest.len() > 1
            && rest.starts_with(|c: char| c.is_ascii_uppercase())
            && rest.chars().all(|c| c.is_ascii_alphabetic())
    };
    match kind.split_once('.') {
        Some(("Runtime" | "Function", rest)) if good(rest) => kind.to_owned(),
        Some(("Function", _)) => "Function.Unknown".to_owned(),
        _ => "Runtime.Unknown".to_owned(),
    }
}

/// For people: `ValueError: no such sensor`.
pub fn message(kind: &str, body: &[u8]) -> String {
    let told: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let cut = |text: &str| text.chars().take(300).collect::<String>();
    match (told["errorType"].as_str(), told["errorMessage"].as_str()) {
        (Some(kind), Some(what)) => format!("{}: {}", cut(kind), cut(what)),
        (None, Some(what)) => format!("{kind}: {}", cut(what)),
        _ => kind.to_owned(),
    }
}

fn plain(status: u16, body: Vec<u8>) -> Returned {
    Returned { status, headers: Vec::new(), body: body.into() }
}

fn json(status: u16, value: &serde_json::Value) -> Returned {
    let headers = vec![("content-type".to_owned(), b"application/json".to_vec())];
    Returned { status, headers, body: value.to_string().into_bytes().into() }
}

fn accepted() -> Returned {
    json(202, &serde_json::json!({ "status": "OK" }))
}

fn refusal(status: u16, kind: &str, what: &str) -> Returned {
    json(status, &serde_json::json!({ "errorMessage": what, "errorType": kind }))
}

fn out_of_state() -> Returned {
    refusal(403, "InvalidStateTransition", "this call is not allowed in the current state")
}

fn unknown_extension() -> Returned {
    refusal(
        403,
        "Extension.InvalidExtensionIdentifier",
        "Lambda-Extension-Identifier is missing or not known",
    )
}

fn unsupported(api: &str) -> Returned {
    refusal(202, &format!("{api}.NotSupported"), &format!("{api} API is not supported"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;

    fn api() -> Arc<RuntimeApi> {
        RuntimeApi::new(10, "f", "h")
    }

    fn ask(api: &Arc<RuntimeApi>, method: &str, path: &str, body: &[u8]) -> (u16, String) {
        smol::block_on(tell(api, method, path, &[], body))
    }

    fn tell<'a>(
        api: &Arc<RuntimeApi>,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &'a [u8],
    ) -> impl Future<Output = (u16, String)> + use<'a> {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), v.as_bytes().to_vec())).collect();
        let asked =
            Asked { method: method.to_owned(), path: path.to_owned(), headers, body: body.to_vec().into() };
        let told = (api.answer())(asked);
        async move {
            let answer = told.await;
            let mut body = Vec::new();
            answer.body.whole(1 << 20, &mut body).await.expect("from memory");
            (answer.status, String::from_utf8(body).expect("text"))
        }
    }

    fn invocation(id: &str) -> Invocation {
        let (id, arn) = (id.to_owned(), String::new());
        Invocation { id, payload: b"{}".to_vec(), headers: Vec::new(), deadline_ms: 0, arn }
    }

    /// Past init, with `1` running.
    fn running() -> (Arc<RuntimeApi>, smol::channel::Receiver<Finished>) {
        let api = api();
        let (finished, how) = smol::channel::bounded(1);
        let next = tell(&api, "GET", NEXT, &[], b"");
        let offer = async {
            api.initialized().await.expect("the runtime waits");
            assert!(api.offer(invocation("1"), finished));
        };
        let ((status, body), ()) = smol::block_on(smol::future::zip(next, offer));
        assert_eq!((status, body.as_str()), (200, "{}"));
        (api, how)
    }

    const NEXT: &str = "/2018-06-01/runtime/invocation/next";
    const ONE: &str = "/2018-06-01/runtime/invocation/1/response";

    #[test]
    fn invocation_is_fetched_answered_once_and_by_its_id() {
        let (api, how) = running();

        assert_eq!(ask(&api, "POST", "/2018-06-01/runtime/invocation/2/response", b"x").0, 400);
        assert_eq!(ask(&api, "GET", NEXT, b"").0, 403, "the last is not answered");
        assert_eq!(ask(&api, "POST", ONE, b"done").0, 202);
        let (status, body) = ask(&api, "POST", ONE, b"again");

        assert_eq!((status, body.contains("InvalidStateTransition")), (403, true));
        assert_eq!(
            how.try_recv().ok(),
            Some(Finished::Response { body: b"done".to_vec(), content_type: None })
        );
    }

    #[test]
    fn response_that_is_too_large_is_an_outcome_of_its_own() {
        let (api, how) = running();

        assert_eq!(ask(&api, "POST", ONE, &[b'x'; 111]).0, 413);

        assert_eq!(how.try_recv().ok(), Some(Finished::TooLarge));
    }

    #[test]
    fn response_mode_is_streaming_or_none() {
        let (api, _how) = running();
        let mode = [("lambda-runtime-function-response-mode", "buffered")];
        assert_eq!(smol::block_on(tell(&api, "POST", ONE, &mode, b"x")).0, 400);
    }

    #[test]
    fn init_error_names_what_went_wrong() {
        let api = api();
        let body = br#"{"errorMessage":"no module","errorType":"ImportError"}"#;

        assert_eq!(ask(&api, "POST", "/2018-06-01/runtime/init/error", body).0, 202);

        assert_eq!(smol::block_on(api.initialized()), Err("ImportError: no module".to_owned()));
        assert_eq!(ask(&api, "GET", NEXT, b"").0, 403);
    }

    #[test]
    fn error_types_are_taken_over_where_they_are_types() {
        assert_eq!(known("Runtime.ImportModuleError"), "Runtime.ImportModuleError");
        assert_eq!(known("Function.X1"), "Function.Unknown");
        assert_eq!(known("ValueError"), "Runtime.Unknown");
        assert_eq!(known(""), "Runtime.Unknown");
    }

    #[test]
    fn extensions_register_are_waited_for_and_told() {
        let api = api();
        let register = "/2020-01-01/extension/register";
        let name = [("lambda-extension-name", "spy")];
        let answer = (api.answer())(Asked {
            method: "POST".into(),
            path: register.into(),
            headers: name.iter().map(|(n, v)| ((*n).to_owned(), v.as_bytes().to_vec())).collect(),
            body: br#"{"events":["INVOKE","SHUTDOWN"]}"#.to_vec().into(),
        });
        let answer = smol::block_on(answer);
        let id = answer.header("lambda-extension-identifier").expect("an identifier").to_owned();
        assert_eq!(ask(&api, "GET", "/2020-01-01/extension/event/next", b"").0, 403);

        let headers = [("lambda-extension-identifier", id.as_str())];
        let spy = tell(&api, "GET", "/2020-01-01/extension/event/next", &headers, b"");
        let runtime = tell(&api, "GET", NEXT, &[], b"");
        let (finished, _how) = smol::channel::bounded(1);
        let offer = async {
            api.initialized().await.expect("both wait");
            assert!(api.offer(invocation("1"), finished));
        };
        let ((spied, _), ()) = smol::block_on(smol::future::zip(smol::future::zip(spy, runtime), offer));

        assert!(spied.1.contains("INVOKE") && spied.1.contains("\"requestId\":\"1\""), "{}", spied.1);
        assert_eq!(ask(&api, "POST", register, b"{}").0, 403);
    }

    #[test]
    fn what_is_not_there_is_told_as_the_emulator_does() {
        let api = api();
        assert_eq!(ask(&api, "PUT", "/2020-08-15/logs", b"{}").0, 202);
        assert!(ask(&api, "PUT", "/2022-07-01/telemetry", b"{}").1.contains("Telemetry.NotSupported"));
        assert_eq!(ask(&api, "GET", "/2018-06-01/ping", b""), (200, "pong".to_owned()));
        assert_eq!(ask(&api, "GET", "/etc/passwd", b"").0, 404);
    }
}
