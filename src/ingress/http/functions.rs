//! Invoking functions: `/function/{name}` waits for the answer, `/async-function/{name}` is
//! answered once the event is committed, and a function's own paths are the same as the first.

use super::event::{self, Parts};
use super::lambda::url;
use super::problem::{Refusal, set_header};
use super::{Request, Shared};
use crate::channels::Response as Answered;
use crate::channels::Response::{Output, Passed};
use crate::channels::{CallError, Invoke, reply};
use crate::ingress::routes::{Deployment, HttpMatch};
use crate::model::callback::{self, CallbackUrl};
use crate::model::event::{TYPE_HTTP, guess_content_type};
use crate::model::function::{Handler, Trigger};
use crate::model::{Event, EventId, FunctionName, prelude};
use crate::net::http::{Passing, Peer, Piece, Returned, Target, is_target, passed, take_body};
use crate::store::{Accepted, Arrival, DedupKey, Fate, NewInvocation, StoreError};
use ring::rand::SecureRandom;
use smol::channel::TrySendError;
use tide::{Response, StatusCode};

/// What a streamed answer tells of its head: its headers and its cookies, 64 KiB each.
const PRELUDE_BYTES_MAX: usize = 128 << 10;

/// ANY /function/{name}[/path]
pub async fn invoke(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let routes = shared.api.routes.get();
    let deployment = named(&request, &routes)?;
    let asks = deployment.revision.manifest.triggers.iter().any(|t| matches!(t, Trigger::Http(h) if h.token));
    authorize(&request, asks)?;
    let path = rest_of_path(&request);
    call(&shared, &mut request, deployment, path).await
}

/// POST /async-function/{name}[/path]
pub async fn invoke_async(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let routes = shared.api.routes.get();
    let deployment = named(&request, &routes)?;
    let asks = deployment.revision.manifest.triggers.iter().any(|t| matches!(t, Trigger::Http(h) if h.token));
    authorize(&request, asks)?;
    if let Some(urls) = request.header(callback::HEADER) {
        let url = CallbackUrl::parse(urls.last().as_str()).map_err(Refusal::bad_request)?;
        if !is_target(&url.target) {
            return Err(Refusal::bad_request("X-Callback-Url: its path or query must be percent-encoded"));
        }
        if urls.iter().count() > 1 {
            return Err(Refusal::bad_request("one X-Callback-Url is all there may be"));
        }
    }
    let path = rest_of_path(&request);
    let dedup = idempotency_key(&request, deployment.revision.name(), &path)?;
    let (event, _room) = read_event(&shared, &mut request, deployment, path).await?;
    // A CloudEvent's source and id say as much as a key of the request's own; what was sent to
    // another function is for that one.
    let own = (event.kind != TYPE_HTTP || event.source != format!("/{}/http", shared.api.node)).then(|| {
        DedupKey::cloud_event(&format!("{} {}", deployment.revision.name(), event.source), event.id.as_str())
    });
    let dedup = dedup.or(own);
    Ok(called(&enqueue(&shared, deployment, event, dedup).await?))
}

/// Returns once the event is committed: its id, or that of the one that it repeats.
pub(super) async fn enqueue(
    shared: &Shared,
    deployment: &Deployment,
    event: Event,
    dedup: Option<DedupKey>,
) -> Result<EventId, Refusal> {
    let id = event.id.clone();
    let invocation = NewInvocation {
        function: deployment.revision.name().clone(),
        lane: deployment.revision.manifest.priority,
        expires: None,
        once: None,
        dead: None,
    };
    let arrival = Arrival { invocations: vec![invocation], dedup, ..Arrival::of(event) };
    match shared.api.store.accept(arrival).await {
        // Removed since we looked: 202 would promise a run that never comes.
        Ok(Accepted { fate: Fate::Duplicate(earlier), .. }) => {
            shared.api.metrics.event_refused("duplicate");
            return Ok(earlier);
        }
        Ok(Accepted { fate: Fate::Dropped, .. }) => {
            shared.api.metrics.event_refused("buffer_full");
            return Err(StoreError::Full.into());
        }
        Ok(accepted) if accepted.invocations == 0 => {
            return Err(Refusal::unknown_function(deployment.revision.name().as_str()));
        }
        Ok(_) => {}
        Err(error) => {
            shared.api.metrics.event_refused(refused_as(&error));
            return Err(error.into());
        }
    }
    shared.api.metrics.event_accepted("http");
    shared.api.wake.wake();
    Ok(id)
}

