//! Whether layers on the disk still are what was unpacked.
//!
//! A layer's diff id is the digest of its tar, which is not kept. So each layer has a seal beside
//! it: the digest of its tree, with a CRC-32 for the content of each file, which is summed while it
//! is written: nothing is read back for it. (That is for rot and for accidents, as btrfs has it;
//! whoever can change a layer on purpose can change its seal, too.) Earlier versions hashed the
//! content itself; their seals are checked as they were made.
//!
//! A check walks the tree again, at a pace that leaves the disk to others, and tells which layers
//! differ. Repair is the pull's business.

use super::ImageError;
use super::limits::{io, os, show};
use super::pace::Pace;
use super::place::Place;
use super::store::{Directory, read_json};
use super::tree;
use super::worker::open_directory;
use crate::model::Digest;
use flate2::Crc;
use ring::digest::{Context, SHA256};
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const PIECE_BYTES: usize = 128 * 1024;
/// Files whose sums are kept while a layer is unpacked, 2 MiB of memory; those beyond are read.
const SUMS_MAX: usize = 1 << 16;

/// What was written into the files of a layer, by inode.
#[derive(Debug, Default)]
pub struct Written(HashMap<u64, u32>);

impl Written {
    /// `sum`: of all that the file holds; `None`: it is to be read. An inode may have had another
    /// file, which a later entry replaced.
    pub fn note(&mut self, inode: u64, sum: Option<Crc>) {
        match sum {
            Some(sum) if self.0.len() < SUMS_MAX || self.0.contains_key(&inode) => {
                self.0.insert(inode, sum.sum());
            }
            _ => drop(self.0.remove(&inode)),
        }
    }
}

/// How a seal has the content of files.
enum Content<'a> {
    /// All of it in the one digest: seals of version 0.1's first layers.
    Hashed,
    Summed(&'a Written),
}

/// What the daemon asks for: `check.json` in the staging directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub layers: Vec<Digest>,
    /// Bytes a second; `None`: as fast as it goes.
    pub rate: Option<u64>,
}

impl Order {
    pub const FILE: &str = "check.json";
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Checked {
    pub good: Vec<Digest>,
    /// And how they differ.
    pub damaged: Vec<(Digest, String)>,
    /// Without a seal: unpacked by an earlier version.
    pub unsealed: Vec<Digest>,
}

/// Reads the layers of the order.
pub fn check(directory: &Directory, staging: &Path) -> Result<Checked, ImageError> {
    let order: Order = read_json(&staging.join(Order::FILE))?;
    let mut pace = Pace::new(order.rate);
    let mut checked = Checked::default();
    for layer in order.layers {
        // One that is gone meanwhile is nobody's damage.
        let Ok(Some(mark)) = directory.read_mark(&layer) else {
            if directory.layer(&layer).exists() {
                checked.damaged.push((layer, "its layer.json can't be read".to_owned()));
            }
            continue;
        };
        let nothing = Written::default();
        let (seal, content) = match (mark.sums, mark.tree) {
            (Some(seal), _) => (seal, Content::Summed(&nothing)),
            (None, Some(seal)) => (seal, Content::Hashed),
            (None, None) => {
                checked.unsealed.push(layer);
                continue;
            }
        };
        let root = directory.layer(&layer).join("root");
        match digest(&root, content, &mut pace) {
            Ok(found) if found == seal => checked.good.push(layer),
            Ok(_) => checked.damaged.push((layer, "its files are not what was unpacked".to_owned())),
            Err(_) if !root.exists() && !directory.layer(&layer).exists() => {}
            Err(error) => checked.damaged.push((layer, crate::errors::chain(&error))),
        }
    }
    Ok(checked)
}

/// Of a tree that was just unpacked.
pub fn seal(root: &Path, written: &Written) -> Result<Digest, ImageError> {
    digest(root, Content::Summed(written), &mut Pace::new(None))
}

fn digest(root: &Path, content: Content<'_>, pace: &mut Pace) -> Result<Digest, ImageError> {
    let root = open_directory(root)?;
    let mut walk = Walk { hash: Context::new(&SHA256), buffer: vec![0; PIECE_BYTES], content, pace };
    walk.directory(&root, &Place::default())?;
    Ok(Digest::from_sha256(walk.hash.finish().as_ref()))
}

struct Walk<'a> {
    hash: Context,
    buffer: Vec<u8>,
    content: Content<'a>,
    pace: &'a mut Pace,
}

