//! `neap events` and `neap deliveries`: the two queues. Listings are read page by page, because
//! a site that was offline for a week has more rows than belong into memory or one answer.

use super::Session;
use super::args::{Deliveries, DeliveriesCommand, DeliverySelection, EventSelection, Events, EventsCommand};
use super::client::{below, parse};
use super::fault::Fault;
use super::output::tell;
use super::text::{self, Table};
use super::units::with_query;
use crate::model::UnixMs;
use crate::model::api::{Count, DeliveryDetail, DeliverySummary, EventDetail, EventSummary};
use crate::net::http::Body;
use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::io::{IsTerminal, Write};

const EVENTS: &str = "/v1/events";
const DELIVERIES: &str = "/v1/deliveries";

/// Rows asked for at once: a few hundred kB of JSON.
const PAGE_ROWS: u64 = 500;

pub async fn events(session: &Session, events: Events) -> anyhow::Result<()> {
    match events.command {
        None => {
            let filter = [
                ("state", events.state.map(|state| state.as_str().to_owned())),
                ("function", events.function),
            ];
            let listing = Listing { path: EVENTS, filter: &filter, limit: events.limit, none: "no events" };
            let header = [
                "ID",
                "FUNCTION",
                "STATE",
                "TYPE",
                "AGE",
                "ATTEMPTS",
                "DUE IN",
                "SIZE",
                "SUBJECT",
                "LAST ERROR",
            ];
            let row = |e: EventSummary| (e.invocation, event_row(e, session));
            list(session, listing, &header, row).await.context("list events")
        }
        Some(EventsCommand::Show { id }) => {
            show_event(session, &id).await.with_context(|| format!("show event {id}"))
        }
        Some(EventsCommand::Redrive(selection)) => {
            let done = change(session, EVENTS, "redrive", event_targets(selection)).await;
            done.context("redrive events")
        }
        Some(EventsCommand::Purge { selection, yes }) => {
            let question = match &selection.function {
                Some(name) => format!("Delete every dead event of {}?", text::escape(name)),
                None => "Delete every dead event?".into(),
            };
            confirm(yes || !selection.ids.is_empty(), &question)?;
            let done = change(session, EVENTS, "purge", event_targets(selection)).await;
            done.context("purge events")
        }
    }
}

/// Of a damaged row nobody knows when.
fn since(then: UnixMs, session: &Session) -> String {
    if then == UnixMs(0) { String::new() } else { text::age(then, session.now) }
}

fn event_row(e: EventSummary, session: &Session) -> Vec<String> {
    vec![
        e.id,
        e.function,
        e.state.clone(),
        e.kind,
        since(e.arrived, session),
        match e.lost {
            0 => e.attempts.to_string(),
            lost => format!("{}+{lost} lost", e.attempts),
        },
        if e.state == "ready" { text::duration(e.due_in_ms) } else { String::new() },
        text::size(e.data_bytes),
        e.subject.unwrap_or_default(),
        e.last_error.unwrap_or_default(),
    ]
}

pub async fn deliveries(session: &Session, deliveries: Deliveries) -> anyhow::Result<()> {
    match deliveries.command {
        None => {
            let filter = [("dead", deliveries.dead.then(|| "1".to_owned()))];
            let none = if deliveries.dead { "no dead deliveries" } else { "no deliveries" };
            let listing = Listing { path: DELIVERIES, filter: &filter, limit: deliveries.limit, none };
            let header = ["ID", "TARGET", "FUNCTION", "AGE", "SIZE", "EVENT", "TOPIC", "DEAD BECAUSE"];
            let row = |d: DeliverySummary| {
                let cells = vec![
                    d.id.to_string(),
                    d.target,
                    d.function.unwrap_or_default(),
                    since(d.created, session),
                    text::size(d.data_bytes),
                    d.event,
                    d.topic,
                    d.dead.unwrap_or_default(),
                ];
                (d.id, cells)
            };
            list(session, listing, &header, row).await.context("list deliveries")
        }
        Some(DeliveriesCommand::Show { id }) => {
            show_delivery(session, id).await.with_context(|| format!("show delivery {id}"))
        }
        Some(DeliveriesCommand::Redrive(selection)) => {
            let done = change(session, DELIVERIES, "redrive", delivery_targets(selection)).await;
            done.context("redrive deliveries")
        }
        Some(DeliveriesCommand::Purge { selection, yes }) => {
            confirm(yes || !selection.ids.is_empty(), "Delete every dead delivery?")?;
            let done = change(session, DELIVERIES, "purge", delivery_targets(selection)).await;
            done.context("purge deliveries")
        }
    }
}

