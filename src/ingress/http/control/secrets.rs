//! `/v1/secrets`: set, list and remove; what is in them goes in and never out.

use super::functions::command;
use super::{Query, json, param};
use crate::channels::Command;
use crate::errors::chain;
use crate::ingress::http::problem::Refusal;
use crate::ingress::http::{Request, Shared};
use crate::model::api::SecretSummary;
use crate::model::permissions::SECRET_BYTES_MAX;
use crate::model::{SecretName, UnixMs};
use crate::secrets::SecretsError;
use http_types::StatusCode;
use std::time::UNIX_EPOCH;
use tide::Response;

/// GET /v1/secrets
pub async fn list(request: Request) -> Result<Response, Refusal> {
    Query::of(&request, &[])?;
    let shared = request.state();
    let secrets = shared.api.secrets.clone();
    let summary = |secret: crate::secrets::Secret| {
        let changed = secret.changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        SecretSummary {
            used_by: users(shared, &secret.name),
            name: secret.name.to_string(),
            bytes: secret.bytes,
            changed: UnixMs(changed.as_millis() as i64),
        }
    };
    let listed = smol::unblock(move || secrets.list()).await?;
    json(&listed.into_iter().map(summary).collect::<Vec<_>>())
}

/// PUT /v1/secrets/{name}
pub async fn set(mut request: Request) -> Result<Response, Refusal> {
    let name = name(&request)?;
    let shared = request.state().clone();
    let body = shared.room.read(&mut request, SECRET_BYTES_MAX).await?;
    let secrets = shared.api.secrets.clone();
    smol::unblock(move || secrets.set(&name, &body.bytes)).await?;
    command(&shared, |reply| Command::SecretsChanged { reply }).await?;
    Ok(Response::new(StatusCode::NoContent))
}

/// DELETE /v1/secrets/{name}
pub async fn remove(request: Request) -> Result<Response, Refusal> {
    let name = name(&request)?;
    take(request.state(), name).await?;
    Ok(Response::new(StatusCode::NoContent))
}

/// Removes one that no function needs.
pub async fn take(shared: &Shared, name: SecretName) -> Result<(), Refusal> {
    let users = users(shared, &name);
    if !users.is_empty() {
        let detail = format!("secret `{name}` is needed by: {}; remove them first", users.join(", "));
        return Err(Refusal::new(StatusCode::Conflict, detail));
    }
    let secrets = shared.api.secrets.clone();
    smol::unblock(move || secrets.remove(&name)).await?;
    Ok(())
}

fn users(shared: &Shared, name: &SecretName) -> Vec<String> {
    let routes = shared.api.routes.get();
    let uses = routes.functions.values().filter(|d| d.revision.manifest.permissions.secrets.contains(name));
    uses.map(|d| d.revision.name().to_string()).collect()
}

fn name(request: &Request) -> Result<SecretName, Refusal> {
    SecretName::parse(&param(request, "name")?).map_err(|bad| Refusal::bad_request(bad.to_string()))
}

impl From<SecretsError> for Refusal {
    fn from(error: SecretsError) -> Self {
        match &error {
            SecretsError::Unknown(_) => Self::not_found(error.to_string()),
            SecretsError::Size(_) => Self::bad_request(error.to_string()),
            SecretsError::Open(..) | SecretsError::Full => Self::new(StatusCode::Conflict, error.to_string()),
            SecretsError::Io { .. } => {
                // The chain names the file, not what is in it.
                Self::new(StatusCode::InternalServerError, chain(&error))
            }
        }
    }
}
