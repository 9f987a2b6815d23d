//! One stdio invocation from its event to its outcome: create, start, feed stdin, read stdout
//! and stderr within their bounds, wait, kill what is over its time.

use super::state::{self, Ending, Killed};
use crate::channels::{Instances, LogLine, RunFuture};
use crate::model::event::CUT_EXTENSION;
use crate::model::function::Limits;
use crate::model::{Event, Failure, Outcome, Revision};
use crate::runtime::{Exit, Running, Runtime, RuntimeError};
use futures_lite::future;
use smol::Timer;
use smol::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a function may write to stderr for one event before the rest is thrown away: its log
/// keeps 1 MiB in all, so more would only push out what others wrote.
const STDERR_BYTES_MAX: usize = 256 * 1024;

/// What a line costs besides its text: its time and its event's id.
const LINE_COST_BYTES: usize = 100;

/// A line of the log is cut here: a function that never ends its line must not fill memory.
const LINE_BYTES_MAX: usize = 8 * 1024;

/// After the first process ended its pipes close with it; this only guards against a kernel
/// that takes its time.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Instances in containers.
pub struct Containers {
    pub runtime: Runtime,
    pub executor: Arc<smol::Executor<'static>>,
}

impl Instances for Containers {
    fn run<'a>(&'a self, revision: &'a Revision, event: &'a Event, log: &'a LogLine) -> RunFuture<'a> {
        Box::pin(run(&self.runtime, revision, event, log))
    }

    fn retire(&self, revision: &Revision) {
        let (runtime, key) = (self.runtime.clone(), revision.key());
        self.executor.spawn(async move { runtime.release(&key).await }).detach();
    }
}

/// Runs `event` in a fresh instance of the revision's prepared root.
async fn run(runtime: &Runtime, revision: &Revision, event: &Event, log: &LogLine) -> Outcome {
    let start = Instant::now();
    let (key, limits) = (revision.key(), &revision.manifest.limits);
    let cut = event.extensions.contains_key(CUT_EXTENSION);
    if cut || event.data.len() as u64 > limits.payload_bytes {
        let failure = Failure::PayloadTooLarge { limit_bytes: limits.payload_bytes };
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    let started = match runtime.create(&key).await {
        Ok(parked) => parked.start(state::environment(event)).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(running) => serve(running, limits, event, log, start).await,
        Err(RuntimeError::Unusable(why)) => {
            log(&format!("neap: {why}"));
            Outcome::failed(Failure::Start(why), Vec::new(), start.elapsed())
        }
        // The node's trouble, not the function's: not counted against its attempts.
        Err(error) => {
            tracing::warn!(root = key, error = crate::errors::chain(&error), "instance not started");
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
    log: &LogLine,
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
        match stdout {
            Some(stdout) => read_bounded(stdout, &mut output, limits.payload_bytes).await,
            None => Ok(()),
        }
    };
    let lines = async {
        if let Some(stderr) = stderr {
            read_lines(stderr, log).await;
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

/// Hands complete lines on, a chunk's at once; reads to the end whatever is thrown away, so that
/// the function never blocks on its log.
async fn read_lines(mut from: impl AsyncRead + Unpin, log: &LogLine) {
    let mut chunk = vec![0; 4 * 1024];
    let mut begun = Vec::new();
    let mut room = STDERR_BYTES_MAX;
    loop {
        let read = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(n) => &chunk[..n],
        };
        if room == 0 {
            continue;
        }
        begun.extend_from_slice(read);
        let complete = match begun.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if begun.len() >= LINE_BYTES_MAX => begun.len(),
            None => 0,
        };
        if complete > 0 {
            let lines = String::from_utf8_lossy(&begun[..complete]);
            log(lines.strip_suffix('\n').unwrap_or(&lines));
            begun.drain(..complete);
        }
        let lines = read.iter().filter(|byte| **byte == b'\n').count();
        room = room.saturating_sub(read.len() + lines * LINE_COST_BYTES);
        if room == 0 {
            begun.clear();
            log(&format!("neap: more than {STDERR_BYTES_MAX} bytes for one event, the rest is left out"));
        }
        // A function that writes without end must not keep the executor from the brokers.
        future::yield_now().await;
    }
    if !begun.is_empty() {
        log(&String::from_utf8_lossy(&begun));
    }
}
