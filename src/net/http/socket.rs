//! A socket that isn't asked twice: hyper looks for something to read each time that anything
//! about its connection happens, and async-io answers each look with a system call. This one
//! remembers that there was nothing, and looks again when the reactor has said so.
//!
//! A read that did not fill its buffer has taken all there was: what comes later is an event of
//! its own, as the reactor asks the kernel anew (level-triggered, one at a time).

use smol::Async;
use smol::io::{AsyncRead, AsyncWrite};
use std::io::{self, IoSlice, Read, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

pub(super) struct Socket<T> {
    socket: Arc<Async<T>>,
    /// Nothing to read, when last looked.
    empty: bool,
    /// No room to write to, when last tried.
    full: bool,
}

impl<T> Socket<T> {
    pub fn new(socket: impl Into<Arc<Async<T>>>) -> Self {
        Self { socket: socket.into(), empty: false, full: false }
    }

    fn poll_write_with(
        &mut self,
        cx: &mut Context<'_>,
        write: impl Fn(&T) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if self.full {
                ready!(self.socket.poll_writable(cx))?;
                self.full = false;
            }
            match write(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.full = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

impl<T> AsyncRead for Socket<T>
where
    for<'a> &'a T: Read,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        loop {
            if this.empty {
                ready!(this.socket.poll_readable(cx))?;
                this.empty = false;
            }
            match this.socket.get_ref().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => this.empty = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(amount) => {
                    this.empty = amount > 0 && amount < buffer.len();
                    return Poll::Ready(Ok(amount));
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl<T> AsyncWrite for Socket<T>
where
    for<'a> &'a T: Write,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_with(cx, |mut socket| socket.write(buffer))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_with(cx, |mut socket| socket.write_vectored(buffers))
    }

    /// A socket holds nothing back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// What closes is the last handle's drop; who wants to say it earlier shuts the socket down.
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
