//! Writing behind: what was written to a file is on its way to the disk while more comes, so that
//! the one sync at the end of an import or a pull finds little left to wait for.
//!
//! Promises nothing: the sync does. What is thrown away before that sync, a refused layer or a pull
//! that was given up, has been written for nothing. Small files are left to the sync, which places
//! them together.

use rustix::fs::{Advice, fadvise};
use std::num::NonZeroU64;
use std::os::fd::AsFd;

/// Begun in pieces of this.
const PIECE_BYTES: u64 = 4 << 20;
/// The end of a file that is shorter than this is not begun by itself.
const REST_BYTES_MIN: u64 = 256 << 10;

/// How far the writing of a file was begun.
#[derive(Debug)]
pub struct Behind(u64);

impl Behind {
    /// What is before `bytes` is none of its business.
    pub fn from_offset(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The file has grown to `bytes`.
    pub fn grown(&mut self, file: impl AsFd, bytes: u64) {
        self.begin(file, bytes, PIECE_BYTES);
    }

    /// It grows no more.
    pub fn ended(mut self, file: impl AsFd, bytes: u64) {
        self.begin(file, bytes, REST_BYTES_MIN);
    }

    fn begin(&mut self, file: impl AsFd, bytes: u64, min: u64) {
        let more = bytes.saturating_sub(self.0);
        if more >= min {
            // The kernel starts to write what is dirty, and then drops what is not: nothing is not.
            // What it can't do now, the sync does.
            let _ = fadvise(file, self.0, NonZeroU64::new(more), Advice::DontNeed);
            self.0 = bytes;
        }
    }
}
