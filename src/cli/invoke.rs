//! `neap invoke`, `run` and `logs`: what a function does, seen from here.

use super::Session;
use super::args::{Invoke, Logs, Run};
use super::client::{ClientError, accepted, below, parse};
use super::output::tell;
use super::source;
use super::text;
use super::units::{percent_decode, with_query};
use crate::channels::{RunOnce, RunResult};
use crate::model::api::LogLine;
use crate::model::{EventId, UnixMs};
use crate::net::http::{Body, Request};
use anyhow::Context;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// Data for `run` travels inside JSON; it is the default limits.payload several times over, and
/// the daemon says what is too large for it.
const RUN_DATA_BYTES_MAX: u64 = 8 * 1024 * 1024;

pub async fn invoke(session: &Session, invoke: Invoke) -> anyhow::Result<()> {
    let name = invoke.name.clone();
    call(session, invoke).await.with_context(|| format!("invoke {name}"))
}

async fn call(session: &Session, invoke: Invoke) -> anyhow::Result<()> {
    let collection = if invoke.no_wait { "/async-function" } else { "/function" };
    let mut request =
        Request::new("POST", below(collection, &invoke.name, "")).body(source::body(invoke.data)?);
    request.headers = invoke.header;
    request.headers.extend(invoke.event.map(|id| ("x-call-id".to_owned(), id)));
    let mut response = accepted(session.client.send(request).await?).await?;
    if invoke.no_wait {
        let id = response.header("x-call-id").context("the daemon's answer has no X-Call-Id")?;
        return Ok(session.out.line(&text::escape(&percent_decode(id)))?);
    }
    while let Some(piece) = response.piece().await.map_err(ClientError::Http)? {
        session.out.raw(&piece)?;
    }
    Ok(())
}

/// The exit code is the function's own.
pub async fn run(session: &Session, run: Run) -> anyhow::Result<u8> {
    let image = run.image.clone();
    run_once(session, run).await.with_context(|| format!("run {image}"))
}

async fn run_once(session: &Session, run: Run) -> anyhow::Result<u8> {
    let data = source::read(run.data, RUN_DATA_BYTES_MAX).context("read --data")?;
    let once = RunOnce {
        image: run.image,
        command: Some(run.command).filter(|command| !command.is_empty()),
        env: run.env.into_iter().collect(),
        data: BASE64_STANDARD.encode(data),
    };
    let body = Body::Bytes(serde_json::to_vec(&once).map_err(ClientError::Shape)?);
    let answer = session.client.bytes("POST", "/v1/run", body).await?;
    let result: RunResult = parse(&answer)?;
    if session.out.json() {
        session.out.answer(&answer)?;
        return Ok(exit_code(result.code, result.failure.is_some()));
    }
    let decode = |what: &'static str, text: &str| BASE64_STANDARD.decode(text).context(what);
    let stderr = decode("decode the function's stderr", &result.stderr)?;
    session.out.raw(&decode("decode the function's stdout", &result.stdout)?)?;
    {
        use std::io::Write;
        let _ = std::io::stderr().lock().write_all(&stderr);
    }
    if let Some(failure) = &result.failure {
        tell(&format!("neap: run: {}", text::escape(failure)));
    }
    Ok(exit_code(result.code, result.failure.is_some()))
}

/// As a shell sees it: 0 to 255, and never 0 for a failure.
fn exit_code(code: i32, failed: bool) -> u8 {
    match u8::try_from(code) {
        Ok(0) if failed => 1,
        Ok(code) => code,
        Err(_) => 1,
    }
}

pub async fn logs(session: &Session, logs: Logs) -> anyhow::Result<()> {
    let path = with_query(
        &below("/v1/functions", &logs.name, "/logs"),
        &[
            ("follow", logs.follow.then(|| "1".to_owned())),
            ("tail", logs.tail.map(|n| n.to_string())),
            ("since", logs.since.map(|since| since.moment(session.now).0.to_string())),
            ("event", logs.event),
        ],
    );
    let doing = || format!("logs {}", logs.name);
    let mut lines = session.client.lines("GET", &path, Body::Empty).await.with_context(doing)?;
    while let Some(line) = lines.next().await.with_context(doing)? {
        if session.out.json() {
            session.out.answer(&line)?;
        } else {
            let line: LogLine = parse(&line).with_context(doing)?;
            session.out.line(&log_line(&line, session.out.terminal))?;
        }
    }
    Ok(())
}

/// `2026-03-01T09:00:00.000Z 4f53cda1 what the function wrote`. A terminal is protected from the
/// text; a pipe gets it as it is.
fn log_line(line: &LogLine, terminal: bool) -> String {
    let text = if terminal { text::escape(&line.text) } else { line.text.clone() };
    format!("{} {} {text}", UnixMs(line.time.0), short(&line.event))
}

/// Our own ids are random from the first digit on, and eight tell neighbours apart; a sender's
/// often differ at the end.
fn short(id: &EventId) -> String {
    let id = id.as_str();
    let ours = id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit());
    text::escape(if ours { &id[..8] } else { id })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_never_exits_with_success() {
        assert_eq!(exit_code(0, false), 0);
        assert_eq!(exit_code(7, true), 7);
        assert_eq!(exit_code(137, true), 137);
        assert_eq!(exit_code(0, true), 1);
        assert_eq!(exit_code(256, true), 1);
        assert_eq!(exit_code(-1, true), 1);
    }

    #[test]
    fn log_line_is_harmless_on_a_terminal_and_untouched_in_a_pipe() {
        let ours = EventId::from_random([0xab; 16]);
        let line = LogLine { time: UnixMs(0), event: ours, text: "a\x1b[31m".into() };

        assert_eq!(log_line(&line, true), "1970-01-01T00:00:00.000Z abababab a\\x1b[31m");
        assert_eq!(log_line(&line, false), "1970-01-01T00:00:00.000Z abababab a\x1b[31m");
    }

    #[test]
    fn senders_own_id_is_shown_whole() {
        let id = EventId::parse("sensor-1-000017").expect("an id");

        assert_eq!(short(&id), "sensor-1-000017");
    }
}
