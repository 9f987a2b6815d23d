//! The layers' health: read again at times, and what becomes of what is damaged. A loop of its own,
//! so that it waits for no deploy and none for it.

use super::pull::Later;
use super::{Deployer, failed};
use crate::errors::chain;
use crate::model::Digest;
use smol::Timer;
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

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
                        self.note_damaged(damaged.into_iter().map(|(layer, _)| layer));
                        let _ = self.waiting.later.0.send(Later::Damaged).await;
                    }
                }
                Err(error) => tracing::warn!(error = chain(&error), "check layers"),
            }
        }
    }

    pub(super) fn note_damaged(&self, layers: impl IntoIterator<Item = Digest>) {
        self.waiting.damaged.lock().unwrap_or_else(PoisonError::into_inner).extend(layers);
    }

    /// After an image came, in whatever way and under whatever name: of layers that it put in
    /// another's place, the roots are made again. The old layer is being removed under them.
    pub(super) async fn remake_roots(&self) {
        let _turn = self.turns.take().await;
        let Ok(still) = self.images.damaged() else { return };
        let repaired = self.take_repaired(&still);
        let routes = self.routes.get();
        let old = |image: &Digest| self.images.is_damaged(image, &repaired);
        for deployment in routes.functions.values().filter(|d| old(&d.revision.image)) {
            self.runtime.release(&deployment.revision.key()).await;
            let config = self.config.get();
            let name = deployment.revision.name().as_str();
            match self.make_usable(&config, &deployment.revision).await {
                Ok(()) => tracing::info!(function = name, "its image is repaired"),
                Err(why) => tracing::error!(function = name, why, "its repaired image"),
            }
        }
    }

    fn take_repaired(&self, still: &BTreeSet<Digest>) -> BTreeSet<Digest> {
        let mut known = self.waiting.damaged.lock().unwrap_or_else(PoisonError::into_inner);
        let repaired = known.difference(still).cloned().collect();
        known.retain(|layer| still.contains(layer));
        repaired
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