/// For the count of what was refused.
pub(super) fn refused_as(error: &StoreError) -> &'static str {
    match error {
        StoreError::Full | StoreError::DiskFull => "buffer_full",
        StoreError::TooLarge { .. } => "payload_too_large",
        _ => "store_failed",
    }
}

pub(super) fn random_id(shared: &Shared) -> EventId {
    let mut random = [0; 16];
    shared.random.fill(&mut random).expect("the kernel gives random bytes once it is up");
    EventId::from_random(random)
}

fn called(id: &EventId) -> Response {
    let mut response = Response::new(StatusCode::Accepted);
    set_header(&mut response, "x-call-id", &event::encode(id.as_str()));
    response
}

/// A client that repeats a request gives it the key of the first, which is a function's own.
fn idempotency_key(
    request: &Request,
    function: &FunctionName,
    path: &str,
) -> Result<Option<DedupKey>, Refusal> {
    let Some(key) = request.header("idempotency-key").map(|values| values.last().as_str()) else {
        return Ok(None);
    };
    if key.is_empty() || key.len() > EventId::BYTES_MAX {
        let max = EventId::BYTES_MAX;
        return Err(Refusal::bad_request(format!("Idempotency-Key has 1 to {max} characters")));
    }
    Ok(Some(DedupKey::idempotency(&format!("{function}{path}"), key)))
}

/// Any path that is none of neap's own: perhaps a function's http trigger.
pub async fn trigger(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let routes = shared.api.routes.get();
    let path = target(&request).path;
    let plain = event::decode(&path).ok_or_else(|| Refusal::bad_request("the path is not UTF-8"))?;
    match routes.http(request.method().as_ref(), &plain) {
        HttpMatch::Function(deployment, http) => {
            authorize(&request, http.token)?;
            call(&shared, &mut request, deployment, path).await
        }
        HttpMatch::Method(methods) => Err(Refusal::method_not_allowed(&methods.join(", "))),
        HttpMatch::None => Err(Refusal::not_found("nothing answers on this path")),
    }
}

async fn call(
    shared: &Shared,
    request: &mut Request,
    deployment: &Deployment,
    path: String,
) -> Result<Response, Refusal> {
    let start = shared.api.clock.wall();
    let (event, passing, _room) = if deployment.revision.manifest.handler == Handler::Http {
        let (event, passing) = pass_on(shared, request, path)?;
        (event, Some(passing), None)
    } else {
        let (mut event, room) = read_event(shared, request, deployment, path.clone()).await?;
        if deployment.revision.manifest.serving.function_url {
            event.data = as_function_url(shared, request, &event, &path);
        }
        (event, None, Some(room))
    };
    let id = event.id.clone();
    let answer = ask(shared, deployment.revision.name().clone(), event, passing).await;
    let (mut response, took) = match answer {
        Ok(Output { output, took }) if deployment.revision.manifest.serving.function_url => {
            (described(shared, output).unwrap_or_else(Response::from), Some(took))
        }
        Ok(Output { output, took }) => (whole(shared, output).unwrap_or_else(Response::from), Some(took)),
        Ok(Passed(answer)) if has_prelude(deployment, &answer) => {
            (after_prelude(answer).await.unwrap_or_else(Response::from), None)
        }
        Ok(Passed(answer)) if deployment.revision.manifest.serving.function_url => {
            (gathered(shared, deployment, answer).await.unwrap_or_else(Response::from), None)
        }
        Ok(Passed(mut answer)) => {
            answer.headers.retain(|(name, _)| name != "x-call-id" && name != "x-start-time");
            (Response::from_res(passed(answer)), None)
        }
        Err(error) => (Response::from(Refusal::from(error)), None),
    };
    set_header(&mut response, "x-call-id", &event::encode(id.as_str()));
    set_header(&mut response, "x-start-time", &format!("{}000000", start.0));
    if let Some(took) = took {
        set_header(&mut response, "x-duration-seconds", &format!("{:.6}", took.as_secs_f64()));
    }
    Ok(response)
}

