//! Arrivals that keep their order when one finds no room.
//!
//! A smaller one behind it might still fit, and would overtake it. So a refusal closes the line:
//! what was sent behind it is refused too, until its sender begins again with the first.

use super::StoreError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Clone, Debug, Default)]
pub struct Line(Arc<AtomicBool>);

impl Line {
    /// Begins again. Only when nothing sent before is still to be answered.
    pub fn reopen(&self) {
        self.0.store(false, Ordering::Release);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// What can never be stored is no reason to wait.
    pub(super) fn refused(&self, error: &StoreError) {
        if !matches!(error, StoreError::TooLarge { .. } | StoreError::TooManyFunctions(_)) {
            self.0.store(true, Ordering::Release);
        }
    }
}
