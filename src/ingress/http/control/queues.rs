//! `/v1/events` and `/v1/deliveries`: what waits, what is dead, and bringing it back.

use super::{Query, json, param};
use crate::ingress::http::Request;
use crate::ingress::http::problem::Refusal;
use crate::model::api::{Count, DeliveryDetail, DeliverySummary, EventDetail, EventSummary};
use crate::model::{DeliveryId, FunctionName, InvocationId};
use crate::store::{DeliveryRow, InvocationFilter, InvocationRow, InvocationState, Listed, Unreadable};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tide::Response;

/// GET /v1/events?state=&function=&after=ID&limit=N
pub async fn events(request: Request) -> Result<Response, Refusal> {
    let query = Query::of(&request, &["state", "function", "after", "limit"])?;
    let state = match query.get("state") {
        None => None,
        Some("ready") => Some(InvocationState::Ready),
        Some("running") => Some(InvocationState::Running),
        Some("dead") => Some(InvocationState::Dead),
        Some(_) => return Err(Refusal::bad_request("state is ready, running or dead")),
    };
    let filter = InvocationFilter {
        function: function(&query)?,
        state,
        event: None,
        after: query.parse("after")?.map(InvocationId),
        limit: query.limit()?,
    };
    let rows = request.state().api.store.invocations(filter).await?;
    json(&rows.iter().map(listed_event).collect::<Vec<_>>())
}

/// GET /v1/events/{id}
pub async fn event(request: Request) -> Result<Response, Refusal> {
    let id = param(&request, "id")?;
    let rows = request.state().api.store.event(id.clone()).await?;
    if rows.is_empty() {
        return Err(Refusal::not_found(format!("no event `{}`", id.chars().take(80).collect::<String>())));
    }
    json(&rows.into_iter().map(event_detail).collect::<Vec<_>>())
}

/// POST /v1/events/redrive?event=ID|function=NAME|all=1
pub async fn redrive_events(request: Request) -> Result<Response, Refusal> {
    let shared = request.state();
    let count = shared.api.store.redrive(which_events(&request)?).await?;
    shared.api.wake.wake();
    json(&Count { count })
}

/// POST /v1/events/purge?event=ID|function=NAME|all=1
pub async fn purge_events(request: Request) -> Result<Response, Refusal> {
    let count = request.state().api.store.purge(which_events(&request)?).await?;
    json(&Count { count })
}

/// GET /v1/deliveries?dead=1&after=ID&limit=N
pub async fn deliveries(request: Request) -> Result<Response, Refusal> {
    let query = Query::of(&request, &["dead", "after", "limit"])?;
    let after = query.parse("after")?.map(DeliveryId);
    let store = &request.state().api.store;
    let rows = store.deliveries(query.flag("dead")?, after, query.limit()?).await?;
    json(&rows.iter().map(listed_delivery).collect::<Vec<_>>())
}

/// GET /v1/deliveries/{id}
pub async fn delivery(request: Request) -> Result<Response, Refusal> {
    let id = param(&request, "id")?;
    let number = id.parse().map_err(|_| Refusal::not_found("a delivery's id is a number"))?;
    let row = request.state().api.store.delivery(DeliveryId(number)).await?;
    json(&DeliveryDetail {
        summary: delivery_summary(&row),
        source: row.body.event.source,
        kind: row.body.event.kind,
        data_base64: STANDARD.encode(row.body.event.data),
    })
}

/// POST /v1/deliveries/redrive?id=N|all=1
pub async fn redrive_deliveries(request: Request) -> Result<Response, Refusal> {
    let shared = request.state();
    let count = shared.api.store.redrive_deliveries(which_deliveries(&request)?).await?;
    shared.api.outbox.wake();
    json(&Count { count })
}

/// POST /v1/deliveries/purge?id=N|all=1
pub async fn purge_deliveries(request: Request) -> Result<Response, Refusal> {
    let count = request.state().api.store.purge_deliveries(which_deliveries(&request)?).await?;
    json(&Count { count })
}

/// Exactly one of the ways to say which: an empty query must not mean everything.
fn which_events(request: &Request) -> Result<InvocationFilter, Refusal> {
    let query = Query::of(request, &["event", "function", "all"])?;
    let event = query.get("event").map(str::to_owned);
    let function = function(&query)?;
    let ways = [event.is_some(), function.is_some(), query.flag("all")?];
    if ways.into_iter().filter(|way| *way).count() != 1 {
        return Err(Refusal::bad_request("say one of event=ID, function=NAME, all=1"));
    }
    Ok(InvocationFilter { function, event, limit: u32::MAX, ..InvocationFilter::default() })
}

fn which_deliveries(request: &Request) -> Result<Option<DeliveryId>, Refusal> {
    let query = Query::of(request, &["id", "all"])?;
    match (query.parse("id")?, query.flag("all")?) {
        (Some(id), false) => Ok(Some(DeliveryId(id))),
        (None, true) => Ok(None),
        _ => Err(Refusal::bad_request("say one of id=N, all=1")),
    }
}

fn function(query: &Query) -> Result<Option<FunctionName>, Refusal> {
    let parse = |name| FunctionName::parse(name).map_err(|_| Refusal::unknown_function(name));
    query.get("function").map(parse).transpose()
}

fn listed_event(row: &Listed<InvocationRow>) -> EventSummary {
    match row {
        Ok(row) => event_summary(row),
        Err(Unreadable { id, why }) => EventSummary::damaged(*id, why),
    }
}

fn event_summary(row: &InvocationRow) -> EventSummary {
    EventSummary {
        id: row.event.id.to_string(),
        seq: row.seq.0,
        function: row.function.to_string(),
        state: match row.state {
            InvocationState::Ready => "ready",
            InvocationState::Running => "running",
            InvocationState::Dead => "dead",
        }
        .to_owned(),
        kind: row.event.kind.clone(),
        subject: row.event.subject.clone(),
        arrived: row.arrived,
        attempts: row.attempts,
        lost: row.lost,
        due_in_ms: u64::try_from(row.due_in.as_millis()).unwrap_or(u64::MAX),
        last_error: row.last_error.clone(),
        data_bytes: row.data_bytes,
        invocation: row.id.0,
    }
}

fn event_detail(row: InvocationRow) -> EventDetail {
    EventDetail {
        summary: event_summary(&row),
        source: row.event.source,
        time: row.event.time.map(|time| time.rfc3339()),
        datacontenttype: row.event.content_type,
        extensions: row.event.extensions,
        data_base64: STANDARD.encode(row.event.data),
        last_output_base64: STANDARD.encode(row.last_output),
    }
}

fn listed_delivery(row: &Listed<DeliveryRow>) -> DeliverySummary {
    match row {
        Ok(row) => delivery_summary(row),
        Err(Unreadable { id, why }) => DeliverySummary::damaged(*id, why),
    }
}

fn delivery_summary(row: &DeliveryRow) -> DeliverySummary {
    DeliverySummary {
        id: row.id.0,
        target: row.body.target.as_str().to_owned(),
        function: row.body.function.as_ref().map(FunctionName::to_string),
        topic: row.body.topic.clone(),
        event: row.body.event.id.to_string(),
        created: row.created,
        dead: row.dead.clone(),
        data_bytes: row.data_bytes,
    }
}
