//! A connection from which nobody can read without end in one go.
//!
//! hyper reads on as long as there is something to read: a function that sends interim responses
//! (1xx) faster than they are parsed would keep the daemon's one thread from everybody else, its
//! own deadline included. After so many reads in a row this one says "not yet", and is asked
//! again when the others have had their turn.

use smol::io::{AsyncRead, AsyncWrite};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

/// hyper reads up to its buffer's 64 KiB at a time: a turn is a megabyte, less than a
/// millisecond.
const READS_IN_A_ROW: u32 = 16;

pub(super) struct Fair<S> {
    socket: S,
    reads: u32,
}

impl<S> Fair<S> {
    pub(super) fn new(socket: S) -> Self {
        Self { socket, reads: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Fair<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.reads >= READS_IN_A_ROW {
            this.reads = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = Pin::new(&mut this.socket).poll_read(cx, buffer);
        this.reads = if polled.is_ready() { this.reads + 1 } else { 0 };
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Fair<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write(cx, buffer)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().socket).poll_write_vectored(cx, buffers)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::http::{Passing, Upstream};
    use futures_lite::future;
    use std::time::Duration;

    /// Sends interim responses for ever, always ready.
    struct Hints;

    impl AsyncRead for Hints {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
            const HINT: &[u8] = b"HTTP/1.1 103 Early Hints\r\n\r\n";
            let whole = into.len() / HINT.len() * HINT.len();
            into[..whole].chunks_mut(HINT.len()).for_each(|hint| hint.copy_from_slice(HINT));
            Poll::Ready(Ok(whole))
        }
    }

    impl AsyncWrite for Hints {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(from.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn function_that_sends_hints_for_ever_does_not_keep_others_from_their_turn() {
        let executor = smol::Executor::new();
        let ask = async {
            let mut upstream = Upstream::over(Hints, &executor).await.expect("a handshake");
            let (method, target) = ("GET".to_owned(), "/".to_owned());
            let passing = Passing { method, target, headers: Vec::new(), body: Vec::new().into() };
            upstream.send(passing).await.map(drop).map_err(drop)
        };
        let late = async {
            smol::Timer::after(Duration::from_millis(50)).await;
            Err(())
        };

        let ended = smol::block_on(executor.run(future::or(ask, late)));

        assert_eq!(ended, Err(()), "its deadline, or hyper, has ended it");
    }
}
