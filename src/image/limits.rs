//! How much one archive may take, and the account that an import keeps.
//!
//! The bounds are far above what functions for a gateway need, and low enough that a hostile
//! archive costs minutes and a corner of the disk, not the node. When one is reached the import is
//! refused, by name of the bound, and nothing stays.

use super::ImageError;
use crate::config::images::ImageLimits;
use std::os::fd::OwnedFd;

pub const MIB: u64 = 1024 * 1024;

#[derive(Clone, Debug)]
pub struct Limits {
    /// Of the archive as it comes, and of what it holds once its own compression is undone.
    pub archive_bytes: u64,
    /// Of all layers of the image, unpacked; holes in sparse files count.
    pub unpacked_bytes: u64,
    /// Files, directories, links in all layers. A Debian image has 10,000, a large Python one 60,000.
    pub entries: u64,
    /// A layer may grow to this many times its compressed size, once it is beyond `ratio_from`.
    /// gzip can't do better than 1,032; real layers grow 2 to 10 times.
    pub ratio: u64,
    pub ratio_from: u64,
    /// An index, a manifest or a configuration. Registries take manifests up to 4 MiB.
    pub json_bytes: u64,
    /// Files in the archive itself: each layer and configuration is one.
    pub archive_entries: u64,
    /// What stays free on the disk for the database, which must never fail for an image's sake.
    pub disk_reserve: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            archive_bytes: 4096 * MIB,
            unpacked_bytes: 8192 * MIB,
            entries: 500_000,
            ratio: 200,
            ratio_from: 256 * MIB,
            json_bytes: 4 * MIB,
            archive_entries: 10_000,
            disk_reserve: 64 * MIB,
        }
    }
}

impl Limits {
    /// As the configuration has them.
    pub fn of(configured: &ImageLimits) -> Self {
        Self {
            archive_bytes: configured.bytes.div_ceil(2),
            unpacked_bytes: configured.bytes,
            entries: configured.files,
            disk_reserve: configured.reserve_bytes,
            ..Self::default()
        }
    }
}

/// What is left of the limits while one import goes on.
pub struct Budget {
    pub limits: Limits,
    unpacked_left: u64,
    entries_left: u64,
    disk: Option<OwnedFd>,
    unchecked: u64,
}

impl Budget {
    /// `disk`: any descriptor on the file system that is written to.
    pub fn new(limits: Limits, disk: Option<OwnedFd>) -> Self {
        let (unpacked_left, entries_left) = (limits.unpacked_bytes, limits.entries);
        Self { limits, unpacked_left, entries_left, disk, unchecked: u64::MAX }
    }

    /// For `give_back`: what a layer has taken counts no more when it is unpacked anew.
    pub fn left(&self) -> (u64, u64) {
        (self.unpacked_left, self.entries_left)
    }

    pub fn give_back(&mut self, left: (u64, u64)) {
        (self.unpacked_left, self.entries_left) = left;
    }

    pub fn take_entry(&mut self) -> Result<(), ImageError> {
        match self.entries_left.checked_sub(1) {
            Some(left) => self.entries_left = left,
            None => {
                return Err(refuse(format!(
                    "the image has more than {} files ([images] max_files)",
                    self.limits.entries
                )));
            }
        }
        Ok(())
    }

    pub fn take_unpacked(&mut self, bytes: u64) -> Result<(), ImageError> {
        match self.unpacked_left.checked_sub(bytes) {
            Some(left) => self.unpacked_left = left,
            None => {
                let max = self.limits.unpacked_bytes / MIB;
                return Err(refuse(format!(
                    "the image is larger than {max} MiB when unpacked ([images] max_bytes)"
                )));
            }
        }
        Ok(())
    }

    /// Before `bytes` are written to the disk; asks it every 8 MiB.
    pub fn take_disk(&mut self, bytes: u64) -> Result<(), ImageError> {
        self.unchecked = self.unchecked.saturating_add(bytes);
        if self.unchecked < 8 * MIB {
            return Ok(());
        }
        self.unchecked = 0;
        let Some(Ok(stat)) = self.disk.as_ref().map(rustix::fs::fstatvfs) else { return Ok(()) };
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < self.limits.disk_reserve {
            let (free, reserve) = (free / MIB, self.limits.disk_reserve / MIB);
            let text = format!("the disk has {free} MiB left, and {reserve} MiB are kept for events");
            let text = format!("{text}: `neap image gc` frees what no function needs");
            return Err(ImageError::NoSpace { text, missing_bytes: (reserve - free) * MIB });
        }
        Ok(())
    }
}

pub fn refuse(text: impl Into<String>) -> ImageError {
    ImageError::Refused(text.into())
}

/// For `map_err`: an I/O error with what was being done.
pub fn io(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> ImageError {
    let doing = doing.into();
    move |source| ImageError::Io { doing, source }
}

/// The same for system calls made through rustix.
pub fn os(doing: impl Into<String>) -> impl FnOnce(rustix::io::Errno) -> ImageError {
    let doing = doing.into();
    move |errno| ImageError::Io { doing, source: errno.into() }
}

/// A name from an archive, fit for a message: escaped, cut at 200 characters.
pub fn show(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let mut shown: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().nth(200).is_some() {
        shown.push('…');
    }
    shown
}
