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

/// Whether this kernel has mount_setattr(2), asked without a mount.
pub fn has_mount_setattr() -> bool {
    // SAFETY: a size of 0 is refused before anything is read.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, -1, c"".as_ptr(), 0, std::ptr::null::<u8>(), 0_usize)
    };
    done == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOSYS)
}

/// Attaches a detached mount.
pub fn attach(tree: impl AsFd, at: &Path) -> io::Result<()> {
    Ok(move_mount(tree, c"", CWD, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// fork(2), for the launcher, which has a single thread, and for a child that makes system calls
/// only.
pub fn fork() -> io::Result<nix::unistd::ForkResult> {
    // SAFETY: no lock can be held by another thread of the launcher, so its child is an ordinary
    // process; the other kind of child touches neither locks nor memory that they protect.
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

/// The default action for every signal, for the program to be executed: the Rust runtime ignores
/// SIGPIPE, `nohup` and others ignore theirs, and execve keeps what is ignored.
pub fn default_signals() {
    // The kernel's sigaction, all zeroes: SIG_DFL, no flags, no mask. Its size differs among
    // architectures; none is larger than this.
    let default = [0_u64; 8];
    let set_bytes = 8_usize;
    for signal in 1..=64 {
        // SAFETY: the kernel reads a sigaction from memory that is larger than one. The C
        // library's wrapper would refuse the two signals that it keeps to itself. KILL and STOP
        // are refused, which is right.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, set_bytes) };
    }
}

/// A descriptor that is known by its number alone.
pub fn borrowed(number: i32) -> BorrowedFd<'static> {
    // SAFETY: the callers have it open for as long as the process lives: descriptor 0 of the
    // launcher, and what a container's first process inherited for the purpose.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Whether this kernel takes seccomp filters, asked without setting one.
pub fn has_seccomp_filters() -> bool {
    // SAFETY: the kernel reads the program from address 0, where nothing is mapped, and answers
    // EFAULT; one without filters (CONFIG_SECCOMP_FILTER) answers EINVAL before it looks.
    let done = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, std::ptr::null::<libc::c_void>(), 0, 0)
    };
    done == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT)
}

/// For a process that ends by SIGKILL or by itself alone.
pub fn ignore_termination() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: sets the disposition to ignore; no handler is involved.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Raises the soft limit of open files to the hard one, which stays: an instance takes five of
/// the daemon's. Returns the hard limit.
pub fn raise_open_files() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
