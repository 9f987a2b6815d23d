//! System calls that no crate in use offers safely, each wrapped once.

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
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

pub const MOUNT_ATTR_RDONLY: u64 = 0x1;
pub const MOUNT_ATTR_NOSUID: u64 = 0x2;
pub const MOUNT_ATTR_NODEV: u64 = 0x4;
pub const MOUNT_ATTR_NOEXEC: u64 = 0x8;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
/// sys/mount.h, of which `propagation` takes one.
const MS_PRIVATE: u64 = 1 << 18;

/// What image layers are mounted with.
pub const LAYER: u64 = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;

/// A detached copy of the mount at `path`, with attributes added and its ids mapped through a user
/// namespace when there is one.
pub fn detached_copy(path: &Path, set: u64, user_namespace: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let tree = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    set_attributes(&tree, set, user_namespace)?;
    Ok(tree)
}

/// A detached mount of a directory for others to read: nothing that is mounted in one is seen in the
/// other.
pub fn detached_directory(dir: impl AsFd) -> io::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(dir, c"", flags)?;
    change_attributes(&tree, MountAttributes { set: LAYER, propagation: MS_PRIVATE, ..Default::default() })?;
    Ok(tree)
}

/// Maps the ids of a detached mount. False: its file system can't, and its files are nobody's in there.
pub fn map_ids(tree: impl AsFd, user_namespace: BorrowedFd<'_>) -> io::Result<bool> {
    match set_attributes(tree, 0, Some(user_namespace)) {
        Err(err) if err.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        done => done.map(|()| true),
    }
}

fn set_attributes(tree: impl AsFd, set: u64, user_namespace: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut attributes = MountAttributes { set, ..Default::default() };
    if let Some(namespace) = user_namespace {
        attributes.set |= MOUNT_ATTR_IDMAP;
        attributes.user_namespace = namespace.as_raw_fd() as u64;
    }
    change_attributes(tree, attributes)
}

fn change_attributes(tree: impl AsFd, attributes: MountAttributes) -> io::Result<()> {
    let empty: &CStr = c"";
    // SAFETY: path and attributes outlive the call, the size is the structure's own; the kernel
    // reads both and writes neither.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            &attributes,
            size_of::<MountAttributes>(),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A file system on a device, mounted and attached nowhere yet, without access times; ids mapped as in `detached_copy`.
pub fn detached_file_system(
    kind: &str,
    device: &Path,
    set: u64,
    user_namespace: Option<BorrowedFd<'_>>,
) -> io::Result<OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device)?;
    fsconfig_create(&context)?;
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOATIME)?;
    set_attributes(&tree, set, user_namespace)?;
    Ok(tree)
}

/// The number of a loop device that nobody uses at this moment.
pub fn free_loop() -> io::Result<u32> {
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control")?;
    // SAFETY: LOOP_CTL_GET_FREE (loop(4)) takes and writes nothing; the answer is the number.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), 0x4C82 as libc::Ioctl) };
    u32::try_from(number).map_err(|_| io::Error::last_os_error())
}

/// linux/loop.h, `struct loop_config`, with the `struct loop_info64` that is in it.
#[repr(C)]
struct LoopConfig {
    file: u32,
    block_bytes: u32,
    before_flags: [u8; 52],
    flags: u32,
    names_and_key: [u8; 160],
    init: [u64; 2],
    reserved: [u64; 8],
}

/// Small volumes have blocks of 1 KiB, which a device of larger ones refuses. Left to itself Linux 6.15
/// takes the disk's own for the sake of direct I/O, which is 4 KiB on some.
const LOOP_BLOCK_BYTES: u32 = 512;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Puts a file behind a loop device until its last user is gone. The pages are the file system's
/// alone where the file's own can do without.
pub fn configure_loop(device: impl AsFd, file: impl AsFd) -> io::Result<()> {
    let config = LoopConfig {
        file: file.as_fd().as_raw_fd() as u32,
        block_bytes: LOOP_BLOCK_BYTES,
        before_flags: [0; 52],
        flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
        names_and_key: [0; 160],
        init: [0; 2],
        reserved: [0; 8],
    };
    // SAFETY: LOOP_CONFIGURE (Linux 5.8) reads one loop_config, which outlives the call.
    let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), 0x4C0A as libc::Ioctl, &config) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a loop device look how long its file is now.
pub fn refresh_loop(device: impl AsFd) -> io::Result<()> {
    // SAFETY: LOOP_SET_CAPACITY (loop(4)) takes nothing and writes nothing.
    let done = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), 0x4C07 as libc::Ioctl, 0) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets a mounted ext4 grow to so many of its blocks. `inside`: any file or directory of it.
