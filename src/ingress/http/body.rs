//! Bodies within bounds. A request's is read whole, for an event's data is handed on in one
//! piece; a function's output is held whole until its reader has taken it.

use super::problem::Refusal;
use http_types::StatusCode;
use smol::Timer;
use smol::future::FutureExt;
use smol::io::{AsyncBufRead, AsyncRead, AsyncReadExt, Cursor};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

/// A sender that says nothing for this long in the middle of a body is gone.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// A whole body: a sender that drips must not hold one of few connections for ever.
const WHOLE_LIMIT: Duration = Duration::from_secs(300);
/// Of all bodies in one room: a gateway's memory is small and 160 connections could each bring,
/// or leave unread, `limits.payload`. What does not fit is asked to come again.
const ALL_BYTES_MAX: u64 = 32 << 20;
/// Outputs up to this size take no room: the connections bound them (160 hold 10 MiB), and a few
/// slow readers of large outputs must not have every small answer refused.
const SMALL_OUTPUT_BYTES: usize = 64 * 1024;
const PIECE_BYTES: usize = 16 * 1024;

/// The room that bodies share: one for requests being read or run, one for outputs being sent.
/// They are two, so that unread outputs keep no request out.
#[derive(Clone, Default)]
pub struct Room(Arc<AtomicU64>);

/// A body and the room it takes, given back when this goes.
pub struct Bounded {
    pub bytes: Vec<u8>,
    pub place: Place,
}

/// The room that one body takes.
pub struct Place {
    room: Room,
    taken: u64,
}

impl Place {
    /// False: the room is full.
    #[must_use]
    fn grow(&mut self, bytes: u64) -> bool {
        let before = self.room.0.fetch_add(bytes, Ordering::Relaxed);
        self.taken += bytes;
        // A single body may be larger than the room if its function allows that.
        let alone = before + bytes == self.taken;
        before + bytes <= ALL_BYTES_MAX || alone
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.0.fetch_sub(self.taken, Ordering::Relaxed);
    }
}

impl Room {
    /// Reads a body of at most `bytes_max`; more than that is refused as soon as it is known,
    /// by its announced length or its first byte too many.
    pub async fn read<S>(&self, request: &mut tide::Request<S>, bytes_max: u64) -> Result<Bounded, Refusal> {
        // An empty body put in its place would bring a content type of its own, and the event
        // would say what its sender did not.
        let given = request.header("content-type").is_some();
        let body = request.take_body();
        if !given {
            request.remove_header("content-type");
        }
        let announced = body.len().map_or(0, |length| length as u64);
        if announced > bytes_max {
            return Err(Refusal::too_large(bytes_max));
        }
        let mut place = Place { room: self.clone(), taken: 0 };
        let mut reader = body.into_reader();
        let read = async {
            let mut bytes = Vec::new();
            let mut piece = [0; PIECE_BYTES];
            loop {
                let amount = within(IDLE_LIMIT, async { Ok(reader.read(&mut piece).await) }).await?;
                let amount = amount
                    .map_err(|_| Refusal::bad_request("the body ended too early or is framed wrongly"))?;
                if amount == 0 {
                    return Ok(bytes);
                }
                if (bytes.len() + amount) as u64 > bytes_max {
                    return Err(Refusal::too_large(bytes_max));
                }
                if bytes.is_empty() {
                    // What is announced may still never come: reserve for what did.
                    bytes.reserve(announced.min(PIECE_BYTES as u64 * 4) as usize);
                }
                if !place.grow(amount as u64) {
                    return Err(Refusal::busy("too many request bodies at once"));
                }
                bytes.extend_from_slice(&piece[..amount]);
            }
        };
        let bytes = within(WHOLE_LIMIT, read).await?;
        Ok(Bounded { bytes, place })
    }

    /// A response's body, which gives its room back once it is sent or dropped. Nothing else
    /// bounds it: the instance that made the output is gone and its place free for the next.
    pub fn hold(&self, output: Vec<u8>) -> Result<http_types::Body, Refusal> {
        let mut place = Place { room: self.clone(), taken: 0 };
        if output.len() > SMALL_OUTPUT_BYTES && !place.grow(output.capacity() as u64) {
            return Err(Refusal::busy(
                "the function ran, but its output has no room: too many outputs wait to be read",
            ));
        }
        let length = output.len();
        Ok(http_types::Body::from_reader(Held { output: Cursor::new(output), _place: place }, Some(length)))
    }
}

/// An output and the room it takes.
struct Held {
    output: Cursor<Vec<u8>>,
    _place: Place,
}

impl AsyncRead for Held {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.output).poll_read(cx, buffer)
    }
}

impl AsyncBufRead for Held {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Pin::new(&mut self.get_mut().output).poll_fill_buf(cx)
    }

    fn consume(mut self: Pin<&mut Self>, amount: usize) {
        Pin::new(&mut self.output).consume(amount);
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    let late = async {
        Timer::after(limit).await;
        Err(Refusal::new(StatusCode::RequestTimeout, "the body came too slowly"))
    };
    work.or(late).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_share_one_room() {
        let room = Room::default();
        let mut first = Place { room: room.clone(), taken: 0 };
        let mut second = Place { room: room.clone(), taken: 0 };

        assert!(first.grow(ALL_BYTES_MAX + 1), "alone it may be as large as its function allows");
        assert!(!second.grow(1));
        drop(first);

        assert!(second.grow(1));
        drop(second);
        assert_eq!(room.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn outputs_take_room_until_they_are_sent_or_dropped() {
        let room = Room::default();
        let whole = room.hold(vec![b'x'; ALL_BYTES_MAX as usize]).expect("the room is empty");

        assert!(room.hold(vec![b'x'; SMALL_OUTPUT_BYTES + 1]).is_err());
        let small = room.hold(b"small".to_vec()).expect("it needs no room");
        assert_eq!(smol::block_on(small.into_bytes()).expect("a body in memory"), b"small");
        drop(whole);

        let next = room.hold(vec![b'x'; SMALL_OUTPUT_BYTES + 1]).expect("the room is empty again");
        assert_eq!(
            smol::block_on(next.into_bytes()).expect("a body in memory").len(),
            SMALL_OUTPUT_BYTES + 1
        );
        assert_eq!(room.0.load(Ordering::Relaxed), 0);
    }
}
