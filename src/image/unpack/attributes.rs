//! Owner, mode, times and xattrs of what is unpacked.

use crate::image::ImageError;
use crate::image::limits::os;
use crate::image::tarball::Mtime;
use crate::image::tree;
use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

/// Owner, mode, time: what a directory gets when all is in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Mtime,
}

/// A directory that nobody describes. The time is fixed, so that a layer unpacks to the same.
pub(super) const IMPLIED: Attributes =
    Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Mtime { seconds: 0, nanoseconds: 0 } };

pub(super) enum Rule {
    Keep,
    LeaveOut,
    Refuse,
}

pub(super) fn xattr_rule(name: &[u8]) -> Rule {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => Rule::Keep,
        // overlayfs reads its own marks from these, the second kind in unprivileged mounts.
        name if name.starts_with(b"trusted.") || name.starts_with(b"user.overlay.") => Rule::Refuse,
        name if name.starts_with(b"user.") => Rule::Keep,
        // security.selinux, .ima, .evm: labels of the machine that built the image.
        _ => Rule::LeaveOut,
    }
}

pub(super) fn create(directory: &OwnedFd, name: &[u8]) -> Result<File, ImageError> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        fs::openat(directory, name, flags, Mode::from_raw_mode(0o600)).map_err(os("create the file"))?;
    Ok(File::from(file))
}

pub(super) fn own(file: &impl AsFd, uid: u32, gid: u32) -> Result<(), ImageError> {
    fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).map_err(os("set the owner"))
}

pub(super) fn set_own_attributes(directory: &OwnedFd, name: &[u8], a: Attributes) -> Result<(), ImageError> {
    let (uid, gid) = (Uid::from_raw(a.uid), Gid::from_raw(a.gid));
    fs::chownat(directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(os("set the owner"))?;
    fs::utimensat(directory, name, &times(a.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(os("set the time"))
}

pub(super) fn set_fifo_attributes(directory: &OwnedFd, name: &[u8], a: Attributes) -> Result<(), ImageError> {
    set_own_attributes(directory, name, a)?;
    // chmod by name follows symlinks; this name is the fifo that was just made in a directory
    // that nobody else can reach.
    fs::chmodat(directory, name, Mode::from_raw_mode(a.mode), AtFlags::empty())
        .map_err(os("set the mode"))?;
    fs::utimensat(directory, name, &times(a.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(os("set the time"))
}

pub(super) fn copy_xattrs(from: &impl AsFd, to: &impl AsFd) -> Result<(), ImageError> {
    for (name, value) in tree::xattrs(from) {
        if matches!(xattr_rule(&name), Rule::Keep) {
            fs::fsetxattr(to, &name[..], &value, XattrFlags::empty())
                .map_err(os("copy an xattr from below"))?;
        }
    }
    Ok(())
}

#[allow(clippy::useless_conversion, clippy::unnecessary_cast)] // the widths differ between architectures
pub(super) fn attributes_of(stat: &fs::Stat) -> Attributes {
    let mtime = Mtime { seconds: stat.st_mtime as i64, nanoseconds: stat.st_mtime_nsec as u32 };
    Attributes { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, mtime }
}

pub(super) fn times(mtime: Mtime) -> Timestamps {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}
