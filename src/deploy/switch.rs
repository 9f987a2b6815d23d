//! From a manifest's text to the revision that runs: checked, proven, made ready, stored, published.
//! What fails on the way changes nothing. The wait for the function's own code, if it is to be ready
//! before events reach it, is the one part of it that others need not wait for (`turns`).

use super::ahead::waits_for_code;
use super::standing::guess;
use super::{Ahead, Deployer, failed, invalid};
use crate::channels::{DeployError, Deployed, Parked};
use crate::config::{self, MemoryShare};
use crate::image::{Image, ImageError};
use crate::ingress::routes::{Deployment, Routes};
use crate::model::permissions::Network;
use crate::model::{Digest, Manifest, Reference, Revision};
use crate::runtime::Runtime;
use crate::secrets::Secrets;
use crate::store::StoredFunction;
use smol::lock::MutexGuard;
use std::path::Path;
use std::sync::Arc;

/// Where a manifest comes from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// As people know it.
    pub file: &'a str,
    pub text: &'a str,
    /// The file in functions_dir that the function belongs to.
    pub owner: Option<&'a Path>,
    /// The image, whatever its name means now.
    pub pinned: Option<&'a Digest>,
}

impl Deployer {
    pub(super) async fn deploy(&self, source: Source<'_>, ahead: Ahead) -> Result<Deployed, DeployError> {
        let config = self.config.get();
        let name = config::manifest::parse(source.file, source.text, &config).map_err(invalid)?.name;
        let _held = self.turns.hold(&name).await;
        self.deploy_held(source, ahead).await
    }

    /// Its function is held.
    pub(super) async fn deploy_held(
        &self,
        source: Source<'_>,
        ahead: Ahead,
    ) -> Result<Deployed, DeployError> {
        let Source { file, text, owner, pinned } = source;
        let mut turn = Some(self.turns.take().await);
        let manifest = self.admitted(source)?;
        let name = manifest.name.clone();
        let image = match pinned {
            Some(digest) => {
                let found = self.images.find(digest.as_str());
                found.map_err(|_| DeployError::NoImage(manifest.image.to_string()))?
            }
            None => self.find_image(&manifest.image)?,
        };
        let manifest = self.made_for(source, &image)?;
        self.look_for_volumes(source, &manifest).await?;
        let digest = image.digest.clone();
        if owner.is_some()
            && let Some(why) = self.refused_before(&name, text, &digest).await?
        {
            return Err(DeployError::Invalid(vec![format!("{file}:1: {why}")]));
        }
        let next = || self.store.next_revision(name.clone(), text.to_owned(), digest.to_string());
        let (number, uid_base) = next().await.map_err(failed)?;
        // Nobody changes the function meanwhile, but whether it can run.
        let routes = self.routes.get();
        let current = routes.functions.get(&name);
        let same = current.filter(|now| now.revision.manifest == manifest && now.revision.image == digest);
        if let Some(now) = same.filter(|now| now.unusable.is_none() && now.file.as_deref() == owner) {
            return Ok(Deployed {
                name: name.to_string(),
                revision: now.revision.number,
                image: digest.to_string(),
                changed: false,
                warnings: warnings(&now.revision.manifest).await,
            });
        }
        let revision = Revision { number, manifest, image: digest.clone(), uid_base };
        // The same revision again (its file moved, or it could not run before) keeps its root.
        let fresh = current.is_none_or(|now| now.revision.key() != revision.key());
        // One that is not fresh has its pool.
        let ahead = if fresh { ahead } else { Ahead::Nothing };
        let stored = async {
            let made = self.make_ready(source, &revision, &image, ahead, &mut turn).await?;
            if next().await.map_err(failed)? != (number, uid_base) {
                return Err(DeployError::Failed(format!(
                    "function `{name}` has changed meanwhile; try again"
                )));
            }
            let owner = owner.map(Path::to_owned);
            let stored = self.store.deploy(name.clone(), text.to_owned(), digest.to_string(), owner).await;
            Ok((stored.map_err(failed)?, made))
        };
        let (stored, made) = match stored.await {
            Ok(stored) => stored,
            Err(error) => {
                if fresh {
                    self.instances.retire(&revision);
                }
                return Err(error);
            }
        };
        debug_assert_eq!((stored.revision.number, stored.uid_base), (number, uid_base));
        let (mut deployed, deployment) = put_up(revision, stored);
        let revision = Arc::clone(&deployment.revision);
        // On trial before its first event.
        self.begin_trial(&deployment.revision).await;
        self.stock.put(name.clone(), number, made);
        let mut functions = self.routes.get().functions.clone();
        functions.insert(name, deployment);
        self.publish(&self.config.get(), functions);
        tracing::info!(function = deployed.name, revision = number, image = deployed.image, "deployed");
        deployed.warnings = warnings(&revision.manifest).await;
        for warning in &deployed.warnings {
            tracing::warn!(function = deployed.name, warning, "deployed, but may not work");
        }
        Ok(deployed)
    }

