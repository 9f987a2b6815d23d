//! Directory trees by descriptor: nothing here follows a symlink or leaves the root it was given.
//!
//! Each step opens one component, relative to the directory above, with O_NOFOLLOW. That is what
//! openat2's RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS promises, on every kernel and under every
//! seccomp filter; the last parent is cached, so a step is rarely repeated.
//!
//! `Below` sees the layers under the one that is unpacked as the overlay will show them.

use super::ImageError;
use super::limits::{os, show};
use super::place::Place;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The xattr by which overlayfs hides what lower layers have in a directory
/// (kernel, Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
pub const OPAQUE: &str = "trusted.overlay.opaque";

/// One component; a symlink or a file there is ENOTDIR.
pub fn open_directory(parent: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::LOOP => Errno::NOTDIR,
        errno => errno,
    })
}

/// The directory at `place`, every component a real directory.
pub fn open_place(root: impl AsFd, place: &Place) -> Result<OwnedFd, Errno> {
    let mut directory = open_directory(root, b".")?;
    for name in place.components() {
        directory = open_directory(&directory, name)?;
    }
    Ok(directory)
}

/// What is at `name` itself; `None`: nothing.
pub fn look(parent: impl AsFd, name: &[u8]) -> Result<Option<Stat>, Errno> {
    match fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

pub fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Removes a file or a whole tree. Recursion is bounded by `Place`'s depth.
pub fn remove(parent: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        result => return result,
    }
    let directory = open_directory(parent, name)?;
    for child in names(&directory)? {
        remove(directory.as_fd(), &child)?;
    }
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// The names in a directory, without `.` and `..`.
pub fn names(directory: &OwnedFd) -> Result<Vec<Vec<u8>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// The xattrs of an open file that belong to the image: not the overlay's own.
pub fn xattrs(file: impl AsFd) -> Vec<(Vec<u8>, Vec<u8>)> {
    // The kernel's own limits: XATTR_LIST_MAX and XATTR_SIZE_MAX are 64 KiB.
    let mut list = vec![0_u8; 65_536];
    let Ok(length) = fs::flistxattr(&file, &mut list[..]) else { return Vec::new() };
    let mut found = Vec::new();
    for name in list[..length].split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(b"trusted.")) {
        let mut value = vec![0_u8; 65_536];
        if let Ok(length) = fs::fgetxattr(&file, name, &mut value[..]) {
            value.truncate(length);
            found.push((name.to_vec(), value));
        }
    }
    found
}

/// What the layers below have at a place.
pub enum Found {
    Nothing,
    Directory(OwnedFd, Stat),
    /// A file or a symlink, by its directory.
    Other(OwnedFd, Stat),
    /// Not the place itself: something above it that is no directory.
    Blocked,
}

/// The unpacked layers under the current one, lowest first.
#[derive(Default)]
pub struct Below {
    layers: Vec<OwnedFd>,
}

impl Below {
    pub fn push(&mut self, root: OwnedFd) {
        self.layers.push(root);
    }

    /// As overlayfs looks a name up: from the top, until a layer has it, hides it, or is opaque.
    pub fn look(&self, place: &Place) -> Result<Found, ImageError> {
        for layer in self.layers.iter().rev() {
            match look_in(layer, place)
                .map_err(os(format!("look for `{}` in a layer below", show(place.as_bytes()))))?
            {
                InLayer::Found(found) => return Ok(found),
                InLayer::Absent { hidden_below: true } => return Ok(Found::Nothing),
                InLayer::Absent { hidden_below: false } => {}
            }
        }
        Ok(Found::Nothing)
    }

    /// The names at the root, of all layers below.
    pub fn root_names(&self) -> Result<std::collections::BTreeSet<Vec<u8>>, ImageError> {
        let mut all = std::collections::BTreeSet::new();
        for layer in &self.layers {
            all.extend(names(layer).map_err(os("list a layer below"))?);
        }
        Ok(all)
    }
}

enum InLayer {
    Found(Found),
    Absent { hidden_below: bool },
}

fn look_in(layer: &OwnedFd, place: &Place) -> Result<InLayer, Errno> {
    let mut directory = open_directory(layer, b".")?;
    let mut hidden_below = false;
    let mut left = place.components().peekable();
    while let Some(name) = left.next() {
        let Some(stat) = look(&directory, name)? else { return Ok(InLayer::Absent { hidden_below }) };
        let last = left.peek().is_none();
        if is_whiteout(&stat) {
            return Ok(InLayer::Absent { hidden_below: true });
        }
        match (kind(&stat) == FileType::Directory, last) {
            (false, true) => return Ok(InLayer::Found(Found::Other(directory, stat))),
            (false, false) => return Ok(InLayer::Found(Found::Blocked)),
            (true, true) => {
                let found = open_directory(&directory, name)?;
                return Ok(InLayer::Found(Found::Directory(found, stat)));
            }
            (true, false) => directory = open_directory(&directory, name)?,
        }
        let mut value = [0_u8; 1];
        hidden_below |= matches!(fs::fgetxattr(&directory, OPAQUE, &mut value[..]), Ok(1) if value == *b"y");
    }
    let stat = fs::fstat(&directory)?;
    Ok(InLayer::Found(Found::Directory(directory, stat)))
}
