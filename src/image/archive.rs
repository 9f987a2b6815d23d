//! The archive: from a stream whose order nobody promises to files that can be opened by name.
//!
//! `docker save` writes its manifest last, tools write blobs in any order, and a layer is needed
//! only once the manifest has said how: so everything is spooled to the staging directory and
//! hashed on the way. A blob whose bytes differ from its name is refused at once.
//!
//! Names in the archive are keys of a map and never paths: the files are numbered.

use super::ImageError;
use super::decompress::decompress;
use super::limits::{Budget, MIB, io, os, refuse, show};
use super::place::Place;
use super::tarball::{Kind, TarError, TarReader};
use crate::model::Digest;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;

/// Symlinks from name to name, as in docker-save archives that share layers.
const LINKS_MAX: usize = 8;

pub struct Archive {
    directory: OwnedFd,
    files: HashMap<Vec<u8>, Stored>,
    links: HashMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug)]
pub struct Stored {
    pub digest: Digest,
    pub bytes: u64,
    /// In the directory: `file-7`, or what a fetched blob is called.
    file: String,
}

impl Archive {
    /// Reads all of `source`. `read`: called with the bytes read so far, every MiB.
    pub fn spool(
        source: impl Read,
        directory: OwnedFd,
        budget: &mut Budget,
        read: &mut dyn FnMut(u64),
    ) -> Result<Self, ImageError> {
        let max = budget.limits.archive_bytes;
        let raw = Counted { inner: source, bytes: 0, max, next_report: 0, report: read };
        let mut archive = Self { directory, files: HashMap::new(), links: HashMap::new() };
        let (_, stream) = decompress(raw).map_err(reading)?;
        // Decompressed it is bounded too, or an archive of zeros would fill the disk.
        let stream = Counted { inner: stream, bytes: 0, max, next_report: u64::MAX, report: &mut |_| {} };
        let mut tar = TarReader::new(stream);
        let mut number = 0;
        let mut buffer = vec![0; 128 * 1024];
        let tar_error = |error| match error {
            TarError::Read(source) => reading(source),
            error => refuse(format!("the archive's tar: {error}")),
        };
        while let Some(entry) = tar.next_entry().map_err(tar_error)? {
            number += 1;
            if u64::from(number) > budget.limits.archive_entries {
                return Err(refuse(format!(
                    "the archive has more than {} files",
                    budget.limits.archive_entries
                )));
            }
            // A name that is no path below the archive can't be referred to.
            let Ok(place) = Place::parse(&entry.path) else { continue };
            let name = place.as_bytes().to_vec();
            match entry.kind {
                Kind::File if entry.segments.is_none() => {
                    let stored = archive.store(&mut tar, number, budget, &mut buffer)?;
                    check_name(&name, &stored)?;
                    archive.links.remove(&name);
                    archive.files.insert(name, stored);
                }
                Kind::File => {
                    return Err(refuse(format!("`{}` is a sparse file in the archive itself", show(&name))));
                }
                Kind::Symlink => {
                    let base = place.split().map(|(parent, _)| parent).unwrap_or_default();
                    if let Some(target) = resolve(&base, &entry.link) {
                        archive.links.insert(name, target);
                    }
                }
                Kind::HardLink => {
                    if let Some(target) = resolve(&Place::default(), &entry.link) {
                        archive.links.insert(name, target);
                    }
                }
                _ => {}
            }
        }
        // What comes behind the end (padding to a tape's block) is read, so that the sender is
        // not cut off.
        let mut stream = tar.into_inner();
        std::io::copy(&mut stream, &mut std::io::sink()).map_err(reading)?;
        if archive.files.is_empty() {
            return Err(refuse("the archive is empty, or not a tar archive"));
        }
        Ok(archive)
    }

    /// What a pull has fetched into `directory`, each file named by its digest's hex digits.
    pub fn fetched(directory: OwnedFd) -> Self {
        Self { directory, files: HashMap::new(), links: HashMap::new() }
    }

    /// A blob more, that was verified when it was fetched.
    pub fn add(&mut self, digest: &Digest) -> Result<(), ImageError> {
        let what = || format!("look for blob {digest}");
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        let stat = rustix::fs::statat(&self.directory, digest.hex(), flags).map_err(os(what()))?;
        let bytes = u64::try_from(stat.st_size).unwrap_or(0);
        let stored = Stored { digest: digest.clone(), bytes, file: digest.hex().to_owned() };
        self.files.insert(blob_name(digest), stored);
        Ok(())
    }

