//! Images that are not on the node: asked for when a deploy needs them, and what waits for them.
//!
//! A deploy that somebody waits for waits with him; the deployer itself never waits: whatever is
//! to be done when an image has come is sent back to it. Functions of functions_dir, and those
//! whose image is gone, ask for as long as they need it. Nothing here is on the boot path: what
//! ran before runs before the first registry is asked.

use super::{Deployer, failed};
use crate::channels::{DeployError, Deployed, Reply};
use crate::config::{self, Config};
use crate::image::{ImageError, Patience};
use crate::model::function::Pull;
use crate::model::{Digest, Manifest, Reference};
use futures_lite::future;
use smol::Timer;
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// After a registry refused an image that a function needs: somebody may put it there.
const REFUSED_PAUSE: Duration = Duration::from_secs(600);

/// After the worker died of one: each try writes all of it to flash, and ends alike unless the
/// node's memory was what lacked. Whoever has mended that need not wait: `neap image pull`.
const DEADLY_PAUSE: Duration = Duration::from_secs(86_400);

/// What is done when an image has come.
#[derive(Debug)]
pub enum Later {
    /// What `neap deploy` waits for.
    Deploy { file: String, manifest: String, reply: Reply<Result<Deployed, DeployError>> },
    /// functions_dir, and what could not run.
    Look(Reference),
    /// A layer was found damaged.
    Damaged,
}

/// Why an image that a function needs has not come, and when to ask again.
struct NotPulled {
    error: DeployError,
    again_in: Duration,
}

impl From<DeployError> for NotPulled {
    fn from(error: DeployError) -> Self {
        Self { error, again_in: REFUSED_PAUSE }
    }
}

impl Deployer {
    /// The image that this manifest needs from a registry before it can be deployed. Mistakes in
    /// it are `deploy`'s to report.
    pub(super) fn to_pull(&self, file: &str, text: &str) -> Option<Reference> {
        let manifest = config::manifest::parse(file, text, &self.config.get()).ok()?;
        let owned = self.routes.get().functions.get(&manifest.name).is_some_and(|d| d.file.is_some());
        // Or its record can't be read any more, which a pull mends.
        let missing = || self.images.find(manifest.image.as_str()).is_err();
        let pull = match manifest.pull {
            Pull::Never => false,
            Pull::Missing => missing(),
            Pull::Always => true,
        };
        (pull && !owned).then_some(manifest.image)
    }

    /// Pulls, then deploys; ends when the one who asked leaves.
    pub(super) fn deploy_when_pulled(
        self: &Arc<Self>,
        image: Reference,
        file: String,
        manifest: String,
        reply: Reply<Result<Deployed, DeployError>>,
    ) {
        let this = self.clone();
        let waiting = reply.clone();
        let task = async move {
            let left = async {
                waiting.closed().await;
                None
            };
            match future::or(async { Some(this.pulled(&image, Patience::Bounded).await) }, left).await {
                Some(Ok(())) => {
                    let _ = this.waiting.later.0.send(Later::Deploy { file, manifest, reply }).await;
                }
                Some(Err(not_pulled)) => {
                    let _ = reply.try_send(Err(not_pulled.error));
                }
                None => {}
            }
        };
        self.executor.spawn(task).detach();
    }

    /// Waits for an image; makes room once if that is what it lacks.
    async fn pulled(&self, image: &Reference, patience: Patience) -> Result<(), NotPulled> {
        let told = |error: &ImageError| {
            let again_in = if matches!(error, ImageError::Deadly(_)) { DEADLY_PAUSE } else { REFUSED_PAUSE };
            let error = DeployError::NotPulled(image.to_string(), crate::errors::chain(error));
            NotPulled { error, again_in }
        };
        for again in [true, false] {
            let mut pull = self.images.pull(image, patience).map_err(|error| told(&error))?;
            let error = match pull.done().await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            drop(pull);
            match &*error {
                ImageError::NoSpace { missing_bytes, .. } if again => {
                    let _turn = self.turns.take().await;
                    let needed = self.images_needed().await?;
                    if !self.images.gc_for(&needed, *missing_bytes, image).map_err(failed)? {
                        return Err(told(&error));
                    }
                }
                error => return Err(told(error)),
            }
        }
        Err(DeployError::NotPulled(image.to_string(), "there is no room for it".to_owned()).into())
    }