impl Walk<'_> {
    /// Its own attributes, then what is in it, by name. The depth is bounded by `Place`'s.
    fn directory(&mut self, directory: &OwnedFd, place: &Place) -> Result<(), ImageError> {
        let doing = || format!("read `{}`", show(place.as_bytes()));
        let stat = fs::fstat(directory).map_err(os(doing()))?;
        self.attributes(place, &stat);
        self.xattrs(directory);
        let mut names = tree::names(directory).map_err(os(doing()))?;
        names.sort();
        for name in names {
            let place = place.join(&name);
            self.entry(directory, &name, &place)?;
        }
        // Tells `a/b` from `a` and `b`.
        self.hash.update(b"\0up\0");
        Ok(())
    }

    fn entry(&mut self, parent: &OwnedFd, name: &[u8], place: &Place) -> Result<(), ImageError> {
        let doing = || format!("read `{}`", show(place.as_bytes()));
        let stat = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(os(doing()))?;
        match tree::kind(&stat) {
            FileType::Directory => {
                let directory = tree::open_directory(parent, name).map_err(os(doing()))?;
                return self.directory(&directory, place);
            }
            FileType::RegularFile => {
                self.attributes(place, &stat);
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
                // Reading must not write: an access time is a block of flash.
                let flags = flags | OFlags::NOATIME;
                let file = fs::openat(parent, name, flags, Mode::empty()).map_err(os(doing()))?;
                self.xattrs(&file);
                self.content(File::from(file), stat.st_ino).map_err(io(doing()))?;
            }
            FileType::Symlink => {
                self.attributes(place, &stat);
                let target = fs::readlinkat(parent, name, Vec::new()).map_err(os(doing()))?;
                self.text(target.as_bytes());
            }
            _ => {
                self.attributes(place, &stat);
                self.hash.update(&stat.st_rdev.to_le_bytes());
            }
        }
        Ok(())
    }

    fn attributes(&mut self, place: &Place, stat: &fs::Stat) {
        self.text(place.as_bytes());
        for number in [stat.st_mode, stat.st_uid, stat.st_gid] {
            self.hash.update(&number.to_le_bytes());
        }
        if tree::kind(stat) != FileType::Directory {
            // Links to a file of the layer count; of a directory they are the file system's own.
            #[allow(clippy::useless_conversion, reason = "32-bit machines count links in 32 bits")]
            let links = u64::from(stat.st_nlink);
            self.hash.update(&links.to_le_bytes());
            self.hash.update(&(stat.st_size as u64).to_le_bytes());
        }
    }

    fn xattrs(&mut self, file: impl AsFd) {
        let mut all = tree::xattrs(&file);
        let mut opaque = [0_u8; 1];
        if fs::fgetxattr(&file, tree::OPAQUE, &mut opaque[..]).is_ok() {
            all.push((tree::OPAQUE.as_bytes().to_vec(), opaque.to_vec()));
        }
        // What a security module adds is the host's.
        all.retain(|(name, _)| !name.starts_with(b"security.") || name == b"security.capability");
        all.sort();
        for (name, value) in all {
            self.text(&name);
            self.text(&value);
        }
    }

    fn content(&mut self, mut file: File, inode: u64) -> std::io::Result<()> {
        let known = match &self.content {
            Content::Hashed => None,
            Content::Summed(written) => written.0.get(&inode).copied(),
        };
        let mut sum = Crc::new();
        while known.is_none() {
            let got = file.read(&mut self.buffer)?;
            if got == 0 {
                break;
            }
            match &self.content {
                Content::Hashed => self.hash.update(&self.buffer[..got]),
                Content::Summed(_) => sum.update(&self.buffer[..got]),
            }
            self.pace.spend(got as u64);
        }
        if let Content::Summed(_) = &self.content {
            self.hash.update(&known.unwrap_or(sum.sum()).to_le_bytes());
        }
        Ok(())
    }

    fn text(&mut self, bytes: &[u8]) {
        self.hash.update(&(bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, create_dir, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    /// The numbers are from another implementation of what `Walk` says.
    #[test]
    fn seals_of_every_version_are_read_as_they_were_made() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = dir.path().join("root");
        create_dir(&root).expect("made");
        set_permissions(&root, Permissions::from_mode(0o755)).expect("set");
        write(root.join("f"), "content").expect("written");
        set_permissions(root.join("f"), Permissions::from_mode(0o644)).expect("set");
        std::os::unix::fs::symlink("f", root.join("l")).expect("made");
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("skipped: the files of a layer are root's");
        }
        let (hashed, summed) = (
            "sha256:cb08ca609e914fcea6fde6541f06557bf84b80cc810a49453d50a5ea17df2139",
            "sha256:fc71ed09fba93299900c05666ff2edd0d95d312150c927bee02b3c0074f05769",
        );

        let digest = |content: Content<'_>| digest(&root, content, &mut Pace::new(None)).expect("read");
        assert_eq!(digest(Content::Hashed).as_str(), hashed);
        assert_eq!(digest(Content::Summed(&Written::default())).as_str(), summed);
        assert_eq!(seal(&root, &Written::default()).expect("read").as_str(), summed);
        write(root.join("f"), "cOntent").expect("written");
        assert_ne!(digest(Content::Hashed).as_str(), hashed);
        assert_ne!(digest(Content::Summed(&Written::default())).as_str(), summed);
    }

    #[test]
    fn sums_taken_while_writing_are_those_of_a_later_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let inode = |name: &str| fs::stat(dir.path().join(name)).expect("there").st_ino;
        let sum = |text: &str| {
            let mut sum = Crc::new();
            sum.update(text.as_bytes());
            sum
        };
        write(dir.path().join("a"), "one").expect("written");
        write(dir.path().join("b"), "two").expect("written");
        let read = seal(dir.path(), &Written::default()).expect("read");

        let mut written = Written::default();
        written.note(inode("a"), Some(sum("of a file that had the inode before")));
        written.note(inode("b"), Some(sum("of another")));
        assert_ne!(seal(dir.path(), &written).expect("read"), read, "what is noted counts");
        written.note(inode("a"), Some(sum("one")));
        written.note(inode("b"), None);
        assert_eq!(seal(dir.path(), &written).expect("read"), read);
        for number in 0..2 * SUMS_MAX as u64 {
            written.note(number << 40, Some(sum("")));
        }
        assert_eq!(written.0.len(), SUMS_MAX);
    }
}
