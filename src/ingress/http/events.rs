//! POST /events: CloudEvents for whoever is triggered by their type, in the three modes of the
//! HTTP binding 1.0.2: binary, structured, batch. 202 once all are committed.
//!
//! Whole or not at all: a batch with one event that is none, that nobody is triggered by or that
//! is too large is refused before any is stored, and says which. One that could not be stored to
//! its end (507) is sent again by its sender: those that were stored are told by their source and
//! id, and dropped.

use super::event::{self, encode};
use super::functions::{authorize, random_id};
use super::problem::{Refusal, set_header};
use super::{Request, Shared};
use crate::ingress::routes::Routes;
use crate::model::{Event, Failure};
use crate::store::{Accepted, Arrival, DedupKey, Fate, Line, NewInvocation, StoreError};
use tide::{Response, StatusCode};

/// Of one request. A sender that has more sends another.
const BODY_BYTES_MIN: u64 = 4 << 20;
/// Attributes, and base64 around the data.
const ENVELOPE_BYTES: u64 = 64 << 10;

pub async fn publish(mut request: Request) -> Result<Response, Refusal> {
    let shared = request.state().clone();
    authorize(&request, false)?;
    let routes = shared.api.routes.get();
    let body = shared.room.read(&mut request, body_bytes_max(&routes)).await?;
    let headers: Vec<(String, String)> = request
        .iter()
        .flat_map(|(name, values)| values.iter().map(|value| (name.to_string(), value.as_str().to_owned())))
        .collect();
    let events = event::published(&headers, body.bytes)?;
    let first = events.first().map(|event| event.id.clone());
    let arrivals: Result<Vec<_>, _> = events.into_iter().map(|event| arrival(&routes, event)).collect();
    commit(&shared, arrivals?).await?;
    let mut response = Response::new(StatusCode::Accepted);
    let id = first.map_or_else(|| random_id(&shared).to_string(), |id| id.to_string());
    set_header(&mut response, "x-call-id", &encode(&id));
    Ok(response)
}

fn body_bytes_max(routes: &Routes) -> u64 {
    let largest = routes.functions.values().map(|d| d.revision.manifest.limits.payload_bytes).max();
    BODY_BYTES_MIN.max(largest.unwrap_or(0) / 3 * 4 + ENVELOPE_BYTES)
}

fn arrival(routes: &Routes, event: Event) -> Result<Arrival, Refusal> {
    let mut invocations = Vec::new();
    let (mut limit, bytes) = (None, event.data.len() as u64);
    for name in routes.event(&event.kind) {
        let Some(deployment) = routes.functions.get(name) else { continue };
        let limit_bytes = deployment.revision.manifest.limits.payload_bytes;
        limit = limit.max(Some(limit_bytes));
        let dead = (bytes > limit_bytes).then_some(Failure::PayloadTooLarge { limit_bytes });
        let (function, lane) = (name.clone(), routes.lane(name));
        invocations.push(NewInvocation { function, lane, expires: None, once: None, dead });
    }
    match limit {
        None => Err(nobody(&event)),
        Some(limit) if bytes > limit => Err(Refusal::too_large(limit)),
        Some(_) => {
            // The event is everybody's here; what came another way is another event's matter.
            let dedup = Some(DedupKey::cloud_event(&event.source, event.id.as_str()));
            Ok(Arrival { invocations, dedup, ..Arrival::of(event) })
        }
    }
}

fn nobody(event: &Event) -> Refusal {
    let kind: String = event.kind.chars().take(80).collect();
    Refusal::not_found(format!("no function is triggered by events of type `{kind}`"))
}

/// Queued in order, so that they are stored in order and share a commit.
async fn commit(shared: &Shared, arrivals: Vec<Arrival>) -> Result<(), Refusal> {
    let mut receipts = Vec::with_capacity(arrivals.len());
    let line = Line::default();
    for arrival in arrivals {
        let event = Event { data: Vec::new(), ..arrival.event.clone() };
        receipts.push((event, shared.api.store.submit(&line, arrival).await?));
    }
    let mut refused = None;
    for (event, receipt) in receipts {
        let refusal = match receipt.committed().await {
            Ok(Accepted { fate: Fate::Duplicate(_), .. }) => {
                shared.api.metrics.event_refused("duplicate");
                continue;
            }
            Ok(Accepted { fate: Fate::Dropped, .. }) => {
                shared.api.metrics.event_refused("buffer_full");
                StoreError::Full.into()
            }
            // Removed since we looked: 202 would promise a run that never comes.
            Ok(Accepted { invocations: 0, .. }) => nobody(&event),
            Ok(_) => {
                shared.api.metrics.event_accepted("events");
                shared.api.wake.wake();
                continue;
            }
            Err(error) => {
                shared.api.metrics.event_refused(super::functions::refused_as(&error));
                error.into()
            }
        };
        refused = refused.or(Some(refusal));
    }
    refused.map_or(Ok(()), Err)
}
