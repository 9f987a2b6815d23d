//! `neap status` and `neap reload`.

use super::Session;
use super::client::parse;
use super::fault::Fault;
use super::functions;
use super::output::tell;
use super::text::{self, Table};
use crate::channels::Reloaded;
use crate::model::UnixMs;
use crate::model::api::{LinkStatus, QueueStatus, Status};
use crate::net::http::Body;
use anyhow::Context;
use std::fmt::Write;

pub async fn status(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.get("/v1/status").await.context("status")?;
    if session.out.json() {
        return Ok(session.out.answer(&answer)?);
    }
    let status: Status = parse(&answer)?;
    Ok(session.out.text(&render(&status, session.now, session.out.width))?)
}

/// What matters at a remote site first: is the link up, does anything wait, is there room.
fn render(status: &Status, now: UnixMs, width: Option<usize>) -> String {
    let memory = format!(
        "{} of {} reserved by {}{}",
        text::size(status.memory_reserved_bytes),
        text::size(status.memory_budget_bytes),
        text::count(status.instances, "instance"),
        if status.parked == 0 { String::new() } else { format!(" and {} parked", status.parked) }
    );
    let mut pairs = vec![(
        "Node",
        format!("{} (neap {}, up {})", status.node, status.version, text::duration(status.uptime_ms)),
    )];
    pairs.extend(status.links.iter().map(|link| ("Link", link_text(link, now))));
    pairs.extend([
        ("Inbox", queue(&status.inbox)),
        ("Outbox", queue(&status.outbox)),
        ("Dead", {
            let deliveries = match status.dead_deliveries {
                1 => "1 delivery".to_owned(),
                n => format!("{n} deliveries"),
            };
            format!("{}, {deliveries}", text::count(status.dead_events, "event"))
        }),
        ("Expired", text::count(status.expired, "event")),
        ("Dropped", dropped(status)),
        ("Database", database(status)),
        ("Disk free", text::size(status.disk_free_bytes)),
        ("Memory", memory),
    ]);
    pairs.extend(status.warnings.iter().map(|warning| ("Warning", warning.clone())));
    let mut shown = text::fields(&pairs);
    if !status.functions.is_empty() {
        let mut table = Table::new(&[
            "FUNCTION", "STATE", "QUEUED", "WAITING", "RUNNING", "PARKED", "OK", "FAILED", "DEAD",
        ]);
        for f in &status.functions {
            let counts = [f.queued, f.waiting, f.running, f.parked, f.succeeded, f.failed, f.dead]
                .map(|n| n.to_string());
            table.row([vec![f.name.clone(), f.state.clone()], counts.to_vec()].concat());
        }
        let _ = write!(shown, "\n{}", table.render(width)); // writing to a String cannot fail
    }
    shown
}

/// By the operator's own rules.
fn dropped(status: &Status) -> String {
    match (status.dropped_full, status.dropped_age) {
        (0, 0) => "nothing".to_owned(),
        (full, age) => format!("{full} for want of room, {age} too old"),
    }
}

fn database(status: &Status) -> String {
    let used = text::size(status.database_bytes);
    let told = format!("{used} of {}", text::size(status.database_bytes_max));
    match status.full.as_deref() {
        None => told,
        Some("disk") => format!("{told}; the disk is full, new events are refused"),
        Some(lack) => format!("{told}; full ([buffer] {lack})"),
    }
}

fn link_text(link: &LinkStatus, now: UnixMs) -> String {
    let mut told = format!("{}: {}", link.name, link.state);
    if link.state != "off" {
        let _ = write!(told, " for {} ({})", text::age(link.since, now), link.url);
    }
    if let Some(ms) = link.retry_in_ms {
        let _ = write!(told, ", next try in {}", text::duration(ms));
    }
    if let Some(error) = &link.last_error
        && link.state != "up"
    {
        let _ = write!(told, ": {error}");
    }
    told
}

fn queue(queue: &QueueStatus) -> String {
    match queue.age_ms {
        Some(ms) => format!("{}, the oldest {} old", queue.depth, text::duration(ms)),
        None => queue.depth.to_string(),
    }
}

pub async fn reload(session: &Session) -> anyhow::Result<()> {
    let answer = session.client.bytes("POST", "/v1/reload", Body::Empty).await.context("reload")?;
    let reloaded: Reloaded = parse(&answer)?;
    if session.out.json() {
        session.out.answer(&answer)?;
    } else {
        for deployed in &reloaded.deployed {
            session.out.line(&functions::deployed_line(deployed))?;
        }
        for name in &reloaded.removed {
            session.out.line(&format!("{}: removed", text::escape(name)))?;
        }
        if reloaded.deployed.is_empty() && reloaded.removed.is_empty() && reloaded.problems.is_empty() {
            session.out.line("nothing changed")?;
        }
    }
    if reloaded.problems.is_empty() {
        return Ok(());
    }
    tell("neap: reload: what is wrong was left as it was before");
    for problem in &reloaded.problems {
        tell(&format!("  {}", text::escape(problem)));
    }
    Err(Fault::Told.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Status {
        Status {
            version: "0.1.0".into(),
            node: "gw-042".into(),
            uptime_ms: 3_600_000,
            links: vec![
                LinkStatus {
                    name: "mqtt".into(),
                    url: "mqtt://127.0.0.1:1883".into(),
                    state: "up".into(),
                    since: UnixMs(0),
                    last_error: Some("an old one".into()),
                    retry_in_ms: None,
                },
                LinkStatus {
                    name: "uplink".into(),
                    url: "mqtts://cloud.example:8883".into(),
                    state: "waiting".into(),
                    since: UnixMs(0),
                    last_error: Some("connection refused".into()),
                    retry_in_ms: Some(4_000),
                },
            ],
            inbox: QueueStatus { depth: 0, age_ms: None },
            outbox: QueueStatus { depth: 17, age_ms: Some(180_000) },
            dead_events: 1,
            dead_deliveries: 0,
            expired: 0,
            dropped_full: 0,
            dropped_age: 0,
            full: None,
            database_bytes: 1 << 20,
            database_bytes_max: 256 << 20,
            disk_free_bytes: 2 << 30,
            memory_reserved_bytes: 64 << 20,
            memory_budget_bytes: 512 << 20,
            instances: 1,
            parked: 2,
            functions: Vec::new(),
            warnings: vec!["no id-mapped mounts on this kernel".into()],
        }
    }

    #[test]
    fn status_says_which_link_is_down_and_what_waits() {
        let shown = render(&sample(), UnixMs(120_000), None);

        for line in [
            "Link:       mqtt: up for 2m (mqtt://127.0.0.1:1883)",
            "Link:       uplink: waiting for 2m (mqtts://cloud.example:8883), next try in 4s: connection refused",
            "Inbox:      0",
            "Outbox:     17, the oldest 3m old",
            "Memory:     64 MiB of 512 MiB reserved by 1 instance and 2 parked",
            "Warning:    no id-mapped mounts on this kernel",
        ] {
            assert!(shown.lines().any(|l| l == line), "{line}\nis not in\n{shown}");
        }
    }
}
