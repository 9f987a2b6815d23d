//! Reading ahead: a thread that reads (and so decompresses) while the one who asked writes files.
//! Of two cores both are used, and one core loses nothing.
//!
//! Memory is bounded: a few pieces that go around. Who stops to read ends the thread, at its next
//! piece.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

const PIECES: usize = 4;
const PIECE_BYTES: usize = 256 * 1024;

/// The stream, as the thread has read it.
pub struct Ahead {
    filled: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
}

/// Runs `work` on what `open` opens and a thread reads.
pub fn ahead<S: Read, T>(
    open: impl FnOnce() -> io::Result<S> + Send,
    work: impl FnOnce(Ahead) -> T,
) -> io::Result<T> {
    let (fill, filled) = sync_channel(PIECES);
    let (empty, emptied) = sync_channel(PIECES);
    for _ in 0..PIECES {
        let _ = empty.send(Vec::new()); // each gets its room when it is first filled
    }
    std::thread::scope(|scope| {
        let read = move || {
            let failed = open().and_then(|mut stream| pass(&mut stream, &emptied, &fill));
            if let Err(error) = failed {
                let _ = fill.send(Err(error)); // whoever asked may have gone
            }
        };
        std::thread::Builder::new()
            .name("neap-ahead".into())
            .stack_size(1 << 20)
            .spawn_scoped(scope, read)?;
        Ok(work(Ahead { filled, empty, piece: Vec::new(), at: 0, ended: false }))
    })
}

fn pass(
    stream: &mut impl Read,
    emptied: &Receiver<Vec<u8>>,
    fill: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    while let Ok(mut piece) = emptied.recv() {
        piece.resize(PIECE_BYTES, 0);
        let mut filled = 0;
        while filled < PIECE_BYTES {
            match stream.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(got) => filled += got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What came before it counts first: a tar may have ended there.
                Err(error) => {
                    piece.truncate(filled);
                    if filled > 0 {
                        let _ = fill.send(Ok(piece));
                    }
                    return Err(error);
                }
            }
        }
        piece.truncate(filled);
        let end = filled == 0;
        if fill.send(Ok(piece)).is_err() || end {
            break;
        }
    }
    Ok(())
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.piece.len() && !self.ended {
            let old = std::mem::take(&mut self.piece);
            if old.capacity() > 0 {
                let _ = self.empty.send(old); // there is room for all of them
            }
            self.at = 0;
            match self.filled.recv() {
                Ok(Ok(piece)) => {
                    self.ended = piece.is_empty();
                    self.piece = piece;
                }
                Ok(Err(error)) => return Err(error),
                // Asked again after an error: that is no end either.
                Err(_) => return Err(io::Error::other("the stream broke off before")),
            }
        }
        let got = buffer.len().min(self.piece.len() - self.at);
        buffer[..got].copy_from_slice(&self.piece[self.at..self.at + got]);
        self.at += got;
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_stream_arrives_in_its_order() {
        let content: Vec<u8> = (0..PIECE_BYTES * 9 + 77).map(|at| (at / 251) as u8).collect();

        let read = ahead(
            || Ok(&content[..]),
            |mut stream| {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).map(|_| all)
            },
        );

        assert!(read.expect("a thread").expect("reads") == content);
    }

    #[test]
    fn stream_that_breaks_off_never_looks_like_its_end() {
        struct Broken(usize);
        impl Read for Broken {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let got = self.0.min(buffer.len());
                self.0 -= got;
                if got == 0 { Err(io::ErrorKind::InvalidData.into()) } else { Ok(got) }
            }
        }
        for length in [0, 1, PIECE_BYTES, PIECE_BYTES + 1] {
            let mut all = Vec::new();
            let ends = ahead(
                || Ok(Broken(length)),
                |mut stream| (stream.read_to_end(&mut all), stream.read(&mut [0])),
            );

            let (first, again) = ends.expect("a thread");
            assert_eq!(first.expect_err("broke off").kind(), io::ErrorKind::InvalidData);
            assert!(again.is_err());
            assert_eq!(all.len(), length);
        }
    }

    #[test]
    fn who_stops_reading_ends_the_thread() {
        let ended = ahead(|| Ok(io::repeat(7)), |mut stream| stream.read(&mut [0; 16]));

        assert_eq!(ended.expect("a thread, which has ended").expect("reads"), 16);
    }
}
