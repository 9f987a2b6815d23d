//! HTTP in: invoking functions, and the control API. tide routes; `net::http` is the wire.
//!
//! # Wiring
//!
//! ```ignore
//! let listeners = Listeners::bind(&config)?;           // early: a taken port is a start error
//! let api = Arc::new(Api { /* … */ });
//! executor.spawn(http::serve(api, listeners, stop.clone()));  // answers from here on
//! stop.set(true);                                      // running requests get `GRACE`
//! ```
//!
//! `serve` ends by itself after `stop`; dropping it drops every connection. A synchronous call
//! waits on its `Invoke::reply`: a client that leaves drops the receiver.
//!
//! # What a call's answer says beside its body
//!
//! - `X-Call-Id`: the event's id, percent-encoded; the caller's own if it sent one.
//! - `X-Start-Time`: nanoseconds since 1970; `X-Duration-Seconds`: how long the function ran, if
//!   it did and succeeded.
//! - `X-Neap-Failure`, when the function ran or was to run and failed (502, 504, 413): one of
//!   `exit`, `signal`, `out_of_memory`, `timed_out`, `output_too_large`, `start`,
//!   `payload_too_large` and `refused`. Programs go by this word, people read the problem's detail.
//! - `Retry-After`, in seconds, when the same request may succeed later (503, 507). One 503 comes
//!   after the function ran: its output had no room beside others that wait to be read.

mod auth;
mod body;
mod control;
mod dashboard;
mod event;
mod events;
mod functions;
mod gateway;
mod health;
mod lambda;
mod problem;

pub use crate::net::http::{BindError, Listeners};

use crate::channels::{Command, Invoke};
use crate::config;
use crate::image::ImageStore;
use crate::ingress::routes::Routes;
use crate::model::api::LinkStatus;
use crate::model::function::FunctionLoad;
use crate::model::{Clock, FunctionName};
use crate::net::http::{App, Peer};
use crate::runtime::Usage;
use crate::secrets::Secrets;
use crate::store::Store;
use crate::telemetry::logs::FunctionLogs;
use crate::telemetry::metrics::Metrics;
use crate::watch::{Wake, Watch};
use auth::Token;
use body::Room;
use control::{functions as deployed, images, logs, queues, secrets, status};
use http_types::Method;
use problem::Refusal;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tide::Response;

/// What running requests are given to finish at a stop: a little more than the scheduler gives
/// invocations, so that callers of those that it ends are told.
pub const GRACE: Duration = Duration::from_secs(12);

/// Everything that HTTP needs of the node.
pub struct Api {
    pub node: String,
    pub http: config::Http,
    pub store: Store,
    pub images: ImageStore,
    pub secrets: Secrets,
    pub logs: FunctionLogs,
    pub metrics: Metrics,
    pub routes: Watch<Routes>,
    /// Synchronous calls: bounded; a full one is answered 503.
    pub invoke: smol::channel::Sender<Invoke>,
    pub commands: smol::channel::Sender<Command>,
    /// The scheduler's: rung when an event was committed.
    pub wake: Wake,
    /// The links': rung when a delivery is owed again.
    pub outbox: Wake,
    pub clock: Arc<dyn Clock>,
    /// Asked at every `/v1/status`, `/readyz` and `/metrics`: it must not block.
    pub facts: Arc<dyn Fn() -> Facts + Send + Sync>,
    /// What each function's instances use, by its name; a few small files for each.
    pub usage: Arc<dyn Fn() -> BTreeMap<String, Usage> + Send + Sync>,
}

/// What only the daemon knows.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `None`: the scheduler and a launcher run.
    pub not_ready: Option<String>,
    pub links: Vec<LinkStatus>,
    pub memory_reserved_bytes: u64,
    pub memory_budget_bytes: u64,
    pub disk_free_bytes: u64,
    pub instances: u64,
    pub parked: u64,
    /// Those with anything to tell.
    pub functions: BTreeMap<FunctionName, FunctionLoad>,
    pub warnings: Vec<String>,
}

/// Serves until `stop` holds true and what ran has finished, or `GRACE` is over.
pub async fn serve(api: Arc<Api>, listeners: Listeners, stop: Watch<bool>) {
    let shared = Shared {
        token: Arc::new(Token::new(api.http.token_file.clone())),
        room: Room::default(),
        outputs: Room::default(),
        random: Arc::new(ring::rand::SystemRandom::new()),
        stop: stop.clone(),
        api,
    };
    crate::net::http::serve(listeners, Arc::new(Tide(router(shared))), stop, GRACE).await;
}

type Request = tide::Request<Shared>;

/// What handlers share.
#[derive(Clone)]
struct Shared {
    api: Arc<Api>,
    token: Arc<Token>,
    room: Room,
    outputs: Room,
    random: Arc<ring::rand::SystemRandom>,
    stop: Watch<bool>,
}

