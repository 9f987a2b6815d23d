//! `/system`: the OpenFaaS gateway's API, as faas-cli speaks it
//! (<https://github.com/openfaas/faas/blob/master/api-docs/spec.openapi.yml>). What is deployed
//! this way is a manifest like any other (`deployment` has what becomes of each field), in one
//! namespace. Errors are plain text, which faas-cli shows.
//!
//! A function that no instance runs has one replica: the next call starts it. Scaling says how
//! many instances are kept ready, in a new revision of the same image.

mod deployment;

pub use deployment::NAMESPACE;

use super::control::functions::command;
use super::control::logs::{Following, stream};
use super::control::{Query, json};
use super::problem::Refusal;
use super::{Request, Shared, event};
use crate::channels::Command;
use crate::ingress::routes::Deployment;
use crate::model::function::FunctionLoad;
use crate::model::permissions::SECRET_BYTES_MAX;
use crate::model::{FunctionName, SecretName, UnixMs};
use crate::runtime::Usage;
use crate::telemetry::logs::LogQuery;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use deployment::{FunctionDeployment, FunctionStatus, FunctionUsage};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tide::{Response, StatusCode};

/// A deployment's description; what it becomes is bounded like any manifest.
const BODY_BYTES_MAX: u64 = 1 << 20;

/// A refusal as this API's clients read it.
pub fn plain(refusal: Refusal) -> Response {
    let mut text = refusal.detail().to_owned();
    for line in refusal.errors() {
        text.push('\n');
        text.push_str(line);
    }
    text.push('\n');
    let mut response = Response::from(refusal);
    response.set_body(text);
    response.insert_header("content-type", "text/plain; charset=utf-8");
    response
}

/// GET /system/functions[?usage=1]
pub async fn list(request: Request) -> Result<Response, Refusal> {
    namespace(&request)?;
    let shared = request.state();
    let usage = usage(&request).await;
    let routes = shared.api.routes.get();
    let statuses = routes.functions.values().map(|deployment| status(shared, deployment, usage.as_ref()));
    json(&statuses.collect::<Vec<_>>())
}

/// GET /system/function/{name}[?usage=1]
pub async fn describe(request: Request) -> Result<Response, Refusal> {
    namespace(&request)?;
    let name = request.param("name").unwrap_or("");
    let shared = request.state();
    let usage = usage(&request).await;
    let routes = shared.api.routes.get();
    let deployment =
        routes.function(without_namespace(name)).ok_or_else(|| Refusal::unknown_function(name))?;
    json(&status(shared, deployment, usage.as_ref()))
}

/// Between two looks at how much CPU time functions have had.
const CPU_LOOK: Duration = Duration::from_millis(200);

/// What functions use just now, where the caller asks for it.
async fn usage(request: &Request) -> Option<BTreeMap<String, FunctionUsage>> {
    let asked =
        |(key, value): (Cow<'_, str>, Cow<'_, str>)| key == "usage" && (value == "1" || value == "true");
    if !request.url().query_pairs().any(asked) {
        return None;
    }
    let look = &request.state().api.usage;
    let (before, start) = (look(), Instant::now());
    smol::Timer::after(CPU_LOOK).await;
    let (after, took) = (look(), start.elapsed());
    let between = |(name, after): (String, Usage)| {
        let before = before.get(&name).copied().unwrap_or_default();
        // Less where an instance has ended in between.
        let cpu = after.cpu.saturating_sub(before.cpu).as_secs_f64() / took.as_secs_f64();
        let usage = FunctionUsage { cpu: cpu * 1000.0, total_memory_bytes: after.memory_bytes as f64 };
        (name, usage)
    };
    Some(after.into_iter().map(between).collect())
}

fn status(
    shared: &Shared,
    deployment: &Deployment,
    usage: Option<&BTreeMap<String, FunctionUsage>>,
) -> FunctionStatus {
    let manifest = &deployment.revision.manifest;
    let mut status = deployment::status(manifest, deployment.created);
    let (succeeded, failed) = shared.api.metrics.counts(&manifest.name);
    status.invocation_count = succeeded + failed;
    status.usage = usage.map(|all| all.get(manifest.name.as_str()).copied().unwrap_or_default());
    let load = (shared.api.facts)().functions.get(&manifest.name).copied().unwrap_or_default();
    status.replicas = replicas(deployment, load);
    status.available_replicas = status.replicas;
    status
}

