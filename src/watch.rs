//! A value with one writer and many readers, who can wait for the next change: configuration
//! and routes are published so. And `Wake`: "look again", nothing more.

use event_listener::Event;
use std::sync::{Arc, PoisonError, RwLock};

/// The current value of something; cloning the handle is cheap.
#[derive(Debug)]
pub struct Watch<T> {
    inner: Arc<Inner<T>>,
}

#[derive(Debug)]
struct Inner<T> {
    value: RwLock<(u64, Arc<T>)>,
    changed: Event,
}

impl<T> Clone for Watch<T> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<T> Watch<T> {
    pub fn new(value: T) -> Self {
        let inner = Inner { value: RwLock::new((0, Arc::new(value))), changed: Event::new() };
        Self { inner: Arc::new(inner) }
    }

    pub fn get(&self) -> Arc<T> {
        self.versioned().1
    }

    /// The value and its version, for `changed`.
    pub fn versioned(&self) -> (u64, Arc<T>) {
        let value = self.inner.value.read().unwrap_or_else(PoisonError::into_inner);
        (value.0, value.1.clone())
    }

    pub fn set(&self, new: T) {
        let mut value = self.inner.value.write().unwrap_or_else(PoisonError::into_inner);
        *value = (value.0 + 1, Arc::new(new));
        drop(value);
        self.inner.changed.notify(usize::MAX);
    }

    /// Waits until the version is another than `seen`; at once if it already is.
    pub async fn changed(&self, seen: u64) -> (u64, Arc<T>) {
        loop {
            let listener = self.inner.changed.listen();
            let (version, value) = self.versioned();
            if version != seen {
                return (version, value);
            }
            listener.await;
        }
    }
}

/// A signal to look again. Loops are level-triggered: they also look again by themselves after
/// a period, so that a lost wake costs time, never work.
#[derive(Clone, Debug, Default)]
pub struct Wake(Arc<Event>);

impl Wake {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn wake(&self) {
        self.0.notify(usize::MAX);
    }

    /// Register before looking, await after: no wake in between is lost.
    pub fn listen(&self) -> event_listener::EventListener {
        self.0.listen()
    }
}
