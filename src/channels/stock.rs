//! Instances that a deploy made before its switch: `deploy` puts them here just before it publishes
//! the revision, and the scheduler takes them when it sees it. So the first event finds a fixed
//! `scale.min` full, and a revision that can't be made so often never gets an event.
//!
//! What is here is of one revision of each function at most. One that the scheduler never saw (the
//! next came at once) is dropped when the next is put or taken.

use super::Parked;
use crate::model::FunctionName;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Clone, Default)]
pub struct Stock(Arc<Mutex<Shelves>>);

type Shelves = BTreeMap<FunctionName, (u32, Vec<Box<dyn Parked>>)>;

impl Stock {
    /// For this revision, which is published next.
    pub fn put(&self, name: FunctionName, revision: u32, made: Vec<Box<dyn Parked>>) {
        let old = match made.is_empty() {
            true => self.shelves().remove(&name),
            false => self.shelves().insert(name, (revision, made)),
        };
        drop(old); // removes instances, so not under the lock
    }

    /// What was made for this revision; what was made for another is dropped.
    pub fn take(&self, name: &FunctionName, revision: u32) -> Vec<Box<dyn Parked>> {
        let taken = self.shelves().remove(name);
        taken.filter(|(of, _)| *of == revision).map(|(_, made)| made).unwrap_or_default()
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        // A map that is changed in one step: a panic elsewhere leaves it right.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
