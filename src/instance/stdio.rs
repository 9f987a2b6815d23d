//! One stdio invocation from its event to its outcome: create, start, feed stdin, read stdout
//! and stderr within their bounds, wait, kill what is over its time.

use super::lines::{STDERR_BYTES_MAX, read_lines};
use super::state::{self, Ending, Killed};
use crate::channels::LogTo;
use crate::model::event::CUT_EXTENSION;
use crate::model::function::Limits;
use crate::model::{Event, Failure, Outcome, Revision};
use crate::runtime::{Exit, Parked, Running, Runtime, RuntimeError};
use futures_lite::future;
use smol::Timer;
use smol::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use std::time::{Duration, Instant};

/// After the first process ended its pipes close with it; this only guards against a kernel
/// that takes its time.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// What becomes of an instance's stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdout {
    /// The output, within `limits.payload`.
    Output,
    /// Lines of the log, like stderr.
    Log,
}

/// Runs `event` in a fresh instance of the revision's prepared root: `ahead`, if there is one.
pub async fn run(
    runtime: &Runtime,
    ahead: Option<Parked>,
    revision: &Revision,
    event: &Event,
    log: &LogTo<'_>,
) -> Outcome {
    let start = Instant::now();
    if let Some(failure) = too_large(event, &revision.manifest.limits) {
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    let environment = state::environment(event);
    let running = begin(runtime, ahead, &revision.key(), environment).await;
    ended(running, revision, event, Stdout::Output, log, start).await
}

/// The same with variables more, always in an instance made now.
pub async fn run_with(
    runtime: &Runtime,
    revision: &Revision,
    event: &Event,
    variables: Vec<(String, String)>,
    stdout: Stdout,
    log: &LogTo<'_>,
) -> Outcome {
    let start = Instant::now();
    let mut environment = variables;
    environment.extend(state::environment(event));
    let running = begin(runtime, None, &revision.key(), environment).await;
    ended(running, revision, event, stdout, log, start).await
}

pub fn too_large(event: &Event, limits: &Limits) -> Option<Failure> {
    let cut = event.extensions.contains_key(CUT_EXTENSION);
    let large = cut || event.data.len() as u64 > limits.payload_bytes;
    large.then_some(Failure::PayloadTooLarge { limit_bytes: limits.payload_bytes })
}

async fn begin(
    runtime: &Runtime,
    ahead: Option<Parked>,
    key: &str,
    environment: Vec<(String, String)>,
) -> Result<Running, RuntimeError> {
    if let Some(parked) = ahead {
        match parked.start(environment.clone()).await {
            // It was killed while it waited, and nobody had noticed yet: the event has not run.
            Err(RuntimeError::Launcher(why)) => tracing::debug!(root = key, why, "parked instance was gone"),
            started => return started,
        }
    }
    runtime.create(key).await?.start(environment).await
}

async fn ended(
    running: Result<Running, RuntimeError>,
    revision: &Revision,
    event: &Event,
    stdout: Stdout,
    log: &LogTo<'_>,
    start: Instant,
) -> Outcome {
    match running {
        Ok(running) => serve(running, &revision.manifest.limits, event, stdout, log, start).await,
        Err(RuntimeError::Unusable(why)) => {
            log(&format!("neap: {why}"));
            Outcome::failed(Failure::Start(why), Vec::new(), start.elapsed())
        }
        // The node's trouble, not the function's: not counted against its attempts.
        Err(error) => {
            let root = revision.key();
            tracing::warn!(root, error = crate::errors::chain(&error), "instance not started");
            Outcome::Lost
        }
    }
}

enum First {
    Ended(Exit),
    Kill(Killed),
}

struct TooLarge;

async fn serve(
    mut running: Running,
    limits: &Limits,
    event: &Event,
    kind: Stdout,
    log: &LogTo<'_>,
    start: Instant,
) -> Outcome {
    let (stdin, stdout, stderr) = (running.stdin.take(), running.stdout.take(), running.stderr.take());
    let mut output = Vec::new();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A function need not read its input: a closed pipe is no failure.
            let _ = stdin.write_all(&event.data).await;
        }
        Ok(())
    };
    let collect = async {
        match (stdout, kind) {
            (Some(stdout), Stdout::Output) => read_bounded(stdout, &mut output, limits.payload_bytes).await,
            (Some(stdout), Stdout::Log) => {
                read_lines(stdout, Some(STDERR_BYTES_MAX), log).await;
                Ok(())
            }
            (None, _) => Ok(()),
        }
    };
    let lines = async {
        if let Some(stderr) = stderr {
            read_lines(stderr, Some(STDERR_BYTES_MAX), log).await;
        }
        Ok(())
    };

    let (exit, killed) = {
        let mut pipes = std::pin::pin!(future::try_zip(feed, future::try_zip(collect, lines)));
        let mut piped = false;
        let first = {
            let ended = async { First::Ended(running.wait().await) };
            let too_large = async {
                let result = pipes.as_mut().await;
                piped = true;
                match result {
                    Err(TooLarge) => First::Kill(Killed::OutputTooLarge),
                    Ok(_) => future::pending().await,
                }
            };
            // The deadline stands beside the pipes: a function may close stdout and run on.
            let deadline = async {
                Timer::after(limits.timeout.saturating_sub(start.elapsed())).await;
                First::Kill(Killed::Deadline)
            };
            future::or(ended, future::or(too_large, deadline)).await
        };
        let (exit, mut killed) = match first {
            First::Ended(exit) => (exit, None),
            First::Kill(why) => {
                running.signal(SIGKILL);
                (running.wait().await, Some(why))
            }
        };
        if !piped {
            let rest = async { pipes.await.map(|_| ()) };
            let give_up = async {
                Timer::after(LAST_BYTES).await;
                Ok(())
            };
            if future::or(rest, give_up).await.is_err() {
                killed = killed.or(Some(Killed::OutputTooLarge));
            }
        }
        (exit, killed)
    };
    let ending = match exit {
        Exit::Code(code) => Ending::Code(code),
        Exit::Signal(signal) => Ending::Signal(signal),
        Exit::OutOfMemory => Ending::OutOfMemory,
        Exit::Lost => Ending::Lost,
    };
    state::outcome(ending, killed, output, limits, start.elapsed())
}

const SIGKILL: i32 = 9;

async fn read_bounded(
    mut from: impl AsyncRead + Unpin,
    into: &mut Vec<u8>,
    bytes_max: u64,
) -> Result<(), TooLarge> {
    let mut chunk = vec![0; 8 * 1024];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(n) if (into.len() + n) as u64 > bytes_max => return Err(TooLarge),
            Ok(n) => into.extend_from_slice(&chunk[..n]),
        }
    }
}
