//! What probes and scrapers ask: `/healthz`, `/readyz` and `/metrics`.

use super::Request;
use super::problem::Refusal;
use crate::telemetry::metrics::Gauges;
use http_types::StatusCode;
use tide::Response;

/// GET /healthz: the process answers.
pub async fn live(_: Request) -> Result<Response, Refusal> {
    Ok(text("ok\n"))
}

/// GET /readyz: functions can run.
pub async fn ready(request: Request) -> Result<Response, Refusal> {
    let shared = request.state();
    if *shared.stop.get() {
        return Err(Refusal::stopping());
    }
    match (shared.api.facts)().not_ready {
        None => Ok(text("ok\n")),
        Some(why) => Err(Refusal::busy(why)),
    }
}

/// GET /metrics: the Prometheus text format 0.0.4.
pub async fn metrics(request: Request) -> Result<Response, Refusal> {
    let shared = request.state();
    if !shared.api.http.listen.ip().is_loopback() {
        shared.known(&request)?;
    }
    let counts = shared.api.store.counts().await?;
    let facts = (shared.api.facts)();
    let routes = shared.api.routes.get();
    let replicas = routes.functions.iter().map(|(name, deployment)| {
        let load = facts.functions.get(name).copied().unwrap_or_default();
        (name.clone(), super::gateway::replicas(deployment, load))
    });
    let replicas = replicas.collect();
    let gauges = Gauges {
        inbox_depth: counts.ready + counts.running,
        outbox_depth: counts.owed_uplink + counts.owed_local + counts.owed_callbacks,
        dead_events: counts.dead,
        dead_deliveries: counts.dead_deliveries,
        expired: counts.expired,
        dropped_full: counts.dropped_full,
        dropped_age: counts.dropped_age,
        full: counts.full.is_some(),
        database_bytes: counts.bytes,
        memory_reserved_bytes: facts.memory_reserved_bytes,
        instances: facts.instances,
        functions: facts.functions.into_iter().collect(),
        replicas,
        links: facts.links.into_iter().map(|link| (link.name, link.state == "up")).collect(),
    };
    let mut response = text(&shared.api.metrics.render(&gauges));
    response.insert_header("content-type", "text/plain; version=0.0.4; charset=utf-8");
    Ok(response)
}

pub(super) fn text(body: &str) -> Response {
    let mut response = Response::new(StatusCode::Ok);
    response.set_body(body.to_owned());
    response.insert_header("content-type", "text/plain; charset=utf-8");
    response
}
