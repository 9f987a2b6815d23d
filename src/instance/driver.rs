//! Instances in containers: each invocation goes to its function's handler.

use super::http::{self, Caller, Listening};
use super::lambda::{self, Hosting};
use super::service::{Base, NotStarted, Service, Setup};
use super::{job, stdio};
use crate::channels::{
    EndFuture, Exchange, Instances, Kept, LogLine, NoProgress, NotReady, ParkFuture, Parked, Progress,
    RunFuture, WarmFuture,
};
use crate::model::function::Handler;
use crate::model::{Clock, Event, Revision};
use crate::runtime::{self, Runtime};
use crate::telemetry::logs::FunctionLogs;
use crate::watch::Watch;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Instances in containers.
pub struct Containers {
    base: Arc<Base>,
    listening: Arc<Listening>,
    /// Revisions whose instances stay up, by their key.
    services: Mutex<HashMap<String, Arc<Service>>>,
    /// What all instances together may reserve.
    budget_bytes: u64,
}

impl Containers {
    pub fn new(
        runtime: Runtime,
        executor: Arc<smol::Executor<'static>>,
        logs: FunctionLogs,
        clock: Arc<dyn Clock>,
        budget_bytes: u64,
    ) -> Self {
        let listening = Arc::new(Listening { executor: executor.clone() });
        let base = Arc::new(Base::new(runtime, executor, logs, clock));
        Self { base, listening, services: Mutex::default(), budget_bytes }
    }

    fn service(&self, revision: &Revision) -> Arc<Service> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let setup: Arc<dyn Setup> = match revision.manifest.handler {
                Handler::Lambda => Arc::new(Hosting),
                Handler::Stdio | Handler::Http | Handler::Job => self.listening.clone(),
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
            Handler::Stdio => Box::pin(stdio::run(&self.base.runtime, None, revision, event, log)),
            Handler::Job => self.run_job(revision, event, &NoProgress, log),
            Handler::Http => {
                let service = self.service(revision);
                Box::pin(async move { http::run(&self.caller(), &service, event, log).await })
            }
            Handler::Lambda => {
                let service = self.service(revision);
                Box::pin(async move { lambda::run(&self.caller(), &service, event, None, log).await })
            }
        }
    }

    fn run_job<'a>(
        &'a self,
        revision: &'a Revision,
        event: &'a Event,
        progress: &'a dyn Progress,
        log: &'a LogLine,
    ) -> RunFuture<'a> {
        let at_once = revision.manifest.instances_each(self.budget_bytes);
        Box::pin(job::run(&self.base.runtime, (revision, event), at_once, progress, log))
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
        let Exchange { passing, answer, whole } = exchange;
        match (revision.manifest.handler, passing) {
            (Handler::Http, Some(passing)) => {
                let service = self.service(revision);
                let to = http::Asker { answer, whole };
                Box::pin(
                    async move { http::exchange(&self.caller(), &service, event, passing, to, log).await },
                )
            }
            (Handler::Lambda, _) if !whole => {
                let service = self.service(revision);
                Box::pin(
                    async move { lambda::run(&self.caller(), &service, event, Some(&answer), log).await },
                )
            }
            _ => self.run(revision, event, log),
        }
    }

    fn keep(&self, revision: &Revision, count: u32) {
        self.service(revision).keep(count);
    }

    fn warm<'a>(&'a self, revision: &'a Revision) -> WarmFuture<'a> {
        let service = self.service(revision);
        Box::pin(async move {
            match service.place().await {
                Ok(_) => Ok(()),
                Err(NotStarted::Failed(failure)) => Err(NotReady::Failed(failure.to_string())),
                Err(NotStarted::Lost) => Err(NotReady::Lost),
            }
        })
    }

    fn kept(&self) -> Watch<Kept> {
        self.base.kept.clone()
    }

    /// The one that has been idle for longest, of any function; of those that need not be kept first.
    fn give_up_one(&self) -> bool {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = services.values().filter_map(|service| Some((service.gives_up()?, service)));
        let longest = idle.min_by_key(|(first, _)| *first);
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
            stdio::run(&runtime, Some(parked), revision, event, log).await
        })
    }

    fn ended(&self) -> EndFuture {
        Box::pin(self.parked.ended())
    }
}
