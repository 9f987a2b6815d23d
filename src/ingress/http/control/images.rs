//! `/v1/images`: an import streams its archive in while its progress streams out.

use super::functions::command;
use super::{Query, json, line, ndjson, param};
use crate::channels::Command;
use crate::errors::chain;
use crate::image::{ImageError, Patience};
use crate::ingress::http::problem::Refusal;
use crate::ingress::http::{Request, Shared};
use crate::model::api::Progress;
use crate::model::{Digest, Reference};
use crate::net::http::produced;
use http_types::StatusCode;
use std::collections::HashSet;
use tide::Response;

/// Progress that waits to be sent.
const PROGRESS_MAX: usize = 16;

/// GET /v1/images
pub async fn list(request: Request) -> Result<Response, Refusal> {
    Query::of(&request, &[])?;
    let shared = request.state();
    let mut images = shared.api.images.list()?;
    for image in &mut images {
        image.used_by = users(shared, &image.digest);
    }
    images.extend(shared.api.images.pulling());
    json(&images)
}

/// POST /v1/pull?name=REF. The caller's leaving ends the pull, unless others wait for it; what
/// came is kept.
pub async fn pull(request: Request) -> Result<Response, Refusal> {
    let query = Query::of(&request, &["name"])?;
    let name = query.get("name").ok_or_else(|| Refusal::bad_request("`name` is missing"))?;
    let name = Reference::parse(name).map_err(|error| Refusal::bad_request(error.to_string()))?;
    let shared = request.state().clone();
    let mut pull = shared.api.images.pull(&name, Patience::Bounded)?;
    Ok(ndjson(produced(move |pieces| async move {
        loop {
            let mut news = pull.next().await;
            if let Progress::Done(image) = &mut news {
                // A daemon that is stopping looks at everything when it starts again.
                let _ = shared.api.commands.send(Command::ImageCame).await;
                image.used_by = users(&shared, &image.digest);
            }
            let last = matches!(news, Progress::Done(_) | Progress::Error(_));
            if pieces.send(line(&news)).await.is_err() || last {
                return;
            }
        }
    })))
}

/// POST /v1/collect?dry_run=1
pub async fn collect(request: Request) -> Result<Response, Refusal> {
    let dry_run = Query::of(&request, &["dry_run"])?.flag("dry_run")?;
    json(&command(request.state(), |reply| Command::CollectImages { dry_run, reply }).await?)
}

/// POST /v1/images?name=REF. The answer's status is sent before the outcome is known: its last
/// line tells.
pub async fn import(mut request: Request) -> Result<Response, Refusal> {
    let name = match Query::of(&request, &["name"])?.get("name") {
        Some(name) => Some(Reference::parse(name).map_err(|error| Refusal::bad_request(error.to_string()))?),
        None => None,
    };
    let shared = request.state().clone();
    // Not bounded here: the image store bounds what it unpacks, and the caller is known.
    let archive = request.take_body().into_reader();
    Ok(ndjson(produced(move |pieces| async move {
        let (sender, progress) = smol::channel::bounded(PROGRESS_MAX);
        let tell = async {
            while let Ok(step) = progress.recv().await {
                if pieces.send(line(&step)).await.is_err() {
                    break;
                }
            }
        };
        let import = shared.api.images.import(archive, name, sender);
        let (outcome, ()) = smol::future::zip(import, tell).await;
        let last = match outcome {
            Ok(mut image) => {
                let _ = shared.api.commands.send(Command::ImageCame).await;
                image.used_by = users(&shared, &image.digest);
                Progress::Done(image)
            }
            Err(error) => Progress::Error(chain(&error)),
        };
        let _ = pieces.send(line(&last)).await;
    })))
}

/// GET /v1/images/{image}
pub async fn show(request: Request) -> Result<Response, Refusal> {
    let name = param(&request, "image")?;
    let shared = request.state();
    let mut image = shared.api.images.show(&name)?;
    image.summary.used_by = users(shared, &image.summary.digest);
    json(&image)
}

/// DELETE /v1/images/{image}
pub async fn remove(request: Request) -> Result<Response, Refusal> {
    let name = param(&request, "image")?;
    let shared = request.state();
    let image = shared.api.images.summary(&name)?;
    let users = users(shared, &image.digest);
    // One of several names may go while a function runs the image: it pins the digest.
    if !users.is_empty() && (image.references.len() <= 1 || Digest::parse(&name).is_ok()) {
        let detail = format!("image `{name}` is needed by: {}; remove them first", users.join(", "));
        return Err(Refusal::new(StatusCode::Conflict, detail));
    }
    let routes = shared.api.routes.get();
    let in_use: HashSet<Digest> = routes.functions.values().map(|d| d.revision.image.clone()).collect();
    // Removing the files of a large image takes seconds on flash: not on the thread that
    // everything else runs on.
    let images = shared.api.images.clone();
    let removed: Result<(), ImageError> = smol::unblock(move || images.remove(&name, &in_use)).await;
    removed?;
    Ok(Response::new(StatusCode::NoContent))
}

fn users(shared: &Shared, digest: &str) -> Vec<String> {
    let routes = shared.api.routes.get();
    let uses = routes.functions.values().filter(|d| d.revision.image.as_str() == digest);
    uses.map(|d| d.revision.name().to_string()).collect()
}