/// Has the scheduler run it. When this is dropped, because the client leaves, so is the receiver:
/// the instance is killed.
pub(super) async fn ask(
    shared: &Shared,
    function: FunctionName,
    event: Event,
    passing: Option<Passing>,
) -> Result<Answered, CallError> {
    let (sender, receiver) = reply();
    match shared.api.invoke.try_send(Invoke { function, event, passing, reply: sender }) {
        Ok(()) => receiver.recv().await.unwrap_or(Err(CallError::Lost)),
        // Of all functions together: no line's own pace says how long.
        Err(TrySendError::Full(_)) => Err(CallError::NoCapacity {
            why: "too many calls wait already",
            wait: std::time::Duration::from_secs(1),
        }),
        Err(TrySendError::Closed(_)) => Err(CallError::Stopping),
    }
}

fn whole(shared: &Shared, bytes: Vec<u8>) -> Result<Response, Refusal> {
    let kind = guess_content_type(&bytes);
    let mut response = Response::new(StatusCode::Ok);
    let empty = bytes.is_empty();
    response.set_body(shared.outputs.hold(bytes)?);
    if empty {
        response.remove_header("content-type");
    } else {
        response.insert_header("content-type", kind);
    }
    Ok(response)
}

/// What a Lambda function behind a Function URL is given.
fn as_function_url(shared: &Shared, request: &Request, event: &Event, path: &str) -> Vec<u8> {
    let source_ip = match shared.peer(request) {
        Peer::Tcp { address, .. } => address.ip().to_string(),
        Peer::Unix => String::new(),
    };
    let (method, query) = (request.method(), target(request).query);
    let parts = url::Parts {
        node: &shared.api.node,
        method: method.as_ref(),
        path,
        query: &query,
        headers: &headers(shared, request),
        source_ip: &source_ip,
        now: shared.api.clock.wall(),
    };
    url::event(event, &parts)
}

/// Whether a Lambda function streams an answer whose own head comes first.
fn has_prelude(deployment: &Deployment, answer: &Returned) -> bool {
    deployment.revision.manifest.handler == Handler::Lambda
        && answer.header("content-type").is_some_and(prelude::is_announced_by)
}

/// The head that it tells, and the rest as it comes.
async fn after_prelude(mut answer: Returned) -> Result<Response, Refusal> {
    let wrong = |why| Refusal::new(StatusCode::BadGateway, why).with("x-neap-failure", "answer");
    let mut come = Vec::new();
    let told = loop {
        match answer.body.piece().await {
            Some(Ok(Piece::Data(data))) => come.extend_from_slice(&data),
            _ => return Err(wrong("the function's answer broke off in its prelude")),
        }
        match prelude::cut(&mut come) {
            Some(told) => break told,
            None if come.len() > PRELUDE_BYTES_MAX => {
                return Err(wrong("the prelude of the function's answer is larger than 128 KiB"));
            }
            None => {}
        }
    };
    let url::Described { status, mut headers, .. } = url::described_by(&told).map_err(wrong)?;
    headers.retain(|(name, _)| name != "x-call-id" && name != "x-start-time");
    StatusCode::try_from(status).map_err(|_| wrong("its statusCode is unknown to HTTP"))?;
    answer.body.give_back(come);
    Ok(Response::from_res(passed(Returned { status, headers, body: answer.body })))
}

/// A description is read whole before it is followed.
async fn gathered(shared: &Shared, deployment: &Deployment, answer: Returned) -> Result<Response, Refusal> {
    let mut output = Vec::new();
    let most = deployment.revision.manifest.limits.payload_bytes;
    if answer.body.whole(most, &mut output).await.is_err() {
        let broken = Refusal::new(StatusCode::BadGateway, "the function's answer broke off or is too large");
        return Err(broken.with("x-neap-failure", "answer"));
    }
    described(shared, output)
}