impl Shared {
    /// Refuses callers that can't say who they are.
    fn known(&self, request: &Request) -> Result<(), Refusal> {
        let peer = self.peer(request);
        let last = |name: &str| request.header(name).map(|values| values.last().as_str());
        let authorization = last("authorization");
        if !self.token.caller(peer, authorization).is_known() {
            return Err(self.token.refusal(peer));
        }
        let safe = matches!(request.method(), Method::Get | Method::Head | Method::Options);
        let asking = auth::Asking {
            authorization,
            host: last("host"),
            origin: last("origin"),
            fetch_site: last("sec-fetch-site"),
        };
        if !safe && auth::is_foreign_page(peer, &asking) {
            let detail = "a page of another site may not change anything here with a browser's credentials";
            return Err(Refusal::new(http_types::StatusCode::Forbidden, detail));
        }
        Ok(())
    }

    fn peer(&self, request: &Request) -> Peer {
        *request.ext::<Peer>().expect("the server says of every request who sent it")
    }

    /// Returns when the daemon stops.
    async fn stopping(&self) {
        let (mut version, mut stop) = self.stop.versioned();
        while !*stop {
            (version, stop) = self.stop.changed(version).await;
        }
    }
}

struct Tide(tide::Server<Shared>);

impl App for Tide {
    fn respond(
        &self,
        request: http_types::Request,
    ) -> Pin<Box<dyn Future<Output = http_types::Response> + Send + '_>> {
        Box::pin(async move {
            let answer: http_types::Result<http_types::Response> = self.0.respond(request).await;
            answer.unwrap_or_else(|error| http_types::Response::new(error.status()))
        })
    }
}

/// Every path of neap's own, for every method: what has no handler is refused by name, and
/// falls through to no trigger.
fn router(shared: Shared) -> tide::Server<Shared> {
    let mut app = tide::Server::with_state(shared);
    let get = Method::Get;
    let post = Method::Post;
    let delete = Method::Delete;

    for path in ["/function/:name", "/function/:name/", "/function/:name/*rest"] {
        app.at(path).all(open(functions::invoke));
    }
    for path in ["/async-function/:name", "/async-function/:name/", "/async-function/:name/*rest"] {
        route(&mut app, path, "POST").on(post, open(functions::invoke_async));
    }
    route(&mut app, "/healthz", "GET, HEAD").on(get, open(health::live));
    route(&mut app, "/readyz", "GET, HEAD").on(get, open(health::ready));
    route(&mut app, "/metrics", "GET, HEAD").on(get, open(health::metrics));
    route(&mut app, "/", "GET, HEAD").on(get, open(dashboard::show));

    route(&mut app, "/v1/status", "GET, HEAD").on(get, guarded(status::status));
    route(&mut app, "/v1/reload", "POST").on(post, guarded(deployed::reload));
    route(&mut app, "/v1/run", "POST").on(post, guarded(deployed::run));
    route(&mut app, "/v1/functions", "GET, HEAD, POST")
        .on(get, guarded(deployed::list))
        .on(post, guarded(deployed::deploy));
    route(&mut app, "/v1/functions/:name", "GET, HEAD, DELETE")
        .on(get, guarded(deployed::show))
        .on(delete, guarded(deployed::remove));
    route(&mut app, "/v1/functions/:name/pause", "POST").on(post, guarded(deployed::pause));
    route(&mut app, "/v1/functions/:name/resume", "POST").on(post, guarded(deployed::resume));
    route(&mut app, "/v1/functions/:name/rollback", "POST").on(post, guarded(deployed::rollback));
    route(&mut app, "/v1/functions/:name/logs", "GET, HEAD").on(get, guarded(logs::logs));
    route(&mut app, "/v1/images", "GET, HEAD, POST")
        .on(get, guarded(images::list))
        .on(post, guarded(images::import));
    // Not below /v1/images, where any word is an image's name.
    route(&mut app, "/v1/pull", "POST").on(post, guarded(images::pull));
    route(&mut app, "/v1/collect", "POST").on(post, guarded(images::collect));
    route(&mut app, "/v1/images/:image", "GET, HEAD, DELETE")
        .on(get, guarded(images::show))
        .on(delete, guarded(images::remove));
    route(&mut app, "/v1/secrets", "GET, HEAD").on(get, guarded(secrets::list));
    route(&mut app, "/v1/secrets/:name", "PUT, DELETE")
        .on(Method::Put, guarded(secrets::set))
        .on(delete, guarded(secrets::remove));
    route(&mut app, "/v1/events", "GET, HEAD").on(get, guarded(queues::events));
    route(&mut app, "/v1/events/redrive", "POST").on(post, guarded(queues::redrive_events));
    route(&mut app, "/v1/events/purge", "POST").on(post, guarded(queues::purge_events));
    route(&mut app, "/v1/events/:id", "GET, HEAD").on(get, guarded(queues::event));
    route(&mut app, "/v1/deliveries", "GET, HEAD").on(get, guarded(queues::deliveries));
    route(&mut app, "/v1/deliveries/redrive", "POST").on(post, guarded(queues::redrive_deliveries));
    route(&mut app, "/v1/deliveries/purge", "POST").on(post, guarded(queues::purge_deliveries));
    route(&mut app, "/v1/deliveries/:id", "GET, HEAD").on(get, guarded(queues::delivery));
    for path in ["/v1", "/v1/*rest"] {
        app.at(path).all(guarded(nothing));
    }

    system(&mut app);
    route(&mut app, "/events", "POST").on(post, open(events::publish));
    route(&mut app, "/2015-03-31/functions/:name/invocations", "POST").on(post, open(lambda::invoke));
    route(&mut app, "/2021-11-15/functions/:name/response-streaming-invocations", "POST")
        .on(post, open(lambda::invoke_streaming));
    for path in ["/2015-03-31", "/2015-03-31/*rest", "/2021-11-15", "/2021-11-15/*rest"] {
        app.at(path).all(open(nothing));
    }
    for path in ["/function", "/async-function", "/function/", "/async-function/"] {
        app.at(path).all(open(nothing));
    }
    // tide's `*` wants at least one character, and `/` has a route of its own.
    app.at("/*path").all(open(functions::trigger));
    app
}

