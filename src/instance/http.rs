//! Handler http: an event, or a call as it came, goes to an instance as an HTTP request over a
//! kept-alive connection inside its network namespace, and the answer comes back.
//!
//! ```text
//!   place (service) ──▶ connection ──▶ request sent ──▶ head ──▶ body ──▶ outcome, place given back
//!                                          └── limits.timeout: from here to the body's end ──┘
//! ```
//!
//! A call's bodies are passed on piece by piece, bounded by time and by how fast the other side
//! reads. An event's data is in memory anyway, and so is the answer to it, within
//! `limits.payload`.
//!
//! An instance that let a request time out is killed, unless it has answered others meanwhile:
//! then it is that request's fault. A caller who leaves closes the request's connection, as
//! behind any proxy; the instance goes on serving.

use super::life::{Instance, exit_failure};
use super::platform::{self, Ready};
use super::request::{self, Head};
use super::service::{Before, NotStarted, Place, Service, Setup};
use crate::channels::LogLine;
use crate::model::event::CUT_EXTENSION;
use crate::model::{Clock, Event, Failure, Manifest, Outcome, Revision};
use crate::net::http::{Finish, Passing, Returned, Streamed, Upstream, UpstreamError, WholeError};
use crate::runtime::{Exit, Inside};
use futures_lite::future;
use smol::Timer;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// One that said it is full is asked again after this, and given a request all the same after the
/// second: what is full for longer says so once more.
const FULL_ASKED: Duration = Duration::from_millis(100);
const FULL_MAX: Duration = Duration::from_secs(10);
/// Instances that turn out full before an event's attempt is taken for failed.
const FULL_TRIED: u32 = 5;
/// Where there is nothing to ask.
const FULL_PAUSE: Duration = Duration::from_secs(1);

/// Between two looks whether an instance listens: short at first, for servers that start at
/// once; a look costs two system calls.
const PROBE_FIRST: Duration = Duration::from_millis(2);
const PROBE_MAX: Duration = Duration::from_millis(50);

/// A look at a path: a server that takes longer is asked again.
const PROBE_ANSWER: Duration = Duration::from_secs(1);

/// A kept connection that is not ready for another request by now is not kept.
const CONNECTION_READY: Duration = Duration::from_millis(5);

/// Connections that turn out closed before one is taken for a fault.
const CONNECTIONS_TRIED: u32 = 3;

/// Instances that turn out ended before another end is taken for the request's own.
const INSTANCES_TRIED: u32 = 4;

/// For the launcher to say that an instance has died, which it does in a millisecond.
const DEATH_KNOWN: Duration = Duration::from_millis(200);

/// Below these a process needs a capability, which it has not, or this (ip-sysctl).
const LOW_PORTS_END: u16 = 1024;

/// Makes instances ready for requests.
pub struct Listening {
    pub executor: Arc<smol::Executor<'static>>,
}

impl Setup for Listening {
    fn before(&self, inside: &Inside, revision: &Revision) -> Result<Before, String> {
        if platform::port(&revision.manifest) < LOW_PORTS_END {
            inside.allow_low_ports().map_err(|error| format!("allow ports below 1024: {error}"))?;
        }
        Ok(Before { env: platform::environment(revision), api: None })
    }

    fn ready<'a>(
        &'a self,
        instance: &'a Arc<Instance>,
        revision: &'a Revision,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>> {
        Box::pin(async move {
            let port = platform::port(&revision.manifest);
            let mut pause = PROBE_FIRST;
            while !self.answers(instance, port, platform::ready(&revision.manifest)).await {
                Timer::after(pause).await;
                pause = (pause * 2).min(PROBE_MAX);
            }
            self.first(instance, port, revision).await
        })
    }

    fn until_room<'a>(
        &'a self,
        instance: &'a Arc<Instance>,
        revision: &'a Revision,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            let Some(path) = &revision.manifest.serving.ready else {
                Timer::after(FULL_PAUSE).await;
                return;
            };
            let asked = async {
                loop {
                    Timer::after(FULL_ASKED).await;
                    if self.answers(instance, platform::port(&revision.manifest), Ready::Answers(path)).await
                    {
                        return;
                    }
                }
            };
            let late = async {
                Timer::after(FULL_MAX).await;
            };
            future::or(asked, late).await;
        })
    }
}

