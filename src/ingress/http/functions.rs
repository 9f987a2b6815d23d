//! Invoking functions: `/function/{name}` waits for the answer, `/async-function/{name}` is
//! answered once the event is committed, and a function's own paths are the same as the first.

use super::event::{self, Parts};
use super::problem::{Refusal, set_header};
use super::{Request, Shared};
use crate::channels::{Invoke, reply};
use crate::ingress::routes::{Deployment, HttpMatch};
use crate::model::event::{TYPE_HTTP, guess_content_type};
use crate::model::function::Trigger;
use crate::model::{Event, EventId, FunctionName};
use crate::net::http::{Peer, Target};
use crate::store::{Accepted, Arrival, DedupKey, Fate, NewInvocation, StoreError};
use ring::rand::SecureRandom;
use smol::channel::TrySendError;
use tide::{Response, StatusCode};

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
    if request.header("x-callback-url").is_some() {
        return Err(Refusal::not_yet("X-Callback-Url"));
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
            return Ok(called(&earlier));
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
    Ok(called(&id))
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
    let (event, _room) = read_event(shared, request, deployment, path).await?;
    let id = event.id.clone();
    let (sender, receiver) = reply();
    let invoke = Invoke { function: deployment.revision.name().clone(), event, reply: sender };
    match shared.api.invoke.try_send(invoke) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => return Err(Refusal::busy("too many calls wait already")),
        Err(TrySendError::Closed(_)) => return Err(Refusal::stopping()),
    }
    // Dropped when the client leaves, and the receiver with it: the instance is killed.
    let answer = receiver.recv().await.unwrap_or(Err(crate::channels::CallError::Lost));
    let (mut response, took) = match answer {
        Ok(answer) => {
            let response = output(shared, answer.output).unwrap_or_else(Response::from);
            (response, Some(answer.took))
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

fn output(shared: &Shared, bytes: Vec<u8>) -> Result<Response, Refusal> {
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

fn named<'a>(
    request: &Request,
    routes: &'a crate::ingress::routes::Routes,
) -> Result<&'a Deployment, Refusal> {
    let name = request.param("name").unwrap_or("");
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
    if let Peer::Tcp { address, .. } = peer {
        let address = address.ip().to_string();
        match headers.iter_mut().find(|(name, _)| name == "x-forwarded-for") {
            Some((_, list)) => list.extend([", ", address.as_str()]),
            None => headers.push(("x-forwarded-for".to_owned(), address)),
        }
    }
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

fn target(request: &Request) -> Target {
    let none = || Target { path: "/".to_owned(), query: String::new() };
    request.ext::<Target>().cloned().unwrap_or_else(none)
}

/// `/function/NAME/rest` → `/rest`
fn rest_of_path(request: &Request) -> String {
    let path = target(request).path;
    let rest = path.splitn(4, '/').nth(3).unwrap_or("");
    format!("/{rest}")
}