async fn nothing(_: Request) -> Result<Response, Refusal> {
    Err(Refusal::not_found("nothing answers on this path"))
}

/// OpenFaaS's gateway.
fn system(app: &mut tide::Server<Shared>) {
    let (get, post, put, delete) = (Method::Get, Method::Post, Method::Put, Method::Delete);
    route(app, "/system/functions", "GET, HEAD, POST, PUT, DELETE")
        .on(get, foreign(gateway::list))
        .on(post, foreign(gateway::create))
        .on(put, foreign(gateway::update))
        .on(delete, foreign(gateway::remove));
    route(app, "/system/function/:name", "GET, HEAD").on(get, foreign(gateway::describe));
    route(app, "/system/scale-function/:name", "POST").on(post, foreign(gateway::scale));
    route(app, "/system/info", "GET, HEAD").on(get, foreign(gateway::info));
    route(app, "/system/logs", "GET, HEAD").on(get, foreign(gateway::logs));
    route(app, "/system/namespaces", "GET, HEAD").on(get, foreign(gateway::namespaces));
    route(app, "/system/namespace/:name", "GET, HEAD, POST, PUT, DELETE")
        .on(get, foreign(gateway::show_namespace))
        .on(post, foreign(gateway::change_namespace))
        .on(put, foreign(gateway::change_namespace))
        .on(delete, foreign(gateway::change_namespace));
    route(app, "/system/secrets", "GET, HEAD, POST, PUT, DELETE")
        .on(get, foreign(gateway::secrets))
        .on(post, foreign(gateway::create_secret))
        .on(put, foreign(gateway::update_secret))
        .on(delete, foreign(gateway::remove_secret));
    for path in ["/system", "/system/*rest"] {
        app.at(path).all(foreign(nothing));
    }
}

struct Endpoints<'a> {
    route: tide::Route<'a, Shared>,
}

fn route<'a>(app: &'a mut tide::Server<Shared>, path: &str, allowed: &'static str) -> Endpoints<'a> {
    let mut route = app.at(path);
    route.all(open(move |_| async move { Err(Refusal::method_not_allowed(allowed)) }));
    Endpoints { route }
}

impl Endpoints<'_> {
    /// HEAD goes where GET goes: the `all` beside it would take it otherwise.
    fn on(mut self, method: Method, endpoint: impl tide::Endpoint<Shared> + Clone) -> Self {
        if method == Method::Get {
            self.route.method(Method::Head, endpoint.clone());
        }
        self.route.method(method, endpoint);
        self
    }
}

fn open<F, A>(handler: F) -> impl tide::Endpoint<Shared> + Clone
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<Response, Refusal>> + Send + 'static,
{
    Handler { handler, guarded: false }
}

/// Behind the token, a client certificate or the Unix socket.
fn guarded<F, A>(handler: F) -> impl tide::Endpoint<Shared> + Clone
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<Response, Refusal>> + Send + 'static,
{
    Handler { handler, guarded: true }
}

/// The same, refusing in words that OpenFaaS's clients show.
fn foreign<F, A>(handler: F) -> impl tide::Endpoint<Shared> + Clone
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<Response, Refusal>> + Send + 'static,
{
    guarded(move |request| {
        let answer = handler(request);
        async move { Ok(answer.await.unwrap_or_else(gateway::plain)) }
    })
}

#[derive(Clone)]
struct Handler<F> {
    handler: F,
    guarded: bool,
}

impl<F, A> tide::Endpoint<Shared> for Handler<F>
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Result<Response, Refusal>> + Send + 'static,
{
    fn call<'a, 'b>(&'a self, request: Request) -> Pin<Box<dyn Future<Output = tide::Result> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            if self.guarded
                && let Err(refusal) = request.state().known(&request)
            {
                return Ok(refusal.into());
            }
            Ok((self.handler)(request).await.unwrap_or_else(Response::from))
        })
    }
}
