//! `/v1/functions`, and `/v1/reload` and `/v1/run`, which go the same way: to `deploy`.

use super::{Query, json, param};
use crate::channels::{Command, DeployError, Reply, RunOnce, reply};
use crate::ingress::http::problem::Refusal;
use crate::ingress::http::{Request, Shared};
use crate::ingress::routes::Deployment;
use crate::model::FunctionName;
use crate::model::api::{FunctionDetail, FunctionSummary, PreviousRevision};
use crate::model::function::{FunctionLoad, HttpTrigger, Trigger};
use crate::store::FunctionCounts;
use http_types::StatusCode;
use std::collections::BTreeMap;
use tide::Response;

/// A manifest is a page of text; this is a hundred.
const MANIFEST_BYTES_MAX: u64 = crate::config::TEXT_BYTES_MAX as u64;
/// `neap run --data` in base64 beside the rest: ample over the default `limits.payload`.
const RUN_BYTES_MAX: u64 = 8 << 20;

/// GET /v1/functions
pub async fn list(request: Request) -> Result<Response, Refusal> {
    Query::of(&request, &[])?;
    json(&summaries(request.state()).await?)
}

/// POST /v1/functions?file=NAME
pub async fn deploy(mut request: Request) -> Result<Response, Refusal> {
    let file = Query::of(&request, &["file"])?.get("file").unwrap_or("manifest").to_owned();
    let shared = request.state().clone();
    let body = shared.room.read(&mut request, MANIFEST_BYTES_MAX).await?;
    let manifest =
        String::from_utf8(body.bytes).map_err(|_| Refusal::bad_request("the manifest is not UTF-8"))?;
    json(&command(&shared, |reply| Command::Deploy { file, manifest, reply }).await?)
}

/// GET /v1/functions/{name}
pub async fn show(request: Request) -> Result<Response, Refusal> {
    let name = name(&request)?;
    let shared = request.state();
    let routes = shared.api.routes.get();
    let deployment = routes.functions.get(&name).ok_or_else(|| Refusal::unknown_function(name.as_str()))?;
    let counts = shared.api.store.counts().await?;
    let revision = &deployment.revision;
    let history = shared.api.store.history(name.clone()).await?;
    let manifest = serde_json::to_value(&revision.manifest).map_err(|error| Refusal::internal(&error))?;
    json(&FunctionDetail {
        summary: summary(shared, deployment, &counts.per_function, &(shared.api.facts)().functions),
        image_digest: revision.image.as_str().to_owned(),
        created: deployment.created,
        file: deployment.file.as_ref().map(|file| file.display().to_string()),
        uid_base: revision.uid_base,
        previous: history
            .previous
            .map(|before| PreviousRevision { revision: before.number, image_digest: before.image }),
        rolled_back: history.rolled_back.map(|(from, why)| format!("from revision {from}: {why}")),
        manifest,
    })
}

/// DELETE /v1/functions/{name}
pub async fn remove(request: Request) -> Result<Response, Refusal> {
    let name = name(&request)?;
    json(&command(request.state(), |reply| Command::Remove { name, reply }).await?)
}

/// POST /v1/functions/{name}/pause
pub async fn pause(request: Request) -> Result<Response, Refusal> {
    set_paused(request, true).await
}

/// POST /v1/functions/{name}/resume
pub async fn resume(request: Request) -> Result<Response, Refusal> {
    set_paused(request, false).await
}

async fn set_paused(request: Request, paused: bool) -> Result<Response, Refusal> {
    let name = name(&request)?;
    command(request.state(), |reply| Command::Pause { name, paused, reply }).await?;
    Ok(Response::new(StatusCode::NoContent))
}

/// POST /v1/functions/{name}/rollback
pub async fn rollback(request: Request) -> Result<Response, Refusal> {
    let name = name(&request)?;
    json(&command(request.state(), |reply| Command::Rollback { name, reply }).await?)
}

/// POST /v1/reload
pub async fn reload(request: Request) -> Result<Response, Refusal> {
    json(&command(request.state(), |reply| Command::Reload { reply }).await?)
}

