//! Limits that are hardly ever reached. A timer of the reactor's costs its thread's waking when
//! it is set, a dozen system calls for each request; here one timer stands for all of them, and
//! is set anew only for a limit that ends before the ones before it.

use crate::watch::Wake;
use futures_lite::future;
use smol::Timer;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub struct Deadlines {
    inner: Mutex<Inner>,
    /// One ends before `Inner::rings`.
    sooner: Wake,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: BTreeMap<(Instant, u64), Waker>,
    numbers: u64,
    /// When `drive` looks by itself.
    rings: Option<Instant>,
}

impl Deadlines {
    /// Ready so long from now, once `drive` runs.
    pub fn after(self: &Arc<Self>, limit: Duration) -> Deadline {
        let mut inner = self.lock();
        inner.numbers += 1;
        Deadline { at: Instant::now() + limit, number: inner.numbers, all: self.clone(), waits: false }
    }

    /// Wakes whom it is time for; never ends.
    pub async fn drive(&self) {
        loop {
            let sooner = self.sooner.listen();
            let next = self.ring();
            match next {
                None => sooner.await,
                Some(at) => {
                    let rings = async {
                        Timer::at(at).await;
                    };
                    future::or(sooner, rings).await;
                }
            }
        }
    }

    /// Returns when to look again.
    fn ring(&self) -> Option<Instant> {
        let mut inner = self.lock();
        let later = inner.waiting.split_off(&(Instant::now(), u64::MAX));
        let over = std::mem::replace(&mut inner.waiting, later);
        inner.rings = inner.waiting.first_key_value().map(|((at, _), _)| *at);
        let next = inner.rings;
        drop(inner);
        over.into_values().for_each(Waker::wake);
        next
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dropping it costs no waking either.
#[derive(Debug)]
pub struct Deadline {
    at: Instant,
    number: u64,
    all: Arc<Deadlines>,
    waits: bool,
}

impl Future for Deadline {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if Instant::now() >= this.at {
            return Poll::Ready(());
        }
        let mut inner = this.all.lock();
        inner.waiting.insert((this.at, this.number), cx.waker().clone());
        this.waits = true;
        let sooner = inner.rings.is_none_or(|rings| this.at < rings);
        if sooner {
            // Whoever comes until `drive` has looked needs not say it again.
            inner.rings = Some(this.at);
            drop(inner);
            this.all.sooner.wake();
        }
        Poll::Pending
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        if self.waits {
            self.all.lock().waiting.remove(&(self.at, self.number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(3600);

    fn waiting(deadlines: &Deadlines) -> usize {
        deadlines.lock().waiting.len()
    }

    #[test]
    fn shorter_limit_that_comes_later_ends_first() {
        let deadlines = Arc::new(Deadlines::default());
        let start = Instant::now();

        let limits = async {
            let long = deadlines.after(LONG);
            let short = async {
                // The timer is set for the long one by now.
                future::yield_now().await;
                deadlines.after(SHORT).await;
            };
            future::or(short, long).await;
        };
        smol::block_on(future::or(limits, deadlines.drive()));

        assert!(start.elapsed() >= SHORT && start.elapsed() < LONG / 2);
        assert_eq!(waiting(&deadlines), 0, "what is over or dropped is forgotten");
    }

    #[test]
    fn limit_that_was_dropped_leaves_the_others_in_place() {
        let deadlines = Arc::new(Deadlines::default());

        let limits = async {
            let gone = deadlines.after(SHORT / 2);
            future::or(gone, future::yield_now()).await;
            deadlines.after(SHORT * 2).await;
        };
        smol::block_on(future::or(limits, deadlines.drive()));

        assert_eq!(waiting(&deadlines), 0);
    }

    #[test]
    fn limits_behind_the_first_cost_no_waking() {
        let deadlines = Arc::new(Deadlines::default());
        let mut first = deadlines.after(LONG);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(Pin::new(&mut first).poll(&mut cx).is_pending());
        let rings = deadlines.ring();
        let sooner = deadlines.sooner.listen();

        let mut second = deadlines.after(LONG);
        assert!(Pin::new(&mut second).poll(&mut cx).is_pending());

        let told = smol::block_on(future::poll_once(sooner));
        assert_eq!((told, deadlines.ring()), (None, rings));
    }
}
