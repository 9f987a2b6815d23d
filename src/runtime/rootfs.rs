//! A revision's root: one read-only overlay of the image's layers under a small layer of neap's
//! own, mounted once in the launcher's mount namespace and used by every instance.
//!
//! neap's layer holds every mount point (libcontainer would create them, which a read-only root
//! refuses; and a directory of ours hides an image's symlink of the same name), /etc/hosts and
//! /etc/hostname, and a working directory that the image names but lacks.
//!
//! Each image layer is attached through an id-mapped mount while the overlay is made and detached
//! right after: overlayfs keeps its own copy, and every mount in the launcher's table costs each
//! create. (Kernels below 6.15 can't take layers that were never attached.)
//!
//! Containers bind the overlay in their own mount namespaces, so it needs no copy per create.

use super::executor::{DEFAULT_PATH, candidates};
use super::sys;
use super::user::User;
use super::wire::{Refusal, RootOrder};
use nix::mount::{MntFlags, MsFlags};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Docker stops at 127. Each is a few letters of the overlay's options, which fit a page.
const LAYERS_MAX: usize = 128;

/// /etc/passwd and /etc/group of an image are read up to here, and refused beyond.
const ACCOUNTS_BYTES_MAX: u64 = 1024 * 1024;

/// A revision's root, mounted. Instances keep it; the last one to go unmounts it.
pub struct Mounted {
    dir: PathBuf,
    pub order: RootOrder,
    pub user: User,
    /// Absolute, as the container sees it.
    pub working_dir: String,
    pub hostname: String,
}

