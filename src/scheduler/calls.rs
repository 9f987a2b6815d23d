//! Synchronous calls: into the line or refused at once, run when the plan says, answered.
//!
//! Nobody's answer is computed in vain: a caller who leaves takes the call out of the line, or
//! ends the instance that runs for it.

use super::driver::{Ended, Input, Scheduler, State, Stop};
use super::pace::Standing;
use super::parking::Ahead;
use super::plan::{Grant, Refusal, Ticket};
use super::pressure::Pressure;
use super::settle::{self, Said};
use crate::channels::{CallError, Exchange, Invoke, Reply, Response};
use crate::model::function::Handler;
use crate::model::{Event, Failure, FunctionName, Outcome, Revision};
use crate::net::http::Passing;
use futures_lite::future;
use smol::channel::Sender;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a synchronous call waits for a slot before 503.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// When somebody has to do something first.
const RETRY_LATER: Duration = Duration::from_secs(30);

impl Scheduler {
    pub(super) fn take_call(&self, state: &mut State, call: Invoke) {
        if state.stop != Stop::Run {
            let _ = call.reply.try_send(Err(CallError::Stopping));
            return;
        }
        // Calls of functions that can't run are refused for that, and take no token.
        let runnable = state.routes.functions.get(&call.function).is_some_and(|d| d.runnable());
        if runnable && let Err(wait) = self.gates().try_call(&call.function, self.clock.monotonic()) {
            let _ = call.reply.try_send(Err(CallError::TooFast { function: call.function, wait }));
            return;
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        match state.plan.call(ticket, &call.function) {
            Ok(()) => {
                if let Some(deployment) = state.routes.functions.get(&call.function) {
                    let revision = deployment.revision.clone();
                    state.arrived(&revision, self.clock.monotonic());
                }
                state.waiting.insert(ticket, (call, Instant::now()));
            }
            Err(refusal) => {
                let _ = call.reply.try_send(Err(state.refusal(refusal, &call.function)));
            }
        }
    }

    pub(super) fn start_call(
        self: &Arc<Self>,
        state: &mut State,
        call: Invoke,
        grant: Grant,
        inputs: &Sender<Input>,
    ) {
        let Some(deployment) = state.routes.functions.get(&call.function) else {
            let _ = call.reply.try_send(Err(CallError::Unknown(call.function)));
            state.plan.ended(grant);
            return;
        };
        let revision = deployment.revision.clone();
        self.enter(state, &revision);
        let ahead = self.take_ahead(state, &revision);
        let (this, inputs) = (self.clone(), inputs.clone());
        let begun = Instant::now();
        let task = async move {
            let Invoke { event, passing, reply, .. } = call;
            match passing {
                None if revision.manifest.handler != Handler::Lambda => {
                    let left = async {
                        reply.closed().await;
                        None
                    };
                    // Nobody waits any more: the future is dropped, the instance killed.
                    let answer = async { Some(this.answer(&revision, &event, ahead).await) };
                    if let Some(answer) = future::or(answer, left).await {
                        let _ = reply.try_send(answer);
                    }
                }
                passing => this.pass(&revision, &event, passing, &reply).await,
            }
            let _ = inputs
                .send(Input::Ended(Ended { grant, revision, held: begun.elapsed(), of_event: false }))
                .await;
        };
        self.executor.spawn(task).detach();
    }

    /// A call to a handler that answers by itself: answered as soon as the function's answer has begun, or, when
    /// it has outputs, as soon as their deliveries are committed.
    async fn pass(
        &self,
        revision: &Revision,
        event: &Event,
        passing: Option<Passing>,
        reply: &Reply<Result<Response, CallError>>,
    ) {
        let whole = !revision.manifest.outputs.is_empty();
        let (answer, answers) = smol::channel::bounded(1);
        let exchange = Exchange { passing, answer, whole };
        // Once answered, its receiver goes: that is no caller who left.
        let replied = AtomicBool::new(false);
        let left = async {
            reply.closed().await;
            if replied.load(Ordering::Relaxed) {
                future::pending::<()>().await;
            }
            None
        };
        let hand_on = async {
            if !whole && let Ok(answer) = answers.recv().await {
                replied.store(true, Ordering::Relaxed);
                let _ = reply.try_send(Ok(Response::Passed(answer)));
            }
            future::pending().await
        };
        let run = async { Some(self.exchange_or_abandon(revision, event, exchange).await) };
        let Some(outcome) = future::or(hand_on, future::or(run, left)).await else { return };
        let Some(outcome) = outcome else {
            let _ = reply.try_send(Err(CallError::Stopping));
            return;
        };
        self.count(revision, &outcome);
        if revision.manifest.handler == Handler::Lambda {
            self.judge_call(revision, event, &outcome);
        }
        let ended = match outcome {
            Outcome::Succeeded { output, content_type, event: said, took } => {
                let said = Said { content_type: content_type.as_deref(), event: said.as_deref() };
                self.owe(revision, event, &output, said).await.map(|()| Response::Output { output, took })
            }
            Outcome::Failed { failure, output, .. } => Err(CallError::Failed { failure, output }),
            Outcome::Lost => Err(CallError::Lost),
        };
        let answer = match (ended, answers.try_recv()) {
            // What the function says of a failure of its own is the caller's to see.
            (Ok(_) | Err(CallError::Failed { failure: Failure::Status(_), .. }), Ok(answer)) => {
                Ok(Response::Passed(answer))
            }
            (ended, _) => ended,
        };
        let _ = reply.try_send(answer); // refused when it was answered before
    }

    async fn answer(&self, revision: &Revision, event: &Event, ahead: Ahead) -> Result<Response, CallError> {
        let outcome = self.run_or_abandon(revision, event, ahead).await.ok_or(CallError::Stopping)?;
        self.count(revision, &outcome);
        self.judge_call(revision, event, &outcome);
        let (output, took) = match outcome {
            Outcome::Succeeded { output, took, .. } => (output, took),
            Outcome::Failed { failure, output, .. } => return Err(CallError::Failed { failure, output }),
            Outcome::Lost => return Err(CallError::Lost),
        };
        self.owe(revision, event, &output, Said::default()).await?;
        Ok(Response::Output { output, took })
    }

    /// What a call says of its function. (Not of one that speaks HTTP: its failures are between
    /// it and its callers.)
    fn judge_call(&self, revision: &Revision, event: &Event, outcome: &Outcome) {
        self.trials.report(revision, &event.id, outcome);
        if let Outcome::Succeeded { .. } = outcome {
            self.gates().call_succeeded(revision.name(), revision.number);
        }
    }

    /// Commits what a synchronous call's output becomes.
    async fn owe(
        &self,
        revision: &Revision,
        event: &Event,
        output: &[u8],
        said: Said<'_>,
    ) -> Result<(), CallError> {
        if !revision.manifest.outputs.is_empty() {
            let routes = self.routes.get();
            let (deliveries, events) =
                settle::effects(event, output.to_vec(), said, &self.context(&routes, revision))
                    .map_err(|failure| CallError::Failed { failure, output: output.to_vec() })?;
            if !deliveries.is_empty() || !events.is_empty() {
                self.store.owe(deliveries, events).await.map_err(CallError::NotStored)?;
                self.outbox.wake();
                self.inbox.wake();
            }
        }
        Ok(())
    }
}

impl State {
    /// Who has left, has waited for too long or for a daemon that stops gets out of the line.
    pub(super) fn turn_away(&mut self, pressure: Pressure) {
        let is_over = |(_, (call, since)): &(&Ticket, &(Invoke, Instant))| {
            call.reply.is_closed() || since.elapsed() > WAIT_MAX || self.stop != Stop::Run
        };
        let over: Vec<Ticket> = self.waiting.iter().filter(is_over).map(|(ticket, _)| *ticket).collect();
        for ticket in over {
            self.plan.cancel(ticket);
            let Some((call, since)) = self.waiting.remove(&ticket) else { continue };
            let why = if pressure == Pressure::Severe {
                "the node is short of memory"
            } else {
                "all instances are busy"
            };
            let error = match self.stop {
                Stop::Run => CallError::NoCapacity { why, wait: self.pace(&call.function, since.elapsed()) },
                Stop::Drain | Stop::Abandon => CallError::Stopping,
            };
            let _ = call.reply.try_send(Err(error));
        }
    }

    pub(super) fn refusal(&self, refusal: Refusal, function: &FunctionName) -> CallError {
        let no_capacity = |why, wait| CallError::NoCapacity { why, wait };
        match refusal {
            Refusal::Unknown => CallError::Unknown(function.clone()),
            Refusal::NeverFits => no_capacity("limits.memory is more than [node] memory allows", RETRY_LATER),
            Refusal::QueueFull => {
                no_capacity("too many calls are waiting", self.pace(function, Duration::ZERO))
            }
            Refusal::NotRunnable => match self.routes.functions.get(function) {
                Some(deployment) if deployment.paused => CallError::Paused(function.clone()),
                Some(_) => no_capacity("the function can't run on this node, see `neap show`", RETRY_LATER),
                None => CallError::Unknown(function.clone()),
            },
        }
    }

    /// Until a caller of the function who comes again would be served.
    fn pace(&self, function: &FunctionName, waited: Duration) -> Duration {
        let ahead = self.plan.waiting().filter(|name| *name == function).count();
        let places = self.plan.running().find(|(name, _)| *name == function).map_or(0, |(_, count)| count);
        self.pace.wait(function, Standing { ahead, places, waited })
    }
}