/// POST /v1/run
pub async fn run(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let body = shared.room.read(&mut request, RUN_BYTES_MAX).await?;
    let run: RunOnce =
        serde_json::from_slice(&body.bytes).map_err(|error| Refusal::bad_request(error.to_string()))?;
    match order(&shared, |reply| Command::Run { run, reply }).await? {
        // The image is what was asked for; where it is asked for by a manifest, that one is at odds
        // with the node (409).
        Err(missing @ DeployError::NoImage(_)) => Err(Refusal::not_found(missing.to_string())),
        result => json(&result?),
    }
}

pub async fn command<T>(
    shared: &Shared,
    command: impl FnOnce(Reply<Result<T, DeployError>>) -> Command,
) -> Result<T, Refusal> {
    Ok(order(shared, command).await??)
}

async fn order<T>(
    shared: &Shared,
    command: impl FnOnce(Reply<Result<T, DeployError>>) -> Command,
) -> Result<Result<T, DeployError>, Refusal> {
    let (sender, receiver) = reply();
    shared.api.commands.send(command(sender)).await.map_err(|_| Refusal::stopping())?;
    receiver.recv().await.map_err(|_| Refusal::stopping())
}

pub async fn summaries(shared: &Shared) -> Result<Vec<FunctionSummary>, Refusal> {
    let counts = shared.api.store.counts().await?;
    let (routes, facts) = (shared.api.routes.get(), (shared.api.facts)());
    Ok(routes
        .functions
        .values()
        .map(|deployment| summary(shared, deployment, &counts.per_function, &facts.functions))
        .collect())
}

fn summary(
    shared: &Shared,
    deployment: &Deployment,
    counts: &[FunctionCounts],
    load: &BTreeMap<FunctionName, FunctionLoad>,
) -> FunctionSummary {
    let manifest = &deployment.revision.manifest;
    let counts = counts.iter().find(|c| c.function == manifest.name);
    let (succeeded, failed) = shared.api.metrics.counts(&manifest.name);
    let load = load.get(&manifest.name).copied().unwrap_or_default();
    let state = match &deployment.unusable {
        Some(why) => format!("failed: {why}"),
        None if deployment.paused => "paused".to_owned(),
        None => "ready".to_owned(),
    };
    FunctionSummary {
        name: manifest.name.to_string(),
        revision: deployment.revision.number,
        image: manifest.image.to_string(),
        handler: manifest.handler.word().to_owned(),
        state,
        triggers: manifest.triggers.iter().map(describe).collect(),
        parked: u64::from(load.parked),
        queued: counts.map_or(0, |c| c.ready),
        waiting: u64::from(load.waiting),
        // Those of synchronous calls are in no store.
        running: counts.map_or(0, |c| c.running).max(u64::from(load.running)),
        dead: counts.map_or(0, |c| c.dead),
        succeeded,
        failed,
    }
}

/// `mqtt sensors/#`, `http POST /thermostat`, `event com.example.opened`
fn describe(trigger: &Trigger) -> String {
    match trigger {
        Trigger::Mqtt(mqtt) => match mqtt.from {
            crate::model::Target::Local => format!("mqtt {}", mqtt.filter),
            crate::model::Target::Uplink | crate::model::Target::Callback => {
                format!("mqtt {} (uplink)", mqtt.filter)
            }
        },
        Trigger::Http(HttpTrigger { path, methods, .. }) if methods.is_empty() => format!("http {path}"),
        Trigger::Http(HttpTrigger { path, methods, .. }) => format!("http {} {path}", methods.join(",")),
        Trigger::Cron(cron) => format!("cron {}", cron.schedule.key()),
        Trigger::Event { kind } => format!("event {kind}"),
    }
}

pub(super) fn name(request: &Request) -> Result<FunctionName, Refusal> {
    let name = param(request, "name")?;
    FunctionName::parse(&name).map_err(|_| Refusal::unknown_function(&name))
}
