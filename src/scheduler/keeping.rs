//! `scale.min` of handlers that stay up: how many instances each function is told to keep ready.
//! Level-triggered; whoever owns the instances starts, freezes and replaces them.
//!
//! A started instance takes its whole memory limit. So none is asked for where that has no room,
//! while memory is short or while the daemon stops; what is there stays, and goes when somebody
//! needs its memory.

use super::plan::Plan;
use super::pool::Bounds;
use crate::channels::Instances;
use crate::ingress::routes::Routes;
use crate::model::function::ScaleMin;
use std::collections::BTreeMap;

#[derive(Debug, Default)]
pub struct Keeping {
    /// What was told last, by `Revision::key`; of current revisions only.
    told: BTreeMap<String, u32>,
}

impl Keeping {
    pub fn act(&mut self, instances: &dyn Instances, routes: &Routes, plan: &Plan, bounds: Bounds) {
        let mut room_bytes = bounds.room_bytes;
        let mut told = BTreeMap::new();
        for (name, deployment) in &routes.functions {
            let revision = &deployment.revision;
            let manifest = &revision.manifest;
            let ScaleMin::Fixed(min) = manifest.scale.min else { continue };
            if !manifest.handler.stays_up() || min == 0 {
                continue;
            }
            let there = plan.kept(name);
            let fit = room_bytes / manifest.limits.memory_bytes.max(1);
            let more = if bounds.give_way { 0 } else { u32::try_from(fit).unwrap_or(u32::MAX) };
            let count = if deployment.runnable() { min.min(there.saturating_add(more)) } else { 0 };
            room_bytes -= u64::from(count.saturating_sub(there)) * manifest.limits.memory_bytes;
            let key = revision.key();
            if self.told.get(&key).copied().unwrap_or(0) != count {
                instances.keep(revision, count);
            }
            told.insert(key, count);
        }
        self.told = told;
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
