//! One attempt, of a call or a leased event alike: an instance from ahead or a new one, its log,
//! the end of the daemon's patience, what is counted.

use super::driver::{Scheduler, State, Stop};
use super::parking::Ahead;
use super::settle::Context;
use crate::channels::{Exchange, LogLine, Progress};
use crate::ingress::routes::Routes;
use crate::model::callback;
use crate::model::{Event, Outcome, Revision};
use crate::telemetry::metrics::Ended;
use futures_lite::future;
use std::time::Duration;

impl Scheduler {
    pub(super) fn take_ahead(&self, state: &mut State, revision: &Revision) -> Ahead {
        let ahead = state.parking.take(revision);
        self.metrics.started(revision.name(), !matches!(ahead, Ahead::None));
        ahead
    }

    /// `None`: the daemon's grace period ended first.
    pub(super) async fn run_or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        ahead: Ahead,
    ) -> Option<Outcome> {
        let log = self.log(revision, event);
        self.or_abandon(revision, event, ahead.run(&*self.instances, revision, event, &*log)).await
    }

    pub(super) async fn run_job_or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        progress: &dyn Progress,
    ) -> Option<Outcome> {
        let log = self.log(revision, event);
        self.or_abandon(revision, event, self.instances.run_job(revision, event, progress, &*log)).await
    }

    pub(super) async fn exchange_or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        exchange: Exchange,
    ) -> Option<Outcome> {
        let log = self.log(revision, event);
        self.or_abandon(revision, event, self.instances.exchange(revision, event, exchange, &*log)).await
    }

    async fn or_abandon(
        &self,
        revision: &Revision,
        event: &Event,
        run: impl Future<Output = Outcome>,
    ) -> Option<Outcome> {
        let run = async { Some(run.await) };
        let abandon = async {
            let (mut seen, mut stop) = self.stop.versioned();
            while *stop != Stop::Abandon {
                (seen, stop) = self.stop.changed(seen).await;
            }
            let (function, event) = (revision.name().as_str(), event.id.as_str());
            tracing::warn!(function, event, "abandoned: it ran longer than the grace period");
            None
        };
        future::or(run, abandon).await
    }

    fn log(&self, revision: &Revision, event: &Event) -> Box<LogLine> {
        let (logs, clock, name, id) =
            (self.logs.clone(), self.clock.clone(), revision.name().clone(), event.id.clone());
        Box::new(move |text: &str| logs.append(&name, &id, clock.wall(), text))
    }

    pub(super) fn context<'a>(&self, routes: &'a Routes, revision: &'a Revision) -> Context<'a> {
        Context { routes, revision, now: self.clock.wall(), counted: true, random: fastrand::u64(..) }
    }

    pub(super) fn count(&self, revision: &Revision, outcome: &Outcome) {
        let (ended, code, took) = match outcome {
            Outcome::Succeeded { took, .. } => (Ended::Succeeded, 200, *took),
            Outcome::Failed { failure, took, .. } => (Ended::Failed, callback::status(failure), *took),
            Outcome::Lost => (Ended::Lost, 500, Duration::ZERO),
        };
        self.metrics.invocation(revision.name(), ended, code, took);
    }
}
