//! One job from its event to its outcome: its copies run as `batch` says, each in fresh
//! containers with the event on stdin, like handler stdio's. What they write is their log, on
//! stdout too; the outcome's output is the list of how they ended.
//!
//! A copy's end is committed before anything else happens to the job: when the daemon is killed,
//! the event goes back in line, and what runs again are the copies that had not ended, with the
//! attempts that they had left. A new revision begins afresh, and so does an event that is
//! driven again after it was dead.

use super::batch::{Batch, Next, environment};
use super::stdio::{Stdout, run_with, too_large};
use crate::channels::{LogLine, Progress};
use crate::model::{Event, Outcome, Revision};
use crate::runtime::Runtime;
use futures_lite::future;
use smol::Timer;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// A copy that runs.
type Running<'a> = Pin<Box<dyn Future<Output = (u32, Outcome)> + Send + 'a>>;

/// Dropping the future kills what runs.
pub async fn run(
    runtime: &Runtime,
    (revision, event): (&Revision, &Event),
    at_once: u32,
    progress: &dyn Progress,
    log: &LogLine,
) -> Outcome {
    let (start, manifest) = (Instant::now(), &revision.manifest);
    if let Some(failure) = too_large(event, &manifest.limits) {
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    let copies = manifest.scale.copies;
    let mut batch = Batch::new(copies, at_once, &manifest.retry);
    let known = progress.known().await;
    batch.resume(&known);
    if batch.done() > 0 {
        log(&format!("neap: {} of {copies} copies ended before the job was cut off", batch.done()));
    }
    let mut running: Vec<Running<'_>> = Vec::new();
    loop {
        match batch.next(start.elapsed()) {
            Next::Start { index, attempt } => {
                let job = revision.name().as_str();
                let variables = environment(job, event.id.as_str(), index, copies, attempt);
                running.push(Box::pin(async move {
                    let log = move |text: &str| log(&labelled(text, index, copies));
                    let outcome = run_with(runtime, revision, event, variables, Stdout::Log, &log).await;
                    (index, outcome)
                }));
            }
            Next::Wait(until) => {
                let ended = async { Some(poll_fn(|cx| poll_any(&mut running, cx)).await) };
                let due = async {
                    match until {
                        Some(until) => Timer::after(until.saturating_sub(start.elapsed())).await,
                        None => future::pending().await,
                    };
                    None
                };
                let Some((index, outcome)) = future::or(ended, due).await else { continue };
                if let Outcome::Failed { failure, .. } = &outcome {
                    let attempt = batch.attempts(index) + 1;
                    let text = format!("neap: {failure} (attempt {attempt} of {})", manifest.retry.attempts);
                    log(&labelled(&text, index, copies));
                }
                let ended = batch.ended(index, outcome, start.elapsed(), fastrand::u64(..));
                let Some(copy) = ended else { continue };
                let over = copy.ended.is_some();
                progress.ended(copy).await;
                if over && copies > 1 {
                    log(&format!("neap: {} of {copies} copies have ended", batch.done()));
                }
            }
            Next::Done => return batch.outcome(start.elapsed()),
        }
    }
}

/// The first that has ended, taken out; pending while none has.
fn poll_any<'a>(running: &mut Vec<Running<'a>>, cx: &mut Context<'_>) -> Poll<(u32, Outcome)> {
    for at in 0..running.len() {
        if let Poll::Ready(ended) = running[at].as_mut().poll(cx) {
            drop(running.swap_remove(at));
            return Poll::Ready(ended);
        }
    }
    Poll::Pending
}

/// Which copy wrote it, when there are several.
fn labelled(text: &str, index: u32, copies: u32) -> String {
    if copies == 1 {
        return text.to_owned();
    }
    let lines: Vec<String> = text.lines().map(|line| format!("[{index}] {line}")).collect();
    lines.join("\n")
}
