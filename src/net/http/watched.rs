//! A connection's socket under a clock, because hyper's one timeout (for headers) also runs
//! while a kept-alive connection is idle and none guards its writes.
//!
//! ```text
//! Fresh ──first byte──▶ Head ──request read──▶ Busy ──answer handed over──▶ Idle ─┐
//!                        ▲                                                        │
//!                        └────────────────────first byte──────────────────────────┘
//! ```
//!
//! `Fresh`, `Head` and `Idle` have limits; while `Busy` the application decides how long.

use smol::Timer;
use smol::io::{AsyncRead, AsyncWrite};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

/// A connection that never says anything holds one of few places.
const FRESH_LIMIT: Duration = Duration::from_secs(10);
/// From a request's first byte to the end of its headers: ample over a bad radio link, short
/// for somebody who drips.
const HEAD_LIMIT: Duration = Duration::from_secs(10);
/// What nginx gives a kept-alive connection.
const IDLE_LIMIT: Duration = Duration::from_secs(75);
/// A client that stopped reading.
const WRITE_LIMIT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Phase {
    Fresh = 0,
    Head = 1,
    Busy = 2,
    Idle = 3,
}

/// A phase, and above its two bits the count of changes: `Idle` after `Idle` is a new wait.
#[derive(Clone, Default)]
pub(super) struct Phases(Arc<AtomicU64>);

impl Phases {
    pub(super) fn get(&self) -> Phase {
        match self.0.load(Ordering::Relaxed) & 3 {
            0 => Phase::Fresh,
            1 => Phase::Head,
            2 => Phase::Busy,
            _ => Phase::Idle,
        }
    }

    fn set(&self, phase: Phase) {
        let changes = (self.0.load(Ordering::Relaxed) >> 2) + 1;
        self.0.store(changes << 2 | phase as u64, Ordering::Relaxed);
    }

    /// Busy until the guard goes.
    pub(super) fn busy(&self) -> Busy {
        self.set(Phase::Busy);
        Busy(self.clone())
    }
}

pub(super) struct Busy(Phases);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(Phase::Idle);
    }
}

pub(super) struct Watched<S> {
    socket: S,
    phases: Phases,
    /// The phase, with its count, that the read timer was set for.
    armed: Option<u64>,
    read_timer: Timer,
    write_timer: Option<Timer>,
}

impl<S> Watched<S> {
    pub(super) fn new(socket: S, phases: Phases) -> Self {
        Self { socket, phases, armed: None, read_timer: Timer::never(), write_timer: None }
    }

    fn arm(&mut self) {
        let now = self.phases.0.load(Ordering::Relaxed);
        if self.armed == Some(now) {
            return;
        }
        self.armed = Some(now);
        match self.phases.get() {
            Phase::Fresh => self.read_timer.set_after(FRESH_LIMIT),
            Phase::Head => self.read_timer.set_after(HEAD_LIMIT),
            Phase::Idle => self.read_timer.set_after(IDLE_LIMIT),
            Phase::Busy => self.read_timer = Timer::never(),
        }
    }

    fn watch_write<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.write_timer = None;
            return polled;
        }
        let timer = self.write_timer.get_or_insert_with(|| Timer::after(WRITE_LIMIT));
        match Pin::new(timer).poll(cx) {
            Poll::Ready(_) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match Pin::new(&mut this.socket).poll_read(cx, buffer) {
            Poll::Ready(Ok(amount)) => {
                if amount > 0 && matches!(this.phases.get(), Phase::Fresh | Phase::Idle) {
                    this.phases.set(Phase::Head);
                    this.arm();
                }
                Poll::Ready(Ok(amount))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                this.arm();
                match Pin::new(&mut this.read_timer).poll(cx) {
                    Poll::Ready(_) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_write(cx, buffer);
        this.watch_write(cx, polled)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_write_vectored(cx, buffers);
        this.watch_write(cx, polled)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_flush(cx);
        this.watch_write(cx, polled)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_close(cx);
        this.watch_write(cx, polled)
    }
}