struct Listing<'a> {
    path: &'a str,
    filter: &'a [(&'a str, Option<String>)],
    limit: Option<u64>,
    /// What is said when there is nothing.
    none: &'a str,
}

/// Pages until one is empty: the daemon may return fewer rows than it was asked for. `row` gives
/// a row's place in the listing and its cells. Text is a table for each page, the header once.
async fn list<T: DeserializeOwned>(
    session: &Session,
    listing: Listing<'_>,
    header: &[&'static str],
    row: impl Fn(T) -> (i64, Vec<String>),
) -> anyhow::Result<()> {
    let mut left = listing.limit.unwrap_or(u64::MAX);
    let mut after: Option<i64> = None;
    let mut rows = 0u64;
    while left > 0 {
        let mut parameters = listing.filter.to_vec();
        parameters.push(("after", after.map(|id| id.to_string())));
        parameters.push(("limit", Some(left.min(PAGE_ROWS).to_string())));
        let answer = session.client.get(&with_query(listing.path, &parameters)).await?;
        let page: Vec<&RawValue> =
            serde_json::from_slice(&answer).map_err(super::client::ClientError::Shape)?;
        let page = &page[..page.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
        if page.is_empty() {
            break;
        }
        let before = after;
        let mut table = Table::new(header);
        for raw in page {
            let (place, cells) = row(parse(raw.get().as_bytes())?);
            after = Some(place);
            table.row(cells);
        }
        if session.out.json() {
            for (n, raw) in page.iter().enumerate() {
                session.out.text(if rows == 0 && n == 0 { "[" } else { ",\n" })?;
                session.out.text(raw.get())?;
            }
        } else {
            let shown = table.render(session.out.width);
            let header_end = shown.find('\n').map_or(0, |at| at + 1);
            session.out.text(if rows == 0 { &shown } else { &shown[header_end..] })?;
        }
        rows += page.len() as u64;
        left -= page.len() as u64;
        if after == before {
            break; // a daemon that always answers with the same page
        }
    }
    match (session.out.json(), rows) {
        (true, 0) => session.out.line("[]")?,
        (true, _) => session.out.line("]")?,
        (false, 0) => tell(listing.none),
        (false, _) => {}
    }
    Ok(())
}

/// One request for each: the query's key and value.
type Target = (&'static str, String);

fn event_targets(selection: EventSelection) -> Vec<Target> {
    match (selection.all, selection.function) {
        (true, _) => vec![("all", "1".into())],
        (false, Some(name)) => vec![("function", name)],
        (false, None) => selection.ids.into_iter().map(|id| ("event", id)).collect(),
    }
}

fn delivery_targets(selection: DeliverySelection) -> Vec<Target> {
    if selection.all {
        return vec![("all", "1".into())];
    }
    selection.ids.into_iter().map(|id| ("id", id.to_string())).collect()
}

/// Redrive or purge. An id that names nothing dead is told, and the others are done.
async fn change(session: &Session, path: &str, verb: &str, targets: Vec<Target>) -> anyhow::Result<()> {
    let mut total = 0;
    let mut missing = false;
    for (by, value) in targets {
        let one = matches!(by, "event" | "id");
        let path = with_query(&format!("{path}/{verb}"), &[(by, Some(value.clone()))]);
        let done: anyhow::Result<Count> = match session.client.bytes("POST", &path, Body::Empty).await {
            Ok(answer) => parse(&answer).map_err(Into::into),
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(Count { count: 0 }) if one => {
                tell(&format!("neap: {verb} {}: it isn't there, or isn't dead", text::escape(&value)));
                missing = true;
            }
            Ok(Count { count }) => total += count,
            Err(error) if one && Fault::of(&error) == Fault::NotFound => {
                super::fault::report(&error.context(format!("{verb} {value}")));
                missing = true;
            }
            Err(error) => return Err(error),
        }
    }
    if session.out.json() {
        session.out.answer(&serde_json::to_vec(&Count { count: total })?)?;
    } else if total > 0 || !missing {
        let done = if verb == "purge" { "deleted" } else { "given another chance" };
        session.out.line(&format!("{total} {done}"))?;
    }
    if missing { Err(Fault::NotFoundTold.into()) } else { Ok(()) }
}

/// Asks on a terminal; a script has said what it wants.
fn confirm(sure: bool, question: &str) -> anyhow::Result<()> {
    if sure || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    let _ = write!(std::io::stderr().lock(), "{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).context("read the answer")?;
    anyhow::ensure!(matches!(answer.trim(), "y" | "Y" | "yes"), "nothing deleted");
    Ok(())
}

async fn show_event(session: &Session, id: &str) -> anyhow::Result<()> {
    let answer = session.client.get(&below(EVENTS, id, "")).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let details: Vec<EventDetail> = parse(&answer)?;
    let Some(first) = details.first() else { return Err(Fault::NotFound.into()) };
    let now = session.now;
    let mut pairs = vec![
        ("Id", first.summary.id.clone()),
        ("Type", first.summary.kind.clone()),
        ("Source", first.source.clone()),
        ("Subject", first.summary.subject.clone().unwrap_or_default()),
        ("Time", first.time.clone().unwrap_or_default()),
        ("Arrived", format!("{} ago ({})", text::age(first.summary.arrived, now), first.summary.arrived)),
        ("Content type", first.datacontenttype.clone().unwrap_or_default()),
    ];
    pairs.extend(first.extensions.iter().map(|(name, value)| ("Extension", format!("{name}={value}"))));
    let mut shown = text::fields(&pairs);
    let mut table = Table::new(&["FUNCTION", "STATE", "ATTEMPTS", "LOST", "DUE IN", "LAST ERROR"]);
    for EventDetail { summary: e, .. } in &details {
        table.row(vec![
            e.function.clone(),
            e.state.clone(),
            e.attempts.to_string(),
            e.lost.to_string(),
            if e.state == "ready" { text::duration(e.due_in_ms) } else { String::new() },
            e.last_error.clone().unwrap_or_default(),
        ]);
    }
    shown.push('\n');
    shown.push_str(&table.render(session.out.width));
    shown.push_str(&data("Data", &first.data_base64, session)?);
    for detail in details.iter().filter(|detail| !detail.last_output_base64.is_empty()) {
        let title = format!("Last output of {}", text::escape(&detail.summary.function));
        shown.push_str(&data(&title, &detail.last_output_base64, session)?);
    }
    Ok(session.out.text(&shown)?)
}

async fn show_delivery(session: &Session, id: i64) -> anyhow::Result<()> {
    let answer = session.client.get(&below(DELIVERIES, &id.to_string(), "")).await?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let detail: DeliveryDetail = parse(&answer)?;
    let d = &detail.summary;
    let mut shown = text::fields(&[
        ("Id", d.id.to_string()),
        ("Target", d.target.clone()),
        ("Topic", d.topic.clone()),
        ("Function", d.function.clone().unwrap_or_default()),
        ("Created", format!("{} ago ({})", text::age(d.created, session.now), d.created)),
        ("Event", d.event.clone()),
        ("Type", detail.kind.clone()),
        ("Source", detail.source.clone()),
        ("Dead because", d.dead.clone().unwrap_or_default()),
    ]);
    shown.push_str(&data("Data", &detail.data_base64, session)?);
    Ok(session.out.text(&shown)?)
}

fn data(title: &str, base64: &str, session: &Session) -> anyhow::Result<String> {
    let bytes = BASE64_STANDARD.decode(base64).context("decode the data")?;
    let size = text::size(bytes.len() as u64);
    if bytes.is_empty() {
        return Ok(format!("\n{title}: none\n"));
    }
    Ok(format!("\n{title} ({size}):\n{}\n", text::data(&bytes, session.out.terminal)))
}
