//! A response body that is made while it is sent: the work runs whenever the body is asked for
//! more, so it needs no task of its own, waits when the client reads slowly, and ends, dropped,
//! when the client leaves.

use super::read_filled;
use smol::channel::{Receiver, Sender};
use smol::io::{AsyncBufRead, AsyncRead};
use smol::stream::Stream;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, ready};

/// Pieces that wait between the work and the wire.
const PIECES_MAX: usize = 16;

/// A body of unknown length (sent chunked). `work` gets the end to send pieces to; the body
/// ends when the work has ended and its pieces are sent.
pub fn produced<F, W>(work: F) -> http_types::Body
where
    F: FnOnce(Sender<Vec<u8>>) -> W,
    W: Future<Output = ()> + Send + 'static,
{
    let (sender, pieces) = smol::channel::bounded(PIECES_MAX);
    let work: Work = Box::pin(work(sender));
    let body = Produced { work: Mutex::new(Some(work)), pieces: Box::pin(pieces), piece: Vec::new(), at: 0 };
    http_types::Body::from_reader(body, None)
}

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Produced {
    /// In a mutex only because http_types wants bodies to be `Sync`; never locked twice.
    work: Mutex<Option<Work>>,
    pieces: Pin<Box<Receiver<Vec<u8>>>>,
    piece: Vec<u8>,
    at: usize,
}

impl AsyncBufRead for Produced {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        while this.at == this.piece.len() {
            let work = this.work.get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Some(running) = work
                && running.as_mut().poll(cx).is_ready()
            {
                *work = None;
            }
            match ready!(this.pieces.as_mut().poll_next(cx)) {
                Some(piece) => (this.piece, this.at) = (piece, 0),
                None => return Poll::Ready(Ok(&[])),
            }
        }
        Poll::Ready(Ok(&this.piece[this.at..]))
    }

    fn consume(self: Pin<&mut Self>, amount: usize) {
        let this = self.get_mut();
        this.at = (this.at + amount).min(this.piece.len());
    }
}

impl AsyncRead for Produced {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        read_filled(self, cx, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smol::io::AsyncReadExt;

    #[test]
    fn body_ends_when_its_work_has_ended() {
        smol::block_on(async {
            let body = produced(|pieces| async move {
                for n in 0..100u8 {
                    // more pieces than the channel holds
                    pieces.send(vec![n; 3]).await.expect("the body is read");
                }
            });

            let mut all = Vec::new();
            body.into_reader().read_to_end(&mut all).await.expect("a body in memory");

            assert_eq!(all.len(), 300);
            assert_eq!(all[297..], [99; 3]);
        });
    }
}
