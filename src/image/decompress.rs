//! gzip, zstd or plain, told apart by how the bytes begin: media types in the field are wrong
//! often enough (docker-save calls everything `layer.tar`), and containerd looks at the bytes too.
//!
//! Memory is bounded: 32 KiB for gzip, for zstd the frame's window of at most 128 MiB, which is
//! also the limit of `zstd -d`.

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, BufRead, BufReader, Cursor, Read};

const MAGIC_BYTES: usize = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// How `start`, the first bytes of a stream, is compressed. `Err`: in a way that is not taken.
pub fn detect(start: &[u8]) -> Result<Compression, &'static str> {
    match start {
        [0x1f, 0x8b, 0x08, ..] => Ok(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Compression::Zstd),
        // A skippable frame: pzstd begins with one.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Ok(Compression::Zstd),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Err("xz"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => Err("bzip2"),
        [b'P', b'K', 3, 4, ..] => Err("zip"),
        _ => Ok(Compression::Plain),
    }
}

/// The decompressed stream of `source`, and how it was compressed.
pub fn decompress<'a, R: Read + 'a>(mut source: R) -> io::Result<(Compression, Box<dyn Read + 'a>)> {
    let mut start = Vec::with_capacity(MAGIC_BYTES);
    source.by_ref().take(MAGIC_BYTES as u64).read_to_end(&mut start)?;
    let compression = detect(&start).map_err(|format| {
        let text = format!("compressed with {format}; neap takes gzip, zstd and plain");
        io::Error::new(io::ErrorKind::Unsupported, text)
    })?;
    let source = BufReader::with_capacity(64 * 1024, Cursor::new(start).chain(source));
    Ok((
        compression,
        match compression {
            Compression::Plain => Box::new(source),
            Compression::Gzip => Box::new(MultiGzDecoder::new(source)),
            Compression::Zstd => {
                Box::new(ZstdReader { source, decoder: FrameDecoder::new(), in_frame: false })
            }
        },
    ))
}

/// Frame after frame: `ruzstd`'s own reader stops behind the first one, while `pzstd`, `zstd
/// --adapt` and concatenation make many, skippable ones among them.
struct ZstdReader<R> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> ZstdReader<R> {
    /// `false` at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        loop {
            if self.source.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut self.source.by_ref().take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "zstd: truncated"));
                    }
                }
                Err(error) => return Err(broken(error)),
            }
        }
    }
}

impl<R: BufRead> Read for ZstdReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.in_frame && !self.next_frame()? {
                return Ok(0);
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if !self.decoder.is_finished() {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.source, one).map_err(broken)?;
                continue;
            }
            // The frame's own checksum is not looked at: digests say what the bytes must be.
            self.in_frame = false;
        }
    }
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
