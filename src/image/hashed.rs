//! A layer's stream on its way to the tar reader: hashed, and bounded before it fills a disk.

use super::limits::{Limits, MIB};
use crate::model::Digest;
use std::io::Read;

/// Hashes what is read, and stops a layer that grows out of proportion.
pub struct Hashed<R> {
    inner: R,
    hash: ring::digest::Context,
    bytes: u64,
    max: u64,
    max_text: &'static str,
}

impl<R: Read> Hashed<R> {
    pub fn new(inner: R, compressed: u64, limits: &Limits) -> Self {
        let in_proportion = limits.ratio_from.max(compressed.saturating_mul(limits.ratio));
        // Beyond the files' own bytes: headers, and padding behind the end.
        let whole = limits.unpacked_bytes.saturating_add(limits.unpacked_bytes / 8).saturating_add(MIB);
        let (max, max_text) = if in_proportion < whole {
            (in_proportion, "the layer grows out of all proportion to its compressed size")
        } else {
            (whole, "the layer is too large when decompressed")
        };
        Self { inner, hash: ring::digest::Context::new(&ring::digest::SHA256), bytes: 0, max, max_text }
    }

    /// Reads the rest; the digest of all.
    pub fn finish(mut self) -> std::io::Result<Digest> {
        std::io::copy(&mut self, &mut std::io::sink())?;
        Ok(Digest::from_sha256(self.hash.finish().as_ref()))
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.bytes += got as u64;
        if self.bytes > self.max {
            let text = format!("{} ({} MiB so far)", self.max_text, self.bytes / MIB);
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
        }
        Ok(got)
    }
}