    /// All that is made of a revision before events reach it. The turn is given back while its code is
    /// waited for; then what it was admitted by may have changed.
    async fn make_ready<'a>(
        &'a self,
        source: Source<'_>,
        revision: &Revision,
        image: &Image,
        ahead: Ahead,
        turn: &mut Option<MutexGuard<'a, ()>>,
    ) -> Result<Vec<Box<dyn Parked>>, DeployError> {
        let made = self.prove(revision, image, ahead).await?;
        let in_use = self.instances.kept().get().contains_key(revision.name());
        if ahead == Ahead::Ready && waits_for_code(&revision.manifest, in_use) {
            *turn = None;
            self.warm(revision).await?;
            *turn = Some(self.turns.take().await);
            self.admitted(source)?;
            if self.made_for(source, image)? != revision.manifest {
                let name = revision.name();
                let what = format!("the configuration that function `{name}` goes by has changed meanwhile");
                return Err(DeployError::Failed(format!("{what}; deploy it again")));
            }
        }
        Ok(made)
    }

    /// What can be said of a manifest beside what is deployed now, without its image.
    fn admitted(&self, source: Source<'_>) -> Result<Manifest, DeployError> {
        let Source { file, text, owner, .. } = source;
        // Here a share of the memory is a size, and what would never fit is refused.
        let mut sized = (*self.config.get()).clone();
        sized.node.memory = MemoryShare::Bytes(self.budget_bytes);
        let manifest = config::manifest::parse(file, text, &sized).map_err(invalid)?;
        let routes = self.routes.get();
        let name = &manifest.name;
        match (routes.functions.get(name).map(|deployment| &deployment.file), owner) {
            (Some(Some(file)), None) => {
                return Err(DeployError::OwnedByFile { name: name.clone(), file: file.clone() });
            }
            (Some(None), Some(_)) => {
                return Err(DeployError::Invalid(vec![format!(
                    "{file}:1: function `{name}` was deployed with `neap deploy`; `neap rm {name}` first"
                )]));
            }
            (Some(Some(other)), Some(owner)) if other != owner && other.exists() => {
                let other = other.display();
                return Err(DeployError::Invalid(vec![format!(
                    "{file}:1: function `{name}` is already defined in {other}"
                )]));
            }
            _ => {}
        }
        check_beside_others(file, &manifest, &routes)?;
        Ok(manifest)
    }

    /// The manifest once more, now that the image says what it was made for.
    fn made_for(&self, source: Source<'_>, image: &Image) -> Result<Manifest, DeployError> {
        let Source { file, text, .. } = source;
        let manifest = config::manifest::parse_for(file, text, &self.config.get(), guess(image));
        let manifest = manifest.map_err(invalid)?;
        let problems = missing_secrets(&self.secrets, file, text, &manifest);
        if problems.is_empty() { Ok(manifest) } else { Err(invalid(problems)) }
    }

    /// Directories of the node that are not there, as mistakes of the manifest.
    async fn look_for_volumes(&self, source: Source<'_>, manifest: &Manifest) -> Result<(), DeployError> {
        let found = self.runtime.look_for(&manifest.permissions.node_volumes).await;
        found.map_err(|error| {
            let Source { file, text, .. } = source;
            let manifest_file = config::Deployable { file, text, manifest };
            invalid(vec![manifest_file.mistake("volume", crate::errors::chain(&error))])
        })
    }

    fn find_image(&self, reference: &Reference) -> Result<Image, DeployError> {
        self.images.find_trusted(reference).map_err(|error| match error {
            ImageError::NotFound(_) => DeployError::NoImage(reference.to_string()),
            ImageError::Refused(text) => DeployError::Invalid(vec![text]),
            other => failed(other),
        })
    }
}

/// What is on the node that keeps such a function from working.
async fn warnings(manifest: &Manifest) -> Vec<String> {
    match manifest.permissions.allow.network {
        Network::Egress => smol::unblock(Runtime::hindrances).await,
        _ => Vec::new(),
    }
}

/// A revision that was just stored: the answer, and what is published.
pub(super) fn put_up(revision: Revision, stored: StoredFunction) -> (Deployed, Deployment) {
    let deployed = Deployed {
        name: revision.name().to_string(),
        revision: revision.number,
        image: revision.image.to_string(),
        changed: true,
        warnings: Vec::new(),
    };
    let deployment = Deployment {
        revision: Arc::new(revision),
        paused: stored.paused,
        file: stored.file,
        created: stored.revision.created,
        unusable: None,
    };
    (deployed, deployment)
}

/// Together with what else is deployed.
pub(super) fn check_beside_others(file: &str, new: &Manifest, routes: &Routes) -> Result<(), DeployError> {
    let others = routes.functions.values().filter(|other| *other.revision.name() != new.name);
    let mut all: Vec<(String, Manifest)> = others
        .map(|other| {
            let file = other.file.as_ref().map(|file| file.display().to_string());
            let shown = file.unwrap_or_else(|| format!("function `{}`", other.revision.name()));
            (shown, other.revision.manifest.clone())
        })
        .collect();
    all.push((file.to_owned(), new.clone()));
    match config::check_together(&all) {
        problems if problems.is_empty() => Ok(()),
        problems => Err(invalid(problems)),
    }
}

/// Secrets that a manifest names and this node doesn't have, as mistakes of the manifest.
pub fn missing_secrets(
    secrets: &Secrets,
    file: &str,
    text: &str,
    manifest: &Manifest,
) -> Vec<config::Problem> {
    let manifest_file = config::Deployable { file, text, manifest };
    let missing = manifest.permissions.secrets.iter().filter_map(|name| secrets.check(name).err());
    let told = missing.map(|error| format!("secrets: {}", crate::errors::chain(&error)));
    told.map(|what| manifest_file.mistake("secrets", what)).collect()
}
