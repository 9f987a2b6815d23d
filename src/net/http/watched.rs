//! A connection under a clock, because hyper's one timeout (for headers) also runs while a
//! kept-alive connection is idle, and none guards its writes.
//!
//! ```text
//! Fresh ──first byte──▶ Head ──request read──▶ Busy ──answer handed over──▶ Idle ─┐
//!                        ▲                                                        │
//!                        └────────────────────first byte──────────────────────────┘
//! ```
//!
//! `Fresh`, `Head` and `Idle` have limits; while `Busy` the application decides how long. The
//! socket only notes what happens and when; the clock looks every few seconds, so that a
//! request costs no timer of its own. A limit is kept to within `Limits::tick`.

use smol::Timer;
use smol::io::{AsyncRead, AsyncWrite};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// How long a connection may take for what is not the application's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// A connection that never says anything holds one of few places.
    pub fresh: Duration,
    /// From a request's first byte to the end of its headers.
    pub head: Duration,
    pub idle: Duration,
    /// A client that stopped reading.
    pub write: Duration,
    pub tick: Duration,
}

impl Limits {
    pub(super) const SERVER: Self = Self {
        fresh: Duration::from_secs(10),
        // Ample over a bad radio link, short for somebody who drips.
        head: Duration::from_secs(10),
        // What nginx gives a kept-alive connection.
        idle: Duration::from_secs(75),
        write: Duration::from_secs(60),
        tick: Duration::from_secs(2),
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Phase {
    Fresh = 0,
    Head = 1,
    Busy = 2,
    Idle = 3,
}

/// What a connection is doing, and since when.
#[derive(Clone)]
pub(super) struct Phases(Arc<Notes>);

struct Notes {
    start: Instant,
    /// Milliseconds since `start` above the phase's two bits.
    phase: AtomicU64,
    /// Since when a write waits, in milliseconds since `start`, plus one; 0: none does.
    write: AtomicU64,
}

impl Phases {
    pub(super) fn new() -> Self {
        Self(Arc::new(Notes { start: Instant::now(), phase: AtomicU64::new(0), write: AtomicU64::new(0) }))
    }

    pub(super) fn get(&self) -> Phase {
        self.since().0
    }

    fn since(&self) -> (Phase, Duration) {
        let noted = self.0.phase.load(Ordering::Relaxed);
        let phase = match noted & 3 {
            0 => Phase::Fresh,
            1 => Phase::Head,
            2 => Phase::Busy,
            _ => Phase::Idle,
        };
        (phase, Duration::from_millis(noted >> 2))
    }

    fn set(&self, phase: Phase) {
        self.0.phase.store(self.now_ms() << 2 | phase as u64, Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        self.0.start.elapsed().as_millis() as u64
    }

    /// Busy until the guard goes.
    pub(super) fn busy(&self) -> Busy {
        self.set(Phase::Busy);
        Busy(self.clone())
    }

    /// Returns when a limit is passed: the connection is to be dropped.
    pub(super) async fn overdue(&self, limits: Limits) -> &'static str {
        loop {
            Timer::after(limits.tick).await;
            let now = Duration::from_millis(self.now_ms());
            let (phase, since) = self.since();
            let (limit, why) = match phase {
                Phase::Fresh => (limits.fresh, "it sent nothing"),
                Phase::Head => (limits.head, "its headers came too slowly"),
                Phase::Idle => (limits.idle, "it was idle"),
                Phase::Busy => (Duration::MAX, ""),
            };
            if now.saturating_sub(since) >= limit {
                return why;
            }
            let write = self.0.write.load(Ordering::Relaxed);
            if write != 0 && now.saturating_sub(Duration::from_millis(write - 1)) >= limits.write {
                return "it does not read its answer";
            }
        }
    }

    fn note_write<T>(&self, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        let waits = self.0.write.load(Ordering::Relaxed) != 0;
        if polled.is_pending() != waits {
            let since = if polled.is_pending() { self.now_ms() + 1 } else { 0 };
            self.0.write.store(since, Ordering::Relaxed);
        }
        polled
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
}

impl<S> Watched<S> {
    pub(super) fn new(socket: S, phases: Phases) -> Self {
        Self { socket, phases }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_read(cx, buffer);
        if let Poll::Ready(Ok(1..)) = polled
            && matches!(this.phases.get(), Phase::Fresh | Phase::Idle)
        {
            this.phases.set(Phase::Head);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.phases.note_write(Pin::new(&mut this.socket).poll_write(cx, buffer))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.phases.note_write(Pin::new(&mut this.socket).poll_write_vectored(cx, buffers))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Ready says nothing for a plain socket, whose flush does nothing: a write that waits
        // goes on waiting.
        let polled = Pin::new(&mut this.socket).poll_flush(cx);
        if polled.is_pending() { this.phases.note_write(polled) } else { polled }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.socket).poll_close(cx);
        if polled.is_pending() { this.phases.note_write(polled) } else { polled }
    }
}
