//! Image layers on their way into an overlay: attached through id-mapped mounts, stacked, and
//! detached again.
//!
//! overlayfs keeps mounts of its own of what it stacks, so the attached ones go right after:
//! every mount in the launcher's table costs each create. (Kernels below 6.15 can't take layers
//! that were never attached.)

use super::sys;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::unistd::ForkResult;
use std::collections::hash_map::{Entry, HashMap};
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// What to do where overlays can't be mounted.
pub const OVERLAY_ADVICE: &str = "load the module `overlay`, or build a kernel with CONFIG_OVERLAY_FS";

/// What to do where id-mapped layers can't be had, by what the kernel said.
pub fn advice(err: &io::Error) -> &'static str {
    match err.raw_os_error() {
        // unshare(2), user_namespaces(7)
        Some(libc::ENOSPC) => "raise `sysctl user.max_user_namespaces`, which is used up or 0",
        _ if err.kind() == io::ErrorKind::Unsupported => "build a kernel with CONFIG_USER_NS",
        _ => "use a file system and a kernel that have them (ext4, xfs, btrfs or f2fs; Linux 5.19)",
    }
}

/// User namespaces to map layers with: one for each range of ids, made once.
pub struct IdMaps {
    namespaces: HashMap<u32, OwnedFd>,
}

impl IdMaps {
    pub fn new() -> Self {
        Self { namespaces: HashMap::new() }
    }

    pub fn range(&mut self, uid_base: u32) -> io::Result<&OwnedFd> {
        match self.namespaces.entry(uid_base) {
            Entry::Occupied(there) => Ok(there.into_mut()),
            Entry::Vacant(room) => Ok(room.insert(user_namespace(uid_base)?)),
        }
    }

    /// Whether layers below `data_dir` can be mapped and stacked: by doing it.
    pub fn probe(&mut self, data_dir: &Path, scratch: &Path, uid_base: u32) -> io::Result<()> {
        let own = scratch.join("own");
        fs::create_dir_all(scratch.join("rootfs")).and_then(|()| fs::create_dir_all(&own))?;
        let layers = Layers::attach(scratch, &[data_dir.to_owned()], Some(self.range(uid_base)?))?;
        overlay(scratch, "own", layers.count, "rootfs")?;
        nix::mount::umount2(&scratch.join("rootfs"), MntFlags::MNT_DETACH)?;
        Ok(())
    }
}

/// Image layers attached as `l0`, `l1`, … in a directory; detached when dropped.
pub struct Layers<'a> {
    dir: &'a Path,
    pub count: usize,
}

impl<'a> Layers<'a> {
    pub fn attach(dir: &'a Path, layers: &[PathBuf], namespace: Option<&OwnedFd>) -> io::Result<Self> {
        let mut attached = Self { dir, count: 0 };
        for layer in layers {
            let at = dir.join(format!("l{}", attached.count));
            fs::create_dir_all(&at)?;
            let copy = sys::detached_copy(layer, sys::LAYER, namespace.map(AsFd::as_fd))?;
            sys::attach(copy, &at)?;
            attached.count += 1;
        }
        Ok(attached)
    }

    /// Where the topmost is attached.
    pub fn topmost(&self) -> PathBuf {
        self.dir.join(format!("l{}", self.count.saturating_sub(1)))
    }
}

impl Drop for Layers<'_> {
    fn drop(&mut self) {
        for n in 0..self.count {
            let at = self.dir.join(format!("l{n}"));
            let _ = nix::mount::umount2(&at, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&at);
        }
    }
}

/// Mounts `top` over layers `l<count-1>` … `l0` of `dir`, read-only, at `dir`/`at`.
pub fn overlay(dir: &Path, top: &str, count: usize, at: &str) -> io::Result<()> {
    let mut lower = top.to_owned();
    for n in (0..count).rev() {
        lower.push_str(&format!(":l{n}"));
    }
    // Names are relative, so that many layers fit the page that mount(2) takes. `redirect_dir`:
    // a layer's xattrs must not rename directories of others.
    let options = format!("lowerdir={lower},redirect_dir=nofollow");
    std::env::set_current_dir(dir)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    let done = nix::mount::mount(Some("overlay"), at, Some("overlay"), flags, Some(options.as_str()));
    std::env::set_current_dir("/")?;
    Ok(done?)
}

/// Whether overlays can be mounted: by doing it, in an empty directory.
pub fn probe_overlay(scratch: &Path) -> io::Result<()> {
    for dir in ["own", "l0", "rootfs"] {
        fs::create_dir_all(scratch.join(dir))?;
    }
    overlay(scratch, "own", 1, "rootfs")?;
    Ok(nix::mount::umount2(&scratch.join("rootfs"), MntFlags::MNT_DETACH)?)
}

/// A user namespace that maps `UID_RANGE` ids from `uid_base`, kept by its descriptor alone.
fn user_namespace(uid_base: u32) -> io::Result<OwnedFd> {
    let (read, write) = nix::unistd::pipe()?;
    match sys::fork()? {
        ForkResult::Child => {
            let entered = nix::sched::unshare(CloneFlags::CLONE_NEWUSER);
            let code = entered.err().map_or(0, |err| err as i32);
            let _ = nix::unistd::write(&write, &code.to_ne_bytes());
            loop {
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let made = || -> io::Result<OwnedFd> {
                let mut code = [0_u8; 4];
                fs::File::from(read).read_exact(&mut code)?;
                match i32::from_ne_bytes(code) {
                    0 => {}
                    // unshare(2): the kernel does not know the flag.
                    libc::EINVAL => {
                        let what = "this kernel has no user namespaces";
                        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
                    }
                    code => return Err(io::Error::from_raw_os_error(code)),
                }
                let map = format!("0 {uid_base} {}", crate::model::function::UID_RANGE);
                fs::write(format!("/proc/{child}/uid_map"), &map)?;
                fs::write(format!("/proc/{child}/gid_map"), &map)?;
                Ok(fs::File::open(format!("/proc/{child}/ns/user"))?.into())
            };
            let made = made();
            let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(child, None);
            made
        }
    }
}