impl Mounted {
    /// The mounted overlay.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Where libcontainer finds `config.json`.
    pub fn bundle(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.path(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.dir);
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

    fn range(&mut self, uid_base: u32) -> io::Result<&OwnedFd> {
        if !self.namespaces.contains_key(&uid_base) {
            let namespace = user_namespace(uid_base)?;
            self.namespaces.insert(uid_base, namespace);
        }
        Ok(&self.namespaces[&uid_base])
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

/// Mounts a revision's root in `dir`, which does not exist yet.
pub fn mount(dir: PathBuf, order: RootOrder, id_maps: Option<&mut IdMaps>) -> Result<Mounted, Refusal> {
    check(&order)?;
    let uid_base = if id_maps.is_some() { order.uid_base } else { 0 };
    let namespace = match id_maps {
        Some(maps) => Some(maps.range(order.uid_base).map_err(failed("make a user namespace"))?),
        None => None,
    };
    // From here on a failure cleans up after itself: `Mounted` and `Layers` unmount when dropped.
    let mut mounted = Mounted {
        hostname: hostname(&order.key),
        dir,
        order,
        user: User { uid: 0, gid: 0, groups: Vec::new(), home: String::new() },
        working_dir: String::new(),
    };
    let dir = mounted.dir.clone();
    for part in ["rootfs", "look", "none", "own"] {
        fs::create_dir_all(dir.join(part)).map_err(failed("make a directory for the root"))?;
    }
    let layers = Layers::attach(&dir, &mounted.order.layers, namespace)
        .map_err(failed("attach the image's layers"))?;

    overlay(&dir, "none", layers.count, "look").map_err(failed("mount the image's layers"))?;
    let looked =
        Image::open(&dir.join("look"), uid_base).map_err(failed("open the image's root")).and_then(|image| {
            let passwd = image.read_small("/etc/passwd")?;
            let group = image.read_small("/etc/group")?;
            mounted.user = User::resolve(&mounted.order.user, &passwd, &group).map_err(Refusal::Unusable)?;
            let own = OwnLayer { dir: dir.join("own"), uid_base };
            mounted.working_dir = own.fill(&image, &mounted, &dir.join(format!("l{}", layers.count - 1)))?;
            image.check_command(&mounted)
        });
    let _ = nix::mount::umount2(&dir.join("look"), MntFlags::MNT_DETACH);
    looked?;

    overlay(&dir, "own", layers.count, "rootfs").map_err(failed("mount the root"))?;
    Ok(mounted)
}

fn failed(doing: &str) -> impl FnOnce(io::Error) -> Refusal + '_ {
    move |err| Refusal::Failed(format!("{doing}: {err}"))
}

fn check(order: &RootOrder) -> Result<(), Refusal> {
    let unusable = |text: String| Err(Refusal::Unusable(text));
    if order.layers.is_empty() {
        return unusable("the image has no layers".to_owned());
    }
    if order.layers.len() > LAYERS_MAX {
        return unusable(format!("the image has {} layers, {LAYERS_MAX} at most", order.layers.len()));
    }
    if order.command.first().is_none_or(String::is_empty) {
        return unusable("neither the image nor the manifest names a command".to_owned());
    }
    if order.command.iter().chain(&order.env).any(|text| text.contains('\0')) {
        return unusable("the command or an environment variable contains NUL".to_owned());
    }
    Ok(())
}

/// The function's name: the key up to the revision's number.
fn hostname(key: &str) -> String {
    let name = key.rsplit_once('.').map_or(key, |(name, _)| name);
    name.chars().take(63).collect() // HOST_NAME_MAX is 64 with its end
}

/// Image layers attached as `l0`, `l1`, … in a directory; detached when dropped.
struct Layers<'a> {
    dir: &'a Path,
    count: usize,
}

impl<'a> Layers<'a> {
    fn attach(dir: &'a Path, layers: &[PathBuf], namespace: Option<&OwnedFd>) -> io::Result<Self> {
        let mut attached = Self { dir, count: 0 };
        for layer in layers {
            let at = dir.join(format!("l{}", attached.count));
            fs::create_dir_all(&at)?;
            let copy = sys::detached_copy(layer, namespace.map(AsFd::as_fd))?;
            sys::attach(copy, &at)?;
            attached.count += 1;
        }
        Ok(attached)
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
fn overlay(dir: &Path, top: &str, count: usize, at: &str) -> io::Result<()> {
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

/// An image's root to look into. Nothing outside it can be reached, whatever its symlinks say.
struct Image {
    root: OwnedFd,
    prefix: PathBuf,
    /// What ids of the image are shifted by, seen from the launcher.
    uid_base: u32,
}

impl Image {
    fn open(at: &Path, uid_base: u32) -> io::Result<Self> {
        let root = rustix::fs::open(at, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, prefix: at.to_owned(), uid_base })
    }

    fn find(&self, path: &str, flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let relative = path.trim_start_matches('/');
        let relative = if relative.is_empty() { "." } else { relative };
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.root, relative, flags | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// A small text file; empty when there is none.
    fn read_small(&self, path: &str) -> Result<String, Refusal> {
        // NONBLOCK: an image's FIFO must not stop the launcher.
        let file = match self.find(path, OFlags::RDONLY | OFlags::NONBLOCK, ResolveFlags::empty()) {
            Ok(file) => fs::File::from(file),
            Err(_) => return Ok(String::new()),
        };
        let mut bytes = Vec::new();
        let read = file.take(ACCOUNTS_BYTES_MAX + 1).read_to_end(&mut bytes);
        match read {
            Ok(n) if n as u64 > ACCOUNTS_BYTES_MAX => Err(Refusal::Unusable(format!(
                "the image's {path} is larger than {ACCOUNTS_BYTES_MAX} bytes"
            ))),
            Ok(_) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(_) => Ok(String::new()), // a directory
        }
    }

    /// Where a path really leads, inside the image, and what is there.
    fn real(&self, path: &str) -> io::Result<(PathBuf, fs::Metadata)> {
        let found = self.find(path, OFlags::PATH, ResolveFlags::empty())?;
        let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        let inside = real.strip_prefix(&self.prefix).map_err(io::Error::other)?;
        Ok((Path::new("/").join(inside), fs::File::from(found).metadata()?))
    }

    /// Refuses a command that execve would refuse, before anything is started for it.
    fn check_command(&self, mounted: &Mounted) -> Result<(), Refusal> {
        let name = &mounted.order.command[0];
        let path = mounted.order.env.iter().rev().find_map(|var| var.strip_prefix("PATH="));
        let mut denied = false;
        for candidate in candidates(name, path.unwrap_or(DEFAULT_PATH)) {
            let absolute = Path::new(&mounted.working_dir).join(&candidate);
            let Ok((_, meta)) = self.real(&absolute.to_string_lossy()) else { continue };
            if !meta.is_file() || !self.may_execute(&meta, &mounted.user) {
                denied = true;
                continue;
            }
            return self.check_interpreter(name, &absolute.to_string_lossy());
        }
        Err(Refusal::Unusable(if denied {
            format!("command `{name}` may not be executed by user {}", mounted.user.uid)
        } else {
            format!("command `{name}` is not in the image")
        }))
    }

    /// Without capabilities even uid 0 needs a bit that is meant for it.
    fn may_execute(&self, meta: &fs::Metadata, user: &User) -> bool {
        let inside = |id: u32| id.checked_sub(self.uid_base);
        let bit = if inside(meta.uid()) == Some(user.uid) {
            0o100
        } else if inside(meta.gid()).is_some_and(|gid| gid == user.gid || user.groups.contains(&gid)) {
            0o010
        } else {
            0o001
        };
        meta.mode() & bit != 0
    }

    fn check_interpreter(&self, name: &str, path: &str) -> Result<(), Refusal> {
        let Ok(file) = self.find(path, OFlags::RDONLY | OFlags::NONBLOCK, ResolveFlags::empty()) else {
            return Ok(()); // not readable, which execve does not need
        };
        let mut head = Vec::new();
        let _ = fs::File::from(file).take(4096).read_to_end(&mut head);
        match interpreter(&head) {
            Some(needed) if self.real(&needed).is_err() => Err(Refusal::Unusable(format!(
                "command `{name}` needs the interpreter `{needed}`, which is not in the image"
            ))),
            _ => Ok(()),
        }
    }
}

/// What the kernel would load to run a program that begins with `head`: the `#!` line's, or an
/// ELF file's PT_INTERP (elf(5)).
fn interpreter(head: &[u8]) -> Option<String> {
    if let Some(line) = head.strip_prefix(b"#!") {
        let line = line.split(|b| *b == b'\n').next()?;
        let line = String::from_utf8_lossy(line);
        return line.split_whitespace().next().map(str::to_owned);
    }
    let is_elf64_le = head.starts_with(b"\x7fELF\x02\x01");
    if !is_elf64_le {
        return None; // 32-bit and foreign programs: execve will tell
    }
    let number = |at: usize, bytes: usize| -> Option<usize> {
        let field = head.get(at..at.checked_add(bytes)?)?;
        let mut value = [0_u8; 8];
        value[..bytes].copy_from_slice(field);
        usize::try_from(u64::from_le_bytes(value)).ok()
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    (0..count).find_map(|n| {
        let entry = table.checked_add(n.checked_mul(size)?)?;
        const PT_INTERP: usize = 3;
        if number(entry, 4)? != PT_INTERP {
            return None;
        }
        let (offset, length) = (number(entry.checked_add(8)?, 8)?, number(entry.checked_add(32)?, 8)?);
        let text = head.get(offset..offset.checked_add(length)?)?;
        let text = text.split(|b| *b == 0).next()?;
        (!text.is_empty()).then(|| String::from_utf8_lossy(text).into_owned())
    })
}

/// neap's layer, on the launcher's tmpfs. It is not id-mapped (tmpfs can't be before 6.3): what
/// is in it belongs to the ids as they are outside.
struct OwnLayer {
    dir: PathBuf,
    uid_base: u32,
}

impl OwnLayer {
    /// Returns the working directory.
    fn fill(&self, image: &Image, mounted: &Mounted, top_layer: &Path) -> Result<String, Refusal> {
        let failed = failed("make the root's own layer");
        let filled = || -> io::Result<()> {
            // The merged root shows the attributes of the topmost layer's root: ours.
            let root = fs::metadata(top_layer)?;
            self.like(&root, &self.dir)?;
            for point in ["proc", "dev", "tmp"] {
                self.directory(Path::new(point))?;
            }
            let is_link = fs::symlink_metadata(image.prefix.join("etc")).is_ok_and(|meta| !meta.is_dir());
            if !is_link {
                self.ancestors(image, Path::new("etc"))?;
                let name = &mounted.hostname;
                let hosts = format!("127.0.0.1\tlocalhost {name}\n::1\tlocalhost {name}\n");
                self.file("etc/hosts", &hosts)?;
                self.file("etc/hostname", &format!("{name}\n"))?;
            }
            Ok(())
        };
        filled().map_err(failed)?;
        self.working_dir(image, &mounted.order.working_dir)
    }

    /// Finds the working directory, or makes it as docker does.
    fn working_dir(&self, image: &Image, wanted: &str) -> Result<String, Refusal> {
        let wanted = if wanted.is_empty() { "/" } else { wanted };
        let unusable = |why: &str| Refusal::Unusable(format!("working directory `{wanted}` {why}"));
        if !wanted.starts_with('/') || wanted.contains('\0') || wanted.len() > 4096 {
            return Err(unusable("is not an absolute path"));
        }
        match image.real(wanted) {
            Ok((_, meta)) if meta.is_dir() => return Ok(wanted.to_owned()),
            Ok(_) => return Err(unusable("is not a directory of the image")),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return Err(unusable(&format!("can't be used: {err}"))),
        }
        // The longest part that is there, then plain names.
        let parts: Vec<_> = wanted.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        if parts.contains(&"..") {
            return Err(unusable("is not in the image and contains `..`"));
        }
        let mut there = PathBuf::from("/");
        let mut missing = parts.as_slice();
        for n in 1..=parts.len() {
            match image.real(&parts[..n].join("/")) {
                Ok((real, meta)) if meta.is_dir() => (there, missing) = (real, &parts[n..]),
                Ok(_) => return Err(unusable("leads through a file of the image")),
                Err(_) => break,
            }
        }
        let first = there.join(missing.first().copied().unwrap_or_default());
        if fs::symlink_metadata(image.prefix.join(first.strip_prefix("/").unwrap_or(&first))).is_ok() {
            return Err(unusable("leads through a symlink of the image that leads nowhere"));
        }
        let inside = there.strip_prefix("/").unwrap_or(&there).to_owned();
        let made = self.ancestors(image, &inside).and_then(|()| {
            let mut at = inside;
            for part in missing {
                at.push(part);
                self.directory(&at)?;
            }
            Ok(())
        });
        made.map_err(|err| unusable(&format!("can't be made: {err}")))?;
        Ok(wanted.to_owned())
    }

    /// Directories that the image has too look in the overlay as they look here: alike.
    fn ancestors(&self, image: &Image, path: &Path) -> io::Result<()> {
        let mut at = PathBuf::new();
        for part in path.components() {
            at.push(part);
            let ours = self.dir.join(&at);
            if ours.exists() {
                continue;
            }
            self.directory(&at)?;
            if let Ok(theirs) = fs::symlink_metadata(image.prefix.join(&at)) {
                self.like(&theirs, &ours)?;
            }
        }
        Ok(())
    }

    fn directory(&self, path: &Path) -> io::Result<()> {
        let at = self.dir.join(path);
        match fs::create_dir(&at) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            done => done?,
        }
        fs::set_permissions(&at, fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::chown(&at, Some(self.uid_base), Some(self.uid_base))
    }

    fn file(&self, path: &str, text: &str) -> io::Result<()> {
        let at = self.dir.join(path);
        fs::write(&at, text)?;
        fs::set_permissions(&at, fs::Permissions::from_mode(0o644))?;
        std::os::unix::fs::chown(&at, Some(self.uid_base), Some(self.uid_base))
    }

    fn like(&self, theirs: &fs::Metadata, ours: &Path) -> io::Result<()> {
        std::os::unix::fs::chown(ours, Some(theirs.uid()), Some(theirs.gid()))?;
        fs::set_permissions(ours, fs::Permissions::from_mode(theirs.mode() & 0o7777))
    }
}

/// A user namespace that maps `UID_RANGE` ids from `uid_base`, kept by its descriptor alone.
fn user_namespace(uid_base: u32) -> io::Result<OwnedFd> {
    use nix::sched::CloneFlags;
    use nix::unistd::ForkResult;

    let (read, write) = nix::unistd::pipe()?;
    match sys::fork()? {
        ForkResult::Child => {
            let entered = nix::sched::unshare(CloneFlags::CLONE_NEWUSER).is_ok();
            let _ = nix::unistd::write(&write, &[u8::from(entered)]);
            loop {
                nix::unistd::pause();
            }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let made = || -> io::Result<OwnedFd> {
                let mut entered = [0_u8];
                fs::File::from(read).read_exact(&mut entered)?;
                if entered != [1] {
                    return Err(io::Error::new(
                        io::ErrorKind::Unsupported,
                        "unshare refused a user namespace",
                    ));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interpreters_are_found_as_the_kernel_finds_them() {
        assert_eq!(interpreter(b"#!/bin/sh -e\necho").as_deref(), Some("/bin/sh"));
        assert_eq!(interpreter(b"#! /usr/bin/env python3").as_deref(), Some("/usr/bin/env"));
        assert_eq!(interpreter(b"#!\n"), None);
        assert_eq!(interpreter(b"plain text"), None);
        assert_eq!(interpreter(b""), None);
    }

    #[test]
    fn broken_programs_have_no_interpreter_and_do_no_harm() {
        let mut elf = vec![0_u8; 200];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32..40].copy_from_slice(&64_u64.to_le_bytes());
        elf[54..56].copy_from_slice(&56_u16.to_le_bytes());
        elf[56..58].copy_from_slice(&1_u16.to_le_bytes());
        elf[64..68].copy_from_slice(&3_u32.to_le_bytes());
        elf[72..80].copy_from_slice(&150_u64.to_le_bytes());
        elf[96..104].copy_from_slice(&8_u64.to_le_bytes());
        elf[150..158].copy_from_slice(b"/lib/ld\0");
        assert_eq!(interpreter(&elf).as_deref(), Some("/lib/ld"));

        for at in [32, 72, 96] {
            let mut broken = elf.clone();
            broken[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            assert_eq!(interpreter(&broken), None);
        }
        for length in 0..elf.len() {
            let _ = interpreter(&elf[..length]);
        }
    }

    #[test]
    fn hostname_is_the_functions_name() {
        assert_eq!(hostname("thermostat.3"), "thermostat");
        assert_eq!(hostname("plain"), "plain");
    }
}
