//! One stdio invocation from its event to its outcome: create, start, feed stdin, read stdout
//! and stderr within their bounds, wait, kill what is over its time.

use super::http::{self, Caller, Listening};
use super::lambda::{self, Hosting};
use super::lines::{STDERR_BYTES_MAX, read_lines};
use super::service::{Base, Service, Setup};
use super::state::{self, Ending, Killed};
use crate::channels::{EndFuture, Exchange, Instances, Kept, LogLine, ParkFuture, Parked, RunFuture};
use crate::model::event::CUT_EXTENSION;
use crate::model::function::{Handler, Limits};
use crate::model::{Clock, Event, Failure, Outcome, Revision};
use crate::runtime::{self, Exit, Running, Runtime, RuntimeError};
use crate::telemetry::logs::FunctionLogs;
use crate::watch::Watch;
use futures_lite::future;
use smol::Timer;
use smol::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// After the first process ended its pipes close with it; this only guards against a kernel
/// that takes its time.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// Instances in containers.
pub struct Containers {
    base: Arc<Base>,
    listening: Arc<Listening>,
    /// Revisions whose instances stay up, by their key.
    services: Mutex<HashMap<String, Arc<Service>>>,
}

impl Containers {
    pub fn new(
        runtime: Runtime,
        executor: Arc<smol::Executor<'static>>,
        logs: FunctionLogs,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let listening = Arc::new(Listening { executor: executor.clone() });
        let base = Arc::new(Base::new(runtime, executor, logs, clock));
        Self { base, listening, services: Mutex::default() }
    }

    fn service(&self, revision: &Revision) -> Arc<Service> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let setup: Arc<dyn Setup> = match revision.manifest.handler {
                Handler::Lambda => Arc::new(Hosting),
                Handler::Stdio | Handler::Http => self.listening.clone(),
            };
            Service::new(self.base.clone(), revision.clone(), setup)
        };
        services.entry(revision.key()).or_insert_with(make).clone()
    }

    fn caller(&self) -> Caller<'_> {
        Caller { executor: &self.base.executor, clock: &*self.base.clock }
    }
}

impl Instances for Containers {
    fn run<'a>(&'a self, revision: &'a Revision, event: &'a Event, log: &'a LogLine) -> RunFuture<'a> {
        match revision.manifest.handler {
            Handler::Stdio => Box::pin(run(&self.base.runtime, None, revision, event, log)),
            Handler::Http => {
                let service = self.service(revision);
                Box::pin(async move { http::run(&self.caller(), &service, event, log).await })
            }
            Handler::Lambda => {
                let service = self.service(revision);
                Box::pin(async move { lambda::run(&self.caller(), &service, event, log).await })
            }
        }
    }

    fn park<'a>(&'a self, revision: &'a Revision) -> ParkFuture<'a> {
        Box::pin(async move {
            let runtime = &self.base.runtime;
            let created = runtime.create(&revision.key()).await;
            let parked = created.map_err(|error| crate::errors::chain(&error))?;
            Ok(Box::new(Ahead { runtime: runtime.clone(), parked }) as Box<dyn Parked>)
        })
    }

    fn exchange<'a>(
        &'a self,
        revision: &'a Revision,
        event: &'a Event,
        exchange: Exchange,
        log: &'a LogLine,
    ) -> RunFuture<'a> {
        let service = self.service(revision);
        Box::pin(async move { http::exchange(&self.caller(), &service, event, exchange, log).await })
    }

    fn kept(&self) -> Watch<Kept> {
        self.base.kept.clone()
    }

    /// The one that has been idle for longest, of any function.
    fn give_up_one(&self) -> bool {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = services.values().filter_map(|service| Some((service.idle_since()?, service)));
        let longest = idle.min_by_key(|(since, _)| *since);
        longest.is_some_and(|(_, service)| service.give_up_one())
    }

    fn retire(&self, revision: &Revision) {
        let (runtime, key) = (self.base.runtime.clone(), revision.key());
        let service = self.services.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        if let Some(service) = service {
            service.close();
        }
        self.base.executor.spawn(async move { runtime.release(&key).await }).detach();
    }
}

/// Created ahead of its event.
struct Ahead {
    runtime: Runtime,
    parked: runtime::Parked,
}

impl Parked for Ahead {
    fn run<'a>(self: Box<Self>, revision: &'a Revision, event: &'a Event, log: &'a LogLine) -> RunFuture<'a> {
        Box::pin(async move {
            let Self { runtime, parked } = *self;
            run(&runtime, Some(parked), revision, event, log).await
        })
    }

    fn ended(&self) -> EndFuture {
        Box::pin(self.parked.ended())
    }
}

/// Runs `event` in a fresh instance of the revision's prepared root: `ahead`, if there is one.
async fn run(
    runtime: &Runtime,
    ahead: Option<runtime::Parked>,
    revision: &Revision,
    event: &Event,
    log: &LogLine,
) -> Outcome {
    let start = Instant::now();
    let (key, limits) = (revision.key(), &revision.manifest.limits);
    let cut = event.extensions.contains_key(CUT_EXTENSION);
    if cut || event.data.len() as u64 > limits.payload_bytes {
        let failure = Failure::PayloadTooLarge { limit_bytes: limits.payload_bytes };
        return Outcome::failed(failure, Vec::new(), Duration::ZERO);
    }
    match begin(runtime, ahead, &key, event).await {
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

async fn begin(
    runtime: &Runtime,
    ahead: Option<runtime::Parked>,
    key: &str,
    event: &Event,
) -> Result<Running, RuntimeError> {
    if let Some(parked) = ahead {
        match parked.start(state::environment(event)).await {
            // It was killed while it waited, and nobody had noticed yet: the event has not run.
            Err(RuntimeError::Launcher(why)) => tracing::debug!(root = key, why, "parked instance was gone"),
            started => return started,
        }
    }
    runtime.create(key).await?.start(state::environment(event)).await
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
