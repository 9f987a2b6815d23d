//! Back to the revision before: when somebody says so, or when a new revision fails its first
//! events (`rollback = "auto"`). Works offline: both revisions' images stay on the node.
//!
//! A rollback is a new revision with the old content, so numbers only go up; it is on trial
//! no more than what it repeats, so two bad revisions don't swap places for ever. A function of
//! functions_dir can be rolled back, too: its file then is what was refused, and is not deployed
//! again until it, or the image that its tag means, is another.

use super::switch::{check_beside_others, put_up};
use super::{Ahead, Deployer, failed, invalid};
use crate::channels::{DeployError, Deployed, Verdict};
use crate::config;
use crate::image::ImageError;
use crate::model::function::Rollback;
use crate::model::{Digest, FunctionName, Revision};
use crate::store::{History, StoreError};

impl Deployer {
    pub(super) async fn roll_back(&self, name: &FunctionName, reason: &str) -> Result<Deployed, DeployError> {
        let _held = self.turns.hold(name).await;
        self.roll_back_held(name, reason).await
    }

    async fn roll_back_held(&self, name: &FunctionName, reason: &str) -> Result<Deployed, DeployError> {
        let _turn = self.turns.take().await;
        let config = self.config.get();
        let routes = self.routes.get();
        let current = routes.functions.get(name).ok_or_else(|| DeployError::Unknown(name.clone()))?;
        let history = self.store.history(name.clone()).await.map_err(failed)?;
        let before = history.previous.ok_or_else(|| DeployError::NothingBefore(name.clone()))?;
        let shown = format!("revision {} of `{name}`", before.number);
        let manifest = config::manifest::parse(&shown, &before.manifest, &config).map_err(invalid)?;
        check_beside_others(&shown, &manifest, &routes)?;
        let image = Digest::parse(&before.image).map_err(failed)?;
        let found = self.images.find(image.as_str()).map_err(|_| DeployError::NoImage(image.to_string()))?;
        // A key that was withdrawn is withdrawn from what is old, too.
        self.images.check_trust(&manifest.image, &image).map_err(|error| match error {
            ImageError::Refused(text) => DeployError::Invalid(vec![format!("{shown}: {text}")]),
            other => failed(other),
        })?;
        let next = self.store.next_revision(name.clone(), before.manifest.clone(), before.image.clone());
        let (number, uid_base) = next.await.map_err(failed)?;
        let revision = Revision { number, manifest, image, uid_base };
        let proven = self.prove(&revision, &found, Ahead::Parked).await;
        let mut ready = Vec::new();
        let stored = match proven {
            Ok(made) => {
                ready = made;
                self.store.roll_back(name.clone(), reason.to_owned()).await.map_err(|error| match error {
                    StoreError::NotFound => DeployError::NothingBefore(name.clone()),
                    other => failed(other),
                })
            }
            Err(error) => Err(error),
        };
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => {
                drop(ready);
                self.instances.retire(&revision);
                return Err(error);
            }
        };
        let from = current.revision.number;
        let (deployed, deployment) = put_up(revision, stored);
        let mut functions = routes.functions.clone();
        self.stock.put(name.clone(), number, ready);
        functions.insert(name.clone(), deployment);
        self.trials.end(name);
        self.publish(&config, functions);
        tracing::warn!(function = name.as_str(), from, to = before.number, reason, "rolled back");
        Ok(deployed)
    }

    /// A revision that runs from now on is on trial when there is one to go back to.
    pub(super) async fn begin_trial(&self, revision: &Revision) {
        let name = revision.name().clone();
        let history = self.store.history(name.clone()).await;
        let on_trial = |history: &History| {
            revision.manifest.rollback == Rollback::Auto && history.previous.is_some() && !history.proven
        };
        match history {
            Ok(history) if on_trial(&history) => self.trials.begin(name, revision.number),
            Ok(_) => self.trials.end(&name),
            Err(error) => {
                tracing::warn!(function = name.as_str(), error = crate::errors::chain(&error), "no trial");
            }
        }
    }

    pub(super) async fn take_verdict(&self, name: FunctionName, number: u32, verdict: Verdict) {
        let _held = self.turns.hold(&name).await;
        let routes = self.routes.get();
        let now = routes.functions.get(&name).filter(|now| now.revision.number == number);
        let Some(now) = now else { return }; // another was deployed meanwhile
        let done = match verdict {
            Verdict::Proven => self.store.mark_proven(name.clone(), number).await.map_err(failed).map(drop),
            Verdict::Failed(why) => self.roll_back_held(&name, &why).await.map(drop),
        };
        if let Err(error) = done {
            let error = crate::errors::chain(&error);
            tracing::error!(function = name.as_str(), revision = number, error, "the trial's end");
            // Tried again when as many events have said the same.
            self.begin_trial(&now.revision).await;
        }
    }

    /// Why a file's content is not deployed again: it was rolled back, and nothing is new.
    pub(super) async fn refused_before(
        &self,
        name: &FunctionName,
        text: &str,
        image: &Digest,
    ) -> Result<Option<String>, DeployError> {
        let history = self.store.history(name.clone()).await.map_err(failed)?;
        let Some(((from, why), before)) = history.rolled_back.zip(history.previous) else { return Ok(None) };
        let same = before.number == from && before.manifest == text && before.image == image.as_str();
        Ok(same.then(|| {
            format!("revision {from} of `{name}` was rolled back ({why}); change this file, or its image, to deploy it again")
        }))
    }
}