pub fn grow_ext4(inside: impl AsFd, blocks: u64) -> io::Result<()> {
    /// `_IOW('f', 16, __u64)` (fs/ext4/ext4.h).
    const EXT4_IOC_RESIZE_FS: u32 = 0x4008_6610;
    // SAFETY: the kernel reads one 64-bit number, which outlives the call.
    let done = unsafe { libc::ioctl(inside.as_fd().as_raw_fd(), EXT4_IOC_RESIZE_FS as libc::Ioctl, &blocks) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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

/// The same at a path below `root` as a process there sees it; refused when a symlink is on the way.
pub fn attach_below(tree: impl AsFd, root: &Path, at: &Path) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let at = at.strip_prefix("/").unwrap_or(at);
    let at = rustix::fs::openat2(&root, at, flags, Mode::empty(), resolve)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, c"", at, c"", flags)?)
}

/// fork(2), for the launcher, which has a single thread, and for a child that makes system calls
/// only.
pub fn fork() -> io::Result<nix::unistd::ForkResult> {
    // SAFETY: no lock can be held by another thread of the launcher, so its child is an ordinary
    // process; the other kind of child touches neither locks nor memory that they protect.
    Ok(unsafe { nix::unistd::fork()? })
}

/// clone3(2). libc's own constant overflows its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// `struct clone_args` of clone3(2), up to what Linux 5.7 reads. The libc crate has none for musl
/// on 32 bits. All zeroes: nothing is shared, no stack is given.
#[repr(C, align(8))]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const _: () = assert!(size_of::<CloneArguments>() == 88, "CLONE_ARGS_SIZE_VER2 of linux/sched.h");

/// Which side of a fork this is.
pub enum Forked {
    Parent {
        child: i32,
    },
    /// Whether it already is in the cgroup.
    Child {
        is_inside: bool,
    },
}

/// fork(2) for the launcher, into a cgroup of v2 when there is one (clone3(2), CLONE_INTO_CGROUP).
pub fn fork_into(cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    if let Some(cgroup) = cgroup {
        let arguments = CloneArguments {
            flags: CLONE_INTO_CGROUP,
            exit_signal: libc::SIGCHLD as u64,
            cgroup: cgroup.as_raw_fd() as u64,
            ..CloneArguments::default()
        };
        // SAFETY: as fork(2): the caller has a single thread, the child gets a copy of its memory
        // and goes on from here. The C library's fork can't name a cgroup.
        let child = unsafe { libc::syscall(libc::SYS_clone3, &arguments, size_of::<CloneArguments>()) };
        match child {
            0 => return Ok(Forked::Child { is_inside: true }),
            child if child > 0 => return Ok(Forked::Parent { child: child as i32 }),
            _ => match io::Error::last_os_error() {
                // Linux below 5.7: the child enters by itself.
                err if [Some(libc::E2BIG), Some(libc::EINVAL), Some(libc::ENOSYS)]
                    .contains(&err.raw_os_error()) => {}
                err => return Err(err),
            },
        }
    }
    Ok(match fork()? {
        nix::unistd::ForkResult::Parent { child } => Forked::Parent { child: child.as_raw() },
        nix::unistd::ForkResult::Child => Forked::Child { is_inside: false },
    })
}

/// Ends a forked child without the rites of an exit, which are its parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process; nothing of it is used afterwards.
    unsafe { libc::_exit(code) }
}

