//! `scale.min` of handlers that stay up: tells whoever owns the instances how many each function is
//! to have ready, as `warm` decides. Level-triggered; the owner starts, freezes and replaces them.

use super::plan::Plan;
use super::pool::Bounds;
use super::warm::{Look, Warm, Wish};
use crate::channels::Instances;
use crate::ingress::routes::{Deployment, Routes};
use crate::model::FunctionName;
use crate::model::function::ScaleMin;
use std::collections::BTreeMap;
use std::time::Duration;

/// Between looks when nothing else is known: the loop's own period is shorter.
const LONG: Duration = Duration::from_secs(3600);

#[derive(Debug, Default)]
pub struct Keeping {
    warm: Warm,
    /// What was told last, by `Revision::key`; of current revisions only.
    told: BTreeMap<String, u32>,
    /// From now.
    again: Option<Duration>,
}

impl Keeping {
    pub fn set_functions(&mut self, routes: &Routes) {
        let learned = routes.functions.iter().filter(|(_, deployment)| {
            let manifest = &deployment.revision.manifest;
            manifest.handler.stays_up() && manifest.scale.min == ScaleMin::Auto
        });
        self.warm.set_functions(learned.map(|(name, _)| name.clone()));
    }

    /// A request has come; so many of its function are served or wait now.
    pub fn arrived(&mut self, name: &FunctionName, now: Duration, at_once: impl FnOnce() -> u32) {
        if self.warm.learns(name) {
            self.warm.arrived(name, at_once(), now);
        }
    }

    pub fn act(
        &mut self,
        instances: &dyn Instances,
        routes: &Routes,
        plan: &Plan,
        bounds: Bounds,
        now: Duration,
    ) {
        let keeps = |deployment: &&Deployment| {
            let manifest = &deployment.revision.manifest;
            manifest.handler.stays_up() && manifest.scale.min != ScaleMin::Fixed(0)
        };
        let kept: Vec<&Deployment> = routes.functions.values().filter(keeps).collect();
        let wishes = kept.iter().copied().map(|deployment| {
            let (name, manifest) = (deployment.revision.name(), &deployment.revision.manifest);
            let wish = Wish {
                min: manifest.scale.min,
                max: manifest.scale.max,
                concurrency: manifest.serving.concurrency,
                memory_bytes: manifest.limits.memory_bytes,
                runnable: deployment.runnable(),
                there: plan.kept(name),
            };
            (name, wish)
        });
        let wishes: Vec<(&FunctionName, Wish)> = wishes.collect();
        let Look { counts, again } = self.warm.look(now, &wishes, bounds);
        self.again = again.map(|at| at.saturating_sub(now));
        let mut told = BTreeMap::new();
        for (deployment, count) in kept.into_iter().zip(counts) {
            let key = deployment.revision.key();
            if self.told.get(&key).copied().unwrap_or(0) != count {
                instances.keep(&deployment.revision, count);
            }
            told.insert(key, count);
        }
        self.told = told;
    }

    /// Until `act` should be asked again.
    pub fn pause(&self) -> Duration {
        self.again.unwrap_or(LONG)
    }
}

/// What to tell when so many can never all be there.
pub fn without_memory(routes: &Routes, budget_bytes: u64) -> Option<String> {
    let wanted = routes.functions.values().filter(|deployment| deployment.runnable());
    let bytes: u64 = wanted
        .filter(|deployment| deployment.revision.manifest.handler.stays_up())
        .map(|deployment| match deployment.revision.manifest.scale.min {
            ScaleMin::Fixed(min) => u64::from(min) * deployment.revision.manifest.limits.memory_bytes,
            ScaleMin::Auto => 0,
        })
        .sum();
    (bytes > budget_bytes).then(|| {
        let [asked, there] = [bytes, budget_bytes].map(crate::config::units::show_size);
        format!("scale.min of http and lambda functions asks for {asked} of [node] memory, which is {there}")
    })
}
