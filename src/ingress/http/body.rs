//! Request bodies, read whole within bounds: an event's data is handed on in one piece.

use super::problem::Refusal;
use http_types::StatusCode;
use smol::Timer;
use smol::future::FutureExt;
use smol::io::AsyncReadExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A sender that says nothing for this long in the middle of a body is gone.
const IDLE_LIMIT: Duration = Duration::from_secs(30);
/// A whole body: a sender that drips must not hold one of few connections for ever.
const WHOLE_LIMIT: Duration = Duration::from_secs(300);
/// Of all bodies that are being read or whose functions run: a gateway's memory is small and
/// 160 connections could each bring `limits.payload`. What does not fit is asked to come again.
const ALL_BYTES_MAX: u64 = 32 << 20;
const PIECE_BYTES: usize = 16 * 1024;

/// The room that all bodies share.
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
    fn grow(&mut self, bytes: u64) -> Result<(), Refusal> {
        let before = self.room.0.fetch_add(bytes, Ordering::Relaxed);
        self.taken += bytes;
        // A single body may be larger than the room if its function allows that.
        let alone = before + bytes == self.taken;
        if before + bytes > ALL_BYTES_MAX && !alone {
            return Err(Refusal::busy("too many request bodies at once"));
        }
        Ok(())
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
        let body = request.take_body();
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
                place.grow(amount as u64)?;
                bytes.extend_from_slice(&piece[..amount]);
            }
        };
        let bytes = within(WHOLE_LIMIT, read).await?;
        Ok(Bounded { bytes, place })
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

        assert!(first.grow(ALL_BYTES_MAX + 1).is_ok(), "alone it may be as large as its function allows");
        assert!(second.grow(1).is_err());
        drop(first);

        assert!(second.grow(1).is_ok());
        drop(second);
        assert_eq!(room.0.load(Ordering::Relaxed), 0);
    }
}