impl Listening {
    /// One look.
    async fn answers(&self, instance: &Instance, port: u16, ready: Ready<'_>) -> bool {
        let (path, may_lack) = match ready {
            Ready::Connects => return instance.inside.connect(port).await.is_ok(),
            Ready::Answers(path) => (path, false),
            Ready::AnswersOrLacks(path) => (path, true),
        };
        let head = Head { method: "GET".to_owned(), target: path.to_owned(), headers: Vec::new() };
        let ask = async { self.ask(instance, port, head, Vec::new()).await.ok() };
        let late = async {
            Timer::after(PROBE_ANSWER).await;
            None
        };
        match future::or(ask, late).await {
            Some(200) => true,
            Some(404) => may_lack,
            _ => false,
        }
    }

    async fn first(&self, instance: &Instance, port: u16, revision: &Revision) -> Result<(), String> {
        let Some(first) = platform::first(revision) else { return Ok(()) };
        let target = first.head.target.clone();
        match self.ask(instance, port, first.head, first.body).await {
            Ok(200..=299) => Ok(()),
            Ok(404 | 405) if first.may_lack => Ok(()),
            Ok(status) => Err(format!("answered POST {target} with HTTP status {status}")),
            Err(why) => Err(format!("gave no answer to POST {target}: {why}")),
        }
    }

    /// A request of neap's own; the answer's status.
    async fn ask(
        &self,
        instance: &Instance,
        port: u16,
        mut head: Head,
        body: Vec<u8>,
    ) -> Result<u16, String> {
        head.set_if_absent("host", "localhost");
        head.set_if_absent("user-agent", "neap");
        let socket = instance.inside.connect(port).await.map_err(|error| error.to_string())?;
        let open = Upstream::open(socket, &self.executor).await;
        let mut upstream = open.map_err(|error| error.to_string())?;
        let answer = upstream.send(passing(head, body.into())).await.map_err(|error| error.to_string())?;
        Ok(answer.status)
    }
}

/// What running one request needs besides its service.
pub struct Caller<'a> {
    pub executor: &'a smol::Executor<'static>,
    pub clock: &'a dyn Clock,
}

/// Who gets an answer, and how.
pub struct Asker {
    pub answer: smol::channel::Sender<Returned>,
    /// All at once, and in the outcome too.
    pub whole: bool,
}

/// Why there is no answer.
pub enum Trouble {
    Failure(Failure),
    Lost,
}

impl From<NotStarted> for Trouble {
    fn from(why: NotStarted) -> Self {
        match why {
            NotStarted::Failed(failure) => Self::Failure(failure),
            NotStarted::Lost => Self::Lost,
        }
    }
}

impl Trouble {
    pub fn outcome(self, took: Duration, log: &LogLine) -> Outcome {
        match self {
            Self::Failure(failure) => {
                if let Failure::Start(why) = &failure {
                    log(&format!("neap: {why}"));
                }
                Outcome::failed(failure, Vec::new(), took)
            }
            Self::Lost => Outcome::Lost,
        }
    }
}