    pub fn find(&self, name: &[u8]) -> Option<&Stored> {
        let mut name = name;
        for _ in 0..LINKS_MAX {
            match (self.files.get(name), self.links.get(name)) {
                (Some(stored), _) => return Some(stored),
                (None, Some(target)) => name = target,
                (None, None) => return None,
            }
        }
        None
    }

    pub fn blob(&self, digest: &Digest) -> Option<&Stored> {
        self.find(&blob_name(digest))
    }

    pub fn open(&self, stored: &Stored) -> Result<File, ImageError> {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NOFOLLOW;
        let mode = rustix::fs::Mode::empty();
        let file = rustix::fs::openat(&self.directory, stored.file.as_str(), flags, mode);
        file.map(File::from).map_err(os("open a spooled file"))
    }

    /// A JSON document, whole.
    pub fn text(&self, stored: &Stored, what: &str, max: u64) -> Result<String, ImageError> {
        if stored.bytes > max {
            return Err(refuse(format!("{what} has {} bytes; at most {max} are read", stored.bytes)));
        }
        let mut text = Vec::new();
        self.open(stored)?.read_to_end(&mut text).map_err(io("read a spooled file"))?;
        let found = Digest::from_sha256(ring::digest::digest(&ring::digest::SHA256, &text).as_ref());
        if found != stored.digest {
            return Err(refuse(format!("{what} was changed on the disk: it is {found} now")));
        }
        String::from_utf8(text).map_err(|_| refuse(format!("{what} is not UTF-8, so not JSON")))
    }

    fn store(
        &self,
        tar: &mut TarReader<impl Read>,
        number: u32,
        budget: &mut Budget,
        buffer: &mut [u8],
    ) -> Result<Stored, ImageError> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CREATE | rustix::fs::OFlags::EXCL;
        let flags = flags | rustix::fs::OFlags::CLOEXEC;
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let file = rustix::fs::openat(&self.directory, file_name(number), flags, mode);
        let mut file = File::from(file.map_err(os("make a file in the staging directory"))?);
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        let mut bytes = 0;
        loop {
            let got = tar.read_data(buffer).map_err(reading)?;
            if got == 0 {
                break;
            }
            budget.take_disk(got as u64)?;
            hash.update(&buffer[..got]);
            file.write_all(&buffer[..got]).map_err(io("write to the staging directory"))?;
            bytes += got as u64;
        }
        file.rewind().map_err(io("write to the staging directory"))?;
        Ok(Stored { digest: Digest::from_sha256(hash.finish().as_ref()), bytes, file: file_name(number) })
    }
}

/// What is in `blobs/` is named by its digest.
fn check_name(name: &[u8], stored: &Stored) -> Result<(), ImageError> {
    let Some(hex) = name.strip_prefix(b"blobs/sha256/") else { return Ok(()) };
    if hex == stored.digest.hex().as_bytes() {
        return Ok(());
    }
    Err(refuse(format!("blob `{}` is damaged: its bytes are {}", show(name), stored.digest)))
}

/// A link's target as a name in the archive; `None`: it leads outside, so to nothing.
fn resolve(base: &Place, link: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = base.components().collect();
    if link.starts_with(b"/") || link.len() > 4095 {
        return None;
    }
    for part in link.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".") {
        if part == b".." {
            parts.pop()?;
        } else {
            parts.push(part);
        }
    }
    Some(parts.join(&b'/'))
}

fn blob_name(digest: &Digest) -> Vec<u8> {
    format!("blobs/sha256/{}", digest.hex()).into_bytes()
}

fn file_name(number: u32) -> String {
    format!("file-{number}")
}

/// Our own errors come back through decoders as the cause of an I/O error.
fn reading(source: std::io::Error) -> ImageError {
    use std::io::ErrorKind::{FileTooLarge, InvalidData, InvalidInput, UnexpectedEof, Unsupported};
    match source.kind() {
        FileTooLarge | Unsupported => refuse(format!("the archive is {source}")),
        InvalidData | InvalidInput => refuse(format!("the archive is damaged: {source}")),
        UnexpectedEof => refuse("the archive is truncated: it ends too early"),
        _ => io("read the archive")(source),
    }
}

struct Counted<'a, R> {
    inner: R,
    bytes: u64,
    max: u64,
    next_report: u64,
    report: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.bytes += got as u64;
        if self.bytes > self.max {
            let text = format!("larger than {} MiB, or grows beyond that when decompressed", self.max / MIB);
            return Err(std::io::Error::new(std::io::ErrorKind::FileTooLarge, text));
        }
        if self.bytes >= self.next_report {
            self.next_report = self.bytes + MIB;
            (self.report)(self.bytes);
        }
        Ok(got)
    }
}