    /// What functions need and the node lacks: asked for until it is here or not needed.
    pub(super) fn want(self: &Arc<Self>, images: BTreeSet<Reference>) {
        let mut wanted = self.waiting.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.retain(|image, _| images.contains(image));
        self.images.keep_parts_of(&images);
        for image in images {
            if wanted.contains_key(&image) {
                continue;
            }
            let (this, name) = (Arc::downgrade(self), image.clone());
            let task = self.executor.spawn(async move {
                loop {
                    // Weak: the task is the deployer's, and must not keep it.
                    let Some(deployer) = this.upgrade() else { return };
                    let again_in = match deployer.pulled(&name, Patience::Endless).await {
                        Ok(()) => {
                            let _ = deployer.waiting.later.0.send(Later::Look(name)).await;
                            return;
                        }
                        Err(NotPulled { error, again_in }) => {
                            let again_s = again_in.as_secs();
                            tracing::warn!(image = %name, %error, again_s, "a function waits for its image");
                            again_in
                        }
                    };
                    drop(deployer);
                    Timer::after(again_in).await;
                }
            });
            wanted.insert(image, task);
        }
    }

    /// Images of functions that can't run for want of them.
    pub(super) fn lacking(&self) -> BTreeSet<Reference> {
        let routes = self.routes.get();
        let unusable = routes.functions.values().filter(|deployment| deployment.unusable.is_some());
        let lacks = |manifest: &Manifest, digest: &Digest| {
            manifest.pull != Pull::Never && self.images.find(digest.as_str()).is_err()
        };
        let damaged = self.images.damaged().unwrap_or_default();
        let broken = routes.functions.values().filter(|d| {
            d.revision.manifest.pull != Pull::Never && self.images.is_damaged(&d.revision.image, &damaged)
        });
        unusable
            .filter(|d| lacks(&d.revision.manifest, &d.revision.image))
            .chain(broken)
            .map(|d| d.revision.manifest.image.at(&d.revision.image))
            .collect()
    }

    /// Images that must stay: of current revisions, of those to go back to, of what still runs.
    pub(super) async fn images_needed(&self) -> Result<HashSet<Digest>, DeployError> {
        let mut needed: HashSet<Digest> =
            self.routes.get().functions.values().map(|d| d.revision.image.clone()).collect();
        let pinned = self.store.images_pinned().await.map_err(failed)?;
        needed.extend(pinned.iter().filter_map(|digest| Digest::parse(digest).ok()));
        let prepared: HashSet<String> = self.runtime.prepared().into_iter().collect();
        let mut roots = self.waiting.roots.lock().unwrap_or_else(PoisonError::into_inner);
        roots.retain(|key, _| prepared.contains(key));
        needed.extend(roots.values().cloned());
        Ok(needed)
    }

    /// By the disk's fill and the images' age, as `[images]` says.
    pub(super) async fn collect_by_watermark(&self) {
        let _turn = self.turns.take().await;
        let needed = match self.images_needed().await {
            Ok(needed) => needed,
            Err(error) => return tracing::warn!(error = crate::errors::chain(&error), "collect images"),
        };
        let (images, now) = (self.images.clone(), self.clock.wall());
        match smol::unblock(move || images.gc_by_watermark(&needed, now)).await {
            Ok(Some(collected)) if !collected.images.is_empty() => {
                let count = collected.images.len();
                tracing::info!(images = count, bytes = collected.bytes, "images removed, as [images] says");
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(error = crate::errors::chain(&error), "collect images"),
        }
    }

    pub(super) fn configure_images(&self, config: &Config) {
        self.images.configure(&config.images, &config.trust);
    }
}
