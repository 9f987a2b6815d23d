//! How a deployed function stands: whether this node can run its revision now, and if not, why.
//! One that can't still takes in its events, and is looked at again: after a reload, after an
//! image came, every half minute.

use super::Deployer;
use super::ahead::root;
use crate::config::{self, Config};
use crate::image::Image;
use crate::ingress::routes::Deployment;
use crate::instance::platform;
use crate::model::function::{Output, Platform, Trigger};
use crate::model::{Digest, FunctionName, Manifest, Revision, Target};
use crate::store::StoredFunction;
use std::collections::BTreeMap;
use std::sync::Arc;

impl Deployer {
    /// A stored function as a deployment; unusable ones too, so that their events are taken in
    /// and wait. Lines when not even its manifest can be read.
    pub(super) async fn deployment(
        &self,
        config: &Config,
        stored: StoredFunction,
    ) -> Result<Deployment, Vec<String>> {
        let shown = stored
            .file
            .as_ref()
            .map_or_else(|| format!("function `{}`", stored.name), |file| file.display().to_string());
        let lines =
            |problems: Vec<config::Problem>| problems.iter().map(|p| p.to_string()).collect::<Vec<_>>();
        // Perhaps deployed under another configuration, one with an uplink for example: what
        // arrives for it is still taken in, and waits.
        let text = &stored.revision.manifest;
        let image = Digest::parse(&stored.revision.image).map_err(|bad| vec![format!("{shown}: {bad}")])?;
        let guess = self.images.find(image.as_str()).map_or(Platform::None, |image| guess(&image));
        let manifest = config::manifest::parse_for(&shown, text, config, guess)
            .or_else(|_| config::manifest::parse_for(&shown, text, &config.permissive(), guess))
            .map_err(lines)?;
        let revision =
            Revision { number: stored.revision.number, manifest, image, uid_base: stored.uid_base };
        let unusable = self.make_usable(config, &revision).await.err();
        Ok(Deployment {
            revision: Arc::new(revision),
            paused: stored.paused,
            file: stored.file,
            created: stored.revision.created,
            unusable,
        })
    }

    /// Mounts its root, if this node has all that it needs; else why not.
    pub(super) async fn make_usable(&self, config: &Config, revision: &Revision) -> Result<(), String> {
        if let Some(misfit) = misfit(config, &revision.manifest) {
            return Err(misfit.to_owned());
        }
        let image =
            self.images.find(revision.image.as_str()).map_err(|error| crate::errors::chain(&error))?;
        let root = root(revision, &image).map_err(|error| crate::errors::chain(&error))?;
        self.note_root(revision);
        self.runtime.prepare(root).await.map_err(|error| crate::errors::chain(&error))
    }

    pub(super) async fn retry_unusable(&self) {
        let _turn = self.turns.take().await;
        let config = self.config.get();
        let functions = self.refreshed(&config).await;
        let old = self.routes.get();
        let changed = |(name, deployment): (&FunctionName, &Deployment)| {
            old.functions.get(name).is_none_or(|old| old.unusable != deployment.unusable)
        };
        if functions.iter().any(changed) {
            self.publish(&config, functions);
        }
    }

    /// What is deployed, looked at again by who has the turn: whether it fits the configuration, and whether what
    /// could not run now can.
    pub(super) async fn refreshed(&self, config: &Config) -> BTreeMap<FunctionName, Deployment> {
        let mut functions = self.routes.get().functions.clone();
        let stored = self.store.functions().await.unwrap_or_default();
        for deployment in functions.values_mut() {
            let fits = misfit(config, &deployment.revision.manifest).is_none();
            if !fits || deployment.unusable.is_some() {
                self.look_again(config, deployment, &stored).await;
            }
        }
        functions
    }

    /// With an image that wasn't there before, it may turn out to be made for another platform.
    async fn look_again(&self, config: &Config, deployment: &mut Deployment, stored: &[StoredFunction]) {
        let number = deployment.revision.number;
        let own =
            stored.iter().find(|s| s.name == *deployment.revision.name() && s.revision.number == number);
        if let Some(stored) = own
            && let Ok(again) = self.deployment(config, stored.clone()).await
        {
            *deployment = Deployment { paused: deployment.paused, ..again };
        } else {
            deployment.unusable = self.make_usable(config, &deployment.revision).await.err();
        }
    }
}

/// The platform that an image was made for, where it tells.
pub(super) fn guess(image: &Image) -> Platform {
    platform::guess(&platform::Looks {
        entrypoint: &image.config.entrypoint,
        cmd: &image.config.cmd,
        env: &image.config.env,
        labels: &image.config.labels,
    })
}

/// What the manifest needs and the configuration lacks.
fn misfit(config: &Config, manifest: &Manifest) -> Option<&'static str> {
    let from = |target| manifest.triggers.iter().any(|t| matches!(t, Trigger::Mqtt(m) if m.from == target));
    let local = manifest.outputs.iter().any(|output| matches!(output, Output::Local { .. }));
    let uplink = manifest.outputs.iter().any(|output| matches!(output, Output::Uplink { .. }));
    let token = manifest.triggers.iter().any(|t| matches!(t, Trigger::Http(http) if http.token));
    match () {
        () if config.mqtt.is_none() && (local || from(Target::Local)) => {
            Some("the configuration has no [mqtt]")
        }
        () if config.uplink.is_none() && (uplink || from(Target::Uplink)) => {
            Some("the configuration has no [uplink]")
        }
        () if config.http.token_file.is_none() && token => Some("the configuration has no [http] token_file"),
        () if manifest.permissions.node_volumes.iter().any(|v| !config.node.mounts.contains(&v.within)) => {
            Some("the configuration's node.mounts no longer names what its volume.from is in")
        }
        () => None,
    }
}
