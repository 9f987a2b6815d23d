//! `/v1/functions/{name}/logs`: what is kept, then, when asked to follow, what comes.

use super::functions::name;
use super::{Query, line, ndjson};
use crate::ingress::http::problem::Refusal;
use crate::ingress::http::{Request, Shared};
use crate::model::api::LogLine;
use crate::model::{EventId, FunctionName, UnixMs};
use crate::net::http::produced;
use crate::telemetry::logs::LogQuery;
use smol::future::FutureExt;
use tide::Response;

/// Lines are sent in pieces of about this size.
const PIECE_BYTES: usize = 16 * 1024;

/// GET /v1/functions/{name}/logs?follow=1&tail=N&since=UNIX_MS&event=ID
pub async fn logs(request: Request) -> Result<Response, Refusal> {
    let function = name(&request)?;
    let shared = request.state().clone();
    if !shared.api.routes.get().functions.contains_key(&function) {
        return Err(Refusal::unknown_function(function.as_str()));
    }
    let query = Query::of(&request, &["follow", "tail", "since", "event"])?;
    let event = match query.get("event") {
        Some(id) => Some(EventId::parse(id).ok_or_else(|| Refusal::bad_request("event is no event id"))?),
        None => None,
    };
    let wanted = LogQuery { tail: query.parse("tail")?, since: query.parse("since")?.map(UnixMs), event };
    stream(shared, Following { function, wanted, follow: query.flag("follow")? }, line)
}

/// What is wanted of a log.
pub struct Following {
    pub function: FunctionName,
    pub wanted: LogQuery,
    pub follow: bool,
}

/// `show` makes a line of the answer of one of the log.
pub fn stream(
    shared: Shared,
    asked: Following,
    show: impl Fn(&LogLine) -> Vec<u8> + Send + Sync + 'static,
) -> Result<Response, Refusal> {
    let Following { function, wanted, follow } = asked;
    // Following begins before reading: a line between the two is not lost. One that is in both
    // is left out of what follows.
    let lines = follow.then(|| shared.api.logs.follow(&function));
    let kept = shared.api.logs.read(&function, &wanted).map_err(|error| Refusal::internal(&error))?;
    if let Some(lines) = &lines {
        while lines.try_recv().is_ok() {}
    }

    Ok(ndjson(produced(move |pieces| async move {
        let mut piece = Vec::new();
        for entry in &kept {
            piece.extend(show(entry));
            if piece.len() >= PIECE_BYTES && pieces.send(std::mem::take(&mut piece)).await.is_err() {
                return;
            }
        }
        drop(kept);
        if !piece.is_empty() && pieces.send(piece).await.is_err() {
            return;
        }
        let Some(lines) = lines else { return };
        let follow = async {
            while let Ok(entry) = lines.recv().await {
                let meant = wanted.event.as_ref().is_none_or(|id| *id == entry.event);
                if meant && pieces.send(show(&entry)).await.is_err() {
                    break;
                }
            }
        };
        follow.or(shared.stopping()).await;
    })))
}
