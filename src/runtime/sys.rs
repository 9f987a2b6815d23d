//! System calls that no crate in use offers safely, each wrapped once.

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// mount_setattr(2), `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// A detached, read-only copy of the mount at `path`, whose ids are mapped through a user
/// namespace when there is one.
pub fn detached_copy(path: &Path, user_namespace: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let tree = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    let mut attributes = MountAttributes {
        set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
        ..Default::default()
    };
    if let Some(namespace) = user_namespace {
        attributes.set |= MOUNT_ATTR_IDMAP;
        attributes.user_namespace = namespace.as_raw_fd() as u64;
    }
    let empty: &CStr = c"";
    // SAFETY: path and attributes outlive the call, the size is the structure's own; the kernel
    // reads both and writes neither.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            size_of::<MountAttributes>(),
        )
    };
    if done == 0 { Ok(tree) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a detached mount.
pub fn attach(tree: impl AsFd, at: &Path) -> io::Result<()> {
    Ok(move_mount(tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// fork(2) for a process with a single thread: the child may do what the parent may.
pub fn fork() -> io::Result<nix::unistd::ForkResult> {
    debug_assert_eq!(threads(), 1, "only a single-threaded process may go on in a forked child");
    // SAFETY: with one thread no lock can be held by another, so the child is an ordinary process.
    Ok(unsafe { nix::unistd::fork()? })
}

/// How many threads this process has; 0 when /proc can't tell.
pub fn threads() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Threads:"));
    line.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
}

/// Closes every descriptor from `first` up that this process inherited.
pub fn close_from(first: u32) {
    // SAFETY: called at the start of a process that owns no descriptor from `first` up yet.
    // close_range(2) is 5.9; pidfds and mount_setattr, without which neap can't work, are as new.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// The default action for a signal that the Rust runtime ignores, for the program to be executed.
pub fn default_sigpipe() {
    // SAFETY: sets the default action; no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// A descriptor that is known by its number alone.
pub fn borrowed(number: i32) -> BorrowedFd<'static> {
    // SAFETY: the callers have it open for as long as the process lives: descriptor 0 of the
    // launcher, and what a container's first process inherited for the purpose.
    unsafe { BorrowedFd::borrow_raw(number) }
}
