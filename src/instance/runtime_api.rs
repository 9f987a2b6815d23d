//! The Lambda Runtime API and its Extensions API, as one instance sees them at
//! `127.0.0.1:9001` in its own network namespace (AWS's runtime interface emulator is the
//! model: internal/lambda/rapi).
//!
//! ```text
//!   Init ──next──▶ Waiting ──invoke──▶ Running(id) ──response or error──▶ Waiting
//!    └─init/error─▶ Failed
//! ```
//!
//! One invocation at a time. A call with a wrong id is 400, one out of state 403. A response that
//! the runtime streams is handed on as it comes where the caller takes it so; any other is
//! collected within `limits.payload`. An error in its trailers makes it one. Bodies are collected
//! one at a time, so that the bound is the instance's and not each of its connections'. The logs
//! and telemetry APIs say that they are not supported, as the emulator's do.

use super::extensions::{Extensions, Registered};
use super::fleet::Number;
use crate::net::http::{Asked, Finish, Line, Returned, Told, WholeError, header};
use crate::watch::Watch;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use smol::channel::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What AWS takes above its limit before it says no.
const SLACK_BYTES: u64 = 100;

/// An error's description: message, type and stack trace.
const ERROR_BYTES_MAX: u64 = 256 * 1024;

/// An event on its way to the runtime.
#[derive(Clone, Debug)]
pub struct Invocation {
    pub id: String,
    pub payload: Vec<u8>,
    pub headers: Vec<Line>,
    /// For extensions.
    pub deadline_ms: i64,
    pub arn: String,
    pub trace: String,
}

/// Where an invocation's end is told.
#[derive(Clone, Debug)]
pub struct Asker {
    pub finished: Sender<Finished>,
    /// Takes a streamed response as it comes.
    pub streams: bool,
}

/// How the runtime ended it.
#[derive(Debug)]
pub enum Finished {
    /// Not yet: the runtime has it now.
    Fetched,
    /// It comes in pieces; another word follows when it has come to its end.
    Begun(Returned),
    /// What had begun has been handed over.
    Streamed,
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

impl Finished {
    /// Words of one invocation: fetched, begun, ended.
    pub const MOST: usize = 3;
}

/// One instance's API.
pub struct RuntimeApi {
    payload_bytes: u64,
    function: String,
    handler: String,
    state: Mutex<State>,
    /// Counts what changes the state.
    changed: Watch<Number>,
    /// Held by who collects a body.
    collecting: smol::lock::Mutex<()>,
    made: Instant,
}

#[derive(Default)]
struct State {
    phase: Phase,
    extensions: Extensions,
    /// How long init took, until the first invocation has told it.
    init: Option<Duration>,
}

#[derive(Default)]
enum Phase {
    #[default]
    Init,
    Waiting,
    /// Not yet fetched by the runtime.
    Offered(Invocation, Asker),
    Running(Invocation, Asker),
    Failed(String),
    ShuttingDown,
}

impl RuntimeApi {
    pub fn new(payload_bytes: u64, function: &str, handler: &str) -> Arc<Self> {
        Arc::new(Self {
            payload_bytes,
            function: function.to_owned(),
            handler: handler.to_owned(),
            state: Mutex::default(),
            changed: Watch::new(0),
            collecting: smol::lock::Mutex::new(()),
            made: Instant::now(),
        })
    }