/// Executes `exe` as the first process of a PID namespace of its own, with `stdin` and no stdout,
/// in a process group of its own. It dies with the calling thread. Its pid and pidfd.
///
/// All signals are blocked in it: it unblocks them itself.
pub fn execute_as_first_process(
    exe: BorrowedFd<'_>,
    arguments: &[CString],
    stdin: BorrowedFd<'_>,
    stdout: BorrowedFd<'_>,
) -> io::Result<(i32, OwnedFd)> {
    use nix::sys::signal::{SigSet, SigmaskHow};
    // All memory that the child needs is made before it: the daemon has threads, and another one
    // may hold the allocator's lock while this one is copied.
    let mut argv: Vec<*const libc::c_char> = arguments.iter().map(|a| a.as_ptr()).collect();
    argv.push(std::ptr::null());
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    let (exe, stdin, stdout) = (exe.as_raw_fd(), stdin.as_raw_fd(), stdout.as_raw_fd());
    let mut pidfd: libc::c_int = -1;
    let how = CloneArguments {
        flags: (libc::CLONE_NEWPID | libc::CLONE_PIDFD) as u64,
        exit_signal: libc::SIGCHLD as u64,
        pidfd: &raw mut pidfd as u64,
        ..CloneArguments::default()
    };

    // A handler of the daemon must not run in the child.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: as fork(2). The child makes system calls only, on memory that was made before, and
    // ends in one of two that don't return. No library clones into a PID namespace and executes.
    let child = unsafe { libc::syscall(libc::SYS_clone3, &how, size_of::<CloneArguments>()) };
    if child == 0 {
        // SAFETY: see above; the pointers are to NUL-terminated strings and arrays that end with null.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
            libc::setpgid(0, 0);
            libc::dup2(stdin, 0);
            libc::dup2(stdout, 1);
            let empty = c"".as_ptr();
            let flags = libc::AT_EMPTY_PATH;
            libc::syscall(libc::SYS_execveat, exe, empty, argv.as_ptr(), environment.as_ptr(), flags);
            libc::_exit(127)
        }
    }
    let error = io::Error::last_os_error();
    before.thread_set_mask()?;
    if child < 0 {
        return Err(error);
    }
    // SAFETY: the kernel has just opened it for us (CLONE_PIDFD).
    Ok((child as i32, unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// Takes the program's own code and constants out of this process's memory; what is still needed
/// comes back from the page cache, 64 KiB a fault. Called when a process has started: what
/// starting needs (its code, and a table of relocations as large as a tenth of it), more than
/// half of what was touched by then, is not needed again.
pub fn forget_code() {
    let Ok(exe) = std::fs::read_link("/proc/self/exe") else { return };
    // Kernels without CONFIG_PROC_PAGE_MONITOR have the second alone, which knows of code only.
    let maps = std::fs::read_to_string("/proc/self/smaps");
    let Ok(maps) = maps.or_else(|_| std::fs::read_to_string("/proc/self/maps")) else { return };
    for range in ranges_of_the_file(&maps, &exe.to_string_lossy()) {
        // SAFETY: the mapping is of a file, read-only and without a page that differs from the
        // file's, so that the kernel reads the same bytes again when they are touched. Failing
        // changes nothing.
        unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) };
    }
}

/// Gives back what the process's first thread, which calls this, has used of its stack and no longer
/// uses: starting goes deep, and then it waits for the end.
pub fn forget_stack() {
    /// For this frame and those of what it calls.
    const KEPT_BYTES: usize = 8 << 10;

    let here = 0_u8;
    let used_from = std::ptr::from_ref(std::hint::black_box(&here)).addr();
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    let stack = maps.lines().find(|line| line.ends_with("[stack]")).and_then(range);
    let Some(stack) = stack.filter(|stack| stack.contains(&used_from)) else { return };
    // SAFETY: it only asks for a constant of the system.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let Ok(page_bytes @ 1..) = usize::try_from(page_bytes) else { return };
    let end = used_from.saturating_sub(KEPT_BYTES);
    let dead = stack.start..end - end % page_bytes;
    if !dead.is_empty() {
        // SAFETY: whole pages of this thread's own stack, below what is in use of it: no frame lies there,
        // and later ones expect nothing of what they find. Failing changes nothing.
        unsafe { libc::madvise(dead.start as *mut libc::c_void, dead.len(), libc::MADV_DONTNEED) };
    }
}

/// Those mappings of `exe` that hold what the file holds. Code does; read-only data does unless
/// pages of it were relocated, which the kernel counts as `Anonymous`, or as `Swap` once they are
/// out of memory.
fn ranges_of_the_file(maps: &str, exe: &str) -> Vec<std::ops::Range<usize>> {
    const CHANGED: [&str; 2] = ["Anonymous:", "Swap:"];
    let mut found = Vec::new();
    // And how many of the two counts were zero.
    let mut constants: Option<(std::ops::Range<usize>, usize)> = None;
    for line in maps.lines() {
        if let Some(count) = CHANGED.iter().find_map(|key| line.strip_prefix(key)) {
            constants = constants.filter(|_| count.trim() == "0 kB").map(|(range, zero)| (range, zero + 1));
            found.extend(constants.take_if(|(_, zero)| *zero == CHANGED.len()).map(|(range, _)| range));
        } else if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            constants = None;
            match mapping(line, exe) {
                Some((range, "r-xp")) => found.push(range),
                Some((range, "r--p")) => constants = Some((range, 0)),
                _ => {}
            }
        }
    }
    found
}

/// `start-end protection offset device inode path` of proc(5), when it is the program's file.
fn mapping<'a>(line: &'a str, exe: &str) -> Option<(std::ops::Range<usize>, &'a str)> {
    let mut fields = line.split_ascii_whitespace();
    let protection = fields.nth(1)?;
    let path = line.split_once('/').map(|(_, path)| path)?;
    (exe.strip_prefix('/') == Some(path)).then_some((range(line)?, protection))
}