/// One that no instance runs has one all the same: the next call starts it.
pub fn replicas(deployment: &Deployment, load: FunctionLoad) -> u64 {
    if deployment.runnable() { u64::from(load.parked + load.running).max(1) } else { 0 }
}

/// POST /system/functions: makes or replaces.
pub async fn create(request: Request) -> Result<Response, Refusal> {
    deploy(request, false).await
}

/// PUT /system/functions: replaces; faas-cli takes 404 as word to POST.
pub async fn update(request: Request) -> Result<Response, Refusal> {
    deploy(request, true).await
}

async fn deploy(mut request: Request, must_exist: bool) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let asked: FunctionDeployment = body(&shared, &mut request).await?;
    if must_exist && shared.api.routes.get().function(&asked.service).is_none() {
        return Err(Refusal::unknown_function(&asked.service));
    }
    let file = format!("function `{}`", asked.service.chars().take(80).collect::<String>());
    let manifest = deployment::manifest(asked).map_err(|wrong| Refusal::bad_request(wrong.join("\n")))?;
    command(&shared, |reply| Command::Deploy { file, manifest, reply }).await?;
    Ok(Response::new(StatusCode::Accepted))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Removing {
    function_name: String,
    namespace: Option<String>,
}

/// DELETE /system/functions
pub async fn remove(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let asked: Removing = body(&shared, &mut request).await?;
    ours(asked.namespace.as_deref())?;
    let name = function(&asked.function_name)?;
    command(&shared, |reply| Command::Remove { name, reply }).await?;
    Ok(Response::new(StatusCode::Accepted))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Scaling {
    service_name: Option<String>,
    replicas: u32,
    namespace: Option<String>,
}

/// POST /system/scale-function/{name}
pub async fn scale(mut request: Request) -> Result<Response, Refusal> {
    namespace(&request)?;
    let in_path = request.param("name").unwrap_or("").to_owned();
    let shared = request.state().clone();
    let asked: Scaling = body(&shared, &mut request).await?;
    ours(asked.namespace.as_deref())?;
    let name = function(&in_path)?;
    if asked.service_name.is_some_and(|other| !other.is_empty() && without_namespace(&other) != name.as_str())
    {
        return Err(Refusal::bad_request("serviceName is not the function of the path"));
    }
    let min = asked.replicas;
    command(&shared, |reply| Command::Scale { name, min, reply }).await?;
    Ok(Response::new(StatusCode::Accepted))
}

/// GET /system/info
pub async fn info(_: Request) -> Result<Response, Refusal> {
    let version = env!("CARGO_PKG_VERSION");
    json(&serde_json::json!({
        "provider": {
            "provider": "neap",
            "orchestration": "neap",
            "version": { "sha": version, "release": version },
        },
        "version": { "commit_message": "", "sha": version, "release": version },
        "arch": std::env::consts::ARCH,
    }))
}

/// GET /system/namespaces
pub async fn namespaces(_: Request) -> Result<Response, Refusal> {
    json(&[NAMESPACE])
}

/// GET /system/namespace/{name}
pub async fn show_namespace(request: Request) -> Result<Response, Refusal> {
    ours(Some(request.param("name").unwrap_or("")))?;
    json(&serde_json::json!({ "name": NAMESPACE, "labels": {}, "annotations": {} }))
}

/// POST, PUT, DELETE /system/namespace/{name}
pub async fn change_namespace(_: Request) -> Result<Response, Refusal> {
    Err(Refusal::not_yet("namespaces besides openfaas-fn"))
}

/// GET /system/logs?name=&namespace=&instance=&tail=&since=&follow=
pub async fn logs(request: Request) -> Result<Response, Refusal> {
    namespace(&request)?;
    let query = Query::of(&request, &["name", "namespace", "instance", "tail", "since", "follow"])?;
    let name = function(query.get("name").unwrap_or(""))?;
    let shared = request.state().clone();
    if !shared.api.routes.get().functions.contains_key(&name) {
        return Err(Refusal::unknown_function(name.as_str()));
    }
    let wrong = |what: &str| Refusal::new(StatusCode::UnprocessableEntity, what);
    let tail: Option<i64> = query.parse("tail").map_err(|_| wrong("tail is a number"))?;
    let since = match query.get("since") {
        None => None,
        Some(text) => {
            let since: jiff::Timestamp = text.parse().map_err(|_| wrong("since is an RFC 3339 time"))?;
            Some(UnixMs(since.as_millisecond()))
        }
    };
    let wanted =
        LogQuery { tail: tail.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0), since, event: None };
    let following = Following { function: name.clone(), wanted, follow: query.flag("follow")? };
    stream(shared, following, move |line| {
        super::control::line(&serde_json::json!({
            "name": name,
            "namespace": NAMESPACE,
            // Which one it was is not kept; the event is.
            "instance": line.event,
            "timestamp": line.time.rfc3339(),
            "text": line.text,
        }))
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Secret {
    name: String,
    namespace: Option<String>,
    #[serde(default)]
    value: String,
    /// Base64; goes before `value`.
    #[serde(default)]
    raw_value: Option<String>,
}

impl Secret {
    async fn of(shared: &Shared, request: &mut Request) -> Result<(SecretName, Self), Refusal> {
        let asked: Self = body(shared, request).await?;
        ours(asked.namespace.as_deref())?;
        let name = SecretName::parse(&asked.name).map_err(|bad| Refusal::bad_request(bad.to_string()))?;
        Ok((name, asked))
    }

    fn bytes(self) -> Result<Vec<u8>, Refusal> {
        match self.raw_value.filter(|raw| !raw.is_empty()) {
            Some(raw) => STANDARD.decode(raw).map_err(|_| Refusal::bad_request("rawValue is not base64")),
            None => Ok(self.value.into_bytes()),
        }
    }
}

/// GET /system/secrets: their names.
pub async fn secrets(request: Request) -> Result<Response, Refusal> {
    namespace(&request)?;
    let secrets = request.state().api.secrets.clone();
    let listed = smol::unblock(move || secrets.list()).await?;
    let shown =
        |secret: &crate::secrets::Secret| serde_json::json!({ "name": secret.name, "namespace": NAMESPACE });
    json(&listed.iter().map(shown).collect::<Vec<_>>())
}

/// POST /system/secrets
pub async fn create_secret(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let (name, asked) = Secret::of(&shared, &mut request).await?;
    if shared.api.secrets.check(&name).is_ok() {
        return Err(Refusal::new(StatusCode::Conflict, format!("secret `{name}` is there already")));
    }
    set_secret(&shared, name, asked, StatusCode::Created).await
}

/// PUT /system/secrets
pub async fn update_secret(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let (name, asked) = Secret::of(&shared, &mut request).await?;
    shared.api.secrets.check(&name)?;
    set_secret(&shared, name, asked, StatusCode::Accepted).await
}

async fn set_secret(
    shared: &Shared,
    name: SecretName,
    asked: Secret,
    done: StatusCode,
) -> Result<Response, Refusal> {
    let (value, secrets) = (asked.bytes()?, shared.api.secrets.clone());
    smol::unblock(move || secrets.set(&name, &value)).await?;
    command(shared, |reply| Command::SecretsChanged { reply }).await?;
    Ok(Response::new(done))
}

/// DELETE /system/secrets: 202, for faas-cli takes no 204.
pub async fn remove_secret(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    let (name, _) = Secret::of(&shared, &mut request).await?;
    super::control::secrets::take(&shared, name).await?;
    Ok(Response::new(StatusCode::Accepted))
}

async fn body<T: DeserializeOwned>(shared: &Shared, request: &mut Request) -> Result<T, Refusal> {
    let body = shared.room.read(request, BODY_BYTES_MAX.max(SECRET_BYTES_MAX * 2)).await?;
    // The error's text would show what is in it, which may be a secret's value.
    serde_json::from_slice(&body.bytes).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Refusal::bad_request(format!("the body is not what this path takes (line {line}, column {column})"))
    })
}

fn namespace(request: &Request) -> Result<(), Refusal> {
    let asked = request.url().query_pairs().find(|(key, _)| key == "namespace");
    ours(asked.map(|(_, value)| value.into_owned()).as_deref())
}

fn ours(namespace: Option<&str>) -> Result<(), Refusal> {
    if deployment::in_namespace(namespace) {
        return Ok(());
    }
    Err(Refusal::not_found(format!("there is one namespace here, {NAMESPACE}")))
}

/// `NAME` or `NAME.openfaas-fn`.
pub fn without_namespace(name: &str) -> &str {
    name.strip_suffix(NAMESPACE).and_then(|name| name.strip_suffix('.')).unwrap_or(name)
}

fn function(text: &str) -> Result<FunctionName, Refusal> {
    let decoded = event::decode(text).unwrap_or_default();
    FunctionName::parse(without_namespace(&decoded)).map_err(|_| Refusal::unknown_function(&decoded))
}
