//! The layers' health: read again at times, and what becomes of what is damaged. A loop of its own,
//! so that it waits for no deploy and none for it.

use super::pull::Later;
use super::{Deployer, failed};
use crate::errors::chain;
use crate::model::Digest;
use smol::Timer;
use std::sync::Arc;

impl Deployer {
    /// Reads layers again when they are due, for ever; what is damaged is pulled again where a
    /// manifest allows.
    pub async fn watch_layers(self: Arc<Self>) {
        loop {
            Timer::after(self.images.check_period()).await;
            match self.images.check_due(self.clock.wall()).await {
                Ok(damaged) => {
                    for (layer, how) in &damaged {
                        tracing::error!(layer = layer.as_str(), how, "a layer on the disk is damaged");
                    }
                    if !damaged.is_empty() {
                        let _ = self.waiting.later.0.send(Later::Damaged).await;
                    }
                }
                Err(error) => tracing::warn!(error = chain(&error), "check layers"),
            }
        }
    }

    /// After a layer was put in another's place: roots made of the old one are made again.
    pub(super) async fn remake_roots(&self, image: &Digest) {
        let routes = self.routes.get();
        for deployment in routes.functions.values().filter(|d| d.revision.image == *image) {
            self.runtime.release(&deployment.revision.key()).await;
            let config = self.config.get();
            if let Err(why) = self.make_usable(&config, &deployment.revision).await {
                tracing::error!(function = deployment.revision.name().as_str(), why, "its repaired image");
            }
        }
    }

    /// What `neap status` says of layers that wait for repair.
    pub(super) fn damage(&self) -> Vec<String> {
        let damaged = self.images.damaged().map_err(failed);
        let line = |layer: &Digest| {
            format!("layer {} was changed on the disk; pull or import its image again", layer.short())
        };
        damaged.map(|layers| layers.iter().map(line).collect()).unwrap_or_default()
    }
}
