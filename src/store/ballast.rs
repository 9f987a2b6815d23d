//! A small file beside the database, given up when another program has filled the disk.
//!
//! SQLite writes a change to the WAL before it takes anything away, so on a full disk not even a
//! DELETE works: an outbox that is full could never drain. With the ballast gone there is room for
//! the WAL again; ingestion stays closed until there is room for the ballast too.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Enough for a WAL, the database growing by what stands in it, and the outputs of a few runs.
const BYTES_MAX: u64 = 4 << 20;
/// Of the file system, at most: 1/16.
const SHARE: u64 = 16;
/// Below this it helps nobody.
const BYTES_MIN: u64 = 64 << 10;

/// A look at the file system at most so often while the disk is full.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// While it is not, and only the ballast is missing.
const LOOK_SELDOM: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Ballast {
    path: PathBuf,
    bytes: u64,
    held: bool,
    /// The disk was full, and room for the ballast has not been found since.
    stalled: bool,
    looked: Option<Duration>,
}

impl Ballast {
    /// Takes what there is, or makes it. That there is no room for it is found out by writing.
    pub fn take(database: &Path) -> Self {
        let path = database.with_extension("ballast");
        let total = rustix::fs::statvfs(folder(database)).map_or(0, |fs| fs.f_blocks * fs.f_frsize);
        let bytes = (total / SHARE).clamp(BYTES_MIN, BYTES_MAX);
        let mut ballast = Self { path, bytes, held: false, stalled: false, looked: None };
        let free = ballast.free();
        let there = std::fs::metadata(&ballast.path).is_ok_and(|file| file.len() >= bytes);
        ballast.held = there || (free >= 2 * bytes && ballast.make());
        if !ballast.held {
            ballast.stalled = free < bytes;
            let path = ballast.path.display();
            tracing::warn!(%path, stalled = ballast.stalled, "no room for the ballast: a full disk stops deliveries too");
        }
        ballast
    }

    /// None, for files that are on no file system.
    pub fn none() -> Self {
        Self { path: PathBuf::new(), bytes: 0, held: true, stalled: false, looked: None }
    }

    /// Before the database is open: whether there was one to give up.
    pub fn remove(database: &Path) -> bool {
        std::fs::remove_file(database.with_extension("ballast")).is_ok()
    }

    pub fn stalled(&self) -> bool {
        self.stalled
    }

    /// The disk is full: ingestion stops. Whether room was made, so that another try may do better.
    pub fn give_up(&mut self) -> bool {
        if !self.stalled {
            tracing::error!(
                "the disk is full: no new events are taken until there is room; deliveries go on"
            );
        }
        self.stalled = true;
        let gave = self.held && std::fs::remove_file(&self.path).is_ok();
        self.held = false;
        gave
    }

    /// Whether it is time for `recover`.
    pub fn is_due(&self, now: Duration) -> bool {
        let every = if self.stalled { LOOK_EVERY } else { LOOK_SELDOM };
        !self.held && self.looked.is_none_or(|at| now.saturating_sub(at) >= every)
    }

    /// Makes the ballast when there is room for it and as much again; that ends the stall.
    pub fn recover(&mut self, now: Duration) {
        self.looked = Some(now);
        if self.free() < 2 * self.bytes || !self.make() {
            return;
        }
        self.held = true;
        if std::mem::take(&mut self.stalled) {
            tracing::info!("there is room on the disk again: events are taken");
        }
    }

    fn free(&self) -> u64 {
        rustix::fs::statvfs(folder(&self.path)).map_or(0, |fs| fs.f_bavail * fs.f_frsize)
    }

    fn make(&self) -> bool {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let made = rustix::fs::open(&self.path, flags, Mode::RUSR | Mode::WUSR).and_then(|file| {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
                // A file system without it: the bytes themselves take the room.
                Err(rustix::io::Errno::OPNOTSUPP) => fill(file.into(), self.bytes),
                done => done,
            }
        });
        if let Err(error) = made {
            let _ = std::fs::remove_file(&self.path);
            tracing::debug!(%error, "the ballast could not be made");
        }
        made.is_ok()
    }
}

fn fill(mut file: std::fs::File, bytes: u64) -> rustix::io::Result<()> {
    use std::io::Write;
    let block = [0xA5; 4096]; // not zeros: some file systems store none
    for _ in 0..bytes.div_ceil(block.len() as u64) {
        let written = file.write_all(&block);
        written.map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))?;
    }
    Ok(())
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
