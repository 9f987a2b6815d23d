//! How the launcher shuts itself in before it does anything: two executions of one process.
//!
//! `neap launcher enclose ORDERS` is the daemon's child and dies with it (PR_SET_PDEATHSIG; once it
//! serves, of its own accord, when it has ended what is frozen). It is
//! the first process of a PID namespace: when it dies, by whatever signal, the kernel kills
//! every container with it; signals that it has no handler for don't reach it, so that a service
//! manager that stops the whole unit does not end functions before the daemon has drained. It
//! makes a mount namespace whose mounts reach nobody else, puts the binary behind a
//! read-only mount and executes it from there as `neap launcher serve ORDERS`: what a container
//! could reach through /proc/PID/exe (CVE-2019-5736) can't be written.
//!
//! That one changes its root to a tmpfs that holds the binary, a /proc of its own, /dev, the
//! needed cgroup hierarchies, the data directory and its state. A container on its way into its
//! own root sees no more of the host than this, host file systems are not kept busy, paths of
//! ours can be walked by a user namespace's root whatever the modes of the host's directories,
//! and the mount table, which each create copies and reads several times, is short.
//!
//! Descriptor 0 is the control socket until `serve` takes it over.

use super::cgroup::Cgroups;
use super::sys;
use super::wire::Orders;
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

/// State of 4096 instances at some 12 KiB, and neap's own layers.
const ROOT_OPTIONS: &str = "size=128m,mode=755";

/// Where the cgroup hierarchies are, in the launcher's own root.
const CGROUPS: &str = "/cgroups";

/// Where libcgroups looks for them: it finds a plain directory and, in the mount table, no name
/// that it knows, and leaves cgroups alone (limits.rs).
const NO_CGROUPS: &str = "/sys/fs/cgroup";

/// Where the launcher keeps its state, in its own root.
pub const STATE: &str = "/state";

const NONE: Option<&str> = None;

/// The first step. Returns only when it failed: why.
pub fn enclose(orders: &Orders, text: &str) -> String {
    sys::close_from(3);
    let unblocked = nix::sys::signal::SigSet::empty().thread_set_mask();
    if let Err(err) = unblocked {
        return format!("unblock signals: {err}");
    }
    match shut_in(orders) {
        Ok(()) => enter(orders, text),
        Err(err) => format!("make the launcher's mount namespace: {err}"),
    }
}

fn shut_in(orders: &Orders) -> io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    // Slave, not private: what the host unmounts must not stay busy here. Nothing of ours
    // reaches the host, and mounts made below are private.
    nix::mount::mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SLAVE, NONE)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    nix::mount::mount(Some("neap"), &orders.state_dir, Some("tmpfs"), flags, Some(ROOT_OPTIONS))?;
    hide_binary(&orders.state_dir)
}

/// Makes the tmpfs the root, with all that the launcher needs. Its libraries, when it has any,
/// are loaded by now. Returns where the cgroups are from there.
pub fn change_root(orders: &Orders, cgroups: &Cgroups) -> io::Result<Cgroups> {
    let root = &orders.state_dir;
    let place = |path: &Path| -> io::Result<PathBuf> {
        let at = root.join(path.strip_prefix("/").unwrap_or(path));
        fs::create_dir_all(&at)?;
        Ok(at)
    };
    let bind = |path: &Path, at: &Path| -> io::Result<()> {
        Ok(nix::mount::mount(Some(path), &place(at)?, NONE, MsFlags::MS_BIND, NONE)?)
    };
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("proc"), &place(Path::new("/proc"))?, Some("proc"), flags, NONE)?;
    bind(Path::new("/dev"), Path::new("/dev"))?;
    let (cgroups, mounts) = cgroups.moved(Path::new(CGROUPS));
    for (from, to) in &mounts {
        bind(from, to)?;
    }
    place(Path::new(NO_CGROUPS))?;
    // Layers may be named with or without the symlinks that lead to the data directory.
    let real = fs::canonicalize(&orders.data_dir)?;
    for at in [&real, &orders.data_dir] {
        let at = place(at)?;
        nix::mount::mount(Some(&real), &at, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)?;
        if real == orders.data_dir {
            break;
        }
    }
    place(Path::new(STATE))?;

    std::env::set_current_dir(root)?;
    match nix::unistd::pivot_root(".", ".") {
        Ok(()) => nix::mount::umount2(".", MntFlags::MNT_DETACH)?,
        // The host runs from its initramfs, which can't be pivoted away: cover it.
        Err(nix::errno::Errno::EINVAL) => {
            nix::mount::mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
            nix::unistd::chroot(".")?;
        }
        Err(err) => return Err(err.into()),
    }
    std::env::set_current_dir("/")?;
    Ok(cgroups)
}

/// Puts this binary at `state_dir/neap`, read-only.
fn hide_binary(state_dir: &Path) -> io::Result<()> {
    let at = state_dir.join("neap");
    fs::File::create(&at)?;
    if bind_binary(&at).is_err() {
        // The file was replaced since we were started, by an upgrade: an unlinked file can't be
        // bound, but read. The copy is memory, all of it.
        fs::remove_file(&at)?;
        fs::copy("/proc/self/exe", &at)?;
        nix::mount::mount(Some(&at), &at, NONE, MsFlags::MS_BIND, NONE)?;
    }
    let flags =
        MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    Ok(nix::mount::mount(NONE, &at, NONE, flags, NONE)?)
}

/// By its path: what /proc/self/exe leads to is in the mount namespace that we were executed in,
/// and the kernel binds from our own only.
fn bind_binary(at: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    nix::mount::mount(Some(&fs::read_link("/proc/self/exe")?), at, NONE, MsFlags::MS_BIND, NONE)?;
    let file = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    if file(at)? == file(Path::new("/proc/self/exe"))? {
        return Ok(());
    }
    nix::mount::umount2(at, MntFlags::MNT_DETACH)?;
    Err(io::Error::new(io::ErrorKind::NotFound, "another file has its name"))
}

/// Becomes `neap launcher serve`; returns only when that failed: why.
fn enter(orders: &Orders, text: &str) -> String {
    let mut command = std::process::Command::new(orders.state_dir.join("neap"));
    let err = command.arg0("neap").args(["launcher", "serve", text]).env_clear().exec();
    format!("execute the launcher from its read-only mount: {err}")
}
