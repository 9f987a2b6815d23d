//! What an instance mounts for itself, but /proc: /dev, /dev/shm and /tmp.
//!
//! Made by the maker, in a mount namespace of its own, with one system call each; libcontainer,
//! which takes them over with its recursive bind of the root, would need 250 for each, because it
//! walks every path by descriptors against an image that changes meanwhile. Nothing changes
//! here: the root is read-only and its mount points are neap's own directories.
//!
//! Lean: there is no /sys, no /dev/pts and no /dev/mqueue; programs that look for them fall back.

use super::sys;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

const NONE: Option<&str> = None;

/// A tmpfs of size 0 is one without a limit.
const DISK_BYTES_MIN: u64 = 4096;

/// Shared memory: semaphores and small rings. What is larger belongs in /tmp.
const SHM_BYTES_MAX: u64 = 1024 * 1024;

/// For six empty files and some symlinks.
const DEV_BYTES_MAX: u64 = 64 * 1024;

/// Below `root`, for the calling process and its children alone. `uid`: the host id of the
/// function's root, who owns them. `scratch`: an empty directory for what makes the root writable.
pub fn mount(root: &Path, scratch: Option<&Path>, uid: u32, disk_bytes: u64) -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let disk_bytes = disk_bytes.max(DISK_BYTES_MIN);
    let (dev, plain) = (MsFlags::MS_NOSUID, MsFlags::MS_NOSUID | MsFlags::MS_NODEV);
    if let Some(scratch) = scratch {
        tmpfs(scratch, plain, "755", uid, disk_bytes)?;
        writable(root, scratch, uid)?;
    }
    tmpfs(&root.join("dev"), dev, "755", uid, DEV_BYTES_MAX)?;
    fs::create_dir(root.join("dev/shm"))?;
    tmpfs(&root.join("dev/shm"), plain | MsFlags::MS_NOEXEC, "1777", uid, disk_bytes.min(SHM_BYTES_MAX))?;
    match scratch {
        // One room for both, and one limit.
        Some(scratch) => {
            let (from, to) = (scratch.join("tmp"), root.join("tmp"));
            Ok(nix::mount::mount(Some(&from), &to, NONE, MsFlags::MS_BIND, NONE)?)
        }
        None => tmpfs(&root.join("tmp"), plain, "1777", uid, disk_bytes),
    }
}

/// Covers the root with one that can be written, on an empty tmpfs: what an instance changes is
/// gone with it.
fn writable(root: &Path, scratch: &Path, uid: u32) -> io::Result<()> {
    let (upper, work, tmp) = (scratch.join("upper"), scratch.join("work"), scratch.join("tmp"));
    for dir in [&upper, &work, &tmp] {
        fs::create_dir(dir)?;
    }
    let like = fs::metadata(root)?;
    std::os::unix::fs::chown(&upper, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(&upper, fs::Permissions::from_mode(like.mode() & 0o7777))?;
    std::os::unix::fs::chown(&tmp, Some(uid), Some(uid))?;
    fs::set_permissions(&tmp, fs::Permissions::from_mode(0o1777))?;
    // `redirect_dir`: the image's directories can be renamed. The mark for it is the kernel's own:
    // a function, root only in its user namespace, can't make one.
    let options = format!(
        "lowerdir={},upperdir={},workdir={},redirect_dir=on",
        root.display(),
        upper.display(),
        work.display()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(nix::mount::mount(Some("overlay"), root, Some("overlay"), flags, Some(options.as_str()))?)
}

/// A volume: with the ids, and without the devices, that its own mount has.
pub fn volume(dir: &Path, root: &Path, at: &Path) -> io::Result<()> {
    let tree = sys::detached_copy(dir, sys::MOUNT_ATTR_NOSUID | sys::MOUNT_ATTR_NODEV, None)?;
    sys::attach_below(tree, root, at)
}

/// A directory of the launcher's, for data.
pub fn read_only(dir: &Path, root: &Path, at: &Path) -> io::Result<()> {
    let tree = sys::detached_copy(dir, sys::LAYER | sys::MOUNT_ATTR_NOEXEC, None)?;
    sys::attach_below(tree, root, at)
}

fn tmpfs(at: &Path, flags: MsFlags, mode: &str, uid: u32, bytes_max: u64) -> io::Result<()> {
    let options = format!("mode={mode},uid={uid},gid={uid},size={bytes_max}");
    Ok(nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some(options.as_str()))?)
}
