//! `neap run`: an image tried once, nothing deployed.

use super::ahead::root;
use super::{Deployer, failed};
use crate::channels::{DeployError, Instances, LogLine, RunOnce, RunResult};
use crate::config;
use crate::image::ImageError;
use crate::model::function::{FUNCTIONS_MAX, Handler, Platform, Pull, Rollback, UID_BASE_FIRST, UID_RANGE};
use crate::model::{Event, EventId, Failure, FunctionName, Lane, Manifest, Outcome, Reference, Revision};
use crate::runtime::RuntimeError;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Only so much stderr of `neap run` is kept for its caller.
const STDERR_BYTES_MAX: usize = 1 << 20;

impl Deployer {
    /// `neap run`: the image once, with the defaults of a manifest that says nothing else.
    pub(super) async fn run_once(&self, run: RunOnce) -> Result<RunResult, DeployError> {
        let reference =
            Reference::parse(&run.image).map_err(|bad| DeployError::Invalid(vec![bad.to_string()]));
        let image = match self.images.find(&run.image) {
            Err(ImageError::NotFound(_)) => return Err(DeployError::NoImage(run.image)),
            found => found.map_err(failed)?,
        };
        self.images.check_run(&run.image, &image.digest).map_err(|error| match error {
            ImageError::Refused(text) => DeployError::Invalid(vec![text]),
            other => failed(other),
        })?;
        // An image named by a part of its digest has no reference of its own.
        let reference =
            reference.or_else(|_| Reference::parse(&format!("run@{}", image.digest)).map_err(failed))?;
        let data = STANDARD
            .decode(&run.data)
            .map_err(|bad| DeployError::Invalid(vec![format!("data is not base64: {bad}")]))?;
        let random = fastrand::u32(..);
        let name = FunctionName::parse(&format!("run-{random:08x}")).map_err(failed)?;
        let manifest = Manifest {
            name,
            image: reference,
            pull: Pull::Never,
            rollback: Rollback::Off,
            handler: Handler::Stdio,
            platform: Platform::None,
            serving: config::defaults::serving(),
            priority: Lane::Normal,
            command: run.command,
            env: run.env,
            limits: config::defaults::limits(),
            scale: config::defaults::scale(),
            retry: config::defaults::retry(),
            permissions: Default::default(),
            rate: None,
            triggers: Vec::new(),
            outputs: Vec::new(),
            marks: Default::default(),
        };
        // The last range of ids belongs to no function.
        let uid_base = UID_BASE_FIRST + FUNCTIONS_MAX.saturating_sub(1) * UID_RANGE;
        let revision = Revision { number: 1, manifest, image: image.digest.clone(), uid_base };
        let root = root(&revision, &image)?;
        // Before the root is there: a caller that leaves meanwhile must not leave it behind.
        let retire = Retire(self.instances.clone(), revision);
        self.runtime.prepare(root).await.map_err(|error| match error {
            RuntimeError::Unusable(why) | RuntimeError::NoWayOut(why) => DeployError::Invalid(vec![why]),
            other => failed(other),
        })?;
        let now = self.clock.wall();
        let event = Event {
            id: EventId::from_random(fastrand::u128(..).to_le_bytes()),
            source: format!("/{}/run", self.config.get().node.id),
            kind: "neap.run".to_owned(),
            subject: None,
            time: Some(now),
            content_type: None,
            extensions: BTreeMap::new(),
            http: None,
            data,
        };
        let stderr = Arc::new(Mutex::new(String::new()));
        let kept = stderr.clone();
        let log: Box<LogLine> = Box::new(move |line: &str| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() + line.len() < STDERR_BYTES_MAX {
                kept.push_str(line);
                kept.push('\n');
            }
        });
        let started = std::time::Instant::now();
        let outcome = self.instances.run(&retire.1, &event, &*log).await;
        let (stdout, failure, code) = match outcome {
            Outcome::Succeeded { output, .. } => (output, None, 0),
            Outcome::Failed { failure, output, .. } => {
                let code = match &failure {
                    Failure::Exit(code) => *code,
                    Failure::Signal(signal) => 128 + signal,
                    Failure::OutOfMemory { .. } => 137,
                    Failure::TimedOut { .. } => 124,
                    _ => 125,
                };
                (output, Some(failure.to_string()), code)
            }
            Outcome::Lost => (Vec::new(), Some("the instance was lost".to_owned()), 125),
        };
        let stderr = std::mem::take(&mut *stderr.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(RunResult {
            stdout: STANDARD.encode(stdout),
            stderr: STANDARD.encode(stderr),
            failure,
            code,
            took_ms: started.elapsed().as_millis() as u64,
        })
    }
}

/// Lets a root go when a run ends, however it ends.
struct Retire(Arc<dyn Instances>, Revision);

impl Drop for Retire {
    fn drop(&mut self) {
        self.0.retire(&self.1);
    }
}