/// And what its output says.
fn described(shared: &Shared, output: Vec<u8>) -> Result<Response, Refusal> {
    let wrong = |why| Refusal::new(StatusCode::BadGateway, why).with("x-neap-failure", "answer");
    let url::Described { status, headers, body } = url::response(output).map_err(wrong)?;
    let status = StatusCode::try_from(status).map_err(|_| wrong("its statusCode is unknown to HTTP"))?;
    let mut response = Response::new(status);
    response.set_body(shared.outputs.hold(body)?);
    response.remove_header("content-type");
    for (name, value) in headers {
        let name = http_types::headers::HeaderName::from_bytes(name.into_bytes());
        let value = http_types::headers::HeaderValue::from_bytes(value);
        if let (Ok(name), Ok(value)) = (name, value) {
            response.append_header(name, value);
        }
    }
    Ok(response)
}

fn named<'a>(
    request: &Request,
    routes: &'a crate::ingress::routes::Routes,
) -> Result<&'a Deployment, Refusal> {
    let name = super::gateway::without_namespace(request.param("name").unwrap_or(""));
    routes.function(name).ok_or_else(|| Refusal::unknown_function(name))
}

pub(super) fn authorize(request: &Request, trigger_asks: bool) -> Result<(), Refusal> {
    let shared = request.state();
    if !trigger_asks && !shared.api.http.auth_functions {
        return Ok(());
    }
    shared.known(request)
}

async fn read_event(
    shared: &Shared,
    request: &mut Request,
    deployment: &Deployment,
    path: String,
) -> Result<(Event, super::body::Place), Refusal> {
    let body = shared.room.read(request, deployment.revision.manifest.limits.payload_bytes).await?;
    let headers = headers(shared, request);
    let method = request.method();
    let parts = Parts {
        node: &shared.api.node,
        method: method.as_ref(),
        path: &path,
        query: &target(request).query,
        headers,
        data: body.bytes,
        now: shared.api.clock.wall(),
        fresh_id: random_id(shared),
    };
    Ok((event::event(parts)?, body.place))
}

/// A request as it goes on to a function that speaks HTTP: unread, its body on its way.
fn pass_on(shared: &Shared, request: &mut Request, path: String) -> Result<(Event, Passing), Refusal> {
    let headers = headers(shared, request);
    let get = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    // Other upgrades may be ignored (RFC 9110 §7.8); a WebSocket client would take any answer in
    // HTTP for a riddle.
    if get("upgrade").is_some_and(|to| to.to_ascii_lowercase().contains("websocket")) {
        return Err(Refusal::not_yet("WebSocket, an upgrade of the connection"));
    }
    let (method, query) = (request.method(), target(request).query);
    let parts = Parts {
        node: &shared.api.node,
        method: method.as_ref(),
        path: &path,
        query: &query,
        headers: headers.clone(),
        data: Vec::new(),
        now: shared.api.clock.wall(),
        fresh_id: random_id(shared),
    };
    let event = event::unread(parts)?;
    let target = if query.is_empty() { path } else { format!("{path}?{query}") };
    let lines = headers.into_iter().map(|(name, value)| (name, value.into_bytes())).collect();
    let body = take_body(request.as_ref());
    Ok((event, Passing { method: method.to_string(), target, headers: lines, body }))
}

/// What the request said, without our own token, and who sent it.
fn headers(shared: &Shared, request: &Request) -> Vec<(String, String)> {
    let peer = shared.peer(request);
    let mut headers = Vec::new();
    for (name, values) in request.iter() {
        for value in values {
            let ours = name.as_str() == "authorization" && shared.token.is_ours(value.as_str());
            if !ours {
                headers.push((name.as_str().to_owned(), value.as_str().to_owned()));
            }
        }
    }
    // http_types keeps them in a hash map: an order that is the same each time is kinder.
    headers.sort();
    let address = match peer {
        Peer::Tcp { address, .. } => Some(address.ip()),
        Peer::Unix => None,
    };
    let proto = if shared.api.http.tls.is_some() && address.is_some() { "https" } else { "http" };
    event::forwarded(&mut headers, address, proto);
    headers
}

pub(super) fn target(request: &Request) -> Target {
    let none = || Target { path: "/".to_owned(), query: String::new() };
    request.ext::<Target>().cloned().unwrap_or_else(none)
}

/// `/function/NAME/rest` → `/rest`
fn rest_of_path(request: &Request) -> String {
    let path = target(request).path;
    let rest = path.splitn(4, '/').nth(3).unwrap_or("");
    format!("/{rest}")
}
