//! Who may change what is deployed, and when.
//!
//! Whoever reads what is deployed and puts something else in its place has the turn meanwhile: all
//! that it takes is the disk and a container or two. A deploy that waits for its function's own
//! code gives the turn back for as long as that takes, so nobody waits for another's code; what it
//! had looked at, it looks at again. Only its own function is held: what else is to become of that
//! (another deploy, a removal, a rollback) comes after.
//!
//! A function is held before the turn is taken, never the other way round.

use crate::model::FunctionName;
use crate::watch::Wake;
use smol::lock::{Mutex, MutexGuard, Semaphore, SemaphoreGuardArc};
use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

/// Commands and what else there is to do, at once. More wait, as they came: each may hold a manifest.
const UNDER_WAY_MAX: usize = 32;

pub struct Turns {
    turn: Mutex<()>,
    held: std::sync::Mutex<BTreeSet<FunctionName>>,
    released: Wake,
    /// functions_dir is looked at by one at a time.
    pub(super) files: Mutex<()>,
    under_way: Arc<Semaphore>,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            turn: Mutex::new(()),
            held: std::sync::Mutex::default(),
            released: Wake::new(),
            files: Mutex::new(()),
            under_way: Arc::new(Semaphore::new(UNDER_WAY_MAX)),
        }
    }
}

/// A function that nobody else changes.
pub(super) struct Held<'a> {
    turns: &'a Turns,
    name: FunctionName,
}

impl Turns {
    pub(super) async fn hold(&self, name: &FunctionName) -> Held<'_> {
        loop {
            let released = self.released.listen();
            if self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone()) {
                return Held { turns: self, name: name.clone() };
            }
            released.await;
        }
    }

    pub(super) async fn take(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Room to begin something.
    pub(super) async fn room(&self) -> SemaphoreGuardArc {
        self.under_way.acquire_arc().await
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.turns.held.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
        self.turns.released.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::{block_on, poll_once};
    use std::pin::pin;

    #[test]
    fn a_function_is_held_by_one_and_others_are_free() {
        block_on(async {
            let turns = Turns::default();
            let [a, b] = ["a", "b"].map(|name| FunctionName::parse(name).expect("a name"));

            let held = turns.hold(&a).await;
            let mut second = pin!(turns.hold(&a));

            assert!(poll_once(second.as_mut()).await.is_none());
            assert!(poll_once(turns.hold(&b)).await.is_some());
            drop(held);
            assert!(poll_once(second).await.is_some());
        });
    }
}