    /// Until the runtime and every extension wait for their first event; why it failed if it did.
    pub async fn initialized(&self) -> Result<(), String> {
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let mut state = self.lock();
                match &state.phase {
                    Phase::Failed(why) => return Err(why.clone()),
                    Phase::Init => {}
                    _ if state.extensions.all_wait() => {
                        state.init = Some(self.made.elapsed());
                        return Ok(());
                    }
                    _ => {}
                }
            }
            self.changed.changed(seen).await;
        }
    }

    /// These run, and are to register before the runtime is started.
    pub fn extensions_started(&self, names: &[String]) {
        self.lock().extensions.started(names.iter().cloned());
    }

    /// Until all that were started have registered; why it failed if it did.
    pub async fn registered(&self) -> Result<(), String> {
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let state = self.lock();
                match &state.phase {
                    Phase::Failed(why) => return Err(why.clone()),
                    _ if state.extensions.missing().next().is_none() => return Ok(()),
                    _ => {}
                }
            }
            self.changed.changed(seen).await;
        }
    }

    /// Until every extension is through with the last invocation.
    pub async fn extensions_wait(&self) {
        loop {
            let (seen, _) = self.changed.versioned();
            if self.lock().extensions.all_wait() {
                return;
            }
            self.changed.changed(seen).await;
        }
    }

    /// Which extensions its init, or the end of an invocation, waits for.
    pub fn waits_for(&self) -> Option<String> {
        let state = self.lock();
        let names = |names: Vec<&String>| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>();
        let missing = names(state.extensions.missing().collect());
        let busy = names(state.extensions.busy().collect());
        match (missing.as_slice(), busy.as_slice()) {
            ([], []) => None,
            ([], busy) => Some(format!("extension {} asks for no next event", busy.join(", "))),
            (missing, _) => Some(format!("extension {} has not registered", missing.join(", "))),
        }
    }

    /// An extension has ended by itself. True: and the instance has to.
    pub fn extension_ended(&self, name: &str) -> bool {
        let mut state = self.lock();
        if matches!(state.phase, Phase::ShuttingDown) {
            return false;
        }
        if !matches!(state.phase, Phase::Failed(_)) {
            state.fail("Extension.Crash", &format!("extension `{name}` has ended"));
        }
        drop(state);
        self.change();
        true
    }

    /// Nothing is given to it any more.
    pub fn has_failed(&self) -> bool {
        matches!(self.lock().phase, Phase::Failed(_))
    }

    /// Gives the runtime an event. False: it has one, or is not one any more.
    pub fn offer(&self, invocation: Invocation, asker: Asker) -> bool {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Waiting) {
            return false;
        }
        state.phase = Phase::Offered(invocation, asker);
        drop(state);
        self.change();
        true
    }

    /// How long its init took; told once.
    pub fn take_init(&self) -> Option<Duration> {
        self.lock().init.take()
    }

    /// It ends, and nothing is offered any more. Whether an extension wants to know, and has
    /// until `deadline_ms`.
    pub fn shut_down(&self, deadline_ms: i64) -> bool {
        let mut state = self.lock();
        state.phase = Phase::ShuttingDown;
        let wanted = state.extensions.shut_down(deadline_ms);
        drop(state);
        self.change();
        wanted
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
            ("POST", ["2020-01-01", "extension", "init", "error"]) => {
                self.extension_error(&asked, "Extension.InitError")
            }
            ("POST", ["2020-01-01", "extension", "exit", "error"]) => {
                self.extension_error(&asked, "Extension.ExitError")
            }
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
                // It waits for its end.
                Phase::Waiting | Phase::Offered(..) | Phase::ShuttingDown => {}
            }
        }
        self.change();
        loop {
            let (seen, _) = self.changed.versioned();
            {
                let mut state = self.lock();
                match std::mem::take(&mut state.phase) {
                    Phase::Offered(invocation, asker) => {
                        let told = given(&invocation);
                        let _ = asker.finished.try_send(Finished::Fetched);
                        state.extensions.invoke(&invocation);
                        state.phase = Phase::Running(invocation, asker);
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
        if let Phase::Running(_, asker) = std::mem::replace(&mut state.phase, Phase::Waiting) {
            let _ = asker.finished.try_send(how); // its caller may have left
        }
        drop(state);
        self.change();
        Ok(())
    }

    /// Of the invocation that runs.
    fn asker(&self, id: &str) -> Option<Asker> {
        match &self.lock().phase {
            Phase::Running(invocation, asker) if invocation.id == id => Some(asker.clone()),
            _ => None,
        }
    }

    async fn response(&self, id: &str, asked: Asked) -> Returned {
        if let Err(refused) = self.check(id) {
            return refused;
        }
        let mode = header(&asked.headers, "lambda-runtime-function-response-mode");
        if mode.is_some_and(|mode| !mode.eq_ignore_ascii_case("streaming")) {
            let why = "Invalid header Lambda-Runtime-Function-Response-Mode";
            return refusal(400, "Runtime.InvalidResponseModeHeader", why);
        }
        match self.asker(id) {
            Some(asker) if mode.is_some() && asker.streams => self.stream(id, asked, &asker).await,
            _ => self.collect(id, asked).await,
        }
    }

    /// Handed on piece by piece; its size has no bound, its time has `limits.timeout`.
    async fn stream(&self, id: &str, asked: Asked, asker: &Asker) -> Returned {
        let headers: Vec<Line> =
            asked.headers.into_iter().filter(|(name, _)| name == "content-type").collect();
        let (watcher, finish) = smol::channel::bounded(1);
        let (trailed, trailers) = smol::channel::bounded(1);
        let body = asked.body.watched(watcher).trailed(trailed);
        let _ = asker.finished.try_send(Finished::Begun(Returned { status: 200, headers, body }));
        let how = match finish.recv().await {
            Ok(Finish::Broken) | Err(_) => truncated(),
            // A caller who leaves has had enough; the function's work was good.
            Ok(Finish::Left) => Finished::Streamed,
            Ok(Finish::Whole) => {
                trailers.try_recv().ok().and_then(|lines| trailed_error(&lines)).unwrap_or(Finished::Streamed)
            }
        };
        self.finish(id, how).err().unwrap_or_else(accepted)
    }

    async fn collect(&self, id: &str, asked: Asked) -> Returned {
        let _alone = self.collecting.lock().await;
        // Another may have answered meanwhile.
        if let Err(refused) = self.check(id) {
            return refused;
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
                let _ = self.finish(id, truncated());
                return refusal(400, "Runtime.TruncatedResponse", "the response broke off");
            }
        }
        let how = trailed_error(&trailers).unwrap_or(Finished::Response { body, content_type });
        self.finish(id, how).err().unwrap_or_else(accepted)
    }

    async fn error(&self, id: &str, asked: Asked) -> Returned {
        if let Err(refused) = self.check(id) {
            return refused;
        }
        let (kind, body) = self.described(asked).await;
        self.finish(id, Finished::Error { kind, body }).err().unwrap_or_else(accepted)
    }

    async fn init_error(&self, asked: Asked) -> Returned {
        if !matches!(self.lock().phase, Phase::Init) {
            return out_of_state();
        }
        let (kind, body) = self.described(asked).await;
        self.lock().phase = Phase::Failed(message(&kind, &body));
        self.change();
        accepted()
    }

    /// The type and the description of an error that is being reported.
    async fn described(&self, asked: Asked) -> (String, Vec<u8>) {
        let _alone = self.collecting.lock().await;
        let said = header(&asked.headers, "lambda-runtime-function-error-type").unwrap_or("").to_owned();
        let mut body = Vec::new();
        // One that is too large is kept as far as it came.
        let _ = asked.body.whole(ERROR_BYTES_MAX, &mut body).await;
        (known(&said), body)
    }

    async fn register(&self, asked: Asked) -> Returned {
        let Some(name) = header(&asked.headers, "lambda-extension-name").map(str::to_owned) else {
            return refusal(403, "Extension.InvalidExtensionName", "Lambda-Extension-Name is missing");
        };
        let _alone = self.collecting.lock().await;
        let mut body = Vec::new();
        if asked.body.whole(ERROR_BYTES_MAX, &mut body).await.is_err() {
            return refusal(400, "InvalidRequestFormat", "the body is too large");
        }
        let id = {
            let mut state = self.lock();
            if !matches!(state.phase, Phase::Init) {
                return refusal(403, "Extension.RegistrationClosed", "extensions register during init");
            }
            match state.extensions.register(name, &body, format!("{:032x}", fastrand::u128(..))) {
                Registered::As(id) => id,
                Registered::TooMany => {
                    return refusal(
                        403,
                        "Extension.TooManyExtensions",
                        "ten extensions are all there may be",
                    );
                }
                Registered::NameTaken => {
                    let why = "an extension with this name has registered already";
                    return refusal(403, "Extension.InvalidExtensionState", why);
                }
                Registered::BadEvents(why) => return refusal(400, "Extension.InvalidEventType", why),
            }
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
        if !self.lock().extensions.waits(&id) {
            return unknown_extension();
        }
        self.change();
        loop {
            let (seen, _) = self.changed.versioned();
            let event = self.lock().extensions.next(&id);
            if let Some(event) = event {
                let mut answer = json(200, &event);
                let number = format!("{:032x}", fastrand::u128(..)).into_bytes();
                answer.headers.push(("lambda-extension-event-identifier".to_owned(), number));
                return answer;
            }
            self.changed.changed(seen).await;
        }
    }

    /// `kind`: in AWS's words. The whole instance has failed; later, one within the runtime is no
    /// more than gone.
    fn extension_error(&self, asked: &Asked, kind: &str) -> Returned {
        let id = header(&asked.headers, "lambda-extension-identifier").unwrap_or("");
        let said =
            header(&asked.headers, "lambda-extension-function-error-type").unwrap_or("Extension.Error");
        let mut state = self.lock();
        let Some(name) = state.extensions.remove(id) else { return unknown_extension() };
        if matches!(state.phase, Phase::Init) || state.extensions.is_external(&name) {
            let said: String = said.chars().take(300).collect();
            state.fail(kind, &format!("extension `{name}` said {said}"));
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

impl State {
    /// For good. Who waits for the invocation that runs is told; the instance's end is another's work.
    fn fail(&mut self, kind: &str, why: &str) {
        if matches!(self.phase, Phase::ShuttingDown) {
            return;
        }
        let told = Phase::Failed(format!("{kind}: {why}"));
        if let Phase::Offered(_, asker) | Phase::Running(_, asker) = std::mem::replace(&mut self.phase, told)
        {
            let body = serde_json::json!({ "errorType": kind, "errorMessage": why }).to_string();
            let how = Finished::Error { kind: kind.to_owned(), body: body.into_bytes() };
            let _ = asker.finished.try_send(how); // its caller may have left
        }
    }
}

fn given(invocation: &Invocation) -> Returned {
    Returned { status: 200, headers: invocation.headers.clone(), body: invocation.payload.clone().into() }
}

fn truncated() -> Finished {
    let kind = "Runtime.TruncatedResponse".to_owned();
    let body = br#"{"errorType":"Runtime.TruncatedResponse","errorMessage":"the response broke off"}"#;
    Finished::Error { kind, body: body.to_vec() }
}

/// What the trailers of a response say went wrong; base64, by the streaming contract.
fn trailed_error(trailers: &[Line]) -> Option<Finished> {
    let kind = header(trailers, "lambda-runtime-function-error-type")?;
    let told = header(trailers, "lambda-runtime-function-error-body").unwrap_or("");
    let body = STANDARD.decode(told).unwrap_or_else(|_| told.as_bytes().to_vec());
    Some(Finished::Error { kind: known(kind), body })
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
        let (id, arn, trace) = (id.to_owned(), String::new(), String::new());
        Invocation { id, payload: b"{}".to_vec(), headers: Vec::new(), deadline_ms: 0, arn, trace }
    }

    /// Past init, with `1` running.
    fn running() -> (Arc<RuntimeApi>, smol::channel::Receiver<Finished>) {
        let api = api();
        let (finished, how) = smol::channel::bounded(Finished::MOST);
        let next = tell(&api, "GET", NEXT, &[], b"");
        let offer = async {
            api.initialized().await.expect("the runtime waits");
            assert!(api.offer(invocation("1"), Asker { finished, streams: false }));
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
        assert!(matches!(how.try_recv(), Ok(Finished::Fetched)));
        let Ok(Finished::Response { body, content_type: None }) = how.try_recv() else { panic!() };
        assert_eq!(body, b"done");
    }

    #[test]
    fn response_that_is_too_large_is_an_outcome_of_its_own() {
        let (api, how) = running();

        assert_eq!(ask(&api, "POST", ONE, &[b'x'; 111]).0, 413);

        assert!(matches!(how.try_recv(), Ok(Finished::Fetched)));
        assert!(matches!(how.try_recv(), Ok(Finished::TooLarge)));
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
            assert!(api.offer(invocation("1"), Asker { finished, streams: false }));
        };
        let ((spied, _), ()) = smol::block_on(smol::future::zip(smol::future::zip(spy, runtime), offer));

        assert!(spied.1.contains("INVOKE") && spied.1.contains("\"requestId\":\"1\""), "{}", spied.1);
        assert_eq!(ask(&api, "POST", register, b"{}").0, 403);
    }

    #[test]
    fn extension_that_ends_fails_what_runs_and_nothing_is_offered_any_more() {
        let (api, how) = running();

        assert!(api.extension_ended("spy"));

        assert!(matches!(how.try_recv(), Ok(Finished::Fetched)));
        let Ok(Finished::Error { kind, body }) = how.try_recv() else { panic!() };
        assert_eq!(kind, "Extension.Crash");
        assert_eq!(message(&kind, &body), "Extension.Crash: extension `spy` has ended");
        assert_eq!(ask(&api, "POST", ONE, b"late").0, 403);
        let (finished, _how) = smol::channel::bounded(1);
        assert!(api.has_failed() && !api.offer(invocation("2"), Asker { finished, streams: false }));
    }

    #[test]
    fn extension_may_end_with_its_instance() {
        let (api, _how) = running();
        api.shut_down(0);

        assert!(!api.extension_ended("spy") && !api.has_failed());
    }

    #[test]
    fn what_was_started_is_waited_for_and_named() {
        let api = api();
        api.extensions_started(&["a".to_owned(), "spy".to_owned()]);
        assert_eq!(api.waits_for().as_deref(), Some("extension `a`, `spy` has not registered"));

        let named = [("lambda-extension-name", "spy")];
        let register = || smol::block_on(tell(&api, "POST", "/2020-01-01/extension/register", &named, b"{}"));
        assert_eq!(register().0, 200);
        assert!(register().1.contains("Extension.InvalidExtensionState"));

        assert_eq!(api.waits_for().as_deref(), Some("extension `a` has not registered"));
        assert!(api.extension_ended("a"));
        assert_eq!(
            smol::block_on(api.registered()),
            Err("Extension.Crash: extension `a` has ended".to_owned())
        );
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