/// A stored event: from its data to the whole answer.
pub async fn run(caller: &Caller<'_>, service: &Arc<Service>, event: &Event, log: &LogLine) -> Outcome {
    let limit_bytes = service.revision.manifest.limits.payload_bytes;
    let cut = event.extensions.contains_key(CUT_EXTENSION);
    if cut || event.data.len() as u64 > limit_bytes {
        let failure = Failure::PayloadTooLarge { limit_bytes };
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    let (begun, mut tried) = (Instant::now(), 0);
    loop {
        let head = request::head(event, service.revision.name().as_str());
        let (outcome, _) = match platform::wrap(&service.revision, event) {
            Some(wrap) => enveloped(caller, service, event, head, &event.data, &wrap, log).await,
            None => collected(caller, service, event, head, event.data.clone().into(), log).await,
        };
        // Its instance was full, which is no failure: it waits for that one or another, where they say
        // when they have room.
        let Manifest { serving, limits, .. } = &service.revision.manifest;
        let full = matches!(&outcome, Outcome::Failed { failure: Failure::Status(status), .. }
            if platform::is_full(&service.revision, *status));
        tried += 1;
        if !full || serving.ready.is_none() || tried == FULL_TRIED || begun.elapsed() > limits.timeout {
            return outcome;
        }
    }
}

async fn within<T>(service: &Service, work: impl Future<Output = T>) -> Option<T> {
    let late = async {
        Timer::after(service.revision.manifest.limits.timeout).await;
        None
    };
    future::or(async { Some(work.await) }, late).await
}

/// An event in its platform's envelope, and what is in the answer's.
async fn enveloped(
    caller: &Caller<'_>,
    service: &Arc<Service>,
    event: &Event,
    head: Head,
    data: &[u8],
    wrap: &platform::Wrap,
    log: &LogLine,
) -> (Outcome, Option<Returned>) {
    let (head, body) = (wrap.request)(&service.revision, event, head, data);
    let (outcome, answered) = collected(caller, service, event, head, body.into(), log).await;
    let Outcome::Succeeded { output, took, .. } = outcome else { return (outcome, answered) };
    let unwrapped = match (wrap.answer)(&output) {
        Ok(unwrapped) => unwrapped,
        Err(why) => {
            return (Outcome::failed(Failure::Answer(format!("the function {why}")), output, took), None);
        }
    };
    if !unwrapped.logs.is_empty() {
        log(&unwrapped.logs.join("\n"));
    }
    let platform::Unwrapped { status, mut headers, body, .. } = unwrapped;
    request::leave_connection(&mut headers);
    headers.retain(|(name, _)| name != "content-length");
    let content_type = crate::net::http::header(&headers, "content-type").map(str::to_owned);
    let outcome = match status {
        200..=299 => Outcome::Succeeded { output: body.clone(), content_type, event: None, took },
        status => Outcome::failed(Failure::Status(status), body.clone(), took),
    };
    (outcome, Some(Returned { status, headers, body: body.into() }))
}

/// A call as it came.
pub async fn exchange(
    caller: &Caller<'_>,
    service: &Arc<Service>,
    event: &Event,
    passing: Passing,
    asker: Asker,
    log: &LogLine,
) -> Outcome {
    let Passing { method, target, headers, body } = passing;
    let Asker { answer, whole } = asker;
    let mut head = Head { method, target, headers };
    head.leave_connection();
    head.headers.retain(|(name, _)| name != "content-length" && name != "expect");
    if let Some(wrap) = platform::wrap(&service.revision, event) {
        let limit_bytes = service.revision.manifest.limits.payload_bytes;
        let mut data = Vec::new();
        let read = async { body.whole(limit_bytes, &mut data).await };
        let (outcome, answered) = match within(service, read).await {
            None => (timed_out(service.revision.manifest.limits.timeout).outcome(Duration::ZERO, log), None),
            Some(Err(WholeError::TooLarge(limit_bytes))) => {
                let failure = Failure::PayloadTooLarge { limit_bytes };
                (Outcome::failed(failure, Vec::new(), Duration::ZERO), None)
            }
            // Its caller has left.
            Some(Err(WholeError::Broken(_))) => (Outcome::Lost, None),
            Some(Ok(())) => enveloped(caller, service, event, head, &data, &wrap, log).await,
        };
        if let Some(answered) = answered {
            let _ = answer.try_send(answered); // its receiver may have left
        }
        return outcome;
    }
    if !whole {
        return streamed(caller, service, event, head, body, &answer, log).await;
    }
    let (outcome, answered) = collected(caller, service, event, head, body, log).await;
    if let Some(answered) = answered {
        let _ = answer.try_send(answered); // its receiver may have left
    }
    outcome
}

/// Sends a request and reads the whole answer, within `limits.timeout` and `limits.payload`. The
/// answer once more, for a caller who wants to see it as it was.
async fn collected(
    caller: &Caller<'_>,
    service: &Arc<Service>,
    event: &Event,
    head: Head,
    body: Streamed,
    log: &LogLine,
) -> (Outcome, Option<Returned>) {
    let limits = &service.revision.manifest.limits;
    let mut request = Request::new(shaped(&service.revision, event, head, body));
    let (mut place, done, output, before, start) = loop {
        let mut place = match service.place().await {
            Ok(place) => place,
            Err(why) => return (Trouble::from(why).outcome(Duration::ZERO, log), None),
        };
        place.instance.begin(&event.id);
        let gone = request.gone;
        let start = Instant::now();
        let mut output = Vec::new();
        let before = place.instance.answered.load(Ordering::Relaxed);
        let work = async {
            let (answer, upstream) = send(caller, &place, &mut request, &service.revision).await?;
            let Returned { status, headers, body } = answer;
            match body.whole(limits.payload_bytes, &mut output).await {
                Ok(()) => {
                    place.instance.count_answer();
                    place.instance.keep(upstream, caller.clock.monotonic());
                    Ok((status, headers))
                }
                Err(WholeError::TooLarge(limit_bytes)) => {
                    Err(Trouble::Failure(Failure::OutputTooLarge { limit_bytes }))
                }
                Err(WholeError::Broken(_)) => {
                    Err(broken(&place.instance, &service.revision, "its answer broke off").await)
                }
            }
        };
        let late = async {
            service.base.deadlines.after(limits.timeout).await;
            Err(timed_out(limits.timeout))
        };
        let done = future::or(work, late).await;
        if done.is_err() && request.may_try_again(gone) {
            place.keep = false;
            continue;
        }
        break (place, done, output, before, start);
    };
    let took = start.elapsed();
    let (status, mut headers) = match done {
        Ok(answer) => answer,
        Err(trouble) => {
            give_up(&mut place, before, &trouble, service.revision.manifest.serving.concurrency);
            return (trouble.outcome(took, log), None);
        }
    };
    if platform::is_full(&service.revision, status) {
        place.full();
    }
    drop(place);
    request::leave_connection(&mut headers);
    headers.retain(|(name, _)| name != "content-length" && name != "trailer");
    let header = |name: &str| crate::net::http::header(&headers, name);
    let text = |name: &str| header(name).map(str::to_owned);
    let judged = platform::judged(&service.revision, status, header);
    let outcome = if (200..300).contains(&judged) {
        let (content_type, event) = (text("content-type"), request::answered(&headers).map(Box::new));
        Outcome::Succeeded { output: output.clone(), content_type, event, took }
    } else {
        let retry_after = text("retry-after").and_then(|v| request::retry_after(&v, caller.clock.wall()));
        Outcome::Failed { failure: Failure::Status(judged), output: output.clone(), took, retry_after }
    };
    (outcome, Some(Returned { status, headers, body: output.into() }))
}

/// Hands the answer on as soon as its head is there, and waits for its body to be through.
async fn streamed(
    caller: &Caller<'_>,
    service: &Arc<Service>,
    event: &Event,
    head: Head,
    body: Streamed,
    answers: &smol::channel::Sender<Returned>,
    log: &LogLine,
) -> Outcome {
    let timeout = service.revision.manifest.limits.timeout;
    let without_body = head.method == "HEAD";
    let mut request = Request::new(shaped(&service.revision, event, head, body));
    let (mut place, done, before, start) = loop {
        let mut place = match service.place().await {
            Ok(place) => place,
            Err(why) => return Trouble::from(why).outcome(Duration::ZERO, log),
        };
        place.instance.begin(&event.id);
        let gone = request.gone;
        let start = Instant::now();
        let before = place.instance.answered.load(Ordering::Relaxed);
        let work = async {
            let (mut answer, upstream) = send(caller, &place, &mut request, &service.revision).await?;
            let status = answer.status;
            if platform::is_full(&service.revision, status) {
                place.full();
            }
            request::leave_connection(&mut answer.headers);
            // What is left of it says how long the body is, but for an answer that has none.
            if !without_body && status != 304 {
                answer.headers.retain(|(name, _)| name != "content-length");
            }
            let (watcher, finish) = smol::channel::bounded(1);
            answer.body = answer.body.watched(watcher);
            if answers.try_send(answer).is_err() {
                return Ok((status, Finish::Left));
            }
            let finish = finish.recv().await.unwrap_or(Finish::Left);
            if finish == Finish::Whole {
                place.instance.count_answer();
                place.instance.keep(upstream, caller.clock.monotonic());
            }
            Ok((status, finish))
        };
        let late = async {
            service.base.deadlines.after(timeout).await;
            Err(timed_out(timeout))
        };
        let done = future::or(work, late).await;
        if done.is_err() && request.may_try_again(gone) {
            place.keep = false;
            continue;
        }
        break (place, done, before, start);
    };
    let took = start.elapsed();
    match done {
        Ok((status, Finish::Whole | Finish::Left)) => match status {
            200..=399 => Outcome::Succeeded { output: Vec::new(), content_type: None, event: None, took },
            status => Outcome::failed(Failure::Status(status), Vec::new(), took),
        },
        Ok((_, Finish::Broken)) => {
            let trouble = broken(&place.instance, &service.revision, "its answer broke off").await;
            trouble.outcome(took, log)
        }
        Err(trouble) => {
            give_up(&mut place, before, &trouble, service.revision.manifest.serving.concurrency);
            trouble.outcome(took, log)
        }
    }
}

fn timed_out(limit: Duration) -> Trouble {
    Trouble::Failure(Failure::TimedOut { limit_ms: limit.as_millis() as u64 })
}

/// After a request that timed out: is it the instance, or that request alone?
fn give_up(place: &mut Place, answered_before: u64, trouble: &Trouble, concurrency: u32) {
    if let Trouble::Failure(Failure::TimedOut { .. }) = trouble {
        let others = place.instance.answered.load(Ordering::Relaxed) != answered_before;
        place.keep = concurrency > 1 && others;
    }
}

fn shaped(revision: &Revision, event: &Event, mut head: Head, body: Streamed) -> Passing {
    head.set_if_absent("host", revision.name().as_str());
    let trace = event.extensions.get("traceparent").cloned();
    let trace = trace.unwrap_or_else(|| request::traceparent([(); 3].map(|()| fastrand::u64(..))));
    head.set_if_absent("traceparent", &trace);
    platform::request(revision, event, &mut head);
    // Servers of HTTP/1.0's school wait for a length where there may be a body.
    if body.length() == Some(0) && !matches!(head.method.as_str(), "GET" | "HEAD" | "OPTIONS" | "DELETE") {
        head.set("content-length", "0");
    }
    passing(head, body)
}

fn passing(head: Head, body: Streamed) -> Passing {
    Passing { method: head.method, target: head.target, headers: head.headers, body }
}

/// A request until it is sent. An instance may have ended between two requests, and nobody has
/// noticed yet: the request that finds out goes to another.
struct Request {
    unsent: Option<Passing>,
    /// Instances that had ended.
    gone: u32,
}

impl Request {
    fn new(passing: Passing) -> Self {
        Self { unsent: Some(passing), gone: 0 }
    }

    /// Whether nothing of it was sent because this try's instance had ended; `gone`: those before it.
    fn may_try_again(&self, gone: u32) -> bool {
        self.unsent.is_some() && self.gone > gone && self.gone < INSTANCES_TRIED
    }
}

/// To the answer's head.
async fn send(
    caller: &Caller<'_>,
    place: &Place,
    request: &mut Request,
    revision: &Revision,
) -> Result<(Returned, Upstream), Trouble> {
    let instance = &place.instance;
    let port = platform::port(&revision.manifest);
    for _ in 0..CONNECTIONS_TRIED {
        let mut upstream = match kept(caller, instance).await {
            Some(upstream) => upstream,
            None => match connect(caller, instance, port).await {
                Ok(upstream) => upstream,
                Err(why) => {
                    request.gone += u32::from(instance.ended_within(DEATH_KNOWN).await.is_some());
                    return Err(broken(instance, revision, &why).await);
                }
            },
        };
        let Some(passing) = request.unsent.take() else { break };
        match upstream.send(passing).await {
            Ok(answer) => return Ok((answer, upstream)),
            Err(UpstreamError::Unsent(unsent)) => request.unsent = Some(*unsent),
            Err(error) => return Err(broken(instance, revision, &error.to_string()).await),
        }
    }
    Err(broken(instance, revision, "it closes every connection").await)
}

async fn kept(caller: &Caller<'_>, instance: &Instance) -> Option<Upstream> {
    let mut upstream = instance.connection(caller.clock.monotonic())?;
    let late = async {
        Timer::after(CONNECTION_READY).await;
        false
    };
    let ready = future::or(upstream.ready(), late).await;
    ready.then_some(upstream)
}

async fn connect(caller: &Caller<'_>, instance: &Instance, port: u16) -> Result<Upstream, String> {
    let socket = instance.inside.connect(port).await;
    let socket = socket.map_err(|error| format!("connect to its port {port}: {error}"))?;
    Upstream::open(socket, caller.executor).await.map_err(|error| error.to_string())
}

/// A connection that broke: what ended the instance, if it has ended.
async fn broken(instance: &Instance, revision: &Revision, why: &str) -> Trouble {
    match instance.ended_within(DEATH_KNOWN).await {
        Some(Exit::Lost) => Trouble::Lost,
        Some(exit) => Trouble::Failure(exit_failure(exit, revision)),
        None => Trouble::Failure(Failure::Answer(format!("the function gave no good answer: {why}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_is_tried_again_only_when_the_last_try_met_an_ended_instance() {
        let head = Head { method: "GET".to_owned(), target: "/".to_owned(), headers: Vec::new() };
        let mut request = Request::new(passing(head, Vec::new().into()));
        assert!(!request.may_try_again(0), "nothing had ended");

        request.gone = 1;
        assert!(request.may_try_again(0));
        assert!(!request.may_try_again(1), "the second try failed in another way");
        request.gone = INSTANCES_TRIED;
        assert!(!request.may_try_again(INSTANCES_TRIED - 1), "that was the last");
        request.gone = 1;
        request.unsent = None;
        assert!(!request.may_try_again(0), "it was sent");
    }
}