/// The addresses that a line of /proc/PID/maps begins with.
fn range(line: &str) -> Option<std::ops::Range<usize>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
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

/// What iptables of before nf_tables have in their table `filter`, and where in it the policy for
/// what is forwarded stands. Asking makes the table where there is none.
pub fn legacy_iptables() -> io::Result<(Vec<u8>, usize)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    // linux/netfilter_ipv4/ip_tables.h: IPT_SO_GET_INFO, struct ipt_getinfo (a name of 32 bytes,
    // the hooks, five entries, five policies, how many, how long); IPT_SO_GET_ENTRIES, struct
    // ipt_get_entries (the name, how long, then entries, which are aligned to eight bytes).
    const GET_INFO: (i32, usize) = (64, 84);
    const GET_ENTRIES: (i32, usize) = (65, 40);
    const FORWARD_POLICY: usize = 32 + 4 + 20 + 2 * 4;
    const LENGTH: usize = 80;
    const LENGTH_MAX: usize = 16 << 20;
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let ask = |option, buffer: &mut [u8]| -> io::Result<()> {
        let mut length = buffer.len() as libc::socklen_t;
        let (at, level) = (buffer.as_mut_ptr().cast(), libc::IPPROTO_IP);
        // SAFETY: the kernel writes at most `length` bytes, which are the buffer's own.
        let done = unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, at, &raw mut length) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    let number = |bytes: &[u8], at: usize| {
        let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
        four.map_or(0, u32::from_ne_bytes)
    };
    let mut info = vec![0; GET_INFO.1];
    info[..6].copy_from_slice(b"filter");
    ask(GET_INFO.0, &mut info)?;
    let length = number(&info, LENGTH) as usize;
    if length > LENGTH_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut entries = vec![0; GET_ENTRIES.1 + length];
    entries[..6].copy_from_slice(b"filter");
    entries[32..36].copy_from_slice(&(length as u32).to_ne_bytes());
    ask(GET_ENTRIES.0, &mut entries)?;
    Ok((entries.split_off(GET_ENTRIES.1), number(&info, FORWARD_POLICY) as usize))
}

/// Raises the soft limit of open files to the hard one, which stays: an instance takes five of
/// the daemon's. Returns the hard limit.
pub fn raise_open_files() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    static NAMES: [&str; 2] = ["one", "two"];

    #[test]
    fn only_what_the_programs_file_holds_is_forgotten() {
        let of = |maps: &str| ranges_of_the_file(maps, "/usr/bin/neap");
        let code = "55d0c000-55d1d000 r-xp 00002000 fe:00 131 /usr/bin/neap";
        let data = "55d1d000-55d1e000 r--p 00013000 fe:00 131 /usr/bin/neap";

        assert_eq!(of(code).first(), Some(&(0x55d0_c000..0x55d1_d000)));
        let clean = format!("{data}\nRss: 4 kB\nAnonymous:    0 kB\nSwap:    0 kB\nSwapPss:  0 kB");
        assert_eq!(of(&format!("{clean}\n{code}\nAnonymous: 0 kB\nSwap: 0 kB")).len(), 2);
        // Relocated, as far as anybody knows: it would come back as it was before.
        assert!(of(&format!("{data}\nRss: 4 kB\nAnonymous:     4 kB\nSwap: 0 kB\nVmFlags: rd")).is_empty());
        assert!(of(&format!("{data}\nRss: 0 kB\nAnonymous:     0 kB\nSwap: 4 kB\nVmFlags: rd")).is_empty());
        assert!(of(&format!("{data}\nRss: 0 kB\nAnonymous:     0 kB\nVmFlags: rd")).is_empty());
        assert!(of(data).is_empty());
        assert!(of(&format!("{data}\n7ffd1000-7ffd3000 rw-p 0 00:00 0 [stack]\nAnonymous: 0 kB")).is_empty());
        assert!(ranges_of_the_file(code, "/usr/bin/other").is_empty());
        assert!(of("7ffd1000-7ffd3000 r-xp 00000000 00:00 0 [vdso]").is_empty());
        assert!(of("").is_empty());
    }

    /// On a thread that isn't the first there is nothing of its own to give back; that the first one loses
    /// nothing it uses is what every start of the daemon shows.
    #[test]
    fn other_threads_leave_the_first_ones_stack_alone() {
        let deep = std::hint::black_box([7_u8; 256 << 10]);

        forget_stack();

        assert!(std::hint::black_box(&deep).iter().all(|byte| *byte == 7));
    }

    #[test]
    fn forgotten_code_still_runs() {
        forget_code();

        assert!(threads() > 0);
        // A constant with an address in it, which was written when the program was loaded.
        assert_eq!(std::hint::black_box(NAMES)[1], "two");
    }
}
