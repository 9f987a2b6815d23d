//! What is made of a revision ahead of the switch to it: its root, mounted and proven to start,
//! and the first of the instances that `scale.min` asks for. Nothing of it is seen by an event
//! before the revision is published, and what fails here leaves what runs as it is.

use super::{Deployer, failed};
use crate::channels::{DeployError, NotReady, Parked};
use crate::image::Image;
use crate::instance::platform;
use crate::model::function::{Handler, ScaleMin};
use crate::model::{Manifest, Revision};
use crate::runtime::{Root, RuntimeError};
use futures_lite::future;
use smol::Timer;
use std::sync::PoisonError;
use std::time::Duration;

/// Made before a switch, of what `scale.min` asks for: beyond that a deploy would take seconds, and
/// the pool makes the rest as it always does.
const STOCK_MAX: u32 = 16;
/// A deploy waits no longer for a function to get ready, whatever its `limits.start`: what runs goes
/// on meanwhile, and whoever deployed wants to know.
const READY_WAIT: Duration = Duration::from_secs(30);
/// What its container takes beside its `limits.start`.
const CONTAINER_WAIT: Duration = Duration::from_secs(5);

/// What is made of a revision before events reach it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ahead {
    /// It has its own already.
    Nothing,
    /// What the node makes by itself: a boot or a rollback waits for no function's code.
    Parked,
    /// And the first of the started instances that are to be kept.
    Ready,
}

impl Deployer {
    /// Mounts the root and starts nothing in it, but makes one container up to the point where
    /// it would: a missing command, user or directory shows now and not at three in the morning.
    /// Of parked ones `ahead` may ask for all of a fixed `scale.min`, which wait for the switch.
    pub(super) async fn prove(
        &self,
        revision: &Revision,
        image: &Image,
        ahead: Ahead,
    ) -> Result<Vec<Box<dyn Parked>>, DeployError> {
        let root = root(revision, image)?;
        self.note_root(revision);
        let proven = async {
            self.runtime.prepare(root).await?;
            self.runtime.create(&revision.key()).await.map(drop)
        };
        proven.await.map_err(|error| match error {
            RuntimeError::Unusable(why) => {
                DeployError::Invalid(vec![format!("image `{}`: {why}", revision.manifest.image)])
            }
            RuntimeError::NoWayOut(why) => DeployError::Invalid(vec![why]),
            other => failed(other),
        })?;
        let Manifest { scale, handler, .. } = &revision.manifest;
        if handler.stays_up() {
            return Ok(Vec::new());
        }
        let count = match scale.min {
            ScaleMin::Fixed(count) if ahead != Ahead::Nothing => count.min(scale.max).min(STOCK_MAX),
            _ => 0,
        };
        let mut made = Vec::new();
        for number in 1..=count {
            let parked = self.instances.park(revision).await;
            made.push(parked.map_err(|why| {
                let text = format!("instance {number} of the {count} that scale.min asks for");
                DeployError::Invalid(vec![format!("{text} could not be made, nothing has changed: {why}")])
            })?);
        }
        Ok(made)
    }

    /// The first instance that is to be kept is ready before events reach its revision. Where that
    /// takes too long, or has no room beside what runs, the revision goes up without it, as one
    /// does that keeps none: its first event waits.
    pub(super) async fn warm(&self, revision: &Revision) -> Result<(), DeployError> {
        let Manifest { name, limits, serving, .. } = &revision.manifest;
        if limits.memory_bytes > (self.room_bytes)() {
            tracing::info!(function = name.as_str(), "no memory for an instance before the switch");
            return Ok(());
        }
        let ready = async {
            match self.instances.warm(revision).await {
                // The node's trouble is not the manifest's.
                Err(NotReady::Lost) => self.instances.warm(revision).await,
                done => done,
            }
        };
        let late = async {
            Timer::after(serving.start.min(READY_WAIT) + CONTAINER_WAIT).await;
            tracing::warn!(function = name.as_str(), "deployed before an instance is ready");
            Ok(())
        };
        future::or(ready, late).await.map_err(|why| match why {
            NotReady::Failed(why) => {
                DeployError::Invalid(vec![format!("function `{name}`: no instance gets ready: {why}")])
            }
            NotReady::Lost => DeployError::Failed(format!("function `{name}`: its first instance was lost")),
        })
    }

    /// Its image stays for as long as its root is there.
    pub(super) fn note_root(&self, revision: &Revision) {
        let mut roots = self.waiting.roots.lock().unwrap_or_else(PoisonError::into_inner);
        roots.insert(revision.key(), revision.image.clone());
    }
}

/// Whether its first instance is to be ready before events reach it. With `"auto"` that is where the
/// revision before has some.
pub(super) fn waits_for_code(manifest: &Manifest, in_use: bool) -> bool {
    manifest.handler.stays_up()
        && match manifest.scale.min {
            ScaleMin::Fixed(count) => count > 0,
            ScaleMin::Auto => in_use,
        }
}

/// What the runtime needs to know, from the image and the manifest.
pub(super) fn root(revision: &Revision, image: &Image) -> Result<Root, DeployError> {
    let manifest = &revision.manifest;
    let command = match &manifest.command {
        Some(command) => command.clone(),
        None => [image.config.entrypoint.as_slice(), image.config.cmd.as_slice()].concat(),
    };
    if command.is_empty() {
        return Err(DeployError::Invalid(vec![format!(
            "image `{}` names no entrypoint or cmd; say `command = [\"…\"]` in the manifest",
            manifest.image
        )]));
    }
    let replaced = |variable: &&String| {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        !manifest.env.contains_key(name)
    };
    let mut env: Vec<String> = image.config.env.iter().filter(replaced).cloned().collect();
    env.extend(manifest.env.iter().map(|(name, value)| format!("{name}={value}")));
    if manifest.handler == Handler::Lambda {
        // The image's CMD, or what the manifest says instead: the last word names the handler.
        let handler =
            manifest.command.as_ref().unwrap_or(&image.config.cmd).last().cloned().unwrap_or_default();
        if !env.iter().any(|variable| variable.starts_with("_HANDLER=")) {
            env.push(format!("_HANDLER={handler}"));
        }
    }
    Ok(Root {
        key: revision.key(),
        layers: image.layers.clone(),
        uid_base: revision.uid_base,
        command,
        env,
        user: image.config.user.clone(),
        working_dir: image.config.working_dir.clone(),
        limits: manifest.limits.clone(),
        permissions: manifest.permissions.clone(),
        secret_dirs: platform::secret_dirs(manifest.platform).map(str::to_owned).collect(),
    })
}
